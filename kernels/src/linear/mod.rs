//! `y = x · Wᵀ`, the weight in the checkpoint's own `[out, in]` layout.

pub mod reference;

use burn::tensor::{DType, Tensor};

use crate::cast;

/// `x [n, in] · weight [out, in]ᵀ -> [n, out]`, in the dtype of the weight: `x` is cast to it first.
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    reference::linear(cast(x, weight.dtype()), weight)
}

/// As [`linear`], but the product is taken in f32 whatever the weight is stored in: router and head (SPEC §2).
pub fn linear_f32(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    reference::linear(cast(x, DType::F32), cast(weight, DType::F32))
}
