//! Experts on the CPU: a decoded token, a prompt, and a training step, beside the plain tensor operations that define them.
//!
//! `cargo bench --manifest-path kernels/benches/Cargo.toml --bench experts [FILTER]`; `M1_THREADS` and `M1_SIMD` as everywhere. A token counts the bytes
//! of its experts' weights, the others floating-point operations (Gelem/s: GFLOP/s). `two steps` runs a training step on
//! each of two threads at once and counts both.

use std::cell::LazyCell;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Distribution, Tensor};
use criterion::{Criterion, Throughput};
use m1_benches::group;
use m1_kernels::base::packed::{Format, Packed};
use m1_kernels::experts::{ExpertsWeights, Routing, experts, reference, route};

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

fn layer(format: Format, hidden: usize, ffn: usize, count: usize) -> ExpertsWeights {
    ExpertsWeights {
        w1: pack(format, count, ffn, hidden).into(),
        w2: pack(format, count, hidden, ffn).into(),
        w3: pack(format, count, ffn, hidden).into(),
    }
}

const FORMATS: [(&str, Format); 4] = [
    ("f32", Format::F32),
    ("bf16", Format::Bf16),
    ("int8", Format::Int8 { block: 32 }),
    ("int4", Format::Int4 { block: 32 }),
];

/// Layers one after the other, so that a token's weights come from memory and not from the cache.
fn token(c: &mut Criterion, name: &str, hidden: usize, ffn: usize, count: usize) {
    let device = Device::flex();
    for (format_name, format) in FORMATS {
        // What a layer takes, from a matrix of one panel.
        let one = pack(format, 1, 32, hidden).bytes() * ffn / 32 * count * 3;
        let layers = LazyCell::new(|| -> Vec<ExpertsWeights> {
            (0..((400 << 20) / one).max(1)).map(|_| layer(format, hidden, ffn, count)).collect()
        });
        let x = draw([1, hidden], &device);
        let routings: Vec<Routing> = (0..16)
            .map(|i| route(draw([1, count], &device), 2, Some(&[i % count as u32, (i + 1) % count as u32])))
            .collect();
        let work = Throughput::BytesDecimal((one * 2 / count) as u64);
        let mut turn = 0;
        group(c, &format!("token {name}"), work).bench_function(format_name, |b| {
            let layers = &*layers;
            b.iter(|| {
                turn += 1;
                experts(x.clone(), &routings[turn * 2 % routings.len()], &layers[turn % layers.len()])
            });
        });
    }
}

fn prompt(c: &mut Criterion, name: &str, tokens: usize, hidden: usize, ffn: usize, count: usize) {
    let device = Device::flex();
    for (format_name, format) in FORMATS {
        let weights = LazyCell::new(|| layer(format, hidden, ffn, count));
        let x = draw([tokens, hidden], &device);
        let routing = route(draw([tokens, count], &device), 2, None);
        let work = Throughput::Elements((12 * tokens * hidden * ffn) as u64);
        group(c, &format!("prompt {name} × {tokens}"), work).bench_function(format_name, |b| {
            let weights = &*weights;
            b.iter(|| experts(x.clone(), &routing, weights));
        });
    }
}

struct Training {
    x: Tensor<2>,
    logits: Tensor<2>,
    w: [Tensor<3>; 3],
    d_y: Tensor<2>,
}

type Experts = fn(Tensor<2>, &Routing, &ExpertsWeights) -> Tensor<2>;

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

    /// Forward and backward; gives a gradient.
    fn step(&self, run: Experts) -> Option<Tensor<3>> {
        let leaf = |x: &Tensor<2>| Tensor::from_inner(x.clone()).require_grad();
        let [w1, w2, w3] = self.w.each_ref().map(|w| Tensor::<3>::from_inner(w.clone()).require_grad());
        let routing = route(leaf(&self.logits), 2, None);
        let weights = ExpertsWeights { w1: w1.clone().into(), w2: w2.into(), w3: w3.into() };
        let y = run(leaf(&self.x), &routing, &weights);
        let grads = (y * Tensor::from_inner(self.d_y.clone())).sum().backward();
        w1.grad(&grads)
    }

    fn forward(&self, run: Experts) -> Tensor<2> {
        let routing = route(self.logits.clone(), 2, None);
        let [w1, w2, w3] = self.w.each_ref().map(|w| w.clone().into());
        run(self.x.clone(), &routing, &ExpertsWeights { w1, w2, w3 })
    }

    /// The time of `iterations` steps of each of two threads.
    fn two(&self, run: Experts, iterations: u64) -> Duration {
        let start = Instant::now();
        let steps = || (0..iterations).for_each(|_| drop(self.step(run)));
        std::thread::scope(|scope| {
            scope.spawn(steps);
            steps();
        });
        start.elapsed()
    }
}

fn training(c: &mut Criterion, name: &str, tokens: usize, hidden: usize, ffn: usize, count: usize) {
    let work = |times: usize| Throughput::Elements((times * 12 * tokens * hidden * ffn) as u64);
    let inputs = LazyCell::new(|| Training::new(tokens, hidden, ffn, count));
    for (which, run) in [("ours", experts as Experts), ("definition", reference::experts)] {
        group(c, &format!("forward {name} × {tokens} f32 tensors"), work(1))
            .bench_function(which, |b| b.iter(|| inputs.forward(run)));
        group(c, &format!("training {name} × {tokens}"), work(3))
            .bench_function(which, |b| b.iter(|| inputs.step(run)));
        group(c, &format!("training {name} × {tokens}, two steps"), work(6))
            .bench_function(which, |b| b.iter_custom(|iterations| inputs.two(run, iterations)));
    }
}

fn main() {
    let mut c = m1_benches::criterion();
    token(&mut c, "nano (128, 256, 4)", 128, 256, 4);
    token(&mut c, "small (512, 1024, 8)", 512, 1024, 8);
    token(&mut c, "base (1024, 2048, 8)", 1024, 2048, 8);
    token(&mut c, "M1's width (6144, 9216, 2 of 2)", 6144, 9216, 2);
    for tokens in [16, 512, 2048] {
        prompt(&mut c, "small", tokens, 512, 1024, 8);
        prompt(&mut c, "base", tokens, 1024, 2048, 8);
    }
    for tokens in [512, 1024] {
        training(&mut c, "nano", tokens, 128, 256, 4);
        training(&mut c, "small", tokens, 512, 1024, 8);
    }
    c.final_summary();
}
