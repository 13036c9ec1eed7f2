//! The fast paths on Flex against the reference, and what is promised about bits.

use burn::tensor::{DType, Device, Distribution, Tensor};

use super::decode::decode_apart;
use super::{KeyValues, Past, decode, reference, softmax_attention};
use crate::base::pool::with_threads;
use crate::base::simd::{levels, with_level};
use crate::base::testing::assert_panics;

fn normal(shape: [usize; 4], device: &Device) -> Tensor<4> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.2), device)
}

fn host(x: Tensor<4>) -> Vec<f32> {
    x.try_into_vec_as::<f32>().unwrap()
}

fn bits(x: &Tensor<4>) -> Vec<u32> {
    host(x.clone()).into_iter().map(f32::to_bits).collect()
}

/// Differences count in units of the expected value and of all values' root mean square.
#[track_caller]
fn close(what: &str, got: &Tensor<4>, expected: &Tensor<4>) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let (got, expected) = (host(got.clone()), host(expected.clone()));
    let norm = (expected.iter().map(|x| (x * x) as f64).sum::<f64>() / expected.len().max(1) as f64).sqrt();
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!(
            ((g - e).abs() as f64) < 2e-5 * (norm.max(0.5) + e.abs() as f64),
            "{what} at {i}: {g} is not {e} (norm {norm})"
        );
    }
}

/// Blocks of `size` keys; the last one is what is left.
fn cut(k: &Tensor<4>, v: &Tensor<4>, size: usize) -> Vec<KeyValues> {
    let all = k.dims()[2];
    (0..all)
        .step_by(size)
        .map(|start| {
            let n = size.min(all - start);
            KeyValues { keys: k.clone().narrow(2, start, n), values: v.clone().narrow(2, start, n) }
        })
        .collect()
}

/// q, k, v of `tokens` queries after `past` tokens; q is a view with its heads side by side, as projections come.
fn draw(rows: usize, heads: [usize; 2], tokens: usize, past: usize, dim: usize) -> [Tensor<4>; 3] {
    let device = Device::flex();
    let q = normal([rows, tokens, heads[0], dim], &device).swap_dims(1, 2);
    let kv = || normal([rows, heads[1], past + tokens, dim], &device);
    [q, kv(), kv()]
}

#[test]
fn blocks_equal_the_reference_at_odd_sizes() {
    for level in levels() {
        for (heads, dim) in [([4, 2], 64), ([3, 1], 32), ([2, 2], 96), ([6, 2], 128), ([5, 1], 23)] {
            for (tokens, past, size) in [
                (1, 0, 4),
                (1, 13, 5),
                (1, 1100, 256),
                (2, 127, 50),
                (63, 0, 256),
                (65, 64, 64),
                (17, 1100, 256),
                (300, 3, 97),
            ] {
                let [q, k, v] = draw(2, heads, tokens, past, dim);
                let blocks = cut(&k, &v, size);
                let got = with_level(level, || softmax_attention(q.clone(), &blocks, past));
                let expected = reference::softmax_attention(q, &blocks, past);
                close(&format!("{level:?} {heads:?} {dim} {tokens} {past} {size}"), &got, &expected);
            }
        }
    }
}

#[test]
fn bf16_keys_and_values_are_read_as_they_are() {
    let [q, k, v] = draw(1, [4, 2], 9, 150, 32);
    let (k, v) = (k.cast(DType::BF16), v.cast(DType::BF16));
    let got = softmax_attention(q.clone(), &cut(&k, &v, 64), 150);
    let widened = cut(&k.clone().cast(DType::F32), &v.clone().cast(DType::F32), 64);
    assert_eq!(bits(&got), bits(&softmax_attention(q.clone(), &widened, 150)));
    close("bf16", &got, &reference::softmax_attention(q, &cut(&k, &v, 64), 150));
}

#[test]
fn strides_of_any_kind() {
    let device = Device::flex();
    let q = normal([16, 4, 70, 2], &device).permute([3, 1, 2, 0]);
    let k = normal([2, 70, 2, 16], &device).swap_dims(1, 2);
    let v = normal([2, 2, 70, 16], &device).flip([3]);
    let got = softmax_attention(q.clone(), &cut(&k, &v, 33), 0);
    close("strides", &got, &reference::softmax_attention(q, &cut(&k, &v, 33), 0));
}

