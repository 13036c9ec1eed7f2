//! Both kinds of attention beside the plain tensor operations that define them, on the CPU.
//!
//! `cargo bench --manifest-path kernels/benches/Cargo.toml --bench attention [FILTER]`; `M1_THREADS` and `M1_SIMD` as everywhere. Elements are the
//! floating-point operations of the products (Gelem/s: GFLOP/s); a decode step counts the bytes that it cannot avoid.

use std::cell::{Cell, LazyCell};

use burn::tensor::{DType, Device, Distribution, Tensor};
use criterion::{Criterion, Throughput};
use m1_benches::group;
use m1_kernels::lightning_attention::{self as lightning, BLOCK};
use m1_kernels::softmax_attention::{self as softmax, KeyValues};

fn normal<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

fn slopes(heads: usize) -> Vec<f64> {
    (0..heads).map(|h| (-8.0 * (h + 1) as f64 / heads as f64).exp2()).collect()
}

/// q, k and v of each head side by side and tokens before heads in memory, as the model has them.
fn random(rows: usize, heads: usize, tokens: usize, dim: usize, device: &Device) -> Tensor<4> {
    normal([rows, tokens, heads, 3 * dim], device).swap_dims(1, 2)
}

/// Operations of the block form: half a block's scores and their sum over the values, the state read and updated.
fn block_flops(rows: usize, heads: usize, tokens: usize, dim: usize) -> u64 {
    (rows * heads * tokens * dim * (2 * BLOCK + 4 * dim)) as u64
}

type Lightning = fn(
    Tensor<4>,
    &[f64],
    Option<Tensor<4>>,
    Option<&[usize]>,
    Option<&[usize]>,
    bool,
) -> (Tensor<4>, Option<Tensor<4>>);

const LIGHTNING: [(&str, Lightning); 2] =
    [("ours", lightning::lightning_attention), ("definition", lightning::reference::lightning_attention)];

fn lightning_prefill(c: &mut Criterion, rows: usize, heads: usize, tokens: usize, dim: usize) {
    let device = Device::flex();
    let inputs =
        LazyCell::new(|| (random(rows, heads, tokens, dim, &device), normal([rows, heads, dim, dim], &device)));
    let (s, work) = (slopes(heads), Throughput::Elements(block_flops(rows, heads, tokens, dim)));
    let mut group = group(c, &format!("lightning prefill {rows} × {heads} × {tokens} × {dim}"), work);
    for (name, f) in LIGHTNING {
        group.bench_function(name, |b| {
            let (qkv, state) = &*inputs;
            b.iter(|| f(qkv.clone(), &s, Some(state.clone()), None, None, true));
        });
    }
}

fn lightning_training(c: &mut Criterion, rows: usize, heads: usize, tokens: usize, dim: usize) {
    let device = Device::flex().autodiff();
    let inputs = LazyCell::new(|| {
        let qkv = random(rows, heads, tokens, dim, &device).require_grad();
        (qkv, normal([rows, heads, tokens, dim], &device))
    });
    let (s, work) = (slopes(heads), Throughput::Elements(3 * block_flops(rows, heads, tokens, dim)));
    let mut group = group(c, &format!("lightning forward and backward {rows} × {heads} × {tokens} × {dim}"), work);
    for (name, f) in LIGHTNING {
        group.bench_function(name, |b| {
            let (qkv, weight) = &*inputs;
            b.iter(|| {
                let (o, _) = f(qkv.clone(), &s, None, None, None, false);
                (o * weight.clone()).sum().backward()
            });
        });
    }
}

/// One token a row; the state is read and written in place.
fn lightning_decode(c: &mut Criterion, rows: usize, heads: usize, dim: usize) {
    type Decode = fn(Tensor<2>, Tensor<2>, Tensor<4>, &[f64], Tensor<1>, f64) -> (Tensor<2>, Tensor<4>);
    let device = Device::flex();
    let inputs = LazyCell::new(|| {
        let state = Cell::new(Some(normal([rows, heads, dim, dim], &device)));
        (normal([rows, heads * 3 * dim], &device), normal([rows, heads * dim], &device), state)
    });
    let (norm, s) = (normal([heads * dim], &device), slopes(heads));
    let work = Throughput::BytesDecimal((rows * heads * dim * dim * 8) as u64);
    let mut group = group(c, &format!("lightning decode {rows} × {heads} × {dim}"), work);
    for (name, f) in [("ours", lightning::decode as Decode), ("definition", lightning::reference::decode)] {
        group.bench_function(name, |b| {
            let (qkv, gate, state) = &*inputs;
            b.iter(|| {
                let before = state.take().unwrap_or_else(|| unreachable!("put back below"));
                let (y, after) = f(qkv.clone(), gate.clone(), before, &s, norm.clone(), 1e-6);
                state.set(Some(after));
                y
            });
        });
    }
}

