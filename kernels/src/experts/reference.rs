//! The definition, as plain tensor operations: gather per expert, three products, put back, weigh.

use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation::silu};

use super::{ExpertsWeights, Routing};
use crate::cast;
use crate::linear::Weight;

/// See [`super::experts`]. Constants are dequantised, the chosen experts' alone.
pub fn experts(x: Tensor<2>, routing: &Routing, weights: &ExpertsWeights) -> Tensor<2> {
    let [tokens, hidden] = x.dims();
    let [_, k] = routing.shares.dims();
    let count = weights.w1.dims()[0];
    let device = x.device();
    let dtype = match &weights.w1 {
        Weight::Tensor(w) => w.dtype(),
        Weight::Packed(_) => DType::F32,
        Weight::Quantized(_) => x.dtype(),
    };
    let x = cast(x, dtype);
    if tokens * k == 0 {
        return x.zeros_like();
    }

    let mut slots: Vec<Vec<usize>> = vec![Vec::new(); count];
    for (slot, &expert) in routing.choices.host().iter().enumerate() {
        slots[expert as usize].push(slot);
    }
    let mut outputs = Vec::new();
    let mut position = vec![0; tokens * k];
    let mut next = 0;
    for (expert, slots) in slots.iter().enumerate().filter(|(_, slots)| !slots.is_empty()) {
        for &slot in slots {
            position[slot] = next;
            next += 1;
        }
        let [w1, w2, w3] =
            [&weights.w1, &weights.w2, &weights.w3].map(|w| cast(w.dense(expert, &device), dtype).transpose());
        let x = if tokens == 1 { x.clone() } else { x.clone().select(0, index(slots.iter().map(|s| s / k), &device)) };
        let gate = silu(x.clone().matmul(w1));
        let up = x.matmul(w3);
        outputs.push((gate * up).matmul(w2));
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

    use super::super::{ExpertsWeights, route};

    #[test]
    fn gathering_equals_running_every_expert() {
        let device = Device::flex();
        let (hidden, ffn, count) = (6, 5, 4);
        let draw = |shape| Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), &device);
        let plain = |a: usize, b: usize| draw([1, a, b]).squeeze_dim::<2>(0);
        let (w1, w2, w3) = (draw([count, ffn, hidden]), draw([count, hidden, ffn]), draw([count, ffn, hidden]));
        let weights = ExpertsWeights { w1: w1.clone().into(), w2: w2.clone().into(), w3: w3.clone().into() };
        for (tokens, k) in [(1, 2), (1, 1), (7, 3), (13, 4)] {
            let x = plain(tokens, hidden);
            let routing = route(plain(tokens, count), k, None);
            let shares = routing.shares.clone().try_into_vec_as::<f32>().unwrap();
            let mut dense = vec![0f32; tokens * count];
            for (slot, &e) in routing.choices.host().iter().enumerate() {
                dense[slot / k * count + e as usize] = shares[slot];
            }
            let mut expected = Tensor::<2>::zeros([tokens, hidden], &device);
            for e in 0..count {
                let [w1, w2, w3] = [&w1, &w2, &w3].map(|w| w.clone().narrow(0, e, 1).squeeze_dim::<2>(0).transpose());
                let share: Vec<f32> = (0..tokens).map(|t| dense[t * count + e]).collect();
                let share = Tensor::<1>::from_floats(share.as_slice(), &device).reshape([tokens, 1]);
                let inner = silu(x.clone().matmul(w1)) * x.clone().matmul(w3);
                expected = expected + inner.matmul(w2) * share;
            }
            let got = super::experts(x, &routing, &weights);
            got.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-4));
        }
    }
}
