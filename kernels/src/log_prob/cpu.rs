//! Flex: tiles of logits by the matrix kernel, each reduced where it lies in the cache.
//!
//! The vocabulary is summed in blocks of [`BLOCK`] entries at absolute positions, each in a fixed order of lanes, and the
//! blocks one after the other: a token's bits depend neither on the other tokens nor on how the tiles are cut.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, TensorData, bf16};

use super::LogProbBackend;
use crate::base::flex::{matrix, tensor};
use crate::base::gemm::{Mat, par_gemm};
use crate::base::masked::transpose;
use crate::base::math::{LANES, exp1, fma};
use crate::base::packed::{Format, Packed};
use crate::base::rows::{par_chunks, rows_per_chunk};
use crate::base::simd::level;
use crate::base::tile::PANEL;
use crate::simd;

/// Entries of the vocabulary that are summed by themselves.
const BLOCK: usize = 512;
/// Most tokens of a tile, and most logits: 4 MiB of f32.
const TILE_TOKENS: usize = 512;
const TILE: usize = 1 << 20;
/// Most elements of the head that are widened to f32 at a time: 32 MiB.
const WIDENED: usize = 1 << 23;

impl LogProbBackend for Flex {
    fn log_prob(hidden: FlexTensor, head: FlexTensor, targets: Vec<u32>, temperature: f64) -> FlexTensor {
        forward(hidden, Head::new(head), &targets, temperature)
    }

    fn log_prob_backward(
        hidden: FlexTensor,
        head: FlexTensor,
        targets: Vec<u32>,
        temperature: f64,
        out: FlexTensor,
        d_out: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        let (head, shape) = (Head::new(head.clone()), head.layout().shape().dims());
        let mut d_head = vec![0.0; shape[0] * shape[1]];
        let d_hidden = backward(hidden, &head, &targets, temperature, out, d_out, Some(&mut d_head));
        (d_hidden, head.gradient(d_head, shape))
    }

    fn log_prob_packed(hidden: FlexTensor, head: Packed, targets: Vec<u32>, temperature: f64) -> FlexTensor {
        forward(hidden, Head::Packed(head), &targets, temperature)
    }

    fn log_prob_packed_backward(
        hidden: FlexTensor,
        head: Packed,
        targets: Vec<u32>,
        temperature: f64,
        out: FlexTensor,
        d_out: FlexTensor,
    ) -> FlexTensor {
        backward(hidden, &Head::Packed(head), &targets, temperature, out, d_out, None)
    }
}

fn forward(hidden: FlexTensor, head: Head, targets: &[u32], temperature: f64) -> FlexTensor {
    let hidden = Matrix::new(hidden);
    let (n, vocab) = (hidden.rows, head.vocab());
    let scale = (1.0 / temperature) as f32;
    let (tokens, entries) = tile(n, vocab, hidden.columns, head.widened());
    let mut logits = vec![0.0; tokens * entries];
    let mut blocks = vec![0.0; tokens * entries.div_ceil(BLOCK) * 3];
    let mut wide = Vec::new();
    let mut out = vec![0.0; n * 4];
    let mut sums = vec![Sums::default(); tokens];
    let level = level();
    for start in (0..n).step_by(tokens) {
        let m = tokens.min(n - start);
        sums[..m].fill(Sums::default());
        for first in (0..vocab).step_by(entries) {
            let len = entries.min(vocab - first);
            let weights = head.rows(first, len, &mut wide);
            let logits = &mut logits[..m * len];
            par_gemm(m, len, hidden.columns, hidden.from(start), weights.transposed(), logits, len, false);

            let count = len.div_ceil(BLOCK);
            let blocks = &mut blocks[..m * count * 3];
            let per = rows_per_chunk(m * count, BLOCK);
            let logits = &*logits;
            par_chunks([(&mut *blocks, per * 3)], |chunk, [blocks]| {
                for (i, block) in blocks.chunks_exact_mut(3).enumerate() {
                    let (token, at) = ((chunk * per + i) / count, (chunk * per + i) % count * BLOCK);
                    reduce(level, &logits[token * len..][at..len.min(at + BLOCK)], scale, block);
                }
            });
            for (token, (blocks, sums)) in blocks.chunks_exact(count * 3).zip(&mut sums).enumerate() {
                blocks.chunks_exact(3).for_each(|block| sums.add(block));
                if let Some(at) = (targets[start + token] as usize).checked_sub(first).filter(|&at| at < len) {
                    sums.at_target = logits[token * len + at] * scale;
                }
            }
        }
        for (sums, out) in sums.iter().zip(out[start * 4..].chunks_exact_mut(4)) {
            out.copy_from_slice(&sums.result());
        }
    }
    tensor(out, [n, 4])
}

