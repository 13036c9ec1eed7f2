//! What the tests on devices share.

use std::cell::Cell;

use burn::tensor::{Device, Tensor, TensorData};

/// Roughly normal with deviation 1. Each test has a thread, and so a stream of numbers, of its own: the same in every run.
pub fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    thread_local! {
        static STATE: Cell<u64> = const { Cell::new(1) };
    }
    let uniform = || {
        STATE.set(STATE.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
        (STATE.get() >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| (0..12).map(|_| uniform()).sum()).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}
