//! `silu(x) = x · sigmoid(x)`, elementwise.

mod backward;
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

use crate::base::{self, device::on_cube};

/// The fast paths, any rank: f32 on the CPU, any float dtype on a device.
#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub trait SiluBackend: Backend {
    /// `x · sigmoid(x)`, in place when `x` is the only owner of its memory.
    fn silu(x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `d_y · (s + x·s·(1 - s))` with `s = sigmoid(x)`, in the shape of `x`.
    fn silu_backward(x: FloatTensor<Self>, d_y: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// `x · sigmoid(x)`, any shape, in the dtype of `x`.
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if !(base::on_cpu(&x) && x.dtype() == DType::F32 || on_cube(&x)) {
        return reference::silu(x);
    }
    Tensor::from_dispatch(<Dispatch as SiluBackend>::silu(x.into_dispatch()))
}
