//! Flex: the gradient, one task per row and key head. Scores are computed again tile by tile from the saved logarithms of the
//! sums; nothing of size tokens × tokens is kept. All sums have one order.
//!
//! ```text
//! P_ij = exp(q_i·k_j/√d - lse_i) ;  D_i = d_o_i·o_i ;  dS_ij = P_ij·(d_o_i·v_j - D_i)
//! d_v_j = Σ_i P_ij·d_o_i ;  d_k_j = Σ_i dS_ij·q_i/√d ;  d_q_i = Σ_j dS_ij·k_j/√d
//! ```
//! over j ≤ i, and for keys and values over all heads that share them.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;

use super::cpu::{KEYS, total};
use crate::base::buffer::SendPtr;
use crate::base::flex::tensor;
use crate::base::masked::{Init, Left, Limits, Right, Size, padded, parts, product, scratch, transpose};
use crate::base::math::{LANES, exp, fma};
use crate::base::pool;
use crate::base::simd::level;
use crate::base::view::{View, forward_strides, swapped, whole};
use crate::simd;

/// Queries (times heads that share their keys) per tile, unless one token alone has more heads.
const QUERIES: usize = 64;

type Grads = (FlexTensor, FlexTensor, FlexTensor);

/// See [`super::SoftmaxAttentionBackend::softmax_attention_backward`].
pub(super) fn backward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    o: FlexTensor,
    lse: FlexTensor,
    d_o: FlexTensor,
) -> Grads {
    let [rows, heads, tokens, dim] = q.shape().dims();
    let kv_heads = k.shape()[1];
    let group = heads / kv_heads.max(1);
    let width = padded(dim);
    let [q, k, v, o, d_o] = [q, k, v, o, d_o].map(forward_strides);
    let lse = whole(lse);
    let mut d_q = vec![0.0_f32; rows * tokens * heads * dim];
    let mut d_k = vec![0.0_f32; rows * tokens * kv_heads * dim];
    let mut d_v = d_k.clone();
    {
        let [q, k, v, o, d_o] = [&q, &k, &v, &o, &d_o].map(View::new);
        let lse = lse.storage::<f32>();
        let level = level();
        let scale = (1.0 / (dim as f64).sqrt()) as f32;
        let outputs = [&mut d_q, &mut d_k, &mut d_v].map(|x| SendPtr(x.as_mut_ptr()));
        let each = (QUERIES / group.max(1)).clamp(1, tokens.max(1));
        let most = each * group;
        pool::run(rows * kv_heads, |task| {
            let (row, kv_head) = (task / kv_heads, task % kv_heads);
            // Queries token by token, the heads of a token beside each other.
            let gather = |view: &View, token: usize, count: usize, to: &mut [f32]| {
                for g in 0..group {
                    let at = (row, kv_head * group + g);
                    view.rows(level, at, token, count, dim, &mut to[g * width..], group * width, width);
                }
            };
            let mut grad_q = vec![0.0_f32; tokens * group * width];
            // D and lse of each query.
            let mut inner = vec![0.0_f32; tokens * group];
            let logs: Vec<f32> = (0..tokens * group)
                .map(|i| lse[(row * heads + kv_head * group + i % group) * tokens + i / group])
                .collect();
            let tile = KEYS * width;
            let queries = most * width;
            scratch(4 * tile + 2 * dim * KEYS + 2 * queries + 2 * most * KEYS, |memory| {
                let [ks, vs, gk, gv, kt, vt, qs, ds, p, w] = parts(
                    memory,
                    [tile, tile, tile, tile, dim * KEYS, dim * KEYS, queries, queries, most * KEYS, most * KEYS],
                );
                for token in (0..tokens).step_by(each) {
                    let count = each.min(tokens - token);
                    gather(&o, token, count, qs);
                    gather(&d_o, token, count, ds);
                    dots(level, qs, ds, width, &mut inner[token * group..][..count * group]);
                }
                for first in (0..tokens).step_by(KEYS) {
                    let n = KEYS.min(tokens - first);
                    k.rows(level, (row, kv_head), first, n, dim, ks, width, width);
                    v.rows(level, (row, kv_head), first, n, dim, vs, width, width);
                    transpose(level, n, dim, ks, width, kt, KEYS);
                    transpose(level, n, dim, vs, width, vt, KEYS);
                    gk.fill(0.0);
                    gv.fill(0.0);
                    // The tile of queries that holds the first key's own token.
                    for token in (first / each * each..tokens).step_by(each) {
                        let count = each.min(tokens - token);
                        let m = count * group;
                        gather(&q, token, count, qs);
                        qs[..m * width].iter_mut().for_each(|x| *x *= scale);
                        gather(&d_o, token, count, ds);
                        // Keys that query i sees, and the first query that sees key j.
                        let to: Vec<usize> =
                            (0..m).map(|i| (token + i / group + 1).saturating_sub(first).min(n)).collect();
                        let from: Vec<usize> =
                            (0..n).map(|j| ((first + j).saturating_sub(token) * group).min(m)).collect();
                        let size = Size { rows: m, width: padded(n), k: dim };
                        let of = |data| Left { data, row: width, step: 1 };
                        product(level, size, Limits::All, of(qs), Right { data: kt, row: KEYS }, Init::Zero, p, KEYS);
                        product(level, size, Limits::All, of(ds), Right { data: vt, row: KEYS }, Init::Zero, w, KEYS);
                        let own = token * group..token * group + m;
                        differentiate(level, p, w, &to, &logs[own.clone()], &inner[own.clone()]);
                        let size = Size { rows: n, width, k: m };
                        for (weights, others, sums) in [(&*p, &*ds, &mut *gv), (&*w, &*qs, &mut *gk)] {
                            let left = Left { data: weights, row: 1, step: KEYS };
                            let right = Right { data: others, row: width };
                            product(level, size, Limits::From(&from), left, right, Init::Keep, sums, width);
                        }
                        let (left, right) = (Left { data: w, row: KEYS, step: 1 }, Right { data: ks, row: width });
                        let sums = &mut grad_q[own.start * width..];
                        product(
                            level,
                            Size { rows: m, width, k: n },
                            Limits::To(&to),
                            left,
                            right,
                            Init::Keep,
                            sums,
                            width,
                        );
                    }
                    for (sums, output) in [(&*gk, outputs[1]), (&*gv, outputs[2])] {
                        for (j, line) in sums.chunks_exact(width).take(n).enumerate() {
                            let at = ((row * tokens + first + j) * kv_heads + kv_head) * dim;
                            // SAFETY: the gradient has such a line for every token and key head; this task alone writes
                            // those of its row and head.
                            unsafe { std::slice::from_raw_parts_mut(output.get().add(at), dim) }
                                .copy_from_slice(&line[..dim]);
                        }
                    }
                }
            });
            for (i, line) in grad_q.chunks_exact(width).enumerate() {
                let at = ((row * tokens + i / group) * heads + kv_head * group + i % group) * dim;
                // SAFETY: as above, for the heads of this group.
                let to = unsafe { std::slice::from_raw_parts_mut(outputs[0].get().add(at), dim) };
                to.iter_mut().zip(line).for_each(|(to, x)| *to = x * scale);
            }
        });
    }
    (
        swapped(tensor(d_q, [rows, tokens, heads, dim])),
        swapped(tensor(d_k, [rows, tokens, kv_heads, dim])),
        swapped(tensor(d_v, [rows, tokens, kv_heads, dim])),
    )
}

