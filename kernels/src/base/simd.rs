//! Which vector instructions this processor has, chosen at run time, and the few vector operations that the matrix
//! kernels are written in.
//!
//! Elementwise code is written once, as an `#[inline(always)]` body over `[f32; 16]` chunks, and compiled per level by
//! `simd!`. Matrix kernels need to say which registers they use: they are generic over [`Vector`].

use half::bf16;
use std::cell::Cell;
use std::sync::OnceLock;

/// Sets of vector instructions, each containing the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Whatever the target has by default (SSE2 on x86-64, NEON on aarch64); no fused multiply-add is assumed.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL, and all of [`Level::Avx2`].
    Avx512,
    /// [`Level::Avx512`] with AVX512-VNNI.
    Avx512Vnni,
    /// [`Level::Avx512Vnni`] with AVX512-BF16.
    Avx512Bf16,
    /// [`Level::Avx512Bf16`] with AMX tiles for bf16 and int8, which the system has to grant.
    Amx,
}

impl Level {
    /// The level, or the best that this machine has if that is lower. Public functions that take a level ask here, as anybody can
    /// name any.
    pub(crate) fn here(self) -> Self {
        self.min(detected())
    }
}

thread_local! {
    static OVERRIDE: Cell<Option<Level>> = const { Cell::new(None) };
}

const ALL: [(&str, Level); 6] = [
    ("portable", Level::Portable),
    ("avx2", Level::Avx2),
    ("avx512", Level::Avx512),
    ("avx512vnni", Level::Avx512Vnni),
    ("avx512bf16", Level::Avx512Bf16),
    ("amx", Level::Amx),
];

/// The level that operations called on this thread use: the one that serves the processor best, or what `M1_SIMD` (`portable`, `avx2`,
/// `avx512`, `avx512vnni`, `avx512bf16`, `amx`) says, as far as the processor has it, or what [`with_level`] has set. Jobs on the
/// pool take it from their caller.
pub fn level() -> Level {
    OVERRIDE.get().unwrap_or_else(default_level)
}

/// All levels that this machine has, lowest first.
pub fn levels() -> Vec<Level> {
    ALL.into_iter().map(|(_, level)| level).filter(|&level| level <= detected()).collect()
}

/// Runs `f` with `level` on this thread; for tests and benches.
///
/// # Panics
/// If this machine does not have `level`.
pub fn with_level<R>(level: Level, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Level>);
    impl Drop for Restore {
        fn drop(&mut self) {
            OVERRIDE.set(self.0);
        }
    }
    assert!(level <= detected(), "{level:?} is not on this machine");
    let _restore = Restore(OVERRIDE.replace(Some(level)));
    f()
}

fn default_level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let asked = std::env::var_os("M1_SIMD").unwrap_or_default();
        let asked = named(&asked.to_string_lossy()).unwrap_or_else(|error| {
            eprintln!("{error}");
            None
        });
        asked.map_or_else(|| preferred(detected(), intel()), Level::here)
    })
}

/// The level of this name, if it is one.
fn named(name: &str) -> Result<Option<Level>, String> {
    if name.is_empty() {
        return Ok(None);
    }
    let known = ALL.into_iter().find(|(known, _)| *known == name);
    known.map(|(_, level)| Some(level)).ok_or_else(|| {
        let names = ALL.map(|(name, _)| name).join(", ");
        format!("M1_SIMD={name} is none of {names}: what serves the processor best is used")
    })
}

/// What serves a processor that has `best`: that, but for bf16 in Intel's vector registers. Two cores of an Emerald Rapids multiply
/// and add pairs of bf16 at 170 GFLOP/s, f32 at 350; a Zen 4's pairs are the faster ones. By the maker and not by a timing:
/// bits are the same at every start.
fn preferred(best: Level, intel: bool) -> Level {
    if best == Level::Avx512Bf16 && intel { Level::Avx512Vnni } else { best }
}

#[cfg(target_arch = "x86_64")]
fn intel() -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == *b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn intel() -> bool {
    false
}

fn detected() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    macro_rules! all {
        ($($feature:tt)*) => { $(is_x86_feature_detected!($feature))&&* };
    }
    if !all!("avx2" "fma" "f16c") {
        Level::Portable
    } else if !all!("avx512f" "avx512bw" "avx512dq" "avx512vl") {
        Level::Avx2
    } else if !all!("avx512vnni") {
        Level::Avx512
    } else if !all!("avx512bf16") {
        Level::Avx512Vnni
    } else if !super::amx::granted() {
        Level::Avx512Bf16
    } else {
        Level::Amx
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}

