//! The fast paths on Flex against the reference, and what is promised about bits.

use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};

use super::{BLOCK, cpu_decode, decode, lightning_attention, reference};
use crate::base::pool::with_threads;
use crate::base::simd::{levels, with_level};
use crate::base::testing::{assert_close, assert_panics};

fn normal<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// q, k and v as the model has them: tokens before heads in memory.
fn random(rows: usize, heads: usize, tokens: usize, dim: usize, device: &Device) -> Tensor<4> {
    normal([rows, tokens, heads, 3 * dim], device).swap_dims(1, 2)
}

fn slopes(heads: usize) -> Vec<f64> {
    (0..heads).map(|h| [0.917, 0.01, 1e-5, 0.3][h % 4]).collect()
}

fn host<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.try_into_vec_as::<f32>().unwrap()
}

fn bits<const D: usize>(x: &Tensor<D>) -> Vec<u32> {
    host(x.clone()).into_iter().map(f32::to_bits).collect()
}

/// Differences count in units of the expected values' root mean square.
#[track_caller]
fn close<const D: usize>(what: &str, got: &Tensor<D>, expected: &Tensor<D>) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let (got, expected) = (host(got.clone()), host(expected.clone()));
    let norm = (expected.iter().map(|x| (x * x) as f64).sum::<f64>() / expected.len().max(1) as f64).sqrt();
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!(((g - e).abs() as f64) < 2e-5 * norm.max(1e-3), "{what} at {i}: {g} is not {e} (norm {norm})");
    }
}

/// Outputs behind a row's length are meaningless: zero in both.
fn masked(o: Tensor<4>, lengths: &[usize]) -> Tensor<4> {
    let [_, heads, tokens, dim] = o.dims();
    let rows = lengths.iter().enumerate().map(|(row, &n)| {
        let kept = o.clone().narrow(0, row, 1);
        if n == tokens {
            return kept;
        }
        let zeros = Tensor::zeros([1, heads, tokens - n, dim], &o.device());
        if n == 0 { zeros } else { Tensor::cat(vec![kept.narrow(2, 0, n), zeros], 2) }
    });
    Tensor::cat(rows.collect(), 0)
}

#[test]
fn blocks_equal_the_reference() {
    let device = Device::flex();
    for level in levels() {
        for (tokens, dim) in
            [(1, 64), (7, 5), (BLOCK - 1, 32), (BLOCK, 96), (BLOCK + 1, 128), (2 * BLOCK + 37, 64), (83, 17)]
        {
            for (has_state, want_state) in [(false, false), (true, true), (true, false), (false, true)] {
                let (rows, heads) = (3, 2);
                let qkv = random(rows, heads, tokens, dim, &device);
                let state = has_state.then(|| normal([rows, heads, dim, dim], &device));
                let starts = [0, 5, 3 * BLOCK + 60];
                let lengths = [tokens, tokens / 2, tokens - 1];
                let call = |fast: bool| {
                    let run = if fast { lightning_attention } else { reference::lightning_attention };
                    run(qkv.clone(), &slopes(heads), state.clone(), Some(&starts), Some(&lengths), want_state)
                };
                let (o, after) = with_level(level, || call(true));
                let (expected, expected_after) = call(false);
                let what = format!("{level:?}, {tokens} tokens of {dim}");
                close(&what, &masked(o, &lengths), &masked(expected, &lengths));
                assert_eq!(after.is_some(), want_state);
                if let (Some(after), Some(expected)) = (after, expected_after) {
                    close(&what, &after, &expected);
                }
            }
        }
    }
}

