//! One step of AdamW (Loshchilov & Hutter, arXiv 1711.05101) on one parameter, in a single pass over memory.
//!
//! ```text
//! g ← g·scale                                   clipping by the global norm, decided by the caller
//! m ← β₁·m + (1-β₁)·g ;  v ← β₂·v + (1-β₂)·g²
//! p ← p·(1 - lr·decay) - lr · (m / (1-β₁ᵗ)) / (√(v / (1-β₂ᵗ)) + ε)
//! ```
//! Composed of tensor operations this is some twenty passes; a model whose parameters do not fit the caches spends more
//! time on them than a step needs for its products. What an element becomes depends on no other element.

mod cpu;
pub mod reference;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Tensor};

use crate::base::on_cpu;

/// The constants of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta_1: f32,
    /// Decay of the second moment.
    pub beta_2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f32,
    /// Number of this step, from 1: corrects the moments' start at zero.
    pub time: u32,
    /// Factor of the gradient.
    pub scale: f64,
}

impl AdamWStep {
    /// Factors that all elements share: `[scale, 1/(1-β₁ᵗ), 1/(1-β₂ᵗ), 1 - lr·decay, lr]`.
    fn factors(&self) -> [f32; 5] {
        let correction = |beta: f32| (1.0 / (1.0 - f64::from(beta).powi(self.time as i32))) as f32;
        [
            self.scale as f32,
            correction(self.beta_1),
            correction(self.beta_2),
            (1.0 - self.lr * f64::from(self.weight_decay)) as f32,
            self.lr as f32,
        ]
    }
}

/// Fast paths of [`adamw`] and [`sum_of_squares`].
#[backend_extension(Flex)]
pub trait AdamWBackend: Backend {
    /// See [`adamw`]; all f32. Buffers with one owner are written in place.
    fn adamw(
        value: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        moment_1: FloatTensor<Self>,
        moment_2: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// See [`sum_of_squares`]; f32 in, `[1]` f32 out.
    fn sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// The parameter and its moments after one step; all `[n]`, without autodiff. f32 on the CPU takes the fast path, which
/// writes into the buffers it is given when nobody else holds them.
pub fn adamw(
    value: Tensor<1>,
    gradient: Tensor<1>,
    moment_1: Tensor<1>,
    moment_2: Tensor<1>,
    step: AdamWStep,
) -> (Tensor<1>, Tensor<1>, Tensor<1>) {
    let all_f32 = [&value, &gradient, &moment_1, &moment_2].iter().all(|x| x.dtype() == DType::F32);
    if !(on_cpu(&value) && all_f32) {
        return reference::adamw(value, gradient, moment_1, moment_2, step);
    }
    let (value, moment_1, moment_2) = <Dispatch as AdamWBackend>::adamw(
        value.into_dispatch(),
        gradient.into_dispatch(),
        moment_1.into_dispatch(),
        moment_2.into_dispatch(),
        step,
    );
    (Tensor::from_dispatch(value), Tensor::from_dispatch(moment_1), Tensor::from_dispatch(moment_2))
}

/// `Σ x²`, `[1]`; the order of the sum depends on the length alone.
pub fn sum_of_squares(x: Tensor<1>) -> Tensor<1> {
    if !(on_cpu(&x) && x.dtype() == DType::F32) {
        return reference::sum_of_squares(x);
    }
    Tensor::from_dispatch(<Dispatch as AdamWBackend>::sum_of_squares(x.into_dispatch()))
}
