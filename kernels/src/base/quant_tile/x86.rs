//! The same with AVX2, AVX-512 and VNNI.

use std::arch::x86_64::*;

use super::{PANEL, Row, SCALES, Tile};
use crate::base::quant::Meta;

/// How far ahead of a panel's stream to fetch, in bytes: into the second level where the loads leave the first one's queue of
/// misses no room, into the first where there is more to compute (see [`exact512_rows`]).
const AHEAD: usize = 2048;
const AHEAD_EXACT: usize = 3072;
/// As AHEAD, where activations are int8 too and weights have so many bits. On a Zen 4 int4 decodes 9 % faster so than with 2048
/// (20 to 35 % with AVX2); farther for int8 came out slower in the model.
const fn ahead(bits: usize) -> usize {
    if bits == 8 { AHEAD } else { 3 * AHEAD }
}

/// Calls the kernel that is compiled for the tile's number of rows, bits and block.
macro_rules! shapes {
    ($tile:ident, $kernel:ident, $($rows:literal)*) => {
        match ($tile.rows.len(), $tile.quant.bits, $tile.quant.block) {
            $(($rows, 8, 32) => $kernel::<$rows, 8, 32>($tile),
            ($rows, 8, 64) => $kernel::<$rows, 8, 64>($tile),
            ($rows, 4, 32) => $kernel::<$rows, 4, 32>($tile),
            ($rows, 4, 64) => $kernel::<$rows, 4, 64>($tile),)*
            (rows, bits, block) => unreachable!("no tile of {rows} rows for int{bits} in blocks of {block}"),
        }
    };
}

#[inline(always)]
fn quantized<const R: usize>(tile: &Tile) -> ([*const i8; R], [*const Meta; R]) {
    let row = |r: usize| match tile.rows[r] {
        Row::Quantized(x, meta) => (x, meta),
        Row::Exact(_) => unreachable!("the rows of a tile are of one kind"),
    };
    (std::array::from_fn(|r| row(r).0), std::array::from_fn(|r| row(r).1))
}

#[inline(always)]
fn exact<const R: usize>(tile: &Tile) -> [*const f32; R] {
    std::array::from_fn(|r| match tile.rows[r] {
        Row::Exact(x) => x,
        Row::Quantized(..) => unreachable!("the rows of a tile are of one kind"),
    })
}

/// # Safety
/// See [`super::product`]; the processor has AVX-512 with VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn vnni(tile: &Tile) {
    // SAFETY: this function's own conditions.
    unsafe { shapes!(tile, vnni_rows, 1 2 3 4 5 6) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn vnni_rows<const R: usize, const BITS: usize, const BLOCK: usize>(tile: &Tile) {
    let (x, meta) = quantized::<R>(tile);
    let block_bytes = SCALES + PANEL * BLOCK * BITS / 8;
    let mut total = [[_mm512_setzero_ps(); 2]; R];
    let nibble = _mm512_set1_epi8(15);
    let far = const { ahead(BITS) };
    for b in 0..tile.blocks {
        // SAFETY: the panel and the rows have that many blocks, says the caller of `product`; fetching ahead touches nothing.
        unsafe {
            let block = tile.panel.add(b * block_bytes);
            let values = block.add(SCALES);
            let mut sum: [[__m512i; 2]; R] = std::array::from_fn(|r| [_mm512_set1_epi32((*meta[r].add(b)).bias); 2]);
            macro_rules! unit {
                ($w:expr, $at:expr) => {
                    let w = $w;
                    for r in 0..R {
                        let x = _mm512_set1_epi32(x[r].add(b * BLOCK + $at).cast::<i32>().read_unaligned());
                        sum[r] = [_mm512_dpbusd_epi32(sum[r][0], w[0], x), _mm512_dpbusd_epi32(sum[r][1], w[1], x)];
                    }
                };
            }
            if R <= 2 {
                _mm_prefetch::<_MM_HINT_T1>(block.wrapping_add(far).cast());
            } else if tile.fetching {
                fetch_block(block.wrapping_add(far), block_bytes);
            }
            for u in 0..BLOCK * BITS / 32 {
                let p = values.add(u * 4 * PANEL);
                if R <= 2 {
                    _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(far).cast());
                    _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(far + 64).cast());
                }
                let v = [_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(64).cast())];
                if BITS == 8 {
                    unit!(v, 4 * u);
                } else {
                    unit!(v.map(|v| _mm512_and_si512(v, nibble)), 8 * u);
                    unit!(v.map(|v| _mm512_and_si512(_mm512_srli_epi16::<4>(v), nibble)), 8 * u + 4);
                }
            }
            let scales: [__m512; 2] =
                std::array::from_fn(|i| _mm512_cvtph_ps(_mm256_loadu_si256(block.add(32 * i).cast())));
            for r in 0..R {
                let own = _mm512_set1_ps((*meta[r].add(b)).scale);
                for i in 0..2 {
                    let dot = _mm512_cvtepi32_ps(sum[r][i]);
                    total[r][i] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scales[i], own), total[r][i]);
                }
            }
        }
    }
    for (r, total) in total.iter().enumerate() {
        for (i, &total) in total.iter().enumerate() {
            // SAFETY: 32 columns of each row are the target's.
            unsafe { _mm512_storeu_ps(tile.to.add(r * tile.stride + 16 * i), total) };
        }
    }
}

