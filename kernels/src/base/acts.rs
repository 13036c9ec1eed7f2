//! Rows of activations in the form that products with weights of a format take.

use super::buffer::{Buffer, SendPtr};
use super::packed::Format;
use super::pool;
use super::quant::{Meta, Quant, QuantActs, quantize_acts};
use super::rows::rows_per_chunk;
use super::simd::{self, Level};
use crate::simd;

/// Activation rows prepared for weights of a format.
#[derive(Debug)]
pub struct Acts {
    pub(super) rows: usize,
    pub(super) k: usize,
    pub(super) form: Form,
}

#[derive(Debug)]
pub(super) enum Form {
    /// f32 values: as they came, or rounded to bf16 where the processor has no bf16 instructions.
    F32 { stride: usize, data: Buffer },
    /// Pairs of bf16.
    Bf16 { stride: usize, data: Buffer },
    /// int8 by block.
    Quantized(QuantActs),
}

impl Acts {
    /// Prepares `x [rows, k]` (row-major) for weights of `format`: f32 stays f32; for bf16 the values are rounded to bf16,
    /// for the quantised formats to int8 by block, unless `exact` asks to keep them (router and head).
    ///
    /// # Panics
    /// If `x` has not `rows · k` values, or the format's block is neither 32 nor 64.
    pub fn new(format: Format, exact: bool, rows: usize, k: usize, x: &[f32]) -> Acts {
        assert_eq!(x.len(), rows * k, "activations [{rows}, {k}]");
        let level = simd::level();
        let mut padded = k;
        if let Format::Int8 { .. } | Format::Int4 { .. } = format {
            let quant = Quant::of(format).unwrap_or_else(|| panic!("{format:?} is in blocks of 32 or 64"));
            if !exact {
                return Acts { rows, k, form: Form::Quantized(QuantActs::new(quant, rows, k, x)) };
            }
            padded = quant.blocks(k) * quant.block;
        }
        let rounded = !exact && format == Format::Bf16;
        let pairs = rounded && level >= Level::Avx512Bf16;
        let words = if pairs { k.div_ceil(2) } else { k };
        let stride = row_stride(words.max(padded));
        let mut data = Buffer::words_arbitrary(rows * stride);
        let start = SendPtr(data.words_mut().as_mut_ptr());
        let each = rows_per_chunk(rows, k);
        pool::run(rows.div_ceil(each), |i| {
            let share = i * each..rows.min((i + 1) * each);
            for r in share {
                // SAFETY: row r is this job's alone, and lies inside the buffer.
                let to = unsafe { std::slice::from_raw_parts_mut(start.get().add(r * stride), stride) };
                let (to, padding) = to.split_at_mut(words);
                padding.fill(0.0);
                let from = &x[r * k..][..k];
                if pairs {
                    round_to_pairs(level, from, to);
                } else if rounded {
                    round(level, from, to);
                } else {
                    to.copy_from_slice(from);
                }
            }
        });
        let form = if pairs { Form::Bf16 { stride, data } } else { Form::F32 { stride, data } };
        Acts { rows, k, form }
    }

    /// These rows, each as often as it is named, one behind the other.
    ///
    /// # Panics
    /// If a row is not there.
    pub(crate) fn select(&self, rows: &[u32]) -> Acts {
        let form = match &self.form {
            Form::F32 { stride, data } => Form::F32 { stride: *stride, data: gather(data.words(), *stride, rows) },
            Form::Bf16 { stride, data } => Form::Bf16 { stride: *stride, data: gather(data.words(), *stride, rows) },
            Form::Quantized(acts) => Form::Quantized(acts.select(rows)),
        };
        Acts { rows: rows.len(), k: self.k, form }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a row.
    pub fn k(&self) -> usize {
        self.k
    }
}

/// Rows of `stride` words, on the pool.
fn gather(from: &[f32], stride: usize, rows: &[u32]) -> Buffer {
    let mut to = Buffer::words_arbitrary(rows.len() * stride);
    let each = (1_usize << 15).div_ceil(stride.max(1));
    let start = SendPtr(to.words_mut().as_mut_ptr());
    pool::run(rows.len().div_ceil(each), |i| {
        let share = i * each..rows.len().min((i + 1) * each);
        // SAFETY: these rows of the copy are this job's alone.
        let to = unsafe { std::slice::from_raw_parts_mut(start.get().add(share.start * stride), share.len() * stride) };
        for (to, &row) in to.chunks_exact_mut(stride).zip(&rows[share]) {
            to.copy_from_slice(&from[row as usize * stride..][..stride]);
        }
    });
    to
}

/// An odd number of cache lines: neighbouring rows do not compete for the same places of the cache.
fn row_stride(words: usize) -> usize {
    (words.div_ceil(16) | 1) * 16
}

/// Activations that jobs on the pool fill in part by part, in the form of [`Acts::new`] (not exact).
pub(crate) struct Filling {
    acts: Acts,
    place: Place,
}

#[derive(Clone, Copy)]
enum Place {
    F32 { start: SendPtr<f32>, stride: usize, rounded: bool },
    Bf16 { start: SendPtr<f32>, stride: usize },
    Quantized { quant: Quant, values: SendPtr<i8>, meta: SendPtr<Meta> },
}

impl Filling {
    /// Parts begin at multiples of this many values.
    pub(crate) const STEP: usize = 64;

