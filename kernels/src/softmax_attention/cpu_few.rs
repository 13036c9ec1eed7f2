//! Few queries over a whole tile of keys that all of them see: what a decode step over a long text consists of. It should
//! take no longer than keys and values take to come from memory.
//!
//! Keys are turned in registers on their way into the products; and all the while the next tile is asked for, in the order in which
//! it lies and at an even pace: adding the values takes half as long as scoring the keys, so a part of the next values is asked for
//! with the keys. Requests that come in bursts fill the processor's queue of misses, and computing waits for memory instead of
//! going on beside it. Every chain is that of the general path, to the bit.

// Lanes, rows and registers of several arrays at once: an index says it best.
#![allow(clippy::needless_range_loop)]

use half::bf16;

use super::cpu::{KEYS, Partial, STRIPE, weigh_body};
use crate::base::masked::WIDTH;
use crate::base::simd::{Level, Plain, Vector};
#[cfg(target_arch = "x86_64")]
use crate::base::simd::{Ymm, Zmm};
use crate::base::view::prefetch;

/// Words of a cache line.
const LINE: usize = 16;

/// How many queries are few: with more, to turn the keys once in memory takes less time.
pub(super) fn most(level: Level) -> usize {
    match level {
        Level::Portable => 8,
        Level::Avx2 => 16,
        _ => STRIPE,
    }
}

/// [`KEYS`] keys or values, `row` words apart, and those of the next tile.
pub(super) struct Tile<'a> {
    /// f32, or pairs of bf16.
    pub(super) rows: &'a [f32],
    pub(super) row: usize,
    pub(super) next: Next,
}

impl Tile<'_> {
    /// What the queries from `from` on ask for: the first ones the next tile, the others what is at hand, which costs nothing.
    #[inline(always)]
    fn ahead(&self, from: usize) -> Next {
        if from == 0 { self.next } else { Next(self.rows.as_ptr()) }
    }
}

/// Where the next tile begins, whose rows lie one behind the other. Nothing of it is read here.
#[derive(Clone, Copy)]
pub(super) struct Next(pub(super) *const f32);

impl Next {
    /// Asks for the line at `word`, into the second-level cache.
    #[inline(always)]
    fn ask(self, word: usize) {
        prefetch(self.0.wrapping_add(word).cast());
    }
}

/// `rows` queries, at most [`STRIPE`], of `dim` floats, a multiple of [`WIDTH`], over a tile.
pub(super) struct Few<'a> {
    pub(super) queries: &'a [f32],
    pub(super) rows: usize,
    pub(super) dim: usize,
    pub(super) keys: Tile<'a>,
    pub(super) values: Tile<'a>,
    /// Whether keys and values are pairs of bf16; `dim` is a multiple of [`PAIRS`] then.
    pub(super) halves: bool,
}

/// Columns of pairs are turned in squares of at most this many values.
pub(super) const PAIRS: usize = 32;

