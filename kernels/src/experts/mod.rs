//! Mixture of experts: `y = Σ_e share_e · w2_e(silu(w1_e·x) · (w3_e·x))` over the chosen experts of each token.
//!
//! The cost grows with tokens × chosen experts, not with the number of experts: tokens are gathered per expert, and an
//! expert nobody chose is not touched.

pub mod reference;

use burn::tensor::{DType, Int, Tensor, TensorData, activation::softmax};

use crate::cast;

/// One expert's matrices, borrowed from the layer.
#[derive(Debug, Clone)]
pub struct ExpertWeights {
    /// Gate projection `[ffn, hidden]`.
    pub w1: Tensor<2>,
    /// Down projection `[hidden, ffn]`.
    pub w2: Tensor<2>,
    /// Up projection `[ffn, hidden]`.
    pub w3: Tensor<2>,
}

/// Which experts each token goes to, and how much of each.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Expert of slot `token · k + rank`, best first.
    pub choices: Vec<u32>,
    /// `[tokens, k]`, f32: the chosen probabilities divided by their sum.
    pub shares: Tensor<2>,
}

/// Chooses the `k` most probable experts of each token (ties: the lower number), or takes `replay`'s choices.
///
/// `logits [tokens, experts]`, f32. The gradient flows through the shares, not through the choice.
pub fn route(logits: Tensor<2>, k: usize, replay: Option<&[u32]>) -> Routing {
    let [tokens, experts] = logits.dims();
    let probabilities = softmax(cast(logits, DType::F32), 1);
    let choices = match replay {
        Some(choices) => choices.to_vec(),
        None => {
            let host: Vec<f32> = probabilities.clone().try_into_vec_as().expect("f32 probabilities read back");
            host.chunks(experts).flat_map(|row| top(row, k)).collect()
        }
    };
    assert_eq!(choices.len(), tokens * k, "routing needs {k} experts for each of {tokens} tokens");
    let indices: Vec<i32> = choices.iter().map(|&e| e as i32).collect();
    let indices = Tensor::<2, Int>::from_data(TensorData::new(indices, [tokens, k]), &probabilities.device());
    let chosen = probabilities.gather(1, indices);
    let shares = chosen.clone() / chosen.sum_dim(1);
    Routing { choices, shares }
}

/// The `k` largest, best first; the earlier of equals. NaN counts as smallest, so a broken row still has k experts.
fn top(row: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    let key = |e: &u32| {
        let p = row[*e as usize];
        if p.is_nan() { f32::NEG_INFINITY } else { p }
    };
    order.sort_by(|a, b| key(b).total_cmp(&key(a)));
    order.truncate(k);
    order
}

/// Runs `x [tokens, hidden]` through the experts of `routing`; the result has the dtype of the weights.
pub fn experts(x: Tensor<2>, routing: &Routing, weights: &[ExpertWeights]) -> Tensor<2> {
    reference::experts(x, routing, weights)
}

#[cfg(test)]
mod tests {
    use super::top;

    #[test]
    fn best_first_and_the_lower_number_wins_a_tie() {
        assert_eq!(top(&[0.1, 0.4, 0.1, 0.4], 3), [1, 3, 0]);
        assert_eq!(top(&[f32::NAN, 0.0, 1.0], 3), [2, 1, 0]);
    }
}
