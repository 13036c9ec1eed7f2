//! The matrix micro-kernels of the int8 and int4 formats ([`super::quant`] says how these are stored).
//!
//! The weights are unsigned in memory (biased), as `vpdpbusd` wants one unsigned operand, and the bias comes off with the
//! block's sum of activations. Inside a block the dot product is exact in 32-bit integers; over the blocks it is one chain
//! of multiply-adds in f32 for each output element. So a row's bits depend neither on its neighbours nor on the width of
//! the registers.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::mem::MaybeUninit;

use super::quant::{Meta, Quant};
use super::simd::Level;
use super::tile::{PANEL, Target};

/// Bytes of a block's scales: one f16 per column.
pub(crate) const SCALES: usize = 2 * PANEL;

/// Activations of one row.
#[derive(Clone, Copy)]
pub(crate) enum Row {
    /// int8 in blocks, with scale and bias for each block.
    Quantized(*const i8, *const Meta),
    /// f32, zero from the end of K to the end of its block.
    Exact(*const f32),
}

/// Rows that one call of a kernel takes.
pub(crate) const MOST: usize = 8;

/// One panel times up to [`MOST`] rows, all of one kind, into `to[r * stride + column]` for 32 columns.
#[derive(Clone, Copy)]
struct Tile<'a> {
    quant: Quant,
    blocks: usize,
    rows: &'a [Row],
    panel: *const u8,
    to: *mut f32,
    stride: usize,
    /// Whether to ask for what comes behind each block, all at once: several rows, before which no others took the panel. One and
    /// two rows ask between the units, always.
    fetching: bool,
}

/// `target = rows · panelsᵀ` for as many panels as the target has columns, on this thread; `row(i)` is the i-th row of `count`.
///
/// # Safety
/// Panels lie behind each other from `panels` on, as many as the target needs; each row is as long as the panels' blocks;
/// the target is valid for writes of `columns` floats in each of `count` rows, and nothing else uses these meanwhile.
pub(crate) unsafe fn product(
    level: Level,
    quant: Quant,
    blocks: usize,
    count: usize,
    row: impl Fn(usize) -> Row,
    panels: *const u8,
    target: Target,
) {
    if count == 0 {
        return;
    }
    let exact = matches!(row(0), Row::Exact(_));
    let most = match level {
        _ if exact => MOST,
        Level::Avx2 | Level::Avx512 => 4, // sums of 16 columns in 16 registers
        _ => 6,
    };
    let groups = count.div_ceil(most);
    let (each, larger) = (count / groups, count % groups);
    let bytes = blocks * quant.block_bytes();
    for p in 0..target.columns.div_ceil(PANEL) {
        let columns = (target.columns - p * PANEL).min(PANEL);
        let mut first = 0;
        for group in 0..groups {
            let n = each + usize::from(group < larger);
            let mut rows = [row(first); MOST];
            for (i, to) in rows.iter_mut().enumerate().take(n) {
                *to = row(first + i);
            }
            let mut edge = MaybeUninit::<[f32; MOST * PANEL]>::uninit(); // clearing it for each panel takes time
            // SAFETY: the panel and the columns of the target exist, says the caller; a panel that sticks out of the target is
            // written to `edge`, which has room for all rows, and read from there as far as it was written.
            unsafe {
                let start = target.start.add(first * target.stride + p * PANEL);
                let whole = columns == PANEL;
                let (to, stride) =
                    if whole { (start, target.stride) } else { (edge.as_mut_ptr().cast::<f32>(), PANEL) };
                let (panel, fetching) = (panels.add(p * bytes), group == 0 && n > 2);
                tile(level, &Tile { quant, blocks, rows: &rows[..n], panel, to, stride, fetching });
                if !whole {
                    for r in 0..n {
                        for j in 0..columns {
                            *start.add(r * target.stride + j) = *to.add(r * PANEL + j);
                        }
                    }
                }
            }
            first += n;
        }
    }
}