#[test]
fn a_token_has_the_same_bits_however_the_text_is_cut() {
    for level in levels() {
        with_level(level, || {
            let (rows, all) = (2, 2300);
            let [q, k, v] = draw(rows, [4, 2], all, 0, 16);
            let whole = softmax_attention(q.clone(), &cut(&k, &v, 256), 0);
            // Chunks, single tokens (decode), other blocks, keys beyond the last query, one row alone, other threads.
            for (from, n, size, beyond) in [
                (0, 1000, 256, 0),
                (1000, 1, 256, 0),
                (1001, 70, 100, 0),
                (2299, 1, 999, 0),
                (2040, 20, 256, 50),
                (63, 2, 7, 5),
            ] {
                let part = |x: &Tensor<4>, from: usize, to: usize| x.clone().narrow(2, from, to - from);
                let seen = from + n + beyond;
                let blocks = cut(&part(&k, 0, seen), &part(&v, 0, seen), size);
                let queries = part(&q, from, from + n);
                for threads in [1, 4] {
                    let got = with_threads(threads, || softmax_attention(queries.clone(), &blocks, from));
                    assert_eq!(bits(&got), bits(&part(&whole, from, from + n)), "{level:?} from {from}, {n} tokens");
                }
                let row = |x: &Tensor<4>| x.clone().narrow(0, 1, 1);
                let own: Vec<KeyValues> =
                    blocks.iter().map(|b| KeyValues { keys: row(&b.keys), values: row(&b.values) }).collect();
                let got = softmax_attention(row(&queries), &own, from);
                assert_eq!(bits(&got), bits(&row(&part(&whole, from, from + n))));
            }
        });
    }
}

/// A few tokens at a time, whose queries go over whole tiles of keys, beside many at once.
#[test]
fn few_queries_have_the_bits_of_many() {
    for level in levels() {
        for (heads, dim) in [([3, 3], 16), ([4, 2], 64), ([5, 1], 96), ([7, 1], 32), ([8, 1], 128)] {
            let [q, k, v] = draw(1, heads, 1250, 0, dim);
            let part = |x: &Tensor<4>, from: usize, n: usize| x.clone().narrow(2, from, n);
            let run = |from: usize, n: usize, k: &Tensor<4>, v: &Tensor<4>, size: usize| {
                let blocks = cut(&part(k, 0, from + n), &part(v, 0, from + n), size);
                with_level(level, || softmax_attention(part(&q, from, n), &blocks, from))
            };
            let half = |x: &Tensor<4>| x.clone().cast(DType::BF16);
            let turned = |x: &Tensor<4>| (x.clone().swap_dims(2, 3) * 1.0).swap_dims(2, 3);
            for (start, all, parts) in [
                (0, 200, [(62, 1, 256), (63, 1, 256), (64, 2, 256), (191, 1, 100)]),
                (1140, 110, [(1249, 1, 256), (1151, 1, 64), (1150, 2, 1000), (1200, 5, 256)]),
            ] {
                for (kind, k, v) in [("", k.clone(), v.clone()), ("bf16", half(&k), half(&v))] {
                    let many = run(start, all, &k, &v, 256);
                    for (from, n, size) in parts {
                        let what = format!("{level:?} {heads:?} {dim} {kind}: {n} from {from} in blocks of {size}");
                        let wanted = bits(&part(&many, from - start, n));
                        assert_eq!(bits(&run(from, n, &k, &v, size)), wanted, "{what}");
                        assert_eq!(bits(&run(from, n, &turned(&k), &turned(&v), size)), wanted, "{what}, turned");
                    }
                }
            }
        }
    }
}