    /// Room for `rows` rows of `k` values.
    ///
    /// # Panics
    /// If the format's block is neither 32 nor 64.
    pub(crate) fn new(format: Format, rows: usize, k: usize) -> Self {
        if let Format::Int8 { .. } | Format::Int4 { .. } = format {
            let quant = Quant::of(format).unwrap_or_else(|| panic!("{format:?} is in blocks of 32 or 64"));
            let mut acts = QuantActs::empty(quant, rows, k);
            let (values, meta) = acts.places();
            let place = Place::Quantized { quant, values, meta };
            return Filling { acts: Acts { rows, k, form: Form::Quantized(acts) }, place };
        }
        let rounded = format == Format::Bf16;
        let pairs = rounded && simd::level() >= Level::Avx512Bf16;
        let stride = row_stride(if pairs { k.div_ceil(2) } else { k });
        let mut data = Buffer::words_arbitrary(rows * stride);
        let start = SendPtr(data.words_mut().as_mut_ptr());
        let (form, place) = match pairs {
            true => (Form::Bf16 { stride, data }, Place::Bf16 { start, stride }),
            false => (Form::F32 { stride, data }, Place::F32 { start, stride, rounded }),
        };
        Filling { acts: Acts { rows, k, form }, place }
    }

    /// The values of a row from `from` on, a multiple of [`Filling::STEP`]; they end at such a multiple too, or with the row.
    ///
    /// # Safety
    /// No other job fills these values meanwhile.
    pub(crate) unsafe fn put(&self, level: Level, row: usize, from: usize, x: &[f32]) {
        let k = self.acts.k;
        assert!(row < self.acts.rows && from.is_multiple_of(Self::STEP) && from + x.len() <= k);
        assert!(from + x.len() == k || x.len().is_multiple_of(Self::STEP));
        let last = from + x.len() == k;
        // SAFETY: the part lies inside its row, and is this job's alone, says the caller.
        unsafe {
            match self.place {
                Place::F32 { start, stride, rounded } => {
                    let words = if last { stride - from } else { x.len() };
                    let to = std::slice::from_raw_parts_mut(start.get().add(row * stride + from), words);
                    let (to, padding) = to.split_at_mut(x.len());
                    padding.fill(0.0);
                    if rounded { round(level, x, to) } else { to.copy_from_slice(x) }
                }
                Place::Bf16 { start, stride } => {
                    let words = if last { stride - from / 2 } else { x.len() / 2 };
                    let to = std::slice::from_raw_parts_mut(start.get().add(row * stride + from / 2), words);
                    let (to, padding) = to.split_at_mut(x.len().div_ceil(2));
                    padding.fill(0.0);
                    round_to_pairs(level, x, to);
                }
                Place::Quantized { quant, values, meta } => {
                    let (all, first, count) = (quant.blocks(k), from / quant.block, quant.blocks(x.len()));
                    let at = row * all + first;
                    let values = values.get().add(at * quant.block);
                    let values = std::slice::from_raw_parts_mut(values, count * quant.block);
                    let meta = std::slice::from_raw_parts_mut(meta.get().add(at), count);
                    quantize_acts(level, quant, x, values, meta);
                }
            }
        }
    }

