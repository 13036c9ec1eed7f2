//! Per-token log-probability and entropy straight from hidden states: the logits `hidden · headᵀ / temperature` are
//! formed block by block and reduced at once, so that nothing of size `[n, vocab]` is ever in memory, forward or
//! backward (the backward pass forms each block again).
//!
//! ```text
//! log π = z_target - lse      lse = log Σ_j e^{z_j}
//! H     = lse - Σ_j p_j z_j   p_j = e^{z_j - lse}
//! d z_j = dπ · (1[j = target] - p_j) - dH · p_j · (log p_j + H)
//! ```

mod backward;
mod blockwise;
mod cpu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[allow(clippy::collapsible_if, clippy::assign_op_pattern, clippy::manual_div_ceil, clippy::eq_op)] // CubeCL's language
pub mod cube;
pub mod reference;
#[cfg(test)]
mod tests;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Tensor};

use crate::base::{on_cpu, packed::Packed};
use crate::cast;
use crate::linear::Weight;

/// The fast paths; the default bodies are tensor operations on blocks and bound the memory on any device.
///
/// `hidden [n, hidden]` in f32, `head [vocab, hidden]` in f32 or bf16, `targets` n ids below vocab.
#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub trait LogProbBackend: Backend {
    /// `[n, 4]` in f32: log π of the target, entropy, and for the backward pass the largest logit m and
    /// `ln Σ_j e^(z_j - m)`, so that `log p_j = (z_j - m) - ln Σ` loses no precision at large logits.
    fn log_prob(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: Vec<u32>,
        temperature: f64,
    ) -> FloatTensor<Self> {
        blockwise::log_prob::<Self>(hidden, head, &targets, temperature)
    }

    /// Gradients `(d_hidden, d_head)`; `out [n, 4]` is the result of the forward pass; `d_out [n, 4]` its gradient,
    /// of which only the first two columns count.
    fn log_prob_backward(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: Vec<u32>,
        temperature: f64,
        out: FloatTensor<Self>,
        d_out: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        blockwise::log_prob_backward::<Self>(hidden, head, &targets, temperature, out, d_out)
    }

    /// [`LogProbBackend::log_prob`] with a packed head, a constant.
    fn log_prob_packed(
        hidden: FloatTensor<Self>,
        head: Packed,
        targets: Vec<u32>,
        temperature: f64,
    ) -> FloatTensor<Self> {
        let _ = (hidden, head, targets, temperature);
        unreachable!("packed weights are the CPU's; the public function never sends them to a device")
    }

    /// The gradient of `hidden` alone.
    fn log_prob_packed_backward(
        hidden: FloatTensor<Self>,
        head: Packed,
        targets: Vec<u32>,
        temperature: f64,
        out: FloatTensor<Self>,
        d_out: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let _ = (hidden, head, targets, temperature, out, d_out);
        unreachable!("packed weights are the CPU's; the public function never sends them to a device")
    }
}

/// Log-probability of each target and entropy of each distribution, both `[n]` in f32 and natural logarithms.
///
/// - `hidden [n, hidden]`: after the final norm; taken in f32.
/// - `head [vocab, hidden]`: a tensor in f32 or bf16, or packed in any format; products are in f32 either way. One that is
///   quantized on a device is dequantized for the call.
/// - `targets`: n token ids below vocab.
/// - `temperature`: positive, divides the logits.
///
/// Differentiable in `hidden` and in a head that is a tensor. On the CPU a token's bits do not depend on the other tokens of
/// the call, nor on whether a head in f32 or bf16 is packed.
///
/// # Panics
/// When `targets` has another length than `hidden`, a target is no row of `head`, `temperature` is not positive, or the head
/// is packed and `hidden` not on the CPU.
pub fn log_prob(hidden: Tensor<2>, head: &Weight<2>, targets: &[u32], temperature: f64) -> (Tensor<1>, Tensor<1>) {
    let n = targets.len();
    let [vocab, dim] = head.dims();
    assert_eq!(hidden.dims(), [n, dim], "log_prob needs one target per row of hidden, and rows as wide as the head's");
    assert!(targets.iter().all(|&t| (t as usize) < vocab), "log_prob: a target is not below {vocab}");
    assert!(temperature > 0.0 && temperature.is_finite(), "log_prob: the temperature must be positive");
    let (on_cpu, device) = (on_cpu(&hidden), hidden.device());
    let (hidden, targets) = (cast(hidden, DType::F32).into_dispatch(), targets.to_vec());
    let out = match head {
        Weight::Tensor(head) => {
            let head = head.clone();
            let head = if on_cpu && head.dtype() != DType::BF16 { cast(head, DType::F32) } else { head };
            <Dispatch as LogProbBackend>::log_prob(hidden, head.into_dispatch(), targets, temperature)
        }
        Weight::Packed(head) => {
            assert!(on_cpu, "packed weights are for the CPU");
            <Dispatch as LogProbBackend>::log_prob_packed(hidden, head.clone(), targets, temperature)
        }
        Weight::Quantized(_) => {
            let head = head.dense(0, &device).into_dispatch();
            <Dispatch as LogProbBackend>::log_prob(hidden, head, targets, temperature)
        }
    };
    let out = Tensor::<2>::from_dispatch(out);
    // The other two columns are the backward pass's own.
    (out.clone().narrow(1, 0, 1).reshape([n]), out.narrow(1, 1, 1).reshape([n]))
}
