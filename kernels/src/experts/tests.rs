//! The fast paths against the definition.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{Device, Int, Tensor, TensorData};

use super::groups::Groups;
use super::*;
use crate::base::packed::Format;
use crate::base::testing::{
    assert_close, assert_panics, assert_threads_do_not_matter, at_every_level, bits, random, strided, values, window,
};

const FORMATS: [Format; 6] = [
    Format::F32,
    Format::Bf16,
    Format::Int8 { block: 32 },
    Format::Int8 { block: 64 },
    Format::Int4 { block: 32 },
    Format::Int4 { block: 64 },
];

/// `(tokens, k, experts, hidden, ffn)`.
const SIZES: [(usize, usize, usize, usize, usize); 8] = [
    (1, 1, 1, 1, 1),
    (1, 2, 4, 31, 33),
    (2, 2, 5, 32, 64),
    (7, 3, 3, 65, 17),
    (13, 2, 32, 97, 96),
    (64, 2, 4, 128, 127),
    (67, 1, 8, 33, 131),
    (150, 2, 3, 40, 70),
];

struct Case {
    x: Tensor<2>,
    routing: Routing,
    w: [Tensor<3>; 3],
}

impl Case {
    fn new((tokens, k, count, hidden, ffn): (usize, usize, usize, usize, usize), device: &Device) -> Self {
        let stack = |a, b, seed| random([count, a, b], seed, device) * (1.0 / (b as f64).sqrt());
        Case {
            x: random([tokens, hidden], 1, device),
            routing: route(random([tokens, count], 2, device), k, None),
            w: [stack(ffn, hidden, 3), stack(hidden, ffn, 4), stack(ffn, hidden, 5)],
        }
    }

    fn weights(&self) -> ExpertsWeights {
        let [w1, w2, w3] = self.w.each_ref().map(|w| Weight::from(w.clone()));
        ExpertsWeights { w1, w2, w3 }
    }

    fn packed(&self, format: Format) -> ExpertsWeights {
        let [w1, w2, w3] = self.w.each_ref().map(|w| Weight::from(pack(format, w)));
        ExpertsWeights { w1, w2, w3 }
    }

    /// Token `t` with its routing, alone.
    fn alone(&self, t: usize) -> (Tensor<2>, Routing) {
        let [_, k] = self.routing.shares.dims();
        let routing = Routing {
            choices: self.routing.choices.host()[t * k..][..k].to_vec().into(),
            shares: self.routing.shares.clone().narrow(0, t, 1),
        };
        (self.x.clone().narrow(0, t, 1), routing)
    }
}

fn pack(format: Format, w: &Tensor<3>) -> Packed {
    let [count, out, input] = w.dims();
    let all = values(w.clone());
    Packed::pack(format, count, out, input, &|matrix, row, buffer| {
        buffer.copy_from_slice(&all[(matrix * out + row) * input..][..input]);
    })
    .unwrap()
}

#[test]
fn best_first_and_the_lower_number_wins_a_tie() {
    assert_eq!(choose(&[0.1, 0.4, 0.1, 0.4], 4, 3)[..], [1, 3, 0]);
    assert_eq!(choose(&[f32::NAN, 0.0, 1.0], 3, 3)[..], [2, 1, 0]);
    assert_eq!(choose(&[f32::NAN, f32::NAN, f32::NAN], 3, 2)[..], [0, 1]);
    assert_eq!(choose(&[0.1, 0.2, 0.7, 0.5, 0.5, 0.0], 3, 1)[..], [2, 0]);
    assert!(choose(&[], 3, 2).is_empty());
}

#[test]
fn slots_are_numbered_by_i32() {
    assert!(slots_fit(1 << 30, 1) && slots_fit(0, 2) && slots_fit((1 << 30) - 1, 2));
    assert!(!slots_fit(1 << 30, 2) && !slots_fit(usize::MAX, 2));
}