/// Compiles an `#[inline(always)]` body for every level and makes the function that chooses:
///
/// ```ignore
/// simd! {
///     /// `y[i] = silu(x[i])`
///     pub(crate) fn silu(x: &[f32], y: &mut [f32]) = silu_body;
/// }
/// #[inline(always)]
/// fn silu_body<const FMA: bool>(x: &[f32], y: &mut [f32]) { … }
/// // called as silu(level, x, y)
/// ```
///
/// `FMA` says whether `f32::mul_add` is one instruction; where it is not, write `a * b + c` (it would call the C library).
/// A result type may follow the arguments.
macro_rules! simd {
    ($(#[$attr:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? = $body:ident;) => {
        $(#[$attr])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(level: $crate::base::simd::Level, $($arg: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[allow(clippy::too_many_arguments)]
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512($($arg: $type),*) $(-> $result)? {
                    $body::<true>($($arg),*)
                }
                #[allow(clippy::too_many_arguments)]
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $type),*) $(-> $result)? {
                    $body::<true>($($arg),*)
                }
                if level >= $crate::base::simd::Level::Avx512 {
                    // SAFETY: the level says that the processor has these instructions.
                    return unsafe { avx512($($arg),*) };
                }
                if level >= $crate::base::simd::Level::Avx2 {
                    // SAFETY: the level says that the processor has these instructions.
                    return unsafe { avx2($($arg),*) };
                }
            }
            let _ = level;
            $body::<false>($($arg),*)
        }
    };
}

pub(crate) use simd;

/// A register of 32-bit lanes.
///
/// # Safety
/// The methods may be called only where the processor has the instructions of the implementing type, inlined into a
/// function with those target features; pointers must be valid for `LANES` values (no alignment is asked for).
#[allow(clippy::missing_safety_doc)] // one rule for all, above
pub(crate) unsafe trait Vector: Copy {
    /// Lanes of 32 bits.
    const LANES: usize;
    /// `LANES` registers.
    type Columns: AsRef<[Self]>;
    /// Accumulators that fit in the registers beside the operands.
    const ACCUMULATORS: usize;
    /// All registers.
    const REGISTERS: usize;

    unsafe fn zero() -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// `LANES` bf16, widened.
    unsafe fn load_bf16(from: *const bf16) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn splat(from: *const f32) -> Self;
    /// `a · b + self`, fused wherever the level has fused instructions.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// The columns of a square, `LANES` rows that begin `row` floats apart.
    unsafe fn columns(from: *const f32, row: usize) -> Self::Columns;
    /// The even (low) bf16 of each lane, widened to f32.
    unsafe fn low_bf16(self) -> Self;
    /// The odd (high) bf16 of each lane, widened to f32.
    unsafe fn high_bf16(self) -> Self;
    /// `self + a.low · b.low + a.high · b.high` over lanes that hold two bf16 each.
    #[inline(always)]
    unsafe fn dot_bf16(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller keeps the trait's rule.
        unsafe { self.fma(a.low_bf16(), b.low_bf16()).fma(a.high_bf16(), b.high_bf16()) }
    }
}

/// Four lanes in plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Plain([f32; 4]);

