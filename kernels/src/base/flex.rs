//! Flex's tensors as slices, and back.

use std::borrow::Cow;

use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Element, Shape, TensorData, bf16};
use bytemuck::Pod;

use super::gemm::Mat;

/// The values of `x` in row-major order as f32: borrowed where they lie so already, else copied. f32 and bf16.
///
/// # Panics
/// If `x` has another dtype.
pub fn values(x: &FlexTensor) -> Cow<'_, [f32]> {
    match x.dtype() {
        DType::F32 => match x.as_slice::<f32>() {
            Some(values) => Cow::Borrowed(values),
            None => Cow::Owned(x.to_contiguous().as_slice::<f32>().map(<[f32]>::to_vec).unwrap_or_default()),
        },
        DType::BF16 => {
            let whole = x.to_contiguous();
            let values = whole.as_slice::<bf16>().unwrap_or_default();
            Cow::Owned(values.iter().map(|v| v.to_f32()).collect())
        }
        dtype => panic!("f32 or bf16 expected, not {dtype:?}"),
    }
}

/// `x` made contiguous if it has to be: a copy only then.
pub fn contiguous(x: FlexTensor) -> FlexTensor {
    if x.is_contiguous() { x } else { x.to_contiguous() }
}

/// The storage of an f32 tensor from its first element on, with its strides in elements: a strided view without a copy.
/// Nothing for other dtypes and for reversed axes.
pub fn strided(x: &FlexTensor) -> Option<(&[f32], Vec<usize>)> {
    if x.dtype() != DType::F32 {
        return None;
    }
    let strides = x.layout().strides().iter().map(|&s| usize::try_from(s).ok()).collect::<Option<Vec<_>>>()?;
    let storage = x.storage::<f32>();
    Some((storage.get(x.layout().start_offset()..).unwrap_or_default(), strides))
}

/// A matrix of f32 without a copy, as [`strided`].
///
/// # Panics
/// If `x` is no matrix.
pub fn matrix(x: &FlexTensor) -> Option<Mat<'_>> {
    assert_eq!(x.layout().num_dims(), 2, "a matrix");
    let (data, strides) = strided(x)?;
    Some(Mat { data, row_stride: strides[0], col_stride: strides[1] })
}

/// A tensor of f32 in row-major order.
///
/// # Panics
/// If `values` does not fill `shape`.
pub fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// The values of a contiguous f32 tensor for writing: in place if nobody else holds them, else in a copy.
///
/// # Panics
/// If `x` is not f32.
pub fn values_mut(x: &mut FlexTensor) -> &mut [f32] {
    stored_mut(x)
}

/// [`values_mut`] of a tensor whose values are of type `E`.
///
/// # Panics
/// If they are of another type.
pub(crate) fn stored_mut<E: Element + Pod>(x: &mut FlexTensor) -> &mut [E] {
    assert_eq!(x.dtype(), E::dtype());
    if !x.is_contiguous() {
        *x = x.to_contiguous();
    }
    let (start, count) = (x.layout().start_offset(), x.layout().num_elements());
    &mut x.storage_mut()[start..start + count]
}
