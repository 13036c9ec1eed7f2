//! One CubeCL source for CUDA and wgpu: blocks of tokens × vocabulary through the f32 product into a bounded scratch, each
//! reduced at once by one kernel; nothing of size `[n, vocab]`.
//!
//! Offline: `gather_stats` and `form_gradient`, cubes of 256 units, f32; the products are `base::gpu::tile` and
//! `base::gpu::reduce` with A = f32 and B in {f32, bf16}.

// The kernel macro writes modules and functions beside each kernel, which have no place for documentation.
#![allow(missing_docs)]

use burn::{
    backend::{Backend, TensorMetadata, tensor::FloatTensor},
    tensor::DType,
};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{LogProbBackend, blockwise};
use crate::base::device::indexable;
use crate::base::gpu::{
    buffer, cube_max, cube_sum, empty,
    product::{Outer, Product, Rows, Store, Stored},
    rows, spread, zeros,
};

/// Most tokens of a block.
const TOKENS: usize = 1024;
/// Most logits of a block: 64 MiB of f32.
const LOGITS: usize = 1 << 24;
const UNITS: usize = 256;

/// One block of logits into the running sums of its tokens. A cube for each token.
///
/// `stats [tokens, 4]`: largest logit m, `Σ e^(z-m)`, `Σ e^(z-m)·(z-m)`, the target's logit; logits are `logits · scale`.
/// The first block starts them; the last leaves log π, entropy, m and `ln Σ e^(z-m)` in their place.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn gather_stats(
    logits: &[f32],
    targets: &[u32],
    stats: &mut [f32],
    tokens: usize,
    width: usize,
    token0: usize,
    entry0: usize,
    scale: f32,
    #[comptime] first: bool,
    #[comptime] last: bool,
) {
    let row = CUBE_POS;
    if row >= tokens {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let base = row * width;
    let at = (token0 + row) * 4;
    let mut scratch = Shared::<[f32]>::new_slice(UNITS);

    let mut most = logits[base] * scale;
    for i in range_stepped(unit, width, UNITS) {
        let z = logits[base + i] * scale;
        if z > most {
            most = z;
        }
    }
    let mut most = cube_max(most, &mut scratch, UNITS);
    let mut old = most;
    if comptime!(!first) {
        old = stats[at];
        if old > most {
            most = old;
        }
    }
    let mut sum = 0.0f32;
    let mut moment = 0.0f32;
    for i in range_stepped(unit, width, UNITS) {
        let d = logits[base + i] * scale - most;
        let e = d.exp();
        sum += e;
        moment += e * d;
    }
    let mut sum = cube_sum(sum, &mut scratch, UNITS);
    let mut moment = cube_sum(moment, &mut scratch, UNITS);
    // every unit has read the old statistics before unit 0 writes the new ones: the sums above are barriers
    if unit == 0 {
        let mut at_target = 0.0f32;
        if comptime!(!first) {
            let (old_sum, old_moment) = (stats[at + 1], stats[at + 2]);
            let d = old - most;
            let e = d.exp();
            sum += e * old_sum;
            moment += e * (old_moment + old_sum * d);
            at_target = stats[at + 3];
        }
        let target = targets[token0 + row] as usize;
        if target >= entry0 && target < entry0 + width {
            at_target = logits[base + target - entry0] * scale;
        }
        if comptime!(last) {
            let log_sum = sum.ln();
            stats[at] = at_target - most - log_sum;
            stats[at + 1] = log_sum - moment / sum;
            stats[at + 2] = most;
            stats[at + 3] = log_sum;
        } else {
            stats[at] = most;
            stats[at + 1] = sum;
            stats[at + 2] = moment;
            stats[at + 3] = at_target;
        }
    }
}

/// Logits of a block into their gradients, in place: `dπ · (1[target] - p) - dH · p · (log p + H)`, times the scale.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn form_gradient(
    logits: &mut [f32],
    targets: &[u32],
    out: &[f32],
    d_out: &[f32],
    tokens: usize,
    width: usize,
    token0: usize,
    entry0: usize,
    scale: f32,
) {
    let place = ABSOLUTE_POS;
    if place >= tokens * width {
        terminate!();
    }
    let (row, column) = (place / width, place % width);
    let at = (token0 + row) * 4;
    let log_p = logits[place] * scale - out[at + 2] - out[at + 3];
    let p = log_p.exp();
    // a logit of -inf takes no part in the entropy
    let mut through_entropy = 0.0f32;
    if p != 0.0f32 {
        through_entropy = d_out[at + 1] * p * (log_p + out[at + 1]);
    }
    let mut hit = 0.0f32;
    if targets[token0 + row] as usize == entry0 + column {
        hit = 1.0f32;
    }
    logits[place] = (d_out[at] * (hit - p) - through_entropy) * scale;
}

/// A run of rows of a tensor in rows, as a tensor of its own.
fn slice(x: &CubeTensor, start: usize, end: usize) -> CubeTensor {
    let width = x.shape()[1];
    if (start, end) == (0, x.shape()[0]) {
        return x.clone();
    }
    burn_cubecl::kernel::slice(x.clone(), &[start..end, 0..width])
}

fn upload(like: &CubeTensor, targets: &[u32]) -> CubeTensor {
    let bytes: Vec<u8> = targets.iter().flat_map(|t| t.to_le_bytes()).collect();
    CubeTensor::new_contiguous(
        like.client.clone(),
        like.device.clone(),
        [targets.len()].into(),
        like.client.create_from_slice(&bytes),
        DType::U32,
    )
}

