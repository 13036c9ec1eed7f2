//! Flex: one task per row and head walks its blocks; the state stays in the cache from block to block.
//!
//! Every sum is one sequential chain (`base::tiles`), so a row's bits depend on its own tokens and on where its blocks end,
//! on nothing else. What lies above the diagonal is neither computed (but for the tile on it) nor read.

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::{TensorMetadata, tensor::FloatTensor};

use super::{BLOCK, BlockPlan, LightningAttentionBackend, cpu_decode};
use crate::base::buffer::SendPtr;
use crate::base::flex::tensor;
use crate::base::masked::{Init, Left, Limits, Right, Size, padded, parts, product, scratch, transpose};
use crate::base::memory::arbitrary;
use crate::base::pool;
use crate::base::simd::{Level, level};
use crate::base::view::{View, forward_strides, swapped, whole};
use crate::simd;

type T = FloatTensor<Flex>;

impl LightningAttentionBackend for Flex {
    fn lightning_block(qkv: T, state: T, plan: BlockPlan) -> (T, T) {
        forward(qkv, state, &plan)
    }

    fn lightning_block_backward(qkv: T, state: T, d_o: T, d_state: T, plan: BlockPlan) -> (T, T) {
        backward(qkv, state, d_o, d_state, &plan)
    }

    fn lightning_decode(qkv: T, gate: T, state: T, norm: T, slopes: Vec<f64>, eps: f64) -> (T, T) {
        cpu_decode::step(qkv, gate, state, norm, &slopes, eps)
    }
}

/// The tokens of each block of a row, relative to the call; blocks end at multiples of [`BLOCK`] in absolute position.
fn blocks(start: usize, length: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    let first = BLOCK - start % BLOCK;
    let count = if length == 0 { 0 } else { 1 + length.saturating_sub(first).div_ceil(BLOCK) };
    (0..count).map(move |i| {
        let end = (first + i * BLOCK).min(length);
        (if i == 0 { 0 } else { first + (i - 1) * BLOCK })..end
    })
}

/// What is left of a contribution after n tokens, per head.
struct Decay {
    /// `exp(-s·n)`, n = 0..=BLOCK.
    after: Vec<f32>,
    /// The same backwards, so that `exp(-s(i-j))` for j = 0..=i is a slice: `backwards[BLOCK - i..]`.
    backwards: Vec<f32>,
}

impl Decay {
    fn new(slope: f64) -> Self {
        let after: Vec<f32> = (0..=BLOCK).map(|n| (-slope * n as f64).exp() as f32).collect();
        Decay { backwards: after.iter().rev().copied().collect(), after }
    }

    /// `exp(-s(m-j))`, j = 1..m.
    fn until_end(&self, m: usize) -> &[f32] {
        &self.backwards[BLOCK + 1 - m..]
    }

    /// `exp(-s·i)`, i = 1..m.
    fn since_start(&self, m: usize) -> &[f32] {
        &self.after[1..=m]
    }
}

simd! {
    /// `x[i] *= by[i]`.
    fn multiply(x: &mut [f32], by: &[f32]) = multiply_body;
}

#[inline(always)]
fn multiply_body<const FMA: bool>(x: &mut [f32], by: &[f32]) {
    for (x, by) in x.iter_mut().zip(by) {
        *x *= by;
    }
}

simd! {
    /// Row i of `x`, `width` values of it, times `by[i]`.
    fn multiply_rows(x: &mut [f32], row: usize, width: usize, by: &[f32]) = multiply_rows_body;
}

#[inline(always)]
fn multiply_rows_body<const FMA: bool>(x: &mut [f32], row: usize, width: usize, by: &[f32]) {
    for (x, by) in x.chunks_exact_mut(row).zip(by) {
        for x in &mut x[..width] {
            *x *= by;
        }
    }
}

/// Rows on the diagonal that are computed together, up to the last one's column.
const STRIPE: usize = 32;

/// `to[i][j] = exp(-s(i-j)) · left_i · right_j` for j ≤ i; what lies beyond is anything.
#[allow(clippy::too_many_arguments)]
fn triangle(
    level: Level,
    m: usize,
    dim: usize,
    left: &[f32],
    row: usize,
    right_t: &[f32],
    decay: &Decay,
    to: &mut [f32],
) {
    for i in (0..m).step_by(STRIPE) {
        let rows = STRIPE.min(m - i);
        let size = Size { rows, width: padded(i + rows), k: dim };
        let left = Left { data: &left[i * row..], row, step: 1 };
        let right = Right { data: right_t, row: BLOCK };
        product(level, size, Limits::All, left, right, Init::Zero, &mut to[i * BLOCK..], BLOCK);
    }
    for (i, line) in to.chunks_exact_mut(BLOCK).take(m).enumerate() {
        multiply(level, &mut line[..=i], &decay.backwards[BLOCK - i..]);
    }
}

