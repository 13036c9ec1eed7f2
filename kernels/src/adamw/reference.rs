//! The definition, as plain tensor operations.

use burn::tensor::Tensor;

use super::AdamWStep;

/// See [`super::adamw`].
pub fn adamw(
    value: Tensor<1>,
    gradient: Tensor<1>,
    moment_1: Tensor<1>,
    moment_2: Tensor<1>,
    step: AdamWStep,
) -> (Tensor<1>, Tensor<1>, Tensor<1>) {
    let [scale, correct_1, correct_2, keep, lr] = step.factors();
    let gradient = gradient.mul_scalar(scale);
    let moment_1 = moment_1.mul_scalar(step.beta_1) + gradient.clone().mul_scalar(1.0 - step.beta_1);
    let moment_2 = moment_2.mul_scalar(step.beta_2) + gradient.square().mul_scalar(1.0 - step.beta_2);
    let root = moment_2.clone().mul_scalar(correct_2).sqrt().add_scalar(step.epsilon);
    let update = moment_1.clone().mul_scalar(correct_1) / root;
    (value.mul_scalar(keep) - update.mul_scalar(lr), moment_1, moment_2)
}

/// See [`super::sum_of_squares`].
pub fn sum_of_squares(x: Tensor<1>) -> Tensor<1> {
    x.square().sum()
}
