//! Flex: one pass over memory per row. A row's sums are taken in a fixed order of lanes, so its bits depend on nothing
//! but the row.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;

use super::{RmsNormBackend, check, check_gated, check_same};
use crate::base::flex::tensor;
use crate::base::math::{LANES, fma, sigmoid1};
use crate::base::memory::arbitrary;
use crate::base::rows::{Rows, par_chunks, rows_per_chunk};
use crate::base::simd::level;
use crate::simd;

/// The weight's gradient is summed in at most this many parts, whatever the number of threads.
const PARTS: usize = 64;

impl RmsNormBackend for Flex {
    fn rms_norm(x: FlexTensor, w: FlexTensor, eps: f64) -> FlexTensor {
        check(dims(&x), dims(&w));
        let shape = x.layout().shape().clone();
        let w = Weight::new(w);
        let x = Rows::new(x, w.dim);
        let mut y = arbitrary(x.n * x.dim);
        let (level, eps, per) = (level(), eps as f32, rows_per_chunk(x.n, x.dim));
        par_chunks([(&mut y, per * x.dim)], |chunk, [y]| {
            let mut scratch = Vec::new();
            for (i, y) in y.chunks_exact_mut(x.dim).enumerate() {
                norm_row(level, x.get(chunk * per + i, &mut scratch), w.get(), eps, y);
            }
        });
        tensor(y, shape)
    }

    fn rms_norm_backward(x: FlexTensor, w: FlexTensor, d_y: FlexTensor, eps: f64) -> (FlexTensor, FlexTensor) {
        let shape = x.layout().shape().clone();
        let w = Weight::new(w);
        let (x, d_y) = (Rows::new(x, w.dim), Rows::new(d_y, w.dim));
        let mut d_x = arbitrary(x.n * x.dim);
        let per = x.n.div_ceil(PARTS).max(32);
        let mut d_w = vec![0.0; x.n.div_ceil(per) * x.dim];
        let (level, eps) = (level(), eps as f32);
        par_chunks([(&mut d_x, per * x.dim), (&mut d_w, x.dim)], |chunk, [d_x, d_w]| {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            for (i, d_x) in d_x.chunks_exact_mut(x.dim).enumerate() {
                let row = chunk * per + i;
                norm_backward_row(level, x.get(row, &mut a), w.get(), d_y.get(row, &mut b), eps, d_x, d_w);
            }
        });
        (tensor(d_x, shape), tensor(sum_parts(d_w, x.dim), [x.dim]))
    }

    fn add_rms_norm(
        residual: FlexTensor,
        branch: FlexTensor,
        w: FlexTensor,
        alpha: f64,
        beta: f64,
        eps: f64,
    ) -> (FlexTensor, FlexTensor) {
        check(dims(&residual), dims(&w));
        check_same(dims(&residual), dims(&branch));
        let shape = residual.layout().shape().clone();
        let w = Weight::new(w);
        let (residual, branch) = (Rows::new(residual, w.dim), Rows::new(branch, w.dim));
        let (n, dim) = (residual.n, residual.dim);
        let (mut sum, mut y) = (arbitrary(n * dim), arbitrary(n * dim));
        let (level, per) = (level(), rows_per_chunk(n, dim));
        let (alpha, beta, eps) = (alpha as f32, beta as f32, eps as f32);
        par_chunks([(&mut sum, per * dim), (&mut y, per * dim)], |chunk, [sum, y]| {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            for (i, (sum, y)) in sum.chunks_exact_mut(dim).zip(y.chunks_exact_mut(dim)).enumerate() {
                let row = chunk * per + i;
                add_row(level, residual.get(row, &mut a), branch.get(row, &mut b), alpha, beta, sum);
                norm_row(level, sum, w.get(), eps, y);
            }
        });
        (tensor(sum, shape.clone()), tensor(y, shape))
    }

    fn gated_rms_norm(o: FlexTensor, gate: FlexTensor, w: FlexTensor, eps: f64) -> FlexTensor {
        check(dims(&gate), dims(&w));
        check_gated(o.layout().shape(), dims(&gate));
        let shape = gate.layout().shape().clone();
        let w = Weight::new(w);
        let (o, gate) = (Rows::new(o, w.dim), Rows::new(gate, w.dim));
        let mut y = arbitrary(o.n * o.dim);
        let (level, eps, per) = (level(), eps as f32, rows_per_chunk(o.n, o.dim));
        par_chunks([(&mut y, per * o.dim)], |chunk, [y]| {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            for (i, y) in y.chunks_exact_mut(o.dim).enumerate() {
                let row = chunk * per + i;
                gated_row(level, o.get(row, &mut a), gate.get(row, &mut b), w.get(), eps, y);
            }
        });
        tensor(y, shape)
    }

