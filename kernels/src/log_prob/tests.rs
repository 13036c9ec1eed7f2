use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::{LogProbBackend, blockwise, reference};
use crate::base::packed::{Format, Packed};
use crate::base::testing::{
    assert_close, assert_panics, assert_threads_do_not_matter, at_every_level, bits, random, strided, values, window,
};

use crate::linear::Weight;

fn log_prob(
    hidden: Tensor<2>,
    head: impl Into<Weight<2>>,
    targets: &[u32],
    temperature: f64,
) -> (Tensor<1>, Tensor<1>) {
    super::log_prob(hidden, &head.into(), targets, temperature)
}

fn packed(head: &Tensor<2>, format: Format) -> Packed {
    let ([vocab, dim], rows) = (head.dims(), values(head.clone().cast(DType::F32)));
    let row = |_: usize, row: usize, to: &mut [f32]| to.copy_from_slice(&rows[row * dim..][..dim]);
    Packed::pack(format, 1, vocab, dim, &row).unwrap()
}

/// Tokens, vocabulary, hidden size.
const SIZES: [(usize, usize, usize); 8] =
    [(0, 7, 3), (1, 1, 1), (3, 13, 5), (5, 512, 8), (2, 511, 16), (7, 513, 33), (515, 1031, 6), (3, 20_011, 4)];

fn targets(n: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|i| if i == 0 { vocab as u32 - 1 } else { (i * 7919 % vocab) as u32 }).collect()
}

/// Both results side by side.
fn stacked((log_p, entropy): (Tensor<1>, Tensor<1>)) -> Tensor<2> {
    Tensor::stack(vec![log_p, entropy], 1)
}

#[test]
fn equal_to_the_definition() {
    let device = Device::flex();
    at_every_level(|| {
        for (n, vocab, dim) in SIZES {
            for temperature in [1.0, 0.7] {
                let what = format!("{n} × {vocab} × {dim} at {temperature}");
                let (hidden, head) = (random([n, dim], 1, &device), random([vocab, dim], 2, &device));
                let targets = targets(n, vocab);
                let expected = stacked(reference::log_prob(hidden.clone(), head.clone(), &targets, temperature));
                let got = stacked(log_prob(hidden.clone(), head.clone(), &targets, temperature));
                assert_close(got, expected.clone(), 1e-5, &what);
                let got = stacked(log_prob(strided(hidden.clone()), strided(head.clone()), &targets, temperature));
                assert_close(got, expected.clone(), 1e-5, &what);
                let got = stacked(log_prob(window(hidden), window(head), &targets, temperature));
                assert_close(got, expected, 1e-5, &what);
            }
        }
    });
}

#[test]
fn the_vocabulary_of_m1() {
    let device = Device::flex();
    let (n, vocab, dim) = (9, 200_064, 8);
    let (hidden, head) = (random([n, dim], 1, &device), random([vocab, dim], 2, &device));
    let targets = targets(n, vocab);
    let expected = stacked(reference::log_prob(hidden.clone(), head.clone(), &targets, 1.0));
    assert_close(stacked(log_prob(hidden, head, &targets, 1.0)), expected, 1e-5, "M1");
}

#[test]
fn a_head_in_bf16() {
    let device = Device::flex();
    for (n, vocab, dim) in SIZES {
        let hidden = random([n, dim], 1, &device);
        let head = random([vocab, dim], 2, &device).cast(DType::BF16);
        let targets = targets(n, vocab);
        let wide = stacked(log_prob(hidden.clone(), head.clone().cast(DType::F32), &targets, 1.3));
        assert_eq!(bits(stacked(log_prob(hidden.clone(), head.clone(), &targets, 1.3))), bits(wide.clone()));
        let cut = head.slice([0..vocab / 2 + 1, 0..dim]);
        let targets: Vec<u32> = targets.iter().map(|t| t % (vocab as u32 / 2 + 1)).collect();
        let wide = stacked(log_prob(hidden.clone(), cut.clone().cast(DType::F32), &targets, 1.3));
        assert_eq!(bits(stacked(log_prob(hidden, cut, &targets, 1.3))), bits(wide));
    }
}

