//! Rotary position embedding of the first `rotary_dim` of each head, half-split: dimension `i` turns with
//! `i + rotary_dim / 2`. The remaining dimensions pass unchanged (SPEC §2).

pub mod reference;

use burn::tensor::{Device, Tensor, TensorData};

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
pub fn rotary(x: Tensor<3>, rotation: &Rotation) -> Tensor<3> {
    reference::rotary(x, rotation)
}