#[test]
fn nan_and_infinity_stay_where_they_belong() {
    let device = Device::flex();
    let (tokens, dim) = (150, 16);
    let [q, k, v] = draw(2, [4, 2], tokens, 0, dim);
    let run = |q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>| softmax_attention(q.clone(), &cut(k, v, 64), 0);
    let clean = run(&q, &k, &v);
    let fill = |heads: usize, value: f32| Tensor::full([1, heads, 1, dim], value, &device);
    for at in [0, 63, 64, 100] {
        let before = |x: &Tensor<4>| bits(&x.clone().narrow(0, 1, 1).narrow(2, 0, at));
        let bad = q.clone().slice_assign([1..2, 0..4, at..at + 1, 0..dim], fill(4, f32::NAN));
        let got = run(&bad, &k, &v);
        for token in 0..tokens {
            let of = |x: &Tensor<4>| x.clone().narrow(0, 1, 1).narrow(2, token, 1);
            if token == at {
                assert!(host(of(&got)).iter().all(|x| x.is_nan()));
            } else {
                assert_eq!(bits(&of(&got)), bits(&of(&clean)), "a query's NaN is its own");
            }
        }
        for (bad_k, bad_v) in [(true, false), (false, true)] {
            let spoil = |x: &Tensor<4>, yes: bool| {
                if yes {
                    x.clone().slice_assign([1..2, 0..2, at..at + 1, 0..dim], fill(2, f32::NAN))
                } else {
                    x.clone()
                }
            };
            let got = run(&q, &spoil(&k, bad_k), &spoil(&v, bad_v));
            assert_eq!(bits(&got.clone().narrow(0, 0, 1)), bits(&clean.clone().narrow(0, 0, 1)));
            if at > 0 {
                assert_eq!(before(&got), before(&clean), "token {at} is not seen before it");
            }
            assert!(host(got.narrow(0, 1, 1).narrow(2, at, tokens - at)).iter().all(|x| x.is_nan()));
        }
        // A key so far away that its score is -inf weighs nothing, wherever it stands: among other keys it is as if absent.
        if at > 0 {
            let ones = Tensor::ones([2, 4, tokens, dim], &device);
            let far = k.clone().slice_assign([1..2, 0..2, at..at + 1, 0..dim], fill(2, f32::NEG_INFINITY));
            assert!(host(run(&ones, &far, &v)).iter().all(|x| x.is_finite()));
        }
    }
    // A whole tile at -inf comes first.
    let ones = Tensor::ones([2, 4, tokens, dim], &device);
    let far =
        k.clone().slice_assign([0..2, 0..2, 0..64, 0..dim], Tensor::full([2, 2, 64, dim], f32::NEG_INFINITY, &device));
    let got = run(&ones, &far, &v);
    assert!(host(got.clone().narrow(2, 64, tokens - 64)).iter().all(|x| x.is_finite()));
    assert!(host(got.narrow(2, 0, 64)).iter().all(|x| x.is_nan()));
}

#[test]
fn nothing_in_nothing_out() {
    for (rows, tokens, past) in [(0, 3, 0), (1, 0, 5), (2, 0, 0)] {
        let [q, k, v] = draw(rows, [4, 2], tokens, past, 16);
        let o = softmax_attention(q, &[KeyValues { keys: k, values: v }], past);
        assert_eq!(o.dims(), [rows, 4, tokens, 16]);
    }
}

#[test]
fn shapes_that_do_not_agree_are_named() {
    let device = Device::flex();
    let zeros = |shape: [usize; 4]| Tensor::<4>::zeros(shape, &device);
    let good = [2, 2, 5, 8];
    let run = |keys: [usize; 4], values: [usize; 4], tokens: usize| {
        let block = |keys, values| KeyValues { keys: zeros(keys), values: zeros(values) };
        softmax_attention(zeros([2, 4, tokens, 8]), &[block(good, good), block(keys, values)], 0)
    };
    for bad in [[1, 2, 5, 8], [2, 1, 5, 8], [2, 2, 5, 16], [2, 2, 4, 8]] {
        let told = format!("block 1: keys {good:?} and values {bad:?} are [2, 2, tokens, 8], of the same tokens");
        assert_panics(&told, || run(good, bad, 5));
        if bad != [2, 2, 4, 8] {
            assert_panics(&format!("block 1: keys {bad:?}"), || run(bad, bad, 5));
        }
    }
    assert_panics("10 keys for 11 queries after 0 tokens", || run(good, good, 11));
    let three = KeyValues { keys: zeros([2, 3, 5, 8]), values: zeros([2, 3, 5, 8]) };
    assert_panics("4 heads share 3 heads of keys evenly", || softmax_attention(zeros([2, 4, 5, 8]), &[three], 0));
    assert_panics("0 keys for 1 queries after 0 tokens", || softmax_attention(zeros([2, 4, 1, 8]), &[], 0));
    assert_eq!(softmax_attention(zeros([2, 4, 0, 8]), &[], 0).dims(), [2, 4, 0, 8]);
}

