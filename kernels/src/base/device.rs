//! What the CubeCL kernels take.

use burn::tensor::Tensor;

/// Elements that the kernels index with 32-bit numbers; larger tensors take the reference path.
pub const MAX_ELEMENTS: usize = 1 << 31;

/// Whether `x` lies where the CubeCL kernels run (CUDA or wgpu, with or without autodiff) and they can index it.
pub fn on_cube<const D: usize>(x: &Tensor<D>) -> bool {
    cfg!(any(feature = "wgpu", feature = "cuda")) && !super::on_cpu(x) && indexable(&x.dims())
}

/// Whether a tensor of this shape can be indexed by the kernels.
pub fn indexable(shape: &[usize]) -> bool {
    let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    count.is_some_and(|n| n <= MAX_ELEMENTS)
}

#[cfg(test)]
mod tests {
    use super::{MAX_ELEMENTS, indexable};

    #[test]
    fn sizes_past_two_to_the_31_are_refused() {
        assert!(indexable(&[32, 9216, 6144]) && indexable(&[200_064, 6144]) && indexable(&[MAX_ELEMENTS]));
        assert!(!indexable(&[MAX_ELEMENTS, 2]) && !indexable(&[MAX_ELEMENTS + 1]) && !indexable(&[usize::MAX, 2]));
    }
}
