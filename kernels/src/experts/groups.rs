//! Slots sorted by expert, the work on them cut into jobs, and the elementwise steps between the products.
//!
//! A *slot* is one of a token's k experts, `token · k + rank`; its *position* is its place in the order by expert (and by
//! slot within an expert). An expert's tokens lie behind each other at their positions.

use std::ops::Range;

use crate::base::math::{LANES, Lanes, fma, silu, silu_derivative};
use crate::base::memory::arbitrary;
use crate::base::simd::{self, Level};
use crate::base::{pool, rows::par_chunks, rows::rows_per_chunk};
use crate::simd;

/// Slots by expert.
pub(super) struct Groups {
    /// Chosen experts of a token.
    pub k: usize,
    /// The experts that somebody chose, ascending, with the positions of their slots.
    pub experts: Vec<(usize, Range<usize>)>,
    /// Token at each position.
    pub tokens: Vec<u32>,
    /// Position of each slot.
    pub positions: Vec<u32>,
}

/// A piece of the products of one group: some columns of the result.
pub(super) struct Job {
    pub expert: usize,
    /// Positions: all of the group.
    pub rows: Range<usize>,
    /// Columns, in units that the caller chose.
    pub columns: Range<usize>,
}

impl Groups {
    /// `choices[token · k + rank]`, each below `count`.
    pub fn new(choices: &[u32], k: usize, count: usize) -> Self {
        let mut starts = vec![0_u32; count + 1];
        for &expert in choices {
            starts[expert as usize + 1] += 1;
        }
        for e in 0..count {
            starts[e + 1] += starts[e];
        }
        let experts =
            starts.windows(2).enumerate().filter(|(_, w)| w[0] < w[1]).map(|(e, w)| (e, w[0] as usize..w[1] as usize));
        let experts = experts.collect();
        let mut tokens = vec![0; choices.len()];
        let mut positions = vec![0; choices.len()];
        for (slot, &expert) in choices.iter().enumerate() {
            let next = &mut starts[expert as usize];
            tokens[*next as usize] = (slot / k) as u32;
            positions[slot] = *next;
            *next += 1;
        }
        Groups { k, experts, tokens, positions }
    }

    /// All slots.
    pub fn slots(&self) -> usize {
        self.positions.len()
    }

    /// Cuts `columns` of every group's result into jobs of about equal work, several for each thread; none is less work than
    /// `least`, counting a column of `cost` for each row (and at least four rows, as weights have to be read).
    pub fn jobs(&self, columns: usize, cost: usize, least: usize) -> Vec<Job> {
        let rows = |range: &Range<usize>| range.len().max(4);
        let all: usize = self.experts.iter().map(|(_, range)| rows(range) * columns * cost).sum();
        let target = (all / (8 * pool::threads())).max(least).max(1);
        let mut jobs = Vec::new();
        for (expert, range) in &self.experts {
            let pieces = (rows(range) * columns * cost).div_ceil(target).clamp(1, columns.max(1));
            for i in 0..pieces {
                let columns = columns * i / pieces..columns * (i + 1) / pieces;
                jobs.push(Job { expert: *expert, rows: range.clone(), columns });
            }
        }
        // The largest first: what is left at the end is small.
        jobs.sort_by_key(|job| std::cmp::Reverse(job.rows.len().max(4) * job.columns.len()));
        jobs
    }

    /// Rows of `x [tokens, width]` in the order of positions.
    pub fn gather(&self, x: &[f32], width: usize) -> Vec<f32> {
        let mut out = arbitrary(self.slots() * width);
        let each = rows_per_chunk(self.slots(), width);
        par_chunks([(&mut out, each * width)], |chunk, [out]| {
            for (i, out) in out.chunks_exact_mut(width).enumerate() {
                let token = self.tokens[chunk * each + i] as usize;
                out.copy_from_slice(&x[token * width..][..width]);
            }
        });
        out
    }

