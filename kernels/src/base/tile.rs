//! The matrix micro-kernel: rows of activations times panels of 32 output columns, accumulators in registers.
//!
//! A panel holds 32 columns K-major: 32 *units* of four bytes for one step along K, then the next step. A unit is one f32, or
//! two bf16 that follow each other in K. Lanes are output columns, so that each output element is one sequential chain of
//! multiply-adds along K, whatever the tile's shape: the bits of a row do not depend on the rows beside it.

use std::mem::MaybeUninit;

use super::ahead::{Ahead, Coming, FIRST_LEVEL, SECOND_LEVEL, fetch};
use super::simd::{Level, Plain, Vector};
#[cfg(target_arch = "x86_64")]
use super::simd::{Ymm, Zmm, ZmmBf16};
use super::widened;

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;
/// Units along K that are multiplied before the next rows take their turn. Long runs: at each end a tile is spilled to the
/// target, whose rows compete for the same places of the cache.
const BLOCK: usize = 2048;
/// Words of a block of rows, which stays in the second-level cache while the panels pass by.
const ROWS_WORDS: usize = 240 * 256;

/// What a unit of the panel is, and what the words of an activation row are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// f32 times f32.
    F32,
    /// Two bf16 times two bf16.
    Bf16,
    /// Two bf16, widened in registers, times two f32.
    WideBf16,
}

/// Rows of activations: row `i` is `data[index[i] * stride..]` (`data[i * stride..]` without an index).
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) count: usize,
    pub(crate) index: Option<&'a [u32]>,
}

/// Panels of weights: panel `p` is `data[p * stride..]`, `units * 32` words long.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
    /// What is read after this product, to be asked for meanwhile.
    pub(crate) following: Option<Following<'a>>,
}

/// Panels that are brought into order before they are multiplied: panel `p` is `words` from `data[p * stride]` on.
#[derive(Clone, Copy)]
pub(crate) struct Following<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) words: usize,
}

/// Where the product goes: element (i, j) is `start[i * stride + j]`, for `columns` columns.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub(crate) start: *mut f32,
    pub(crate) stride: usize,
    pub(crate) columns: usize,
    /// Whether the chains begin with what is there instead of zero.
    pub(crate) add: bool,
}