/// Tokens and entries of a block.
fn block(n: usize, vocab: usize) -> (usize, usize) {
    let tokens = n.min(TOKENS);
    (tokens, (LOGITS / tokens).min(vocab))
}

/// `z [tokens, width] = x · wᵀ`, in f32.
fn logits(x: &CubeTensor, w: &Stored, width: usize) -> CubeTensor {
    let [m, k] = x.shape().dims();
    let rows = Rows::All;
    Product { x, w, w2: None, plan: None, shares: None, rows, store: Store::Plain, by_k: true, m, n: width, k }
        .run(DType::F32)
}

impl LogProbBackend for CubeBackend {
    fn log_prob(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: Vec<u32>,
        temperature: f64,
    ) -> FloatTensor<Self> {
        let (n, vocab) = (hidden.shape()[0], head.shape()[0]);
        if !indexable(&hidden.shape()) || !indexable(&head.shape()) {
            return blockwise::log_prob::<Self>(hidden, head, &targets, temperature);
        }
        let out = empty(&hidden, [n, 4], DType::F32);
        if n == 0 {
            return out;
        }
        let (hidden, head) = (rows(hidden), rows(head));
        let targets = upload(&hidden, &targets);
        let (tokens, entries) = block(n, vocab);
        for first in (0..vocab).step_by(entries) {
            let last = vocab.min(first + entries);
            let w = Stored::float(slice(&head, first, last));
            for start in (0..n).step_by(tokens) {
                let end = n.min(start + tokens);
                let z = logits(&slice(&hidden, start, end), &w, last - first);
                // SAFETY: the kernel stays within `tokens` rows of `width` logits, and rows `token0..` of the statistics.
                unsafe {
                    gather_stats::launch_unchecked(
                        &z.client,
                        spread(end - start),
                        CubeDim::new_1d(UNITS as u32),
                        buffer(&z),
                        buffer(&targets),
                        buffer(&out),
                        end - start,
                        last - first,
                        start,
                        first,
                        (1.0 / temperature) as f32,
                        first == 0,
                        last == vocab,
                    );
                }
            }
        }
        out
    }

    fn log_prob_backward(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: Vec<u32>,
        temperature: f64,
        out: FloatTensor<Self>,
        d_out: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let ([n, dim], vocab) = (hidden.shape().dims(), head.shape()[0]);
        if !indexable(&hidden.shape()) || !indexable(&head.shape()) {
            return blockwise::log_prob_backward::<Self>(hidden, head, &targets, temperature, out, d_out);
        }
        let dtype = head.dtype;
        let d_hidden = zeros(&hidden, [n, dim], DType::F32);
        if n == 0 || dim == 0 {
            return (d_hidden, zeros(&head, [vocab, dim], dtype));
        }
        let (hidden, head, out, d_out) = (rows(hidden), rows(head), rows(out), rows(d_out));
        let targets = upload(&hidden, &targets);
        let (tokens, entries) = block(n, vocab);
        let chunks: Vec<_> = (0..n).step_by(tokens).map(|start| (start, n.min(start + tokens))).collect();
        let parts: Vec<_> = chunks
            .iter()
            .map(|&(start, end)| (slice(&hidden, start, end), zeros(&hidden, [end - start, dim], DType::F32)))
            .collect();
        let mut d_head = Vec::new();
        for first in (0..vocab).step_by(entries) {
            let last = vocab.min(first + entries);
            let width = last - first;
            let w = Stored::float(slice(&head, first, last));
            let d_w = empty(&hidden, [width, dim], DType::F32);
            for (&(start, end), (x, d_x)) in chunks.iter().zip(&parts) {
                let z = logits(x, &w, width);
                let m = end - start;
                // SAFETY: the kernel stays within `tokens` rows of `width` logits, and rows `token0..` of the results.
                unsafe {
                    form_gradient::launch_unchecked(
                        &z.client,
                        spread((m * width).div_ceil(UNITS)),
                        CubeDim::new_1d(UNITS as u32),
                        buffer(&z),
                        buffer(&targets),
                        buffer(&out),
                        buffer(&d_out),
                        m,
                        width,
                        start,
                        first,
                        (1.0 / temperature) as f32,
                    );
                }
                let (rows, store) = (Rows::All, Store::Add);
                Product {
                    x: &z,
                    w: &w,
                    w2: None,
                    plan: None,
                    shares: None,
                    rows,
                    store,
                    by_k: false,
                    m,
                    n: dim,
                    k: width,
                }
                .run_into(d_x);
                let (a, b, add) = (&z, x, start > 0);
                Outer { a, b, plan: None, a_by_token: false, b_by_token: false, add, rows: m, m: width, n: dim }
                    .run_into(&d_w);
            }
            d_head.push(if dtype == DType::F32 { d_w } else { burn_cubecl::kernel::cast(d_w, dtype) });
        }
        let d_hidden = join::<CubeBackend>(parts.into_iter().map(|(_, d_x)| d_x).collect());
        (d_hidden, join::<CubeBackend>(d_head))
    }
}

/// Rows one after the other; a single part is not copied.
fn join<B: Backend>(mut parts: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    if parts.len() == 1 { parts.remove(0) } else { B::float_cat(parts, 0) }
}