#[test]
fn large_logits_neither_overflow_nor_lose_the_small_ones() {
    let device = Device::flex().autodiff();
    at_every_level(|| {
        // Logits of 1e4, 0, -1e4 and two equal ones.
        let head = Tensor::<2>::from_floats([[1e4], [0.0], [-1e4], [1e4]], &device).require_grad();
        let hidden = Tensor::<2>::from_floats([[1.0], [-1.0], [0.0]], &device).require_grad();
        let (log_p, entropy) = log_prob(hidden.clone(), head.clone(), &[0, 1, 2], 1.0);
        let half = -std::f32::consts::LN_2;
        let quarter = 2.0 * half;
        let got = values(log_p.clone());
        assert!((got[0] - half).abs() < 1e-6 && got[1] == -1e4 && (got[2] - quarter).abs() < 1e-6, "{got:?}");
        let got = values(entropy.clone());
        assert!((got[0] + half).abs() < 1e-6 && got[1] == 0.0 && (got[2] + quarter).abs() < 1e-6, "{got:?}");
        let grads = (log_p + entropy).sum().backward();
        assert!(values(hidden.grad(&grads).unwrap()).iter().all(|x| x.is_finite()));
        assert!(values(head.grad(&grads).unwrap()).iter().all(|x| x.is_finite()));
    });
}

#[test]
fn the_most_probable_target_has_no_gradient_left_over() {
    let device = Device::flex().autodiff();
    at_every_level(|| {
        // One logit of about 1e4 among small ones: p = 1 to the last bit, whatever rounding the logit suffered.
        let hidden = (random::<2>([4, 7], 1, &device) * 37.0).detach().require_grad();
        let row = hidden.clone().detach().narrow(0, 2, 1) * 5.3;
        let head = Tensor::cat(vec![random::<2>([20, 7], 2, &device) * 1e-3, row], 0);
        let (log_p, _) = log_prob(hidden.clone(), head, &[20; 4], 0.9);
        let grads = log_p.narrow(0, 2, 1).sum().backward();
        let d = values(hidden.grad(&grads).unwrap());
        assert!(d.iter().all(|&d| d == 0.0), "{d:?}");
    });
}

#[test]
fn a_token_knows_no_other() {
    let device = Device::flex();
    let (n, vocab, dim) = (515, 1500, 24);
    let (hidden, head) = (random([n, dim], 1, &device), random([vocab, dim], 2, &device));
    let targets = targets(n, vocab);
    at_every_level(|| {
        assert_threads_do_not_matter(|| stacked(log_prob(hidden.clone(), head.clone(), &targets, 0.9)));
        let all = bits(stacked(log_prob(hidden.clone(), head.clone(), &targets, 0.9)));
        for token in [0, 1, 511, 512, 514] {
            let hidden = hidden.clone().narrow(0, token, 1);
            let alone = bits(stacked(log_prob(hidden, head.clone(), &targets[token..token + 1], 0.9)));
            assert_eq!(alone, all[token * 2..token * 2 + 2], "token {token}");
        }
        let broken = hidden.clone().slice_assign([3..4, 2..3], Tensor::full([1, 1], f32::NAN, &device));
        let broken = values(stacked(log_prob(broken, head.clone(), &targets, 0.9)));
        for (i, (broken, all)) in broken.iter().zip(&all).enumerate() {
            if i / 2 == 3 { assert!(broken.is_nan()) } else { assert_eq!(broken.to_bits(), *all) }
        }
    });
}

/// The gradients of [`gradients_of`] in f64, from the formulas.
fn exact_gradients((n, vocab, dim): (usize, usize, usize), targets: &[u32], temperature: f64) -> [Vec<f64>; 2] {
    let device = Device::flex();
    let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<f64>>();
    let hidden = wide(values(random([n, dim], 1, &device)));
    let head = wide(values(random([vocab, dim], 2, &device)));
    let (d_log_p, d_entropy) = (wide(values(random([n], 3, &device))), wide(values(random([n], 4, &device))));
    let (mut d_hidden, mut d_head) = (vec![0.0; n * dim], vec![0.0; vocab * dim]);
    for t in 0..n {
        let h = &hidden[t * dim..(t + 1) * dim];
        let z: Vec<f64> =
            head.chunks(dim).map(|w| w.iter().zip(h).map(|(w, h)| w * h).sum::<f64>() / temperature).collect();
        let m = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = m + z.iter().map(|z| (z - m).exp()).sum::<f64>().ln();
        let entropy = lse - z.iter().map(|z| (z - lse).exp() * z).sum::<f64>();
        for (j, z) in z.iter().enumerate() {
            let p = (z - lse).exp();
            let hit = f64::from(u8::from(targets[t] as usize == j));
            let d = (d_log_p[t] * (hit - p) - d_entropy[t] * p * (z - lse + entropy)) / temperature;
            for c in 0..dim {
                d_hidden[t * dim + c] += d * head[j * dim + c];
                d_head[j * dim + c] += d * h[c];
            }
        }
    }
    [d_hidden, d_head]
}