#[test]
fn shapes_that_do_not_agree_are_named() {
    let size = (3, 2, 4, 32, 64);
    let (case, device) = (Case::new(size, &Device::flex()), Device::flex());
    let other = |count: usize, out: usize, input: usize| random::<3>([count, out, input], 6, &device);
    for format in [None, Some(Format::F32), Some(Format::Int8 { block: 32 })] {
        let weight = |w: Tensor<3>| format.map_or_else(|| w.clone().into(), |format| Weight::from(pack(format, &w)));
        let weights = || {
            let [w1, w2, w3] = case.w.clone().map(weight);
            ExpertsWeights { w1, w2, w3 }
        };
        let run = |weights: ExpertsWeights| experts(case.x.clone(), &case.routing, &weights);
        assert_panics("w1 is [experts, ffn, hidden]", || {
            run(ExpertsWeights { w1: weight(other(4, 64, 64)), ..weights() })
        });
        assert_panics("w2 is [experts, hidden, ffn]", || {
            run(ExpertsWeights { w2: weight(other(3, 32, 64)), ..weights() })
        });
        assert_panics("w3 is [experts, ffn, hidden]", || {
            run(ExpertsWeights { w3: weight(other(4, 32, 32)), ..weights() })
        });
        let routing = Routing { shares: case.routing.shares.clone().narrow(1, 0, 1), ..case.routing.clone() };
        assert_panics("the routing is of other tokens", || experts(case.x.clone(), &routing, &weights()));
    }
}

#[test]
fn what_the_kernels_cannot_number_is_left_to_the_reference() {
    // A row for every slot, gate and up side by side: M1 has 6144 hidden and 9216 between.
    assert!(indexable(116_508, 6144, 9216) && !indexable(116_509, 6144, 9216));
    assert!(indexable(1 << 18, 1 << 13, 1) && !indexable((1 << 18) + 1, 1 << 13, 1));
    assert!(!indexable(2, 1, usize::MAX));
}

#[test]
fn f32_tensors_equal_the_definition() {
    at_every_level(|| {
        for size in SIZES {
            let case = Case::new(size, &Device::flex());
            let expected = reference::experts(case.x.clone(), &case.routing, &case.weights());
            let got = experts(case.x.clone(), &case.routing, &case.weights());
            assert_close(got, expected, 2e-5, &format!("{size:?}"));
        }
    });
}

/// The roundings of activations set the tolerance; the weights are the same on both sides.
#[test]
fn packed_weights_equal_the_definition() {
    at_every_level(|| {
        for format in FORMATS {
            let tolerance = match format {
                Format::F32 => 2e-5,
                Format::Bf16 => 0.02,
                _ => 0.05,
            };
            for size in SIZES {
                let case = Case::new(size, &Device::flex());
                let weights = case.packed(format);
                let expected = reference::experts(case.x.clone(), &case.routing, &weights);
                let got = experts(case.x.clone(), &case.routing, &weights);
                assert_close(got, expected, tolerance, &format!("{format:?} {size:?}"));
            }
        }
    });
}

#[test]
fn a_token_does_not_see_who_shares_its_experts() {
    at_every_level(|| {
        let mut all = FORMATS.map(Some).to_vec();
        all.push(None);
        for format in all {
            for size in [(13, 2, 32, 97, 96), (64, 2, 4, 128, 127), (150, 2, 3, 40, 70)] {
                let case = Case::new(size, &Device::flex());
                let weights = format.map_or_else(|| case.weights(), |format| case.packed(format));
                let together = bits(experts(case.x.clone(), &case.routing, &weights));
                for t in 0..size.0 {
                    let (x, routing) = case.alone(t);
                    let own = bits(experts(x, &routing, &weights));
                    assert_eq!(own, together[t * size.3..][..size.3], "{format:?} {size:?} token {t}");
                }
                assert_threads_do_not_matter(|| experts(case.x.clone(), &case.routing, &weights));
            }
        }
    });
}

