//! Root-mean-square normalisation over the last dimension, always computed in f32, and the two compounds that a layer
//! needs: with the residual sum before it, and with the sigmoid gate behind it.

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

/// The fast paths. `w` is `[dim]` in f32; the other tensors are f32 on the CPU and of any float dtype on a device, alike but
/// for `o`, whose dtype may be another than that of `gate`.
#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub trait RmsNormBackend: Backend {
    /// `x [n, dim] · rsqrt(mean(x²) + eps) · w`.
    fn rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f64) -> FloatTensor<Self>;

    /// Gradients `(dx [n, dim], dw [dim])` of [`RmsNormBackend::rms_norm`].
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        d_y: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `sum = residual · alpha + branch · beta` and `rms_norm(sum, w, eps)`, all `[n, dim]`, in one pass.
    fn add_rms_norm(
        residual: FloatTensor<Self>,
        branch: FloatTensor<Self>,
        w: FloatTensor<Self>,
        alpha: f64,
        beta: f64,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `rms_norm(o, w, eps) · sigmoid(gate)`: `gate [n, dim]`; `o` has any rank and strides, its elements in row-major
    /// order are `[n, dim]`. The result is `[n, dim]`.
    fn gated_rms_norm(
        o: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self>;

    /// Gradients `(d_o in o's shape, d_gate [n, dim], dw [dim])` of [`RmsNormBackend::gated_rms_norm`].
    fn gated_rms_norm_backward(
        o: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        w: FloatTensor<Self>,
        d_y: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

/// `x · rsqrt(mean(x²) + eps) · weight` over the last dimension.
///
/// `x [n, dim]` in any float dtype, `weight [dim]` in f32; the result has the dtype of `x`, rounded once at the end.
///
/// # Panics
/// If `weight` is not as long as a row.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    let path = Path::of(&x, &weight);
    if path != Path::Cpu {
        check(x.dims(), weight.dims());
    }
    if path == Path::Reference {
        return reference::rms_norm(x, weight, eps);
    }
    Tensor::from_dispatch(<Dispatch as RmsNormBackend>::rms_norm(x.into_dispatch(), weight.into_dispatch(), eps))
}

/// The residual sum and its norm: `sum = residual · alpha + branch · beta`, `normed = rms_norm(sum, weight, eps)`.
///
/// `residual`, `branch` and both results `[n, dim]` of one float dtype (`alpha` and `beta` of the layer's kind).
///
/// # Panics
/// If `residual` and `branch` differ in shape, or `weight` is not as long as a row.
pub fn add_rms_norm(
    residual: Tensor<2>,
    branch: Tensor<2>,
    weight: Tensor<1>,
    alpha: f64,
    beta: f64,
    eps: f64,
) -> (Tensor<2>, Tensor<2>) {
    let path = Path::of(&residual, &weight);
    if path != Path::Cpu || branch.dtype() != DType::F32 {
        check(residual.dims(), weight.dims());
        check_same(residual.dims(), branch.dims());
    }
    if path == Path::Reference || branch.dtype() != residual.dtype() {
        return reference::add_rms_norm(residual, branch, weight, alpha, beta, eps);
    }
    let (residual, branch, weight) = (residual.into_dispatch(), branch.into_dispatch(), weight.into_dispatch());
    let (sum, normed) = <Dispatch as RmsNormBackend>::add_rms_norm(residual, branch, weight, alpha, beta, eps);
    (Tensor::from_dispatch(sum), Tensor::from_dispatch(normed))
}

/// The end of lightning attention: `rms_norm(o, weight, eps) · sigmoid(gate)`, one norm over all heads of a token.
///
/// `gate [n, dim]`; `o` of any rank and any strides, its elements in row-major order `[n, dim]` (so the view
/// `[rows, tokens, heads, head_dim]` of attention's output needs no copy). Result `[n, dim]` in the dtype of `gate`.
///
/// # Panics
/// If `o` has not as many elements as `gate`, or `weight` is not as long as a row.
pub fn gated_rms_norm<const D: usize>(o: Tensor<D>, gate: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    let mut path = Path::of(&gate, &weight);
    if path == Path::Cpu && o.dtype() != DType::F32 {
        path = Path::Reference;
    }
    if path != Path::Cpu {
        check(gate.dims(), weight.dims());
        check_gated(&o.dims(), gate.dims());
    }
    if path == Path::Reference {
        return reference::gated_rms_norm(o, gate, weight, eps);
    }
    let (o, gate, weight) = (o.into_dispatch(), gate.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(<Dispatch as RmsNormBackend>::gated_rms_norm(o, gate, weight, eps))
}

/// Who computes it. On the CPU shapes are looked at behind the dispatch, where they need not be copied; before it elsewhere.
#[derive(Clone, Copy, PartialEq)]
enum Path {
    Cpu,
    Device,
    Reference,
}

impl Path {
    fn of(x: &Tensor<2>, weight: &Tensor<1>) -> Self {
        match weight.dtype() {
            DType::F32 if base::on_cpu(x) && x.dtype() == DType::F32 => Self::Cpu,
            DType::F32 if on_cube(x) => Self::Device,
            _ => Self::Reference,
        }
    }
}

/// # Panics
/// If the weight is not as long as a row of `x`.
fn check(x: [usize; 2], weight: [usize; 1]) {
    assert_eq!([x[1]], weight, "rms_norm: rows {x:?} want a weight as long as one of them");
}

/// # Panics
/// If they differ.
fn check_same(residual: [usize; 2], branch: [usize; 2]) {
    assert_eq!(branch, residual, "add_rms_norm: branch and residual are of one shape");
}

/// # Panics
/// If `o` has not as many elements as `gate`.
fn check_gated(o: &[usize], gate: [usize; 2]) {
    let elements = |shape: &[usize]| shape.iter().product::<usize>();
    assert_eq!(elements(o), elements(&gate), "gated_rms_norm: o {o:?} has not the elements of gate {gate:?}");
}
