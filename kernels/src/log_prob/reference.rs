//! The definition, as plain tensor operations; forms all logits at once.

use burn::tensor::{DType, Int, Tensor, TensorData, activation::log_softmax};

use crate::cast;

/// See [`super::log_prob`].
pub fn log_prob(hidden: Tensor<2>, head: Tensor<2>, targets: &[u32], temperature: f64) -> (Tensor<1>, Tensor<1>) {
    let n = targets.len();
    let logits = cast(hidden, DType::F32).matmul(cast(head, DType::F32).transpose()).div_scalar(temperature);
    let log_p = log_softmax(logits, 1);
    let ids: Vec<i32> = targets.iter().map(|&t| t as i32).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [n, 1]), &log_p.device());
    let entropy = (log_p.clone().exp() * log_p.clone()).sum_dim(1).neg();
    (log_p.gather(1, ids).reshape([n]), entropy.reshape([n]))
}
