//! Experts on the CPU: a decoded token, a prompt, and a training step, beside the plain tensor operations that define them.
//!
//! `cargo bench -p m1-kernels --bench experts [FILTER]`; `M1_THREADS` and `M1_SIMD` as everywhere. Each line: the best of many
//! runs; for a token the bytes of its experts' weights over that time, else the products' rate; and where it says so the
//! definition's time over ours. `two steps` runs a training step on each of two threads at once and counts both.

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Distribution, Tensor};
use m1_kernels::base::packed::{Format, Packed};
use m1_kernels::experts::{ExpertsWeights, Routing, experts, reference, route};

/// The best time of one call in two fifths of a second.
fn best(mut f: impl FnMut()) -> f64 {
    f();
    let (begin, mut best) = (Instant::now(), Duration::MAX);
    while begin.elapsed() < Duration::from_millis(400) {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed());
    }
    best.as_secs_f64()
}

fn line(name: &str, time: f64, work: f64, unit: &str, definition: Option<f64>) {
    let (micro, rate) = (time * 1e6, work / time / 1e9);
    let ratio = definition.map(|d| format!("{:>6.2} × the definition", d / time)).unwrap_or_default();
    println!("{name:<46} {micro:>10.1} µs {rate:>8.1} {unit:<7} {ratio}");
}

fn wanted(name: &str) -> bool {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    name.contains(&filter)
}

fn draw<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 0.1), device)
}

/// Random weights without a random number each: the products' speed does not depend on them, only on their not being zero.
fn pack(format: Format, count: usize, out: usize, input: usize) -> Packed {
    let noise: Vec<f32> =
        (0..8192_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0).collect();
    Packed::pack(format, count, out, input, &|matrix, row, buffer| {
        for (i, part) in buffer.chunks_mut(1024).enumerate() {
            let from = (matrix * 977 + row * 31 + i * 211) % 7168;
            part.copy_from_slice(&noise[from..][..part.len()]);
        }
    })
    .expect("memory for the weights")
}

const FORMATS: [(&str, Format); 4] = [
    ("f32", Format::F32),
    ("bf16", Format::Bf16),
    ("int8", Format::Int8 { block: 32 }),
    ("int4", Format::Int4 { block: 32 }),
];

/// Layers one after the other, so that a token's weights come from memory and not from the cache.
fn token(name: &str, hidden: usize, ffn: usize, count: usize) {
    for (format_name, format) in FORMATS {
        let name = format!("token {name} {format_name}");
        if !wanted(&name) {
            continue;
        }
        let device = Device::flex();
        let one = pack(format, count, ffn, hidden).bytes() * 3;
        let layers = ((400 << 20) / one).max(1);
        let layers: Vec<ExpertsWeights> = (0..layers)
            .map(|_| ExpertsWeights {
                w1: pack(format, count, ffn, hidden).into(),
                w2: pack(format, count, hidden, ffn).into(),
                w3: pack(format, count, ffn, hidden).into(),
            })
            .collect();
        let x = draw([1, hidden], &device);
        let routings: Vec<Routing> = (0..16)
            .map(|i| route(draw([1, count], &device), 2, Some(&[i % count as u32, (i + 1) % count as u32])))
            .collect();
        let mut turn = 0;
        let time = best(|| {
            for layer in &layers {
                turn += 1;
                drop(black_box(experts(x.clone(), &routings[turn * 2 % routings.len()], layer)));
            }
        });
        let read = one as f64 * 2.0 / count as f64;
        line(&name, time / layers.len() as f64, read, "GB/s", None);
    }
}

