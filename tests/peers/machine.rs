//! What this machine can do at this moment, as lines of JSON: reading memory, multiply-adds in f32 and, where the
//! processor has them, in bf16 (AVX-512), on all cores.
//!
//!     rustc -O -C target-cpu=native machine.rs && ./machine

use std::hint::black_box;
use std::io::Write;
use std::sync::Barrier;
use std::time::Instant;

const GIB: usize = 1 << 30;
const REPETITIONS: usize = 9;
/// Registers of multiply-adds that do not wait for each other.
const CHAINS: usize = if cfg!(target_feature = "avx512f") { 24 } else { 12 };
/// Lanes of such a register.
const LANES: usize = if cfg!(target_feature = "avx512f") { 16 } else { 8 };

/// Seconds of each repetition of `job(thread)`, which all threads begin together.
fn together(threads: usize, job: impl Fn(usize) + Sync) -> Vec<f64> {
    let (ready, done) = (Barrier::new(threads + 1), Barrier::new(threads + 1));
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (job, ready, done) = (&job, &ready, &done);
            scope.spawn(move || {
                for _ in 0..REPETITIONS {
                    ready.wait();
                    job(thread);
                    done.wait();
                }
            });
        }
        let mut seconds: Vec<f64> = (0..REPETITIONS)
            .map(|_| {
                ready.wait();
                let start = Instant::now();
                done.wait();
                start.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        seconds
    })
}

fn say(test: &str, threads: usize, unit: &str, amount: f64, seconds: &[f64]) {
    let (best, median) = (amount / seconds[0] / 1e9, amount / seconds[seconds.len() / 2] / 1e9);
    let line = format!(
        "{{\"engine\": \"machine\", \"test\": \"{test}\", \"n_threads\": {threads}, \"unit\": \"{unit}\", \"best\": {best:.2}, \"median\": {median:.2}}}"
    );
    // Who closes the pipe has read enough.
    if writeln!(std::io::stdout(), "{line}").is_err() {
        std::process::exit(0);
    }
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let data: Vec<f32> = (0..GIB / 4).map(|i| i as f32).collect();
    let part = data.len() / threads;
    let seconds = together(threads, |thread| {
        // As integers, whose sum may be taken in any order: the compiler chooses the registers.
        let part = &data[thread * part..(thread + 1) * part];
        black_box(part.iter().fold(0u32, |sum, x| sum.wrapping_add(x.to_bits())));
    });
    say("read", threads, "GB/s", (4 * part * threads) as f64, &seconds);

    const STEPS: usize = 10_000_000;
    let seconds = together(threads, |_| {
        // The compiler prefers half of AVX-512's registers on some processors.
        #[cfg(target_feature = "avx512f")]
        // SAFETY: compiled only where the target has AVX-512.
        unsafe {
            f32_wide(STEPS)
        };
        #[cfg(not(target_feature = "avx512f"))]
        {
            let (a, b) = (black_box(0.999f32), black_box(1e-3f32));
            let mut sums = black_box([1f32; CHAINS * LANES]);
            for _ in 0..STEPS {
                sums = sums.map(|sum| sum.mul_add(a, b));
            }
            black_box(sums);
        }
    });
    say("f32 multiply-adds", threads, "GFLOP/s", (2 * CHAINS * LANES * STEPS * threads) as f64, &seconds);

    #[cfg(target_feature = "avx512bf16")]
    {
        let seconds = together(threads, |_| {
            // SAFETY: compiled only where the target has AVX-512 with bf16.
            unsafe { bf16(STEPS) };
        });
        say("bf16 multiply-adds", threads, "GFLOP/s", (2 * CHAINS * 2 * LANES * STEPS * threads) as f64, &seconds);
    }
}

/// `steps` times [`CHAINS`] independent multiply-adds of 16 numbers.
#[cfg(target_feature = "avx512f")]
#[target_feature(enable = "avx512f")]
fn f32_wide(steps: usize) {
    use std::arch::x86_64::{__m512, _mm512_fmadd_ps, _mm512_set1_ps};
    let (a, b) = (black_box(_mm512_set1_ps(0.999)), black_box(_mm512_set1_ps(1e-3)));
    let mut sums: [__m512; CHAINS] = black_box([_mm512_set1_ps(1.0); CHAINS]);
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, a, b);
        }
    }
    black_box(sums);
}

/// `steps` times [`CHAINS`] independent products of 16 pairs.
#[cfg(target_feature = "avx512bf16")]
#[target_feature(enable = "avx512bf16,avx512f")]
fn bf16(steps: usize) {
    use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps, _mm512_set1_epi16, _mm512_set1_ps};
    // SAFETY: both are 64 bytes of plain numbers.
    let ones = black_box(unsafe { std::mem::transmute::<_, __m512bh>(_mm512_set1_epi16(0x3f80)) });
    let mut sums: [__m512; CHAINS] = black_box([_mm512_set1_ps(0.0); CHAINS]);
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, ones, ones);
        }
    }
    black_box(sums);
}