/// The gradients of a mix of both results.
fn gradients_of(
    op: impl Fn(Tensor<2>, Tensor<2>) -> (Tensor<1>, Tensor<1>),
    (n, vocab, dim): (usize, usize, usize),
    dtype: DType,
) -> (Tensor<2>, Tensor<2>) {
    let device = Device::flex().autodiff();
    let hidden = random([n, dim], 1, &device).require_grad();
    let head = random([vocab, dim], 2, &device).cast(dtype).detach().require_grad();
    let (log_p, entropy) = op(hidden.clone(), head.clone());
    let grads = (log_p * random([n], 3, &device) + entropy * random([n], 4, &device)).sum().backward();
    (hidden.grad(&grads).unwrap(), head.grad(&grads).unwrap())
}

#[test]
fn gradients() {
    at_every_level(|| {
        for size in SIZES.into_iter().filter(|size| size.0 > 0) {
            let targets = targets(size.0, size.1);
            let fast = gradients_of(|h, w| log_prob(h, w, &targets, 0.8), size, DType::F32);
            let plain = gradients_of(|h, w| reference::log_prob(h, w, &targets, 0.8), size, DType::F32);
            assert_close(fast.0.clone(), plain.0, 1e-5, &format!("hidden, {size:?}"));
            assert_close(fast.1.clone(), plain.1, 1e-5, &format!("head, {size:?}"));
            for (got, exact) in [fast.0, fast.1].into_iter().zip(exact_gradients(size, &targets, 0.8)) {
                for (got, exact) in values(got).into_iter().zip(exact) {
                    assert!(
                        (f64::from(got) - exact).abs() <= 1e-5 * (1.0 + exact.abs()),
                        "{size:?}: {got}, not {exact}"
                    );
                }
            }
        }
    });
}

#[test]
fn the_gradient_of_a_bf16_head_is_rounded_once() {
    let size = (30, 700, 9);
    let targets = targets(size.0, size.1);
    let fast = gradients_of(|h, w| log_prob(h, w, &targets, 0.8), size, DType::BF16);
    let wide = gradients_of(|h, w| reference::log_prob(h, w, &targets, 0.8), size, DType::BF16);
    assert_close(fast.0, wide.0, 1e-5, "hidden");
    assert_close(fast.1, wide.1, 8e-3, "head");
}

/// What is packed as it is gives the bits of its tensor, and its gradient.
#[test]
fn a_packed_head() {
    at_every_level(|| {
        for (n, vocab, dim) in SIZES.into_iter().filter(|size| size.0 > 0) {
            let targets = targets(n, vocab);
            for (dtype, format) in [(DType::F32, Format::F32), (DType::BF16, Format::Bf16)] {
                let device = Device::flex().autodiff();
                let hidden = random([n, dim], 1, &device).require_grad();
                let head = random([vocab, dim], 2, &Device::flex()).cast(dtype);
                let constant = packed(&head, format);
                let results = [Tensor::from_inner(head).into(), Weight::Packed(constant)].map(|head| {
                    let (log_p, entropy) = log_prob(hidden.clone(), head, &targets, 0.8);
                    let sum = log_p.clone() * random([n], 3, &device) + entropy.clone() * random([n], 4, &device);
                    (bits(stacked((log_p, entropy))), bits(hidden.grad(&sum.sum().backward()).unwrap()))
                });
                assert_eq!(results[0], results[1], "{n} × {vocab} × {dim} {format:?}");
            }
        }
    });
}

