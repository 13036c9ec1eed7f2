//! The places for weights in a model, under the checkpoint's names: where loading puts them and saving finds them.

use burn::module::Param;
use burn::tensor::Tensor;

use crate::decoder_layer::Attention;
use crate::layers::Linear;
use crate::model::M1;
use crate::weight::{Table, Weight};

/// A place for one tensor of a checkpoint, or for one of every expert.
pub enum Slot<'a> {
    /// A vector that stays f32.
    Norm(&'a mut Param<Tensor<1>>),
    /// A matrix.
    Matrix(&'a mut Weight<2>),
    /// The embedding.
    Table(&'a mut Table),
    /// The same matrix of all experts of a layer.
    Experts(&'a mut Weight<3>),
}

/// Every place with its name, in the order of `names::tensors`; `*` stands for an expert's number.
pub fn slots(model: &mut M1) -> Vec<(String, Slot<'_>)> {
    let decoder = &mut model.model;
    let mut all = vec![("model.embed_tokens.weight".into(), Slot::Table(&mut decoder.embed_tokens.weight))];
    for (i, layer) in decoder.layers.iter_mut().enumerate() {
        let mut add = |part: &str, slot| all.push((format!("model.layers.{i}.{part}.weight"), slot));
        match &mut layer.self_attn {
            Attention::Lightning(attention) => {
                add("self_attn.qkv_proj", matrix(&mut attention.qkv_proj));
                add("self_attn.output_gate", matrix(&mut attention.output_gate));
                add("self_attn.out_proj", matrix(&mut attention.out_proj));
                add("self_attn.norm", Slot::Norm(&mut attention.norm.weight));
            }
            Attention::Softmax(attention) => {
                add("self_attn.q_proj", matrix(&mut attention.q_proj));
                add("self_attn.k_proj", matrix(&mut attention.k_proj));
                add("self_attn.v_proj", matrix(&mut attention.v_proj));
                add("self_attn.o_proj", matrix(&mut attention.o_proj));
            }
        }
        let moe = &mut layer.block_sparse_moe;
        add("block_sparse_moe.gate", matrix(&mut moe.gate));
        add("block_sparse_moe.experts.*.w1", Slot::Experts(&mut moe.w1));
        add("block_sparse_moe.experts.*.w2", Slot::Experts(&mut moe.w2));
        add("block_sparse_moe.experts.*.w3", Slot::Experts(&mut moe.w3));
        add("input_layernorm", Slot::Norm(&mut layer.input_layernorm.weight));
        add("post_attention_layernorm", Slot::Norm(&mut layer.post_attention_layernorm.weight));
    }
    all.push(("model.norm.weight".into(), Slot::Norm(&mut decoder.norm.weight)));
    all.push(("lm_head.weight".into(), Slot::Matrix(&mut model.lm_head.weight)));
    all
}

fn matrix(linear: &mut Linear) -> Slot<'_> {
    Slot::Matrix(&mut linear.weight)
}

/// The name of one expert's tensor in a slot of all experts.
pub fn of_expert(slot: &str, expert: usize) -> String {
    slot.replacen('*', &expert.to_string(), 1)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::checkpoint::tensors;
    use crate::config::ModelConfig;

    #[test]
    fn every_tensor_has_one_place() {
        let mut config = ModelConfig::preset("nano").unwrap();
        config.num_hidden_layers = 3;
        config.attn_type_list = vec![0, 1, 0];
        let mut model = M1::new(&config, &Device::flex());
        let mut names = Vec::new();
        for (name, slot) in slots(&mut model) {
            match slot {
                Slot::Experts(_) => names.extend((0..config.num_local_experts).map(|e| of_expert(&name, e))),
                _ => names.push(name),
            }
        }
        let mut expected: Vec<_> = tensors(&config).into_iter().map(|tensor| tensor.name).collect();
        names.sort();
        expected.sort();
        assert_eq!(names, expected);
    }
}