/// # Safety
/// See [`super::product`]; the processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn avx2(tile: &Tile) {
    // SAFETY: this function's own conditions.
    unsafe { shapes!(tile, avx2_rows, 1 2 3 4) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2_rows<const R: usize, const BITS: usize, const BLOCK: usize>(tile: &Tile) {
    // SAFETY: this function's own conditions.
    unsafe {
        if R <= 2 {
            // What memory decides about: a panel is one stream.
            avx2_columns::<R, 4, BITS, BLOCK>(tile, 0);
        } else {
            avx2_columns::<R, 2, BITS, BLOCK>(tile, 0);
            avx2_columns::<R, 2, BITS, BLOCK>(tile, 16);
        }
    }
}

/// `8 · N` columns of the panel from `first` on.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2_columns<const R: usize, const N: usize, const BITS: usize, const BLOCK: usize>(
    tile: &Tile,
    first: usize,
) {
    let (x, meta) = quantized::<R>(tile);
    let block_bytes = SCALES + PANEL * BLOCK * BITS / 8;
    let mut total = [[_mm256_setzero_ps(); N]; R];
    for b in 0..tile.blocks {
        // SAFETY: the panel and the rows have that many blocks, says the caller of `product`; fetching ahead touches nothing.
        unsafe {
            let block = tile.panel.add(b * block_bytes);
            let values = block.add(SCALES + 4 * first);
            let x = x.map(|x| x.add(b * BLOCK));
            if R <= 2 {
                _mm_prefetch::<_MM_HINT_T1>(block.wrapping_add(const { ahead(BITS) }).cast());
            } else if tile.fetching && first == 0 {
                fetch_block(block.wrapping_add(const { ahead(BITS) }), block_bytes);
            }
            let dots = if BITS == 8 { dots8::<R, N, BLOCK>(values, &x) } else { dots4::<R, N, BLOCK>(values, &x) };
            for i in 0..N {
                let scales = _mm256_cvtph_ps(_mm_loadu_si128(block.add(2 * first + 16 * i).cast()));
                for r in 0..R {
                    let meta = *meta[r].add(b);
                    // The products of int8 are signed already.
                    let bias = if BITS == 8 { 0 } else { meta.bias };
                    let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(dots[r][i], _mm256_set1_epi32(bias)));
                    let scale = _mm256_mul_ps(scales, _mm256_set1_ps(meta.scale));
                    total[r][i] = _mm256_fmadd_ps(dot, scale, total[r][i]);
                }
            }
        }
    }
    for (r, total) in total.iter().enumerate() {
        for (i, &total) in total.iter().enumerate() {
            // SAFETY: 32 columns of each row are the target's.
            unsafe { _mm256_storeu_ps(tile.to.add(r * tile.stride + first + 8 * i), total) };
        }
    }
}

