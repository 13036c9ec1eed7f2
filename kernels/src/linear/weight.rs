//! A weight is a value: the matrix of a linear map, or a layer's stacked experts, in whatever form it is held.
//!
//! Only `linear`, `experts` and `log_prob` look inside; everything else hands it on.

use burn::tensor::{Device, Tensor, TensorData};

use super::quantized::Quantized;
use crate::base::packed::Packed;

/// A matrix `[out, in]` (`D` = 2) or the stacked matrices of a layer's experts `[experts, out, in]` (`D` = 3).
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // one a matrix
pub enum Weight<const D: usize> {
    /// A tensor on any device: f32 or bf16, differentiable where its device is.
    Tensor(Tensor<D>),
    /// Packed for the CPU's own products, in f32, bf16, int8 or int4: a constant.
    Packed(Packed),
    /// For a device's own products, in int8 or int4: a constant.
    Quantized(Quantized),
}

impl<const D: usize> Weight<D> {
    /// `[out, in]` or `[experts, out, in]`.
    ///
    /// # Panics
    /// If several packed matrices are asked for as one (`D` = 2).
    pub fn dims(&self) -> [usize; D] {
        let all = match self {
            Self::Tensor(tensor) => return tensor.dims(),
            Self::Packed(packed) => [packed.count(), packed.out(), packed.input()],
            Self::Quantized(quantized) => quantized.dims(),
        };
        assert!(D == 3 || D == 2 && all[0] == 1, "{all:?} as a weight of rank {D}");
        std::array::from_fn(|i| all[i + 3 - D])
    }

    /// Matrix `matrix` as a plain tensor on `device`, for the definitions: constants are dequantized to f32.
    pub(crate) fn dense(&self, matrix: usize, device: &Device) -> Tensor<2> {
        match self {
            Self::Tensor(tensor) => {
                let dims = tensor.dims();
                let all = [dims[..D - 2].iter().product(), dims[D - 2], dims[D - 1]];
                tensor.clone().reshape(all).narrow(0, matrix, 1).squeeze_dim(0)
            }
            Self::Packed(packed) => dense(packed, matrix, device),
            Self::Quantized(quantized) => dense(&quantized.packed(matrix), 0, device),
        }
    }
}

fn dense(packed: &Packed, matrix: usize, device: &Device) -> Tensor<2> {
    let (out, input) = (packed.out(), packed.input());
    let mut all = vec![0f32; out * input];
    for (row, to) in all.chunks_mut(input.max(1)).enumerate() {
        packed.row(matrix, row, to);
    }
    Tensor::from_data(TensorData::new(all, [out, input]), device)
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

impl<const D: usize> From<Quantized> for Weight<D> {
    fn from(quantized: Quantized) -> Self {
        Self::Quantized(quantized)
    }
}