    fn gated_rms_norm_backward(
        o: FlexTensor,
        gate: FlexTensor,
        w: FlexTensor,
        d_y: FlexTensor,
        eps: f64,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let (shape, gate_shape) = (o.layout().shape().clone(), gate.layout().shape().clone());
        let w = Weight::new(w);
        let (o, gate, d_y) = (Rows::new(o, w.dim), Rows::new(gate, w.dim), Rows::new(d_y, w.dim));
        let (n, dim) = (o.n, o.dim);
        let (mut d_o, mut d_gate) = (arbitrary(n * dim), arbitrary(n * dim));
        let per = n.div_ceil(PARTS).max(32);
        let mut d_w = vec![0.0; n.div_ceil(per) * dim];
        let (level, eps) = (level(), eps as f32);
        let outs = [(&mut d_o[..], per * dim), (&mut d_gate[..], per * dim), (&mut d_w[..], dim)];
        par_chunks(outs, |chunk, [d_o, d_gate, d_w]| {
            let (mut a, mut b, mut c) = (Vec::new(), Vec::new(), Vec::new());
            for (i, (d_o, d_gate)) in d_o.chunks_exact_mut(dim).zip(d_gate.chunks_exact_mut(dim)).enumerate() {
                let row = chunk * per + i;
                let (o, gate, d_y) = (o.get(row, &mut a), gate.get(row, &mut b), d_y.get(row, &mut c));
                gated_backward_row(level, o, gate, w.get(), d_y, eps, d_o, d_gate, d_w);
            }
        });
        (tensor(d_o, shape), tensor(d_gate, gate_shape), tensor(sum_parts(d_w, dim), [dim]))
    }
}

fn dims<const D: usize>(x: &FlexTensor) -> [usize; D] {
    x.layout().shape().dims()
}

/// The norm's weight as one run of memory.
struct Weight {
    tensor: FlexTensor,
    dim: usize,
}

impl Weight {
    fn new(w: FlexTensor) -> Self {
        let tensor = w.to_contiguous();
        Self { dim: tensor.layout().num_elements(), tensor }
    }

    fn get(&self) -> &[f32] {
        self.tensor.storage()
    }
}

/// The sum of the parts `[parts, dim]`, in order.
fn sum_parts(mut parts: Vec<f32>, dim: usize) -> Vec<f32> {
    if parts.is_empty() {
        return vec![0.0; dim];
    }
    let (sum, rest) = parts.split_at_mut(dim);
    for part in rest.chunks_exact(dim) {
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    parts.truncate(dim);
    parts
}

simd! {
    /// `y = x · rsqrt(mean(x²) + eps) · w`
    fn norm_row(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) = norm_row_body;
}

#[inline(always)]
fn norm_row_body<const FMA: bool>(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let r = rsqrt_mean_square::<FMA>(x, eps);
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = x * r * w;
    }
}

simd! {
    /// `sum = residual · alpha + branch · beta`
    fn add_row(residual: &[f32], branch: &[f32], alpha: f32, beta: f32, sum: &mut [f32]) = add_row_body;
}

#[inline(always)]
fn add_row_body<const FMA: bool>(residual: &[f32], branch: &[f32], alpha: f32, beta: f32, sum: &mut [f32]) {
    for ((sum, residual), branch) in sum.iter_mut().zip(residual).zip(branch) {
        *sum = fma::<FMA>(*residual, alpha, branch * beta);
    }
}

simd! {
    /// `y = o · rsqrt(mean(o²) + eps) · w · sigmoid(gate)`
    fn gated_row(o: &[f32], gate: &[f32], w: &[f32], eps: f32, y: &mut [f32]) = gated_row_body;
}

#[inline(always)]
fn gated_row_body<const FMA: bool>(o: &[f32], gate: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let r = rsqrt_mean_square::<FMA>(o, eps);
    for (((y, o), gate), w) in y.iter_mut().zip(o).zip(gate).zip(w) {
        *y = o * r * w * sigmoid1::<FMA>(*gate);
    }
}

