//! The feed-forward half of a layer: a router in f32 and its experts. No shared expert, no capacity limit, no drops.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use m1_kernels::experts::{ExpertsWeights, experts, route};

use crate::config::ModelConfig;
use crate::layers::Linear;
use crate::trace::Trace;
use crate::weight::Weight;

/// `block_sparse_moe`. Expert `e` is `w2[e]·(silu(w1[e]·h) · (w3[e]·h))`; a checkpoint holds each expert under names of
/// its own (`experts.0.w1`, …), here a layer's are three stacks.
#[derive(Module, Debug)]
pub struct Experts {
    /// The router, `[experts, hidden]`, always f32.
    pub gate: Linear,
    /// `[experts, ffn, hidden]`.
    pub w1: Weight<3>,
    /// `[experts, hidden, ffn]`.
    pub w2: Weight<3>,
    /// `[experts, ffn, hidden]`.
    pub w3: Weight<3>,
    chosen: usize,
}

impl Experts {
    /// Fresh weights.
    pub fn new(config: &ModelConfig, gain: f64, device: &Device) -> Self {
        let (count, hidden, ffn) = (config.num_local_experts, config.hidden_size, config.intermediate_size);
        let up = || Weight::normal(1.0 / (hidden as f64).sqrt(), [count, ffn, hidden], device);
        Self {
            gate: Linear::new(hidden, count, 1.0, device),
            w1: up(),
            w2: Weight::normal(gain / (ffn as f64).sqrt(), [count, hidden, ffn], device),
            w3: up(),
            chosen: config.num_experts_per_tok,
        }
    }

    /// `h [tokens, hidden] -> [tokens, hidden]`.
    pub fn forward(&self, h: Tensor<2>, layer: usize, trace: &mut Trace) -> Tensor<2> {
        let logits = self.gate.forward_f32(h.clone());
        let routing = route(logits.clone(), self.chosen, trace.replay(layer));
        trace.saw_router(&logits, &routing.choices);
        let weights = ExpertsWeights { w1: self.w1.value(), w2: self.w2.value(), w3: self.w3.value() };
        experts(h, &routing, &weights)
    }
}
