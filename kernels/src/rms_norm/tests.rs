use burn::tensor::{DType, Device, Tensor};

use super::{add_rms_norm, gated_rms_norm, reference, rms_norm};
use crate::base::testing::{
    assert_close, assert_panics, assert_threads_do_not_matter, at_every_level, bits, random, strided, values, window,
};

const EPS: f64 = 1e-5;
const SIZES: [(usize, usize); 9] = [(0, 5), (1, 1), (1, 64), (2, 7), (3, 16), (5, 63), (7, 65), (67, 129), (2, 769)];

#[test]
fn equal_to_the_definition() {
    let device = Device::flex();
    at_every_level(|| {
        for (n, dim) in SIZES {
            let what = format!("{n} × {dim}");
            let (x, y) = (random([n, dim], 1, &device), random([n, dim], 2, &device));
            let w = random([dim], 3, &device);
            let expected = reference::rms_norm(x.clone(), w.clone(), EPS);
            assert_close(rms_norm(x.clone(), w.clone(), EPS), expected, 1e-5, &what);

            let expected = reference::add_rms_norm(x.clone(), y.clone(), w.clone(), 1.5, 0.7, EPS);
            let got = add_rms_norm(x.clone(), y.clone(), w.clone(), 1.5, 0.7, EPS);
            assert_close(got.0, expected.0, 1e-6, &what);
            assert_close(got.1, expected.1, 1e-5, &what);

            let expected = reference::gated_rms_norm(x.clone(), y.clone(), w.clone(), EPS);
            assert_close(gated_rms_norm(x, y, w, EPS), expected, 1e-5, &what);
        }
    });
}

#[test]
fn strides_do_not_matter() {
    let device = Device::flex();
    let (n, dim) = (9, 21);
    let (x, y, w) = (random([n, dim], 1, &device), random([n, dim], 2, &device), random([dim], 3, &device));
    let plain = bits(rms_norm(x.clone(), w.clone(), EPS));
    let added = bits(add_rms_norm(x.clone(), y.clone(), w.clone(), 2.0, 3.0, EPS).1);
    let gated = bits(gated_rms_norm(x.clone(), y.clone(), w.clone(), EPS));
    for view in [strided as fn(Tensor<2>) -> Tensor<2>, window] {
        let (x, y) = (view(x.clone()), view(y.clone()));
        assert_eq!(bits(rms_norm(x.clone(), w.clone(), EPS)), plain);
        assert_eq!(bits(add_rms_norm(x.clone(), y.clone(), w.clone(), 2.0, 3.0, EPS).1), added);
        assert_eq!(bits(gated_rms_norm(x, y, w.clone(), EPS)), gated);
    }
    // Attention's output: [rows, heads, tokens, head_dim] seen as [rows, tokens, heads, head_dim].
    let o = random::<4>([2, 3, 5, 8], 4, &device).swap_dims(1, 2);
    let (gate, w) = (random([10, 24], 5, &device), random([24], 6, &device));
    let copied = gated_rms_norm(o.clone().reshape([10, 24]), gate.clone(), w.clone(), EPS);
    assert_eq!(bits(gated_rms_norm(o, gate, w, EPS)), bits(copied));
}

#[test]
fn a_row_knows_no_other() {
    let device = Device::flex();
    let (n, dim) = (203, 257);
    let (x, y, w) = (random([n, dim], 1, &device), random([n, dim], 2, &device), random([dim], 3, &device));
    at_every_level(|| {
        assert_threads_do_not_matter(|| rms_norm(x.clone(), w.clone(), EPS));
        assert_threads_do_not_matter(|| add_rms_norm(x.clone(), y.clone(), w.clone(), 1.1, 0.9, EPS).1);
        let all = bits(gated_rms_norm(x.clone(), y.clone(), w.clone(), EPS));
        for row in [0, 1, 63, 64, 202] {
            let (x, y) = (x.clone().narrow(0, row, 1), y.clone().narrow(0, row, 1));
            assert_eq!(bits(gated_rms_norm(x, y, w.clone(), EPS)), all[row * dim..(row + 1) * dim]);
        }
    });
    let mut with_nan = values(x.clone());
    with_nan[5 * dim + 3] = f32::NAN;
    let with_nan = Tensor::<1>::from_floats(&with_nan[..], &device).reshape([n, dim]);
    let (clean, broken) = (values(rms_norm(x, w.clone(), EPS)), values(rms_norm(with_nan, w, EPS)));
    for (i, (clean, broken)) in clean.iter().zip(&broken).enumerate() {
        if i / dim == 5 { assert!(broken.is_nan()) } else { assert_eq!(clean, broken) }
    }
}

