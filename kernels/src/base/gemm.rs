//! Products of f32 matrices with any strides: both operands are packed per call, in blocks that stay in the cache, but for
//! short rows of the left one.

use std::cell::RefCell;

use super::buffer::{Buffer, SendPtr};
use super::masked::transpose;
use super::pool;
use super::simd::{self, Level};
use super::tile::{self, Kind, PANEL, Panels, Rows, Target};
use crate::simd;

/// A matrix: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a> {
    /// From the first element on.
    pub data: &'a [f32],
    /// From a row to the next, in elements.
    pub row_stride: usize,
    /// From a column to the next, in elements.
    pub col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Rows one after the other, `columns` wide.
    pub fn row_major(data: &'a [f32], columns: usize) -> Self {
        Mat { data, row_stride: columns, col_stride: 1 }
    }

    /// The same elements with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Mat { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    /// From element (i, j) on.
    fn at(self, i: usize, j: usize) -> Self {
        let from = (i * self.row_stride + j * self.col_stride).min(self.data.len());
        Mat { data: &self.data[from..], ..self }
    }

    fn check(&self, rows: usize, columns: usize, name: &str) {
        let need = (rows - 1) * self.row_stride + (columns - 1) * self.col_stride;
        assert!(need < self.data.len(), "{name} [{rows}, {columns}] is larger than its data");
    }
}

/// Steps along K, rows and columns of the blocks that stay in a thread's cache: half a MiB of `b`, at most a quarter of `a`.
#[derive(Clone, Copy)]
struct Blocks {
    steps: usize,
    rows: usize,
    columns: usize,
}

/// Rows of `a` that lie in one piece are multiplied where they lie; few at a time, as they may all compete for the same places
/// of the cache. Long runs, as each end of one passes over the target.
const IN_PLACE: Blocks = Blocks { steps: 512, rows: 60, columns: 256 };
/// Others are packed, for as many columns as there is room for.
const PACKED: Blocks = Blocks { steps: 256, rows: 240, columns: 512 };
/// Floats from one packed row to the next: an odd number of cache lines.
const ROW_STRIDE: usize = PACKED.steps + 16;

/// `c = (add ? c : 0) + a · b`, with `a [m, k]`, `b [k, n]` and rows of `c` `ldc` apart, at this thread's level on the pool. Each
/// element is one chain of multiply-adds along k, beginning with `c` if `add`, whatever m and n are.
///
/// # Panics
/// If a matrix is larger than its data.
#[allow(clippy::too_many_arguments)]
pub fn par_gemm(m: usize, n: usize, k: usize, a: Mat, b: Mat, c: &mut [f32], ldc: usize, add: bool) {
    if !check(m, n, k, &a, &b, c, ldc, add) {
        return;
    }
    let level = simd::level();
    let c = SendPtr(c.as_mut_ptr());
    let (rows, columns) = shares(m, n, k, pool::threads());
    let across = n.div_ceil(columns);
    pool::run(across * m.div_ceil(rows), |i| {
        let (row, column) = (i / across * rows, i % across * columns);
        let (m, n) = (rows.min(m - row), columns.min(n - column));
        // SAFETY: the shares do not overlap, and lie inside the target that `check` has seen.
        unsafe {
            let c = SendPtr(c.get().add(row * ldc + column));
            blocks(level, m, n, k, a.at(row, 0), b.at(0, column), c, ldc, add);
        }
    });
}

/// Rows and columns of a share of the product: enough shares that a thread which is held up costs little, each
/// large enough that packing is a small part of it.
fn shares(m: usize, n: usize, k: usize, threads: usize) -> (usize, usize) {
    let (mut rows, mut columns) = (m, n.next_multiple_of(PANEL));
    if threads == 1 || m * n * k < 1 << 18 {
        return (rows, columns);
    }
    // Every share of some columns packs all its rows of `a`, and the other way round: cut the longer side.
    while m.div_ceil(rows) * n.div_ceil(columns) < 4 * threads && rows * columns > 64 * 64 {
        if columns > rows && columns > PANEL || rows <= 24 {
            columns = (columns / 2).next_multiple_of(PANEL);
        } else {
            rows = (rows / 2).next_multiple_of(12);
        }
        if columns <= PANEL && rows <= 24 {
            break;
        }
    }
    (rows, columns)
}

