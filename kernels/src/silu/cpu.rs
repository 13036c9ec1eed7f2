//! Flex: one pass, over the memory of an input that nobody else holds.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;

use super::SiluBackend;
use crate::base::flex::tensor;
use crate::base::math::{LANES, Lanes, silu, silu_derivative};
use crate::base::memory::arbitrary;
use crate::base::rows::{Rows, par_chunks, rows_per_chunk, unique};
use crate::base::simd::level;
use crate::simd;

impl SiluBackend for Flex {
    fn silu(mut x: FlexTensor) -> FlexTensor {
        let level = level();
        if let Some(data) = unique(&mut x) {
            let per = rows_per_chunk(data.len(), 1);
            par_chunks([(data, per)], |_, [data]| silu_in_place(level, data));
            return x;
        }
        let shape = x.layout().shape().clone();
        let x = rows(x);
        let mut y = arbitrary(x.n * x.dim);
        let per = rows_per_chunk(x.n, x.dim);
        par_chunks([(&mut y, per * x.dim)], |chunk, [y]| {
            let mut scratch = Vec::new();
            for (i, y) in y.chunks_exact_mut(x.dim).enumerate() {
                silu_row(level, x.get(chunk * per + i, &mut scratch), y);
            }
        });
        tensor(y, shape)
    }

    fn silu_backward(x: FlexTensor, mut d_y: FlexTensor) -> FlexTensor {
        let level = level();
        let shape = x.layout().shape().clone();
        let x = rows(x);
        let per = rows_per_chunk(x.n, x.dim);
        if let Some(d_y) = unique(&mut d_y) {
            par_chunks([(d_y, per * x.dim)], |chunk, [d_y]| {
                let mut scratch = Vec::new();
                for (i, d_y) in d_y.chunks_exact_mut(x.dim).enumerate() {
                    backward_in_place(level, x.get(chunk * per + i, &mut scratch), d_y);
                }
            });
        } else {
            let d = rows(d_y);
            let mut d_x = arbitrary(x.n * x.dim);
            par_chunks([(&mut d_x, per * x.dim)], |chunk, [d_x]| {
                let (mut a, mut b) = (Vec::new(), Vec::new());
                for (i, d_x) in d_x.chunks_exact_mut(x.dim).enumerate() {
                    d_x.copy_from_slice(d.get(chunk * per + i, &mut a));
                    backward_in_place(level, x.get(chunk * per + i, &mut b), d_x);
                }
            });
            d_y = tensor(d_x, shape);
        }
        d_y
    }
}

/// Rows of the last dimension; a contiguous tensor is rows of whatever is handy, here the same.
fn rows(x: FlexTensor) -> Rows {
    let dim = x.layout().shape().iter().last().copied().unwrap_or(1);
    Rows::new(x, dim)
}

simd! {
    fn silu_in_place(x: &mut [f32]) = silu_in_place_body;
}

#[inline(always)]
fn silu_in_place_body<const FMA: bool>(x: &mut [f32]) {
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        *chunk = silu::<FMA>(*chunk);
    }
    let len = rest.len();
    rest.copy_from_slice(&silu::<FMA>(padded(rest))[..len]);
}

simd! {
    fn silu_row(x: &[f32], y: &mut [f32]) = silu_row_body;
}

#[inline(always)]
fn silu_row_body<const FMA: bool>(x: &[f32], y: &mut [f32]) {
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks_mut::<LANES>();
    for (x, y) in x.iter().zip(y) {
        *y = silu::<FMA>(*x);
    }
    let len = y_rest.len();
    y_rest.copy_from_slice(&silu::<FMA>(padded(x_rest))[..len]);
}

simd! {
    /// `d *= silu'(x)`
    fn backward_in_place(x: &[f32], d: &mut [f32]) = backward_in_place_body;
}

#[inline(always)]
fn backward_in_place_body<const FMA: bool>(x: &[f32], d: &mut [f32]) {
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (d, d_rest) = d.as_chunks_mut::<LANES>();
    for (x, d) in x.iter().zip(d) {
        for (d, slope) in d.iter_mut().zip(silu_derivative::<FMA>(*x)) {
            *d *= slope;
        }
    }
    for (d, slope) in d_rest.iter_mut().zip(silu_derivative::<FMA>(padded(x_rest))) {
        *d *= slope;
    }
}

/// Fewer than [`LANES`] values, and zeros.
#[inline(always)]
fn padded(x: &[f32]) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes[..x.len()].copy_from_slice(x);
    lanes
}
