//! Both kinds of attention beside the plain tensor operations that define them, on the CPU.
//!
//! `cargo bench -p m1-kernels --bench attention [FILTER]`; `M1_THREADS` and `M1_SIMD` as everywhere. Each line: the best of
//! many runs, the rate of the products (or of the memory traffic that a decode step cannot avoid), and the definition's time
//! over ours.

use std::cell::Cell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Distribution, Tensor};
use m1_kernels::lightning_attention::{self as lightning, BLOCK};
use m1_kernels::softmax_attention::{self as softmax, KeyValues};

/// The best time of one call in a third of a second.
fn best(f: &dyn Fn()) -> f64 {
    f();
    let (begin, mut best) = (Instant::now(), Duration::MAX);
    while begin.elapsed() < Duration::from_millis(300) {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed());
    }
    best.as_secs_f64()
}

/// One line, if the filter lets it through; `work` in bytes or floating-point operations.
fn report(name: &str, work: f64, unit: &str, ours: &dyn Fn(), definition: Option<&dyn Fn()>) {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    if !name.contains(&filter) {
        return;
    }
    let time = best(ours);
    let ratio = definition.map_or(String::new(), |f| format!("{:>7.2} × the definition", best(f) / time));
    println!("{name:<52} {:>12.2} µs {:>8.1} {unit:<8} {ratio}", time * 1e6, work / time / 1e9);
}

fn normal<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

fn slopes(heads: usize) -> Vec<f64> {
    (0..heads).map(|h| (-8.0 * (h + 1) as f64 / heads as f64).exp2()).collect()
}

/// q, k, v as views of one buffer, as the model has them.
fn views(rows: usize, heads: usize, tokens: usize, dim: usize, device: &Device) -> [Tensor<4>; 3] {
    let qkv = normal([rows, tokens, heads, 3 * dim], device).swap_dims(1, 2);
    [0, 1, 2].map(|i| qkv.clone().narrow(3, i * dim, dim))
}

/// Operations of the block form: half a block's scores and their sum over the values, the state read and updated.
fn block_flops(rows: usize, heads: usize, tokens: usize, dim: usize) -> f64 {
    (rows * heads * tokens * dim) as f64 * (2.0 * BLOCK as f64 + 4.0 * dim as f64)
}

fn lightning_prefill(rows: usize, heads: usize, tokens: usize, dim: usize) {
    let device = Device::flex();
    let [q, k, v] = views(rows, heads, tokens, dim, &device);
    let s = slopes(heads);
    let state = normal([rows, heads, dim, dim], &device);
    let run = |f: fn(_, _, _, &[f64], _, _, _, _) -> (Tensor<4>, Option<Tensor<4>>)| {
        black_box(f(q.clone(), k.clone(), v.clone(), &s, Some(state.clone()), None, None, true));
    };
    report(
        &format!("lightning prefill {rows} × {heads} × {tokens} × {dim}"),
        block_flops(rows, heads, tokens, dim),
        "GFLOP/s",
        &|| run(lightning::lightning_attention),
        Some(&|| run(lightning::reference::lightning_attention)),
    );
}

fn lightning_training(rows: usize, heads: usize, tokens: usize, dim: usize) {
    let device = Device::flex().autodiff();
    let [q, k, v] = views(rows, heads, tokens, dim, &device).map(Tensor::require_grad);
    let (s, weight) = (slopes(heads), normal([rows, heads, tokens, dim], &device));
    let run = |f: fn(_, _, _, &[f64], _, _, _, _) -> (Tensor<4>, Option<Tensor<4>>)| {
        let (o, _) = f(q.clone(), k.clone(), v.clone(), &s, None, None, None, false);
        black_box((o * weight.clone()).sum().backward());
    };
    report(
        &format!("lightning forward and backward {rows} × {heads} × {tokens} × {dim}"),
        3.0 * block_flops(rows, heads, tokens, dim),
        "GFLOP/s",
        &|| run(lightning::lightning_attention),
        Some(&|| run(lightning::reference::lightning_attention)),
    );
}

