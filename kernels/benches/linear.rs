//! Matrix products on the CPU: rates of f32 and bf16 against the register-only rate, streaming of packed weights against a
//! plain read, training shapes against Burn's own product, and what a fork and join costs.
//!
//! `cargo bench -p m1-kernels --bench linear [rates|products|stream|train|pool]`; `M1_THREADS` and `M1_SIMD` as everywhere. The best of many runs.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Distribution, Tensor};
use m1_kernels::base::packed::{Acts, Format, Packed, par_multiply};
use m1_kernels::base::{gemm, pool, simd};
use m1_kernels::linear::{Weight, linear, reference};

fn best(mut f: impl FnMut()) -> f64 {
    f();
    let (begin, mut best) = (Instant::now(), Duration::MAX);
    while begin.elapsed() < Duration::from_millis(150) {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed());
    }
    best.as_secs_f64()
}

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

    #[target_feature(enable = "avx512f")]
    pub fn f32(passes: usize) -> f32 {
        let (a, b) = (_mm512_set1_ps(0.999), _mm512_set1_ps(0.5));
        // Chains that begin alike would be one chain to the compiler.
        let mut sums: [__m512; 24] = std::array::from_fn(|i| _mm512_set1_ps(black_box(i as f32)));
        for _ in 0..passes {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16(passes: usize) -> f32 {
        // SAFETY: both are 512 bits of anything.
        let a = unsafe { std::mem::transmute::<__m512, __m512bh>(_mm512_set1_ps(0.999)) };
        let mut sums: [__m512; 24] = std::array::from_fn(|i| _mm512_set1_ps(black_box(i as f32)));
        for _ in 0..passes {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, a);
            }
        }
        sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
    }
}

fn rates() {
    let threads = pool::threads();
    #[cfg(target_arch = "x86_64")]
    if simd::level() >= simd::Level::Avx512Bf16 {
        const PASSES: usize = 1_000_000;
        let f32 = best(|| {
            pool::run(threads, |_| {
                // SAFETY: the level says that the processor has the instructions.
                black_box(unsafe { registers::f32(black_box(PASSES)) });
            })
        });
        let bf16 = best(|| {
            pool::run(threads, |_| {
                // SAFETY: the level says that the processor has the instructions.
                black_box(unsafe { registers::bf16(black_box(PASSES)) });
            })
        });
        let work = (threads * PASSES * 24) as f64 / 1e9;
        println!(
            "registers alone, {threads} threads: f32 {:.0} GFLOP/s, bf16 {:.0}",
            32.0 * work / f32,
            64.0 * work / bf16
        );
    }
}

fn products() {
    for [m, n, k] in [[512, 1024, 2048], [2048, 2048, 2048], [64, 512, 1024], [128, 1024, 1024], [512, 512, 512]] {
        let (a, b) = (noise(m * k, 1), noise(k * n, 2));
        let mut c = vec![0.0; m * n];
        let rate = |seconds: f64| 2e-9 * (m * n * k) as f64 / seconds;
        print!("{m} × {n} × {k}: f32");
        let (plain_a, turned_a) = (gemm::Mat::row_major(&a, k), gemm::Mat::row_major(&a, m).transposed());
        let (plain_b, turned_b) = (gemm::Mat::row_major(&b, n), gemm::Mat::row_major(&b, k).transposed());
        for (name, a, b) in [("ab", plain_a, plain_b), ("abᵀ", plain_a, turned_b), ("aᵀb", turned_a, plain_b)] {
            print!(" {name} {:.0}", rate(best(|| gemm::par_gemm(m, n, k, a, b, &mut c, n, false))));
        }
        for format in [Format::F32, Format::Bf16] {
            let row = |_: usize, r: usize, to: &mut [f32]| to.copy_from_slice(&b[r * k..][..k]);
            let w = Packed::pack(format, 1, n, k, &row).expect("packs");
            let seconds = best(|| par_multiply(&Acts::new(format, false, m, k, &a), &w, 0, &mut c));
            print!(", packed {format:?} {:.0}", rate(seconds));
        }
        println!(" GFLOP/s");
    }
}