simd! {
    /// Writes `d_x`, adds to `d_w`.
    fn norm_backward_row(x: &[f32], w: &[f32], d_y: &[f32], eps: f32, d_x: &mut [f32], d_w: &mut [f32])
        = norm_backward_row_body;
}

/// With `r = rsqrt(mean(x²) + eps)`: `d_x = r · (w·d_y) - x · r³ · mean(x·w·d_y)`, `d_w += d_y · x · r`.
#[inline(always)]
fn norm_backward_row_body<const FMA: bool>(
    x: &[f32],
    w: &[f32],
    d_y: &[f32],
    eps: f32,
    d_x: &mut [f32],
    d_w: &mut [f32],
) {
    let r = rsqrt_mean_square::<FMA>(x, eps);
    let c = dot3::<FMA>(x, w, d_y) / x.len() as f32 * r * (r * r);
    for ((((x, w), d_y), d_x), d_w) in x.iter().zip(w).zip(d_y).zip(d_x).zip(d_w) {
        *d_x = fma::<FMA>(-c, *x, w * d_y * r);
        *d_w = fma::<FMA>(d_y * r, *x, *d_w);
    }
}

simd! {
    /// Writes `d_o` and `d_gate`, adds to `d_w`.
    fn gated_backward_row(
        o: &[f32],
        gate: &[f32],
        w: &[f32],
        d_y: &[f32],
        eps: f32,
        d_o: &mut [f32],
        d_gate: &mut [f32],
        d_w: &mut [f32],
    ) = gated_backward_row_body;
}

/// As [`norm_backward_row_body`] with `d_y · sigmoid(gate)` for `d_y`; `d_gate = d_y · norm(o) · s · (1 - s)`.
#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn gated_backward_row_body<const FMA: bool>(
    o: &[f32],
    gate: &[f32],
    w: &[f32],
    d_y: &[f32],
    eps: f32,
    d_o: &mut [f32],
    d_gate: &mut [f32],
    d_w: &mut [f32],
) {
    // Until the last loop d_o holds sigmoid(gate) and d_gate the gradient of the norm.
    for (((gate, d_y), s), d_n) in gate.iter().zip(d_y).zip(&mut *d_o).zip(&mut *d_gate) {
        *s = sigmoid1::<FMA>(*gate);
        *d_n = d_y * *s;
    }
    let r = rsqrt_mean_square::<FMA>(o, eps);
    let c = dot3::<FMA>(o, w, d_gate) / o.len() as f32 * r * (r * r);
    for ((((o, w), d_o), d_gate), d_w) in o.iter().zip(w).zip(d_o).zip(d_gate).zip(d_w) {
        let (s, d_n) = (*d_o, *d_gate);
        *d_o = fma::<FMA>(-c, *o, w * d_n * r);
        *d_gate = d_n * (o * r * w) * (1.0 - s);
        *d_w = fma::<FMA>(d_n * r, *o, *d_w);
    }
}

#[inline(always)]
fn rsqrt_mean_square<const FMA: bool>(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot::<FMA>(x, x) / x.len() as f32 + eps).sqrt()
}

/// Chains of partial sums: element i goes to chain `i % CHAINS`, enough of them to hide the latency of an addition.
const CHAINS: usize = 4 * LANES;

#[inline(always)]
fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; CHAINS];
    let (a, a_rest) = a.as_chunks::<CHAINS>();
    let (b, b_rest) = b.as_chunks::<CHAINS>();
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = fma::<FMA>(*a, *b, *sum);
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum = fma::<FMA>(*a, *b, *sum);
    }
    fold(sums)
}

#[inline(always)]
fn dot3<const FMA: bool>(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut sums = [0.0; CHAINS];
    let (a, a_rest) = a.as_chunks::<CHAINS>();
    let (b, b_rest) = b.as_chunks::<CHAINS>();
    let (c, c_rest) = c.as_chunks::<CHAINS>();
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for (((sum, a), b), c) in sums.iter_mut().zip(a).zip(b).zip(c) {
            *sum = fma::<FMA>(a * b, *c, *sum);
        }
    }
    for (((sum, a), b), c) in sums.iter_mut().zip(a_rest).zip(b_rest).zip(c_rest) {
        *sum = fma::<FMA>(a * b, *c, *sum);
    }
    fold(sums)
}

#[inline(always)]
fn fold(mut sums: [f32; CHAINS]) -> f32 {
    let mut half = CHAINS / 2;
    while half > 0 {
        let (low, high) = sums.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
        half /= 2;
    }
    sums[0]
}
