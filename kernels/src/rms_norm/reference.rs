//! The definition, as plain tensor operations.

use burn::tensor::{DType, Tensor, activation::sigmoid};

use crate::cast;

/// See [`super::rms_norm`].
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    let dtype = x.dtype();
    let x = cast(x, DType::F32);
    let scale = x.clone().square().mean_dim(1).add_scalar(eps).sqrt().recip();
    cast(x.mul(scale).mul(cast(weight, DType::F32).unsqueeze()), dtype)
}

/// See [`super::add_rms_norm`].
pub fn add_rms_norm(
    residual: Tensor<2>,
    branch: Tensor<2>,
    weight: Tensor<1>,
    alpha: f64,
    beta: f64,
    eps: f64,
) -> (Tensor<2>, Tensor<2>) {
    let sum = residual.mul_scalar(alpha) + branch.mul_scalar(beta);
    (sum.clone(), rms_norm(sum, weight, eps))
}

/// See [`super::gated_rms_norm`].
pub fn gated_rms_norm<const D: usize>(o: Tensor<D>, gate: Tensor<2>, weight: Tensor<1>, eps: f64) -> Tensor<2> {
    let normed = rms_norm(o.reshape(gate.dims()), weight, eps);
    cast(normed, gate.dtype()) * sigmoid(gate)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, Tolerance};

    #[test]
    fn known_values() {
        let device = Device::flex();
        let x = Tensor::<2>::from_floats([[3.0, 4.0], [0.0, 2.0]], &device);
        let weight = Tensor::<1>::from_floats([1.0, 0.5], &device);
        let y = super::rms_norm(x, weight, 0.5);
        // mean squares 12.5 and 2; with eps: sqrt(13) and sqrt(2.5)
        let expected = Tensor::<2>::from_floats([[0.83205029, 0.55470020], [0.0, 0.63245553]], &device);
        y.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-6));
    }
}