fn prompt(name: &str, tokens: usize, hidden: usize, ffn: usize, count: usize) {
    for (format_name, format) in FORMATS {
        let name = format!("prompt {name} × {tokens} {format_name}");
        if !wanted(&name) {
            continue;
        }
        let device = Device::flex();
        let weights = ExpertsWeights {
            w1: pack(format, count, ffn, hidden).into(),
            w2: pack(format, count, hidden, ffn).into(),
            w3: pack(format, count, ffn, hidden).into(),
        };
        let x = draw([tokens, hidden], &device);
        let routing = route(draw([tokens, count], &device), 2, None);
        let time = best(|| drop(black_box(experts(x.clone(), &routing, &weights))));
        line(&name, time, 12.0 * (tokens * hidden * ffn) as f64, "GFLOP/s", None);
    }
}

struct Training {
    x: Tensor<2>,
    logits: Tensor<2>,
    w: [Tensor<3>; 3],
    d_y: Tensor<2>,
}

impl Training {
    fn new(tokens: usize, hidden: usize, ffn: usize, count: usize) -> Self {
        let device = Device::flex();
        let stack = |a, b| draw([count, a, b], &device);
        Training {
            x: draw([tokens, hidden], &device),
            logits: draw([tokens, count], &device),
            w: [stack(ffn, hidden), stack(hidden, ffn), stack(ffn, hidden)],
            d_y: draw([tokens, hidden], &device),
        }
    }

    /// Forward and backward.
    fn step(&self, fast: bool) {
        let leaf = |x: &Tensor<2>| Tensor::from_inner(x.clone()).require_grad();
        let [w1, w2, w3] = self.w.each_ref().map(|w| Tensor::<3>::from_inner(w.clone()).require_grad());
        let routing = route(leaf(&self.logits), 2, None);
        let weights = ExpertsWeights { w1: w1.clone().into(), w2: w2.into(), w3: w3.into() };
        let run = if fast { experts } else { reference::experts };
        let y = run(leaf(&self.x), &routing, &weights);
        let grads = (y * Tensor::from_inner(self.d_y.clone())).sum().backward();
        black_box(w1.grad(&grads));
    }

    fn forward(&self, fast: bool) {
        let routing = route(self.logits.clone(), 2, None);
        let [w1, w2, w3] = self.w.each_ref().map(|w| w.clone().into());
        let run = if fast { experts } else { reference::experts };
        black_box(run(self.x.clone(), &routing, &ExpertsWeights { w1, w2, w3 }));
    }
}

fn training(name: &str, tokens: usize, hidden: usize, ffn: usize, count: usize) {
    let work = 12.0 * (tokens * hidden * ffn) as f64;
    let step = Training::new(tokens, hidden, ffn, count);
    let label = format!("forward {name} × {tokens} f32 tensors");
    if wanted(&label) {
        line(&label, best(|| step.forward(true)), work, "GFLOP/s", Some(best(|| step.forward(false))));
    }
    let label = format!("training {name} × {tokens}");
    if wanted(&label) {
        line(&label, best(|| step.step(true)), 3.0 * work, "GFLOP/s", Some(best(|| step.step(false))));
    }
    let label = format!("training {name} × {tokens}, two steps");
    if wanted(&label) {
        let both = |fast: bool| {
            let step = &step;
            best(|| {
                std::thread::scope(|scope| {
                    scope.spawn(move || (0..4).for_each(|_| step.step(fast)));
                    (0..4).for_each(|_| step.step(fast));
                });
            }) / 8.0
        };
        line(&label, both(true), 3.0 * work, "GFLOP/s", Some(both(false)));
    }
}

fn main() {
    m1_kernels::base::memory::keep_freed();
    token("nano (128, 256, 4)", 128, 256, 4);
    token("small (512, 1024, 8)", 512, 1024, 8);
    token("base (1024, 2048, 8)", 1024, 2048, 8);
    token("M1's width (6144, 9216, 2 of 2)", 6144, 9216, 2);
    for tokens in [16, 512, 2048] {
        prompt("small", tokens, 512, 1024, 8);
        prompt("base", tokens, 1024, 2048, 8);
    }
    for tokens in [512, 1024] {
        training("nano", tokens, 128, 256, 4);
        training("small", tokens, 512, 1024, 8);
    }
}
