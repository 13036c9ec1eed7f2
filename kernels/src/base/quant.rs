//! The int8 and int4 formats: symmetric, in blocks of 32 or 64 along K for each output column, with an f16 scale a block.
//! At block 32 a weight takes 8.5 or 4.5 bits.
//!
//! A panel is 32 output columns, one block after the other, and a block is 32 scales followed by its *units*: four bytes of
//! each column, that is 4 values of int8 or 8 of int4 (the low nibbles first). Values are stored with a bias (128 or 8),
//! unsigned. So a panel is one stream, and a vector register holds a unit of 16 or 8 columns.
//!
//! Activations are rounded to int8 by block, with a scale of their own; or they stay f32 and the weights are widened in
//! registers (*exact*).

use half::f16;

use super::buffer::SendPtr;
use super::packed::Format;
use super::pool;
use super::quant_tile::{self, Row, SCALES};
use super::simd::{self, Level};
use super::tile::{PANEL, Target};
use crate::simd;

/// Either format, without its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Quant {
    /// 8 or 4.
    pub(crate) bits: usize,
    /// Values along K that share a scale: 32 or 64.
    pub(crate) block: usize,
}

/// Why a row cannot be quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantizeError {
    /// A weight is NaN or infinite.
    NotFinite,
    /// A weight is so large that its block's scale is beyond f16 (about 8 million for int8, 500 thousand for int4).
    TooLarge,
}

impl std::fmt::Display for QuantizeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotFinite => "a weight is NaN or infinite",
            Self::TooLarge => "a weight is too large for a scale in f16",
        })
    }
}

impl std::error::Error for QuantizeError {}

impl Quant {
    /// The quantised formats; nothing for the others, and for blocks that are neither 32 nor 64.
    pub(crate) fn of(format: Format) -> Option<Self> {
        let quant = match format {
            Format::Int8 { block } => Quant { bits: 8, block },
            Format::Int4 { block } => Quant { bits: 4, block },
            Format::F32 | Format::Bf16 => return None,
        };
        matches!(quant.block, 32 | 64).then_some(quant)
    }

    /// Blocks along K; the last may be padded.
    pub(crate) fn blocks(self, input: usize) -> usize {
        input.div_ceil(self.block)
    }

    /// Bytes of one block of a panel.
    pub(crate) fn block_bytes(self) -> usize {
        SCALES + PANEL * self.block * self.bits / 8
    }

    /// Bytes of a panel of 32 columns; a multiple of 64.
    #[cfg(test)]
    pub(crate) fn panel_bytes(self, input: usize) -> usize {
        self.blocks(input) * self.block_bytes()
    }

    /// What a stored zero is.
    pub(crate) fn zero(self) -> i32 {
        1 << (self.bits - 1)
    }

    /// Byte of a block and the shift in it where the value (`column`, `k`) stands.
    fn place(self, column: usize, k: usize) -> (usize, usize) {
        if self.bits == 8 {
            (SCALES + k / 4 * 4 * PANEL + 4 * column + k % 4, 0)
        } else {
            (SCALES + k / 8 * 4 * PANEL + 4 * column + k % 4, k % 8 / 4 * 4)
        }
    }

    /// Fills a panel with zeros: what columns and values that are not there hold.
    pub(crate) fn clear(self, panel: &mut [u8]) {
        for block in panel.chunks_exact_mut(self.block_bytes()) {
            block[..SCALES].fill(0);
            block[SCALES..].fill(if self.bits == 8 { 0x80 } else { 0x88 });
        }
    }

    /// Puts one quantised row of W into its column of a cleared panel.
    pub(crate) fn put(self, column: usize, values: &[i8], scales: &[f16], panel: &mut [u8]) {
        let blocks = panel.chunks_exact_mut(self.block_bytes());
        for ((block, values), scale) in blocks.zip(values.chunks(self.block)).zip(scales) {
            block[2 * column..][..2].copy_from_slice(&scale.to_bits().to_ne_bytes());
            for (k, &value) in values.iter().enumerate() {
                let (at, shift) = self.place(column, k);
                if self.bits == 8 {
                    block[at] = (value as u8) ^ 0x80;
                } else {
                    block[at] = block[at] & !(15 << shift) | ((value + 8) as u8 & 15) << shift;
                }
            }
        }
    }

