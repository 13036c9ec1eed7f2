//! A matrix of int8 or int4 values on a device, multiplied as it is stored.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_cubecl::CubeBackend;

use crate::base::gpu::{
    product::{Product, Rows, Storage, Store, Stored},
    rows, zeros,
};

/// Products with quantized weights, which are constants.
#[backend_extension(Cube)]
pub trait LinearQuantizedBackend: Backend {
    /// `x [n, in] · wᵀ [n, out]` in the dtype of `x`; `words [out, in / values of a word]` and `scales [out, in / block]` as
    /// [`Storage`] says.
    fn linear_quantized(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        storage: Storage,
    ) -> FloatTensor<Self>;
}

impl LinearQuantizedBackend for CubeBackend {
    fn linear_quantized(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        storage: Storage,
    ) -> FloatTensor<Self> {
        let ([m, k], n) = (x.shape().dims(), scales.shape()[0]);
        if m * n * k == 0 {
            return zeros(&x, [m, n], x.dtype);
        }
        let (dtype, x, w) = (x.dtype, rows(x), Stored::quantized(words, scales, storage));
        let (rows, store) = (Rows::All, Store::Plain);
        Product { x: &x, w: &w, w2: None, plan: None, shares: None, rows, store, by_k: true, m, n, k }.run(dtype)
    }
}

/// A matrix `[out, in]` in blocks of values that share a scale.
#[derive(Debug, Clone)]
pub struct Quantized {
    words: Tensor<2, Int>,
    scales: Tensor<2>,
    storage: Storage,
}

impl Quantized {
    /// Rounds `values [out, in]` to `storage` and puts them on `device`: symmetric, the scale of a block is its largest
    /// magnitude over 127 (int8) or 7 (int4).
    ///
    /// None when `storage` is not quantized, a block is no multiple of 32, or blocks do not divide `in`.
    pub fn new(values: &[f32], [out, input]: [usize; 2], storage: Storage, device: &Device) -> Option<Self> {
        let block = storage.block();
        let (most, bits) = match storage {
            Storage::Float => return None,
            Storage::Int8 { .. } => (127.0, 8),
            Storage::Int4 { .. } => (7.0, 4),
        };
        if block == 0 || !block.is_multiple_of(32) || !input.is_multiple_of(block) || values.len() != out * input {
            return None;
        }
        let scales: Vec<f32> =
            values.chunks(block).map(|b| b.iter().fold(0f32, |m, v| m.max(v.abs())) / most).collect();
        let per_word = storage.per_word();
        let words: Vec<i32> = values
            .chunks(per_word)
            .enumerate()
            .map(|(i, word)| {
                let scale = scales[i * per_word / block];
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                let bias = 1i32 << (bits - 1);
                let packed = word.iter().enumerate().fold(0u32, |packed, (j, v)| {
                    let value = (v * inverse).round().clamp(-most, most) as i32 + bias;
                    packed | ((value as u32) << (j as u32 * bits))
                });
                packed as i32
            })
            .collect();
        Some(Self {
            words: Tensor::from_data(TensorData::new(words, [out, input / per_word]), device),
            scales: Tensor::from_data(TensorData::new(scales, [out, input / block]), device),
            storage,
        })
    }

    /// The values as they are multiplied, `out · in` of them.
    pub fn dequantized(&self) -> Vec<f32> {
        let scales: Vec<f32> = self.scales.to_data().iter::<f32>().collect();
        let (per_word, block) = (self.storage.per_word(), self.storage.block());
        let bits = 32 / per_word as u32;
        let words = self.words.to_data();
        words
            .iter::<i32>()
            .enumerate()
            .flat_map(|(i, word)| {
                let scale = scales[i * per_word / block];
                (0..per_word as u32).map(move |j| {
                    let value = ((word as u32 >> (j * bits)) & ((1 << bits) - 1)) as i32 - (1 << (bits - 1));
                    value as f32 * scale
                })
            })
            .collect()
    }
}

/// `x [n, in] · wᵀ -> [n, out]` in the dtype of `x`; sums in f32. Up to 8 rows read each weight once at its stored size.
pub fn linear_quantized(x: Tensor<2>, w: &Quantized) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as LinearQuantizedBackend>::linear_quantized(
        x.into_dispatch(),
        w.words.clone().into_dispatch(),
        w.scales.clone().into_dispatch(),
        w.storage,
    ))
}
