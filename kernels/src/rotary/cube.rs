//! One CubeCL source for CUDA and wgpu: one launch turns all heads of all tokens.
//!
//! Offline: `rotary_kernel` with F in {f32, bf16, f16}; cube of 256 units.

// The kernel macro writes modules and functions beside each kernel, which have no place for documentation.
#![allow(missing_docs)]

use burn::{
    backend::{TensorMetadata, tensor::FloatTensor},
    tensor::DType,
};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

use super::RotaryBackend;
use crate::base::gpu::{buffer, element, empty, rows, spread};

const UNITS: usize = 256;

/// `y [tokens, heads, dim]` f32 from `x` of any strides over tokens and heads; `cos` and `sin [tokens, half]`.
///
/// A unit writes a pair that turns together, or one dimension that passes: `dim - half` units for each head.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn rotary_kernel<F: Float>(
    x: &[F],
    cos: &[f32],
    sin: &[f32],
    y: &mut [f32],
    tokens: usize,
    heads: usize,
    dim: usize,
    half: usize,
    token_stride: usize,
    head_stride: usize,
    #[define(F)] _dtype: ElemType,
) {
    let each = dim - half;
    let at = ABSOLUTE_POS;
    if at >= tokens * heads * each {
        terminate!();
    }
    let i = at % each;
    let head = at / each % heads;
    let token = at / each / heads;
    let from = token * token_stride + head * head_stride;
    let to = (token * heads + head) * dim;
    if i < half {
        let (first, second) = (f32::cast_from(x[from + i]), f32::cast_from(x[from + half + i]));
        let (c, s) = (cos[token * half + i], sin[token * half + i]);
        y[to + i] = first * c - second * s;
        y[to + half + i] = second * c + first * s;
    } else {
        y[to + half + i] = f32::cast_from(x[from + half + i]);
    }
}

fn launch(x: CubeTensor, cos: CubeTensor, sin: CubeTensor) -> CubeTensor {
    let [tokens, heads, dim] = x.shape().dims();
    let half = cos.shape().num_elements() / tokens.max(1);
    // heads narrowed out of a wider row need no copy
    let x = if x.meta.strides()[2] == 1 && !x.meta.is_tiled() { x } else { rows(x) };
    let (cos, sin) = (rows(cos), rows(sin));
    let y = empty(&x, [tokens, heads, dim], DType::F32);
    let units = tokens * heads * (dim - half);
    if units > 0 {
        let (token_stride, head_stride) = (x.meta.strides()[0], x.meta.strides()[1]);
        // SAFETY: the kernel stays below `tokens`, `heads` and `dim` of x under its strides, and of y in rows.
        unsafe {
            rotary_kernel::launch_unchecked(
                &x.client,
                spread(units.div_ceil(UNITS)),
                CubeDim::new_1d(UNITS as u32),
                buffer(&x),
                buffer(&cos),
                buffer(&sin),
                buffer(&y),
                tokens,
                heads,
                dim,
                half,
                token_stride,
                head_stride,
                element(&x),
            );
        }
    }
    y
}

impl RotaryBackend for CubeBackend {
    fn rotary(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self> {
        launch(x, cos, sin)
    }
}
