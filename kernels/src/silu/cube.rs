//! One CubeCL source for CUDA and wgpu: element by element, one launch each.
//!
//! Offline: `silu_kernel` with F in {f32, bf16, f16}, vectors of 4, with and without `d_y`; cube of 256 units.

// The kernel macro writes modules and functions beside each kernel, which have no place for documentation.
#![allow(missing_docs)]

use burn::backend::{TensorMetadata, tensor::FloatTensor};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

use super::SiluBackend;
use crate::base::gpu::{buffer, element, empty, rows, sigmoid, spread, vector};

const UNITS: usize = 256;

/// `y = x · sigmoid(x)`, or with `d_y` its gradient `d_y · s · (1 + x · (1 - s))`, over `len` vectors.
#[cube(launch_unchecked)]
pub fn silu_kernel<F: Float, N: Size>(
    x: &[Vector<F, N>],
    d_y: ComptimeOption<&[Vector<F, N>]>,
    y: &mut [Vector<F, N>],
    len: usize,
    #[define(F)] _dtype: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at >= len {
        terminate!();
    }
    let values = Vector::<f32, N>::cast_from(x[at]);
    let mut out = Vector::<f32, N>::zeroed();
    #[comptime]
    if let ComptimeOption::Some(d_y) = &d_y {
        let slopes = Vector::<f32, N>::cast_from(d_y[at]);
        #[unroll]
        for i in 0..N::value() {
            let value = values.extract(i);
            let open = sigmoid(value);
            out.insert(i, slopes.extract(i) * open * (1.0f32 + value * (1.0f32 - open)));
        }
    } else {
        #[unroll]
        for i in 0..N::value() {
            let value = values.extract(i);
            out.insert(i, value * sigmoid(value));
        }
    }
    y[at] = Vector::<F, N>::cast_from(out);
}

fn launch(x: CubeTensor, d_y: Option<CubeTensor>) -> CubeTensor {
    let (x, d_y) = (rows(x), d_y.map(rows));
    let shape = x.shape();
    let count = shape.num_elements();
    let y = empty(&x, shape, x.dtype);
    if count > 0 {
        let size = vector(count, 4);
        let len = count / size;
        // SAFETY: the kernel stays below `len` vectors, which all tensors have.
        unsafe {
            silu_kernel::launch_unchecked(
                &x.client,
                spread(len.div_ceil(UNITS)),
                CubeDim::new_1d(UNITS as u32),
                size,
                buffer(&x),
                d_y.as_ref().map(buffer).into(),
                buffer(&y),
                len,
                element(&x),
            );
        }
    }
    y
}

impl SiluBackend for CubeBackend {
    fn silu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        launch(x, None)
    }

    fn silu_backward(x: FloatTensor<Self>, d_y: FloatTensor<Self>) -> FloatTensor<Self> {
        launch(x, Some(d_y))
    }
}
