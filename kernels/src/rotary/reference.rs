//! The definition, as plain tensor operations.

use burn::tensor::{DType, Tensor};

use super::Rotation;
use crate::cast;

/// See [`super::rotary`].
pub fn rotary(x: Tensor<3>, rotation: &Rotation) -> Tensor<3> {
    let head_dim = x.dims()[2];
    let half = rotation.cos.dims()[2];
    let x = cast(x, DType::F32);
    let first = x.clone().narrow(2, 0, half);
    let second = x.clone().narrow(2, half, half);
    let (cos, sin) = (rotation.cos.clone(), rotation.sin.clone());
    let mut parts = vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin];
    if head_dim > 2 * half {
        parts.push(x.narrow(2, 2 * half, head_dim - 2 * half));
    }
    Tensor::cat(parts, 2)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, Tolerance};

    use super::super::Rotation;

    #[test]
    fn half_split_and_the_rest_passes() {
        let device = Device::flex();
        let x = Tensor::<3>::from_floats([[[1.0, 2.0, 3.0, 4.0, 5.0]]], &device);
        let y = super::rotary(x, &Rotation::new(&[3], 4, 100.0, &device));
        // angles 3 and 0.3; pairs (1, 3) and (2, 4)
        let (c0, s0, c1, s1) = (3f32.cos(), 3f32.sin(), 0.3f32.cos(), 0.3f32.sin());
        let expected = Tensor::<3>::from_floats(
            [[[c0 - 3.0 * s0, 2.0 * c1 - 4.0 * s1, 3.0 * c0 + s0, 4.0 * c1 + 2.0 * s1, 5.0]]],
            &device,
        );
        y.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-6));
    }
}
