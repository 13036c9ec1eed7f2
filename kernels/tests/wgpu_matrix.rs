//! The CubeCL kernels of linear, experts, the row operations and log_prob on a device against the references on Flex; see
//! `common::device`.
#![cfg(any(feature = "wgpu", feature = "cuda"))]

mod common;

use burn::tensor::{Device, Tensor, TensorData};
use common::{device, near, random, to, values};
use m1_kernels::base::packed::{Format, Packed, quantize_row};
use m1_kernels::experts::{self, ExpertsWeights, Routing};
use m1_kernels::linear::Quantized;
use m1_kernels::{linear, log_prob, rms_norm, rotary, silu};

/// Runs `f` forward and backward on the device and on Flex (`reference`) from the same inputs, and compares the result
/// and every gradient.
#[track_caller]
fn compare<const D: usize>(
    name: &str,
    inputs: &[Tensor<D>],
    tolerance: f32,
    f: impl Fn(&[Tensor<D>], &Device) -> Tensor<2>,
    reference: impl Fn(&[Tensor<D>], &Device) -> Tensor<2>,
    device: &Device,
) {
    let run = |device: &Device, f: &dyn Fn(&[Tensor<D>], &Device) -> Tensor<2>, weights: Option<&Tensor<2>>| {
        let device = device.clone().autodiff();
        let inputs: Vec<_> = inputs.iter().map(|x| to(x, &device).require_grad()).collect();
        let y = f(&inputs, &device);
        let weights = weights.map_or_else(|| random(y.dims()), Clone::clone);
        let gradients = (y.clone() * to(&weights, &device)).sum().backward();
        let gradients: Vec<_> =
            inputs.iter().map(|x| x.grad(&gradients).expect("a gradient for every input")).collect();
        (y, gradients, weights)
    };
    let (want, want_gradients, weights) = run(&Device::flex(), &reference, None);
    let (got, gradients, _) = run(device, &f, Some(&weights));
    near(name, &got, &want, tolerance);
    for (i, (got, want)) in gradients.iter().zip(&want_gradients).enumerate() {
        near(&format!("{name}, gradient {i}"), got, want, tolerance);
    }
}

#[test]
fn row_operations_equal_the_reference() {
    let Some(device) = device() else { return };
    for (n, dim) in [(1, 1), (3, 7), (5, 64), (2, 130), (7, 1028)] {
        let weight = random([1, dim]);
        let w = |x: &Tensor<2>| x.clone().reshape([dim]);
        let draw = || random([n, dim]);
        compare(
            "rms_norm",
            &[draw(), weight.clone()],
            1e-5,
            |x, _| rms_norm::rms_norm(x[0].clone(), w(&x[1]), 1e-5),
            |x, _| rms_norm::reference::rms_norm(x[0].clone(), w(&x[1]), 1e-5),
            &device,
        );
        compare(
            "add_rms_norm",
            &[draw(), draw(), weight.clone()],
            1e-5,
            |x, _| {
                let (s, y) = rms_norm::add_rms_norm(x[0].clone(), x[1].clone(), w(&x[2]), 3.5, 0.5, 1e-5);
                Tensor::cat(vec![s, y], 1)
            },
            |x, _| {
                let (s, y) = rms_norm::reference::add_rms_norm(x[0].clone(), x[1].clone(), w(&x[2]), 3.5, 0.5, 1e-5);
                Tensor::cat(vec![s, y], 1)
            },
            &device,
        );
        compare(
            "gated_rms_norm",
            &[draw(), draw(), weight.clone()],
            1e-5,
            |x, _| rms_norm::gated_rms_norm(x[0].clone(), x[1].clone(), w(&x[2]), 1e-6),
            |x, _| rms_norm::reference::gated_rms_norm(x[0].clone(), x[1].clone(), w(&x[2]), 1e-6),
            &device,
        );
        compare(
            "silu",
            &[draw() * 20.0],
            1e-5,
            |x, _| silu::silu(x[0].clone()),
            |x, _| silu::reference::silu(x[0].clone()),
            &device,
        );
    }
    for (tokens, heads, dim, rotary_dim) in
        [(1, 1, 2, 2), (3, 4, 32, 16), (5, 3, 96, 48), (3, 2, 128, 64), (2, 5, 64, 64)]
    {
        let positions: Vec<usize> = (0..tokens).map(|t| 1_000_000 + 7 * t).collect();
        let flat = |x: Tensor<3>| x.reshape([tokens, heads * dim]);
        compare(
            "rotary",
            &[random([tokens, heads, dim])],
            1e-5,
            |x, d| flat(rotary::rotary(x[0].clone(), &rotary::Rotation::new(&positions, rotary_dim, 1e7, d))),
            |x, d| {
                flat(rotary::reference::rotary(x[0].clone(), &rotary::Rotation::new(&positions, rotary_dim, 1e7, d)))
            },
            &device,
        );
    }
}

