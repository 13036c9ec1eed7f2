//! CUDA and wgpu: f16 and bf16 by Burn's product, except few rows; f32, f32 with a stored bf16, and few rows of anything by
//! the kernels of `base::gpu`, which read each weight once at its stored size and never round f32 to TF32. Quantized weights
//! go there always.
//!
//! Offline: `base::gpu`'s `few_rows`, `tile_product` (`by_k` true and false) and `outer`, without a plan.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{DType, Tensor};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::{LinearBackend, Quantized};
use crate::base::gpu::{
    product::{FEW_ROWS, Outer, Product, Rows, Storage, Store, Stored},
    rows, zeros,
};
use crate::base::packed::Packed;

/// Whether Burn's own product takes these operands: both in one dtype of 16 bits, whose sums it keeps in f32.
fn halves(x: &CubeTensor, w: &CubeTensor) -> bool {
    matches!(x.dtype, DType::F16 | DType::BF16) && x.dtype == w.dtype
}

/// `x · w` (or `x · wᵀ`) with all rows of one matrix.
fn product<'a>(x: &'a CubeTensor, w: &'a Stored, by_k: bool, [m, n, k]: [usize; 3]) -> Product<'a> {
    Product { x, w, w2: None, plan: None, shares: None, rows: Rows::All, store: Store::Plain, by_k, m, n, k }
}

/// Burn's product, named by the trait that has it.
fn matmul<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>) -> FloatTensor<B> {
    B::float_matmul(a, b)
}

fn transposed<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_swap_dims(x, 0, 1)
}

type T = FloatTensor<CubeBackend>;

impl LinearBackend for CubeBackend {
    fn linear(x: T, w: T) -> T {
        let ([m, k], n) = (x.shape().dims(), w.shape()[0]);
        if m * n * k == 0 {
            return zeros(&x, [m, n], x.dtype);
        }
        if halves(&x, &w) && m > FEW_ROWS {
            return matmul::<CubeBackend>(x, transposed::<CubeBackend>(w));
        }
        let (dtype, x, w) = (x.dtype, rows(x), Stored::float(w));
        product(&x, &w, true, [m, n, k]).run(dtype)
    }

    fn linear_backward(x: T, w: T, d_y: T) -> (T, T) {
        let ([m, k], n) = (x.shape().dims(), w.shape()[0]);
        if m * n * k == 0 {
            return (zeros(&x, [m, k], x.dtype), zeros(&w, [n, k], w.dtype));
        }
        if halves(&x, &w) {
            let d_x = matmul::<CubeBackend>(d_y.clone(), w);
            return (d_x, matmul::<CubeBackend>(transposed::<CubeBackend>(d_y), x));
        }
        let (x_dtype, w_dtype) = (x.dtype, w.dtype);
        let (x, d_y, w) = (rows(x), rows(d_y), Stored::float(w));
        let d_x = product(&d_y, &w, false, [m, k, n]).run(x_dtype);
        let (a, b) = (&d_y, &x);
        let outer = Outer { a, b, plan: None, a_by_token: false, b_by_token: false, add: false, rows: m, m: n, n: k };
        (d_x, outer.run(w_dtype))
    }

    fn linear_packed(_: T, _: Packed, _: bool) -> T {
        unreachable!("packed weights are the CPU's; the public function never sends them to a device")
    }

    fn linear_packed_backward(_: Packed, _: T) -> T {
        unreachable!("packed weights are the CPU's; the public function never sends them to a device")
    }
}

/// Products with quantized weights, which are constants and only a device's.
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
    fn linear_quantized(x: T, words: IntTensor<Self>, scales: T, storage: Storage) -> T {
        let ([m, k], n) = (x.shape().dims(), scales.shape()[0]);
        if m * n * k == 0 {
            return zeros(&x, [m, n], x.dtype);
        }
        let (dtype, x, w) = (x.dtype, rows(x), Stored::quantized(words, scales, storage));
        product(&x, &w, true, [m, n, k]).run(dtype)
    }
}

/// `x [n, in] · wᵀ -> [n, out]` in the dtype of `x`; sums in f32. Up to 8 rows read each weight once at its stored size.
pub(super) fn linear_quantized(x: Tensor<2>, w: &Quantized) -> Tensor<2> {
    let ((words, scales), storage) = (w.parts(), Storage::of(w.format()));
    let (x, words, scales) = (x.into_dispatch(), words.into_dispatch(), scales.into_dispatch());
    Tensor::from_dispatch(<Dispatch as LinearQuantizedBackend>::linear_quantized(x, words, scales, storage))
}
