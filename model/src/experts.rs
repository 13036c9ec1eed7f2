//! The feed-forward half of a layer: a router in f32 and its experts. No shared expert, no capacity limit, no drops.

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};
use m1_kernels::experts::{ExpertWeights, experts, route};

use crate::config::ModelConfig;
use crate::layers::Linear;
use crate::trace::Trace;

/// One expert: `w2(silu(w1·h) · (w3·h))`.
#[derive(Module, Debug)]
pub struct Expert {
    /// `[ffn, hidden]`.
    pub w1: Linear,
    /// `[hidden, ffn]`.
    pub w2: Linear,
    /// `[ffn, hidden]`.
    pub w3: Linear,
}

/// `block_sparse_moe`.
#[derive(Module, Debug)]
pub struct Experts {
    /// The router, `[experts, hidden]`, always f32.
    pub gate: Linear,
    /// All experts of the layer.
    pub experts: Vec<Expert>,
    chosen: usize,
}

impl Experts {
    /// Fresh weights.
    pub fn new(config: &ModelConfig, gain: f64, device: &Device) -> Self {
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        Self {
            gate: Linear::new(hidden, config.num_local_experts, 1.0, device),
            experts: (0..config.num_local_experts)
                .map(|_| Expert {
                    w1: Linear::new(hidden, ffn, 1.0, device),
                    w2: Linear::new(ffn, hidden, gain, device),
                    w3: Linear::new(hidden, ffn, 1.0, device),
                })
                .collect(),
            chosen: config.num_experts_per_tok,
        }
    }

    /// `h [tokens, hidden] -> [tokens, hidden]`.
    pub fn forward(&self, h: Tensor<2>, layer: usize, trace: &mut Trace) -> Tensor<2> {
        let dtype = h.dtype();
        let logits = self.gate.forward_f32(h.clone());
        let routing = route(logits.clone(), self.chosen, trace.replay(layer));
        trace.saw_router(&logits, &routing.choices);
        let weights: Vec<ExpertWeights> = self
            .experts
            .iter()
            .map(|e| ExpertWeights { w1: e.w1.weight.val(), w2: e.w2.weight.val(), w3: e.w3.weight.val() })
            .collect();
        let y = experts(h, &routing, &weights);
        debug_assert!(dtype == DType::F32 || y.dtype() == dtype);
        y
    }
}
