//! Products of small f32 matrices that lie in the cache: what the attention kernels are made of.
//!
//! `c = init + left · right`, where every element of `c` is one sequential chain of multiply-adds along K, lanes being
//! columns. A row of `left` may take part with only some of K ([`Limits`]): outside them nothing is read into the chain,
//! so that what is masked can't leak, not even as 0·NaN.

// Lanes, rows and registers of several arrays at once: an index says it best.
#![allow(clippy::needless_range_loop)]

use std::cell::Cell;

use super::simd::{Level, Plain, Vector};
#[cfg(target_arch = "x86_64")]
use super::simd::{Ymm, Zmm};

/// Widths of right operands and results are multiples of this.
pub(crate) const WIDTH: usize = 16;

/// `n` rounded up to whole [`WIDTH`]s.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(WIDTH)
}

/// Element (i, k) is `data[i * row + k * step]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row: usize,
    pub(crate) step: usize,
}

/// Element (k, j) is `data[k * row + j]`.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row: usize,
}

/// What a chain begins with.
#[derive(Clone, Copy)]
pub(crate) enum Init<'a> {
    /// Nothing.
    Zero,
    /// What is in `c`.
    Keep,
    /// What is in `c`, times a factor per row.
    Scaled(&'a [f32]),
}

/// Which part of `0..k` row i takes.
#[derive(Clone, Copy)]
pub(crate) enum Limits<'a> {
    /// All of it.
    All,
    /// `0..to[i]`.
    To(&'a [usize]),
    /// `from[i]..k`.
    From(&'a [usize]),
}

/// Sizes of a product: `rows × k` times `k × width`.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) k: usize,
}

/// `c = init + left · right`; row i of `c` is `c[i * stride..][..width]`.
///
/// # Panics
/// If an operand is too short, or the width is no multiple of [`WIDTH`].
#[allow(clippy::too_many_arguments)]
pub(crate) fn product(
    level: Level,
    size: Size,
    limits: Limits,
    left: Left,
    right: Right,
    init: Init,
    c: &mut [f32],
    stride: usize,
) {
    let Size { rows, width, k } = size;
    if rows == 0 || width == 0 {
        return;
    }
    assert_eq!(width % WIDTH, 0);
    assert!(k == 0 || left.data.len() > (rows - 1) * left.row + (k - 1) * left.step);
    assert!(k == 0 || right.data.len() >= (k - 1) * right.row + width);
    assert!(stride >= width && c.len() >= (rows - 1) * stride + width);
    match limits {
        Limits::All => {}
        Limits::To(list) | Limits::From(list) => assert!(list.len() >= rows && list[..rows].iter().all(|&n| n <= k)),
    }
    if let Init::Scaled(factors) = init {
        assert!(factors.len() >= rows);
    }
    let job = Job { size, limits, left, right, init, stride };
    let c = c.as_mut_ptr();
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn avx512(job: &Job, c: *mut f32) {
            // SAFETY: checked by `product`.
            unsafe { sweep::<Zmm, 8>(job, c) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(job: &Job, c: *mut f32) {
            // SAFETY: checked by `product`.
            unsafe { sweep::<Ymm, 6>(job, c) }
        }
        // SAFETY: the level says what the processor has, and the sizes are checked above.
        unsafe {
            if level >= Level::Avx512 {
                return avx512(&job, c);
            }
            if level >= Level::Avx2 {
                return avx2(&job, c);
            }
        }
    }
    let _ = level;
    // SAFETY: the sizes are checked above.
    unsafe { sweep::<Plain, 4>(&job, c) }
}

struct Job<'a> {
    size: Size,
    limits: Limits<'a>,
    left: Left<'a>,
    right: Right<'a>,
    init: Init<'a>,
    stride: usize,
}

