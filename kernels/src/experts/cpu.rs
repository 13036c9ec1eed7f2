//! The CPU. Tokens are grouped by expert; each stage is one parallel region over (expert, columns), so that two threads
//! share one token's work as well as that of a long prompt. A token's result depends on nothing but the token: products
//! are one chain along K for each element, and its experts are added up in the order of their ranks.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;

use super::ExpertsBackend;
use super::groups::{Groups, Job, activate, step_back};
use crate::base::acts::Filling;
use crate::base::buffer::SendPtr;
use crate::base::flex::{tensor, values, values_mut};
use crate::base::gemm::{self, Mat};
use crate::base::masked::scratch;
use crate::base::memory::arbitrary;
use crate::base::packed::{Acts, Packed, multiply_into};
use crate::base::simd::{self, Level};
use crate::base::tile::PANEL;
use crate::base::{pool, rows::par_chunks, rows::rows_per_chunk};

/// The least work of a piece of f32 products, in multiply-adds: some twenty microseconds, as a piece packs its operands.
const LEAST: usize = 1 << 21;
/// Values of gate and of up that a job keeps between the products: half a MiB each.
const BETWEEN: usize = 1 << 17;
/// The least work of a job on packed weights.
const LEAST_PACKED: usize = 1 << 19;

impl ExpertsBackend for Flex {
    fn experts(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        w3: FloatTensor<Self>,
        choices: Arc<[u32]>,
    ) -> FloatTensor<Self> {
        forward(x, shares, w1, w2, w3, &choices).0
    }