#[test]
fn row_operations_take_views_nothing_and_nan() {
    let Some(device) = device() else { return };
    let weight = random([33]);
    let wide = random([9, 70]);
    let view = |x: &Tensor<2>| x.clone().narrow(1, 5, 33).narrow(0, 2, 6);
    let on = to(&wide, &device);
    near(
        "rms_norm of a view",
        &rms_norm::rms_norm(view(&on), to(&weight, &device), 1e-5),
        &rms_norm::reference::rms_norm(view(&wide), weight.clone(), 1e-5),
        1e-5,
    );
    near("silu of a view", &silu::silu(view(&on).transpose()), &silu::reference::silu(view(&wide).transpose()), 1e-5);
    // heads narrowed out of a wider projection
    let qkv = random([4, 3 * 5 * 8]);
    let heads = |x: &Tensor<2>| x.clone().reshape([4, 5, 24]).narrow(2, 8, 8);
    let turn = |d: &Device| rotary::Rotation::new(&[3, 1, 4, 1], 4, 1e4, d);
    near(
        "rotary of a view",
        &rotary::rotary(heads(&to(&qkv, &device)), &turn(&device)),
        &rotary::reference::rotary(heads(&qkv), &turn(&Device::flex())),
        1e-5,
    );

    let empty = Tensor::<2>::zeros([0, 33], &device);
    assert_eq!(rms_norm::rms_norm(empty.clone(), to(&weight, &device), 1e-5).dims(), [0, 33]);
    let (s, y) = rms_norm::add_rms_norm(empty.clone(), empty.clone(), to(&weight, &device), 1.0, 1.0, 1e-5);
    assert_eq!((s.dims(), y.dims()), ([0, 33], [0, 33]));
    assert_eq!(silu::silu(empty).dims(), [0, 33]);

    let mut broken = values(&random([5, 33]));
    broken[2 * 33 + 7] = f32::NAN;
    let broken = Tensor::<2>::from_data(TensorData::new(broken, [5, 33]), &Device::flex());
    let got = rms_norm::rms_norm(to(&broken, &device), to(&weight, &device), 1e-5);
    for (row, values) in values(&got).chunks(33).enumerate() {
        assert_eq!(values.iter().all(|x| x.is_nan()), row == 2, "row {row}: {values:?}");
        assert_eq!(values.iter().any(|x| x.is_nan()), row == 2, "row {row}: {values:?}");
    }
}

/// x, shares, w1, w2, w3 as experts takes them, each flattened to two dimensions.
struct Mixture {
    tokens: usize,
    hidden: usize,
    ffn: usize,
    experts: usize,
    k: usize,
    choices: Vec<u32>,
}

impl Mixture {
    fn inputs(&self) -> Vec<Tensor<2>> {
        let (n, h, f) = (self.experts, self.hidden, self.ffn);
        let shares = random([self.tokens, self.k]).abs();
        let scale = 1.0 / (h as f32).sqrt();
        vec![
            random([self.tokens, h]),
            shares,
            random([n * f, h]) * scale,
            random([n * h, f]),
            random([n * f, h]) * scale,
        ]
    }

    fn weights(&self, x: &[Tensor<2>]) -> (Routing, ExpertsWeights) {
        let (n, h, f) = (self.experts, self.hidden, self.ffn);
        let weights = ExpertsWeights {
            w1: x[2].clone().reshape([n, f, h]).into(),
            w2: x[3].clone().reshape([n, h, f]).into(),
            w3: x[4].clone().reshape([n, f, h]).into(),
        };
        (Routing { choices: self.choices.clone().into(), shares: x[1].clone() }, weights)
    }

    fn run(&self, x: &[Tensor<2>]) -> Tensor<2> {
        let (routing, weights) = self.weights(x);
        experts::experts(x[0].clone(), &routing, &weights)
    }

    fn reference(&self, x: &[Tensor<2>]) -> Tensor<2> {
        let (routing, weights) = self.weights(x);
        experts::reference::experts(x[0].clone(), &routing, &weights)
    }
}