/// `0..n` and `1..=n`: which of a block's tokens come first or last for token i.
fn ramps() -> ([usize; BLOCK], [usize; BLOCK]) {
    (std::array::from_fn(|i| i), std::array::from_fn(|i| i + 1))
}

/// Where q, k and v begin in a line of `3 · dim` values.
fn parts_of(dim: usize) -> [usize; 3] {
    [0, dim, 2 * dim]
}

fn forward(qkv: T, state: T, plan: &BlockPlan) -> (T, T) {
    let [rows, heads, tokens, dim] = qkv.shape().dims();
    let dim = dim / 3;
    let qkv = forward_strides(qkv);
    // What no row has is zero.
    let all = rows * tokens * heads * dim;
    let mut o = if plan.lengths.iter().all(|&n| n == tokens) { arbitrary(all) } else { vec![0.0; all] };
    let mut state = match (plan.has_state, plan.want_state) {
        (true, _) => whole(state),
        (false, true) => tensor(vec![0.0; rows * heads * dim * dim], [rows, heads, dim, dim]),
        (false, false) => tensor(Vec::new(), [0, heads, dim, dim]),
    };
    {
        let [q, k, v] = parts_of(dim).map(|from| View::new(&qkv).columns(from));
        let decays: Vec<Decay> = plan.slopes.iter().map(|&slope| Decay::new(slope)).collect();
        let level = level();
        let o = SendPtr(o.as_mut_ptr());
        // Only a wanted state is written, and then it is this call's own.
        let states = if plan.want_state {
            state.storage_mut::<f32>().as_mut_ptr()
        } else {
            state.storage::<f32>().as_ptr().cast_mut()
        };
        let states = SendPtr(states);
        pool::run(rows * heads, |task| {
            let (row, head) = (task / heads, task % heads);
            let decay = &decays[head];
            let width = padded(dim);
            scratch(4 * BLOCK * width + dim * BLOCK + BLOCK * BLOCK + dim * width + dim, |memory| {
                let n = BLOCK * width;
                let [qs, ks, vs, os, kt, scores, s, factors] =
                    parts(memory, [n, n, n, n, dim * BLOCK, BLOCK * BLOCK, dim * width, dim]);
                let (_, to) = ramps();
                let mut has_state = plan.has_state;
                if has_state {
                    // SAFETY: the state holds `rows · heads` matrices, and this task alone touches this one.
                    let own = unsafe { std::slice::from_raw_parts(states.get().add(task * dim * dim), dim * dim) };
                    widen(own, dim, s, width);
                }
                let length = plan.lengths[row];
                for block in blocks(plan.starts[row], length) {
                    let m = block.len();
                    for (view, to) in [(&q, &mut *qs), (&k, &mut *ks), (&v, &mut *vs)] {
                        view.rows(level, (row, head), block.start, m, dim, to, width, width);
                    }
                    transpose(level, m, dim, ks, width, kt, BLOCK);
                    triangle(level, m, dim, qs, width, kt, decay, scores);
                    let left = Left { data: qs, row: width, step: 1 };
                    let mut init = Init::Zero;
                    if has_state {
                        let size = Size { rows: m, width, k: dim };
                        product(level, size, Limits::All, left, Right { data: s, row: width }, init, os, width);
                        init = Init::Scaled(decay.since_start(m));
                    }
                    let size = Size { rows: m, width, k: m };
                    let left = Left { data: scores, row: BLOCK, step: 1 };
                    let right = Right { data: vs, row: width };
                    product(level, size, Limits::To(&to), left, right, init, os, width);
                    for (i, line) in os.chunks_exact(width).take(m).enumerate() {
                        let at = ((row * tokens + block.start + i) * heads + head) * dim;
                        // SAFETY: `o` holds `rows · tokens · heads` such lines, and this task alone writes those of
                        // its row and head.
                        unsafe { std::slice::from_raw_parts_mut(o.get().add(at), dim) }.copy_from_slice(&line[..dim]);
                    }
                    if plan.want_state || block.end < length {
                        multiply_rows(level, ks, width, dim, &decay.until_end(m)[..m]);
                        let init = if has_state {
                            factors.fill(decay.after[m]);
                            Init::Scaled(factors)
                        } else {
                            Init::Zero
                        };
                        let left = Left { data: ks, row: 1, step: width };
                        product(level, Size { rows: dim, width, k: m }, Limits::All, left, right, init, s, width);
                        has_state = true;
                    }
                }
                // A row without tokens keeps its state to the bit: nothing is written.
                if plan.want_state && length > 0 {
                    // SAFETY: as above; `want_state` made the memory this call's own.
                    let own = unsafe { std::slice::from_raw_parts_mut(states.get().add(task * dim * dim), dim * dim) };
                    narrow(s, width, dim, own);
                }
            });
        });
    }
    let o = tensor(o, [rows, tokens, heads, dim]);
    let o = swapped(o);
    let state = if plan.want_state { state } else { o.clone() };
    (o, state)
}