    /// Takes one row of W, as it is stored, out of its column of a panel.
    pub(crate) fn take(self, column: usize, panel: &[u8], values: &mut [i8], scales: &mut [f16]) {
        let blocks = panel.chunks_exact(self.block_bytes());
        for ((block, values), scale) in blocks.zip(values.chunks_mut(self.block)).zip(scales) {
            *scale = f16::from_bits(u16::from_ne_bytes([block[2 * column], block[2 * column + 1]]));
            for (k, value) in values.iter_mut().enumerate() {
                let (at, shift) = self.place(column, k);
                *value = if self.bits == 8 { (block[at] ^ 0x80) as i8 } else { (block[at] >> shift & 15) as i8 - 8 };
            }
        }
    }

    /// One row of W, dequantised.
    pub(crate) fn row(self, column: usize, panel: &[u8], out: &mut [f32]) {
        let mut values = vec![0; out.len()];
        let mut scales = vec![f16::ZERO; self.blocks(out.len())];
        self.take(column, panel, &mut values, &mut scales);
        self.dequantize(&values, &scales, out);
    }

    /// Quantises a row: `values` as many as `x`, `scales` one a block.
    pub(crate) fn quantize(self, x: &[f32], values: &mut [i8], scales: &mut [f16]) -> Result<(), QuantizeError> {
        assert_eq!((values.len(), scales.len()), (x.len(), self.blocks(x.len())));
        let level = simd::level();
        for ((x, values), scale) in x.chunks(self.block).zip(values.chunks_mut(self.block)).zip(scales) {
            let mut block = [[0.0_f32; 16]; 4];
            block.as_flattened_mut()[..x.len()].copy_from_slice(x);
            let mut rounded = [[0_i8; 16]; 4];
            let used = &block[..self.block / 16];
            let ideal = if self.bits == 8 { ideal8(level, used) } else { ideal4(level, used) };
            if !ideal.is_finite() {
                return Err(QuantizeError::NotFinite);
            }
            let most = used.as_flattened().iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            *scale = nearest(ideal, if self.bits == 8 { most / 127.5 } else { 0.0 });
            if !scale.is_finite() {
                return Err(QuantizeError::TooLarge);
            }
            let inverse = if *scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
            let (least, most) = if self.bits == 8 { (-127.0, 127.0) } else { (-8.0, 7.0) };
            round(level, used, inverse, least, most, &mut rounded);
            values.copy_from_slice(&rounded.as_flattened()[..x.len()]);
        }
        Ok(())
    }

    /// The inverse of [`Quant::quantize`], as near as the format allows; each product is exact in f32.
    pub(crate) fn dequantize(self, values: &[i8], scales: &[f16], out: &mut [f32]) {
        assert_eq!((values.len(), scales.len()), (out.len(), self.blocks(out.len())));
        for ((out, values), scale) in out.chunks_mut(self.block).zip(values.chunks(self.block)).zip(scales) {
            let scale = scale.to_f32();
            for (out, &value) in out.iter_mut().zip(values) {
                *out = f32::from(value) * scale;
            }
        }
    }
}

/// Quantises a row of weights, `x` as many as `values`, in blocks along it with one of `scales` each (the last may be short).
///
/// int8: the largest magnitude becomes 127. int4: of nine scales about the one that makes the largest magnitude −8, the one
/// with the least squared error, fitted by least squares: its error is 6 % (normal weights) or 3 % (their cubes) below that of
/// −8 for the largest.
///
/// # Errors
/// If a weight is not finite or too large.
///
/// # Panics
/// If `format` is not quantised in blocks of 32 or 64, or the lengths do not agree.
pub fn quantize_row(format: Format, x: &[f32], values: &mut [i8], scales: &mut [f16]) -> Result<(), QuantizeError> {
    Quant::of(format).expect("a quantised format, in blocks of 32 or 64").quantize(x, values, scales)
}