/// # Safety
/// See [`product`].
unsafe fn tile(level: Level, tile: &Tile) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the level says what the processor has; the rest is the caller's.
    unsafe {
        let exact = matches!(tile.rows[0], Row::Exact(_));
        match (level, exact) {
            (Level::Amx | Level::Avx512Bf16 | Level::Avx512Vnni, false) => return x86::vnni(tile),
            (Level::Amx | Level::Avx512Bf16 | Level::Avx512Vnni | Level::Avx512, true) => return x86::exact512(tile),
            (Level::Avx512 | Level::Avx2, false) => return x86::avx2(tile),
            (Level::Avx2, true) => return x86::exact256(tile),
            (Level::Portable, _) => {}
        }
    }
    let _ = level;
    for (r, row) in tile.rows.iter().enumerate() {
        let mut total = [0.0; PANEL];
        for b in 0..tile.blocks {
            // SAFETY: the panel has that many blocks, and the row that many values, says the caller.
            unsafe {
                let block = tile.panel.add(b * tile.quant.block_bytes());
                match *row {
                    Row::Quantized(x, meta) => {
                        portable(tile.quant, block, x.add(b * tile.quant.block), *meta.add(b), &mut total);
                    }
                    Row::Exact(x) => portable_exact(tile.quant, block, x.add(b * tile.quant.block), &mut total),
                }
            }
        }
        // SAFETY: 32 columns of this row are the target's, says the caller.
        unsafe { tile.to.add(r * tile.stride).cast::<[f32; PANEL]>().write_unaligned(total) };
    }
}

/// The unsigned stored value of a column at `k` of a block.
///
/// # Safety
/// `block` points at a block of `quant`, `k` lies inside.
#[inline(always)]
unsafe fn stored(quant: Quant, block: *const u8, column: usize, k: usize) -> u8 {
    // SAFETY: inside the block, by the caller's word.
    unsafe {
        if quant.bits == 8 {
            *block.add(SCALES + k / 4 * 4 * PANEL + 4 * column + k % 4)
        } else {
            *block.add(SCALES + k / 8 * 4 * PANEL + 4 * column + k % 4) >> (k % 8 / 4 * 4) & 15
        }
    }
}

/// # Safety
/// `block` points at a block of `quant`.
#[inline(always)]
unsafe fn scale(block: *const u8, column: usize) -> f32 {
    // SAFETY: a block begins with 32 scales.
    half::f16::from_bits(unsafe { block.cast::<u16>().add(column).read() }).to_f32()
}

/// # Safety
/// `block` points at a block of `quant`, `x` at as many activations.
unsafe fn portable(quant: Quant, block: *const u8, x: *const i8, meta: Meta, total: &mut [f32; PANEL]) {
    let mut sum = [meta.bias; PANEL];
    // SAFETY: by the caller's word.
    unsafe {
        for k in 0..quant.block {
            let x = i32::from(*x.add(k));
            for (c, sum) in sum.iter_mut().enumerate() {
                *sum += i32::from(stored(quant, block, c, k)) * x;
            }
        }
        for (c, (total, sum)) in total.iter_mut().zip(sum).enumerate() {
            *total += sum as f32 * (scale(block, c) * meta.scale);
        }
    }
}

/// # Safety
/// `block` points at a block of `quant`, `x` at as many activations.
unsafe fn portable_exact(quant: Quant, block: *const u8, x: *const f32, total: &mut [f32; PANEL]) {
    // SAFETY: by the caller's word.
    unsafe {
        let scales: [f32; PANEL] = std::array::from_fn(|c| scale(block, c));
        for k in 0..quant.block {
            let x = *x.add(k);
            for (c, total) in total.iter_mut().enumerate() {
                let q = i32::from(stored(quant, block, c, k)) - quant.zero();
                *total += x * (q as f32 * scales[c]);
            }
        }
    }
}