/// The gradient of `hidden`, and into `d_head` that of the head.
fn backward(
    hidden: FlexTensor,
    head: &Head,
    targets: &[u32],
    temperature: f64,
    out: FlexTensor,
    d_out: FlexTensor,
    mut d_head: Option<&mut [f32]>,
) -> FlexTensor {
    let hidden = Matrix::new(hidden);
    let (out, d_out) = (out.to_contiguous(), d_out.to_contiguous());
    let (out, d_out): (&[f32], &[f32]) = (out.storage(), d_out.storage());
    let (n, dim, vocab) = (hidden.rows, hidden.columns, head.vocab());
    let scale = (1.0 / temperature) as f32;
    let (tokens, entries) = tile(n, vocab, dim, head.widened());
    let mut logits = vec![0.0; tokens * entries];
    let mut wide = Vec::new();
    let mut d_hidden = vec![0.0; n * dim];
    let level = level();
    for start in (0..n).step_by(tokens) {
        let m = tokens.min(n - start);
        for first in (0..vocab).step_by(entries) {
            let len = entries.min(vocab - first);
            let weights = head.rows(first, len, &mut wide);
            let logits = &mut logits[..m * len];
            par_gemm(m, len, dim, hidden.from(start), weights.transposed(), logits, len, false);

            let per = rows_per_chunk(m * len, 1);
            par_chunks([(&mut *logits, per)], |chunk, [mut part]| {
                let mut at = chunk * per;
                while !part.is_empty() {
                    let (token, column) = (at / len, at % len);
                    let row;
                    (row, part) = part.split_at_mut((len - column).min(part.len()));
                    at += row.len();
                    let token = start + token;
                    let of_token = Gradient::new(&out[token * 4..], &d_out[token * 4..], scale);
                    differentiate(level, of_token, row);
                    let target = (targets[token] as usize).checked_sub(first + column);
                    if let Some(d) = target.and_then(|target| row.get_mut(target)) {
                        *d += of_token.d_log_pi;
                    }
                }
            });
            let d_logits = Mat { data: logits, row_stride: len, col_stride: 1 };
            let d_rows = &mut d_hidden[start * dim..(start + m) * dim];
            par_gemm(m, dim, len, d_logits, weights, d_rows, dim, first > 0);
            if let Some(d_head) = &mut d_head {
                let d_logits = Mat { data: logits, row_stride: 1, col_stride: len };
                let d_rows = &mut d_head[first * dim..(first + len) * dim];
                par_gemm(len, dim, m, d_logits, hidden.from(start), d_rows, dim, start > 0);
            }
        }
    }
    tensor(d_hidden, [n, dim])
}

/// Tokens and vocabulary entries of a tile; entries are a multiple of [`BLOCK`].
fn tile(n: usize, vocab: usize, dim: usize, widened: bool) -> (usize, usize) {
    let tokens = n.clamp(1, TILE_TOKENS);
    let mut entries = TILE / tokens;
    if widened {
        entries = entries.min(WIDENED / dim.max(1));
    }
    (tokens, (entries / BLOCK).clamp(1, vocab.div_ceil(BLOCK).max(1)) * BLOCK)
}

/// An f32 matrix at non-negative strides.
struct Matrix {
    tensor: FlexTensor,
    rows: usize,
    columns: usize,
}

impl Matrix {
    fn new(x: FlexTensor) -> Self {
        let [rows, columns] = x.layout().shape().dims();
        let tensor = if x.layout().has_positive_strides() { x } else { x.to_contiguous() };
        Self { tensor, rows, columns }
    }

    /// The rows from `start` on.
    fn from(&self, start: usize) -> Mat<'_> {
        let whole = matrix(&self.tensor).expect("f32 at non-negative strides");
        Mat { data: whole.data.get(start * whole.row_stride..).unwrap_or_default(), ..whole }
    }
}

/// The output matrix `[vocab, dim]` as it is stored.
enum Head {
    F32(Matrix),
    Bf16(FlexTensor),
    Packed(Packed),
}

