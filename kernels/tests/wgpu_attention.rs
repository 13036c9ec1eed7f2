//! The CubeCL kernels of both attentions on a device against the references on Flex; see `common::device`.
#![cfg(any(feature = "wgpu", feature = "cuda"))]

mod common;

use burn::tensor::{Device, Tensor};
use common::{close, device, random, to, values};
use m1_kernels::lightning_attention::{self, lightning_attention};
use m1_kernels::softmax_attention::{self, KeyValues, softmax_attention};

fn slopes(heads: usize) -> Vec<f64> {
    (0..heads).map(|h| 0.917 / (1u64 << (3 * h)) as f64).collect()
}

/// rows, heads, tokens, dim, with a state: tokens 1, primes, and around the sizes of blocks.
const TEXTS: [(usize, usize, usize, usize, bool); 6] = [
    (1, 1, 1, 32, false),
    (2, 3, 37, 64, true),
    (1, 2, 131, 96, true),
    (1, 1, 67, 128, false),
    (2, 1, 16, 40, true),
    (1, 2, 65, 32, true),
];

#[test]
fn lightning_blocks_equal_the_reference() {
    let Some(device) = device() else { return };
    for (rows, heads, tokens, dim, with_state) in TEXTS {
        // Not contiguous: heads and tokens exchanged, as a layer has them.
        let tokens_first = random([rows, tokens, heads, 3 * dim]);
        let there = to(&tokens_first, &device).swap_dims(1, 2);
        let qkv = tokens_first.swap_dims(1, 2);
        assert!(lightning_attention::cube::takes(&there), "the kernels take heads of {dim}");
        let state = with_state.then(|| random([rows, heads, dim, dim]));
        let slopes = slopes(heads);
        let starts: Vec<usize> = (0..rows).map(|row| 5 + 100 * row).collect();
        let lengths: Vec<usize> = (0..rows).map(|row| tokens - row * tokens / 3).collect();
        let state_there = state.as_ref().map(|state| to(state, &device));
        let (o, after) = lightning_attention(there, &slopes, state_there, Some(&starts), Some(&lengths), true);
        let (want, want_after) = lightning_attention::reference::lightning_attention(
            qkv,
            &slopes,
            state,
            Some(&starts),
            Some(&lengths),
            true,
        );
        let what = format!("{tokens} tokens of {dim}");
        for (row, &length) in lengths.iter().enumerate() {
            let part = |x: &Tensor<4>| x.clone().narrow(0, row, 1).narrow(2, 0, length);
            close(&format!("o, {what}"), &part(&o), &part(&want), 2e-5);
        }
        close(&format!("state, {what}"), &after.expect("wanted"), &want_after.expect("wanted"), 2e-5);
    }
}

#[test]
fn lightning_gradients_equal_autodiff_of_the_reference() {
    let Some(device) = device() else { return };
    for (rows, heads, tokens, dim, with_state) in TEXTS {
        let qkv = random([rows, heads, tokens, 3 * dim]);
        let state = random([rows, heads, dim, dim]);
        let (weight, state_weight) = (random([rows, heads, tokens, dim]), random([rows, heads, dim, dim]));
        let slopes = slopes(heads);
        let lengths: Vec<usize> = (0..rows).map(|row| tokens - row * tokens / 3).collect();
        // Gradients of a weighted sum over what counts of o, and over the state.
        let gradients = |device: Device, reference: bool| {
            let leaf = |x: &Tensor<4>| to(x, &device).require_grad();
            let (qkv, first) = (leaf(&qkv), leaf(&state));
            let run = if reference { lightning_attention::reference::lightning_attention } else { lightning_attention };
            let before = with_state.then(|| first.clone());
            let (o, after) = run(qkv.clone(), &slopes, before, None, Some(&lengths), with_state);
            let mut loss = Tensor::zeros([1], &device);
            for (row, &length) in lengths.iter().enumerate() {
                let part = |x: Tensor<4>| x.narrow(0, row, 1).narrow(2, 0, length);
                loss = loss + (part(o.clone()) * part(to(&weight, &device))).sum();
            }
            if let Some(after) = after {
                loss = loss + (after * to(&state_weight, &device)).sum();
            }
            let mut grads = loss.backward();
            let d_qkv = qkv.grad_remove(&mut grads).expect("a gradient");
            let mut all: Vec<Tensor<4>> = [0, 1, 2].map(|i| d_qkv.clone().narrow(3, i * dim, dim)).into();
            all.extend(with_state.then(|| first.grad_remove(&mut grads).expect("a gradient")));
            all
        };
        let got = gradients(device.clone().autodiff(), false);
        let want = gradients(Device::flex().autodiff(), true);
        for ((got, want), name) in got.iter().zip(&want).zip(["dq", "dk", "dv", "dstate"]) {
            close(&format!("{name}, {tokens} tokens of {dim}"), got, want, 3e-5);
        }
    }
}

