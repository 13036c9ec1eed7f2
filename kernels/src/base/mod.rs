//! What the operations share: the thread pool, the choice of vector instructions, matrix kernels and packed weights of
//! the CPU, and the glue to Flex's tensors; and what the CubeCL kernels share.

pub(crate) mod acts;
mod ahead;
#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod amx_quant;
pub(crate) mod buffer;
pub mod device;
pub mod flex;
pub mod gemm;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[allow(clippy::collapsible_if, clippy::assign_op_pattern, clippy::manual_div_ceil, clippy::eq_op)] // CubeCL's language
pub mod gpu;
pub(crate) mod masked;
pub mod math;
pub mod memory;
pub mod packed;
pub mod pool;
pub(crate) mod quant;
pub(crate) mod quant_tile;
pub(crate) mod rows;
pub mod simd;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod tile;
pub(crate) mod view;
mod widened;

#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[allow(clippy::collapsible_if, clippy::assign_op_pattern, clippy::manual_div_ceil, clippy::eq_op)] // CubeCL's language
pub mod cube;

use burn::tensor::{Device, Tensor};

pub use packed::{Acts, Format, PackError, Packed, multiply};

/// Whether `x` lives on the CPU backend (Flex), with or without autodiff.
pub fn on_cpu<const D: usize>(x: &Tensor<D>) -> bool {
    // Devices compare by hardware: an autodiff device equals its plain twin.
    x.device() == Device::flex()
}
