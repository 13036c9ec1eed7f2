//! Matrix products on the CPU: f32 and bf16 beside the register-only rate, packed weights in every format beside a plain read of
//! f32's bytes, training shapes beside Burn's own product, and what a fork and join costs.
//!
//! `cargo bench --manifest-path kernels/benches/Cargo.toml --bench linear [registers|product|stream|train|bf16|pool]`; `M1_THREADS` and `M1_SIMD` as
//! everywhere. Elements are floating-point operations (Gelem/s: GFLOP/s).

use std::cell::LazyCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Distribution, Tensor};
use criterion::{Criterion, Throughput};
use m1_benches::group;
use m1_kernels::base::packed::{Acts, Format, Packed, par_multiply};
use m1_kernels::base::{gemm, pool};
use m1_kernels::linear::{Weight, linear, reference};

fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

/// Multiply-adds on registers alone, for as many passes of 24 registers.
#[cfg(target_arch = "x86_64")]
mod registers {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use criterion::{Criterion, Throughput};
    use m1_kernels::base::{pool, simd};

    #[target_feature(enable = "avx512f")]
    fn f32(passes: usize) {
        let (a, b) = (_mm512_set1_ps(0.999), _mm512_set1_ps(0.5));
        // The whole array at once: chains that begin alike would be one to the compiler, and of one by one it makes memory.
        let mut sums: [__m512; 24] = black_box([_mm512_set1_ps(1.0); 24]);
        for _ in 0..passes {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16(passes: usize) {
        // SAFETY: both are 512 bits of anything.
        let a = unsafe { std::mem::transmute::<__m512, __m512bh>(_mm512_set1_ps(0.999)) };
        let mut sums: [__m512; 24] = black_box([_mm512_set1_ps(1.0); 24]);
        for _ in 0..passes {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, a);
            }
        }
        black_box(sums);
    }

    /// All threads at once.
    pub fn bench(c: &mut Criterion) {
        const PASSES: usize = 1_000_000;
        if !simd::levels().contains(&simd::Level::Avx512Bf16) {
            return;
        }
        let threads = pool::threads();
        // Operations of a multiply-add: of 16 numbers, and of 16 pairs.
        for (name, work, run) in [("f32", 32, f32 as unsafe fn(usize)), ("bf16", 64, bf16)] {
            let work = Throughput::Elements((threads * PASSES * 24 * work) as u64);
            super::group(c, "registers", work).bench_function(name, |b| {
                b.iter(|| {
                    pool::run(threads, |_| {
                        // SAFETY: the level says that the processor has the instructions.
                        unsafe { run(black_box(PASSES)) };
                    });
                });
            });
        }
    }
}

const FORMATS: [Format; 4] = [Format::F32, Format::Bf16, Format::Int8 { block: 32 }, Format::Int4 { block: 32 }];

fn products(c: &mut Criterion) {
    for [m, n, k] in [[512, 1024, 2048], [2048, 2048, 2048], [64, 512, 1024], [128, 1024, 1024], [512, 512, 512]] {
        let (a, b) = (noise(m * k, 1), noise(k * n, 2));
        let mut sums = vec![0.0; m * n];
        let mut group = group(c, &format!("product {m} × {n} × {k}"), Throughput::Elements((2 * m * n * k) as u64));
        let (plain_a, turned_a) = (gemm::Mat::row_major(&a, k), gemm::Mat::row_major(&a, m).transposed());
        let (plain_b, turned_b) = (gemm::Mat::row_major(&b, n), gemm::Mat::row_major(&b, k).transposed());
        for (name, a, b) in
            [("f32 ab", plain_a, plain_b), ("f32 abᵀ", plain_a, turned_b), ("f32 aᵀb", turned_a, plain_b)]
        {
            group.bench_function(name, |bencher| {
                bencher.iter(|| gemm::par_gemm(m, n, k, a, b, &mut sums, n, false));
            });
        }
        for format in FORMATS {
            let row = |_: usize, r: usize, to: &mut [f32]| to.copy_from_slice(&b[r * k..][..k]);
            let w = LazyCell::new(|| Packed::pack(format, 1, n, k, &row).expect("packs"));
            group.bench_function(format!("packed {format:?}"), |bencher| {
                bencher.iter(|| par_multiply(&Acts::new(format, false, m, k, &a), &w, 0, &mut sums));
            });
        }
    }
}