// SAFETY: plain Rust over arrays; the pointers are the caller's.
unsafe impl Vector for Plain {
    const LANES: usize = 4;
    type Columns = [Self; 4];
    const ACCUMULATORS: usize = 8;
    const REGISTERS: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Plain([0.0; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller keeps the trait's rule.
        Plain(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: the caller keeps the trait's rule.
        Plain(unsafe { from.cast::<[bf16; 4]>().read_unaligned() }.map(bf16::to_f32))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller keeps the trait's rule.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn splat(from: *const f32) -> Self {
        // SAFETY: the caller keeps the trait's rule.
        Plain([unsafe { *from }; 4])
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] + a.0[i] * b.0[i]))
    }
    #[inline(always)]
    unsafe fn columns(from: *const f32, row: usize) -> [Self; 4] {
        // SAFETY: the caller keeps the trait's rule.
        std::array::from_fn(|j| Plain(std::array::from_fn(|i| unsafe { *from.add(i * row + j) })))
    }
    #[inline(always)]
    unsafe fn low_bf16(self) -> Self {
        Plain(self.0.map(|x| f32::from_bits(x.to_bits() << 16)))
    }
    #[inline(always)]
    unsafe fn high_bf16(self) -> Self {
        Plain(self.0.map(|x| f32::from_bits(x.to_bits() & 0xffff_0000)))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Ymm, Zmm, ZmmBf16};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::Vector;

    /// AVX2 with FMA.
    #[derive(Clone, Copy)]
    pub(crate) struct Ymm(__m256);

    // SAFETY: intrinsics of AVX2 and FMA only.
    unsafe impl Vector for Ymm {
        const LANES: usize = 8;
        type Columns = [Self; 8];
        const ACCUMULATORS: usize = 12;
        const REGISTERS: usize = 16;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller keeps the trait's rule, here and below.
            Ymm(unsafe { _mm256_setzero_ps() })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see `zero`.
            Ymm(unsafe { _mm256_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: see `zero`.
            unsafe {
                let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                Ymm(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)))
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see `zero`.
            unsafe { _mm256_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn splat(from: *const f32) -> Self {
            // SAFETY: see `zero`.
            Ymm(unsafe { _mm256_set1_ps(*from) })
        }
        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: see `zero`.
            Ymm(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
        }
        #[inline(always)]
        unsafe fn columns(from: *const f32, row: usize) -> [Self; 8] {
            // SAFETY: see `zero`.
            unsafe {
                let r: [__m256; 8] = std::array::from_fn(|i| _mm256_loadu_ps(from.add(i * row)));
                let t: [__m256d; 8] = std::array::from_fn(|i| {
                    let (a, b) = (r[i & !1], r[i | 1]);
                    _mm256_castps_pd(if i % 2 == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) })
                });
                // Of rows 4g .. 4g + 3, u[4g + j] has column 4l + j in its half l.
                let u: [__m256; 8] = std::array::from_fn(|i| {
                    let (a, b) = (t[i / 4 * 4 + i % 4 / 2], t[i / 4 * 4 + i % 4 / 2 + 2]);
                    _mm256_castpd_ps(if i % 2 == 0 { _mm256_unpacklo_pd(a, b) } else { _mm256_unpackhi_pd(a, b) })
                });
                std::array::from_fn(|j| {
                    let (a, b) = (u[j % 4], u[4 + j % 4]);
                    Ymm(if j < 4 { _mm256_permute2f128_ps::<0x20>(a, b) } else { _mm256_permute2f128_ps::<0x31>(a, b) })
                })
            }
        }
        #[inline(always)]
        unsafe fn low_bf16(self) -> Self {
            // SAFETY: see `zero`.
            Ymm(unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(self.0))) })
        }
        #[inline(always)]
        unsafe fn high_bf16(self) -> Self {
            // SAFETY: see `zero`.
            unsafe {
                let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                Ymm(_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(self.0), mask)))
            }
        }
    }

    /// AVX-512 without the BF16 instructions.
    #[derive(Clone, Copy)]
    pub(crate) struct Zmm(__m512);

    // SAFETY: intrinsics of AVX512F only.
    unsafe impl Vector for Zmm {
        const LANES: usize = 16;
        type Columns = [Self; 16];
        const ACCUMULATORS: usize = 24;
        const REGISTERS: usize = 32;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the caller keeps the trait's rule, here and below.
            Zmm(unsafe { _mm512_setzero_ps() })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see `zero`.
            Zmm(unsafe { _mm512_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: see `zero`.
            unsafe {
                let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Zmm(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)))
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see `zero`.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn splat(from: *const f32) -> Self {
            // SAFETY: see `zero`.
            Zmm(unsafe { _mm512_set1_ps(*from) })
        }
        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: see `zero`.
            Zmm(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
        }
        #[inline(always)]
        unsafe fn columns(from: *const f32, row: usize) -> [Self; 16] {
            // SAFETY: see `zero`.
            unsafe {
                let r: [__m512; 16] = std::array::from_fn(|i| _mm512_loadu_ps(from.add(i * row)));
                let t: [__m512d; 16] = std::array::from_fn(|i| {
                    let (a, b) = (r[i & !1], r[i | 1]);
                    _mm512_castps_pd(if i % 2 == 0 { _mm512_unpacklo_ps(a, b) } else { _mm512_unpackhi_ps(a, b) })
                });
                // Of rows 4g .. 4g + 3, u[4g + j] has column 4l + j in its quarter l.
                let u: [__m512; 16] = std::array::from_fn(|i| {
                    let (a, b) = (t[i / 4 * 4 + i % 4 / 2], t[i / 4 * 4 + i % 4 / 2 + 2]);
                    _mm512_castpd_ps(if i % 2 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) })
                });
                // Quarters 0 and 2, or 1 and 3, of rows 0 .. 7 and of rows 8 .. 15.
                let even = |j: usize| [0, 8].map(|g| _mm512_shuffle_f32x4::<0x88>(u[g + j], u[g + 4 + j]));
                let odd = |j: usize| [0, 8].map(|g| _mm512_shuffle_f32x4::<0xdd>(u[g + j], u[g + 4 + j]));
                let halves: [[[__m512; 2]; 4]; 2] = [std::array::from_fn(even), std::array::from_fn(odd)];
                std::array::from_fn(|j| {
                    let [a, b] = halves[j / 4 % 2][j % 4];
                    Zmm(if j < 8 { _mm512_shuffle_f32x4::<0x88>(a, b) } else { _mm512_shuffle_f32x4::<0xdd>(a, b) })
                })
            }
        }
        #[inline(always)]
        unsafe fn low_bf16(self) -> Self {
            // SAFETY: see `zero`.
            Zmm(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(self.0))) })
        }
        #[inline(always)]
        unsafe fn high_bf16(self) -> Self {
            // SAFETY: see `zero`.
            unsafe {
                let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                Zmm(_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(self.0), mask)))
            }
        }
    }

    /// AVX-512 with the BF16 instructions.
    #[derive(Clone, Copy)]
    pub(crate) struct ZmmBf16(Zmm);

    // SAFETY: intrinsics of AVX512F and AVX512-BF16 only.
    unsafe impl Vector for ZmmBf16 {
        const LANES: usize = 16;
        type Columns = [Self; 16];
        const ACCUMULATORS: usize = 24;
        const REGISTERS: usize = 32;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: see `Zmm::zero`.
            ZmmBf16(unsafe { Zmm::zero() })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see `Zmm::zero`.
            ZmmBf16(unsafe { Zmm::load(from) })
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: see `Zmm::zero`.
            ZmmBf16(unsafe { Zmm::load_bf16(from) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see `Zmm::zero`.
            unsafe { self.0.store(to) }
        }
        #[inline(always)]
        unsafe fn splat(from: *const f32) -> Self {
            // SAFETY: see `Zmm::zero`.
            ZmmBf16(unsafe { Zmm::splat(from) })
        }
        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: see `Zmm::zero`.
            ZmmBf16(unsafe { self.0.fma(a.0, b.0) })
        }
        #[inline(always)]
        unsafe fn columns(from: *const f32, row: usize) -> [Self; 16] {
            // SAFETY: see `Zmm::zero`.
            unsafe { Zmm::columns(from, row).map(ZmmBf16) }
        }
        #[inline(always)]
        unsafe fn low_bf16(self) -> Self {
            // SAFETY: see `Zmm::zero`.
            ZmmBf16(unsafe { self.0.low_bf16() })
        }
        #[inline(always)]
        unsafe fn high_bf16(self) -> Self {
            // SAFETY: see `Zmm::zero`.
            ZmmBf16(unsafe { self.0.high_bf16() })
        }
        #[inline(always)]
        unsafe fn dot_bf16(self, a: Self, b: Self) -> Self {
            // SAFETY: see `Zmm::zero`; the casts only rename the register's type.
            unsafe {
                let bits = |x: Zmm| std::mem::transmute::<__m512, __m512bh>(x.0);
                ZmmBf16(Zmm(_mm512_dpbf16_ps(self.0.0, bits(a.0), bits(b.0))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_ordered_and_can_be_overridden() {
        let all = levels();
        assert_eq!(all[0], Level::Portable);
        assert!(all.windows(2).all(|w| w[0] < w[1]));
        let before = level();
        for l in all {
            assert_eq!(with_level(l, level), l);
        }
        assert_eq!(level(), before);
    }

    #[test]
    fn levels_have_names() {
        assert_eq!((named(""), named("avx2"), named("amx")), (Ok(None), Ok(Some(Level::Avx2)), Ok(Some(Level::Amx))));
        let told = named("AVX2").unwrap_err();
        assert!(
            told.starts_with("M1_SIMD=AVX2 is none of portable, avx2, avx512, avx512vnni, avx512bf16, amx:"),
            "{told}"
        );
    }

    #[test]
    fn intel_takes_bf16_in_tiles_or_as_f32() {
        for (_, level) in ALL {
            assert_eq!(preferred(level, false), level);
            let other = if level == Level::Avx512Bf16 { Level::Avx512Vnni } else { level };
            assert_eq!(preferred(level, true), other);
        }
    }

    simd! {
        /// Doubles and adds one.
        fn twice_plus_one(x: &[f32], y: &mut [f32]) = twice_plus_one_body;
    }
    #[inline(always)]
    fn twice_plus_one_body<const FMA: bool>(x: &[f32], y: &mut [f32]) {
        for (x, y) in x.iter().zip(y) {
            *y = if FMA { x.mul_add(2.0, 1.0) } else { x * 2.0 + 1.0 };
        }
    }

    #[test]
    fn the_macro_compiles_every_level() {
        let x: Vec<f32> = (0..37).map(|i| i as f32).collect();
        for level in levels() {
            let mut y = vec![0.0; 37];
            twice_plus_one(level, &x, &mut y);
            assert!(y.iter().zip(&x).all(|(y, x)| *y == 2.0 * x + 1.0), "{level:?}");
        }
    }
}