    /// The activations, of which every value has been put.
    pub(crate) fn done(self) -> Acts {
        self.acts
    }
}

simd! {
    /// `to = x` rounded to bf16 (to nearest, ties to even), kept as f32.
    fn round(x: &[f32], to: &mut [f32]) = round_body;
}

#[inline(always)]
fn round_body<const FMA: bool>(x: &[f32], to: &mut [f32]) {
    for (x, to) in x.iter().zip(to) {
        *to = f32::from_bits(bf16_bits(*x) << 16);
    }
}

simd! {
    /// `to` = pairs of `x` rounded to bf16, the even one in the lower half; a missing last one is zero.
    pub(super) fn round_to_pairs(x: &[f32], to: &mut [f32]) = round_to_pairs_body;
}

#[inline(always)]
fn round_to_pairs_body<const FMA: bool>(x: &[f32], to: &mut [f32]) {
    let (pairs, rest) = x.as_chunks::<2>();
    for (pair, to) in pairs.iter().zip(&mut *to) {
        *to = f32::from_bits(bf16_bits(pair[0]) | bf16_bits(pair[1]) << 16);
    }
    if let ([last], Some(to)) = (rest, to.last_mut()) {
        *to = f32::from_bits(bf16_bits(*last));
    }
}

#[inline(always)]
fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1))) >> 16;
    // Rounding could carry a NaN into another class; a quiet NaN stays one.
    if x.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::packed::{Packed, multiply, par_multiply};
    use crate::base::simd::{levels, with_level};

    const FORMATS: [Format; 6] = [
        Format::F32,
        Format::Bf16,
        Format::Int8 { block: 32 },
        Format::Int8 { block: 64 },
        Format::Int4 { block: 32 },
        Format::Int4 { block: 64 },
    ];

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    fn weight(format: Format, out: usize, k: usize) -> Packed {
        let w = numbers(out * k, 2);
        Packed::pack(format, 1, out, k, &|_, r, to| to.copy_from_slice(&w[r * k..][..k])).unwrap()
    }

    /// The bits of `acts · wᵀ`.
    fn product(acts: &Acts, w: &Packed) -> Vec<u32> {
        let mut c = vec![f32::NAN; acts.rows() * w.out()];
        par_multiply(acts, w, 0, &mut c);
        c.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn rows_in_any_order_and_number_have_the_bits_of_the_row_alone() {
        for (rows, out, k) in [(1, 31, 1), (5, 33, 64), (17, 64, 97), (33, 70, 130), (49, 32, 259)] {
            let x = numbers(rows * k, 1);
            for format in FORMATS {
                let w = weight(format, out, k);
                for level in levels() {
                    with_level(level, || {
                        let acts = Acts::new(format, false, rows, k, &x);
                        let all = product(&acts, &w);
                        let what = format!("{rows} × {out} × {k}, {format:?}, {level:?}");
                        for r in 0..rows {
                            let alone = product(&Acts::new(format, false, 1, k, &x[r * k..][..k]), &w);
                            assert_eq!(alone, all[r * out..][..out], "row {r} alone: {what}");
                        }
                        // Backwards, and the first one twice.
                        let order: Vec<u32> = (0..rows as u32).rev().chain([0]).collect();
                        let mut c = vec![f32::NAN; order.len() * out];
                        multiply(level, &acts, &order, &w, 0, 0..w.panels(), &mut c, out);
                        let selected = product(&acts.select(&order), &w);
                        for (i, &r) in order.iter().enumerate() {
                            let want = &all[r as usize * out..][..out];
                            assert!(c[i * out..][..out].iter().map(|c| c.to_bits()).eq(want.iter().copied()), "{what}");
                            assert_eq!(selected[i * out..][..out], *want, "selected: {what}");
                        }
                    });
                }
            }
        }
    }

    #[test]
    fn filled_in_parts_is_as_at_once() {
        for (rows, k) in [(1, 1), (3, 64), (7, 100), (20, 321)] {
            let x = numbers(rows * k, 3);
            for format in FORMATS {
                let w = weight(format, 33, k);
                for level in levels() {
                    with_level(level, || {
                        let filling = Filling::new(format, rows, k);
                        for r in 0..rows {
                            for (i, part) in x[r * k..][..k].chunks(2 * Filling::STEP).enumerate() {
                                // SAFETY: this thread alone fills, part by part.
                                unsafe { filling.put(level, r, 2 * Filling::STEP * i, part) };
                            }
                        }
                        let want = product(&Acts::new(format, false, rows, k, &x), &w);
                        assert_eq!(product(&filling.done(), &w), want, "{rows} × {k}, {format:?}, {level:?}");
                    });
                }
            }
        }
    }

    #[test]
    fn a_nan_stays_in_its_row() {
        let (rows, out, k) = (40, 65, 96);
        for format in FORMATS {
            let w = weight(format, out, k);
            for level in levels() {
                with_level(level, || {
                    let mut x = numbers(rows * k, 4);
                    x[18 * k + 5] = f32::NAN;
                    let mut c = vec![0.0; rows * out];
                    par_multiply(&Acts::new(format, false, rows, k, &x), &w, 0, &mut c);
                    for (r, row) in c.chunks(out).enumerate() {
                        assert!(row.iter().all(|c| c.is_nan() == (r == 18)), "row {r}, {format:?}, {level:?}");
                    }
                });
            }
        }
    }
}