/// Choices that leave some experts out and crowd others.
fn choices(tokens: usize, experts: usize, k: usize, crowd: bool) -> Vec<u32> {
    (0..tokens)
        .flat_map(|t| {
            let first = if crowd { 1 } else { t * 7 + 3 };
            (0..k).map(move |rank| ((first + rank * 2) % experts) as u32)
        })
        .collect()
}

#[test]
fn experts_equal_the_reference() {
    let Some(device) = device() else { return };
    // one token, few (by hidden that vectors divide and not), the small tile, the large one, many tiles of one expert
    for (tokens, hidden, ffn, experts, k, crowd) in [
        (1, 8, 12, 4, 2, false),
        (1, 7, 5, 3, 1, false),
        (5, 33, 17, 5, 2, false),
        (19, 24, 20, 3, 2, true),
        (61, 20, 36, 3, 2, false),
        (131, 17, 67, 5, 3, true),
    ] {
        let mixture = Mixture { tokens, hidden, ffn, experts, k, choices: choices(tokens, experts, k, crowd) };
        compare(
            &format!("experts of {tokens} tokens"),
            &mixture.inputs(),
            1e-4,
            |x, _| mixture.run(x),
            |x, _| mixture.reference(x),
            &device,
        );
    }
}

/// One token reads exactly k experts: the others' weights are not so much as multiplied by zero.
#[test]
fn weights_of_experts_that_nobody_chose_are_not_touched() {
    let Some(device) = device() else { return };
    for (tokens, experts, k) in [(1, 8, 2), (3, 16, 2)] {
        let mixture = Mixture { tokens, hidden: 24, ffn: 20, experts, k, choices: choices(tokens, experts, k, false) };
        let mut inputs = mixture.inputs();
        let run = |inputs: &[Tensor<2>]| {
            let inputs: Vec<_> = inputs.iter().map(|x| to(x, &device)).collect();
            values(&mixture.run(&inputs))
        };
        let expected = run(&inputs);
        for w in &mut inputs[2..] {
            let [rows, columns] = w.dims();
            let each = rows / experts;
            for expert in (0..experts).filter(|&e| !mixture.choices.contains(&(e as u32))) {
                *w = w.clone().slice_fill([expert * each..(expert + 1) * each, 0..columns], f32::NAN);
            }
        }
        assert_eq!(run(&inputs), expected, "{k} of {experts} for {tokens} tokens");
    }
}

#[test]
fn experts_take_nothing_and_keep_nan_in_its_row() {
    let Some(device) = device() else { return };
    let none = Mixture { tokens: 0, hidden: 8, ffn: 4, experts: 2, k: 1, choices: vec![] };
    let inputs: Vec<_> = none.inputs().iter().map(|x| to(x, &device)).collect();
    assert_eq!(none.run(&inputs).dims(), [0, 8]);
    for tokens in [3, 40] {
        let mixture = Mixture { tokens, hidden: 9, ffn: 10, experts: 2, k: 1, choices: vec![1; tokens] };
        let mut inputs = mixture.inputs();
        let mut x = values(&inputs[0]);
        x[2 * 9 + 4] = f32::NAN;
        inputs[0] = Tensor::from_data(TensorData::new(x, [tokens, 9]), &Device::flex());
        let inputs: Vec<_> = inputs.iter().map(|x| to(x, &device)).collect();
        for (row, values) in values(&mixture.run(&inputs)).chunks(9).enumerate() {
            assert_eq!(values.iter().any(|x| x.is_nan()), row == 2, "row {row} of {tokens}");
        }
    }
}

#[test]
fn log_prob_equals_the_reference() {
    let Some(device) = device() else { return };
    for (n, hidden, vocab, temperature) in [(1, 5, 3, 1.0), (7, 33, 257, 0.7), (66, 16, 1000, 2.0)] {
        let targets: Vec<u32> = (0..n).map(|i| ((i * 37 + 1) % vocab) as u32).collect();
        let both = |(log_pi, entropy): (Tensor<1>, Tensor<1>)| Tensor::stack::<2>(vec![log_pi, entropy], 1);
        compare(
            &format!("log_prob of {n}"),
            &[random([n, hidden]), random([vocab, hidden])],
            2e-5,
            |x, _| both(log_prob::log_prob(x[0].clone(), &x[1].clone().into(), &targets, temperature)),
            |x, _| both(log_prob::reference::log_prob(x[0].clone(), x[1].clone(), &targets, temperature)),
            &device,
        );
    }
    let empty = log_prob::log_prob(Tensor::zeros([0, 4], &device), &Tensor::zeros([3, 4], &device).into(), &[], 1.0);
    assert_eq!(empty.0.dims(), [0]);
}