impl Head {
    fn new(head: FlexTensor) -> Self {
        match head.dtype() {
            DType::F32 => Self::F32(Matrix::new(head)),
            DType::BF16 => Self::Bf16(head.to_contiguous()),
            other => panic!("log_prob: a head in {other:?}"),
        }
    }

    fn vocab(&self) -> usize {
        match self {
            Self::F32(matrix) => matrix.rows,
            Self::Bf16(head) => head.layout().shape()[0],
            Self::Packed(head) => head.out(),
        }
    }

    fn widened(&self) -> bool {
        !matches!(self, Self::F32(_))
    }

    /// Rows `first..first + len` in f32, in `wide` when they are not stored so.
    fn rows<'a>(&'a self, first: usize, len: usize, wide: &'a mut Vec<f32>) -> Mat<'a> {
        match self {
            Self::F32(matrix) => matrix.from(first),
            Self::Bf16(head) => {
                let dim = head.layout().shape()[1];
                let stored = &head.storage::<bf16>()[first * dim..(first + len) * dim];
                wide.resize(len * dim, 0.0);
                let per = rows_per_chunk(len, dim) * dim;
                if dim > 0 {
                    par_chunks([(wide, per)], |chunk, [wide]| {
                        let stored = &stored[chunk * per..];
                        wide.iter_mut().zip(stored).for_each(|(wide, stored)| *wide = stored.to_f32());
                    });
                }
                Mat { data: wide, row_stride: dim, col_stride: 1 }
            }
            Self::Packed(head) => unpacked(head, first, len, wide),
        }
    }

    /// The head's gradient in the head's dtype.
    fn gradient(&self, d_head: Vec<f32>, shape: [usize; 2]) -> FlexTensor {
        match self {
            Self::F32(_) => tensor(d_head, shape),
            Self::Bf16(_) => {
                let d_head: Vec<bf16> = d_head.into_iter().map(bf16::from_f32).collect();
                FlexTensor::from_data(TensorData::new(d_head, shape))
            }
            Self::Packed(_) => unreachable!("a packed head is a constant"),
        }
    }
}

/// Rows `first..first + len` of a packed matrix in f32; `first` begins a panel.
fn unpacked<'a>(head: &Packed, first: usize, len: usize, wide: &'a mut Vec<f32>) -> Mat<'a> {
    let (dim, level) = (head.input(), level());
    wide.resize(len.next_multiple_of(PANEL) * dim, 0.0);
    par_chunks([(&mut *wide, PANEL * dim)], |chunk, [rows]| {
        let row = first + chunk * PANEL;
        // A step of a panel is 32 words, one a row: a number, or a pair of them in bf16.
        let turn = |to: &mut [f32], steps| {
            transpose(level, steps, PANEL, bytemuck::cast_slice(head.panel(0, row / PANEL)), PANEL, to, steps);
        };
        match head.format() {
            Format::F32 => turn(rows, dim),
            Format::Bf16 => {
                let mut pairs = vec![0.0; PANEL * dim.div_ceil(2)];
                turn(&mut pairs, dim.div_ceil(2));
                for (row, pairs) in rows.chunks_exact_mut(dim).zip(pairs.chunks_exact(dim.div_ceil(2))) {
                    for (to, pair) in row.chunks_mut(2).zip(pairs) {
                        let halves = [pair.to_bits() << 16, pair.to_bits() & 0xffff_0000];
                        to.iter_mut().zip(halves).for_each(|(to, half)| *to = f32::from_bits(half));
                    }
                }
            }
            Format::Int8 { .. } | Format::Int4 { .. } => {
                for (i, to) in rows.chunks_exact_mut(dim).enumerate().take(head.out() - row) {
                    head.row(0, row + i, to);
                }
            }
        }
    });
    Mat::row_major(wide, dim)
}

/// Running sums of one token; wide, because a vocabulary has hundreds of blocks.
#[derive(Debug, Clone, Default)]
struct Sums {
    /// Largest logit m so far, Σ e^(z-m), Σ e^(z-m)·(z-m).
    sums: Option<[f64; 3]>,
    at_target: f32,
}

impl Sums {
    fn add(&mut self, block: &[f32]) {
        let block = [0, 1, 2].map(|i| f64::from(block[i]));
        self.sums = Some(match self.sums {
            None => block,
            Some(sums) => {
                let m = sums[0].max(block[0]);
                let shifted = |[own, s, t]: [f64; 3]| {
                    let d = own - m;
                    (d.exp() * s, d.exp() * (t + s * d))
                };
                let ((s_a, t_a), (s_b, t_b)) = (shifted(sums), shifted(block));
                [m, s_a + s_b, t_a + t_b]
            }
        });
    }