fn stream() {
    let (count, out, input) = (16, 4096, 4096); // far larger than the caches
    let bytes = noise(count * out * input, 3);
    let read = best(|| {
        let parts = 64;
        pool::run(parts, |i| {
            let part = &bytes[i * (bytes.len() / parts)..][..bytes.len() / parts];
            let mut sums = [0.0_f32; 64];
            for chunk in part.as_chunks::<64>().0 {
                for (sum, x) in sums.iter_mut().zip(chunk) {
                    *sum += x;
                }
            }
            black_box(sums);
        });
    });
    println!("plain read: {:.1} GB/s", (bytes.len() * 4) as f64 / read / 1e9);
    for format in [Format::F32, Format::Bf16] {
        let row = |matrix: usize, r: usize, to: &mut [f32]| {
            to.copy_from_slice(&bytes[(matrix * out + r) * input..][..input]);
        };
        let w = Packed::pack(format, count, out, input, &row).expect("packs");
        print!("{format:?}:");
        for rows in [1, 2, 4, 8, 16] {
            let x = noise(rows * input, 4);
            for exact in [false, true] {
                if exact && (rows > 1 || format == Format::F32) {
                    continue;
                }
                let acts = Acts::new(format, exact, rows, input, &x);
                let mut c = vec![0.0; rows * out];
                let seconds = best(|| (0..count).for_each(|matrix| par_multiply(&acts, &w, matrix, &mut c)));
                print!(" {rows} rows{} {:.1}", if exact { " exact" } else { "" }, w.bytes() as f64 / seconds / 1e9);
            }
        }
        println!(" GB/s");
    }
}

fn train() {
    let step = |x: &Tensor<2>, w: &Tensor<2>, ours: bool| {
        let y =
            if ours { linear(x.clone(), &Weight::Tensor(w.clone())) } else { reference::linear(x.clone(), w.clone()) };
        black_box(y.sum().backward());
    };
    let device = Device::flex().autodiff();
    for [tokens, input, out] in
        [[128_usize, 128, 128], [512, 256, 768], [2048, 256, 256], [2048, 512, 2048], [2048, 2048, 2048]]
    {
        let x = Tensor::<2>::random([tokens, input], Distribution::Default, &device).require_grad();
        let w = Tensor::<2>::random([out, input], Distribution::Default, &device).require_grad();
        let rate = |seconds: f64| 6e-9 * (tokens * input * out) as f64 / seconds;
        print!("forward and backward {tokens} × {input} → {out}:");
        for ours in [true, false] {
            print!(" {} {:.0}", if ours { "ours" } else { "Burn's" }, rate(best(|| step(&x, &w, ours))));
        }
        print!("; two callers:");
        for ours in [true, false] {
            let barrier = Barrier::new(2);
            let work = || {
                let (x, w) = (x.clone(), w.clone());
                barrier.wait();
                best(|| step(&x, &w, ours))
            };
            let seconds = std::thread::scope(|scope| {
                let other = scope.spawn(work);
                let mine = work();
                mine.max(other.join().expect("no panic"))
            });
            print!(" {} {:.0}", if ours { "ours" } else { "Burn's" }, 2.0 * rate(seconds));
        }
        println!(" GFLOP/s");
    }
    let device = Device::flex();
    for [tokens, input, out] in [[1_usize, 2048, 2048], [64, 2048, 2048]] {
        let x = Tensor::<2>::random([tokens, input], Distribution::Default, &device).cast(DType::BF16);
        let w = Tensor::<2>::random([out, input], Distribution::Default, &device).cast(DType::BF16);
        let ours = best(|| drop(black_box(linear(x.clone(), &Weight::Tensor(w.clone())))));
        let burn = best(|| drop(black_box(reference::linear(x.clone(), w.clone()))));
        println!("bf16 tensors {tokens} × {input} → {out}: ours {:.0} µs, Burn's {:.0} µs", ours * 1e6, burn * 1e6);
    }
}

fn fork_and_join() {
    let warm = best(|| {
        (0..100).for_each(|_| {
            pool::run(2, |i| {
                black_box(i);
            })
        })
    }) / 100.0;
    let mut asleep: Vec<_> = (0..50)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(1));
            let start = Instant::now();
            pool::run(2, |i| {
                black_box(i);
            });
            start.elapsed()
        })
        .collect();
    asleep.sort();
    println!(
        "fork and join: {:.2} µs while helpers are awake, {:.1} µs (median) after a pause",
        warm * 1e6,
        asleep[25].as_secs_f64() * 1e6
    );
}

fn main() {
    m1_kernels::base::memory::keep_freed(); // as the programs do
    let wanted = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    println!("{:?}, {} threads", simd::level(), pool::threads());
    let all: [(&str, fn()); 5] =
        [("rates", rates), ("products", products), ("stream", stream), ("train", train), ("pool", fork_and_join)];
    for (name, bench) in all {
        if name.contains(&wanted) {
            bench();
        }
    }
}
