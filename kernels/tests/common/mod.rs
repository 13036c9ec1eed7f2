//! What the tests on devices share.
#![allow(dead_code)] // each of them uses some

use std::cell::Cell;
use std::io::{Write, stderr};
use std::sync::Once;

use burn::tensor::{DType, Device, Tensor, TensorData};

/// The device whose kernels are tested: `M1_TEST_DEVICE` (`wgpu` or `cuda`), or wgpu where `M1_REQUIRE_WGPU=1` demands it. Without
/// either there is none, as a software driver takes a while (CONTRIBUTING.md says which serves).
pub fn device() -> Option<Device> {
    let required = std::env::var("M1_REQUIRE_WGPU").is_ok_and(|v| v == "1");
    let named = std::env::var("M1_TEST_DEVICE").ok().or(required.then(|| "wgpu".into()));
    match named.as_deref() {
        None => {
            static TOLD: Once = Once::new();
            TOLD.call_once(|| {
                tell("SKIPPED: M1_TEST_DEVICE=wgpu|cuda (or M1_REQUIRE_WGPU=1) runs the kernels on a device")
            });
            None
        }
        #[cfg(feature = "wgpu")]
        Some("wgpu") => Some(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "cuda")]
        Some("cuda") => Some(Device::cuda(0)),
        Some(other) => panic!("M1_TEST_DEVICE={other} is neither wgpu nor cuda, or this build is without its feature"),
    }
}

/// f32, and each half precision that `device` computes in; says which it leaves out.
pub fn dtypes(device: &Device) -> Vec<DType> {
    let halves = [DType::F16, DType::BF16].into_iter().filter(|&dtype| {
        let supported = device.supports_dtype(dtype);
        if !supported {
            tell(&format!("SKIPPED: {device:?} does not compute in {dtype:?}"));
        }
        supported
    });
    std::iter::once(DType::F32).chain(halves).collect()
}

/// A line on stderr that is seen whether the test passes or not: the harness keeps what `eprintln!` writes to itself.
pub fn tell(line: &str) {
    let _ = writeln!(stderr(), "{line}");
}

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

/// A copy on `device`.
pub fn to<const D: usize>(x: &Tensor<D>, device: &Device) -> Tensor<D> {
    Tensor::from_data(x.to_data(), device)
}

/// The elements in row-major order.
pub fn values<const D: usize>(x: &Tensor<D>) -> Vec<f32> {
    x.to_data().iter::<f32>().collect()
}

/// The root mean square of what is finite, but at least 0.1.
fn scale(values: &[f32]) -> f32 {
    let finite: Vec<f32> = values.iter().copied().filter(|x| x.is_finite()).collect();
    (finite.iter().map(|x| x * x).sum::<f32>() / finite.len().max(1) as f32).sqrt().max(0.1)
}

/// Asserts that nothing is farther from what is wanted than `limit` times its root mean square.
#[track_caller]
pub fn close<const D: usize>(name: &str, got: &Tensor<D>, want: &Tensor<D>, limit: f32) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    let (got, want) = (values(got), values(want));
    let scale = scale(&want);
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        assert!((g - w).abs() <= limit * scale, "{name}: {g} is not {w} at {i} of {}", want.len());
    }
}

/// As [`close`], but a value that is larger than the root mean square may be as much farther off; NaN is equal to NaN alone.
#[track_caller]
pub fn near<const D: usize>(name: &str, got: &Tensor<D>, want: &Tensor<D>, tolerance: f32) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    let (got, want) = (values(got), values(want));
    let scale = scale(&want);
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        assert!(g.is_nan() == w.is_nan(), "{name}: {g} for {w} at {i}");
        assert!(
            w.is_nan() || (g - w).abs() <= tolerance * scale.max(w.abs()),
            "{name}: {g} for {w} at {i} (scale {scale})"
        );
    }
}