/// The values that [`quantize_row`] made, back in f32.
///
/// # Panics
/// If `format` is not quantised in blocks of 32 or 64, or the lengths do not agree.
pub fn dequantize_row(format: Format, values: &[i8], scales: &[f16], out: &mut [f32]) {
    Quant::of(format).expect("a quantised format, in blocks of 32 or 64").dequantize(values, scales, out);
}

/// The f16 nearest to `scale`, or the next one away from zero if that is below `least` in magnitude (among the subnormal
/// ones the steps are wide).
fn nearest(scale: f32, least: f32) -> f16 {
    let near = f16::from_f32(scale);
    if near.to_f32().abs() < least { f16::from_bits(near.to_bits() + 1) } else { near }
}

/// Adding this to a number below 2²² in magnitude leaves its nearest integer (of two the even one) in the low bits.
const ROUND: f32 = 12_582_912.0;

simd! {
    /// `out = clamp(round(x · inverse))`.
    fn round(x: &[[f32; 16]], inverse: f32, least: f32, most: f32, out: &mut [[i8; 16]]) = round_body;
}

#[inline(always)]
fn round_body<const FMA: bool>(x: &[[f32; 16]], inverse: f32, least: f32, most: f32, out: &mut [[i8; 16]]) {
    for (x, out) in x.iter().zip(out) {
        *out = x.map(|x| {
            let x = (x * inverse).clamp(least, most) + ROUND;
            x.to_bits().wrapping_sub(ROUND.to_bits()) as i8
        });
    }
}

simd! {
    /// The scale that makes the largest magnitude 127; not finite if a value is not.
    fn ideal8(x: &[[f32; 16]]) -> f32 = ideal8_body;
}

#[inline(always)]
fn ideal8_body<const FMA: bool>(x: &[[f32; 16]]) -> f32 {
    f32::from_bits(largest(x)) / 127.0
}

/// The bits of the largest magnitude; those of a NaN are above those of infinity.
#[inline(always)]
fn largest<'a>(x: impl IntoIterator<Item = &'a [f32; 16]>) -> u32 {
    let mut most = [0_u32; 16];
    for x in x {
        for (most, x) in most.iter_mut().zip(x) {
            *most = (*most).max(x.to_bits() & 0x7fff_ffff);
        }
    }
    most.into_iter().fold(0, u32::max)
}

simd! {
    /// The scale of int4 with the least squared error among those tried (negative if the largest magnitude is positive, as
    /// there are more negative integers); not finite if a value is not.
    fn ideal4(x: &[[f32; 16]]) -> f32 = ideal4_body;
}

#[inline(always)]
fn ideal4_body<const FMA: bool>(x: &[[f32; 16]]) -> f32 {
    let most = f32::from_bits(largest(x));
    if most == 0.0 || !most.is_finite() {
        return most;
    }
    let sign = if x.as_flattened().contains(&most) { -1.0 } else { 1.0 };
    let mut best = (0.0, 0.0);
    for step in -4_i8..=4 {
        // Against the largest: the inverse of the scale itself may be beyond f32.
        let inverse = sign * (8.0 + 0.25 * f32::from(step));
        let (mut xq, mut qq) = ([0.0_f32; 16], [0.0_f32; 16]);
        for x in x {
            for ((x, xq), qq) in x.iter().zip(&mut xq).zip(&mut qq) {
                let x = x / most;
                let q = ((x * inverse).clamp(-8.0, 7.0) + ROUND) - ROUND;
                *xq += x * q;
                *qq += q * q;
            }
        }
        let (xq, qq) = (xq.iter().sum::<f32>(), qq.iter().sum::<f32>());
        let gain = xq * xq / qq;
        if gain > best.0 {
            best = (gain, xq / qq);
        }
    }
    best.1 * most
}

/// What a block of activations carries beside its values.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Meta {
    /// What one step of the int8 is worth; NaN if an activation of the block is NaN or infinite.
    pub(crate) scale: f32,
    /// The sum of the int8, times the weights' bias, negative: where the integer dot product begins.
    pub(crate) bias: i32,
}

