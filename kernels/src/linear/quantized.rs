//! Matrices of int8 or int4 values on a device, multiplied as they are stored.

use std::sync::{Mutex, PoisonError};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use half::f16;

use crate::base::device::indexable;
use crate::base::packed::{Format, PackError, Packed};
use crate::base::pool;

/// `count` matrices `[out, in]` in blocks of values that share a scale, shared by reference count: a constant.
///
/// Values are biased (by 128 or 8) and packed along `in` in 32-bit words, the first in the lowest bits. Scales are f16, or
/// f32 on a device that has no f16.
#[derive(Debug, Clone)]
pub struct Quantized {
    words: Tensor<2, Int>,
    scales: Tensor<2>,
    format: Format,
    count: usize,
}

/// Values of a word, and of a block.
fn sizes(format: Format) -> Result<(usize, usize), PackError> {
    match format {
        Format::Int8 { block } if matches!(block, 32 | 64) => Ok((4, block)),
        Format::Int4 { block } if matches!(block, 32 | 64) => Ok((8, block)),
        _ => Err(PackError::Format(format)),
    }
}

impl Quantized {
    /// Puts matrices on `device` that are quantized as [`crate::base::packed::quantize_row`] does it: `row(matrix, out_row,
    /// values, scales)` writes one row, `input` values in blocks with one of `scales` each. It is called from the pool, once
    /// per row, in any order.
    ///
    /// # Errors
    /// If the format is not quantized or its block is neither 32 nor 64.
    ///
    /// # Panics
    /// If blocks do not divide `input`.
    #[allow(clippy::type_complexity)]
    pub fn new(
        format: Format,
        [count, out, input]: [usize; 3],
        device: &Device,
        row: &(dyn Fn(usize, usize, &mut [i8], &mut [f16]) + Sync),
    ) -> Result<Self, PackError> {
        let (per_word, block) = sizes(format)?;
        assert!(input > 0 && input.is_multiple_of(block), "blocks of {block} divide rows of {input}");
        let (rows, width, blocks) = (count * out, input / per_word, input / block);
        let (mut words, mut scales) = (vec![0i32; rows * width], vec![f16::ZERO; rows * blocks]);
        let each = (1usize << 16).div_ceil(input);
        let pieces = words.chunks_mut(each * width).zip(scales.chunks_mut(each * blocks)).enumerate();
        let pieces = Mutex::new(pieces); // one after the other, as `Packed` does it and for its reason
        pool::run(rows.div_ceil(each), |_| {
            let piece = pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((piece, (words, scales))) = piece else { return };
            let mut values = vec![0i8; input];
            let rows = words.chunks_exact_mut(width).zip(scales.chunks_exact_mut(blocks));
            for (i, (words, scales)) in rows.enumerate() {
                let at = piece * each + i;
                row(at / out, at % out, &mut values, scales);
                for (word, values) in words.iter_mut().zip(values.chunks_exact(per_word)) {
                    *word = pack(values);
                }
            }
        });
        let kind = if device.supports_dtype(DType::F16) { DType::F16 } else { DType::F32 };
        Ok(Self {
            words: Tensor::from_data(TensorData::new(words, [rows, width]), (device, DType::I32)),
            scales: Tensor::from_data(TensorData::new(scales, [rows, blocks]), (device, kind)),
            format,
            count,
        })
    }

    /// How the weights are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// `[count, out, in]`.
    pub fn dims(&self) -> [usize; 3] {
        let [rows, width] = self.words.dims();
        let per_word = sizes(self.format).map_or(1, |(per_word, _)| per_word);
        [self.count, rows / self.count.max(1), width * per_word]
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        4 * self.words.shape().num_elements() + self.scales.dtype().size() * self.scales.shape().num_elements()
    }

    /// Whether the kernels can index so many weights.
    #[cfg_attr(not(any(feature = "wgpu", feature = "cuda")), allow(dead_code))] // for the kernels
    pub(crate) fn indexable(&self) -> bool {
        indexable(&self.dims())
    }

