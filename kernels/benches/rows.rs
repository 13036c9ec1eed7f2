//! The operations on rows, beside the plain tensor operations that define them, on the CPU.
//!
//! `cargo bench -p m1-kernels --bench rows [FILTER]`; `M1_THREADS` and `M1_SIMD` as everywhere. Each line: the best of many
//! runs, the memory traffic that the operation cannot avoid over that time (log_prob: the products' rate), and the
//! definition's time over ours.

use std::time::{Duration, Instant};

use burn::tensor::{Device, Distribution, Tensor};
use m1_kernels::{base::memory, log_prob, rms_norm, rotary, silu};

/// One line of the table.
struct Case<'a> {
    name: &'a str,
    /// Bytes (or floating-point operations) of one run.
    work: f64,
    unit: &'a str,
    ours: &'a dyn Fn(),
    definition: &'a dyn Fn(),
}

/// The best time of one call in a fifth of a second.
fn best(f: &dyn Fn()) -> f64 {
    f();
    let (begin, mut best) = (Instant::now(), Duration::MAX);
    while begin.elapsed() < Duration::from_millis(200) {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed());
    }
    best.as_secs_f64()
}

fn report(case: Case) {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    if !case.name.contains(&filter) {
        return;
    }
    let (ours, definition) = (best(case.ours), best(case.definition));
    let (micro, rate, ratio) = (ours * 1e6, case.work / ours / 1e9, definition / ours);
    println!("{:<44} {micro:>12.2} µs {rate:>8.1} {:<8} {ratio:>6.2} × the definition", case.name, case.unit);
}

fn main() {
    memory::keep_freed();
    let device = Device::flex();
    let training = Device::flex().autodiff();
    let draw = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
    let eps = 1e-5;
    for (n, dim) in [(1, 6144), (64, 6144), (2048, 768), (2048, 6144)] {
        let (x, y) = (draw([n, dim]), draw([n, dim]));
        let w = draw([1, dim]).reshape([dim]);
        let size = (n * dim * 4) as f64;
        let (x, y, w) = (&x, &y, &w);
        let own = |x: &Tensor<2>| x.clone();
        let line = |name: &str, streams: f64, ours: &dyn Fn(), definition: &dyn Fn()| {
            report(Case {
                name: &format!("{name} {n} × {dim}"), work: streams * size, unit: "GB/s", ours, definition
            });
        };
        line("rms_norm", 2.0, &|| drop(rms_norm::rms_norm(own(x), w.clone(), eps)), &|| {
            drop(rms_norm::reference::rms_norm(own(x), w.clone(), eps))
        });
        line("add_rms_norm", 4.0, &|| drop(rms_norm::add_rms_norm(own(x), own(y), w.clone(), 1.3, 0.7, eps)), &|| {
            drop(rms_norm::reference::add_rms_norm(own(x), own(y), w.clone(), 1.3, 0.7, eps))
        });
        line("gated_rms_norm", 3.0, &|| drop(rms_norm::gated_rms_norm(own(x), own(y), w.clone(), eps)), &|| {
            drop(rms_norm::reference::gated_rms_norm(own(x), own(y), w.clone(), eps))
        });
        line("silu", 2.0, &|| drop(silu::silu(own(x))), &|| drop(silu::reference::silu(own(x))));
        let train = |fast: bool| {
            let leaf = |x: &Tensor<2>| Tensor::from_inner(own(x)).require_grad();
            let (x, y, w) = (leaf(x), leaf(y), Tensor::from_inner(w.clone()).require_grad());
            let (sum, normed) = match fast {
                true => rms_norm::add_rms_norm(x, y.clone(), w.clone(), 1.3, 0.7, eps),
                false => rms_norm::reference::add_rms_norm(x, y.clone(), w.clone(), 1.3, 0.7, eps),
            };
            let gated = match fast {
                true => silu::silu(rms_norm::gated_rms_norm(normed, y, w, eps)),
                false => silu::reference::silu(rms_norm::reference::gated_rms_norm(normed, y, w, eps)),
            };
            drop((gated + sum).sum().backward());
        };
        line("add, norm, gated norm, silu: and back", 27.0, &|| train(true), &|| train(false));
    }
    for (tokens, heads, head_dim) in [(1, 64, 128), (2048, 8, 128)] {
        let positions: Vec<usize> = (0..tokens).map(|i| 100_000 + i).collect();
        let rotation = rotary::Rotation::new(&positions, 64, 1e7, &device);
        let x = draw([tokens, heads * head_dim]).reshape([tokens, heads, head_dim]);
        report(Case {
            name: &format!("rotary {tokens} × {heads} × {head_dim}"),
            work: (2 * tokens * heads * head_dim * 4) as f64,
            unit: "GB/s",
            ours: &|| drop(rotary::rotary(x.clone(), &rotation)),
            definition: &|| drop(rotary::reference::rotary(x.clone(), &rotation)),
        });
    }
    for (n, vocab, dim) in [(16, 32_000, 768), (512, 32_000, 768)] {
        let (hidden, head) = (draw([n, dim]), draw([vocab, dim]) * 0.05);
        let targets: Vec<u32> = (0..n).map(|i| (i * 7919 % vocab) as u32).collect();
        let products = (2 * n * vocab * dim) as f64;
        report(Case {
            name: &format!("log_prob {n} × {vocab} × {dim}"),
            work: products,
            unit: "GFLOP/s",
            ours: &|| drop(log_prob::log_prob(hidden.clone(), &head.clone().into(), &targets, 1.0)),
            definition: &|| drop(log_prob::reference::log_prob(hidden.clone(), head.clone(), &targets, 1.0)),
        });
        let (hidden, head) = (Tensor::from_inner(hidden), Tensor::from_inner(head));
        assert!(hidden.device() == training, "leaves lie on the autodiff device");
        let train = |fast: bool| {
            let (hidden, head) = (hidden.clone().require_grad(), head.clone().require_grad());
            let (log_p, entropy) = match fast {
                true => log_prob::log_prob(hidden, &head.into(), &targets, 1.0),
                false => log_prob::reference::log_prob(hidden, head, &targets, 1.0),
            };
            drop((log_p + entropy * 0.01).sum().backward());
        };
        // Ours forms the logits twice: four products and not three.
        report(Case {
            name: &format!("log_prob and back {n} × {vocab} × {dim}"),
            work: 4.0 * products,
            unit: "GFLOP/s",
            ours: &|| train(true),
            definition: &|| train(false),
        });
    }
}
