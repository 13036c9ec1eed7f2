//! What the tests of several packages share: goldens (small checkpoints with float64 results, see
//! `reference/make_goldens.py`), the comparison with them, and every path through the cache.
//!
//! The helpers panic with a message that says what differs: they are only called from tests.

pub mod golden;
pub mod gradients;
pub mod paths;

use std::io::Write;

use burn::tensor::{Device, Tensor};
use m1_model::device::DeviceChoice;

/// A wgpu device for tests, or `None`, said aloud, where there is no GPU. With `M1_REQUIRE_WGPU=1` a software driver will
/// do (it takes minutes, and some crash, so never unasked), and a missing one is a failure. SwiftShader serves: Debian's `chromium` package brings it, and
/// `VK_DRIVER_FILES=/usr/lib/chromium/vk_swiftshader_icd.json CUBECL_AUTOTUNE_LEVEL=full` selects it.
pub fn wgpu() -> Option<Device> {
    let required = std::env::var("M1_REQUIRE_WGPU").is_ok_and(|v| v == "1");
    match DeviceChoice::Wgpu(0).open() {
        Ok(open) if open.is_software && !required => {
            skipped(&format!("{}; set M1_REQUIRE_WGPU=1 to run on it", open.name));
            None
        }
        Ok(open) => {
            eprintln!("running on {}", open.name);
            Some(open.device)
        }
        Err(error) => {
            assert!(!required, "M1_REQUIRE_WGPU=1, but: {error}");
            skipped(&error.to_string());
            None
        }
    }
}

/// Seen whether the test passes or not: the harness keeps what `eprintln!` writes to itself.
fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// Host copy of a tensor, row-major, widened to f64.
pub fn values<const D: usize>(x: &Tensor<D>) -> Vec<f64> {
    x.to_data().iter::<f64>().collect()
}

/// `‖got − want‖ / ‖want‖`.
pub fn relative_l2(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "sizes differ");
    let difference: f64 = got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum();
    let size: f64 = want.iter().map(|w| w * w).sum();
    (difference / size.max(f64::MIN_POSITIVE)).sqrt()
}

/// `max |got − want| / max |want|`.
pub fn relative_max(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "sizes differ");
    largest(got.iter().zip(want).map(|(g, w)| g - w)) / largest(want.iter().copied()).max(f64::MIN_POSITIVE)
}

/// Largest magnitude; NaN counts as infinite, so that it passes no bound.
pub fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| if v.is_nan() { f64::INFINITY } else { v.abs() }).fold(0.0, f64::max)
}
