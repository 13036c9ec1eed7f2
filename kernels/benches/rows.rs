//! The operations on rows, and the optimizer's step, beside the plain tensor operations that define them, on the CPU.
//!
//! `cargo bench --manifest-path kernels/benches/Cargo.toml --bench rows [FILTER]`; `M1_THREADS` and `M1_SIMD` as everywhere. Bytes are the memory traffic
//! that the operation cannot avoid; log_prob counts the products' floating-point operations (Gelem/s: GFLOP/s).

use std::cell::{Cell, LazyCell};

use burn::tensor::{Device, Distribution, Tensor};
use criterion::{Criterion, Throughput};
use m1_benches::group;
use m1_kernels::adamw::{self, AdamWStep};
use m1_kernels::base::packed::{Format, Packed};
use m1_kernels::linear::Weight;
use m1_kernels::{log_prob, rms_norm, rotary, silu};

const EPS: f64 = 1e-5;

fn draw(shape: [usize; 2]) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
}

/// One operation both ways; it moves so many matrices of `[n, dim]` in f32.
fn both<T>(
    c: &mut Criterion,
    name: &str,
    [n, dim]: [usize; 2],
    matrices: usize,
    ours: impl Fn() -> T,
    definition: impl Fn() -> T,
) {
    let work = Throughput::BytesDecimal((matrices * n * dim * 4) as u64);
    let mut group = group(c, &format!("{name} {n} × {dim}"), work);
    group.bench_function("ours", |b| b.iter(&ours));
    group.bench_function("definition", |b| b.iter(&definition));
}

fn norms(c: &mut Criterion, size: [usize; 2]) {
    let (x, y, w) = (&draw(size), &draw(size), &draw([1, size[1]]).reshape([size[1]]));
    let (x2, y2) = (|| x.clone(), || y.clone());
    let w2 = || w.clone();
    both(
        c,
        "rms_norm",
        size,
        2,
        || rms_norm::rms_norm(x2(), w2(), EPS),
        || rms_norm::reference::rms_norm(x2(), w2(), EPS),
    );
    both(
        c,
        "add_rms_norm",
        size,
        4,
        || rms_norm::add_rms_norm(x2(), y2(), w2(), 1.3, 0.7, EPS),
        || rms_norm::reference::add_rms_norm(x2(), y2(), w2(), 1.3, 0.7, EPS),
    );
    both(
        c,
        "gated_rms_norm",
        size,
        3,
        || rms_norm::gated_rms_norm(x2(), y2(), w2(), EPS),
        || rms_norm::reference::gated_rms_norm(x2(), y2(), w2(), EPS),
    );
    both(c, "silu", size, 2, || silu::silu(x2()), || silu::reference::silu(x2()));
    let train = |fast: bool| {
        let leaf = |x: &Tensor<2>| Tensor::from_inner(x.clone()).require_grad();
        let (x, y, w) = (leaf(x), leaf(y), Tensor::from_inner(w2()).require_grad());
        let (sum, normed) = match fast {
            true => rms_norm::add_rms_norm(x, y.clone(), w.clone(), 1.3, 0.7, EPS),
            false => rms_norm::reference::add_rms_norm(x, y.clone(), w.clone(), 1.3, 0.7, EPS),
        };
        let gated = match fast {
            true => silu::silu(rms_norm::gated_rms_norm(normed, y, w, EPS)),
            false => silu::reference::silu(rms_norm::reference::gated_rms_norm(normed, y, w, EPS)),
        };
        (gated + sum).sum().backward()
    };
    both(c, "add, norm, gated norm, silu: and back", size, 27, || train(true), || train(false));
}

fn rotation(c: &mut Criterion, tokens: usize, heads: usize, head_dim: usize) {
    let positions: Vec<usize> = (0..tokens).map(|i| 100_000 + i).collect();
    let rotation = rotary::Rotation::new(&positions, 64, 1e7, &Device::flex());
    let x = draw([tokens, heads * head_dim]).reshape([tokens, heads, head_dim]);
    both(
        c,
        &format!("rotary {head_dim} of"),
        [tokens, heads * head_dim],
        2,
        || rotary::rotary(x.clone(), &rotation),
        || rotary::reference::rotary(x.clone(), &rotation),
    );
}