/// Rows of `dim` values into rows of `width`, filled up with zeros.
fn widen(from: &[f32], dim: usize, to: &mut [f32], width: usize) {
    for (to, from) in to.chunks_exact_mut(width).zip(from.chunks_exact(dim)) {
        to[..dim].copy_from_slice(from);
        to[dim..].fill(0.0);
    }
}

/// The opposite of [`widen`].
fn narrow(from: &[f32], width: usize, dim: usize, to: &mut [f32]) {
    for (to, from) in to.chunks_exact_mut(dim).zip(from.chunks_exact(width)) {
        to.copy_from_slice(&from[..dim]);
    }
}

/// With `G` the gradient towards the state after a block, `S` the state before it, `λ = exp(-s)` and `W_ij = λ^(i-j)·d_o_i·v_j`,
/// `P_ij = λ^(i-j)·q_i·k_j` for j ≤ i:
/// ```text
/// d_q_i = λ^i·d_o_i·Sᵀ + Σ_{j≤i} W_ij·k_j
/// d_k_j = λ^(m-j)·v_j·Gᵀ + Σ_{i≥j} W_ij·q_i
/// d_v_j = λ^(m-j)·k_j·G + Σ_{i≥j} P_ij·d_o_i
/// G ← λ^m·G + Σ_i λ^i·q_iᵀ·d_o_i
/// ```
/// A first walk forward keeps every block's `Sᵀ` (as much memory as k at `BLOCK` = head_dim), a second one goes back.
fn backward(qkv: T, state: T, d_o: T, d_state: T, plan: &BlockPlan) -> (T, T) {
    let [rows, heads, tokens, dim] = qkv.shape().dims();
    let dim = dim / 3;
    let width = padded(dim);
    let [qkv, d_o] = [qkv, d_o].map(forward_strides);
    let state = if plan.has_state { whole(state) } else { state };
    let d_state = if plan.want_state { whole(d_state) } else { d_state };
    let all = rows * tokens * heads * 3 * dim;
    let full = plan.lengths.iter().all(|&n| n == tokens); // what no row has is zero
    let mut grad = if full { arbitrary(all) } else { vec![0.0; all] };
    let mut grad_state = vec![0.0_f32; if plan.has_state { rows * heads * dim * dim } else { 0 }];
    {
        let [q, k, v] = parts_of(dim).map(|from| View::new(&qkv).columns(from));
        let d_o = View::new(&d_o);
        let state_of = |x: &FlexTensor, has: bool| if has { x.storage::<f32>().as_ptr() } else { std::ptr::null() };
        let before = SendPtr(state_of(&state, plan.has_state).cast_mut());
        let after = SendPtr(state_of(&d_state, plan.want_state).cast_mut());
        let decays: Vec<Decay> = plan.slopes.iter().map(|&slope| Decay::new(slope)).collect();
        let level = level();
        let grad = SendPtr(grad.as_mut_ptr());
        let grad_state = SendPtr(grad_state.as_mut_ptr());
        pool::run(rows * heads, |task| {
            let (row, head) = (task / heads, task % heads);
            let (decay, length) = (&decays[head], plan.lengths[row]);
            let matrix = dim * width;
            let blocks: Vec<Range<usize>> = blocks(plan.starts[row], length).collect();
            // Sᵀ before each block, behind each other; the first may be zero.
            let mut states = vec![0.0_f32; blocks.len() * matrix];
            let n = BLOCK * width;
            scratch(5 * n + 2 * dim * BLOCK + 2 * BLOCK * BLOCK + 2 * matrix + dim, |memory| {
                let [qs, ks, vs, ds, out, kt, vt, p, w, g, gt, factors] = parts(
                    memory,
                    [n, n, n, n, n, dim * BLOCK, dim * BLOCK, BLOCK * BLOCK, BLOCK * BLOCK, matrix, matrix, dim],
                );
                let (from, to) = ramps();
                if plan.has_state && !blocks.is_empty() {
                    // SAFETY: the state holds `rows · heads` matrices; nothing writes to it.
                    let own = unsafe { std::slice::from_raw_parts(before.get().add(task * dim * dim), dim * dim) };
                    transpose(level, dim, dim, own, dim, &mut states, width);
                }
                for (i, block) in blocks.iter().enumerate().take(blocks.len().saturating_sub(1)) {
                    let m = block.len();
                    k.rows(level, (row, head), block.start, m, dim, ks, width, width);
                    v.rows(level, (row, head), block.start, m, dim, vs, width, width);
                    multiply_rows(level, ks, width, dim, &decay.until_end(m)[..m]);
                    let (known, next) = states[i * matrix..].split_at_mut(matrix);
                    next[..matrix].copy_from_slice(known);
                    factors.fill(decay.after[m]);
                    let left = Left { data: vs, row: 1, step: width };
                    let (size, right) = (Size { rows: dim, width, k: m }, Right { data: ks, row: width });
                    product(level, size, Limits::All, left, right, Init::Scaled(factors), next, width);
                }

                let mut has_g = plan.want_state;
                if has_g {
                    // SAFETY: as above.
                    let own = unsafe { std::slice::from_raw_parts(after.get().add(task * dim * dim), dim * dim) };
                    widen(own, dim, g, width);
                }
                for (i, block) in blocks.iter().enumerate().rev() {
                    let m = block.len();
                    for (view, to) in [(&q, &mut *qs), (&k, &mut *ks), (&v, &mut *vs), (&d_o, &mut *ds)] {
                        view.rows(level, (row, head), block.start, m, dim, to, width, width);
                    }
                    transpose(level, m, dim, ks, width, kt, BLOCK);
                    transpose(level, m, dim, vs, width, vt, BLOCK);
                    triangle(level, m, dim, qs, width, kt, decay, p);
                    triangle(level, m, dim, ds, width, vt, decay, w);
                    if has_g {
                        transpose(level, dim, dim, g, width, gt, width);
                    }
                    let [of_q, of_k, of_v] = parts_of(dim);
                    let store = |out: &[f32], part: usize| {
                        for (i, line) in out.chunks_exact(width).take(m).enumerate() {
                            let at = ((row * tokens + block.start + i) * heads + head) * 3 * dim + part;
                            // SAFETY: the gradient holds `rows · tokens · heads` lines of three such parts, and this task
                            // alone writes those of its row and head.
                            unsafe { std::slice::from_raw_parts_mut(grad.get().add(at), dim) }
                                .copy_from_slice(&line[..dim]);
                        }
                    };
                    let inside = Size { rows: m, width, k: m };
                    let across = Size { rows: m, width, k: dim };
                    let mut init = Init::Zero;
                    if plan.has_state || i > 0 {
                        let s = &states[i * matrix..][..matrix];
                        product(
                            level,
                            across,
                            Limits::All,
                            Left { data: ds, row: width, step: 1 },
                            Right { data: s, row: width },
                            init,
                            out,
                            width,
                        );
                        init = Init::Scaled(decay.since_start(m));
                    }
                    let left = Left { data: w, row: BLOCK, step: 1 };
                    product(level, inside, Limits::To(&to), left, Right { data: ks, row: width }, init, out, width);
                    store(out, of_q);

                    for (own, g, weights, others, part) in [(&*vs, &*gt, &*w, &*qs, of_k), (&*ks, &*g, &*p, &*ds, of_v)]
                    {
                        let mut init = Init::Zero;
                        if has_g {
                            let left = Left { data: own, row: width, step: 1 };
                            product(level, across, Limits::All, left, Right { data: g, row: width }, init, out, width);
                            init = Init::Scaled(&decay.until_end(m)[..m]);
                        }
                        let left = Left { data: weights, row: 1, step: BLOCK };
                        let right = Right { data: others, row: width };
                        product(level, inside, Limits::From(&from), left, right, init, out, width);
                        store(out, part);
                    }

                    if plan.has_state || i > 0 {
                        multiply_rows(level, qs, width, dim, decay.since_start(m));
                        let init = if has_g {
                            factors.fill(decay.after[m]);
                            Init::Scaled(factors)
                        } else {
                            Init::Zero
                        };
                        let left = Left { data: qs, row: 1, step: width };
                        let right = Right { data: ds, row: width };
                        product(level, Size { rows: dim, width, k: m }, Limits::All, left, right, init, g, width);
                        has_g = true;
                    }
                }
                if plan.has_state && has_g {
                    // SAFETY: `has_state` gave the gradient `rows · heads` matrices, and this task alone writes this one.
                    let own =
                        unsafe { std::slice::from_raw_parts_mut(grad_state.get().add(task * dim * dim), dim * dim) };
                    narrow(g, width, dim, own);
                }
            });
        });
    }
    let d_qkv = swapped(tensor(grad, [rows, tokens, heads, 3 * dim]));
    let grad_state = if plan.has_state { tensor(grad_state, [rows, heads, dim, dim]) } else { d_qkv.clone() };
    (d_qkv, grad_state)
}
