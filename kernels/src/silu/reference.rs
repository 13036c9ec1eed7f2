//! The definition, as plain tensor operations.

use burn::tensor::{Tensor, activation};

/// See [`super::silu`].
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activation::silu(x)
}