fn lightning_decode(rows: usize, heads: usize, dim: usize) {
    let device = Device::flex();
    let qkv = normal([rows, heads * 3 * dim], &device);
    let gate = normal([rows, heads * dim], &device);
    let norm = normal([heads * dim], &device);
    let s = slopes(heads);
    let state = Cell::new(Some(normal([rows, heads, dim, dim], &device)));
    let run = |f: fn(_, _, _, &[f64], _, _) -> (Tensor<2>, Tensor<4>)| {
        let before = state.take().unwrap_or_else(|| unreachable!("put back below"));
        let (y, after) = f(qkv.clone(), gate.clone(), before, &s, norm.clone(), 1e-6);
        black_box(y);
        state.set(Some(after));
    };
    report(
        &format!("lightning decode {rows} × {heads} × {dim}"),
        (rows * heads * dim * dim * 8) as f64,
        "GB/s",
        &|| run(lightning::decode),
        Some(&|| run(lightning::reference::decode)),
    );
}

fn cache(kv_heads: usize, tokens: usize, dim: usize, dtype: DType) -> Vec<KeyValues> {
    let device = Device::flex();
    let block = |from: usize| normal([1, kv_heads, 256, dim], &device).cast(dtype).narrow(2, 0, 256.min(tokens - from));
    (0..tokens).step_by(256).map(|from| KeyValues { keys: block(from), values: block(from) }).collect()
}

fn softmax_over_cache(heads: usize, kv_heads: usize, dim: usize, tokens: usize, past: usize, dtype: DType) {
    let q = normal([1, tokens, heads, dim], &Device::flex()).swap_dims(1, 2);
    let blocks = cache(kv_heads, past + tokens, dim, dtype);
    let ours = || drop(black_box(softmax::softmax_attention(q.clone(), &blocks, past)));
    let definition = || drop(black_box(softmax::reference::softmax_attention(q.clone(), &blocks, past)));
    let name = format!("{heads}/{kv_heads} × {dim}, {tokens} tokens @ {past}, {dtype:?}");
    if tokens == 1 {
        let bytes = 2 * kv_heads * (past + 1) * dim * dtype.size();
        report(&format!("softmax decode {name}"), bytes as f64, "GB/s", &ours, Some(&definition));
    } else {
        let pairs = tokens * past + tokens * (tokens + 1) / 2;
        report(
            &format!("softmax prefill {name}"),
            (4 * heads * dim * pairs) as f64,
            "GFLOP/s",
            &ours,
            Some(&definition),
        );
    }
}

fn softmax_training(rows: usize, heads: usize, kv_heads: usize, tokens: usize, dim: usize) {
    let device = Device::flex().autodiff();
    let draw = |heads: usize| normal([rows, tokens, heads, dim], &device).swap_dims(1, 2).require_grad();
    let (q, blocks) = (draw(heads), [KeyValues { keys: draw(kv_heads), values: draw(kv_heads) }]);
    let weight = normal([rows, heads, tokens, dim], &device);
    let run = |f: fn(Tensor<4>, &[KeyValues], usize) -> Tensor<4>| {
        let o = f(q.clone(), &blocks, 0);
        black_box((o * weight.clone()).sum().backward());
    };
    let flops = 14.0 * (rows * heads * dim * tokens * (tokens + 1) / 2) as f64;
    let name = format!("softmax forward and backward {rows} × {heads}/{kv_heads} × {tokens} × {dim}");
    report(
        &name,
        flops,
        "GFLOP/s",
        &|| run(softmax::softmax_attention),
        Some(&|| {
            run(softmax::reference::softmax_attention);
        }),
    );
}

fn main() {
    for (heads, tokens, dim) in [(8, 512, 64), (8, 2048, 64), (16, 2048, 96), (16, 2048, 128)] {
        lightning_prefill(1, heads, tokens, dim);
    }
    lightning_training(4, 8, 512, 64);
    for (rows, heads, dim) in [(1, 4, 32), (1, 8, 64), (16, 8, 64), (1, 64, 128), (16, 64, 128)] {
        lightning_decode(rows, heads, dim);
    }
    for (tokens, past) in [(512, 0), (2048, 0), (512, 16_384)] {
        softmax_over_cache(8, 2, 64, tokens, past, DType::F32);
    }
    softmax_training(4, 8, 2, 512, 64);
    for dtype in [DType::F32, DType::BF16] {
        for past in [1000, 16_384, 100_000] {
            softmax_over_cache(8, 2, 64, 1, past, dtype);
        }
    }
}