#[test]
fn log_prob_takes_a_quantized_head() {
    let Some(device) = device() else { return };
    for format in FORMATS {
        let (n, hidden, vocab) = (5, 64, 70);
        let targets: Vec<u32> = (0..n).map(|i| ((i * 37 + 1) % vocab) as u32).collect();
        let (stored, dense) = quantized(format, [1, vocab, hidden], &device);
        let (stored, dense): (linear::Weight<2>, Tensor<2>) = (stored.into(), dense.squeeze_dim(0));
        let both = |(log_pi, entropy): (Tensor<1>, Tensor<1>)| Tensor::stack::<2>(vec![log_pi, entropy], 1);
        compare(
            &format!("log_prob from {format:?}"),
            &[random([n, hidden])],
            2e-5,
            |x, _| both(log_prob::log_prob(x[0].clone(), &stored, &targets, 1.3)),
            |x, d| both(log_prob::reference::log_prob(x[0].clone(), to(&dense, d), &targets, 1.3)),
            &device,
        );
    }
}

#[test]
fn log_prob_goes_block_by_block() {
    let Some(device) = device() else { return };
    // more tokens than a block has, and more entries than fit beside them
    let (n, hidden, vocab) = (1030, 3, 16_500);
    let targets: Vec<u32> = (0..n).map(|i| ((i * 12_345) % vocab) as u32).collect();
    let (x, head) = (random([n, hidden]) * 2.0, random([vocab, hidden]) * 2.0);
    let (log_pi, entropy) = log_prob::log_prob(to(&x, &device), &to(&head, &device).into(), &targets, 1.0);
    let (want, want_entropy) = log_prob::reference::log_prob(x, head, &targets, 1.0);
    near("log_prob", &log_pi, &want, 2e-5);
    near("entropy", &entropy, &want_entropy, 2e-5);
}

#[test]
fn linear_equals_the_reference() {
    let Some(device) = device() else { return };
    // one row and few, with rows that vectors divide and not; the small, the middle and the large tile
    for (n, input, out) in [(1, 64, 96), (3, 7, 5), (8, 130, 1), (9, 33, 70), (31, 40, 17), (130, 65, 129)] {
        compare(
            &format!("linear of {n} rows"),
            &[random([n, input]), random([out, input])],
            2e-5,
            |x, _| linear::linear(x[0].clone(), &x[1].clone().into()),
            |x, _| linear::reference::linear(x[0].clone(), x[1].clone()),
            &device,
        );
    }
    let (x, w) = (random([4, 12]), random([20, 12]));
    let view = |x: &Tensor<2>| x.clone().narrow(1, 3, 7).narrow(0, 1, 3);
    let got = linear::linear_f32(view(&to(&x, &device)), &view(&to(&w, &device)).into());
    near("linear of views", &got, &linear::reference::linear(view(&x), view(&w)), 2e-5);
    let none = linear::linear(Tensor::zeros([0, 12], &device), &to(&w, &device).into());
    assert_eq!(none.dims(), [0, 20]);
    for n in [5, 40] {
        let mut broken = values(&random([n, 12]));
        broken[3 * 12] = f32::NAN;
        let broken = Tensor::<2>::from_data(TensorData::new(broken, [n, 12]), &device);
        let got = values(&linear::linear(broken, &to(&w, &device).into()));
        for (row, values) in got.chunks(20).enumerate() {
            assert_eq!(values.iter().any(|x| x.is_nan()), row == 3, "row {row} of {n}");
        }
    }
}

const FORMATS: [Format; 4] =
    [Format::Int8 { block: 32 }, Format::Int8 { block: 64 }, Format::Int4 { block: 32 }, Format::Int4 { block: 64 }];