/// Adds the tile to `partial`. `scores` is memory for `rows` times [`KEYS`] floats.
///
/// # Panics
/// If an operand is too short.
pub(super) fn attend(level: Level, few: &Few, scores: &mut [f32], partial: &mut Partial) {
    let Few { queries, rows, dim, keys, values, halves } = few;
    let words = if *halves { dim / 2 } else { *dim };
    assert!(*rows <= STRIPE && dim % WIDTH == 0 && queries.len() >= rows * dim && scores.len() >= rows * KEYS);
    assert!([keys, values].iter().all(|tile| tile.rows.len() >= (KEYS - 1) * tile.row + words));
    assert!(!halves || dim % PAIRS == 0);
    assert!(partial.max.len() == *rows && partial.sum.len() == *rows && partial.values.len() >= rows * dim);
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn avx512<const HALVES: bool>(few: &Few, scores: &mut [f32], partial: &mut Partial) {
            // SAFETY: checked by `attend`.
            unsafe { attend_body::<Zmm, 8, 4, HALVES, true>(few, scores, partial) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2<const HALVES: bool>(few: &Few, scores: &mut [f32], partial: &mut Partial) {
            // SAFETY: checked by `attend`.
            unsafe { attend_body::<Ymm, 4, 2, HALVES, true>(few, scores, partial) }
        }
        // SAFETY: the level says what the processor has, and the sizes are checked above.
        unsafe {
            match (level >= Level::Avx512, level >= Level::Avx2, halves) {
                (true, _, false) => return avx512::<false>(few, scores, partial),
                (true, _, true) => return avx512::<true>(few, scores, partial),
                (_, true, false) => return avx2::<false>(few, scores, partial),
                (_, true, true) => return avx2::<true>(few, scores, partial),
                _ => {}
            }
        }
    }
    let _ = level;
    // SAFETY: the sizes are checked above.
    unsafe {
        match halves {
            false => attend_body::<Plain, 4, 4, false, false>(few, scores, partial),
            true => attend_body::<Plain, 4, 4, true, false>(few, scores, partial),
        }
    }
}

/// Up to `R` queries at a time, 4 or 8 as the registers allow, and `N` registers of values.
#[inline(always)]
unsafe fn attend_body<V: Vector, const R: usize, const N: usize, const HALVES: bool, const FMA: bool>(
    few: &Few,
    scores: &mut [f32],
    partial: &mut Partial,
) {
    let mut shrink = [0.0; STRIPE];
    // SAFETY: `attend` has checked that all operands hold the rows.
    unsafe {
        let mut from = 0;
        while from < few.rows {
            let n = part(few.rows - from, R);
            match n {
                8 => score::<V, 8, HALVES>(few, from, scores),
                4 => score::<V, 4, HALVES>(few, from, scores),
                2 => score::<V, 2, HALVES>(few, from, scores),
                _ => score::<V, 1, HALVES>(few, from, scores),
            }
            from += n;
        }
        weigh_body::<FMA>(scores, &[KEYS; STRIPE][..few.rows], partial.max, partial.sum, &mut shrink);
        let mut from = 0;
        while from < few.rows {
            let n = part(few.rows - from, R);
            match n {
                8 => add::<V, 8, 2, HALVES>(few, from, scores, &shrink, partial.values),
                4 => add::<V, 4, N, HALVES>(few, from, scores, &shrink, partial.values),
                2 => add::<V, 2, N, HALVES>(few, from, scores, &shrink, partial.values),
                _ => add::<V, 1, N, HALVES>(few, from, scores, &shrink, partial.values),
            }
            from += n;
        }
    }
}

/// The largest power of two within `rows` and `most`.
#[inline(always)]
fn part(rows: usize, most: usize) -> usize {
    1 << rows.min(most).ilog2()
}

/// The scores of queries `from .. from + R`.
#[inline(always)]
unsafe fn score<V: Vector, const R: usize, const HALVES: bool>(few: &Few, from: usize, scores: &mut [f32]) {
    let (dim, keys) = (few.dim, &few.keys);
    let (next_keys, next_values) = (few.keys.ahead(from), few.values.ahead(from));
    // SAFETY: see `attend_body`.
    unsafe {
        let queries = few.queries.as_ptr().add(from * dim);
        for key in (0..KEYS).step_by(V::LANES) {
            let mut sums = [V::zero(); R];
            let words = if HALVES { dim / 2 } else { dim };
            for word in (0..words).step_by(V::LANES) {
                let square = V::columns(keys.rows.as_ptr().add(key * keys.row + word), keys.row);
                let square = square.as_ref();
                // So much of the next keys, and half as much of the next values.
                let first = key * words + word * V::LANES;
                macro_rules! columns {
                    ($($c:literal)*) => { $(if $c < V::LANES {
                        if $c * V::LANES % LINE == 0 {
                            next_keys.ask(first + $c * V::LANES);
                        }
                        if $c * V::LANES % (2 * LINE) == 0 {
                            next_values.ask((first + $c * V::LANES) / 2);
                        }
                        let (k, at) = (square[$c], word + $c);
                        for r in 0..R {
                            let query = queries.add(r * dim);
                            sums[r] = if HALVES {
                                let query = query.add(2 * at);
                                sums[r].fma(V::splat(query), k.low_bf16()).fma(V::splat(query.add(1)), k.high_bf16())
                            } else {
                                sums[r].fma(V::splat(query.add(at)), k)
                            };
                        }
                    })* };
                }
                // One by one, so that the square stays in registers.
                columns!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
            }
            for r in 0..R {
                sums[r].store(scores.as_mut_ptr().add((from + r) * KEYS + key));
            }
        }
    }
}

/// The values, weighted, added to what queries `from .. from + R` have of earlier tiles.
#[inline(always)]
unsafe fn add<V: Vector, const R: usize, const N: usize, const HALVES: bool>(
    few: &Few,
    from: usize,
    scores: &[f32],
    shrink: &[f32],
    sums: &mut [f32],
) {
    let mut column = 0;
    // SAFETY: strips inside the columns; see `attend_body`.
    unsafe {
        while few.dim - column >= N * V::LANES {
            add_strip::<V, R, N, HALVES>(few, from, column, scores, shrink, sums);
            column += N * V::LANES;
        }
        while column < few.dim {
            add_strip::<V, R, 1, HALVES>(few, from, column, scores, shrink, sums);
            column += V::LANES;
        }
    }
}

#[inline(always)]
unsafe fn add_strip<V: Vector, const R: usize, const N: usize, const HALVES: bool>(
    few: &Few,
    from: usize,
    column: usize,
    scores: &[f32],
    shrink: &[f32],
    sums: &mut [f32],
) {
    let (dim, values, next) = (few.dim, &few.values, few.values.ahead(from));
    // SAFETY: see `attend_body`.
    unsafe {
        let weights = scores.as_ptr().add(from * KEYS);
        let sums = sums.as_mut_ptr().add(from * dim + column);
        let mut acc = [[V::zero(); N]; R];
        for r in 0..R {
            let factor = V::splat(shrink.as_ptr().add(from + r));
            for n in 0..N {
                acc[r][n] = V::zero().fma(factor, V::load(sums.add(r * dim + n * V::LANES)));
            }
        }
        for key in 0..KEYS {
            let line = values.rows.as_ptr().add(key * values.row);
            // Half as much of the next values, behind what `score` asked for. Counts that the compiler knows.
            let (all, first, words) =
                if HALVES { (dim / 2, column / 2, N * V::LANES / 2) } else { (dim, column, N * V::LANES) };
            let passed = (first * KEYS + key * words) / 2;
            for line in 0..(words / 2).div_ceil(LINE) {
                if words / 2 >= LINE || key % (2 * LINE / words) == 0 {
                    next.ask(KEYS * all / 2 + passed + line * LINE);
                }
            }
            let mut v = [V::zero(); N];
            for n in 0..N {
                let at = column + n * V::LANES;
                v[n] = if HALVES { V::load_bf16(line.cast::<bf16>().add(at)) } else { V::load(line.add(at)) };
            }
            for r in 0..R {
                let weight = V::splat(weights.add(r * KEYS + key));
                for n in 0..N {
                    acc[r][n] = acc[r][n].fma(weight, v[n]);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                acc[r][n].store(sums.add(r * dim + n * V::LANES));
            }
        }
    }
}