/// `target = (add ? target : 0) + rows · panels`, over `units` units along K, on this thread.
///
/// # Safety
/// `target` must be valid for reads and writes of `columns` floats in each of `rows.count` rows, and nothing else may
/// use these while this runs.
pub(crate) unsafe fn product(level: Level, kind: Kind, units: usize, rows: Rows, panels: Panels, target: Target) {
    let words = if kind == Kind::WideBf16 { 2 * units } else { units };
    let last = match rows.index {
        Some(index) => {
            assert!(index.len() >= rows.count);
            index[..rows.count].iter().max().map_or(0, |&i| i as usize)
        }
        None => rows.count.saturating_sub(1),
    };
    let strips = target.columns.div_ceil(PANEL);
    if rows.count == 0 || strips == 0 {
        return;
    }
    assert!(rows.data.len() >= last * rows.stride + words);
    assert!(panels.data.len() >= (strips - 1) * panels.stride + units * PANEL);
    if kind == Kind::WideBf16 && widened::pays(level, rows.count) {
        // SAFETY: checked here; the target is the caller's.
        return unsafe { widened::product(level, units, rows, panels, target) };
    }
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
        unsafe fn avx512_bf16(kind: Kind, units: usize, rows: Rows, panels: Panels, target: Target) {
            // SAFETY: checked by `product`, whose caller answers for the target.
            unsafe { kinds::<ZmmBf16>(kind, units, rows, panels, target) }
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn avx512(kind: Kind, units: usize, rows: Rows, panels: Panels, target: Target) {
            // SAFETY: as above.
            unsafe { kinds::<Zmm>(kind, units, rows, panels, target) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(kind: Kind, units: usize, rows: Rows, panels: Panels, target: Target) {
            // SAFETY: as above.
            unsafe { kinds::<Ymm>(kind, units, rows, panels, target) }
        }
        if level >= Level::Amx && kind == Kind::Bf16 {
            assert!(
                rows.data.len() >= last * rows.stride + units.next_multiple_of(16),
                "rows are filled up with zeros"
            );
            // SAFETY: the level says what the processor has; sizes are checked above; the target is the caller's.
            return unsafe { super::amx::product(units, rows, panels, target) };
        }
        // SAFETY: as above.
        unsafe {
            match level {
                Level::Amx | Level::Avx512Bf16 if kind == Kind::Bf16 => {
                    return avx512_bf16(kind, units, rows, panels, target);
                }
                Level::Amx | Level::Avx512Bf16 | Level::Avx512Vnni | Level::Avx512 => {
                    return avx512(kind, units, rows, panels, target);
                }
                Level::Avx2 => return avx2(kind, units, rows, panels, target),
                Level::Portable => {}
            }
        }
    }
    let _ = level;
    // SAFETY: sizes are checked above; the target is the caller's.
    unsafe { kinds::<Plain>(kind, units, rows, panels, target) }
}

#[inline(always)]
unsafe fn kinds<V: Vector>(kind: Kind, units: usize, rows: Rows, panels: Panels, target: Target) {
    // SAFETY: see `product`.
    unsafe {
        match kind {
            Kind::F32 => sweep::<V, F32>(units, rows, panels, target),
            Kind::Bf16 => sweep::<V, Bf16>(units, rows, panels, target),
            Kind::WideBf16 => sweep::<V, WideBf16>(units, rows, panels, target),
        }
    }
}

/// One step along K: what the kinds differ in.
trait Step {
    /// Words of an activation row per unit.
    const WORDS: usize;
    /// With so many rows, weights that are read once are fetched ahead on AVX-512. A row alone in f32 lost 5 % by it in the model:
    /// the processor does as well by itself while there is so little to compute.
    const FETCHED: usize = 1;
    /// Registers for weights that are not multiplied as they are stored.
    const WIDENED: usize = 0;
    /// `acc[n][r][i] += a[r] · b[n][i]`; the row's words of this unit begin at `a[r] + at`, `b[n]` points at two registers.
    unsafe fn step<V: Vector, const R: usize, const N: usize>(
        acc: &mut [[[V; 2]; R]; N],
        a: &[*const f32; R],
        at: usize,
        b: &[*const f32; N],
    );
}

struct F32;
struct Bf16;
struct WideBf16;

/// Two registers of every strip.
///
/// # Safety
/// So many values are there.
#[inline(always)]
unsafe fn pairs<V: Vector, const N: usize>(b: &[*const f32; N]) -> [[V; 2]; N] {
    // SAFETY: the caller's. A loop, as a closure would have no target features.
    unsafe {
        let mut pairs = [[V::zero(); 2]; N];
        for n in 0..N {
            pairs[n] = [V::load(b[n]), V::load(b[n].add(V::LANES))];
        }
        pairs
    }
}

/// `acc[n][r][i] += x[r] · b[n][i]`, `x[r]` at `a[r] + at`.
///
/// # Safety
/// See [`product`].
#[inline(always)]
unsafe fn multiply_add<V: Vector, const R: usize, const N: usize>(
    acc: &mut [[[V; 2]; R]; N],
    a: &[*const f32; R],
    at: usize,
    b: [[V; 2]; N],
) {
    for r in 0..R {
        // SAFETY: see `product`.
        unsafe {
            let x = V::splat(a[r].add(at));
            for n in 0..N {
                acc[n][r] = [acc[n][r][0].fma(x, b[n][0]), acc[n][r][1].fma(x, b[n][1])];
            }
        }
    }
}

impl Step for F32 {
    const WORDS: usize = 1;
    const FETCHED: usize = 2;
    #[inline(always)]
    unsafe fn step<V: Vector, const R: usize, const N: usize>(
        acc: &mut [[[V; 2]; R]; N],
        a: &[*const f32; R],
        at: usize,
        b: &[*const f32; N],
    ) {
        // SAFETY: see `product`.
        unsafe { multiply_add(acc, a, at, pairs(b)) }
    }
}

impl Step for Bf16 {
    const WORDS: usize = 1;
    #[inline(always)]
    unsafe fn step<V: Vector, const R: usize, const N: usize>(
        acc: &mut [[[V; 2]; R]; N],
        a: &[*const f32; R],
        at: usize,
        b: &[*const f32; N],
    ) {
        // SAFETY: see `product`.
        let b = unsafe { pairs::<V, N>(b) };
        for r in 0..R {
            // SAFETY: see `product`.
            unsafe {
                let x = V::splat(a[r].add(at));
                for n in 0..N {
                    acc[n][r] = [acc[n][r][0].dot_bf16(x, b[n][0]), acc[n][r][1].dot_bf16(x, b[n][1])];
                }
            }
        }
    }
}

impl Step for WideBf16 {
    const WORDS: usize = 2;
    const WIDENED: usize = 4;
    #[inline(always)]
    unsafe fn step<V: Vector, const R: usize, const N: usize>(
        acc: &mut [[[V; 2]; R]; N],
        a: &[*const f32; R],
        at: usize,
        b: &[*const f32; N],
    ) {
        // One half after the other. AVX2 reads both: its 16 registers hold no more beside 12 accumulators, and what the compiler
        // keeps from the first time would go through the stack.
        // SAFETY: see `product`.
        unsafe {
            let both = pairs::<V, N>(b);
            let mut half = both;
            for n in 0..N {
                half[n] = [both[n][0].low_bf16(), both[n][1].low_bf16()];
            }
            multiply_add(acc, a, at, half);
            let both = if V::LANES == 8 { pairs::<V, N>(&b.map(unknown)) } else { both };
            for n in 0..N {
                half[n] = [both[n][0].high_bf16(), both[n][1].high_bf16()];
            }
            multiply_add(acc, a, at + 1, half);
        }
    }
}

/// Registers for the sums of so many strips side by side: weights that are widened take some away from a few rows of several.
const fn free<V: Vector, S: Step>(strips: usize) -> usize {
    if V::LANES > 8 && strips > 1 { V::ACCUMULATORS - S::WIDENED } else { V::ACCUMULATORS }
}

/// All tiles of a product. A *strip* is the columns of two registers; a panel is one strip (AVX-512) or a few.
#[inline(always)]
unsafe fn sweep<V: Vector, S: Step>(units: usize, rows: Rows, panels: Panels, target: Target) {
    // Many rows go by six times two strips where there are registers for that: with 10 loads for 24 multiply-adds instead of 14,
    // and room for the addresses of more than one step, a core whose other thread is busy is a fifth faster.
    let wide = rows.count > V::ACCUMULATORS && V::LANES > 8 && S::WIDENED == 0;
    let most = V::ACCUMULATORS / if wide { 4 } else { 2 };
    let groups = rows.count.div_ceil(most);
    // Groups of rows are as even as they can be: a last group of one row would be all latency.
    let (each, larger) = (rows.count / groups, rows.count % groups);
    let tallest = each + usize::from(larger > 0);
    let width = 2 * V::LANES;
    let strips = target.columns.div_ceil(width);
    // With one group of rows every weight is used once: no blocking, panels are streamed from end to end.
    let block = if groups == 1 { units.max(1) } else { BLOCK };
    let together = (free::<V, S>(2) / 2 / tallest).min(4);
    let mut from = 0;
    loop {
        let count = block.min(units - from);
        let add = target.add || from > 0;
        let taken = (ROWS_WORDS / count.max(1)).max(48) / most;
        let (mut strip, mut first) = (0, 0);
        while first < groups {
            if strip >= strips {
                (strip, first) = (0, first + taken);
                continue;
            }
            let left = strips - strip;
            let n = if together >= 4 && left >= 4 {
                4
            } else if together >= 2 && left >= 2 {
                2
            } else {
                1
            };
            // SAFETY: strips lie inside the panels, rows inside the data, as `product` has checked; pointers past the last strip
            // are not made.
            unsafe {
                let mut b = [panels.data.as_ptr(); 4];
                for (i, b) in b.iter_mut().enumerate().take(n) {
                    let column = (strip + i) * width;
                    *b = b.add(column / PANEL * panels.stride + from * PANEL + column % PANEL);
                }
                let top = first * each + first.min(larger);
                let mut row = top;
                let passing = groups.min(first + taken) - first;
                let streams = V::LANES == 8 || tallest >= S::FETCHED && count >= Ahead::LEAST;
                let mut coming = Coming::new::<V>(strip, n, passing, count, b[0], panels.stride, streams);
                if let Some(following) = panels.following {
                    let now = first + taken >= groups && from + count >= units;
                    coming = coming.instead::<V>(following, now, strip, n, passing, count);
                }
                for group in first..groups.min(first + taken) {
                    let r = each + usize::from(group < larger);
                    let last = group + 1 == first + passing;
                    let following = if last { (top, (strip + n) * width) } else { (row + r, strip * width) };
                    let place = Place {
                        words: rows,
                        row,
                        from: from * S::WORDS,
                        start: target.start.add(row * target.stride + strip * width),
                        stride: target.stride,
                        columns: (target.columns - strip * width).min(n * width),
                        add,
                        following: target.start.wrapping_add(following.0 * target.stride + following.1),
                        ahead: coming.ahead(group - first),
                    };
                    tiles::<V, S>(r, n, count, &place, &b);
                    row += r;
                }
            }
            strip += n;
        }
        from += count;
        if from >= units {
            break;
        }
    }
}

/// One tile's place: its first row, its first word along K, its columns of the target.
struct Place<'a> {
    words: Rows<'a>,
    row: usize,
    from: usize,
    start: *mut f32,
    stride: usize,
    columns: usize,
    add: bool,
    /// Where the next tile's results go.
    following: *const f32,
    ahead: Ahead,
}

/// The same place, of which the compiler does not know that it has read there.
#[inline(always)]
#[allow(clippy::pointers_in_nomem_asm_block)] // there is no instruction that could read
fn unknown(mut at: *const f32) -> *const f32 {
    // SAFETY: no instruction at all.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) at, options(pure, nomem, nostack, preserves_flags)) };
    at
}

#[inline(always)]
unsafe fn tiles<V: Vector, S: Step>(r: usize, n: usize, units: usize, place: &Place, b: &[*const f32; 4]) {
    macro_rules! shapes {
        ($(($rows:literal, $strips:literal))*) => {
            // SAFETY: see `product`.
            unsafe {
                match (r, n) {
                    $(($rows, $strips) if 2 * $rows * $strips <= free::<V, S>($strips) => {
                        tile::<V, S, $rows, $strips>(units, place, b)
                    })*
                    _ => unreachable!("no tile of {r} rows and {n} strips"),
                }
            }
        };
    }
    shapes!((1, 1)(2, 1)(3, 1)(4, 1)(5, 1)(6, 1)(7, 1)(8, 1)(9, 1)(10, 1)(11, 1)(12, 1)(1, 2)(2, 2)(3, 2)(4, 2)(5, 2)(
        6, 2
    )(1, 4)(2, 4)(3, 4));
}

/// `R` rows times `N` strips.
#[inline(always)]
unsafe fn tile<V: Vector, S: Step, const R: usize, const N: usize>(units: usize, place: &Place, b: &[*const f32; 4]) {
    let width = 2 * V::LANES;
    // SAFETY: see `product`. Columns that the target lacks go through `edge`.
    unsafe {
        let rows = &place.words;
        let a: [*const f32; R] = std::array::from_fn(|r| {
            let row = match rows.index {
                Some(index) => *index.get_unchecked(place.row + r) as usize,
                None => place.row + r,
            };
            rows.data.as_ptr().add(row * rows.stride + place.from)
        });
        let b: [*const f32; N] = std::array::from_fn(|n| b[n]);
        // R × N strips, of which the widest has 32 columns; cleared only where it is used, as it is as large as the tile.
        let mut edge = MaybeUninit::<[[[f32; 32]; 4]; 12]>::uninit();
        let whole = place.columns == N * width;
        let (start, row_stride, strip_stride) = if whole {
            (place.start, place.stride, width)
        } else {
            edge.as_mut_ptr().write_bytes(0, 1);
            (edge.as_mut_ptr().cast::<f32>(), 4 * 32, 32)
        };
        if !whole && place.add {
            for r in 0..R {
                for j in 0..place.columns {
                    *start.add(r * row_stride + j / width * strip_stride + j % width) =
                        *place.start.add(r * place.stride + j);
                }
            }
        }
        let mut acc = [[[V::zero(); 2]; R]; N];
        if place.add {
            for n in 0..N {
                for r in 0..R {
                    let from = start.add(r * row_stride + n * strip_stride);
                    acc[n][r] = [V::load(from), V::load(from.add(V::LANES))];
                }
            }
        }
        // Macros, not closures: these would have no target features.
        macro_rules! step {
            ($u:expr) => {{
                let (u, mut at) = ($u, b);
                for b in &mut at {
                    *b = b.add(u * PANEL);
                }
                // Every row is read once for all strips, if there are registers for their weights: else once for each.
                if R == 1 || 2 * R * N + 2 * N < V::REGISTERS {
                    S::step::<V, R, N>(&mut acc, &a, u * S::WORDS, &at);
                } else {
                    for n in 0..N {
                        let a = if n == 0 { a } else { a.map(unknown) };
                        S::step::<V, R, 1>(std::array::from_mut(&mut acc[n]), &a, u * S::WORDS, &[at[n]]);
                    }
                }
            }};
        }
        macro_rules! steps {
            ($from:expr, $to:expr) => {
                let (mut u, to) = ($from, $to);
                // The addresses of more rows than six take all registers there are for them.
                while R <= 6 && u + 4 <= to {
                    for i in 0..4 {
                        step!(u + i);
                    }
                    u += 4;
                }
                while u < to {
                    step!(u);
                    u += 1;
                }
            };
        }
        // What is multiplied next comes into the second-level cache meanwhile. Two loops, as the rows' places take nearly all
        // registers that hold addresses.
        match place.ahead {
            Ahead::Next { mut start, lines, every } => {
                let mut following = place.following;
                for (i, from) in (0..units).step_by(every).enumerate() {
                    steps!(from, units.min(from + every));
                    if i < R {
                        for line in 0..(N * width).div_ceil(Ahead::LINE) {
                            fetch::<FIRST_LEVEL>(following.wrapping_add(line * Ahead::LINE));
                        }
                        following = following.wrapping_add(place.stride);
                    }
                    for line in 0..lines {
                        fetch::<SECOND_LEVEL>(start.wrapping_add(line * Ahead::LINE));
                    }
                    start = start.wrapping_add(lines * Ahead::LINE);
                }
            }
            Ahead::Stream { mut distance, end, further } => {
                for from in (0..units).step_by(Ahead::EVERY_FEW) {
                    steps!(from, units.min(from + Ahead::EVERY_FEW));
                    if from >= end && from < end + Ahead::EVERY_FEW {
                        distance = distance.wrapping_add(further);
                    }
                    // With AVX2 a strip is a part of a panel, whose first one fetches for all.
                    for panel in 0..(N * width).div_ceil(PANEL) {
                        let start = b[panel * PANEL / width].wrapping_add(from * PANEL + distance);
                        for line in 0..PANEL / Ahead::LINE * Ahead::EVERY_FEW {
                            fetch::<SECOND_LEVEL>(start.wrapping_add(line * Ahead::LINE));
                        }
                    }
                }
            }
        }
        for n in 0..N {
            for r in 0..R {
                let to = start.add(r * row_stride + n * strip_stride);
                acc[n][r][0].store(to);
                acc[n][r][1].store(to.add(V::LANES));
            }
        }
        if !whole {
            for r in 0..R {
                for j in 0..place.columns {
                    *place.start.add(r * place.stride + j) =
                        *start.add(r * row_stride + j / width * strip_stride + j % width);
                }
            }
        }
    }
}