    /// The words `[count · out, in / values of a word]` and the scales `[count · out, in / block]`.
    #[cfg_attr(not(any(feature = "wgpu", feature = "cuda")), allow(dead_code))] // for the kernels
    pub(crate) fn parts(&self) -> (Tensor<2, Int>, Tensor<2>) {
        (self.words.clone(), self.scales.clone())
    }

    /// One of the matrices for the CPU, to the bit the same: it is read back.
    ///
    /// # Panics
    /// If there is no such matrix, or the device can't be read.
    pub fn packed(&self, matrix: usize) -> Packed {
        let [count, out, input] = self.dims();
        assert!(matrix < count, "matrix {matrix} of {count}");
        let words = self.words.clone().narrow(0, matrix * out, out).into_data();
        let words = words.as_slice::<i32>().expect("words of 32 bits");
        let scales: Vec<f16> = self.scales.clone().narrow(0, matrix * out, out).into_data().iter().collect();
        let (width, blocks) = (words.len() / out.max(1), scales.len() / out.max(1));
        let per_word = input / width.max(1);
        let row = |_: usize, row: usize, values: &mut [i8], to: &mut [f16]| {
            to.copy_from_slice(&scales[row * blocks..][..blocks]);
            for (values, word) in values.chunks_exact_mut(per_word).zip(&words[row * width..][..width]) {
                unpack(*word, values);
            }
        };
        Packed::pack_quantized(self.format, 1, out, input, &row).expect("it was packed in this format before")
    }
}

/// Four or eight values as one word.
fn pack(values: &[i8]) -> i32 {
    let bits = 32 / values.len() as u32;
    let (bias, mask) = (1 << (bits - 1), (1u32 << bits) - 1);
    let word = values.iter().rev().fold(0u32, |word, &value| word << bits | ((i32::from(value) + bias) as u32 & mask));
    word as i32
}

/// The inverse of [`pack`].
fn unpack(word: i32, values: &mut [i8]) {
    let bits = 32 / values.len() as u32;
    let (bias, mask) = (1 << (bits - 1), (1u32 << bits) - 1);
    for (i, value) in values.iter_mut().enumerate() {
        *value = ((word as u32 >> (i as u32 * bits) & mask) as i32 - bias) as i8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::packed::quantize_row;

    #[test]
    fn words_come_back() {
        for values in [[-127i8, -1, 0, 127].as_slice(), &[-8, 7, 0, -1, 1, 3, -5, 6]] {
            let mut back = vec![0; values.len()];
            unpack(pack(values), &mut back);
            assert_eq!(back, values);
        }
        assert_eq!(pack(&[-128, -127, 0, 127]) as u32, 0xff80_0100);
        assert_eq!(pack(&[-8, -7, 0, 7, -8, -8, -8, -8]) as u32, 0x0000_f810);
    }

    #[test]
    fn what_goes_to_a_device_comes_back_to_the_bit() {
        for format in [Format::Int8 { block: 32 }, Format::Int4 { block: 64 }] {
            let (count, out, input) = (2, 5, 192);
            let weight = |matrix: usize, row: usize, i: usize| ((matrix * 71 + row * 13 + i * 7) as f32 * 0.37).sin();
            let row = |matrix: usize, row: usize, values: &mut [i8], scales: &mut [f16]| {
                let x: Vec<f32> = (0..input).map(|i| weight(matrix, row, i)).collect();
                quantize_row(format, &x, values, scales).unwrap();
            };
            let made = Quantized::new(format, [count, out, input], &Device::flex(), &row).unwrap();
            let want = Packed::pack_quantized(format, count, out, input, &row).unwrap();
            assert_eq!((made.dims(), made.format()), ([count, out, input], format));
            let (mut a, mut b) = (vec![0f32; input], vec![0f32; input]);
            for matrix in 0..count {
                let got = made.packed(matrix);
                for row in 0..out {
                    got.row(0, row, &mut a);
                    want.row(matrix, row, &mut b);
                    assert_eq!(a, b, "matrix {matrix}, row {row}");
                }
            }
        }
        assert!(Quantized::new(Format::F32, [1, 1, 32], &Device::flex(), &|_, _, _, _| ()).is_err());
        assert!(Quantized::new(Format::Int8 { block: 16 }, [1, 1, 32], &Device::flex(), &|_, _, _, _| ()).is_err());
    }
}
