//! A weight is a value: the matrix of a linear map, or a layer's stacked experts, in whatever form it is held.
//!
//! Only `linear`, `experts` and `log_prob` look inside; everything else hands it on.

use burn::tensor::Tensor;

use crate::base::packed::Packed;

/// A matrix `[out, in]` (`D` = 2) or the stacked matrices of a layer's experts `[experts, out, in]` (`D` = 3).
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // one a matrix
pub enum Weight<const D: usize> {
    /// A tensor on any device: f32 or bf16, differentiable where its device is.
    Tensor(Tensor<D>),
    /// Packed for the CPU's own products, in f32, bf16, int8 or int4: a constant.
    Packed(Packed),
}

impl<const D: usize> Weight<D> {
    /// `[out, in]` or `[experts, out, in]`.
    ///
    /// # Panics
    /// If several packed matrices are asked for as one (`D` = 2).
    pub fn dims(&self) -> [usize; D] {
        match self {
            Self::Tensor(tensor) => tensor.dims(),
            Self::Packed(packed) => {
                let all = [packed.count(), packed.out(), packed.input()];
                assert!(D == 3 || D == 2 && all[0] == 1, "{all:?} packed as a weight of rank {D}");
                std::array::from_fn(|i| all[i + 3 - D])
            }
        }
    }
}

impl<const D: usize> From<Tensor<D>> for Weight<D> {
    fn from(tensor: Tensor<D>) -> Self {
        Self::Tensor(tensor)
    }
}

impl<const D: usize> From<Packed> for Weight<D> {
    fn from(packed: Packed) -> Self {
        Self::Packed(packed)
    }
}