#[test]
fn lightning_decode_equals_the_reference() {
    let Some(device) = device() else { return };
    // One launch (a row's states are small) and two.
    for (rows, heads, dim) in [(3, 2, 32), (1, 3, 64), (2, 3, 96), (1, 5, 128), (2, 20, 64)] {
        let (qkv, gate) = (random([rows, heads * 3 * dim]), random([rows, heads * dim]));
        let (state, norm) = (random([rows, heads, dim, dim]), random([heads * dim]));
        let slopes = slopes(heads);
        let arguments = |device: &Device| (to(&qkv, device), to(&gate, device), to(&state, device), to(&norm, device));
        let (a, b, c, d) = arguments(&Device::flex());
        let (want, want_after) = lightning_attention::reference::decode(a, b, c, &slopes, d, 1e-6);
        for shared in [false, true] {
            let (a, b, c, d) = arguments(&device);
            assert!(lightning_attention::cube::takes_decode(&a, &c));
            let kept = shared.then(|| c.clone());
            let (y, after) = lightning_attention::decode(a, b, c, &slopes, d, 1e-6);
            close(&format!("y of {heads} heads of {dim}"), &y, &want, 2e-5);
            close(&format!("state of {heads} heads of {dim}"), &after, &want_after, 2e-5);
            if let Some(kept) = kept {
                close("a state that somebody else holds stays", &kept, &state, 0.0);
            }
        }
    }
}

#[test]
fn lightning_keeps_nan_to_its_row_and_its_future() {
    let Some(device) = device() else { return };
    let (rows, heads, tokens, dim) = (2, 2, 21, 32);
    for bad in 0..3 {
        let column = bad * dim + 3;
        let qkv = random([rows, heads, tokens, 3 * dim]).slice_fill([1..2, 0..1, 10..11, column..column + 1], f32::NAN);
        let (o, state) = lightning_attention(to(&qkv, &device), &slopes(heads), None, None, None, true);
        let state = state.expect("wanted");
        let nan = |x: &Tensor<4>| values(x).iter().any(|x| x.is_nan());
        assert!(!nan(&o.clone().narrow(0, 0, 1)) && !nan(&state.clone().narrow(0, 0, 1)), "the other row");
        let row = o.narrow(0, 1, 1);
        assert!(!nan(&row.clone().narrow(1, 1, 1)), "the other head");
        let head = row.narrow(1, 0, 1);
        assert!(!nan(&head.clone().narrow(2, 0, 10)), "earlier tokens, input {bad}");
        assert!(nan(&head.clone().narrow(2, 10, 1)), "its own token, input {bad}");
        // A query is read once; keys and values stay in the state.
        assert_eq!(nan(&head.narrow(2, 15, 6)), bad > 0, "later tokens, input {bad}");
        assert_eq!(nan(&state), bad > 0, "the state, input {bad}");
    }
}

#[test]
fn no_tokens_and_no_rows_work() {
    let Some(device) = device() else { return };
    for (rows, tokens) in [(2, 0), (0, 3)] {
        let x = Tensor::<4>::zeros([rows, 2, tokens, 32], &device);
        let state = Tensor::<4>::ones([rows, 2, 32, 32], &device);
        let qkv = Tensor::<4>::zeros([rows, 2, tokens, 3 * 32], &device);
        let (o, after) = lightning_attention(qkv, &slopes(2), Some(state.clone()), None, None, true);
        assert_eq!(o.dims(), [rows, 2, tokens, 32]);
        close("nothing happened", &after.expect("wanted"), &state, 0.0);
        let o = softmax_attention(x.clone(), &[KeyValues { keys: x.clone(), values: x }], 0);
        assert_eq!(o.dims(), [rows, 2, tokens, 32]);
    }
    // A row without tokens beside one with some.
    let (qkv, state) = (random([2, 1, 5, 3 * 32]), random([2, 1, 32, 32]));
    let before = Some(to(&state, &device));
    let (_, after) = lightning_attention(to(&qkv, &device), &slopes(1), before, None, Some(&[5, 0]), true);
    close("its state", &after.expect("wanted").narrow(0, 1, 1), &state.narrow(0, 1, 1), 0.0);
}

fn in_blocks(k: &Tensor<4>, v: &Tensor<4>, block: usize) -> Vec<KeyValues> {
    let all = k.dims()[2];
    (0..all)
        .step_by(block)
        .map(|start| {
            let n = block.min(all - start);
            KeyValues { keys: k.clone().narrow(2, start, n), values: v.clone().narrow(2, start, n) }
        })
        .collect()
}