    fn experts_saving(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        w3: FloatTensor<Self>,
        choices: Arc<[u32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        forward(x, shares, w1, w2, w3, &choices)
    }

    fn experts_backward(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        w3: FloatTensor<Self>,
        d_y: FloatTensor<Self>,
        choices: Arc<[u32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        backward(x, shares, w1, w2, w3, d_y, None, &choices)
    }

    fn experts_backward_from(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        w3: FloatTensor<Self>,
        d_y: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        choices: Arc<[u32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        backward(x, shares, w1, w2, w3, d_y, Some((gate, up)), &choices)
    }

    fn experts_packed(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: Packed,
        w2: Packed,
        w3: Packed,
        choices: Arc<[u32]>,
    ) -> FloatTensor<Self> {
        let sizes = Sizes::new(&x, &shares, w1.count(), w1.out());
        let Sizes { tokens, hidden, ffn, .. } = sizes;
        if sizes.empty() {
            return tensor(vec![0.0; tokens * hidden], [tokens, hidden]);
        }
        let groups = Groups::new(&choices, sizes.k, sizes.count);
        let slots = groups.slots();
        let x = values(&x);
        let level = simd::level();
        // Tiles want an expert's rows one behind the other; registers take them where they are.
        let tiles = level >= Level::Amx && tokens > 1;
        let acts = |format| {
            let acts = Acts::new(format, false, tokens, hidden, &x);
            if tiles { acts.select(&groups.tokens) } else { acts }
        };
        let other = (w3.format() != w1.format()).then(|| acts(w3.format()));
        let acts = acts(w1.format());
        let acts_up = other.as_ref().unwrap_or(&acts);
        let all: Vec<u32> = (0..slots as u32).collect();
        let own = if tiles { &all } else { &groups.tokens };

        // What lies between the products never leaves the job's cache but as the activations of the second one.
        let h = Filling::new(w2.format(), slots, ffn);
        const STEP: usize = Filling::STEP;
        let jobs = groups.jobs(ffn.div_ceil(STEP), 2 * STEP * hidden, LEAST_PACKED);
        pool::run(jobs.len(), |i| {
            let Job { expert, ref rows, ref columns } = jobs[i];
            let (from, to) = (columns.start * STEP, ffn.min(columns.end * STEP));
            let (width, panels) = (to - from, from / PANEL..to.div_ceil(PANEL));
            let most = (BETWEEN / width.max(1)).max(32);
            for first in rows.clone().step_by(most) {
                let rows = first..rows.end.min(first + most);
                scratch(2 * rows.len() * width, |memory| {
                    let (gate, up) = memory.split_at_mut(rows.len() * width);
                    for (acts, w, to) in [(&acts, &w1, &mut *gate), (acts_up, &w3, &mut *up)] {
                        // SAFETY: the target is just these columns of these rows; columns before them are not touched.
                        unsafe {
                            let start = SendPtr(to.as_mut_ptr().wrapping_sub(from));
                            multiply_into(
                                level,
                                acts,
                                Some(&own[rows.clone()]),
                                w,
                                expert,
                                panels.clone(),
                                start,
                                width,
                            );
                        }
                    }
                    activate(level, up, gate);
                    for (r, gate) in rows.zip(gate.chunks_exact(width)) {
                        // SAFETY: these columns of this row are this job's alone.
                        unsafe { h.put(level, r, from, gate) };
                    }
                });
            }
        });

        let acts = h.done();
        let mut v = arbitrary(slots * hidden);
        let to = SendPtr(v.as_mut_ptr());
        let jobs = groups.jobs(w2.panels(), 32 * ffn, LEAST_PACKED);
        pool::run(jobs.len(), |i| {
            let Job { expert, ref rows, ref columns } = jobs[i];
            // SAFETY: these rows and columns are this job's alone, and they lie inside.
            unsafe {
                let to = SendPtr(to.get().add(rows.start * hidden));
                multiply_into(level, &acts, Some(&all[rows.clone()]), &w2, expert, columns.clone(), to, hidden);
            }
        });
        tensor(groups.combine(&v, Some(&values(&shares)), hidden), [tokens, hidden])
    }
}

/// The result, and gate and up before the activation: to keep them costs eight bytes a slot and column of `ffn`, to compute
/// them again two of the backward's eight products.
#[allow(clippy::too_many_arguments)]
fn forward(
    x: FloatTensor<Flex>,
    shares: FloatTensor<Flex>,
    w1: FloatTensor<Flex>,
    w2: FloatTensor<Flex>,
    w3: FloatTensor<Flex>,
    choices: &[u32],
) -> (FloatTensor<Flex>, FloatTensor<Flex>, FloatTensor<Flex>) {
    let sizes = Sizes::new(&x, &shares, w1.layout().shape()[0], w1.layout().shape()[1]);
    if sizes.empty() {
        let zeros = tensor(vec![0.0; sizes.tokens * sizes.hidden], [sizes.tokens, sizes.hidden]);
        return (zeros, x.clone(), x);
    }
    let groups = Groups::new(choices, sizes.k, sizes.count);
    let xs = groups.gather(&values(&x), sizes.hidden);
    let (gate, mut up) = gate_and_up(&groups, &sizes, &xs, &values(&w1), &values(&w3));
    let level = simd::level();
    let wide = rows_per_chunk(groups.slots(), sizes.ffn) * sizes.ffn;
    let mut h = arbitrary(gate.len());
    par_chunks([(&mut h, wide), (&mut up, wide)], |chunk, [h, up]| {
        h.copy_from_slice(&gate[chunk * wide..][..h.len()]);
        activate(level, up, h);
    });
    let mut v = arbitrary(groups.slots() * sizes.hidden);
    let w2 = values(&w2);
    let Sizes { hidden, ffn, .. } = sizes;
    let task = |(e, rows): &(usize, Range<usize>)| Task {
        m: rows.len(),
        n: hidden,
        first: (rows_of(&h, rows, ffn), matrix(&w2, *e, hidden, ffn).transposed(), ffn),
        second: None,
        c: place(&mut v, rows, hidden),
        ldc: hidden,
    };
    // SAFETY: each task has the rows of its group.
    unsafe { run(groups.experts.iter().map(task).collect()) };
    let y = groups.combine(&v, Some(&values(&shares)), hidden);
    let [gate, up] = [gate, up].map(|t| tensor(t, [groups.slots(), ffn]));
    (tensor(y, [sizes.tokens, hidden]), gate, up)
}

/// See [`ExpertsBackend::experts_backward`]; `saved` are gate and up before the activation.
#[allow(clippy::too_many_arguments, clippy::type_complexity)]
fn backward(
    x: FloatTensor<Flex>,
    shares: FloatTensor<Flex>,
    w1: FloatTensor<Flex>,
    w2: FloatTensor<Flex>,
    w3: FloatTensor<Flex>,
    d_y: FloatTensor<Flex>,
    saved: Option<(FloatTensor<Flex>, FloatTensor<Flex>)>,
    choices: &[u32],
) -> (FloatTensor<Flex>, FloatTensor<Flex>, FloatTensor<Flex>, FloatTensor<Flex>, FloatTensor<Flex>) {
    let sizes = Sizes::new(&x, &shares, w1.layout().shape()[0], w1.layout().shape()[1]);
    let Sizes { tokens, hidden, ffn, k, count } = sizes;
    let mut d_w: [Vec<f32>; 3] = std::array::from_fn(|_| arbitrary(count * ffn * hidden));
    let chosen = |e: usize| !sizes.empty() && choices.contains(&(e as u32));
    for e in (0..count).filter(|&e| !chosen(e)) {
        d_w.iter_mut().for_each(|d_w| d_w[e * ffn * hidden..][..ffn * hidden].fill(0.0));
    }
    let [mut d_w1, mut d_w2, mut d_w3] = d_w;
    let mut d_shares = vec![0.0; tokens * k];
    let mut d_x = Vec::new();
    if !sizes.empty() {
        let groups = Groups::new(choices, k, count);
        let slots = groups.slots();
        let xs = groups.gather(&values(&x), hidden);
        let (w1, w2, w3, shares) = (values(&w1), values(&w2), values(&w3), values(&shares));
        let (mut gate, mut up) = saved.unwrap_or_else(|| {
            let (gate, up) = gate_and_up(&groups, &sizes, &xs, &w1, &w3);
            (tensor(gate, [slots, ffn]), tensor(up, [slots, ffn]))
        });
        let (gate, up) = (values_mut(&mut gate), values_mut(&mut up));
        let d_ys = groups.gather(&values(&d_y), hidden);
        let mut d = arbitrary(slots * ffn);
        let task = |(e, rows): &(usize, Range<usize>)| Task {
            m: rows.len(),
            n: ffn,
            first: (rows_of(&d_ys, rows, hidden), matrix(&w2, *e, hidden, ffn), hidden),
            second: None,
            c: place(&mut d, rows, ffn),
            ldc: ffn,
        };
        // SAFETY: each task has the rows of its group.
        unsafe { run(groups.experts.iter().map(task).collect()) };

        // At each position: the share, and the place of its gradient.
        let mut share = vec![0.0; slots];
        for (slot, &position) in groups.positions.iter().enumerate() {
            share[position as usize] = shares[slot];
        }
        let level = simd::level();
        let mut d_share = vec![0.0; slots];
        let each = rows_per_chunk(slots, 3 * ffn);
        let wide = each * ffn;
        par_chunks([(&mut *gate, wide), (&mut *up, wide), (&mut d, wide), (&mut d_share, each)], |chunk, parts| {
            let [gate, up, d, d_share] = parts;
            let rows = gate.chunks_exact_mut(ffn).zip(up.chunks_exact_mut(ffn)).zip(d.chunks_exact_mut(ffn));
            for (i, (((gate, up), d), d_share)) in rows.zip(d_share).enumerate() {
                *d_share = step_back(level, share[chunk * each + i], gate, up, d);
            }
        });
        for (slot, &position) in groups.positions.iter().enumerate() {
            d_shares[slot] = d_share[position as usize];
        }
        let (d_gate, d_up, h) = (&*gate, &*up, &d[..]);
        let mut d_xs = arbitrary(slots * hidden);
        let mut tasks = Vec::new();
        for (e, rows) in &groups.experts {
            let (e, k) = (*e, rows.len());
            let [x, d_y] = [&xs, &d_ys].map(|x| rows_of(x, rows, hidden));
            let [d_gate, d_up, h] = [d_gate, d_up, h].map(|x| rows_of(x, rows, ffn));
            tasks.push(Task {
                m: k,
                n: hidden,
                first: (d_gate, matrix(&w1, e, ffn, hidden), ffn),
                second: Some((d_up, matrix(&w3, e, ffn, hidden), ffn)),
                c: place(&mut d_xs, rows, hidden),
                ldc: hidden,
            });
            // The weights' gradients add up the slots in their order.
            for (d_w, m, n, a, b) in [
                (&mut d_w1, ffn, hidden, d_gate, x),
                (&mut d_w3, ffn, hidden, d_up, x),
                (&mut d_w2, hidden, ffn, d_y, h),
            ] {
                let c = place(d_w, &(e..e + 1), ffn * hidden);
                tasks.push(Task { m, n, first: (a.transposed(), b, k), second: None, c, ldc: n });
            }
        }
        // SAFETY: each task has the rows of its group, or the matrix of its expert, in its own result.
        unsafe { run(tasks) };
        d_x = groups.combine(&d_xs, None, hidden);
    }
    d_x.resize(tokens * hidden, 0.0);
    (
        tensor(d_x, [tokens, hidden]),
        tensor(d_shares, [tokens, k]),
        tensor(d_w1, [count, ffn, hidden]),
        tensor(d_w2, [count, hidden, ffn]),
        tensor(d_w3, [count, ffn, hidden]),
    )
}

/// Sizes of a call.
struct Sizes {
    tokens: usize,
    hidden: usize,
    ffn: usize,
    k: usize,
    count: usize,
}

impl Sizes {
    fn new(x: &FloatTensor<Flex>, shares: &FloatTensor<Flex>, count: usize, ffn: usize) -> Self {
        let [tokens, hidden] = x.layout().shape().dims();
        Sizes { tokens, hidden, ffn, k: shares.layout().shape()[1], count }
    }

    /// Whether the result is zero (or nothing) whatever the values.
    fn empty(&self) -> bool {
        self.tokens * self.hidden * self.ffn * self.k == 0
    }
}

/// Matrix `e` of a stack `[count, rows, columns]`.
fn matrix(stack: &[f32], e: usize, rows: usize, columns: usize) -> Mat<'_> {
    Mat::row_major(&stack[e * rows * columns..][..rows * columns], columns)
}

/// `c [m, n] = a · b`, or the sum of two such products, with rows of `c` `ldc` apart.
#[derive(Clone, Copy)]
struct Task<'a> {
    m: usize,
    n: usize,
    /// `a [m, k]`, `b [k, n]`, k.
    first: (Mat<'a>, Mat<'a>, usize),
    second: Option<(Mat<'a>, Mat<'a>, usize)>,
    c: SendPtr<f32>,
    ldc: usize,
}

impl<'a> Task<'a> {
    fn work(&self) -> usize {
        self.m * self.n * (self.first.2 + self.second.map_or(0, |s| s.2))
    }