type Softmax = fn(Tensor<4>, &[KeyValues], usize) -> Tensor<4>;

const SOFTMAX: [(&str, Softmax); 2] =
    [("ours", softmax::softmax_attention), ("definition", softmax::reference::softmax_attention)];

fn cache(kv_heads: usize, tokens: usize, dim: usize, dtype: DType) -> Vec<KeyValues> {
    let device = Device::flex();
    let block = |from: usize| normal([1, kv_heads, 256, dim], &device).cast(dtype).narrow(2, 0, 256.min(tokens - from));
    (0..tokens).step_by(256).map(|from| KeyValues { keys: block(from), values: block(from) }).collect()
}

fn softmax_over_cache(
    c: &mut Criterion,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    tokens: usize,
    past: usize,
    dtype: DType,
) {
    let inputs = LazyCell::new(|| {
        let q = normal([1, tokens, heads, dim], &Device::flex()).swap_dims(1, 2);
        (q, cache(kv_heads, past + tokens, dim, dtype))
    });
    let (kind, work) = if tokens == 1 {
        ("decode", Throughput::BytesDecimal((2 * kv_heads * (past + 1) * dim * dtype.size()) as u64))
    } else {
        let pairs = tokens * past + tokens * (tokens + 1) / 2;
        ("prefill", Throughput::Elements((4 * heads * dim * pairs) as u64))
    };
    let name = format!("softmax {kind} {heads} of {kv_heads} × {dim}, {tokens} tokens @ {past}, {dtype:?}");
    let mut group = group(c, &name, work);
    for (name, f) in SOFTMAX {
        group.bench_function(name, |b| {
            let (q, blocks) = &*inputs;
            b.iter(|| f(q.clone(), blocks, past));
        });
    }
}

fn softmax_training(c: &mut Criterion, rows: usize, heads: usize, kv_heads: usize, tokens: usize, dim: usize) {
    let device = Device::flex().autodiff();
    let inputs = LazyCell::new(|| {
        let draw = |heads: usize| normal([rows, tokens, heads, dim], &device).swap_dims(1, 2).require_grad();
        let blocks = [KeyValues { keys: draw(kv_heads), values: draw(kv_heads) }];
        (draw(heads), blocks, normal([rows, heads, tokens, dim], &device))
    });
    let work = Throughput::Elements((14 * rows * heads * dim * tokens * (tokens + 1) / 2) as u64);
    let name = format!("softmax forward and backward {rows} × {heads} of {kv_heads} × {tokens} × {dim}");
    let mut group = group(c, &name, work);
    for (name, f) in SOFTMAX {
        group.bench_function(name, |b| {
            let (q, blocks, weight) = &*inputs;
            b.iter(|| (f(q.clone(), blocks, 0) * weight.clone()).sum().backward());
        });
    }
}

fn main() {
    let mut c = m1_benches::criterion();
    for (heads, tokens, dim) in [(8, 512, 64), (8, 2048, 64), (16, 2048, 96), (16, 2048, 128)] {
        lightning_prefill(&mut c, 1, heads, tokens, dim);
    }
    lightning_training(&mut c, 4, 8, 512, 64);
    for (rows, heads, dim) in [(1, 4, 32), (1, 8, 64), (16, 8, 64), (1, 64, 128), (16, 64, 128)] {
        lightning_decode(&mut c, rows, heads, dim);
    }
    for (tokens, past) in [(512, 0), (2048, 0), (512, 16_384)] {
        softmax_over_cache(&mut c, 8, 2, 64, tokens, past, DType::F32);
    }
    softmax_training(&mut c, 4, 8, 2, 512, 64);
    for dtype in [DType::F32, DType::BF16] {
        for past in [1000, 16_384, 100_000, 500_000] {
            softmax_over_cache(&mut c, 8, 2, 64, 1, past, dtype);
        }
    }
    c.final_summary();
}