    /// A row of the result.
    fn result(&self) -> [f32; 4] {
        let [m, s, t] = self.sums.unwrap_or([f64::NAN; 3]);
        let log_s = s.ln();
        let log_pi = f64::from(self.at_target) - m - log_s;
        [log_pi as f32, (log_s - t / s) as f32, m as f32, log_s as f32]
    }
}

/// Below this `e^d · d` is zero for every purpose; d itself may be -inf, whose product with zero is not.
const FLOOR: f32 = -1e30;

simd! {
    /// `[m, Σ e^(z-m), Σ e^(z-m)·(z-m)]` of the logits `z · scale`, m the largest.
    fn reduce(z: &[f32], scale: f32, out: &mut [f32]) = reduce_body;
}

#[inline(always)]
fn reduce_body<const FMA: bool>(z: &[f32], scale: f32, out: &mut [f32]) {
    let (chunks, rest) = z.as_chunks::<LANES>();
    let mut most = [f32::NEG_INFINITY; LANES];
    // A NaN is passed over here and found again below.
    let larger = |m: &mut f32, z: &f32| *m = if *z > *m { *z } else { *m };
    for chunk in chunks {
        most.iter_mut().zip(chunk).for_each(|(m, z)| larger(m, z));
    }
    most.iter_mut().zip(rest).for_each(|(m, z)| larger(m, z));
    let m = most.into_iter().fold(f32::NEG_INFINITY, |m, z| if z > m { z } else { m }) * scale;

    let (mut s, mut t) = ([0.0; LANES], [0.0; LANES]);
    let add = |((s, t), z): ((&mut f32, &mut f32), &f32)| {
        let d = z * scale - m;
        let d = if d < FLOOR { FLOOR } else { d };
        let e = exp1::<FMA>(d);
        *s += e;
        *t = fma::<FMA>(e, d, *t);
    };
    for chunk in chunks {
        s.iter_mut().zip(&mut t).zip(chunk).for_each(add);
    }
    s.iter_mut().zip(&mut t).zip(rest).for_each(add);
    out.copy_from_slice(&[m, fold(s), fold(t)]);
}

#[inline(always)]
fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = sums.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
        half /= 2;
    }
    sums[0]
}

/// What the gradient of a token's logits needs; both gradients already divided by the temperature.
#[derive(Debug, Clone, Copy)]
struct Gradient {
    scale: f32,
    entropy: f32,
    most: f32,
    log_s: f32,
    d_log_pi: f32,
    d_entropy: f32,
}

impl Gradient {
    fn new(out: &[f32], d_out: &[f32], scale: f32) -> Self {
        Self {
            scale,
            entropy: out[1],
            most: out[2],
            log_s: out[3],
            d_log_pi: d_out[0] * scale,
            d_entropy: d_out[1] * scale,
        }
    }
}

simd! {
    /// Logits to their gradient, but for the one of the target.
    fn differentiate(of: Gradient, z: &mut [f32]) = differentiate_body;
}

#[inline(always)]
fn differentiate_body<const FMA: bool>(of: Gradient, z: &mut [f32]) {
    for z in z {
        // Rounded before the subtraction, as the largest was: of equals nothing is left over.
        let log_p = (*z * of.scale - of.most) - of.log_s;
        let log_p = if log_p < FLOOR { FLOOR } else { log_p };
        *z = -exp1::<FMA>(log_p) * fma::<FMA>(of.d_entropy, log_p + of.entropy, of.d_log_pi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_tile_grows_with_the_vocabulary_or_the_tokens() {
        let m1 = (200_064, 6144);
        for n in [0, 1, 2, 511, 512, 513, 4096, 1 << 20, 1 << 33] {
            for (vocab, dim) in [(1, 1), (511, 8), (m1.0, 64), m1, (1 << 33, 128), (1 << 20, 1 << 24)] {
                for widened in [false, true] {
                    let (tokens, entries) = tile(n, vocab, dim, widened);
                    assert!(tokens >= 1 && entries >= 1 && entries % BLOCK == 0);
                    assert!(tokens * entries <= TILE, "{n} × {vocab}: {tokens} × {entries}");
                    assert!(entries < vocab + BLOCK);
                    assert!(!widened || entries * dim <= WIDENED.max(BLOCK * dim));
                }
            }
        }
    }
}