/// Rows of activations in int8 for weights of one format.
#[derive(Debug)]
pub(crate) struct QuantActs {
    quant: Quant,
    blocks: usize,
    values: Vec<i8>,
    meta: Vec<Meta>,
}

/// From this many rows on, AMX tiles are used where they are.
#[cfg(target_arch = "x86_64")]
const TILE_ROWS: usize = super::amx_quant::ROWS;
#[cfg(not(target_arch = "x86_64"))]
const TILE_ROWS: usize = usize::MAX;

/// Tiles are read whole: as many rows stand behind the last one as a tile may want more.
const BEHIND: usize = 15;

/// Below so many activations one thread is faster than two.
const SHARED: usize = 1 << 15;

impl QuantActs {
    /// `x [rows, k]`, each row for itself.
    pub(crate) fn new(quant: Quant, rows: usize, k: usize, x: &[f32]) -> Self {
        assert_eq!(x.len(), rows * k);
        let Self { blocks, mut values, mut meta, .. } = Self::empty(quant, rows, k);
        let level = simd::level();
        let one = |row: usize, values: &mut [i8], meta: &mut [Meta]| {
            quantize_acts(level, quant, &x[row * k..][..k], values, meta);
        };
        let each = blocks * quant.block;
        if rows * k < SHARED {
            for row in 0..rows {
                one(row, &mut values[row * each..][..each], &mut meta[row * blocks..][..blocks]);
            }
        } else {
            let (to, about) = (SendPtr(values.as_mut_ptr()), SendPtr(meta.as_mut_ptr()));
            let together = (SHARED / 4 / k).max(1);
            pool::run(rows.div_ceil(together), |chunk| {
                for row in chunk * together..rows.min((chunk + 1) * together) {
                    // SAFETY: row `row` of either vector is this job's alone.
                    let (values, meta) = unsafe {
                        (
                            std::slice::from_raw_parts_mut(to.get().add(row * each), each),
                            std::slice::from_raw_parts_mut(about.get().add(row * blocks), blocks),
                        )
                    };
                    one(row, values, meta);
                }
            });
        }
        Self { quant, blocks, values, meta }
    }

    /// Room for `rows` rows, zero at first.
    pub(crate) fn empty(quant: Quant, rows: usize, k: usize) -> Self {
        let blocks = quant.blocks(k);
        let behind = if rows >= TILE_ROWS { BEHIND } else { 0 };
        let values = vec![0_i8; (rows + behind) * blocks * quant.block];
        Self { quant, blocks, values, meta: vec![Meta { scale: 0.0, bias: 0 }; rows * blocks] }
    }

    /// Where values and what they carry lie, row by row and block by block.
    pub(crate) fn places(&mut self) -> (SendPtr<i8>, SendPtr<Meta>) {
        (SendPtr(self.values.as_mut_ptr()), SendPtr(self.meta.as_mut_ptr()))
    }

    /// These rows, each as often as it is named, one behind the other.
    pub(crate) fn select(&self, rows: &[u32]) -> Self {
        let each = self.blocks * self.quant.block;
        let mut values = Vec::with_capacity((rows.len() + BEHIND) * each);
        let mut meta = Vec::with_capacity(rows.len() * self.blocks);
        for &row in rows {
            values.extend_from_slice(&self.values[row as usize * each..][..each]);
            meta.extend_from_slice(&self.meta[row as usize * self.blocks..][..self.blocks]);
        }
        values.resize((rows.len() + BEHIND) * each, 0);
        Self { values, meta, ..*self }
    }
}

simd! {
    /// One row of activations, or whole blocks of it; `values` are whole blocks, zero at first.
    pub(super) fn quantize_acts(quant: Quant, x: &[f32], values: &mut [i8], meta: &mut [Meta]) = quantize_acts_body;
}