simd! {
    /// `to[i] = x_i · y_i` over rows of `row` floats, a multiple of 16.
    fn dots(x: &[f32], y: &[f32], row: usize, to: &mut [f32]) = dots_body;
}

#[inline(always)]
fn dots_body<const FMA: bool>(x: &[f32], y: &[f32], row: usize, to: &mut [f32]) {
    for ((x, y), to) in x.chunks_exact(row).zip(y.chunks_exact(row)).zip(to) {
        let mut sums = [0.0_f32; LANES];
        for (x, y) in x.chunks_exact(LANES).zip(y.chunks_exact(LANES)) {
            for lane in 0..LANES {
                sums[lane] = fma::<FMA>(x[lane], y[lane], sums[lane]);
            }
        }
        *to = total(sums);
    }
}

simd! {
    /// Scores in `p` become `P`, products with the values in `w` become `dS`; from `counts` on they are anything.
    fn differentiate(p: &mut [f32], w: &mut [f32], counts: &[usize], logs: &[f32], inner: &[f32]) = differentiate_body;
}

#[inline(always)]
fn differentiate_body<const FMA: bool>(p: &mut [f32], w: &mut [f32], counts: &[usize], logs: &[f32], inner: &[f32]) {
    let lines = p.chunks_exact_mut(KEYS).zip(w.chunks_exact_mut(KEYS));
    for (((p, w), &count), (log, inner)) in lines.zip(counts).zip(logs.iter().zip(inner)) {
        let width = padded(count);
        for (p, w) in p[..width].chunks_exact_mut(LANES).zip(w[..width].chunks_exact_mut(LANES)) {
            let mut x = [0.0; LANES];
            for lane in 0..LANES {
                x[lane] = p[lane] - log;
            }
            let x = exp::<FMA>(x);
            for lane in 0..LANES {
                p[lane] = x[lane];
                w[lane] = x[lane] * (w[lane] - inner);
            }
        }
    }
}
