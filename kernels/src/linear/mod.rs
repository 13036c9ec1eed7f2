//! `y = x · Wᵀ`, the weight in the checkpoint's own `[out, in]` layout.
//!
//! A weight is multiplied as it is stored. On the CPU: packed weights at their stored size, f32 and bf16 tensors block by block
//! (never widened whole). Each output is one chain of multiply-adds along `in`: a row's bits depend neither on the rows
//! beside it nor on the number of threads, and a weight packed in f32 gives the bits of its tensor.

mod backward;
mod cpu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[allow(clippy::collapsible_if, clippy::assign_op_pattern, clippy::manual_div_ceil, clippy::eq_op)] // CubeCL's language
pub mod cube;
pub mod quantized;
pub mod reference;
#[cfg(test)]
mod tests;
pub mod weight;

pub use quantized::Quantized;
pub use weight::Weight;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Tensor};

use crate::base::{
    device::{self, on_cube},
    on_cpu,
    packed::Packed,
};
use crate::cast;

/// The fast paths; `x [n, in]`, `w [out, in]`, any strides.
#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub trait LinearBackend: Backend {
    /// `x · wᵀ [n, out]`. Both f32, or both bf16 (summed in f32), the result alike; or `x` f32 and `w` bf16, whose product is
    /// taken and kept in f32.
    fn linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Gradients `(dx [n, in], dw [out, in])` of [`LinearBackend::linear`], in the dtypes of `x` and `w`.
    fn linear_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        d_y: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `x · wᵀ [n, out]` in f32 for a packed weight, a constant. `x` is f32; it is rounded as the format asks, unless `exact`.
    fn linear_packed(x: FloatTensor<Self>, w: Packed, exact: bool) -> FloatTensor<Self>;

    /// Gradient `dx [n, in]` of [`LinearBackend::linear_packed`].
    fn linear_packed_backward(w: Packed, d_y: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Two products with packed weights, which are constants and only the CPU's.
#[backend_extension(Flex)]
pub trait LinearPairBackend: Backend {
    /// [`LinearBackend::linear_packed`] of two weights in one format, neither exact.
    fn linear_pair(x: FloatTensor<Self>, first: Packed, second: Packed) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// `x [n, in] · weight [out, in]ᵀ -> [n, out]`: for a tensor in its dtype (`x` is cast to it first); for a packed weight with `x`
/// rounded as the format asks, and an f32 result; for one that is quantized on a device in the dtype of `x`.
///
/// # Panics
/// If a row of `x` is not as long as one of `weight`, or `weight` is packed and `x` not on the CPU.
pub fn linear(x: Tensor<2>, weight: &Weight<2>) -> Tensor<2> {
    match weight {
        Weight::Tensor(weight) => product(cast(x, weight.dtype()), weight.clone()),
        Weight::Packed(weight) => packed(x, weight, false),
        Weight::Quantized(weight) => quantized(x, weight),
    }
}

/// `x` through two weights, as [`linear`] with each; packed ones of one format in one pass, for which `x` is prepared once.
///
/// # Panics
/// As [`linear`].
pub fn linear_pair(x: Tensor<2>, first: &Weight<2>, second: &Weight<2>) -> (Tensor<2>, Tensor<2>) {
    match (first, second) {
        (Weight::Packed(first), Weight::Packed(second))
            if first.format() == second.format() && on_cpu(&x) && !x.device().is_autodiff() =>
        {
            let x = cast(x, DType::F32).into_dispatch();
            let (y, z) = <Dispatch as LinearPairBackend>::linear_pair(x, first.clone(), second.clone());
            (Tensor::from_dispatch(y), Tensor::from_dispatch(z))
        }
        _ => (linear(x.clone(), first), linear(x, second)),
    }
}

/// As [`linear`], but the product is taken in f32 whatever the weight is stored in: router and head.
///
/// # Panics
/// As [`linear`].
pub fn linear_f32(x: Tensor<2>, weight: &Weight<2>) -> Tensor<2> {
    let x = cast(x, DType::F32);
    match weight {
        Weight::Tensor(weight) => product(x, weight.clone()),
        Weight::Packed(weight) => packed(x, weight, true),
        Weight::Quantized(weight) => quantized(x, weight),
    }
}

/// # Panics
/// If a row of `x [n, in]` is not as long as one of `w [out, in]`.
fn check(x: [usize; 2], w: [usize; 2]) {
    assert_eq!(x[1], w[1], "x {x:?} does not go through a weight [out, in] of {w:?}");
}

/// Whether the kernels can number the elements of `x [n, in]`, `w [out, in]` and the result.
fn indexable(x: [usize; 2], w: [usize; 2]) -> bool {
    [x, w, [x[0], w[0]]].iter().all(|shape| device::indexable(shape))
}

fn product(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> {
    check(x.dims(), w.dims());
    let known = matches!((x.dtype(), w.dtype()), (DType::F32, DType::F32 | DType::BF16) | (DType::BF16, DType::BF16));
    let on_device = on_cube(&w) && on_cube(&x) && indexable(x.dims(), w.dims());
    if known && on_cpu(&x) || on_device {
        Tensor::from_dispatch(<Dispatch as LinearBackend>::linear(x.into_dispatch(), w.into_dispatch()))
    } else {
        let w = cast(w, x.dtype());
        reference::linear(x, w)
    }
}

/// Shapes are looked at behind the dispatch, where they need not be copied: a step of decoding has several of these a layer.
///
/// # Panics
/// If `x` is not on the CPU: packed weights are its own.
fn packed(x: Tensor<2>, w: &Packed, exact: bool) -> Tensor<2> {
    assert!(on_cpu(&x), "packed weights are for the CPU");
    let x = cast(x, DType::F32).into_dispatch();
    Tensor::from_dispatch(<Dispatch as LinearBackend>::linear_packed(x, w.clone(), exact))
}

fn quantized(x: Tensor<2>, w: &Quantized) -> Tensor<2> {
    check(x.dims(), [w.dims()[1], w.dims()[2]]);
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    if on_cube(&x) && !x.device().is_autodiff() && w.indexable() && indexable(x.dims(), [w.dims()[1], w.dims()[2]]) {
        return cube::linear_quantized(x, w);
    }
    let w = Weight::<2>::from(w.clone()).dense(0, &x.device());
    reference::linear(x.clone(), cast(w, x.dtype()))
}
