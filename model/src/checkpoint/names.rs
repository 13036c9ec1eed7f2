//! Which tensors a model has: every name with its shape, in the order in which checkpoints hold them.

use crate::config::{AttentionKind, ModelConfig};

/// What a tensor is for; it decides in which dtype it lives and is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The embedding: in the dtype asked for, as all matrices but the router.
    Embedding,
    /// A projection of either kind of attention.
    Attention,
    /// A matrix of one expert.
    Expert,
    /// The language-model head.
    Head,
    /// Norm weight: f32 in memory, written in the checkpoint's dtype.
    Norm,
    /// Router gate: f32 in memory and in files, as in the released M1.
    Router,
}

impl Role {
    /// Whether it is a matrix in the dtype asked for.
    pub fn is_matrix(self) -> bool {
        !matches!(self, Self::Norm | Self::Router)
    }
}

/// One tensor that a checkpoint must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// For example `model.layers.7.self_attn.q_proj.weight`.
    pub name: String,
    /// Matrices are `[out, in]`.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
}

/// All tensors of a model with this configuration, by their names in MiniMax's checkpoints.
pub fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let hidden = config.hidden_size;
    let (inner, kv, ffn) = (config.inner_size(), config.kv_size(), config.intermediate_size);
    let mut all = Vec::new();
    let mut add = |name: String, shape: &[usize], role| {
        all.push(TensorSpec { name: name + ".weight", shape: shape.to_vec(), role });
    };
    add("model.embed_tokens".into(), &[config.vocab_size, hidden], Role::Embedding);
    for layer in 0..config.num_hidden_layers {
        let at = |part: &str| format!("model.layers.{layer}.{part}");
        match config.kind(layer) {
            AttentionKind::Lightning => {
                add(at("self_attn.qkv_proj"), &[3 * inner, hidden], Role::Attention);
                add(at("self_attn.output_gate"), &[inner, hidden], Role::Attention);
                add(at("self_attn.out_proj"), &[hidden, inner], Role::Attention);
                add(at("self_attn.norm"), &[inner], Role::Norm);
            }
            AttentionKind::Softmax => {
                add(at("self_attn.q_proj"), &[inner, hidden], Role::Attention);
                add(at("self_attn.k_proj"), &[kv, hidden], Role::Attention);
                add(at("self_attn.v_proj"), &[kv, hidden], Role::Attention);
                add(at("self_attn.o_proj"), &[hidden, inner], Role::Attention);
            }
        }
        add(at("block_sparse_moe.gate"), &[config.num_local_experts, hidden], Role::Router);
        for expert in 0..config.num_local_experts {
            let of = |part: &str| at(&format!("block_sparse_moe.experts.{expert}.{part}"));
            add(of("w1"), &[ffn, hidden], Role::Expert);
            add(of("w2"), &[hidden, ffn], Role::Expert);
            add(of("w3"), &[ffn, hidden], Role::Expert);
        }
        add(at("input_layernorm"), &[hidden], Role::Norm);
        add(at("post_attention_layernorm"), &[hidden], Role::Norm);
    }
    add("model.norm".into(), &[hidden], Role::Norm);
    add("lm_head".into(), &[config.vocab_size, hidden], Role::Head);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_released_model_has_8243_tensors() {
        let config = ModelConfig::from_json(include_str!("../../tests/data/config.json")).unwrap();
        let all = tensors(&config);
        assert_eq!(all.len(), 8243);
        let shape = |name: &str| all.iter().find(|t| t.name == name).map(|t| t.shape.clone());
        assert_eq!(shape("model.layers.0.self_attn.qkv_proj.weight"), Some(vec![24576, 6144]));
        assert_eq!(shape("model.layers.79.self_attn.k_proj.weight"), Some(vec![1024, 6144]));
        assert_eq!(shape("model.layers.79.self_attn.qkv_proj.weight"), None);
        assert_eq!(shape("model.layers.3.block_sparse_moe.experts.31.w2.weight"), Some(vec![6144, 9216]));
    }

    /// Against the released index itself, where the checkout has it.
    #[test]
    fn the_released_index_lists_exactly_these_names() {
        let index = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/m1/data/model.safetensors.index.json");
        let Ok(text) = std::fs::read_to_string(index) else {
            return;
        };
        let index: serde_json::Value = serde_json::from_str(&text).unwrap();
        let config = ModelConfig::from_json(include_str!("../../tests/data/config.json")).unwrap();
        let mut ours: Vec<_> = tensors(&config).into_iter().map(|t| t.name).collect();
        let mut theirs: Vec<_> = index["weight_map"].as_object().unwrap().keys().cloned().collect();
        ours.sort();
        theirs.sort();
        assert_eq!(ours, theirs);
    }
}