/// Strips of two registers' columns outside, rows inside: a strip of `right` stays in the first-level cache.
#[inline(always)]
unsafe fn sweep<V: Vector, const R: usize>(job: &Job, c: *mut f32) {
    let width = job.size.width;
    let mut column = 0;
    while column < width {
        // SAFETY: whole strips inside the width.
        unsafe {
            if width - column >= 2 * V::LANES {
                strip::<V, R, 2>(job, c, column);
                column += 2 * V::LANES;
            } else {
                strip::<V, R, 1>(job, c, column);
                column += V::LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn strip<V: Vector, const R: usize, const N: usize>(job: &Job, c: *mut f32, column: usize) {
    let rows = job.size.rows;
    let mut row = 0;
    // SAFETY: whole tiles inside the rows.
    unsafe {
        while rows - row >= R {
            tile::<V, R, N>(job, c, row, column);
            row += R;
        }
        while rows - row >= 4 {
            tile::<V, 4, N>(job, c, row, column);
            row += 4;
        }
        while row < rows {
            tile::<V, 1, N>(job, c, row, column);
            row += 1;
        }
    }
}

#[inline(always)]
unsafe fn tile<V: Vector, const R: usize, const N: usize>(job: &Job, c: *mut f32, row: usize, column: usize) {
    let k = job.size.k;
    // SAFETY: `product` has checked that operands and result hold all rows, columns and steps.
    unsafe {
        let c = c.add(row * job.stride + column);
        let mut acc = [[V::zero(); N]; R];
        match job.init {
            Init::Zero => {}
            Init::Keep => {
                for r in 0..R {
                    for n in 0..N {
                        acc[r][n] = V::load(c.add(r * job.stride + n * V::LANES));
                    }
                }
            }
            Init::Scaled(factors) => {
                for r in 0..R {
                    let factor = V::splat(factors.as_ptr().add(row + r));
                    for n in 0..N {
                        acc[r][n] = V::zero().fma(factor, V::load(c.add(r * job.stride + n * V::LANES)));
                    }
                }
            }
        }
        // With K empty the operands may be too.
        if k > 0 {
            let (mut from, mut to) = ([0; R], [k; R]);
            match job.limits {
                Limits::All => {}
                Limits::To(list) => to.copy_from_slice(&list[row..row + R]),
                Limits::From(list) => from.copy_from_slice(&list[row..row + R]),
            }
            let a = job.left.data.as_ptr().wrapping_add(row * job.left.row);
            let b = job.right.data.as_ptr().wrapping_add(column);
            // The steps that all rows take lie between those that only some take.
            let first = from.iter().fold(0, |x, &y| x.max(y));
            let last = to.iter().fold(k, |x, &y| x.min(y)).max(first);
            for step in from.iter().fold(first, |x, &y| x.min(y))..first {
                some_rows::<V, R, N>(job, a, b, step, &mut acc, |r| from[r] <= step && step < to[r]);
            }
            all_rows::<V, R, N>(job, a, b, first..last, &mut acc);
            for step in last..to.iter().fold(0, |x, &y| x.max(y)) {
                some_rows::<V, R, N>(job, a, b, step, &mut acc, |r| from[r] <= step && step < to[r]);
            }
        }
        for r in 0..R {
            for n in 0..N {
                acc[r][n].store(c.add(r * job.stride + n * V::LANES));
            }
        }
    }
}

#[inline(always)]
unsafe fn all_rows<V: Vector, const R: usize, const N: usize>(
    job: &Job,
    a: *const f32,
    b: *const f32,
    steps: std::ops::Range<usize>,
    acc: &mut [[V; N]; R],
) {
    // SAFETY: see `tile`.
    unsafe {
        let mut sums = *acc;
        let a: [*const f32; R] = std::array::from_fn(|r| a.wrapping_add(r * job.left.row));
        let mut at = steps.start * job.left.step;
        let mut b = b.wrapping_add(steps.start * job.right.row);
        for _ in steps {
            let mut w = [V::zero(); N];
            for n in 0..N {
                w[n] = V::load(b.add(n * V::LANES));
            }
            for r in 0..R {
                let x = V::splat(a[r].add(at));
                for n in 0..N {
                    sums[r][n] = sums[r][n].fma(x, w[n]);
                }
            }
            at += job.left.step;
            b = b.wrapping_add(job.right.row);
        }
        *acc = sums;
    }
}

#[inline(always)]
unsafe fn some_rows<V: Vector, const R: usize, const N: usize>(
    job: &Job,
    a: *const f32,
    b: *const f32,
    step: usize,
    acc: &mut [[V; N]; R],
    takes: impl Fn(usize) -> bool,
) {
    for r in 0..R {
        if takes(r) {
            // SAFETY: see `tile`.
            unsafe {
                let x = V::splat(a.add(r * job.left.row + step * job.left.step));
                for n in 0..N {
                    acc[r][n] = acc[r][n].fma(x, V::load(b.add(step * job.right.row + n * V::LANES)));
                }
            }
        }
    }
}

/// `to[j * to_row + i] = from[i * from_row + j]` for `rows × columns` of `from`.
pub(crate) fn transpose(
    level: Level,
    rows: usize,
    columns: usize,
    from: &[f32],
    from_row: usize,
    to: &mut [f32],
    to_row: usize,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(from.len() >= (rows - 1) * from_row + columns);
    assert!(to.len() >= (columns - 1) * to_row + rows);
    transpose_at(level, [rows, columns], from, from_row, to, to_row);
}

/// Whole squares in registers, the edges one by one. The sizes are checked by [`transpose`].
fn transpose_at(level: Level, size: [usize; 2], from: &[f32], from_row: usize, to: &mut [f32], to_row: usize) {
    let [rows, columns] = size;
    let mut side = None;
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn avx512(size: [usize; 2], from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
            // SAFETY: checked by `transpose`.
            unsafe { squares::<Zmm>(size, from, from_row, to, to_row) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(size: [usize; 2], from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
            // SAFETY: checked by `transpose`.
            unsafe { squares::<Ymm>(size, from, from_row, to, to_row) }
        }
        let (from, to) = (from.as_ptr(), to.as_mut_ptr());
        // SAFETY: the level says what the processor has; `transpose` has checked the sizes.
        unsafe {
            if level >= Level::Avx512 {
                avx512(size, from, from_row, to, to_row);
                side = Some(Zmm::LANES);
            } else if level >= Level::Avx2 {
                avx2(size, from, from_row, to, to_row);
                side = Some(Ymm::LANES);
            }
        }
    }
    let _ = level;
    let [whole_rows, whole_columns] = size.map(|n| side.map_or(0, |side| n / side * side));
    for i in 0..rows {
        for j in if i < whole_rows { whole_columns } else { 0 }..columns {
            to[j * to_row + i] = from[i * from_row + j];
        }
    }
}

#[inline(always)]
unsafe fn squares<V: Vector>(
    [rows, columns]: [usize; 2],
    from: *const f32,
    from_row: usize,
    to: *mut f32,
    to_row: usize,
) {
    let side = V::LANES;
    for i in (0..rows / side * side).step_by(side) {
        for j in (0..columns / side * side).step_by(side) {
            // SAFETY: `transpose` has checked that all rows and columns lie in the operands.
            unsafe {
                for (c, column) in V::columns(from.add(i * from_row + j), from_row).as_ref().iter().enumerate() {
                    column.store(to.add((j + c) * to_row + i));
                }
            }
        }
    }
}

/// Calls `f` with `len` words of this thread's scratch memory, which hold anything. It stays allocated.
pub(crate) fn scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    }
    let mut memory = SCRATCH.take();
    // Room to begin at a cache line.
    if memory.len() < len + 16 {
        memory = vec![0.0; len + 16];
    }
    let skip = memory.as_ptr().align_offset(64).min(16);
    let result = f(&mut memory[skip..][..len]);
    SCRATCH.set(memory);
    result
}

/// Cuts `memory` into parts of these lengths.
pub(crate) fn parts<const N: usize>(memory: &mut [f32], lengths: [usize; N]) -> [&mut [f32]; N] {
    let mut rest = memory;
    lengths.map(|n| {
        let (part, tail) = std::mem::take(&mut rest).split_at_mut(n);
        rest = tail;
        part
    })
}

#[cfg(test)]
mod tests {
    use super::super::simd::levels;
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    /// The same chains, in f64.
    fn expected(
        size: Size,
        limits: Limits,
        left: Left,
        right: Right,
        init: Init,
        c: &[f32],
        stride: usize,
    ) -> Vec<f64> {
        let mut out = Vec::new();
        for i in 0..size.rows {
            let range = match limits {
                Limits::All => 0..size.k,
                Limits::To(list) => 0..list[i],
                Limits::From(list) => list[i]..size.k,
            };
            for j in 0..size.width {
                let begin = match init {
                    Init::Zero => 0.0,
                    Init::Keep => c[i * stride + j] as f64,
                    Init::Scaled(factors) => factors[i] as f64 * c[i * stride + j] as f64,
                };
                let product =
                    |k: usize| left.data[i * left.row + k * left.step] as f64 * right.data[k * right.row + j] as f64;
                out.push(begin + range.clone().map(product).sum::<f64>());
            }
        }
        out
    }

    #[test]
    fn products_at_odd_sizes_with_limits() {
        for level in levels() {
            for (rows, width, k) in [(1, 16, 1), (3, 32, 7), (8, 48, 64), (13, 16, 5), (29, 80, 33), (4, 32, 0)] {
                let to: Vec<usize> = (0..rows).map(|i| (i * 3 + 1).min(k)).collect();
                let from: Vec<usize> = (0..rows).map(|i| (i * 2).min(k)).collect();
                let factors = numbers(rows, 5);
                let (mut a, mut b) = (numbers(rows * k + 1, 1), numbers(k * width, 2));
                for (limits, poison) in
                    [(Limits::All, None), (Limits::To(&to), Some(rows)), (Limits::From(&from), None)]
                {
                    // A NaN in a step that no row takes yet must not be seen by the rows that don't take it.
                    if poison.is_some() && k > to[rows - 1] {
                        b[to[rows - 1] * width] = f32::NAN;
                        a[to[rows - 1]] = f32::NAN;
                    }
                    for (row, step) in [(k.max(1), 1), (1, rows)] {
                        for init in [Init::Zero, Init::Keep, Init::Scaled(&factors)] {
                            if poison.is_some() && step != 1 {
                                continue;
                            }
                            if poison.is_none() {
                                (a, b) = (numbers(rows * k + 1, 1), numbers(k * width, 2));
                            }
                            let (left, right) = (Left { data: &a, row, step }, Right { data: &b, row: width });
                            let mut c = numbers(rows * (width + 3), 3);
                            let size = Size { rows, width, k };
                            let want = expected(size, limits, left, right, init, &c, width + 3);
                            product(level, size, limits, left, right, init, &mut c, width + 3);
                            for (i, want) in want.iter().enumerate() {
                                let got = c[i / width * (width + 3) + i % width];
                                assert!(
                                    (got as f64 - want).abs() < 1e-5,
                                    "{level:?} {rows}x{width}x{k} at {i}: {got} {want}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn transposes_at_odd_sizes() {
        for level in levels() {
            for (rows, columns) in [(1, 1), (8, 8), (7, 19), (64, 33), (0, 5)] {
                let from = numbers(rows * (columns + 2), 1);
                let mut to = vec![0.0; columns * (rows + 1)];
                transpose(level, rows, columns, &from, columns + 2, &mut to, rows + 1);
                for i in 0..rows {
                    for j in 0..columns {
                        assert_eq!(to[j * (rows + 1) + i], from[i * (columns + 2) + j]);
                    }
                }
            }
        }
    }
}