    /// `y[token] = Σ_rank weight[token, rank] · v[position]`, in the order of ranks; weights of 1 without `weights`.
    pub fn combine(&self, v: &[f32], weights: Option<&[f32]>, width: usize) -> Vec<f32> {
        let level = simd::level();
        let mut y = arbitrary(self.slots() / self.k * width);
        let each = rows_per_chunk(self.slots() / self.k, width * self.k);
        par_chunks([(&mut y, each * width)], |chunk, [y]| {
            for (i, y) in y.chunks_exact_mut(width).enumerate() {
                for slot in (chunk * each + i) * self.k..(chunk * each + i + 1) * self.k {
                    let v = &v[self.positions[slot] as usize * width..][..width];
                    accumulate(level, weights.map_or(1.0, |w| w[slot]), v, slot % self.k == 0, y);
                }
            }
        });
        y
    }
}

/// `run` on the elements that fill 16 lanes, then on the rest, padded with zeros: the same code, so the same bits wherever an
/// element stands.
fn in_lanes<const N: usize>(mut data: [&mut [f32]; N], mut run: impl FnMut(&mut [&mut [f32]; N])) {
    let whole = data[0].len() / LANES * LANES;
    let mut tail = [[0.0; LANES]; N];
    for (tail, data) in tail.iter_mut().zip(&data) {
        tail[..data.len() - whole].copy_from_slice(&data[whole..]);
    }
    if whole > 0 {
        run(&mut data.each_mut().map(|data| &mut data[..whole]));
    }
    if whole < data[0].len() {
        run(&mut tail.each_mut().map(|tail| &mut tail[..]));
        for (tail, data) in tail.iter().zip(&mut data) {
            let rest = &mut data[whole..];
            rest.copy_from_slice(&tail[..rest.len()]);
        }
    }
}

/// `gate = silu(gate) · up`.
pub(super) fn activate(level: Level, up: &mut [f32], gate: &mut [f32]) {
    in_lanes([up, gate], |[up, gate]| activate_lanes(level, up, gate));
}

simd! {
    fn activate_lanes(up: &[f32], gate: &mut [f32]) = activate_body;
}

#[inline(always)]
fn activate_body<const FMA: bool>(up: &[f32], gate: &mut [f32]) {
    for (up, gate) in up.as_chunks::<LANES>().0.iter().zip(gate.as_chunks_mut::<LANES>().0) {
        let s = silu::<FMA>(*gate);
        for i in 0..LANES {
            gate[i] = s[i] * up[i];
        }
    }
}

simd! {
    /// `y = share · v`, added to what is there unless it is the first.
    fn accumulate(share: f32, v: &[f32], first: bool, y: &mut [f32]) = accumulate_body;
}

#[inline(always)]
fn accumulate_body<const FMA: bool>(share: f32, v: &[f32], first: bool, y: &mut [f32]) {
    for (y, v) in y.iter_mut().zip(v) {
        *y = if first { share * v } else { fma::<FMA>(share, *v, *y) };
    }
}

/// One slot's step back through `h = silu(gate) · up`: `d` is the gradient of h without the share. Afterwards gate and up
/// hold their gradients, and `d` holds `share · h`. Returns the gradient of the share, `d · h`.
pub(super) fn step_back(level: Level, share: f32, gate: &mut [f32], up: &mut [f32], d: &mut [f32]) -> f32 {
    let mut sum = [0.0; LANES];
    in_lanes([gate, up, d], |[gate, up, d]| step_back_lanes(level, share, gate, up, d, &mut sum));
    sum.iter().sum()
}

simd! {
    fn step_back_lanes(share: f32, gate: &mut [f32], up: &mut [f32], d: &mut [f32], sum: &mut Lanes) = step_back_body;
}

#[inline(always)]
fn step_back_body<const FMA: bool>(share: f32, gate: &mut [f32], up: &mut [f32], d: &mut [f32], sum: &mut Lanes) {
    let rows = gate.as_chunks_mut::<LANES>().0.iter_mut().zip(up.as_chunks_mut::<LANES>().0);
    for ((gate, up), d) in rows.zip(d.as_chunks_mut::<LANES>().0) {
        let (s, slope) = (silu::<FMA>(*gate), silu_derivative::<FMA>(*gate));
        for i in 0..LANES {
            let h = s[i] * up[i];
            sum[i] = fma::<FMA>(d[i], h, sum[i]);
            let own = share * d[i];
            gate[i] = own * up[i] * slope[i];
            up[i] = own * s[i];
            d[i] = share * h;
        }
    }
}