/// Random matrices `[count, out, in]`, quantized, on the device; and the numbers that they stand for, on Flex.
fn quantized(format: Format, dims: [usize; 3], device: &Device) -> (Quantized, Tensor<3>) {
    let [count, out, input] = dims;
    let weights = values(&random(dims));
    let row = |matrix: usize, row: usize, values: &mut [i8], scales: &mut [half::f16]| {
        quantize_row(format, &weights[(matrix * out + row) * input..][..input], values, scales).unwrap();
    };
    let stored = Quantized::new(format, dims, device, &row).unwrap();
    let packed = Packed::pack_quantized(format, count, out, input, &row).unwrap();
    let mut dense = vec![0f32; weights.len()];
    for (i, to) in dense.chunks_exact_mut(input).enumerate() {
        packed.row(i / out, i % out, to);
    }
    (stored, Tensor::from_data(TensorData::new(dense, dims), &Device::flex()))
}

#[test]
fn quantized_weights_are_multiplied_as_they_are_stored() {
    let Some(device) = device() else { return };
    for format in FORMATS {
        let (input, out) = (192, 37);
        let (stored, dense) = quantized(format, [1, out, input], &device);
        let dense: Tensor<2> = dense.squeeze_dim(0);
        assert!(stored.bytes() < out * input * 5 / 4, "{} bytes", stored.bytes());
        let stored = stored.into();
        for n in [0, 1, 3, 7, 9, 70] {
            let x = random([n, input]);
            let got = linear::linear(to(&x, &device), &stored);
            assert_eq!(got.dims(), [n, out]);
            if n > 0 {
                near(&format!("{format:?}, {n} rows"), &got, &linear::reference::linear(x, dense.clone()), 2e-5);
            }
        }
        for n in [5, 40] {
            let broken = random([n, input]).slice_fill([3..4, 7..8], f32::NAN);
            for (row, values) in values(&linear::linear(to(&broken, &device), &stored)).chunks(out).enumerate() {
                assert_eq!(values.iter().all(|x| x.is_nan()), row == 3, "{format:?}: row {row} of {n}");
                assert_eq!(values.iter().any(|x| x.is_nan()), row == 3, "{format:?}: row {row} of {n}");
            }
        }
        // Under autodiff by the definition: a gradient flows to x, and none to the constant.
        let x = random([3, input]);
        let tracked = to(&x, &device.clone().autodiff()).require_grad();
        let gradients = linear::linear(tracked.clone(), &stored).sum().backward();
        let want = dense.sum_dim(0).repeat_dim(0, 3);
        near("gradient of x", &to(&tracked.grad(&gradients).unwrap(), &Device::flex()), &want, 2e-5);
    }
}

#[test]
fn quantized_experts_equal_the_reference() {
    let Some(device) = device() else { return };
    // one token, few, the small tile, the large one, many tiles of one expert
    for (tokens, hidden, ffn, count, k, crowd) in [
        (1, 64, 128, 4, 2, false),
        (5, 192, 64, 5, 2, false),
        (19, 64, 64, 3, 2, true),
        (61, 128, 64, 3, 2, false),
        (131, 64, 192, 5, 3, true),
    ] {
        for format in FORMATS {
            let [w1, w2, w3] = [[count, ffn, hidden], [count, hidden, ffn], [count, ffn, hidden]]
                .map(|dims| quantized(format, dims, &device));
            let choices: std::sync::Arc<[u32]> = choices(tokens, count, k, crowd).into();
            let (x, shares) = (random([tokens, hidden]), random([tokens, k]).abs());
            let weights = ExpertsWeights { w1: w1.1.into(), w2: w2.1.into(), w3: w3.1.into() };
            let routing = Routing { choices: choices.clone().into(), shares: shares.clone() };
            let want = experts::reference::experts(x.clone(), &routing, &weights);
            let weights = ExpertsWeights { w1: w1.0.into(), w2: w2.0.into(), w3: w3.0.into() };
            let routing = Routing { choices: choices.into(), shares: to(&shares, &device) };
            let got = experts::experts(to(&x, &device), &routing, &weights);
            near(&format!("{format:?}, experts of {tokens} tokens"), &got, &want, 1e-4);
            let mut broken = values(&x);
            broken[(tokens - 1) * hidden + 3] = f32::NAN;
            let broken = Tensor::<2>::from_data(TensorData::new(broken, [tokens, hidden]), &device);
            for (row, values) in values(&experts::experts(broken, &routing, &weights)).chunks(hidden).enumerate() {
                assert_eq!(values.iter().any(|x| x.is_nan()), row == tokens - 1, "row {row} of {tokens}");
            }
        }
    }
}

