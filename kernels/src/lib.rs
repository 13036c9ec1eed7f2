//! The hot operations of MiniMax-M1 on Burn tensors. This crate knows tensors and no model.
//!
//! One folder per operation, all alike: `mod.rs` is the public function with its maths, shapes and dtypes;
//! `reference.rs` is the same as plain tensor operations, differentiable on Burn's autodiff: the definition that every
//! faster path must equal; `cpu.rs` is Flex, `cube.rs` one CubeCL source for CUDA and wgpu, `backward.rs` the gradient. No
//! operation knows another; what they share is in `base`.

// Register tiles are indexed by constants, so that their loops unroll; kernels have many arguments.
#![allow(clippy::needless_range_loop, clippy::too_many_arguments)]

pub mod adamw;
pub mod base;
pub mod experts;
pub mod lightning_attention;
pub mod linear;
pub mod log_prob;
pub mod rms_norm;
pub mod rotary;
pub mod silu;
pub mod softmax_attention;

pub(crate) use base::simd::simd;
use burn::tensor::{DType, Tensor};

/// `x` in `dtype`; the tensor itself when it already is.
pub(crate) fn cast<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if x.dtype() == dtype { x } else { x.cast(dtype) }
}
