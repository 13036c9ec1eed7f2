//! Products of bf16 on AMX tiles: an instruction multiplies 16 rows by 16 columns over 32 values along K.
//!
//! The panels are those of `tile`: 16 units of a panel (two bf16 each, 32 columns) are two tiles side by side as they lie
//! there. An element is one chain of tile steps along K from the first to the last, wherever blocks end and however many rows
//! a tile has: the bits of a row do not depend on the rows beside it. (They differ from those of the other levels: a step
//! adds up its even and its odd products apart.)

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::cell::RefCell;
use std::sync::OnceLock;

use super::buffer::Buffer;
use super::tile::{PANEL, Panels, Rows, Target};

/// Units of a tile along K.
const STEP: usize = 16;
/// Bytes of a step of a panel.
const STEP_BYTES: usize = STEP * PANEL * 4;
/// Steps of a panel that are multiplied before the next rows take their turn: 32 KiB, which stay in the first-level cache.
const BLOCK: usize = 16;
/// Words of a block of rows, which stays in the second-level cache while the panels pass by.
const ROWS_WORDS: usize = 1 << 18;

/// Whether this processor has tiles for bf16 and int8 and the system lets this process use them.
///
/// The permission is asked for once and holds for all threads; without it the first tile instruction would be a fault.
pub(crate) fn granted() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| {
        // Leaf 7: AMX-BF16, AMX-TILE, AMX-INT8. Leaf 1: the system uses XSAVE.
        const TILES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        if __cpuid(0).eax < 0x1d || __cpuid_count(7, 0).edx & TILES != TILES || __cpuid(1).ecx & 1 << 27 == 0 {
            return false;
        }
        #[target_feature(enable = "xsave")]
        fn saved() -> u64 {
            // SAFETY: register 0 is always there.
            unsafe { _xgetbv(0) }
        }
        // SAFETY: OSXSAVE, above, says that the instruction is there.
        if unsafe { saved() } & 0x6_0000 != 0x6_0000 {
            return false;
        }
        ask()
    })
}

/// Asks Linux (5.16 or later) for the tiles' data.
#[cfg(target_os = "linux")]
fn ask() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes numbers only and changes nothing but what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask() -> bool {
    false
}

/// The shapes of the eight tiles, as the processor reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The tiles of this thread: 0 and 1 are results of `upper` rows, 2 and 3 of `lower` rows, 4 and 5 rows of either,
/// 6 and 7 weights. Given back when dropped.
pub(crate) struct Tiles {
    rows: [usize; 2],
}

impl Tiles {
    /// # Safety
    /// [`granted`].
    pub(crate) unsafe fn new(rows: [usize; 2]) -> Self {
        // SAFETY: the caller's.
        unsafe { shape(rows, STEP) };
        Tiles { rows }
    }

    /// Tiles for bytes: all of 16 rows, and `block` values along K.
    ///
    /// # Safety
    /// [`granted`].
    pub(crate) unsafe fn of_bytes(block: usize) -> Self {
        // SAFETY: the caller's.
        unsafe { shape([16, 16], block / 4) };
        Tiles { rows: [16, 16] }
    }

    /// Results and rows of other heights; the tiles' contents are lost.
    fn reshape(&mut self, rows: [usize; 2]) {
        if self.rows != rows {
            // SAFETY: the tiles of `new` are still this thread's.
            unsafe { shape(rows, STEP) };
            self.rows = rows;
        }
    }
}

/// `rows` of the upper and lower tiles, and units of the weights' tiles along K.
///
/// # Safety
/// [`granted`].
unsafe fn shape(rows: [usize; 2], weights: usize) {
    let [upper, lower] = rows.map(|n| n as u8);
    let (mut heights, mut row_bytes) = ([0; 16], [0; 16]);
    heights[..8].copy_from_slice(&[upper, upper, lower, lower, upper, lower, weights as u8, weights as u8]);
    // The tiles 4 and 5 have as many bytes a row as the weights have values along K: four a row.
    row_bytes[..8].copy_from_slice(&[64, 64, 64, 64, 4 * weights as u16, 4 * weights as u16, 64, 64]);
    let shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows: heights };
    // SAFETY: at most 16 rows of 64 bytes, as the processor has them.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, preserves_flags, readonly)) };
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: nothing is in the tiles between calls.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
    }
}