    /// Halves along the longer side, until a piece is at most `most` work.
    fn split(self, most: usize, into: &mut Vec<Task<'a>>) {
        let Task { m, n, .. } = self;
        if self.work() <= most || m.max(n) < 64 {
            return into.push(self);
        }
        let by_rows = m > n;
        let at = if by_rows { (m / 2).next_multiple_of(12) } else { (n / 2).next_multiple_of(32) };
        let rest = |(a, b, k): (Mat<'a>, Mat<'a>, usize)| {
            if by_rows { (from(a, at, 0), b, k) } else { (a, from(b, 0, at), k) }
        };
        let skip = if by_rows { at * self.ldc } else { at };
        let (upper, lower) = if by_rows { ((at, n), (m - at, n)) } else { ((m, at), (m, n - at)) };
        Task { m: upper.0, n: upper.1, ..self }.split(most, into);
        // The pointer stays inside the result: `at` is less than the side.
        let c = SendPtr(self.c.get().wrapping_add(skip));
        let second = self.second.map(rest);
        Task { m: lower.0, n: lower.1, first: rest(self.first), second, c, ldc: self.ldc }.split(most, into);
    }
}

/// `matrix` from element (i, j) on.
fn from(matrix: Mat, i: usize, j: usize) -> Mat {
    Mat { data: &matrix.data[i * matrix.row_stride + j * matrix.col_stride..], ..matrix }
}

/// Does all tasks in one parallel region.
///
/// # Safety
/// The results lie inside memory that is theirs alone, and do not overlap; operands are as large as the tasks say.
unsafe fn run(tasks: Vec<Task>) {
    let level = simd::level();
    let all: usize = tasks.iter().map(Task::work).sum();
    let most = (all / (6 * pool::threads())).max(LEAST);
    let mut pieces = Vec::new();
    for task in tasks {
        task.split(most, &mut pieces);
    }
    pieces.sort_by_key(|task| std::cmp::Reverse(task.work()));
    let pieces = pool::deal(pieces);
    pool::run(pieces.len(), |i| {
        let Task { m, n, first, second, c, ldc } = pieces[i];
        for ((a, b, k), add) in
            [(Some(first), false), (second, true)].into_iter().filter_map(|(t, add)| Some((t?, add)))
        {
            // SAFETY: the caller answers for the memory; pieces of a task do not overlap.
            unsafe { gemm::blocks(level, m, n, k, a, b, c, ldc, add) }
        }
    });
}

/// Row-major `[positions, width]` of one group.
fn rows_of<'a>(x: &'a [f32], rows: &Range<usize>, width: usize) -> Mat<'a> {
    Mat::row_major(&x[rows.start * width..rows.end * width], width)
}

/// Where the rows of a group begin in `[slots, width]`.
fn place(x: &mut [f32], rows: &Range<usize>, width: usize) -> SendPtr<f32> {
    SendPtr(x[rows.start * width..rows.end * width].as_mut_ptr())
}

/// Gate and up before the activation, `[slots, ffn]` each.
fn gate_and_up(groups: &Groups, sizes: &Sizes, xs: &[f32], w1: &[f32], w3: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let &Sizes { hidden, ffn, .. } = sizes;
    let (mut gate, mut up) = (arbitrary(groups.slots() * ffn), arbitrary(groups.slots() * ffn));
    let mut tasks = Vec::new();
    for (e, rows) in &groups.experts {
        for (w, to) in [(w1, &mut gate), (w3, &mut up)] {
            tasks.push(Task {
                m: rows.len(),
                n: ffn,
                first: (rows_of(xs, rows, hidden), matrix(w, *e, ffn, hidden).transposed(), hidden),
                second: None,
                c: place(to, rows, ffn),
                ldc: ffn,
            });
        }
    }
    // SAFETY: each task has the rows of its group in its own result.
    unsafe { run(tasks) };
    (gate, up)
}
