//! Products of int8 and int4 weights on AMX tiles, for rows enough to fill them.
//!
//! A block of a panel (see `quant`) becomes signed bytes once and meets all rows; its dot products are exact in 32-bit
//! integers, and over the blocks each element is the same chain of multiply-adds in f32 as without tiles: the same bits.

use std::arch::asm;
use std::arch::x86_64::*;

use super::amx::Tiles;
use super::quant::{Meta, Quant};
use super::quant_tile::SCALES;
use super::tile::{PANEL, Target};

/// From this many rows on, tiles are faster than `vpdpbusd`.
pub(crate) const ROWS: usize = 6;
/// Rows of a tile.
pub(crate) const HEIGHT: usize = 16;
/// Blocks that are multiplied before their sums are scaled.
const TOGETHER: usize = 4;
/// Rows whose results are under way at once.
const PASS: usize = 128;

/// One panel's blocks in signed bytes, and their scales.
#[repr(C, align(64))]
struct Weights {
    values: [[i8; 64 * PANEL]; TOGETHER],
    scales: [[f32; PANEL]; TOGETHER],
}

/// Sums of one tile of rows for each block.
#[repr(C, align(64))]
struct Sums([[[i32; PANEL]; HEIGHT]; TOGETHER]);

/// `target = rows · panelsᵀ` for as many panels as the target has columns, on this thread: `count` rows of `blocks` blocks of
/// activations, one behind the other, and with each block its [`Meta`].
///
/// # Safety
/// The processor's tiles are granted, and it has AVX-512. `values` can be read for `count` rows rounded up to whole tiles, `meta` for
/// `count` rows; panels lie behind each other, as many as the target needs; the target is valid for writes of `columns` floats in
/// each of `count` rows, and nothing else uses these meanwhile.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(crate) unsafe fn product(
    quant: Quant,
    blocks: usize,
    count: usize,
    values: *const i8,
    meta: *const Meta,
    panels: *const u8,
    target: Target,
) {
    let each = blocks * quant.block;
    let mut weights = Weights { values: [[0; 64 * PANEL]; TOGETHER], scales: [[0.0; PANEL]; TOGETHER] };
    let mut sums = Sums([[[0; PANEL]; HEIGHT]; TOGETHER]);
    let mut totals = [[0.0_f32; PANEL]; PASS];
    // SAFETY: granted, says the caller, who also answers for rows, panels and target.
    unsafe {
        let _tiles = Tiles::of_bytes(quant.block);
        for p in 0..target.columns.div_ceil(PANEL) {
            let panel = panels.add(p * blocks * quant.block_bytes());
            let columns = (target.columns - p * PANEL).min(PANEL);
            for first in (0..count).step_by(PASS) {
                let rows = PASS.min(count - first);
                totals[..rows].fill([0.0; PANEL]);
                for block in (0..blocks).step_by(TOGETHER) {
                    let n = TOGETHER.min(blocks - block);
                    for b in 0..n {
                        let from = panel.add((block + b) * quant.block_bytes());
                        open(quant, from, &mut weights.values[b], &mut weights.scales[b]);
                    }
                    for tile in (0..rows).step_by(HEIGHT) {
                        let row = first + tile;
                        let a = values.add(row * each + block * quant.block);
                        for b in 0..n {
                            let (a, w) = (a.add(b * quant.block), weights.values[b].as_ptr());
                            dots(b % 2 == 1, a, each, w, sums.0[b].as_mut_ptr().cast());
                        }
                        let own = meta.add(row * blocks + block);
                        let totals = &mut totals[tile..rows.min(tile + HEIGHT)];
                        if n == TOGETHER {
                            scale::<TOGETHER>(&sums, &weights.scales, own, blocks, totals);
                        } else {
                            for b in 0..n {
                                let sums = &*(&raw const sums.0[b]).cast();
                                scale::<1>(sums, &weights.scales[b..], own.add(b), blocks, totals);
                            }
                        }
                    }
                }
                for (r, total) in totals.iter().enumerate().take(rows) {
                    let to = target.start.add((first + r) * target.stride + p * PANEL);
                    std::ptr::copy_nonoverlapping(total.as_ptr(), to, columns);
                }
            }
        }
    }
}