/// `steps` steps of up to 32 rows and one panel. `a`: rows `a_row` bytes apart, the lower ones from `a_lower` on. `c`: as `a`, 32
/// floats a row; its contents are added to if `add`. `ahead`: where to fetch from into the second-level cache.
#[derive(Clone, Copy)]
struct Pair {
    a: *const u8,
    a_lower: *const u8,
    a_row: usize,
    b: *const u8,
    c: *mut f32,
    c_lower: *mut f32,
    c_row: usize,
    steps: usize,
    add: bool,
    ahead: *const u8,
}

macro_rules! pair {
    ($name:ident, $lines:literal, $($line:literal)*) => {
        /// # Safety
        /// Tiles are shaped; rows, panel and result are there, `steps` is not zero.
        unsafe fn $name(p: Pair) {
            // SAFETY: the caller's; prefetching touches nothing.
            unsafe {
                asm!(
                    "test {add:e}, {add:e}",
                    "jz 3f",
                    "tileloadd tmm0, [{c} + {cs}]",
                    "tileloadd tmm1, [{c} + {cs} + 64]",
                    "tileloadd tmm2, [{cl} + {cs}]",
                    "tileloadd tmm3, [{cl} + {cs} + 64]",
                    "jmp 2f",
                    "3:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    ".p2align 5",
                    "2:",
                    "tileloadd tmm6, [{b} + {bs}]",
                    "tileloadd tmm4, [{a} + {s}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {bs} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{al} + {s}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    $(concat!("prefetcht1 [{p} + ", $line, " * 64]"),)*
                    concat!("add {p}, ", $lines, " * 64"),
                    "add {a}, 64",
                    "add {al}, 64",
                    "add {b}, 2048",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{c} + {cs}], tmm0",
                    "tilestored [{c} + {cs} + 64], tmm1",
                    "tilestored [{cl} + {cs}], tmm2",
                    "tilestored [{cl} + {cs} + 64], tmm3",
                    a = inout(reg) p.a => _, al = inout(reg) p.a_lower => _, s = in(reg) p.a_row,
                    b = inout(reg) p.b => _, bs = in(reg) 4 * PANEL,
                    c = in(reg) p.c, cl = in(reg) p.c_lower, cs = in(reg) p.c_row,
                    n = inout(reg) p.steps => _, p = inout(reg) p.ahead => _, add = in(reg) u32::from(p.add),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack)
                );
            }
        }
    };
}
pair!(pair_4, 4, 0 1 2 3);
pair!(pair_8, 8, 0 1 2 3 4 5 6 7);
pair!(pair_16, 16, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
pair!(pair_32, 32, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);

/// Up to 16 rows and two panels side by side, the second's result behind the first's.
///
/// # Safety
/// As of the pairs, with both results of one height.
unsafe fn side_by_side(p: Pair, b_right: *const u8) {
    // Weights that are read once come from memory: so far ahead that they are there in time.
    const AHEAD: usize = 4096;
    macro_rules! lines {
        ($($line:literal)*) => {
            // SAFETY: the caller's; prefetching touches nothing.
            unsafe {
                asm!(
                    "test {add:e}, {add:e}",
                    "jz 3f",
                    "tileloadd tmm0, [{c} + {cs}]",
                    "tileloadd tmm1, [{c} + {cs} + 64]",
                    "tileloadd tmm2, [{cl} + {cs}]",
                    "tileloadd tmm3, [{cl} + {cs} + 64]",
                    "jmp 2f",
                    "3:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    ".p2align 5",
                    "2:",
                    "tileloadd tmm4, [{a} + {s}]",
                    "tileloadd tmm6, [{b} + {bs}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b} + {bs} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    $(concat!("prefetcht0 [{b} + ", $line, " * 64 + {ahead}]"),)*
                    "tileloadd tmm6, [{br} + {bs}]",
                    "tdpbf16ps tmm2, tmm4, tmm6",
                    "tileloadd tmm7, [{br} + {bs} + 64]",
                    "tdpbf16ps tmm3, tmm4, tmm7",
                    $(concat!("prefetcht0 [{br} + ", $line, " * 64 + {ahead}]"),)*
                    "add {a}, 64",
                    "add {b}, 2048",
                    "add {br}, 2048",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{c} + {cs}], tmm0",
                    "tilestored [{c} + {cs} + 64], tmm1",
                    "tilestored [{cl} + {cs}], tmm2",
                    "tilestored [{cl} + {cs} + 64], tmm3",
                    a = inout(reg) p.a => _, s = in(reg) p.a_row,
                    b = inout(reg) p.b => _, br = inout(reg) b_right => _, bs = in(reg) 4 * PANEL,
                    c = in(reg) p.c, cl = in(reg) p.c_lower, cs = in(reg) p.c_row,
                    n = inout(reg) p.steps => _, add = in(reg) u32::from(p.add), ahead = const AHEAD,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack)
                );
            }
        };
    }
    lines!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
}