/// The exact sums of one block. 255 · 127 · 2 does not fit in the 16 bits of `vpmaddubsw`, but 128 · 127 · 2 does: the weight's
/// magnitude, times the activation with the weight's sign.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots8<const R: usize, const N: usize, const BLOCK: usize>(
    values: *const u8,
    x: &[*const i8; R],
) -> [[__m256i; N]; R] {
    let flip = _mm256_set1_epi8(i8::MIN);
    let ones = _mm256_set1_epi16(1);
    let mut sum = [[_mm256_setzero_si256(); N]; R];
    for u in 0..BLOCK / 4 {
        // SAFETY: inside the block; fetching ahead touches nothing.
        unsafe {
            let p = values.add(u * 4 * PANEL);
            fetch::<R>(p, const { ahead(8) });
            for i in 0..N {
                let w = _mm256_xor_si256(_mm256_loadu_si256(p.add(32 * i).cast()), flip);
                let magnitude = _mm256_abs_epi8(w);
                for r in 0..R {
                    let x = _mm256_set1_epi32(x[r].add(4 * u).cast::<i32>().read_unaligned());
                    let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w));
                    sum[r][i] = _mm256_add_epi32(sum[r][i], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
    }
    sum
}

/// As [`dots8`] for unsigned nibbles: 32 products of at most 15 · 127 in four lanes of two each stay below 2¹⁵.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots4<const R: usize, const N: usize, const BLOCK: usize>(
    values: *const u8,
    x: &[*const i8; R],
) -> [[__m256i; N]; R] {
    let nibble = _mm256_set1_epi8(15);
    let mut sum = [[_mm256_setzero_si256(); N]; R];
    for part in 0..BLOCK / 32 {
        let mut short = [[_mm256_setzero_si256(); N]; R];
        for u in 4 * part..4 * part + 4 {
            // SAFETY: inside the block; fetching ahead touches nothing.
            unsafe {
                let p = values.add(u * 4 * PANEL);
                fetch::<R>(p, const { ahead(4) });
                for pair in (0..N).step_by(2) {
                    let w = [0, 32].map(|at| _mm256_loadu_si256(p.add(32 * pair + at).cast()));
                    let low = w.map(|w| _mm256_and_si256(w, nibble));
                    let high = w.map(|w| _mm256_and_si256(_mm256_srli_epi16::<4>(w), nibble));
                    for r in 0..R {
                        let x = x[r].add(8 * u).cast::<i32>();
                        let x = [0, 1].map(|i| _mm256_set1_epi32(x.add(i).read_unaligned()));
                        for i in 0..2 {
                            let low = _mm256_maddubs_epi16(low[i], x[0]);
                            let high = _mm256_maddubs_epi16(high[i], x[1]);
                            let sum = &mut short[r][pair + i];
                            *sum = _mm256_add_epi16(*sum, _mm256_add_epi16(low, high));
                        }
                    }
                }
            }
        }
        for (sum, short) in sum.iter_mut().flatten().zip(short.iter().flatten()) {
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(*short, _mm256_set1_epi16(1)));
        }
    }
    sum
}

/// Asks for the two lines that a panel's stream comes to, where few rows leave the rate to memory.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fetch<const R: usize>(p: *const u8, far: usize) {
    if R <= 2 {
        _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(far).cast());
        _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(far + 64).cast());
    }
}

/// Asks for a whole block of a panel. (Four rows: int8 1.3 times, int4 twice as fast as without, AVX-512.)
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fetch_block(block: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(64) {
        _mm_prefetch::<_MM_HINT_T1>(block.wrapping_add(64 * line).cast());
    }
}

/// # Safety
/// See [`super::product`]; the processor has AVX-512 F, BW, DQ and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn exact512(tile: &Tile) {
    // SAFETY: this function's own conditions.
    unsafe { shapes!(tile, exact512_rows, 1 2 3 4 5 6 7 8) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn exact512_rows<const R: usize, const BITS: usize, const BLOCK: usize>(tile: &Tile) {
    let x = exact::<R>(tile);
    let block_bytes = SCALES + PANEL * BLOCK * BITS / 8;
    let table = _mm512_setr_ps(-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.);
    let flip = _mm512_set1_epi8(i8::MIN);
    let mut total = [[_mm512_setzero_ps(); 2]; R];
    for b in 0..tile.blocks {
        // SAFETY: the panel and the rows have that many blocks, says the caller of `product`; fetching ahead touches nothing.
        unsafe {
            let block = tile.panel.add(b * block_bytes);
            let scales: [__m512; 2] =
                std::array::from_fn(|i| _mm512_cvtph_ps(_mm256_loadu_si256(block.add(32 * i).cast())));
            if tile.fetching {
                fetch_block(block.wrapping_add(AHEAD_EXACT), block_bytes);
            }
            macro_rules! step {
                ($at:expr, $w:expr) => {
                    let w: [__m512; 2] = std::array::from_fn(|i| _mm512_mul_ps($w(i), scales[i]));
                    for r in 0..R {
                        let x = _mm512_set1_ps(*x[r].add(b * BLOCK + $at));
                        total[r] = [_mm512_fmadd_ps(x, w[0], total[r][0]), _mm512_fmadd_ps(x, w[1], total[r][1])];
                    }
                };
            }
            for u in 0..BLOCK * BITS / 32 {
                let p = block.add(SCALES + u * 4 * PANEL);
                if R <= 2 {
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD_EXACT).cast());
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD_EXACT + 64).cast());
                }
                let v = [_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(64).cast())];
                if BITS == 8 {
                    let v = v.map(|v| _mm512_xor_si512(v, flip));
                    macro_rules! byte {
                        ($j:literal) => {
                            step!(4 * u + $j, |i: usize| _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(
                                _mm512_slli_epi32::<{ 24 - 8 * $j }>(v[i])
                            )))
                        };
                    }
                    byte!(0);
                    byte!(1);
                    byte!(2);
                    byte!(3);
                } else {
                    macro_rules! nibble {
                        ($j:literal, $k:literal) => {
                            step!(8 * u + $k, |i: usize| _mm512_permutexvar_ps(
                                _mm512_srli_epi32::<{ 4 * $j }>(v[i]),
                                table
                            ))
                        };
                    }
                    nibble!(0, 0);
                    nibble!(2, 1);
                    nibble!(4, 2);
                    nibble!(6, 3);
                    nibble!(1, 4);
                    nibble!(3, 5);
                    nibble!(5, 6);
                    nibble!(7, 7);
                }
            }
        }
    }
    for (r, total) in total.iter().enumerate() {
        for (i, &total) in total.iter().enumerate() {
            // SAFETY: 32 columns of each row are the target's.
            unsafe { _mm512_storeu_ps(tile.to.add(r * tile.stride + 16 * i), total) };
        }
    }
}