#[test]
fn halves_are_taken_in_f32() {
    let device = Device::flex();
    let (rows, heads, tokens, dim) = (2, 2, BLOCK + 9, 16);
    let s = slopes(heads);
    for dtype in [DType::BF16, DType::F16] {
        let (qkv, state) =
            (random(rows, heads, tokens, dim, &device).cast(dtype), normal([rows, heads, dim, dim], &device));
        let run =
            |run: fn(_, &[f64], _, _, _, _) -> (Tensor<4>, Option<Tensor<4>>), qkv: &Tensor<4>, state: &Tensor<4>| {
                let (o, after) = run(qkv.clone(), &s, Some(state.clone()), None, None, true);
                let after = after.unwrap();
                assert_eq!([o.dtype(), after.dtype()], [DType::F32; 2], "{dtype:?}");
                (o, after)
            };
        let wide = qkv.clone().cast(DType::F32);
        let (o, after) = run(lightning_attention, &qkv, &state);
        let (expected, expected_after) = run(lightning_attention, &wide, &state);
        assert_eq!((bits(&o), bits(&after)), (bits(&expected), bits(&expected_after)), "{dtype:?}");
        let (o, after) = run(reference::lightning_attention, &qkv, &state);
        close("the reference's o", &o, &expected);
        close("the reference's state", &after, &expected_after);
        let half = state.cast(dtype);
        let (_, after) = run(lightning_attention, &wide, &half);
        let (_, expected) = run(lightning_attention, &wide, &half.cast(DType::F32));
        assert_eq!(bits(&after), bits(&expected), "a state in {dtype:?}");

        let leaf = Tensor::<4>::from_inner(qkv).require_grad();
        let gradient = |qkv: Tensor<4>| {
            let (o, _) = lightning_attention(qkv, &s, None, None, None, false);
            leaf.grad(&o.powi_scalar(2).sum().backward()).unwrap()
        };
        let (got, expected) = (gradient(leaf.clone()), gradient(leaf.clone().cast(DType::F32)));
        assert_eq!(got.dtype(), dtype);
        assert_close(got, expected, 0.0, "gradient");
    }
}

#[test]
fn shapes_that_do_not_agree_are_named() {
    let device = Device::flex();
    let zeros = |shape: [usize; 4]| Tensor::<4>::zeros(shape, &device);
    let run = |qkv: Tensor<4>, state: Option<Tensor<4>>| lightning_attention(qkv, &slopes(2), state, None, None, true);
    for state in [[1, 2, 8, 8], [3, 2, 8, 8], [2, 1, 8, 8], [2, 2, 8, 4], [2, 2, 4, 4]] {
        let told = format!("left: {state:?}\n right: [2, 2, 8, 8]");
        assert_panics("[rows, heads, head_dim, head_dim]", || run(zeros([2, 2, 5, 24]), Some(zeros(state))));
        assert_panics(&told, || run(zeros([2, 2, 5, 24]), Some(zeros(state))));
    }
    assert_panics("q, k and v of every head", || run(zeros([2, 2, 5, 25]), None));
    assert_panics("one slope per head", || run(zeros([2, 3, 5, 24]), None));
}

#[test]
fn strides_of_any_kind() {
    let device = Device::flex();
    let (rows, heads, tokens, dim) = (2, 3, 70, 16);
    let across = normal([3 * dim, heads, rows, tokens], &device).permute([2, 1, 3, 0]);
    let flipped = normal([rows, heads, tokens, 3 * dim], &device).flip([2]);
    let inside = normal([rows, heads, tokens + 2, 3 * dim + 4], &device).narrow(2, 1, tokens).narrow(3, 3, 3 * dim);
    let state = normal([dim, rows, heads, dim], &device).permute([1, 2, 0, 3]);
    let s = slopes(heads);
    for (what, qkv) in [("across", across), ("flipped", flipped), ("inside", inside)] {
        let call = |run: fn(_, &[f64], _, _, _, _) -> _| -> (Tensor<4>, Option<Tensor<4>>) {
            run(qkv.clone(), &s, Some(state.clone()), None, None, true)
        };
        let (o, after) = call(lightning_attention);
        let (expected, expected_after) = call(reference::lightning_attention);
        close(what, &o, &expected);
        close(what, &after.unwrap(), &expected_after.unwrap());
    }
}

