//! Rotary position embedding of the first `rotary_dim` of each head, half-split: dimension `i` turns with
//! `i + rotary_dim / 2`. The remaining dimensions pass unchanged.

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
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::base::{self, device::on_cube};
use crate::cast;

/// The fast path, f32.
#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub trait RotaryBackend: Backend {
    /// Rotates `x [tokens, heads, head_dim]` by `cos`, `sin` `[tokens, 1, rotary_dim / 2]`, in place when `x` is the only
    /// owner of its memory. The gradient is the same rotation with `-sin`; `cos` and `sin` are constants.
    fn rotary(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Cosines and sines of the positions at hand, shared by all layers of one forward pass.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// `[tokens, 1, rotary_dim / 2]`, f32.
    pub cos: Tensor<3>,
    /// `[tokens, 1, rotary_dim / 2]`, f32.
    pub sin: Tensor<3>,
}

impl Rotation {
    /// Angles `position · theta^(-2i / rotary_dim)`, one row per entry of `positions`.
    ///
    /// Angles are formed in f64 on the host and only their cosine and sine are rounded to f32: an f32 angle at
    /// position 1,000,000 is already 0.03 radians off.
    pub fn new(positions: &[usize], rotary_dim: usize, theta: f64, device: &Device) -> Self {
        let half = rotary_dim / 2;
        let frequencies: Vec<f64> = (0..half).map(|i| theta.powf(-2.0 * i as f64 / rotary_dim as f64)).collect();
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for &position in positions {
            for frequency in &frequencies {
                let angle = position as f64 * frequency;
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        let shape = [positions.len(), 1, half];
        Self {
            cos: Tensor::from_data(TensorData::new(cos, shape), device),
            sin: Tensor::from_data(TensorData::new(sin, shape), device),
        }
    }
}

/// Rotates `x [tokens, heads, head_dim]` by `rotation` of the same tokens; computed in f32, returned in f32.
///
/// # Panics
/// If the rotation is of another number of tokens, or `rotary_dim` exceeds the head.
pub fn rotary(x: Tensor<3>, rotation: &Rotation) -> Tensor<3> {
    let ([tokens, _, head_dim], [_, _, half]) = (x.dims(), rotation.cos.dims());
    let (cos, sin) = (rotation.cos.dims(), rotation.sin.dims());
    assert_eq!(cos, [tokens, 1, half], "rotary: cos is [tokens, 1, rotary_dim / 2] of {tokens} tokens");
    assert_eq!(sin, [tokens, 1, half], "rotary: sin is [tokens, 1, rotary_dim / 2] of {tokens} tokens");
    assert!(2 * half <= head_dim, "rotary: {} dimensions turn, and a head has {head_dim}", 2 * half);
    if !(base::on_cpu(&x) || on_cube(&x)) {
        return reference::rotary(x, rotation);
    }
    let x = if base::on_cpu(&x) { cast(x, DType::F32) } else { x };
    let (cos, sin) = (cast(rotation.cos.clone(), DType::F32), cast(rotation.sin.clone(), DType::F32));
    let (cos, sin) = (cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(<Dispatch as RotaryBackend>::rotary(x.into_dispatch(), cos, sin))
}
