//! Flex: one pass, over the memory of an input that nobody else holds.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;

use super::RotaryBackend;
use crate::base::flex::tensor;
use crate::base::math::fma;
use crate::base::memory::arbitrary;
use crate::base::rows::{Rows, par_chunks, rows_per_chunk, unique};
use crate::base::simd::level;
use crate::simd;

impl RotaryBackend for Flex {
    fn rotary(mut x: FlexTensor, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
        let shape = x.layout().shape().clone();
        let [tokens, heads, head_dim] = shape.dims();
        let [_, _, half] = cos.layout().shape().dims();
        let (cos, sin) = (Rows::new(cos, half), Rows::new(sin, half));
        let dim = heads * head_dim;
        let (level, per) = (level(), rows_per_chunk(tokens, dim));
        let turn = |token: usize, row: &mut [f32], a: &mut Vec<f32>, b: &mut Vec<f32>| {
            if half > 0 {
                rotate(level, row, head_dim, cos.get(token, a), sin.get(token, b));
            }
        };
        if dim == 0 {
            return x;
        }
        if let Some(data) = unique(&mut x) {
            par_chunks([(data, per * dim)], |chunk, [data]| {
                let (mut a, mut b) = (Vec::new(), Vec::new());
                for (i, row) in data.chunks_exact_mut(dim).enumerate() {
                    turn(chunk * per + i, row, &mut a, &mut b);
                }
            });
            return x;
        }
        let x = Rows::new(x, dim);
        let mut y = arbitrary(tokens * dim);
        par_chunks([(&mut y, per * dim)], |chunk, [y]| {
            let (mut a, mut b, mut c) = (Vec::new(), Vec::new(), Vec::new());
            for (i, row) in y.chunks_exact_mut(dim).enumerate() {
                row.copy_from_slice(x.get(chunk * per + i, &mut c));
                turn(chunk * per + i, row, &mut a, &mut b);
            }
        });
        tensor(y, shape)
    }
}

simd! {
    /// Turns all heads of one token by its angles.
    fn rotate(row: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) = rotate_body;
}

#[inline(always)]
fn rotate_body<const FMA: bool>(row: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    for head in row.chunks_exact_mut(head_dim) {
        let (first, second) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            let (x, y) = (*a, *b);
            *a = fma::<FMA>(x, *cos, -(y * sin));
            *b = fma::<FMA>(y, *cos, x * sin);
        }
    }
}
