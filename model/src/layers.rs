//! The three small modules every layer is made of, with the checkpoint's layouts.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Int, Tensor};
use m1_kernels::{linear, rms_norm};

/// A linear map without bias.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[out, in]`, as the checkpoint stores it.
    pub weight: Param<Tensor<2>>,
}

impl Linear {
    /// Normal with deviation `gain / √in`.
    pub fn new(input: usize, output: usize, gain: f64, device: &Device) -> Self {
        let std = gain / (input as f64).sqrt();
        Self { weight: Initializer::Normal { mean: 0.0, std }.init([output, input], device) }
    }

    /// `[n, in] -> [n, out]` in the dtype of the weight.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        linear::linear(x, self.weight.val())
    }

    /// `[n, in] -> [n, out]` in f32, whatever the weight is stored in.
    pub fn forward_f32(&self, x: Tensor<2>) -> Tensor<2> {
        linear::linear_f32(x, self.weight.val())
    }
}

/// Root-mean-square norm; its weight is kept in f32 and it computes in f32.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[dim]`, f32.
    pub weight: Param<Tensor<1>>,
    eps: f64,
}

impl RmsNorm {
    /// A weight of ones.
    pub fn new(dim: usize, eps: f64, device: &Device) -> Self {
        Self { weight: Initializer::Ones.init([dim], device), eps }
    }

    /// `[n, dim] -> [n, dim]`, same dtype.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        rms_norm::rms_norm(x, self.weight.val(), self.eps)
    }
}

/// Token embeddings.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[vocab, hidden]`.
    pub weight: Param<Tensor<2>>,
}

impl Embedding {
    /// Standard normal: the first norm of the model makes any scale of it the same.
    pub fn new(vocab: usize, hidden: usize, device: &Device) -> Self {
        Self { weight: Initializer::Normal { mean: 0.0, std: 1.0 }.init([vocab, hidden], device) }
    }

    /// `ids [n] -> [n, hidden]`.
    pub fn forward(&self, ids: Tensor<1, Int>) -> Tensor<2> {
        self.weight.val().select(0, ids)
    }
}
