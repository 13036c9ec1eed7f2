//! bf16 weights times many rows of f32, where no instruction multiplies bf16 (fast): a block of panels is widened once, and stays
//! in the cache while the rows pass by. To widen in registers takes an instruction for every twelve multiply-adds, from the units
//! that multiply.

use std::cell::RefCell;

use super::buffer::Buffer;
use super::simd::{Level, Plain, Vector};
#[cfg(target_arch = "x86_64")]
use super::simd::{Ymm, Zmm};
use super::tile::{self, Following, Kind, PANEL, Panels, Rows, Target};

/// From so many rows on it pays with AVX-512, up to 8 % (128 rows lost as much), and with AVX2, 1.5 times as fast, as its few
/// registers have to widen everything twice.
const ROWS: usize = 256;
const ROWS_AVX2: usize = 64;
/// Units along K and panels of a block: half a MiB as f32.
const UNITS: usize = 256;
const PANELS: usize = 8;

/// Whether so many rows are better multiplied here.
pub(super) fn pays(level: Level, rows: usize) -> bool {
    rows >= if level >= Level::Avx512 { ROWS } else { ROWS_AVX2 }
}

thread_local! {
    static SCRATCH: RefCell<Option<Buffer>> = const { RefCell::new(None) };
}

/// [`tile::product`] of [`Kind::WideBf16`], to the bit.
///
/// # Safety
/// See there.
pub(super) unsafe fn product(level: Level, units: usize, rows: Rows, panels: Panels, target: Target) {
    SCRATCH.with_borrow_mut(|scratch| {
        let stride = 2 * UNITS * PANEL;
        let scratch = scratch.get_or_insert_with(|| Buffer::words_zeroed(PANELS * stride)).words_mut();
        for column in (0..target.columns).step_by(PANELS * PANEL) {
            let columns = (target.columns - column).min(PANELS * PANEL);
            for from in (0..units).step_by(UNITS) {
                let count = UNITS.min(units - from);
                let at = |column: usize, from: usize| &panels.data[column / PANEL * panels.stride + from * PANEL..];
                for (i, to) in scratch.chunks_mut(stride).enumerate().take(columns.div_ceil(PANEL)) {
                    widen(level, &at(column + i * PANEL, from)[..count * PANEL], to);
                }
                let next = if from + count < units { (column, from + count) } else { (column + PANELS * PANEL, 0) };
                let following = (next.0 < target.columns).then(|| Following {
                    data: at(next.0, next.1),
                    stride: panels.stride,
                    words: UNITS.min(units - next.1) * PANEL,
                });
                let rows = Rows { data: &rows.data[2 * from..], ..rows };
                let panels = Panels { data: scratch, stride, following };
                // SAFETY: these columns are inside the target, which is the caller's.
                unsafe {
                    let start = target.start.add(column);
                    let target = Target { start, columns, add: target.add || from > 0, ..target };
                    tile::product(level, Kind::F32, 2 * count, rows, panels, target);
                }
            }
        }
    });
}

/// Units of two bf16 each become two steps along K.
fn widen(level: Level, from: &[f32], to: &mut [f32]) {
    assert!(to.len() >= 2 * from.len());
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn avx512(from: &[f32], to: &mut [f32]) {
            // SAFETY: the processor has the instructions.
            unsafe { registers::<Zmm>(from, to) }
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(from: &[f32], to: &mut [f32]) {
            // SAFETY: as above.
            unsafe { registers::<Ymm>(from, to) }
        }
        // SAFETY: the level says what the processor has.
        unsafe {
            match level {
                Level::Portable => {}
                Level::Avx2 => return avx2(from, to),
                _ => return avx512(from, to),
            }
        }
    }
    let _ = level;
    // SAFETY: plain Rust.
    unsafe { registers::<Plain>(from, to) }
}

/// [`widen`] by registers: left to itself, the compiler gathers and scatters, which takes ten times as long.
///
/// # Safety
/// See [`Vector`]; `to` is twice as long.
#[inline(always)]
unsafe fn registers<V: Vector>(from: &[f32], to: &mut [f32]) {
    for at in (0..from.len() / PANEL * PANEL).step_by(V::LANES) {
        // SAFETY: the unit that `at` is in has its two steps in `to`.
        unsafe {
            let both = V::load(from.as_ptr().add(at));
            let to = to.as_mut_ptr().add(at / PANEL * PANEL + at);
            both.low_bf16().store(to);
            both.high_bf16().store(to.add(PANEL));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::simd::levels;

    #[test]
    fn rows_together_and_alone_are_the_same_to_the_bit() {
        for [units, columns] in [[1, 1], [UNITS + 1, 33], [300, PANELS * PANEL + 17], [2 * UNITS, 2 * PANELS * PANEL]] {
            let strips = columns.div_ceil(PANEL);
            // Any finite bf16 are weights; the words between two panels are nobody's.
            let stride = units * PANEL + 16;
            let word = |i: usize| f32::from_bits((i as u32).wrapping_mul(2_654_435_761) & 0xbfff_bfff);
            let weights: Vec<f32> = (0..strips * stride).map(word).collect();
            let (wide, count) = (2 * units + 3, ROWS + 5);
            let x: Vec<f32> = (0..count * wide).map(|i| (i * 37 % 1009) as f32 / 504.5 - 1.0).collect();
            let index: Vec<u32> = (0..count as u32).rev().collect();
            let panels = Panels { data: &weights, stride, following: None };
            for level in levels() {
                for add in [false, true] {
                    let run = |data: &[f32], count: usize, index: Option<&[u32]>, c: &mut [f32]| {
                        let target = Target { start: c.as_mut_ptr(), stride: columns, columns, add };
                        let rows = Rows { data, stride: wide, count, index };
                        // SAFETY: the target is all of `c`.
                        unsafe { tile::product(level, Kind::WideBf16, units, rows, panels, target) }
                    };
                    let mut together = vec![0.5; count * columns];
                    run(&x, count, Some(&index), &mut together);
                    for (row, together) in index.iter().zip(together.chunks(columns)) {
                        let mut alone = vec![0.5; columns];
                        run(&x[*row as usize * wide..], 1, None, &mut alone);
                        assert!(alone.iter().all(|x| x.is_finite()));
                        let same = alone.iter().zip(together).all(|(x, y)| x.to_bits() == y.to_bits());
                        assert!(same, "{level:?}, {units} units, {columns} columns, row {row}");
                    }
                }
            }
        }
    }
}