/// Few tokens: the choice stays on the device, and is that of the host.
#[test]
fn experts_chosen_on_the_device_are_those_of_the_host() {
    let Some(device) = device() else { return };
    for (tokens, count, k) in
        [(1, 1, 1), (1, 32, 2), (2, 5, 2), (3, 8, 3), (7, 3, 2), (8, 256, 16), (8, 4, 4), (9, 8, 2), (8, 257, 2)]
    {
        let name = format!("{tokens} tokens, {k} of {count}");
        let mut logits = values(&random([tokens, count]));
        // equal logits, and in the last of several rows NaN
        logits[count - 1] = logits[0];
        if tokens > 2 {
            logits[(tokens - 1) * count + count / 2] = f32::NAN;
        }
        let logits = Tensor::<2>::from_data(TensorData::new(logits, [tokens, count]), &Device::flex());
        let (want, got) = (experts::route(logits.clone(), k, None), experts::route(to(&logits, &device), k, None));
        assert_eq!(got.choices.host(), want.choices.host(), "{name}");
        assert_eq!(got.choices.len(), tokens * k);
        near(&name, &got.shares, &want.shares, 1e-6);

        let (hidden, ffn) = (64, 32);
        let x = random([tokens, hidden]);
        let w = [[count, ffn, hidden], [count, hidden, ffn], [count, ffn, hidden]].map(|dims| random(dims) * 0.1);
        let weights = |device: &Device| {
            let [w1, w2, w3] = w.each_ref().map(|w| linear::Weight::from(to(w, device)));
            ExpertsWeights { w1, w2, w3 }
        };
        let want_y = experts::reference::experts(x.clone(), &want, &weights(&Device::flex()));
        near(&name, &experts::experts(to(&x, &device), &got, &weights(&device)), &want_y, 1e-4);

        let format = Format::Int8 { block: 32 };
        let [w1, w2, w3] = [[count, ffn, hidden], [count, hidden, ffn], [count, ffn, hidden]]
            .map(|dims| quantized(format, dims, &device));
        let stored = ExpertsWeights { w1: w1.0.into(), w2: w2.0.into(), w3: w3.0.into() };
        let dense = ExpertsWeights { w1: w1.1.into(), w2: w2.1.into(), w3: w3.1.into() };
        let want_y = experts::reference::experts(x.clone(), &want, &dense);
        near(&name, &experts::experts(to(&x, &device), &got, &stored), &want_y, 1e-4);
    }
}

#[test]
fn a_choice_of_other_experts_is_a_mistake() {
    let Some(device) = device() else { return };
    let (hidden, ffn, count) = (8, 6, 4);
    let weights = |count: usize| {
        let [w1, w2, w3] = [[count, ffn, hidden], [count, hidden, ffn], [count, ffn, hidden]];
        let [w1, w2, w3] = [w1, w2, w3].map(|dims| linear::Weight::from(to(&random(dims), &device)));
        ExpertsWeights { w1, w2, w3 }
    };
    let routing = experts::route(to(&random([2, count]), &device), 2, None);
    let run = |count: usize| {
        let (x, weights) = (to(&random([2, hidden]), &device), weights(count));
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| experts::experts(x, &routing, &weights)))
    };
    assert!(run(count).is_ok());
    let told = run(count - 1).expect_err("three experts for a choice of four");
    let told = told.downcast_ref::<String>().expect("a message");
    assert!(told.contains("the device chose for other tokens, ranks or experts"), "{told}");
}

/// What a device chose can be read where the weights want the host's list.
#[test]
fn a_choice_of_the_device_is_read_for_a_gradient() {
    let Some(device) = device() else { return };
    let (hidden, ffn, count) = (8, 6, 4);
    let logits = random([2, count]);
    let routing = experts::route(to(&logits, &device), 2, None);
    let w = [[count, ffn, hidden], [count, hidden, ffn], [count, ffn, hidden]].map(random);
    let x = random([2, hidden]);
    let gradient = |device: Device, reference: bool| {
        let x = to(&x, &device).require_grad();
        let [w1, w2, w3] = w.each_ref().map(|w| linear::Weight::from(to(w, &device)));
        let routing = Routing { choices: routing.choices.clone(), shares: to(&routing.shares, &device) };
        let run = if reference { experts::reference::experts } else { experts::experts };
        let y = run(x.clone(), &routing, &ExpertsWeights { w1, w2, w3 });
        x.grad(&y.sum().backward()).unwrap()
    };
    let want = gradient(Device::flex().autodiff(), true);
    near("gradient of x", &gradient(device.clone().autodiff(), false), &want, 1e-4);
}