#[test]
fn shapes_that_do_not_agree_are_named() {
    let device = Device::flex();
    let x = |shape: [usize; 2]| Tensor::<2>::ones(shape, &device);
    let w = |dim: usize| Tensor::<1>::ones([dim], &device);
    // [4, 6] has 8 whole rows of 3.
    for dtype in [DType::F32, DType::BF16] {
        let x = |shape| x(shape).cast(dtype);
        let told = "rows [4, 6] want a weight as long as one of them";
        assert_panics(told, || rms_norm(x([4, 6]), w(3), EPS));
        assert_panics(told, || add_rms_norm(x([4, 6]), x([4, 6]), w(12), 1.0, 1.0, EPS));
        assert_panics(told, || gated_rms_norm(x([4, 6]), x([4, 6]), w(3), EPS));
        for branch in [[4, 3], [8, 6], [2, 12], [8, 3]] {
            let told = format!("left: {branch:?}");
            assert_panics(&told, || add_rms_norm(x([4, 6]), x(branch), w(6), 1.0, 1.0, EPS));
        }
        let told = "o [4, 5] has not the elements of gate [4, 6]";
        assert_panics(told, || gated_rms_norm(x([4, 5]), x([4, 6]), w(6), EPS));
    }
}

/// Leaves on the autodiff device.
fn leaf<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.require_grad()
}

#[test]
fn gradients() {
    let device = Device::flex().autodiff();
    at_every_level(|| {
        for (n, dim) in [(1, 1), (2, 7), (3, 64), (70, 33), (5, 130)] {
            let what = format!("{n} × {dim}");
            let weigh = |seed| random::<2>([n, dim], seed, &device);
            let run = |fast: bool| {
                let (x, w) = (leaf(random([n, dim], 1, &device)), leaf(random([dim], 2, &device)));
                let y = if fast { rms_norm } else { reference::rms_norm }(x.clone(), w.clone(), EPS);
                let grads = (y * weigh(9)).sum().backward();
                (x.grad(&grads).unwrap(), w.grad(&grads).unwrap())
            };
            let (got, expected) = (run(true), run(false));
            assert_close(got.0, expected.0, 2e-5, &what);
            assert_close(got.1, expected.1, 2e-5, &what);

            let run = |fast: bool| {
                let [x, y] = [1, 2].map(|seed| leaf(random::<2>([n, dim], seed, &device)));
                let w = leaf(random([dim], 3, &device));
                let op = if fast { add_rms_norm } else { reference::add_rms_norm };
                let (sum, normed) = op(x.clone(), y.clone(), w.clone(), 1.5, 0.7, EPS);
                let grads = (sum * weigh(8) + normed * weigh(9)).sum().backward();
                (x.grad(&grads).unwrap(), y.grad(&grads).unwrap(), w.grad(&grads).unwrap())
            };
            let (got, expected) = (run(true), run(false));
            assert_close(got.0, expected.0, 2e-5, &what);
            assert_close(got.1, expected.1, 2e-5, &what);
            assert_close(got.2, expected.2, 2e-5, &what);
        }
        for (rows, tokens, heads, dim) in [(1, 1, 1, 1), (2, 5, 3, 8), (1, 41, 4, 32)] {
            let n = rows * tokens;
            let run = |fast: bool| {
                let o = leaf(random::<4>([rows, heads, tokens, dim], 1, &device));
                let gate = leaf(random([n, heads * dim], 2, &device));
                let w = leaf(random([heads * dim], 3, &device));
                let op = if fast { gated_rms_norm } else { reference::gated_rms_norm };
                let y = op(o.clone().swap_dims(1, 2), gate.clone(), w.clone(), EPS);
                let grads = (y * random([n, heads * dim], 9, &device)).sum().backward();
                (o.grad(&grads).unwrap(), gate.grad(&grads).unwrap(), w.grad(&grads).unwrap())
            };
            let (got, expected) = (run(true), run(false));
            assert_close(got.0, expected.0, 2e-5, "o");
            assert_close(got.1, expected.1, 2e-5, "gate");
            assert_close(got.2, expected.2, 2e-5, "weight");
        }
    });
}

#[test]
fn gradients_do_not_depend_on_threads() {
    let device = Device::flex().autodiff();
    assert_threads_do_not_matter(|| {
        let (x, w) = (random::<2>([333, 65], 1, &device), leaf(random([65], 2, &device)));
        let grads = (rms_norm(x, w.clone(), EPS) * random([333, 65], 3, &device)).sum().backward();
        w.grad(&grads).unwrap()
    });
}

#[test]
fn constants_take_no_gradient() {
    let device = Device::flex().autodiff();
    let (x, w) = (random::<2>([3, 8], 1, &device), random([8], 2, &device));
    let branch = leaf(random::<2>([3, 8], 3, &device));
    let (_, normed) = add_rms_norm(x.clone(), branch.clone(), w.clone(), 1.0, 1.0, EPS);
    let grads = normed.sum().backward();
    assert!(branch.grad(&grads).is_some());
    assert!(x.grad(&grads).is_none() && w.grad(&grads).is_none());
}

#[test]
fn bf16_is_rounded_once() {
    let device = Device::flex();
    let x = random::<2>([5, 33], 1, &device).cast(DType::BF16);
    let w = random([33], 2, &device);
    let y = rms_norm(x.clone(), w.clone(), EPS);
    assert_eq!(y.dtype(), DType::BF16);
    let wide = rms_norm(x.cast(DType::F32), w, EPS).cast(DType::BF16);
    assert_close(y, wide, 1e-2, "bf16");
}