/// Far more bytes than the caches hold, read plainly and as weights.
fn stream(c: &mut Criterion) {
    let (count, out, input) = (16, 4096, 4096);
    let numbers = LazyCell::new(|| noise(count * out * input, 3));
    group(c, "stream", Throughput::BytesDecimal((count * out * input * 4) as u64)).bench_function("plain read", |b| {
        let numbers = &*numbers;
        b.iter(|| {
            let parts = 64;
            pool::run(parts, |i| {
                let part = &numbers[i * (numbers.len() / parts)..][..numbers.len() / parts];
                let mut sums = [0.0_f32; 64];
                for chunk in part.as_chunks::<64>().0 {
                    for (sum, x) in sums.iter_mut().zip(chunk) {
                        *sum += x;
                    }
                }
                black_box(sums);
            });
        });
    });
    for format in FORMATS {
        // What all of them take, from one panel: scales and padding count.
        let panel = Packed::pack(format, 1, 32, input, &|_, _, to| to.fill(1.0)).expect("packs").bytes();
        let w = LazyCell::new(|| {
            let numbers = numbers.as_slice();
            let row = |matrix: usize, r: usize, to: &mut [f32]| {
                to.copy_from_slice(&numbers[(matrix * out + r) * input..][..input]);
            };
            Packed::pack(format, count, out, input, &row).expect("packs")
        });
        let mut group = group(c, "stream", Throughput::BytesDecimal((panel * (out / 32) * count) as u64));
        for (rows, exact) in [(1, false), (1, true), (2, false), (4, false), (8, false), (16, false)] {
            if exact && format == Format::F32 {
                continue; // always is
            }
            let acts = Acts::new(format, exact, rows, input, &noise(rows * input, 4));
            let mut sums = vec![0.0; rows * out];
            group.bench_function(format!("{format:?}, {rows} rows{}", if exact { ", exact" } else { "" }), |b| {
                let w = &*w;
                b.iter(|| (0..count).for_each(|matrix| par_multiply(&acts, w, matrix, &mut sums)));
            });
        }
    }
}

type Linear = fn(Tensor<2>, Tensor<2>) -> Tensor<2>;

const LINEAR: [(&str, Linear); 2] = [("ours", |x, w| linear(x, &Weight::Tensor(w))), ("Burn's", reference::linear)];

/// The time of `iterations` calls on each of two threads.
fn two_callers(call: impl Fn() + Sync, iterations: u64) -> Duration {
    let start = Instant::now();
    let calls = || (0..iterations).for_each(|_| call());
    std::thread::scope(|scope| {
        scope.spawn(calls);
        calls();
    });
    start.elapsed()
}

fn train(c: &mut Criterion) {
    let device = Device::flex().autodiff();
    for [tokens, input, out] in
        [[128_usize, 128, 128], [512, 256, 768], [2048, 256, 256], [2048, 512, 2048], [2048, 2048, 2048]]
    {
        let x = Tensor::<2>::random([tokens, input], Distribution::Default, &device).require_grad();
        let w = Tensor::<2>::random([out, input], Distribution::Default, &device).require_grad();
        let name = format!("train {tokens} × {input} → {out}");
        let work = |callers: usize| Throughput::Elements((callers * 6 * tokens * input * out) as u64);
        for (which, f) in LINEAR {
            let step = || drop(black_box(f(x.clone(), w.clone()).sum().backward()));
            group(c, &name, work(1)).bench_function(which, |b| b.iter(step));
            group(c, &format!("{name}, two callers"), work(2))
                .bench_function(which, |b| b.iter_custom(|iterations| two_callers(step, iterations)));
        }
    }
}

/// Tensors in bf16, not packed.
fn bf16_tensors(c: &mut Criterion) {
    let device = Device::flex();
    for [tokens, input, out] in [[1_usize, 2048, 2048], [64, 2048, 2048]] {
        let x = Tensor::<2>::random([tokens, input], Distribution::Default, &device).cast(DType::BF16);
        let w = Tensor::<2>::random([out, input], Distribution::Default, &device).cast(DType::BF16);
        let work = Throughput::Elements((2 * tokens * input * out) as u64);
        let mut group = group(c, &format!("bf16 tensors {tokens} × {input} → {out}"), work);
        for (which, f) in LINEAR {
            group.bench_function(which, |b| b.iter(|| f(x.clone(), w.clone())));
        }
    }
}

fn fork_and_join(c: &mut Criterion) {
    let fork = || pool::run(2, |i| _ = black_box(i));
    let mut group = group(c, "pool: fork and join", Throughput::Elements(1));
    group.bench_function("awake", |b| b.iter(fork));
    group.bench_function("after a pause", |b| {
        b.iter_custom(|iterations| {
            let one = || {
                std::thread::sleep(Duration::from_millis(1));
                let start = Instant::now();
                fork();
                start.elapsed()
            };
            // However cheap a call is: the pauses take their time.
            let measured = iterations.min(20);
            (0..measured).map(|_| one()).sum::<Duration>().mul_f64(iterations as f64 / measured as f64)
        });
    });
}

fn main() {
    let mut c = m1_benches::criterion();
    #[cfg(target_arch = "x86_64")]
    registers::bench(&mut c);
    products(&mut c);
    stream(&mut c);
    train(&mut c);
    bf16_tensors(&mut c);
    fork_and_join(&mut c);
    c.final_summary();
}
