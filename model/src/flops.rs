//! What a model costs, from its configuration alone: parameters, bytes, FLOPs (SPEC §5).
//!
//! Sums are in `u128`: no configuration that [`ModelConfig::validate`] accepts overflows them at any context.

use crate::checkpoint::{Role, WeightDtype, tensors};
use crate::config::{AttentionKind, ModelConfig};

/// All weights.
pub fn parameters(config: &ModelConfig) -> u128 {
    let layer = |kind| {
        let inner = wide(config.inner_size());
        let hidden = wide(config.hidden_size);
        let attention = match kind {
            AttentionKind::Lightning => 5 * inner * hidden + inner,
            AttentionKind::Softmax => 2 * (inner + wide(config.kv_size())) * hidden,
        };
        attention + (wide(config.num_local_experts) + 2) * hidden
    };
    let experts = wide(config.num_hidden_layers) * wide(config.num_local_experts) * expert(config);
    let layers: u128 = (0..config.num_hidden_layers).map(|i| layer(config.kind(i))).sum();
    2 * embedding(config) + layers + experts + wide(config.hidden_size)
}

/// Weights that one token meets, without embedding and head (the report's "45.9 B").
pub fn active_parameters(config: &ModelConfig) -> u128 {
    let asleep = wide(config.num_local_experts - config.num_experts_per_tok);
    parameters(config) - 2 * embedding(config) - wide(config.num_hidden_layers) * asleep * expert(config)
}

/// Bytes of all weights in memory: matrices in `dtype`, norms and routers in f32.
pub fn weight_bytes(config: &ModelConfig, dtype: WeightDtype) -> u128 {
    let elements = |role: fn(Role) -> bool| -> u128 {
        let of_role = |t: &crate::checkpoint::TensorSpec| t.shape.iter().map(|&dim| wide(dim)).product::<u128>();
        tensors(config).iter().filter(|t| role(t.role)).map(of_role).sum()
    };
    elements(|role| role == Role::Matrix) * wide(dtype.size()) + elements(|role| role != Role::Matrix) * 4
}

/// Bytes of a sequence's lightning states (f32), whatever its length.
pub fn state_bytes(config: &ModelConfig) -> u128 {
    wide(config.layers_of(AttentionKind::Lightning)) * state(config) * 4
}

/// Bytes of keys and values that each further token adds to a sequence, with `dtype` for both.
pub fn kv_bytes_per_token(config: &ModelConfig, dtype: WeightDtype) -> u128 {
    2 * wide(config.layers_of(AttentionKind::Softmax)) * wide(config.kv_size()) * wide(dtype.size())
}

/// Bytes of the whole cache of one sequence of `context` tokens.
pub fn cache_bytes(config: &ModelConfig, context: usize, dtype: WeightDtype) -> u128 {
    state_bytes(config) + kv_bytes_per_token(config, dtype) * wide(context)
}

/// FLOPs (2 a multiply-add) to generate one token after `context` others, without embedding and head.
///
/// `2 · active + 4 · lightning layers · heads · d² + 4 · softmax layers · heads · d · context`: each lightning state is
/// added to and read; each earlier key and value of a softmax layer is met once.
pub fn flops_per_token(config: &ModelConfig, context: usize) -> u128 {
    let states = wide(config.layers_of(AttentionKind::Lightning)) * state(config);
    let scores = wide(config.layers_of(AttentionKind::Softmax)) * wide(config.inner_size()) * wide(context);
    2 * active_parameters(config) + 4 * states + 4 * scores
}

fn wide(n: usize) -> u128 {
    n as u128
}

fn embedding(config: &ModelConfig) -> u128 {
    wide(config.vocab_size) * wide(config.hidden_size)
}

fn expert(config: &ModelConfig) -> u128 {
    3 * wide(config.intermediate_size) * wide(config.hidden_size)
}

/// Numbers in one lightning layer's state.
fn state(config: &ModelConfig) -> u128 {
    wide(config.inner_size()) * wide(config.head_dim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn m1() -> ModelConfig {
        ModelConfig::from_json(include_str!("../tests/data/config.json")).unwrap()
    }

    #[test]
    fn the_released_model_costs_what_the_specification_says() {
        let m1 = m1();
        assert_eq!(parameters(&m1), 456_089_655_296);
        assert_eq!(active_parameters(&m1), 45_944_920_064);
        assert_eq!(state_bytes(&m1), 280 << 20);
        assert_eq!(kv_bytes_per_token(&m1, WeightDtype::Bf16), 40_960);
        assert_eq!(state_bytes(&m1), 7_168 * kv_bytes_per_token(&m1, WeightDtype::Bf16));
        let at = |context| flops_per_token(&m1, context);
        assert_eq!(at(0) - 2 * active_parameters(&m1), 293_601_280);
        assert_eq!(at(1000) - at(999), 327_680);
    }

    #[test]
    fn figures_agree_with_the_list_of_tensors() {
        for (name, weights) in [("nano", 3_906_560), ("small", 229_465_600), ("base", 949_664_768)] {
            let config = ModelConfig::preset(name).unwrap();
            assert_eq!(parameters(&config), weights, "{name}");
            let listed: u128 = tensors(&config).iter().map(|t| t.shape.iter().product::<usize>() as u128).sum();
            assert_eq!(parameters(&config), listed, "{name}");
            assert_eq!(weight_bytes(&config, WeightDtype::F32), 4 * listed, "{name}");
            assert!(weight_bytes(&config, WeightDtype::Bf16) < 3 * listed, "{name}");
        }
        assert_eq!(parameters(&m1()), {
            tensors(&m1()).iter().map(|t| t.shape.iter().product::<usize>() as u128).sum::<u128>()
        });
    }

    #[test]
    fn one_expert_more_or_less() {
        let mut config = ModelConfig::preset("nano").unwrap();
        let before = (parameters(&config), active_parameters(&config));
        config.num_local_experts += 1;
        let (expert, gate_row) = (3 * 128 * 256, 128);
        assert_eq!(parameters(&config), before.0 + 8 * (expert + gate_row));
        assert_eq!(active_parameters(&config), before.1 + 8 * gate_row);
        config.num_experts_per_tok += 1;
        assert_eq!(active_parameters(&config), before.1 + 8 * (gate_row + expert));
    }
}