#[test]
fn gradients_equal_those_of_the_reference() {
    let device = Device::flex().autodiff();
    for level in levels() {
        for (heads, dim) in [([4, 2], 64), ([3, 1], 32), ([2, 2], 96), ([4, 1], 128), ([5, 1], 23), ([70, 1], 8)] {
            for (tokens, block) in [(1, 256), (63, 256), (130, 64), (65, 30)] {
                let draw = |heads: usize| normal([2, heads, tokens, dim], &device).require_grad();
                let (q, k, v) = (draw(heads[0]), draw(heads[1]), draw(heads[1]));
                let weight = normal([2, heads[0], tokens, dim], &device);
                let grads = |fast: bool| {
                    let run = if fast { softmax_attention } else { reference::softmax_attention };
                    let o = run(q.clone(), &cut(&k, &v, block), 0);
                    let grads = (o.clone() * weight.clone()).sum().backward();
                    [o.inner(), q.grad(&grads).unwrap(), k.grad(&grads).unwrap(), v.grad(&grads).unwrap()]
                };
                let (got, mut expected) = (with_level(level, || grads(true)), grads(false));
                if tokens == 1 {
                    // A text's only token weighs 1 whatever its score: what the reference has here is what it rounded off, which
                    // with 70 heads on one key is as much as may differ.
                    expected[1] = expected[1].zeros_like();
                    expected[2] = expected[2].zeros_like();
                }
                for (name, (got, expected)) in ["o", "q", "k", "v"].iter().zip(got.iter().zip(&expected)) {
                    close(&format!("{level:?} {heads:?} {dim} {tokens} d_{name}"), got, expected);
                }
            }
        }
    }
}

#[test]
fn gradients_after_a_past_are_those_of_the_whole_text() {
    let device = Device::flex().autodiff();
    let (heads, tokens, past, dim) = ([4, 2], 40, 27, 16);
    let draw = |heads: usize| normal([2, heads, past + tokens, dim], &device).require_grad();
    let (q, k, v) = (draw(heads[0]), draw(heads[1]), draw(heads[1]));
    let weight = normal([2, heads[0], tokens, dim], &device);
    let last = |x: Tensor<4>| x.narrow(2, past, tokens);
    let grads = |o: Tensor<4>| {
        let grads = (o * weight.clone()).sum().backward();
        [&q, &k, &v].map(|x| x.grad(&grads).unwrap())
    };
    let expected = grads(last(softmax_attention(q.clone(), &cut(&k, &v, 256), 0)));
    let got = grads(softmax_attention(last(q.clone()), &cut(&k, &v, 20), past));
    for (name, (got, expected)) in ["q", "k", "v"].iter().zip(got.iter().zip(&expected)) {
        close(&format!("d_{name}"), got, expected);
    }
}

#[test]
fn gradients_have_the_same_bits_on_any_number_of_threads() {
    let device = Device::flex().autodiff();
    let draw = |heads: usize| normal([2, heads, 100, 16], &device).require_grad();
    let (q, k, v) = (draw(4), draw(2), draw(2));
    let run = |threads: usize| {
        with_threads(threads, || {
            let o = softmax_attention(q.clone(), &cut(&k, &v, 256), 0);
            let grads = o.powi_scalar(2).sum().backward();
            [&q, &k, &v].map(|x| bits(&x.grad(&grads).unwrap()))
        })
    };
    assert_eq!(run(1), run(3));
}

/// Rows of these many tokens, in blocks of `rooms` tokens (the last as long as needed), with what lies behind a row's end wild.
fn pasts(tokens: &[usize], [kv_heads, dim]: [usize; 2], rooms: &[usize]) -> Vec<Past> {
    let device = Device::flex();
    let past = |&tokens: &usize| {
        let (mut blocks, mut room) = (Vec::new(), 0);
        while room <= tokens {
            let size = rooms.get(blocks.len()).copied().unwrap_or(tokens + 1 - room);
            blocks.push(size);
            room += size;
        }
        let draw = || {
            let block = |&size: &usize| normal([1, kv_heads, size, dim], &device).squeeze_dim(0);
            let mut blocks: Vec<Tensor<3>> = blocks.iter().map(block).collect();
            let (used, last) = (tokens - (room - blocks.last().map_or(0, |b| b.dims()[1])), blocks.pop().unwrap());
            let size = last.dims()[1];
            let wild = Tensor::full([kv_heads, size - used, dim], f32::NAN, &device);
            blocks.push(last.slice_assign([0..kv_heads, used..size, 0..dim], wild));
            blocks
        };
        Past { keys: draw(), values: draw(), tokens }
    };
    tokens.iter().map(past).collect()
}