#[test]
fn no_tokens_and_a_packed_head() {
    let device = Device::flex();
    let head = packed(&random([7, 3], 2, &device), Format::Bf16);
    assert_eq!(stacked(log_prob(random([0, 3], 1, &device), head, &[], 1.0)).dims(), [0, 2]);
}

#[test]
fn a_quantized_head() {
    let device = Device::flex().autodiff();
    for (n, vocab, dim) in SIZES.into_iter().filter(|size| size.0 > 0) {
        for format in [Format::Int8 { block: 32 }, Format::Int4 { block: 64 }] {
            let targets = targets(n, vocab);
            let head = packed(&random([vocab, dim], 2, &Device::flex()), format);
            let mut rows = vec![0.0; vocab * dim];
            rows.chunks_exact_mut(dim).enumerate().for_each(|(row, to)| head.row(0, row, to));
            let wide = Tensor::<2>::from_data(TensorData::new(rows, [vocab, dim]), &device);
            let hidden = random([n, dim], 1, &device).require_grad();
            let gradient = |(log_p, entropy): (Tensor<1>, Tensor<1>)| {
                hidden.grad(&(log_p.sum() + entropy.sum()).backward()).unwrap()
            };
            let plain = reference::log_prob(hidden.clone(), wide, &targets, 1.3);
            let got = log_prob(hidden.clone(), head, &targets, 1.3);
            let what = format!("{n} × {vocab} × {dim} {format:?}");
            assert_close(stacked(got.clone()), stacked(plain.clone()), 1e-5, &what);
            assert_close(gradient(got), gradient(plain), 1e-5, &what);
        }
    }
}

#[test]
fn gradients_do_not_depend_on_threads() {
    let size = (130, 700, 17);
    let targets = targets(size.0, size.1);
    let run = || gradients_of(|h, w| log_prob(h, w, &targets, 0.8), size, DType::F32);
    assert_threads_do_not_matter(|| run().0);
    assert_threads_do_not_matter(|| run().1);
}

/// A Flex tensor of these elements.
fn primitive(x: Tensor<2>) -> FlexTensor {
    let shape = x.dims();
    FlexTensor::from_data(TensorData::new(values(x), shape))
}

#[test]
fn blocks_of_tensor_operations_agree() {
    let device = Device::flex();
    // More than one block both ways: tokens of 1024, entries of 8192.
    for (n, vocab, dim) in [(0, 3, 2), (1, 1, 1), (5, 100, 3), (1030, 8200, 2), (3, 17_000, 4)] {
        let (hidden, head) = (random([n, dim], 1, &device), random([vocab, dim], 2, &device));
        let targets = targets(n, vocab);
        let d_out = random([n, 4], 3, &device);
        let (hidden, head, d_out) = (primitive(hidden), primitive(head), primitive(d_out));
        let own = Flex::log_prob(hidden.clone(), head.clone(), targets.clone(), 0.8);
        let blocks = blockwise::log_prob::<Flex>(hidden.clone(), head.clone(), &targets, 0.8);
        let tensor = |x: FlexTensor| Tensor::<2>::from_data(x.into_data(), &device);
        assert_close(tensor(blocks), tensor(own.clone()), 1e-5, "forward");
        let expected =
            Flex::log_prob_backward(hidden.clone(), head.clone(), targets.clone(), 0.8, own.clone(), d_out.clone());
        let got = blockwise::log_prob_backward::<Flex>(hidden, head, &targets, 0.8, own, d_out);
        assert_close(tensor(got.0), tensor(expected.0), 1e-5, "hidden");
        assert_close(tensor(got.1), tensor(expected.1), 1e-5, "head");
    }
}

#[test]
fn arguments_that_do_not_agree_are_named() {
    let device = Device::flex();
    let run = |n: usize, dim: usize, targets: &[u32], temperature: f64| {
        log_prob(random([n, dim], 1, &device), random([5, 2], 2, &device), targets, temperature)
    };
    assert_panics("a target is not below 5", || run(1, 2, &[5], 1.0));
    assert_panics("one target per row of hidden", || run(2, 2, &[1], 1.0));
    assert_panics("rows as wide as the head's", || run(1, 3, &[1], 1.0));
    assert_panics("the temperature must be positive", || run(1, 2, &[1], 0.0));
}
