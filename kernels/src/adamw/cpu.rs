//! Flex: one pass over four arrays, three of them written where they are.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;

use super::{AdamWBackend, AdamWStep};
use crate::base::flex::{contiguous, tensor, values, values_mut};
use crate::base::rows::par_chunks;
use crate::base::simd::level;
use crate::simd;

/// Elements of a chunk; also the length over which squares are summed before the sums are, in their order.
const CHUNK: usize = 16 * 1024;

impl AdamWBackend for Flex {
    fn adamw(
        value: FlexTensor,
        gradient: FlexTensor,
        moment_1: FlexTensor,
        moment_2: FlexTensor,
        step: AdamWStep,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let level = level();
        let [mut value, mut moment_1, mut moment_2] = [value, moment_1, moment_2];
        let gradient = contiguous(gradient);
        let gradient = values(&gradient);
        let (p, m, v) = (values_mut(&mut value), values_mut(&mut moment_1), values_mut(&mut moment_2));
        assert!([p.len(), m.len(), v.len()] == [gradient.len(); 3], "a gradient and two moments for every value");
        par_chunks([(p, CHUNK), (m, CHUNK), (v, CHUNK)], |i, [p, m, v]| {
            update(level, p, &gradient[i * CHUNK..][..p.len()], m, v, step);
        });
        (value, moment_1, moment_2)
    }

    fn sum_of_squares(x: FlexTensor) -> FlexTensor {
        let level = level();
        let x = contiguous(x);
        let x = values(&x);
        let mut sums = vec![0.0; x.len().div_ceil(CHUNK)];
        par_chunks([(&mut sums, 1)], |i, [sum]| {
            let end = x.len().min((i + 1) * CHUNK);
            sum[0] = squares(level, &x[i * CHUNK..end]);
        });
        let total: f64 = sums.iter().map(|&sum| f64::from(sum)).sum();
        tensor(vec![total as f32], [1])
    }
}

simd! {
    fn update(value: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32], step: AdamWStep) = update_body;
}

#[inline(always)]
fn update_body<const FMA: bool>(value: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32], step: AdamWStep) {
    let [scale, correct_1, correct_2, keep, lr] = step.factors();
    let (rest_1, rest_2) = (1.0 - step.beta_1, 1.0 - step.beta_2);
    for (((value, gradient), m), v) in value.iter_mut().zip(gradient).zip(m).zip(v) {
        let gradient = gradient * scale;
        *m = *m * step.beta_1 + gradient * rest_1;
        *v = *v * step.beta_2 + gradient * gradient * rest_2;
        let update = *m * correct_1 / ((*v * correct_2).sqrt() + step.epsilon);
        *value = *value * keep - update * lr;
    }
}

simd! {
    fn squares(x: &[f32]) -> f32 = squares_body;
}

#[inline(always)]
fn squares_body<const FMA: bool>(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<64>();
    let mut sums = [0.0_f32; 64];
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    sums.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tensor, Tolerance};

    use super::super::{AdamWStep, adamw, reference, sum_of_squares};
    use super::CHUNK;
    use crate::base::simd::{levels, with_level};

    fn step(time: u32) -> AdamWStep {
        let (beta_1, beta_2, epsilon) = (0.9, 0.95, 1e-15);
        AdamWStep { lr: 3e-3, beta_1, beta_2, epsilon, weight_decay: 0.1, time, scale: 0.7 }
    }

    #[test]
    fn equals_the_definition_at_odd_lengths_and_every_level() {
        let device = Device::flex();
        let draw = |n: usize| Tensor::<1>::random([n], Distribution::Normal(0.0, 1.0), &device);
        for level in levels() {
            for n in [0, 1, 17, CHUNK, CHUNK + 1, 2 * CHUNK + 37] {
                let (value, gradient, m) = (draw(n), draw(n), draw(n));
                let v = draw(n).abs();
                let run = |f: fn(_, _, _, _, _) -> _| -> (Tensor<1>, Tensor<1>, Tensor<1>) {
                    with_level(level, || f(value.clone(), gradient.clone(), m.clone(), v.clone(), step(3)))
                };
                let (got, expected) = (run(adamw), run(reference::adamw));
                for (got, expected) in [(got.0, expected.0), (got.1, expected.1), (got.2, expected.2)] {
                    got.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(2e-6));
                }
                let got = sum_of_squares(gradient.clone()).into_scalar::<f32>();
                let expected = reference::sum_of_squares(gradient.clone()).into_scalar::<f32>();
                assert!((got - expected).abs() <= 1e-5 * expected, "{got} is not {expected}");
            }
        }
    }

    #[test]
    fn shared_buffers_are_left_alone_and_nan_stays_where_it_is() {
        let device = Device::flex();
        let value = Tensor::<1>::ones([40], &device);
        let gradient = Tensor::<2>::ones([2, 40], &device).slice([1..2, 0..40]).flatten::<1>(0, 1);
        #[allow(clippy::single_range_in_vec_init)]
        let gradient = gradient.slice_fill([7..8], f32::NAN);
        let m = Tensor::<1>::zeros([40], &device);
        let (new, _, _) = adamw(value.clone(), gradient, m.clone(), m.clone(), step(1));
        assert!(value.into_data().iter::<f32>().all(|x| x == 1.0) && m.into_data().iter::<f32>().all(|x| x == 0.0));
        let new: Vec<f32> = new.into_data().iter::<f32>().collect();
        assert!(new.iter().enumerate().all(|(i, x)| x.is_nan() == (i == 7)), "{new:?}");
    }
}
