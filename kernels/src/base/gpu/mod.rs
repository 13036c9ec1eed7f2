//! What the CubeCL paths share: small host helpers, reductions over one cube, and the matrix products of linear,
//! experts and log_prob. One source serves CUDA and wgpu.
//!
//! House rules of every kernel here: at most eight storage bindings with CubeCL's own (wgpu's default limit), at most
//! 32 KiB of shared memory, no assumption about the plane size (only [`mma`] lets planes work together, with the size
//! that the device states), f16 and bf16 only where a tensor has them, sums in f32. f32 products are taken in f32: Burn's
//! own product moves f32 to TF32 on devices that have it, so f32 never goes there.

// The kernel macro writes modules and functions beside each kernel, which have no place for documentation.
#![allow(missing_docs)]

pub mod gemv;
pub mod mma;
pub mod product;
pub mod reduce;
pub mod tile;

use burn::tensor::{DType, Shape};
use burn_cubecl::{kernel::into_contiguous, ops::numeric::empty_device_dtype, tensor::CubeTensor};
use cubecl::{ir::ElemType, prelude::*};

/// The tensor in rows, copied only where it is a view that is not.
pub(crate) fn rows(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(tensor)
}

/// A new tensor beside `like`, not initialised.
pub(crate) fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    empty_device_dtype(like.client.clone(), like.device.clone(), shape.into(), dtype)
}

/// A new tensor of zeros beside `like`.
pub(crate) fn zeros(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    burn_cubecl::ops::numeric::zeros(like.device.clone(), shape.into(), dtype)
}

/// The kernel's element type of a tensor.
pub(crate) fn element(tensor: &CubeTensor) -> ElemType {
    burn::backend::cubecl::dtype_to_storage_type(tensor.dtype)
}

/// A launch argument over the whole tensor as a flat buffer; the tensor is in rows.
pub(crate) fn buffer(tensor: &CubeTensor) -> BufferArg {
    tensor.clone().into_buffer_arg()
}

/// Widest power-of-two vector, `most` at most, that divides the length of a row.
pub(crate) fn vector(row: usize, most: usize) -> usize {
    let mut size = most;
    while !row.is_multiple_of(size) {
        size /= 2;
    }
    size
}

/// `cubes` cubes over x and y, since an axis holds 65,535 at most on some devices; kernels stop at positions past the end.
pub(crate) fn spread(cubes: usize) -> CubeCount {
    const AXIS: usize = 32_768;
    if cubes <= AXIS {
        CubeCount::Static(cubes as u32, 1, 1)
    } else {
        CubeCount::Static(AXIS as u32, cubes.div_ceil(AXIS) as u32, 1)
    }
}

/// Units of a cube that walks a row of `len` vectors: a power of two from 32 to 256.
pub(crate) fn units_for(len: usize) -> usize {
    len.next_power_of_two().clamp(32, 256)
}

/// Sum over all units of a cube of `units` (a power of two), in a fixed order; every unit gets it.
#[cube]
pub fn cube_sum(value: f32, scratch: &mut Shared<[f32]>, #[comptime] units: usize) -> f32 {
    let unit = UNIT_POS as usize;
    scratch[unit] = value;
    sync_cube();
    #[unroll]
    for step in 0..comptime!(units.ilog2() as usize) {
        let half = comptime!(units >> (step + 1));
        if unit < half {
            let other = scratch[unit + half];
            scratch[unit] += other;
        }
        sync_cube();
    }
    let sum = scratch[0];
    sync_cube();
    sum
}

/// Maximum over all units of a cube, as [`cube_sum`].
#[cube]
pub fn cube_max(value: f32, scratch: &mut Shared<[f32]>, #[comptime] units: usize) -> f32 {
    let unit = UNIT_POS as usize;
    scratch[unit] = value;
    sync_cube();
    #[unroll]
    for step in 0..comptime!(units.ilog2() as usize) {
        let half = comptime!(units >> (step + 1));
        if unit < half {
            let mine = scratch[unit];
            let other = scratch[unit + half];
            scratch[unit] = if other > mine { other } else { mine };
        }
        sync_cube();
    }
    let max = scratch[0];
    sync_cube();
    max
}

/// `1 / (1 + e^-x)` without overflow. NaN of NaN, which a device's `exp` may lose.
#[cube]
pub fn sigmoid(x: f32) -> f32 {
    let e = (0.0f32 - x.abs()).exp();
    let small = e / (1.0f32 + e);
    let large = 1.0f32 / (1.0f32 + e);
    let positive = if x >= 0.0f32 { large } else { x };
    if x < 0.0f32 { small } else { positive }
}

/// Sum of the lanes of a vector.
#[cube]
pub fn lanes<N: Size>(value: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..N::value() {
        sum += value.extract(i);
    }
    sum
}

#[cfg(test)]
mod tests {
    use cubecl::prelude::CubeCount;

    use super::{spread, vector};

    #[test]
    fn cubes_are_spread_below_what_an_axis_holds() {
        for cubes in [0, 1, 32_768, 32_769, 65_536, 1 << 24, (1 << 31) / 256] {
            let CubeCount::Static(x, y, z) = spread(cubes) else { panic!("counted on the host") };
            assert!([x, y, z].iter().all(|&n| n <= 65_535), "{cubes}");
            assert!((x * y * z) as usize >= cubes && (x * y * z) as usize <= cubes + 32_768, "{cubes}");
        }
    }

    #[test]
    fn vectors_divide_the_row() {
        assert_eq!((vector(6144, 4), vector(6, 4), vector(7, 8), vector(8, 8)), (4, 2, 1, 8));
    }
}
