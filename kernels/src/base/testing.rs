//! What the operations' tests share.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::pool::with_threads;
use super::simd::{levels, with_level};

/// Reproducible values, roughly normal with deviation 1.
pub(crate) fn random<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 1.7).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// The elements in row-major order.
pub(crate) fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    let x = if x.dtype() == DType::F32 { x } else { x.cast(DType::F32) };
    x.try_into_vec_as().expect("f32 elements")
}

/// The bits of the elements.
pub(crate) fn bits<const D: usize>(x: Tensor<D>) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

/// Asserts that `|got - expected| ≤ tolerance · (1 + |expected|)` everywhere; NaN equals NaN.
pub(crate) fn assert_close<const D: usize>(got: Tensor<D>, expected: Tensor<D>, tolerance: f32, what: &str) {
    assert_eq!(got.dims(), expected.dims(), "{what}: shape");
    assert_eq!(got.dtype(), expected.dtype(), "{what}: dtype");
    for (i, (got, expected)) in values(got).into_iter().zip(values(expected)).enumerate() {
        let equal = got == expected || got.is_nan() && expected.is_nan();
        let close = (got - expected).abs() <= tolerance * (1.0 + expected.abs());
        assert!(equal || close, "{what}: element {i} is {got}, not {expected}");
    }
}

/// Asserts that `f` panics, with a message that has `part` in it.
#[track_caller]
pub(crate) fn assert_panics<R>(part: &str, f: impl FnOnce() -> R) {
    let Err(panic) = catch_unwind(AssertUnwindSafe(f)) else { panic!("no panic that says {part:?}") };
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    let message = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    assert!(message.contains(part), "{message:?} does not say {part:?}");
}

/// Runs `test` at every level of SIMD that this machine has.
pub(crate) fn at_every_level(test: impl Fn()) {
    for level in levels() {
        with_level(level, &test);
    }
}

/// Asserts that `f` gives the same bits on one thread, on two and on five.
pub(crate) fn assert_threads_do_not_matter<const D: usize>(f: impl Fn() -> Tensor<D>) {
    let alone = bits(with_threads(1, &f));
    for threads in [2, 5] {
        assert!(alone == bits(with_threads(threads, &f)), "{threads} threads give other bits");
    }
}

/// The same values behind other strides: the transpose of a contiguous transpose.
pub(crate) fn strided(x: Tensor<2>) -> Tensor<2> {
    let [rows, columns] = x.dims();
    if rows * columns == 0 {
        return x;
    }
    let copy = Tensor::<1>::from_data(TensorData::new(values(x.clone().transpose()), [rows * columns]), &x.device());
    copy.reshape([columns, rows]).transpose()
}

/// The same values from the last to the first in memory: negative strides.
pub(crate) fn flipped(x: Tensor<2>) -> Tensor<2> {
    let turned = x.clone().flip([0, 1]).into_data();
    Tensor::<2>::from_data(turned, (&x.device(), x.dtype())).flip([0, 1])
}

/// The same values as a window of a larger matrix.
pub(crate) fn window(x: Tensor<2>) -> Tensor<2> {
    let [rows, columns] = x.dims();
    let device = x.device();
    if rows * columns == 0 {
        return x;
    }
    let side = Tensor::full([rows, 3], f32::NAN, &device);
    let wide = Tensor::cat(vec![side.clone(), x, side], 1);
    let edge = Tensor::full([1, columns + 6], f32::NAN, &device);
    Tensor::cat(vec![edge.clone(), wide, edge], 0).narrow(0, 1, rows).narrow(1, 3, columns)
}