fn log_probs(c: &mut Criterion, n: usize, vocab: usize, dim: usize) {
    let targets: Vec<u32> = (0..n).map(|i| (i * 7919 % vocab) as u32).collect();
    let inputs = LazyCell::new(|| (draw([n, dim]), draw([vocab, dim]) * 0.05));
    let products = (2 * n * vocab * dim) as u64;
    let mut forward = group(c, &format!("log_prob {n} × {vocab} × {dim}"), Throughput::Elements(products));
    forward.bench_function("ours", |b| {
        let (hidden, head) = &*inputs;
        let head = Weight::Tensor(head.clone());
        b.iter(|| log_prob::log_prob(hidden.clone(), &head, &targets, 1.0));
    });
    let packed = LazyCell::new(|| {
        let rows: Vec<f32> = inputs.1.clone().into_data().try_to_vec().expect("f32");
        let row = |_: usize, r: usize, to: &mut [f32]| to.copy_from_slice(&rows[r * dim..][..dim]);
        Weight::from(Packed::pack(Format::Bf16, 1, vocab, dim, &row).expect("packs"))
    });
    forward.bench_function("ours, packed bf16", |b| {
        let (hidden, _) = &*inputs;
        b.iter(|| log_prob::log_prob(hidden.clone(), &packed, &targets, 1.0));
    });
    forward.bench_function("definition", |b| {
        let (hidden, head) = &*inputs;
        b.iter(|| log_prob::reference::log_prob(hidden.clone(), head.clone(), &targets, 1.0));
    });
    drop(forward);
    // Ours forms the logits twice: four products and not three.
    let mut back = group(c, &format!("log_prob and back {n} × {vocab} × {dim}"), Throughput::Elements(4 * products));
    let train = |fast: bool| {
        let (hidden, head) = &*inputs;
        let leaf = |x: &Tensor<2>| Tensor::from_inner(x.clone()).require_grad();
        let (hidden, head) = (leaf(hidden), leaf(head));
        let (log_p, entropy) = match fast {
            true => log_prob::log_prob(hidden, &head.into(), &targets, 1.0),
            false => log_prob::reference::log_prob(hidden, head, &targets, 1.0),
        };
        (log_p + entropy * 0.01).sum().backward()
    };
    back.bench_function("ours", |b| b.iter(|| train(true)));
    back.bench_function("definition", |b| b.iter(|| train(false)));
}

/// One parameter, its gradient and moments; all but the gradient are written in place.
fn optimizer(c: &mut Criterion, n: usize) {
    type Step = fn(Tensor<1>, Tensor<1>, Tensor<1>, Tensor<1>, AdamWStep) -> (Tensor<1>, Tensor<1>, Tensor<1>);
    let step =
        AdamWStep { lr: 1e-5, beta_1: 0.9, beta_2: 0.95, epsilon: 1e-15, weight_decay: 0.1, time: 10, scale: 0.5 };
    let flat = || draw([1, n]).reshape([n]);
    let inputs = LazyCell::new(|| {
        let zeros = || Tensor::zeros([n], &Device::flex());
        (flat(), Cell::new(Some((flat(), zeros(), zeros()))))
    });
    let mut forward = group(c, &format!("adamw {n}"), Throughput::BytesDecimal((7 * n * 4) as u64));
    for (name, f) in [("ours", adamw::adamw as Step), ("definition", adamw::reference::adamw)] {
        forward.bench_function(name, |b| {
            let (gradient, kept) = &*inputs;
            b.iter(|| {
                let (value, m, v) = kept.take().unwrap_or_else(|| unreachable!("put back below"));
                kept.set(Some(f(value, gradient.clone(), m, v, step)));
            });
        });
    }
    drop(forward);
    let mut squares = group(c, &format!("sum_of_squares {n}"), Throughput::BytesDecimal((n * 4) as u64));
    for (name, f) in [
        ("ours", adamw::sum_of_squares as fn(Tensor<1>) -> Tensor<1>),
        ("definition", adamw::reference::sum_of_squares),
    ] {
        squares.bench_function(name, |b| {
            let (gradient, _) = &*inputs;
            b.iter(|| f(gradient.clone()));
        });
    }
}

fn main() {
    let mut c = m1_benches::criterion();
    for size in [[1, 6144], [64, 6144], [2048, 768], [2048, 6144]] {
        norms(&mut c, size);
    }
    rotation(&mut c, 1, 64, 128);
    rotation(&mut c, 2048, 8, 128);
    log_probs(&mut c, 16, 32_000, 768);
    log_probs(&mut c, 512, 32_000, 768);
    // As many as fit the caches, and a stack of small's experts.
    for n in [128 * 256, 8 * 512 * 1024] {
        optimizer(&mut c, n);
    }
    c.final_summary();
}
