//! What a model costs, from its configuration alone: parameters, bytes, FLOPs.
//!
//! Sums are in `u128`: no configuration that [`ModelConfig::validate`] accepts overflows them at any context.

use crate::checkpoint::{Quantization, Role, TensorSpec, WeightDtype, tensors};
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
        let of_role = |t: &TensorSpec| t.shape.iter().map(|&dim| wide(dim)).product::<u128>();
        tensors(config).iter().filter(|t| role(t.role)).map(of_role).sum()
    };
    elements(Role::is_matrix) * wide(dtype.size()) + elements(|role| !role.is_matrix()) * 4
}

/// Bytes of all weights as this quantization holds them, scales included: other matrices in `dtype`, norms and routers in
/// f32.
pub fn quantized_bytes(config: &ModelConfig, dtype: WeightDtype, quantization: &Quantization) -> u128 {
    let bytes = |tensor: &TensorSpec| {
        let elements: u128 = tensor.shape.iter().map(|&dim| wide(dim)).product();
        match quantization.of(tensor.role) {
            Some(blocks) => blocks.bytes(elements).iter().sum(),
            None if tensor.role.is_matrix() => elements * wide(dtype.size()),
            None => elements * 4,
        }
    };
    tensors(config).iter().map(bytes).sum()
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
    use crate::checkpoint::Bits;

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
    fn blocks_take_their_bits_and_a_scale() {
        let m1 = m1();
        let of =
            |bits, block, all| quantized_bytes(&m1, WeightDtype::Bf16, &Quantization::new(bits, block, all).unwrap());
        let bf16 = weight_bytes(&m1, WeightDtype::Bf16);
        let experts = 80 * 32 * expert(&m1);
        assert_eq!(bf16 - of(Bits::Int8, 32, false), experts - experts / 16);
        assert_eq!(bf16 - of(Bits::Int4, 64, false), experts * 3 / 2 - experts / 32);
        // All matrices but the routers; at 4 bits embedding and head take 8.
        let routers = 80 * 32 * 6144;
        let norms = 70 * 8192 + (2 * 80 + 1) * 6144;
        let (all, ends) = (parameters(&m1) - routers - norms, 2 * embedding(&m1));
        assert_eq!(of(Bits::Int8, 32, true), all * 17 / 16 + 4 * (routers + norms));
        assert_eq!(of(Bits::Int4, 32, true), (all - ends) * 9 / 16 + ends * 17 / 16 + 4 * (routers + norms));
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