/// # Safety
/// See [`super::product`]; the processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn exact256(tile: &Tile) {
    // SAFETY: this function's own conditions.
    unsafe { shapes!(tile, exact256_rows, 1 2 3 4 5 6 7 8) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn exact256_rows<const R: usize, const BITS: usize, const BLOCK: usize>(tile: &Tile) {
    // SAFETY: this function's own conditions.
    unsafe {
        if R <= 2 {
            exact256_columns::<R, 4, BITS, BLOCK>(tile, 0);
        } else {
            // R sums, one register of weights.
            (0..4).for_each(|quarter| exact256_columns::<R, 1, BITS, BLOCK>(tile, 8 * quarter));
        }
    }
}

/// `8 · N` columns of the panel from `first` on.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn exact256_columns<const R: usize, const N: usize, const BITS: usize, const BLOCK: usize>(
    tile: &Tile,
    first: usize,
) {
    let x = exact::<R>(tile);
    let block_bytes = SCALES + PANEL * BLOCK * BITS / 8;
    let mut total = [[_mm256_setzero_ps(); N]; R];
    for b in 0..tile.blocks {
        // SAFETY: the panel and the rows have that many blocks, says the caller of `product`; fetching ahead touches nothing.
        unsafe {
            let block = tile.panel.add(b * block_bytes);
            let scales: [__m256; N] =
                std::array::from_fn(|i| _mm256_cvtph_ps(_mm_loadu_si128(block.add(2 * first + 16 * i).cast())));
            if tile.fetching && first == 0 {
                fetch_block(block.wrapping_add(AHEAD), block_bytes);
            }
            for u in 0..BLOCK * BITS / 32 {
                let p = block.add(SCALES + u * 4 * PANEL + 4 * first);
                fetch::<R>(p, AHEAD);
                let v: [__m256i; N] = std::array::from_fn(|i| _mm256_loadu_si256(p.add(32 * i).cast()));
                for k in 0..32 / BITS {
                    let x: [__m256; R] =
                        std::array::from_fn(|r| _mm256_set1_ps(*x[r].add(b * BLOCK + 32 / BITS * u + k)));
                    for i in 0..N {
                        let q = if BITS == 8 {
                            let up = _mm256_xor_si256(v[i], _mm256_set1_epi8(i8::MIN));
                            _mm256_srai_epi32::<24>(_mm256_sll_epi32(up, _mm_cvtsi32_si128(24 - 8 * k as i32)))
                        } else {
                            let shift = _mm_cvtsi32_si128((k % 4 * 8 + k / 4 * 4) as i32);
                            let q = _mm256_and_si256(_mm256_srl_epi32(v[i], shift), _mm256_set1_epi32(15));
                            _mm256_sub_epi32(q, _mm256_set1_epi32(8))
                        };
                        let w = _mm256_mul_ps(_mm256_cvtepi32_ps(q), scales[i]);
                        for r in 0..R {
                            total[r][i] = _mm256_fmadd_ps(x[r], w, total[r][i]);
                        }
                    }
                }
            }
        }
    }
    for (r, total) in total.iter().enumerate() {
        for (i, &total) in total.iter().enumerate() {
            // SAFETY: 32 columns of each row are the target's.
            unsafe { _mm256_storeu_ps(tile.to.add(r * tile.stride + first + 8 * i), total) };
        }
    }
}