#[test]
fn softmax_equals_the_reference() {
    let Some(device) = device() else { return };
    // rows, heads, kv_heads, tokens, past, block, dim: whole texts, chunks against caches, single tokens, split caches.
    for (rows, heads, kv_heads, tokens, past, block, dim) in [
        (1, 1, 1, 1, 0, 4, 32),
        (2, 4, 2, 37, 0, 64, 64),
        (1, 3, 1, 67, 0, 256, 96),
        (1, 2, 2, 33, 0, 256, 128),
        (2, 4, 2, 19, 23, 8, 32),
        (1, 8, 1, 5, 61, 16, 64),
        (1, 6, 2, 1, 97, 32, 128),
        (2, 4, 2, 1, 1030, 256, 32),
        (1, 8, 2, 2, 700, 1024, 40),
        (1, 2, 1, 1, 600, 599, 32),
    ] {
        let (q, all) = (random([rows, tokens, heads, dim]).swap_dims(1, 2), past + tokens);
        let (k, v) = (random([rows, kv_heads, all, dim]), random([rows, kv_heads, all, dim]));
        let want = softmax_attention::reference::softmax_attention(q.clone(), &in_blocks(&k, &v, block), past);
        let blocks = in_blocks(&to(&k, &device), &to(&v, &device), block);
        let q = to(&q.swap_dims(1, 2), &device).swap_dims(1, 2);
        assert!(softmax_attention::cube::takes(&q, &blocks), "the kernels take heads of {dim}");
        let o = softmax_attention(q, &blocks, past);
        close(&format!("{heads}/{kv_heads} heads of {dim}, {tokens} after {past}, blocks of {block}"), &o, &want, 1e-5);
    }
}

#[test]
fn softmax_gradients_equal_autodiff_of_the_reference() {
    let Some(device) = device() else { return };
    for (rows, heads, kv_heads, tokens, dim) in
        [(1, 1, 1, 1, 32), (2, 4, 2, 37, 64), (1, 3, 1, 23, 96), (1, 2, 2, 17, 128), (1, 8, 2, 33, 32)]
    {
        let (q, weight) = (random([rows, heads, tokens, dim]), random([rows, heads, tokens, dim]));
        let (k, v) = (random([rows, kv_heads, tokens, dim]), random([rows, kv_heads, tokens, dim]));
        let gradients = |device: Device, reference: bool| {
            let [q, k, v] = [&q, &k, &v].map(|x| to(x, &device).require_grad());
            let blocks = [KeyValues { keys: k.clone(), values: v.clone() }];
            let o = if reference {
                softmax_attention::reference::softmax_attention(q.clone(), &blocks, 0)
            } else {
                softmax_attention(q.clone(), &blocks, 0)
            };
            let mut grads = (o * to(&weight, &device)).sum().backward();
            [q, k, v].map(|x| x.grad_remove(&mut grads).expect("a gradient"))
        };
        let got = gradients(device.clone().autodiff(), false);
        let want = gradients(Device::flex().autodiff(), true);
        for ((got, want), name) in got.iter().zip(&want).zip(["dq", "dk", "dv"]) {
            close(&format!("{name}, {tokens} tokens of {dim}"), got, want, 3e-5);
        }
    }
}

#[test]
fn softmax_keeps_nan_to_its_row_and_its_future() {
    let Some(device) = device() else { return };
    let (rows, heads, tokens, dim) = (2, 2, 21, 32);
    for bad in 0..3 {
        let mut inputs = [0; 3].map(|_| random([rows, heads, tokens, dim]));
        inputs[bad] = inputs[bad].clone().slice_fill([1..2, 0..1, 10..11, 3..4], f32::NAN);
        let [q, k, v] = inputs.map(|x| to(&x, &device));
        let o = softmax_attention(q, &in_blocks(&k, &v, 5), 0);
        let nan = |x: &Tensor<4>| values(x).iter().any(|x| x.is_nan());
        assert!(!nan(&o.clone().narrow(0, 0, 1)), "the other row");
        let row = o.narrow(0, 1, 1);
        assert!(!nan(&row.clone().narrow(1, 1, 1)), "the other head");
        let head = row.narrow(1, 0, 1);
        assert!(!nan(&head.clone().narrow(2, 0, 10)), "earlier tokens, input {bad}");
        assert!(nan(&head.clone().narrow(2, 10, 1)), "its own token, input {bad}");
        assert_eq!(nan(&head.narrow(2, 15, 6)), bad > 0, "later tokens, input {bad}");
    }
}
