//! Root-mean-square normalisation over the last dimension, always computed in f32.

pub mod reference;

use burn::tensor::Tensor;

/// `x · rsqrt(mean(x²) + eps) · weight` over the last dimension.
///
/// `x [n, dim]` in any float dtype, `weight [dim]` in f32; the result has the dtype of `x`, rounded once at the end.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    reference::rms_norm(x, weight, eps)
}