/// A block in signed bytes, four values along K of 32 columns after the other, and its scales.
///
/// # Safety
/// `block` points at a block of `quant`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn open(quant: Quant, block: *const u8, values: &mut [i8; 64 * PANEL], scales: &mut [f32; PANEL]) {
    // SAFETY: a block has 32 scales, and as many lines of 64 bytes as are read.
    unsafe {
        for i in 0..2 {
            let own = _mm512_cvtph_ps(_mm256_loadu_si256(block.add(32 * i).cast()));
            _mm512_storeu_ps(scales.as_mut_ptr().add(16 * i), own);
        }
        let from = block.add(SCALES);
        let to = values.as_mut_ptr();
        for line in 0..quant.block * quant.bits / 16 {
            let v = _mm512_loadu_si512(from.add(64 * line).cast());
            if quant.bits == 8 {
                _mm512_storeu_si512(to.add(64 * line).cast(), _mm512_xor_si512(v, _mm512_set1_epi8(i8::MIN)));
            } else {
                let signed = |v| _mm512_sub_epi8(_mm512_and_si512(v, _mm512_set1_epi8(15)), _mm512_set1_epi8(8));
                // Two lines of four low values each, then two of the high ones.
                let to = to.add(line / 2 * 256 + line % 2 * 64);
                _mm512_storeu_si512(to.cast(), signed(v));
                _mm512_storeu_si512(to.add(128).cast(), signed(_mm512_srli_epi16::<4>(v)));
            }
        }
    }
}

/// The dot products of a tile of rows, `row` bytes apart, with one block, by one set of tiles or the `other`.
///
/// # Safety
/// Tiles are shaped for bytes; rows and block are there, `sums` has room.
#[inline]
unsafe fn dots(other: bool, a: *const i8, row: usize, weights: *const i8, sums: *mut i32) {
    macro_rules! dots {
        ($left:literal, $right:literal, $rows:literal) => {
            // SAFETY: the caller's.
            unsafe {
                asm!(
                    concat!("tileloadd ", $rows, ", [{a} + {s}]"),
                    concat!("tilezero ", $left),
                    "tileloadd tmm6, [{w} + {ws}]",
                    concat!("tdpbssd ", $left, ", ", $rows, ", tmm6"),
                    concat!("tilezero ", $right),
                    "tileloadd tmm7, [{w} + {ws} + 64]",
                    concat!("tdpbssd ", $right, ", ", $rows, ", tmm7"),
                    concat!("tilestored [{c} + {ws}], ", $left),
                    concat!("tilestored [{c} + {ws} + 64], ", $right),
                    a = in(reg) a, s = in(reg) row, w = in(reg) weights, ws = in(reg) 4 * PANEL, c = in(reg) sums,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, preserves_flags)
                );
            }
        };
    }
    if other { dots!("tmm2", "tmm3", "tmm5") } else { dots!("tmm0", "tmm1", "tmm4") }
}

/// `totals += sums · (scales · own scale)`, block after block; the rows' scales are `blocks` apart.
///
/// # Safety
/// `meta` has `N` entries for each row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn scale<const N: usize>(
    sums: &Sums,
    scales: &[[f32; PANEL]],
    meta: *const Meta,
    blocks: usize,
    totals: &mut [[f32; PANEL]],
) {
    // SAFETY: the caller's; sums, scales and totals are as long as they are read.
    unsafe {
        let scales: [[__m512; 2]; N] =
            std::array::from_fn(|b| [0, 16].map(|i| _mm512_loadu_ps(scales[b].as_ptr().add(i))));
        for (r, total) in totals.iter_mut().enumerate() {
            let own = meta.add(r * blocks);
            let mut chain = [0, 16].map(|i| _mm512_loadu_ps(total.as_ptr().add(i)));
            for (b, scales) in scales.iter().enumerate() {
                let own = _mm512_set1_ps((*own.add(b)).scale);
                for i in 0..2 {
                    let sum = _mm512_loadu_si512(sums.0[b][r].as_ptr().add(16 * i).cast());
                    chain[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scales[i], own), chain[i]);
                }
            }
            for (i, chain) in chain.into_iter().enumerate() {
                _mm512_storeu_ps(total.as_mut_ptr().add(16 * i), chain);
            }
        }
    }
}