#[test]
fn what_is_not_finite_stays_in_its_token() {
    let size = (9, 2, 3, 40, 33);
    let mut all = FORMATS.map(Some).to_vec();
    all.push(None);
    for format in all {
        let case = Case::new(size, &Device::flex());
        let weights = format.map_or_else(|| case.weights(), |format| case.packed(format));
        let good = bits(experts(case.x.clone(), &case.routing, &weights));
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = values(case.x.clone());
            x[4 * 40 + 39] = bad;
            let x = Tensor::<2>::from_data(TensorData::new(x, [9, 40]), &case.x.device());
            let got = values(experts(x, &case.routing, &weights));
            for (t, (got, good)) in got.chunks(40).zip(good.chunks(40)).enumerate() {
                if t == 4 {
                    assert!(got.iter().all(|y| !y.is_finite()), "{format:?} {bad}");
                } else {
                    assert!(got.iter().zip(good).all(|(a, b)| a.to_bits() == *b), "{format:?} {bad} token {t}");
                }
            }
        }
    }
}

/// One token reads exactly k experts: no product with the others' weights, not even one that is thrown away.
#[test]
fn weights_of_experts_that_nobody_chose_are_not_touched() {
    for size in [(1, 2, 32, 64, 96), (3, 2, 32, 33, 40), (1, 1, 300, 8, 8)] {
        let mut case = Case::new(size, &Device::flex());
        let formats = [None, Some(Format::F32), Some(Format::Bf16)];
        let run = |case: &Case, format: Option<Format>| {
            let weights = format.map_or_else(|| case.weights(), |format| case.packed(format));
            bits(experts(case.x.clone(), &case.routing, &weights))
        };
        let expected = formats.map(|format| run(&case, format));
        let chosen = case.routing.choices.host();
        case.w = case.w.map(|w| {
            let (dims, mut all) = (w.dims(), values(w));
            let others =
                all.chunks_exact_mut(dims[1] * dims[2]).enumerate().filter(|(e, _)| !chosen.contains(&(*e as u32)));
            others.for_each(|(_, w)| w.fill(f32::NAN));
            Tensor::from_data(TensorData::new(all, dims), &Device::flex())
        });
        assert_eq!(formats.map(|format| run(&case, format)), expected, "{size:?}");
    }
    // Nor does the list of jobs grow with the number of experts.
    let jobs = |count: usize| {
        let jobs = Groups::new(&[1, 3], 2, count).jobs(48, 2 * 32 * 64, 1 << 10);
        jobs.into_iter().map(|job| (job.expert, job.rows, job.columns)).collect::<Vec<_>>()
    };
    assert_eq!(jobs(4), jobs(1000));
    assert!(jobs(4).iter().all(|(expert, ..)| [1, 3].contains(expert)));
    assert_eq!(jobs(4).iter().map(|(.., columns)| columns.len()).sum::<usize>(), 2 * 48);
}

/// `Σ y · c`, differentiated; the gradients of x, the router's logits and the three weights.
fn gradients(
    size: (usize, usize, usize, usize, usize),
    fast: bool,
    seen: impl Fn(Tensor<2>) -> Tensor<2>,
) -> [Tensor<3>; 5] {
    let (tokens, k, count, hidden, _) = size;
    let device = Device::flex().autodiff();
    let case = Case::new(size, &device);
    let [w1, w2, w3] = case.w.clone().map(|w| w.require_grad());
    let (x, logits) = (case.x.clone().require_grad(), random([tokens, count], 2, &device).require_grad());
    let routing = route(logits.clone(), k, None);
    let weights = ExpertsWeights { w1: w1.clone().into(), w2: w2.clone().into(), w3: w3.clone().into() };
    let run = if fast { experts } else { reference::experts };
    let y = run(seen(x.clone()), &routing, &weights);
    let grads = (y * random([tokens, hidden], 9, &device)).sum().backward();
    let flat = |x: &Tensor<2>| x.grad(&grads).unwrap().unsqueeze_dim::<3>(0);
    [flat(&x), flat(&logits), w1.grad(&grads).unwrap(), w2.grad(&grads).unwrap(), w3.grad(&grads).unwrap()]
}