#[test]
fn a_text_cut_at_blocks_gives_the_bits_of_the_text_in_one_piece() {
    let device = Device::flex();
    for level in levels() {
        with_level(level, || {
            let (rows, heads, tokens, dim) = (2, 3, 3 * BLOCK + 20, 40);
            let qkv = random(rows, heads, tokens, dim, &device);
            let initial = normal([rows, heads, dim, dim], &device);
            let s = slopes(heads);
            // The call begins in the middle of a block.
            let begin = 5 * BLOCK - 11;
            let whole = lightning_attention(qkv.clone(), &s, Some(initial.clone()), Some(&[begin; 2]), None, true);
            for cut in [11, 11 + BLOCK, 11 + 3 * BLOCK] {
                let mut state = Some(initial.clone());
                let mut parts = Vec::new();
                for (from, to) in [(0, cut), (cut, tokens)] {
                    let (part, starts) = (qkv.clone().narrow(2, from, to - from), [begin + from; 2]);
                    let (o, after) = lightning_attention(part, &s, state, Some(&starts), None, true);
                    parts.push(o);
                    state = after;
                }
                assert_eq!(bits(&Tensor::cat(parts, 2)), bits(&whole.0), "{level:?}, cut at {cut}");
                assert_eq!(bits(&state.unwrap()), bits(whole.1.as_ref().unwrap()), "{level:?}, cut at {cut}");
            }
        });
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_on_any_number_of_threads() {
    let device = Device::flex();
    let (rows, heads, tokens, dim) = (3, 2, BLOCK + 9, 24);
    let qkv = random(rows, heads, tokens, dim, &device);
    let state = normal([rows, heads, dim, dim], &device);
    let (s, starts, lengths) = (slopes(heads), [7, 0, 90], [tokens, 40, tokens - 3]);
    let all = |threads: usize| {
        with_threads(threads, || {
            let state = Some(state.clone());
            lightning_attention(qkv.clone(), &s, state, Some(&starts), Some(&lengths), true)
        })
    };
    let (o, after) = all(1);
    let after = after.unwrap();
    let (o2, after2) = all(3);
    assert_eq!((bits(&o), bits(&after)), (bits(&o2), bits(&after2.unwrap())));
    for row in 0..rows {
        let n = lengths[row];
        let own = |x: &Tensor<4>| x.clone().narrow(0, row, 1);
        let cut = |x: &Tensor<4>| own(x).narrow(2, 0, n);
        let (alone, state) = lightning_attention(cut(&qkv), &s, Some(own(&state)), Some(&[starts[row]]), None, true);
        assert_eq!(bits(&alone), bits(&cut(&o)), "row {row}");
        assert_eq!(bits(&state.unwrap()), bits(&own(&after)), "row {row}");
    }
}

#[test]
fn nan_stays_in_its_row_and_behind_its_token() {
    let device = Device::flex();
    let (rows, heads, tokens, dim) = (2, 2, BLOCK + 40, 32);
    for which in 0..3 {
        for at in [0, 50, BLOCK - 1, BLOCK + 3] {
            let clean = random(rows, heads, tokens, dim, &device);
            let nan = Tensor::full([1, heads, 1, dim], f32::NAN, &device);
            let columns = which * dim..(which + 1) * dim;
            let broken = clean.clone().slice_assign([1..2, 0..heads, at..at + 1, columns], nan);
            let run = |qkv| lightning_attention(qkv, &slopes(heads), None, None, None, true);
            let ((o, state), (expected, expected_state)) = (run(broken), run(clean));
            let row = |x: &Tensor<4>, i: usize| x.clone().narrow(0, i, 1);
            assert_eq!(bits(&row(&o, 0)), bits(&row(&expected, 0)));
            assert_eq!(bits(&row(state.as_ref().unwrap(), 0)), bits(&row(expected_state.as_ref().unwrap(), 0)));
            if at > 0 {
                let before = |x: &Tensor<4>| bits(&row(x, 1).narrow(2, 0, at));
                assert_eq!(before(&o), before(&expected), "input {which}, token {at}");
            }
            let own = host(row(&o, 1).narrow(2, at, 1));
            assert!(own.iter().all(|x| x.is_nan()), "input {which}, token {at}");
            // q is not remembered; k and v are.
            let nans = host(row(&o, 1).narrow(2, at + 1, tokens - at - 1)).iter().filter(|x| x.is_nan()).count();
            assert_eq!(nans > 0, which > 0);
        }
    }
}

#[test]
#[allow(clippy::single_range_in_vec_init)] // one range for one dimension
fn a_row_without_tokens_keeps_its_state() {
    let device = Device::flex();
    let qkv = random(2, 2, 9, 16, &device);
    let state = normal([2, 2, 16, 16], &device);
    let (_, after) = lightning_attention(qkv, &slopes(2), Some(state.clone()), None, Some(&[0, 9]), true);
    let after = after.unwrap();
    assert_eq!(bits(&after.clone().narrow(0, 0, 1)), bits(&state.clone().narrow(0, 0, 1)));
    assert_ne!(bits(&after.narrow(0, 1, 1)), bits(&state.clone().narrow(0, 1, 1)));
    for (rows, tokens) in [(0, 4), (2, 0), (0, 0)] {
        let qkv = Tensor::<4>::zeros([rows, 2, tokens, 3 * 16], &device);
        let kept = state.clone().narrow(0, 0, 2).slice([0..rows]);
        let (o, after) = lightning_attention(qkv, &slopes(2), Some(kept.clone()), None, None, true);
        assert_eq!(o.dims(), [rows, 2, tokens, 16]);
        assert_eq!(bits(&after.unwrap()), bits(&kept));
    }
}

#[test]
fn gradients_equal_those_of_the_reference() {
    let device = Device::flex().autodiff();
    for level in levels() {
        for (tokens, dim) in [(1, 8), (BLOCK - 1, 32), (BLOCK + 1, 64), (2 * BLOCK + 13, 23), (70, 128), (40, 96)] {
            for (has_state, want_state) in [(false, false), (true, true), (true, false), (false, true)] {
                let (rows, heads) = (2, 2);
                let draw = |shape: [usize; 4]| normal(shape, &device).require_grad();
                let qkv = draw([rows, heads, tokens, 3 * dim]);
                let state = draw([rows, heads, dim, dim]);
                let (weight_o, weight_s) =
                    (normal([rows, heads, tokens, dim], &device), normal([rows, heads, dim, dim], &device));
                let (starts, lengths) = ([0, 17], [tokens, tokens.div_ceil(2)]);
                let grads = |fast: bool| {
                    let run = if fast { lightning_attention } else { reference::lightning_attention };
                    let before = has_state.then(|| state.clone());
                    let (o, after) =
                        run(qkv.clone(), &slopes(heads), before, Some(&starts), Some(&lengths), want_state);
                    let mut loss = (masked(o, &lengths) * weight_o.clone()).sum();
                    if let Some(after) = after {
                        loss = loss + (after * weight_s.clone()).sum();
                    }
                    let grads = loss.backward();
                    (qkv.grad(&grads).unwrap(), has_state.then(|| state.grad(&grads).unwrap()))
                };
                let (got, got_state) = with_level(level, || grads(true));
                let (expected, expected_state) = grads(false);
                let what = format!("{level:?}, {tokens} of {dim}, state {has_state} {want_state}");
                close(&what, &got, &expected);
                if let (Some(got), Some(expected)) = (got_state, expected_state) {
                    close(&what, &got, &expected);
                }
            }
        }
    }
}

struct Step {
    qkv: Tensor<2>,
    gate: Tensor<2>,
    state: Tensor<4>,
    norm: Tensor<1>,
}

fn one_step(rows: usize, heads: usize, dim: usize) -> Step {
    let device = Device::flex();
    Step {
        qkv: normal([rows, heads * 3 * dim], &device),
        gate: normal([rows, heads * dim], &device),
        state: normal([rows, heads, dim, dim], &device),
        norm: normal([heads * dim], &device),
    }
}

impl Step {
    fn run(&self, state: Tensor<4>) -> (Tensor<2>, Tensor<4>) {
        let heads = state.dims()[1];
        decode(self.qkv.clone(), self.gate.clone(), state, &slopes(heads), self.norm.clone(), 1e-6)
    }

    /// The state in a buffer that nobody else holds.
    fn unshared(&self) -> Tensor<4> {
        Tensor::from_data(self.state.clone().into_data(), &Device::flex())
    }
}

#[test]
fn decode_equals_the_reference_whoever_holds_the_state() {
    for level in levels() {
        for (rows, heads, dim) in [(1, 1, 1), (1, 8, 64), (3, 2, 32), (17, 3, 96), (2, 5, 128), (4, 2, 23), (0, 2, 16)]
        {
            let step = one_step(rows, heads, dim);
            let before = bits(&step.state);
            let (y, state) = with_level(level, || step.run(step.state.clone()));
            assert_eq!(bits(&step.state), before, "a shared state is left alone");
            let s = slopes(heads);
            let (expected, expected_state) =
                reference::decode(step.qkv.clone(), step.gate.clone(), step.state.clone(), &s, step.norm.clone(), 1e-6);
            close("y", &y, &expected);
            close("state", &state, &expected_state);
            let (y2, state2) = with_level(level, || step.run(step.unshared()));
            assert_eq!((bits(&y), bits(&state)), (bits(&y2), bits(&state2)), "in place");
        }
    }
}

#[test]
fn decode_writes_a_state_in_place_when_nobody_else_holds_it() {
    let (rows, heads, dim) = (2, 3, 32);
    let step = one_step(rows, heads, dim);
    let flex = |x: TensorData| FlexTensor::from_data(x);
    let run = |state: FlexTensor| {
        let (qkv, gate) = (flex(step.qkv.to_data()), flex(step.gate.to_data()));
        cpu_decode::step(qkv, gate, state, flex(step.norm.to_data()), &slopes(heads), 1e-6).1
    };
    let place = |x: &FlexTensor| x.storage::<f32>().as_ptr();
    let state = flex(step.state.to_data());
    let before = place(&state);
    let alone = run(state);
    assert_eq!(place(&alone), before, "alone: where it was");

    let held = flex(step.state.to_data());
    let shared = run(held.clone());
    assert_ne!(place(&shared), place(&held), "shared: elsewhere");
    assert_eq!(held.into_data(), step.state.to_data(), "what others hold stays");
    assert_eq!(shared.into_data(), alone.into_data());
}

#[test]
fn decode_of_a_row_has_the_same_bits_alone_and_on_any_number_of_threads() {
    let step = one_step(19, 4, 72);
    let (y, state) = with_threads(2, || step.run(step.state.clone()));
    let (y1, state1) = with_threads(1, || step.run(step.state.clone()));
    assert_eq!((bits(&y), bits(&state)), (bits(&y1), bits(&state1)));
    for row in 0..19 {
        let own = Step {
            qkv: step.qkv.clone().narrow(0, row, 1),
            gate: step.gate.clone().narrow(0, row, 1),
            state: step.state.clone().narrow(0, row, 1),
            norm: step.norm.clone(),
        };
        let (alone, after) = own.run(own.state.clone());
        assert_eq!(bits(&alone), bits(&y.clone().narrow(0, row, 1)));
        assert_eq!(bits(&after), bits(&state.clone().narrow(0, row, 1)));
    }
}

#[test]
fn decode_keeps_nan_in_its_row() {
    let mut step = one_step(3, 2, 32);
    let clean = step.run(step.state.clone());
    step.qkv = step.qkv.clone().slice_assign([1..2, 3..4], Tensor::full([1, 1], f32::NAN, &Device::flex()));
    let (y, state) = step.run(step.state.clone());
    for row in [0, 2] {
        assert_eq!(bits(&y.clone().narrow(0, row, 1)), bits(&clean.0.clone().narrow(0, row, 1)));
        assert_eq!(bits(&state.clone().narrow(0, row, 1)), bits(&clean.1.clone().narrow(0, row, 1)));
    }
    assert!(host(y.narrow(0, 1, 1)).iter().all(|x| x.is_nan()));
}