#[inline(always)]
fn quantize_acts_body<const FMA: bool>(quant: Quant, x: &[f32], values: &mut [i8], meta: &mut [Meta]) {
    let blocks = x.chunks(quant.block).zip(values.chunks_exact_mut(quant.block)).zip(meta);
    for ((x, values), meta) in blocks {
        let mut padded = [[0.0_f32; 16]; 4];
        let whole = x.as_chunks::<16>().0;
        let x = if x.len() == quant.block {
            whole
        } else {
            padded.as_flattened_mut()[..x.len()].copy_from_slice(x);
            &padded[..quant.block / 16]
        };
        *meta = match x {
            [a, b] => quantize_block(quant, [a, b], values),
            [a, b, c, d] => quantize_block(quant, [a, b, c, d], values),
            _ => unreachable!("blocks are of 32 or 64"),
        };
    }
}

#[inline(always)]
fn quantize_block<const N: usize>(quant: Quant, x: [&[f32; 16]; N], values: &mut [i8]) -> Meta {
    let most = f32::from_bits(largest(x));
    if !most.is_finite() {
        values.fill(0);
        return Meta { scale: f32::NAN, bias: 0 };
    }
    // Below this the inverse would be infinite.
    if most < 1e-36 {
        values.fill(0);
        return Meta { scale: 0.0, bias: 0 };
    }
    let inverse = 127.0 / most;
    let mut sum = [0_i32; 16];
    let (values, _) = values.as_chunks_mut::<16>();
    for (x, values) in x.into_iter().zip(values) {
        let q = x.map(|x| (x * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32);
        for (sum, q) in sum.iter_mut().zip(q) {
            *sum += q;
        }
        *values = q.map(|q| q as i8);
    }
    Meta { scale: most / 127.0, bias: -quant.zero() * sum.iter().sum::<i32>() }
}

/// `target = acts[rows] · panelsᵀ` on this thread, `row(i)` being the i-th of `count` rows, for as many panels as the target has
/// columns; `panels` begin with the first.
///
/// # Safety
/// `target` must be valid for writes of `columns` floats in each of `count` rows, and nothing else may use these while this
/// runs.
pub(crate) unsafe fn multiply(
    level: Level,
    quant: Quant,
    acts: &QuantActs,
    count: usize,
    row: impl Fn(usize) -> usize,
    panels: &[u8],
    target: Target,
) {
    let QuantActs { blocks, ref values, ref meta, .. } = *acts;
    let each = blocks * quant.block;
    assert_eq!(acts.quant, quant, "activations for another format");
    assert!(panels.len() >= target.columns.div_ceil(PANEL) * blocks * quant.block_bytes());
    #[cfg(target_arch = "x86_64")]
    if level >= Level::Amx && count >= TILE_ROWS && (1..count).all(|i| row(i) == row(0) + i) {
        let (values, meta) = (&values[row(0) * each..], &meta[row(0) * blocks..][..count * blocks]);
        assert!(values.len() >= count.next_multiple_of(16) * each);
        // SAFETY: the level says what the processor has; sizes are checked above, the target is the caller's.
        return unsafe {
            super::amx_quant::product(quant, blocks, count, values.as_ptr(), meta.as_ptr(), panels.as_ptr(), target)
        };
    }
    let row = |i: usize| {
        let row = row(i);
        Row::Quantized(values[row * each..][..each].as_ptr(), meta[row * blocks..][..blocks].as_ptr())
    };
    // SAFETY: sizes are checked above, the target is the caller's.
    unsafe { quant_tile::product(level, quant, blocks, count, row, panels.as_ptr(), target) }
}

/// As [`multiply`] with activations in f32: row `i` is `x[i * stride..]`, zero from K to the end of its last block.
///
/// # Safety
/// As of [`multiply`].
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn multiply_exact(
    level: Level,
    quant: Quant,
    k: usize,
    x: &[f32],
    stride: usize,
    count: usize,
    row: impl Fn(usize) -> usize,
    panels: &[u8],
    target: Target,
) {
    let blocks = quant.blocks(k);
    let each = blocks * quant.block;
    assert!(stride >= each);
    assert!(panels.len() >= target.columns.div_ceil(PANEL) * blocks * quant.block_bytes());
    let row = |i: usize| Row::Exact(x[row(i) * stride..][..each].as_ptr());
    // SAFETY: sizes are checked above, the target is the caller's.
    unsafe { quant_tile::product(level, quant, blocks, count, row, panels.as_ptr(), target) }
}

#[cfg(test)]
mod tests;