#[test]
fn gradients_equal_autodiff_of_the_definition() {
    at_every_level(|| {
        for size in SIZES {
            let expected = gradients(size, false, |x| x);
            for (i, (got, expected)) in gradients(size, true, |x| x).into_iter().zip(expected).enumerate() {
                assert_close(got, expected, 1e-4, &format!("{size:?} gradient {i}"));
            }
        }
    });
}

/// What is kept for the backward is what it would compute again.
#[test]
fn the_backward_without_what_was_kept() {
    for size in [(1, 1, 1, 1, 1), (13, 2, 32, 97, 96), (67, 1, 8, 33, 131)] {
        let case = Case::new(size, &Device::flex());
        let flex = |data: TensorData| FlexTensor::from_data(data);
        let d_y = flex(random([size.0, size.3], 9, &Device::flex()).into_data());
        let (x, shares) = (flex(case.x.clone().into_data()), flex(case.routing.shares.clone().into_data()));
        let [w1, w2, w3] = case.w.clone().map(|w| flex(w.into_data()));
        let all = || (x.clone(), shares.clone(), w1.clone(), w2.clone(), w3.clone(), case.routing.choices.host());
        let (a, b, c, d, e, choices) = all();
        let (_, gate, up) = Flex::experts_saving(a, b, c, d, e, choices);
        let (a, b, c, d, e, choices) = all();
        let kept = Flex::experts_backward_from(a, b, c, d, e, d_y.clone(), gate, up, choices);
        let (a, b, c, d, e, choices) = all();
        let again = Flex::experts_backward(a, b, c, d, e, d_y.clone(), choices);
        let list = |(a, b, c, d, e)| [a, b, c, d, e].map(|t: FlexTensor| t.into_data());
        assert_eq!(list(kept), list(again), "{size:?}");
    }
}

#[test]
fn gradients_of_experts_that_nobody_chose_are_zero() {
    let size = (5, 2, 32, 24, 20);
    let case = Case::new(size, &Device::flex());
    let [_, _, w1, w2, w3] = gradients(size, true, |x| x);
    for w in [w1, w2, w3] {
        for (e, own) in values(w).chunks(24 * 20).enumerate() {
            let chosen = case.routing.choices.host().contains(&(e as u32));
            assert_eq!(own.iter().any(|&d| d != 0.0), chosen, "expert {e}");
        }
    }
}

#[test]
fn strided_inputs() {
    let size = (13, 2, 5, 33, 37);
    let case = Case::new(size, &Device::flex());
    let turned = |w: &Tensor<3>| w.clone().swap_dims(1, 2).matmul(Tensor::<3>::eye_of(w)).swap_dims(1, 2);
    for weights in [case.weights(), case.packed(Format::F32), case.packed(Format::Int8 { block: 32 })] {
        let expected = bits(experts(case.x.clone(), &case.routing, &weights));
        for view in [strided as fn(Tensor<2>) -> Tensor<2>, window] {
            let routing = Routing { shares: view(case.routing.shares.clone()), ..case.routing.clone() };
            assert_eq!(bits(experts(view(case.x.clone()), &routing, &weights)), expected);
        }
    }
    let [w1, w2, w3] = case.w.each_ref().map(|w| Weight::from(turned(w)));
    let got = experts(case.x.clone(), &case.routing, &ExpertsWeights { w1, w2, w3 });
    assert_close(got, experts(case.x.clone(), &case.routing, &case.weights()), 1e-6, "weights behind other strides");
    let expected = gradients(size, true, |x| x);
    for (got, expected) in gradients(size, true, window).into_iter().zip(expected) {
        assert_close(got, expected, 1e-6, "gradients through a view");
    }
}

trait Eye {
    /// A product with this changes nothing but where the values lie.
    fn eye_of(like: &Tensor<3>) -> Tensor<3>;
}

impl Eye for Tensor<3> {
    fn eye_of(like: &Tensor<3>) -> Tensor<3> {
        let [_, n, _] = like.dims();
        let all = Tensor::<1, Int>::arange(0..n as i64, &like.device());
        all.one_hot::<2>(n).float().unsqueeze_dim(0)
    }
}

