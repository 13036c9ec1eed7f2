//! The definition, as plain tensor operations: gather per expert, three products, put back, weigh.

use burn::tensor::{Device, Int, Tensor, TensorData, activation::silu};

use super::{ExpertWeights, Routing};
use crate::cast;

/// See [`super::experts`].
pub fn experts(x: Tensor<2>, routing: &Routing, weights: &[ExpertWeights]) -> Tensor<2> {
    let [tokens, hidden] = x.dims();
    let device = x.device();
    let k = routing.choices.len() / tokens;
    let x = cast(x, weights[0].w1.dtype());

    let mut slots: Vec<Vec<usize>> = vec![Vec::new(); weights.len()];
    for (slot, &expert) in routing.choices.iter().enumerate() {
        slots[expert as usize].push(slot);
    }
    let mut outputs = Vec::new();
    let mut position = vec![0; tokens * k];
    let mut next = 0;
    for (slots, expert) in slots.iter().zip(weights).filter(|(slots, _)| !slots.is_empty()) {
        for &slot in slots {
            position[slot] = next;
            next += 1;
        }
        let x = if tokens == 1 { x.clone() } else { x.clone().select(0, index(slots.iter().map(|s| s / k), &device)) };
        let gate = silu(x.clone().matmul(expert.w1.clone().transpose()));
        let up = x.matmul(expert.w3.clone().transpose());
        outputs.push((gate * up).matmul(expert.w2.clone().transpose()));
    }
    let y = Tensor::cat(outputs, 0).select(0, index(position.into_iter(), &device));
    let shares = cast(routing.shares.clone(), y.dtype()).reshape([tokens, k, 1]);
    (y.reshape([tokens, k, hidden]) * shares).sum_dim(1).reshape([tokens, hidden])
}

fn index(values: impl Iterator<Item = usize>, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.map(|v| v as i32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tensor, Tolerance, activation::silu};

    use super::super::{ExpertWeights, experts, route};

    #[test]
    fn gathering_equals_running_every_expert() {
        let device = Device::flex();
        let (hidden, ffn, count) = (6, 5, 4);
        let draw = |a: usize, b: usize| Tensor::<2>::random([a, b], Distribution::Normal(0.0, 1.0), &device);
        let weights: Vec<ExpertWeights> = (0..count)
            .map(|_| ExpertWeights { w1: draw(ffn, hidden), w2: draw(hidden, ffn), w3: draw(ffn, hidden) })
            .collect();
        for (tokens, k) in [(1, 2), (1, 1), (7, 3), (13, 4)] {
            let x = draw(tokens, hidden);
            let routing = route(draw(tokens, count), k, None);
            let shares = routing.shares.clone().try_into_vec_as::<f32>().unwrap();
            let mut dense = vec![0f32; tokens * count];
            for (slot, &e) in routing.choices.iter().enumerate() {
                dense[slot / k * count + e as usize] = shares[slot];
            }
            let mut expected = Tensor::<2>::zeros([tokens, hidden], &device);
            for (e, w) in weights.iter().enumerate() {
                let share: Vec<f32> = (0..tokens).map(|t| dense[t * count + e]).collect();
                let share = Tensor::<1>::from_floats(share.as_slice(), &device).reshape([tokens, 1]);
                let inner =
                    silu(x.clone().matmul(w.w1.clone().transpose())) * x.clone().matmul(w.w3.clone().transpose());
                expected = expected + inner.matmul(w.w2.clone().transpose()) * share;
            }
            let got = experts(x, &routing, &weights);
            got.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-4));
        }
    }
}