thread_local! {
    /// Rows brought together, and the results of a panel that sticks out of its target.
    static SCRATCH: RefCell<Option<Buffer>> = const { RefCell::new(None) };
}

/// As [`super::tile::product`] for pairs of bf16.
///
/// # Safety
/// As of [`super::tile::product`], whose checks are made; [`granted`]. Rows are readable, and zero, up to whole steps.
pub(crate) unsafe fn product(units: usize, rows: Rows, panels: Panels, target: Target) {
    let steps = units.div_ceil(STEP);
    let height = (ROWS_WORDS / (steps * STEP).max(1) / 32 * 32).max(32);
    // SAFETY: granted, says the caller.
    let mut tiles = unsafe { Tiles::new([rows.count.min(16), rows.count.saturating_sub(16).clamp(1, 16)]) };
    for first in (0..rows.count).step_by(height) {
        let count = height.min(rows.count - first);
        let together = rows.index.is_none_or(|index| index[first..][..count].windows(2).all(|w| w[0] + 1 == w[1]));
        // SAFETY: rows, panels and target are there, says the caller.
        unsafe {
            let target = Target { start: target.start.add(first * target.stride), ..target };
            if together {
                let row = rows.index.map_or(first, |index| index[first] as usize);
                let a = rows.data.as_ptr().add(row * rows.stride);
                block(&mut tiles, units, a, rows.stride, count, panels, target);
                continue;
            }
            SCRATCH.with_borrow_mut(|scratch| {
                // An odd number of cache lines a row.
                let stride = (steps | 1) * STEP;
                let words = count * stride;
                if scratch.as_ref().is_none_or(|s| s.len() < 4 * words) {
                    *scratch = Some(Buffer::words_zeroed(words));
                }
                let memory = scratch.as_mut().map(Buffer::words_mut).unwrap_or_default();
                for (i, to) in memory.chunks_exact_mut(stride).enumerate().take(count) {
                    let row = rows.index.map_or(first + i, |index| index[first + i] as usize);
                    to[..steps * STEP].copy_from_slice(&rows.data[row * rows.stride..][..steps * STEP]);
                }
                block(&mut tiles, units, memory.as_ptr(), stride, count, panels, target);
            });
        }
    }
}

/// All panels for rows that lie in the second-level cache, `stride` words apart.
///
/// # Safety
/// As of [`product`].
unsafe fn block(
    tiles: &mut Tiles,
    units: usize,
    a: *const f32,
    stride: usize,
    count: usize,
    panels: Panels,
    target: Target,
) {
    let strips = target.columns.div_ceil(PANEL);
    let pairs = count.div_ceil(32);
    let (whole, tail) = (units / STEP, units % STEP);
    // With few rows every weight is used once: no blocking.
    let most = if pairs == 1 { whole.max(1) } else { BLOCK };
    let mut strip = 0;
    while strip < strips {
        let columns = target.columns - strip * PANEL;
        let wide = count <= 16 && columns > PANEL;
        let width = if wide { 2 * PANEL } else { PANEL };
        let edge = columns < width;
        // SAFETY: strips and rows are there, says the caller; what sticks out of the target goes through `edge`.
        unsafe {
            let b = panels.data.as_ptr().add(strip * panels.stride).cast::<u8>();
            let start = target.start.add(strip * PANEL);
            let group = |i: usize| (i * 32, (count - i * 32).min(32));
            if edge {
                let columns = columns.min(width);
                for (first, n) in (0..pairs).map(group) {
                    let mut own = [[0.0_f32; 2 * PANEL]; 32];
                    let start = start.add(first * target.stride);
                    if target.add {
                        for (r, own) in own.iter_mut().enumerate().take(n) {
                            own[..columns]
                                .copy_from_slice(std::slice::from_raw_parts(start.add(r * target.stride), columns));
                        }
                    }
                    let place =
                        Target { start: own.as_mut_ptr().cast(), stride: 2 * PANEL, columns: width, add: target.add };
                    let a = a.add(first * stride);
                    run(tiles, a, stride, n, b, panels.stride * 4, 0..whole, tail, place, 1, 0);
                    for (r, own) in own.iter().enumerate().take(n) {
                        std::slice::from_raw_parts_mut(start.add(r * target.stride), columns)
                            .copy_from_slice(&own[..columns]);
                    }
                }
            } else {
                let mut from = 0;
                loop {
                    let to = whole.min(from + most);
                    let last = to == whole;
                    for (i, (first, n)) in (0..pairs).map(group).enumerate() {
                        let place = Target {
                            start: start.add(first * target.stride),
                            columns: width,
                            add: target.add || from > 0,
                            ..target
                        };
                        let (a, tail) = (a.add(first * stride), if last { tail } else { 0 });
                        run(tiles, a, stride, n, b, panels.stride * 4, from..to, tail, place, pairs, i);
                    }
                    from = to;
                    if last {
                        break;
                    }
                }
            }
        }
        strip += width / PANEL;
    }
}