/// Whether there is anything to multiply; without any k the result is zero, or what it was.
#[allow(clippy::too_many_arguments)]
fn check(m: usize, n: usize, k: usize, a: &Mat, b: &Mat, c: &mut [f32], ldc: usize, add: bool) -> bool {
    if m == 0 || n == 0 {
        return false;
    }
    assert!(n <= ldc || m == 1, "rows of c overlap");
    assert!((m - 1) * ldc + n <= c.len(), "c [{m}, {n}] is larger than its data");
    if k == 0 {
        if !add {
            c.chunks_mut(ldc).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return false;
    }
    a.check(m, k, "a");
    b.check(k, n, "b");
    true
}

thread_local! {
    /// Packed blocks of `a` and `b`.
    static SCRATCH: RefCell<Option<Buffer>> = const { RefCell::new(None) };
}

/// # Safety
/// The target is valid, and this thread's alone; the operands are as large as `check` demands.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn blocks(
    level: Level,
    m: usize,
    n: usize,
    k: usize,
    a: Mat,
    b: Mat,
    c: SendPtr<f32>,
    ldc: usize,
    add: bool,
) {
    let in_place = a.col_stride == 1;
    let most = if in_place { IN_PLACE } else { PACKED };
    // As even as they can be: a last block of a few rows would pass by all columns for little.
    let block = m.div_ceil(m.div_ceil(most.rows).max(1)).next_multiple_of(12);
    let panel = most.steps * PANEL;
    SCRATCH.with_borrow_mut(|scratch| {
        let words = PACKED.rows * ROW_STRIDE + PACKED.columns * PACKED.steps;
        let scratch = scratch.get_or_insert_with(|| Buffer::words_zeroed(words)).words_mut();
        let (packed_a, packed_b) = scratch.split_at_mut(PACKED.rows * ROW_STRIDE);
        for column in (0..n).step_by(most.columns) {
            let columns = most.columns.min(n - column);
            for from in (0..k).step_by(most.steps) {
                let steps = most.steps.min(k - from);
                pack_panels(level, b.at(from, column), steps, columns, packed_b, panel);
                for row in (0..m).step_by(block) {
                    let rows = block.min(m - row);
                    let a = a.at(row, from);
                    let (data, stride) = if in_place {
                        (a.data, a.row_stride)
                    } else {
                        pack(level, a, rows, steps, packed_a, ROW_STRIDE);
                        (&*packed_a, ROW_STRIDE)
                    };
                    // SAFETY: this block of the target is inside it.
                    unsafe {
                        let start = c.get().add(row * ldc + column);
                        let target = Target { start, stride: ldc, columns, add: add || from > 0 };
                        let rows = Rows { data, stride, count: rows, index: None };
                        let panels = Panels { data: packed_b, stride: panel, following: None };
                        tile::product(level, Kind::F32, steps, rows, panels, target);
                    }
                }
            }
        }
    });
}

/// Panels that are packed side by side: 512 bytes of a row, which the processor fetches ahead better than 128.
const TOGETHER: usize = 4;

/// The panels of `b [steps, columns]`, rows of [`PANEL`] columns, so many floats for each.
fn pack_panels(level: Level, b: Mat, steps: usize, columns: usize, to: &mut [f32], panel: usize) {
    let panels = to.chunks_mut(TOGETHER * panel).enumerate();
    for (group, to) in panels.take(columns.div_ceil(TOGETHER * PANEL)) {
        let first = group * TOGETHER * PANEL;
        let whole = (columns - first).min(TOGETHER * PANEL) / PANEL;
        let whole = if b.col_stride == 1 && b.row_stride >= whole * PANEL { whole } else { 0 };
        let b = b.at(0, first);
        copy_panels(level, b.data, b.row_stride, steps, whole, to, panel);
        for (p, panel) in to.chunks_mut(panel).enumerate().skip(whole) {
            let column = p * PANEL;
            if first + column < columns {
                pack(level, b.at(0, column), steps, PANEL.min(columns - first - column), panel, PANEL);
            }
        }
    }
}

