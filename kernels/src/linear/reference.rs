//! The definition, as plain tensor operations.

use burn::tensor::Tensor;

/// See [`super::linear`]; both operands have one dtype.
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    x.matmul(weight.transpose())
}