/// The steps of a range, and behind them the `tail` units that are no whole step, for up to 32 rows and one panel, or for up to 16
/// and two. Of `pairs` groups of rows that pass by this part of the panel it is the `i`-th.
///
/// # Safety
/// As of [`product`]; the target has all its columns.
#[allow(clippy::too_many_arguments)]
unsafe fn run(
    tiles: &mut Tiles,
    a: *const f32,
    stride: usize,
    rows: usize,
    b: *const u8,
    b_next: usize,
    steps: std::ops::Range<usize>,
    tail: usize,
    target: Target,
    pairs: usize,
    i: usize,
) {
    let two = target.columns > PANEL;
    let upper = rows.min(16);
    let lower = if two || rows <= 16 { upper } else { rows - 16 };
    tiles.reshape([upper, lower]);
    // With one row tile and one panel the lower results repeat the upper ones.
    let skip = if rows > 16 { 16 } else { 0 };
    // SAFETY: by the caller's word; pointers ahead are only fetched from.
    unsafe {
        let mut pair = Pair {
            a: a.add(steps.start * STEP).cast(),
            a_lower: a.add(skip * stride + steps.start * STEP).cast(),
            a_row: 4 * stride,
            b: b.add(steps.start * STEP_BYTES),
            c: target.start,
            c_lower: target.start.add(if two { PANEL } else { skip * target.stride }),
            c_row: 4 * target.stride,
            steps: steps.len(),
            add: target.add,
            ahead: b,
        };
        if pair.steps > 0 {
            let next = b.wrapping_add(steps.end * STEP_BYTES);
            // Lines of the next block for each step of each group.
            let ahead = |lines: usize| next.wrapping_add(i * lines % 32 * 64 * pair.steps);
            match pairs {
                _ if two => side_by_side(pair, pair.b.add(b_next)),
                1 => pair_32(Pair { ahead: pair.b.wrapping_add(2 * STEP_BYTES), ..pair }),
                2 => pair_16(Pair { ahead: ahead(16), ..pair }),
                3..=4 => pair_8(Pair { ahead: ahead(8), ..pair }),
                _ => pair_4(Pair { ahead: ahead(4), ..pair }),
            }
            pair.add = true;
        }
        if tail > 0 || (steps.end == 0 && !pair.add) {
            // The units behind the last step are another panel's: zeros in their place.
            let mut last = [[0.0_f32; STEP * PANEL]; 2];
            for (n, last) in last.iter_mut().enumerate().take(if two { 2 } else { 1 }) {
                let from = b.add(n * b_next + steps.end * STEP_BYTES).cast::<f32>();
                last[..tail * PANEL].copy_from_slice(std::slice::from_raw_parts(from, tail * PANEL));
            }
            let done = steps.end * STEP;
            pair.a = a.add(done).cast();
            pair.a_lower = a.add(skip * stride + done).cast();
            pair.b = last[0].as_ptr().cast();
            pair.ahead = pair.b;
            pair.steps = 1;
            if two { side_by_side(pair, last[1].as_ptr().cast()) } else { pair_4(pair) }
        }
    }
}