simd! {
    /// `steps` rows of whole panels, `stride` floats apart.
    fn copy_panels(from: &[f32], stride: usize, steps: usize, panels: usize, to: &mut [f32], each: usize) = copy_panels_body;
}

#[inline(always)]
fn copy_panels_body<const FMA: bool>(
    from: &[f32],
    stride: usize,
    steps: usize,
    panels: usize,
    to: &mut [f32],
    each: usize,
) {
    if panels == 0 {
        return;
    }
    for (i, row) in from.chunks(stride).enumerate().take(steps) {
        let row = row.as_chunks::<PANEL>().0;
        for (row, panel) in row[..panels].iter().zip(to.chunks_mut(each)) {
            panel[i * PANEL..][..PANEL].copy_from_slice(row);
        }
    }
}

/// `to[i * stride + j] = from(i, j)`.
fn pack(level: Level, from: Mat, rows: usize, columns: usize, to: &mut [f32], stride: usize) {
    if from.col_stride == 1 {
        for (i, to) in to.chunks_mut(stride).enumerate().take(rows) {
            to[..columns].copy_from_slice(&from.data[i * from.row_stride..][..columns]);
        }
    } else if from.row_stride == 1 {
        transpose(level, columns, rows, from.data, from.col_stride, to, stride);
    } else {
        for (i, to) in to.chunks_mut(stride).enumerate().take(rows) {
            for (j, to) in to[..columns].iter_mut().enumerate() {
                *to = from.data[i * from.row_stride + j * from.col_stride];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::simd::{levels, with_level};

    /// `x [rows, columns]` with its elements so far apart, and NaN between them.
    fn apart(x: &[f32], [rows, columns]: [usize; 2], [row, column]: [usize; 2]) -> Vec<f32> {
        let mut data = vec![f32::NAN; (rows - 1) * row + (columns - 1) * column + 1];
        for (i, x) in x.iter().enumerate() {
            data[i / columns * row + i % columns * column] = *x;
        }
        data
    }

    #[test]
    fn strides_do_not_matter() {
        let draw =
            |count: usize, by: usize| (0..count).map(|i| (i * by % 1009) as f32 / 504.5 - 1.0).collect::<Vec<_>>();
        for [m, n, k] in [[1, 1, 1], [5, 7, 3], [13, 37, 300], [250, 129, 40], [3, 530, 17]] {
            let (a, b, c) = (draw(m * k, 37), draw(k * n, 101), draw(m * n, 7));
            let ways = |rows: usize, columns: usize| [[columns, 1], [columns + 3, 1], [1, rows], [2 * columns + 1, 2]];
            for level in levels() {
                for add in [false, true] {
                    let run = |a_way: [usize; 2], b_way: [usize; 2]| {
                        let (a, b) = (apart(&a, [m, k], a_way), apart(&b, [k, n], b_way));
                        let of = |data, [row_stride, col_stride]: [usize; 2]| Mat { data, row_stride, col_stride };
                        let mut c = c.clone();
                        let (a, b) = (of(&a, a_way), of(&b, b_way));
                        with_level(level, || par_gemm(m, n, k, a, b, &mut c, n, add));
                        c
                    };
                    let plain = run([k, 1], [n, 1]);
                    for (i, got) in plain.iter().enumerate() {
                        let term = |p: usize| f64::from(a[i / n * k + p]) * f64::from(b[p * n + i % n]);
                        let exact = (0..k).map(term).sum::<f64>() + if add { f64::from(c[i]) } else { 0.0 };
                        assert!((f64::from(*got) - exact).abs() < 1e-6 * (1.0 + k as f64), "{level:?} {m} × {n} × {k}");
                    }
                    for a_way in ways(m, k) {
                        for b_way in ways(k, n) {
                            let same = run(a_way, b_way).iter().zip(&plain).all(|(x, y)| x.to_bits() == y.to_bits());
                            assert!(same, "{level:?} {m} × {n} × {k}, a by {a_way:?}, b by {b_way:?}");
                        }
                    }
                }
            }
        }
    }
}