fn flat(x: &Tensor<3>) -> Vec<u32> {
    x.clone().try_into_vec_as::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn in_dtype(past: Past, dtype: DType) -> Past {
    let cast = |blocks: Vec<Tensor<3>>| blocks.into_iter().map(|x| x.cast(dtype)).collect();
    Past { keys: cast(past.keys), values: cast(past.values), ..past }
}

/// A batch's step has the bits of each row alone, for every number of rows, depth, thread and level; what it adds to is its own.
#[test]
fn a_step_of_many_rows_is_that_of_each_alone() {
    let cases = [
        (vec![0], [2, 2], 32, vec![4]),
        (vec![5, 0, 64, 63, 255, 1, 31, 17], [4, 2], 64, vec![5, 256]),
        (vec![0, 1100, 2, 2047, 63], [6, 2], 96, vec![256, 256, 512]),
        (vec![300, 299, 1023, 1024, 1025], [3, 1], 23, vec![256]),
        (vec![3000], [8, 2], 128, vec![256, 256, 512, 1024]),
    ];
    for (tokens, [heads, kv_heads], dim, rooms) in cases {
        let device = Device::flex();
        let row = |n: usize| normal([1, 1, tokens.len(), n * dim], &device).squeeze_dims::<2>(&[0, 1]);
        let (q, k, v) = (row(heads), row(kv_heads), row(kv_heads));
        for dtype in [DType::F32, DType::BF16] {
            let pasts: Vec<Past> =
                pasts(&tokens, [kv_heads, dim], &rooms).into_iter().map(|past| in_dtype(past, dtype)).collect();
            let kept: Vec<_> = pasts.iter().flat_map(|past| [&past.keys, &past.values]).flatten().map(flat).collect();
            for level in levels() {
                for threads in [1, 2, 5] {
                    let pasts = || pasts.clone();
                    let on = |f: &dyn Fn() -> _| with_level(level, || with_threads(threads, f));
                    let (o, last) = on(&|| decode(q.clone(), k.clone(), v.clone(), pasts()));
                    let (wanted_o, wanted) = on(&|| decode_apart(q.clone(), k.clone(), v.clone(), pasts()));
                    let what = format!("{level:?} {threads} {tokens:?} {dtype:?}");
                    let bits = |x: Tensor<2>| x.try_into_vec_as::<f32>().unwrap().into_iter().map(f32::to_bits);
                    assert!(bits(o).eq(bits(wanted_o)), "{what}");
                    for (got, wanted) in last.iter().zip(&wanted) {
                        assert!(flat(&got[0]) == flat(&wanted[0]) && flat(&got[1]) == flat(&wanted[1]), "{what}");
                    }
                    assert_eq!(last.len(), tokens.len());
                }
            }
            // Others hold these blocks: they were copied, not written to.
            let now: Vec<_> = pasts.iter().flat_map(|past| [&past.keys, &past.values]).flatten().map(flat).collect();
            assert!(kept == now);
        }
    }
}

/// No rows, what lies behind a row's end, and how far bf16 is from f32.
#[test]
fn a_step_of_what_is_not_the_rule() {
    let device = Device::flex();
    let row = |n: usize, rows: usize| normal([1, 1, rows, n], &device).squeeze_dims::<2>(&[0, 1]);
    let (o, _) = decode(row(128, 2), row(64, 2), row(64, 2), pasts(&[7, 300], [2, 32], &[256, 256]));
    assert!(o.into_data().iter::<f32>().all(|x| x.is_finite()), "what lies behind a row's end is not read");

    let (o, last) = decode(row(128, 0), row(64, 0), row(64, 0), Vec::new());
    assert_eq!((o.dims(), last.len()), ([0, 128], 0));

    let (q, k, v) = (row(128, 2), row(64, 2), row(64, 2));
    let exact = pasts(&[7, 300], [2, 32], &[256, 256]);
    let half = exact.iter().map(|past| in_dtype(past.clone(), DType::BF16)).collect();
    let (rounded, last) = decode(q.clone(), k.clone(), v.clone(), half);
    assert!(last.iter().flatten().all(|x| x.dtype() == DType::BF16));
    let (exact, _) = decode(q, k, v, exact);
    let off = (rounded - exact).abs().max().into_scalar::<f32>();
    assert!(off > 0.0 && off < 0.05, "{off}");
}

#[test]
#[should_panic(expected = "row 1 has no room for token 4")]
fn a_step_needs_room() {
    let device = Device::flex();
    let zeros = |n: usize| Tensor::<2>::zeros([2, n], &device);
    let block = || vec![Tensor::<3>::zeros([1, 4, 8], &device)];
    let past = |tokens| Past { keys: block(), values: block(), tokens };
    decode(zeros(8), zeros(8), zeros(8), vec![past(3), past(4)]);
}
