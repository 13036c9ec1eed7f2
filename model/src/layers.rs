//! The three small modules every layer is made of, with the checkpoint's layouts, and what flows between them.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use m1_kernels::{linear, rms_norm};

use crate::batch::ints;
use crate::weight::{FileTable, Held, Table, Weight};

/// A linear map without bias.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[out, in]`, as the checkpoint stores it.
    pub weight: Weight<2>,
}

impl Linear {
    /// Normal with deviation `gain / √in`.
    pub fn new(input: usize, output: usize, gain: f64, device: &Device) -> Self {
        Self { weight: Weight::normal(gain / (input as f64).sqrt(), [output, input], device) }
    }

    /// `[n, in] -> [n, out]`: in the dtype of a tensor weight, in f32 with a packed one, in that of `x` with one quantized on
    /// a device.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        linear::linear(x, &self.weight.value())
    }

    /// [`Linear::forward`] of two maps of the same `x`.
    pub fn forward_pair(&self, other: &Linear, x: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        linear::linear_pair(x, &self.weight.value(), &other.weight.value())
    }

    /// `[n, in] -> [n, out]` in f32, whatever the weight is stored in.
    pub fn forward_f32(&self, x: Tensor<2>) -> Tensor<2> {
        linear::linear_f32(x, &self.weight.value())
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

    /// The stream's sum and its norm, `[n, dim]` each, in one pass.
    pub fn forward_stream(&self, stream: Stream) -> (Tensor<2>, Tensor<2>) {
        match stream.branch {
            None => (stream.residual.clone(), self.forward(stream.residual)),
            Some((branch, alpha, beta)) => {
                rms_norm::add_rms_norm(stream.residual, branch, self.weight.val(), alpha, beta, self.eps)
            }
        }
    }

    /// `norm(o) · sigmoid(gate)`, `[n, dim]` in the dtype of `gate`; `o` of any rank whose elements are `[n, dim]`.
    pub fn forward_gated<const D: usize>(&self, o: Tensor<D>, gate: Tensor<2>) -> Tensor<2> {
        rms_norm::gated_rms_norm(o, gate, self.weight.val(), self.eps)
    }

    /// What is added to the mean square.
    pub fn eps(&self) -> f64 {
        self.eps
    }
}

/// What flows from one norm to the next, `[n, hidden]`: `residual · alpha + branch · beta`, which the norm adds up in its own pass.
#[derive(Debug, Clone)]
pub struct Stream {
    residual: Tensor<2>,
    branch: Option<(Tensor<2>, f64, f64)>,
}

impl Stream {
    /// `residual · alpha + branch · beta`.
    pub fn new(residual: Tensor<2>, alpha: f64, branch: Tensor<2>, beta: f64) -> Self {
        Self { residual, branch: Some((branch, alpha, beta)) }
    }

    /// The residual, and the branch where there is one.
    pub fn parts(&self) -> (&Tensor<2>, Option<&Tensor<2>>) {
        (&self.residual, self.branch.as_ref().map(|(branch, _, _)| branch))
    }

    /// The same with other values: `f` is given the residual, then the branch.
    pub fn map(self, mut f: impl FnMut(Tensor<2>) -> Tensor<2>) -> Self {
        Self { residual: f(self.residual), branch: self.branch.map(|(branch, alpha, beta)| (f(branch), alpha, beta)) }
    }

    /// The sum itself.
    pub fn sum(self) -> Tensor<2> {
        match self.branch {
            None => self.residual,
            Some((branch, alpha, beta)) => self.residual.mul_scalar(alpha) + branch.mul_scalar(beta),
        }
    }

    /// Some of its rows.
    pub fn select(self, rows: Tensor<1, Int>) -> Self {
        Self {
            residual: self.residual.select(0, rows.clone()),
            branch: self.branch.map(|(branch, alpha, beta)| (branch.select(0, rows), alpha, beta)),
        }
    }
}

impl From<Tensor<2>> for Stream {
    fn from(x: Tensor<2>) -> Self {
        Self { residual: x, branch: None }
    }
}

/// Token embeddings.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[vocab, hidden]`.
    pub weight: Table,
}

impl Embedding {
    /// Standard normal: the first norm of the model makes any scale of it the same.
    pub fn new(vocab: usize, hidden: usize, device: &Device) -> Self {
        Self { weight: Table::normal(1.0, [vocab, hidden], device) }
    }

    /// Ids `[n] -> [n, hidden]` on `device`: in the dtype of a tensor, in the table's from a file's rows.
    pub fn forward(&self, ids: Vec<i32>, device: &Device) -> Tensor<2> {
        match &self.weight {
            Held::Tensor(param) => param.val().select(0, ints(ids, device)),
            Held::Constant(FileTable { rows, dtype }) => {
                let mut values = vec![0f32; ids.len() * rows.width()];
                for (id, row) in ids.iter().zip(values.chunks_exact_mut(rows.width())) {
                    // Its scales were looked at when it was loaded.
                    let _ = rows.read(*id as usize, row);
                }
                Tensor::from_data(TensorData::new(values, [ids.len(), rows.width()]), (device, *dtype))
            }
        }
    }
}