#[test]
fn no_tokens_and_packed_weights_under_autodiff() {
    let device = Device::flex();
    let case = Case::new((6, 2, 3, 33, 40), &device);
    for weights in [case.weights(), case.packed(Format::Bf16), case.packed(Format::Int4 { block: 32 })] {
        let none = route(Tensor::zeros([0, 3], &device), 2, None);
        assert_eq!(experts(Tensor::zeros([0, 33], &device), &none, &weights).dims(), [0, 33]);
    }
    // Packed weights are constants, but the gradients of x and of the shares pass through them.
    let shares = Tensor::from_inner(case.routing.shares.clone()).require_grad();
    let routing = Routing { choices: case.routing.choices.clone(), shares: shares.clone() };
    let x = Tensor::from_inner(case.x.clone()).require_grad();
    for format in FORMATS {
        let weights = case.packed(format);
        let dense = |w: &Weight<3>| -> Weight<3> {
            Tensor::stack::<3>((0..3).map(|e| w.dense(e, &device.clone().autodiff())).collect(), 0).into()
        };
        let same = ExpertsWeights { w1: dense(&weights.w1), w2: dense(&weights.w2), w3: dense(&weights.w3) };
        let run = |y: Tensor<2>| {
            let grads = (y.clone() * random(y.dims(), 9, &y.device())).sum().backward();
            [y.inner(), x.grad(&grads).unwrap(), shares.grad(&grads).unwrap()]
        };
        let got = run(experts(x.clone(), &routing, &weights));
        let expected = run(reference::experts(x.clone(), &routing, &same));
        for ((got, expected), name) in got.into_iter().zip(expected).zip(["y", "dx", "d_shares"]) {
            assert_close(got, expected, 2e-5, &format!("{format:?} under autodiff: {name}"));
        }
    }
    let weights = case.packed(Format::F32);
    let y = experts(x, &routing, &weights).inner();
    assert_close(y, experts(case.x.clone(), &case.routing, &weights), 2e-5, "tracked and not");
    // Nothing tracked: the packed path itself.
    let routing = Routing { shares: Tensor::from_inner(case.routing.shares.clone()), ..routing };
    let y = experts(Tensor::from_inner(case.x.clone()), &routing, &weights);
    assert_eq!(bits(y.inner()), bits(experts(case.x.clone(), &case.routing, &weights)));
}

#[test]
#[should_panic(expected = "sends token 1 (rank 0) to expert 4, and there are 4")]
fn replay_of_an_expert_that_is_not_there() {
    route(Tensor::zeros([2, 4], &Device::flex()), 2, Some(&[0, 3, 4, 1]));
}

#[test]
#[should_panic(expected = "routing needs 2 experts for each of 2 tokens")]
fn replay_of_another_length() {
    route(Tensor::zeros([2, 4], &Device::flex()), 2, Some(&[0, 3, 1]));
}

#[test]
fn the_host_routes_as_the_tensors_do() {
    let device = Device::flex();
    for (tokens, count, k) in [(1, 1, 1), (1, 32, 2), (7, 5, 5), (40, 8, 2)] {
        let mut logits = values(random::<2>([tokens, count], 3, &device) * 9.0);
        logits[count - 1] = logits[0];
        if tokens > 1 {
            logits[(tokens - 1) * count] = f32::NAN;
        }
        let logits = Tensor::<2>::from_data(TensorData::new(logits, [tokens, count]), &device);
        let got = route(logits.clone(), k, None);
        let want = route(Tensor::from_data(logits.into_data(), &device.clone().autodiff()), k, None);
        assert_eq!(got.choices.host(), want.choices.host(), "{k} of {count}");
        for (got, want) in values(got.shares).into_iter().zip(values(want.shares)) {
            assert!((got - want).abs() < 1e-6 || (got.is_nan() && want.is_nan()), "{got} for {want}");
        }
    }
}
