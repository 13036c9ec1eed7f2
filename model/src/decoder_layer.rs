//! One layer: attention, then experts, each `residual · alpha + branch · beta`.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use m1_kernels::rotary::Rotation;

use crate::batch::Layout;
use crate::cache::LayerCache;
use crate::config::{AttentionKind, ModelConfig};
use crate::experts::Experts;
use crate::layers::{RmsNorm, Stream};
use crate::lightning_attention::LightningAttention;
use crate::softmax_attention::SoftmaxAttention;
use crate::trace::Trace;

/// `self_attn`, of either kind.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Attention {
    /// Linear attention with a decaying state.
    Lightning(LightningAttention),
    /// Softmax attention over keys and values.
    Softmax(SoftmaxAttention),
}

/// One of the model's layers.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Attention.
    pub self_attn: Attention,
    /// Norm before the experts.
    pub post_attention_layernorm: RmsNorm,
    /// Experts.
    pub block_sparse_moe: Experts,
    index: usize,
    postnorm: bool,
    attention_alpha: f64,
    attention_beta: f64,
    mlp_alpha: f64,
    mlp_beta: f64,
}

impl DecoderLayer {
    /// Fresh weights for layer `index`. Matrices that write to the residual get DeepNorm's gain `(8L)^(-1/4)`, the
    /// partner of the configuration's `alpha = (2L)^(1/4)` (arXiv 2203.00555, decoder only).
    pub fn new(config: &ModelConfig, index: usize, device: &Device) -> Self {
        let gain = (8.0 * config.num_hidden_layers as f64).powf(-0.25);
        let norm = || RmsNorm::new(config.hidden_size, config.rms_norm_eps, device);
        let (self_attn, attention_alpha, attention_beta) = match config.kind(index) {
            AttentionKind::Lightning => (
                Attention::Lightning(LightningAttention::new(config, index, gain, device)),
                config.layernorm_linear_attention_alpha,
                config.layernorm_linear_attention_beta,
            ),
            AttentionKind::Softmax => (
                Attention::Softmax(SoftmaxAttention::new(config, gain, device)),
                config.layernorm_full_attention_alpha,
                config.layernorm_full_attention_beta,
            ),
        };
        Self {
            input_layernorm: norm(),
            self_attn,
            post_attention_layernorm: norm(),
            block_sparse_moe: Experts::new(config, gain, device),
            index,
            postnorm: config.postnorm,
            attention_alpha,
            attention_beta,
            mlp_alpha: config.layernorm_mlp_alpha,
            mlp_beta: config.layernorm_mlp_beta,
        }
    }

    /// `x [tokens, hidden] -> [tokens, hidden]`.
    ///
    /// # Panics
    /// If `cache` is of the other kind of attention.
    pub fn forward(
        &self,
        x: Stream,
        layout: &Layout,
        rotation: &Rotation,
        cache: Option<&mut LayerCache>,
        trace: &mut Trace,
    ) -> Stream {
        let (x, h) = self.input_layernorm.forward_stream(x);
        let residual = self.residual(x, &h);
        let attended = match (&self.self_attn, cache) {
            (Attention::Lightning(attention), None) => attention.forward(h, layout, None),
            (Attention::Lightning(attention), Some(LayerCache::Lightning(state))) => {
                attention.forward(h, layout, Some(state))
            }
            (Attention::Softmax(attention), None) => attention.forward(h, layout, rotation, None),
            (Attention::Softmax(attention), Some(LayerCache::Softmax(rows))) => {
                attention.forward(h, layout, rotation, Some(rows))
            }
            _ => panic!("layer {}: the cache was made for another configuration", self.index),
        };
        let x = Stream::new(residual, self.attention_alpha, attended, self.attention_beta);

        let (x, h) = self.post_attention_layernorm.forward_stream(x);
        let residual = self.residual(x, &h);
        let mixed = self.block_sparse_moe.forward(h, self.index, trace);
        Stream::new(residual, self.mlp_alpha, mixed, self.mlp_beta)
    }

    /// M1's one surprise: with `postnorm` it is the NORMED tensor that is carried on.
    fn residual(&self, x: Tensor<2>, h: &Tensor<2>) -> Tensor<2> {
        if self.postnorm { h.clone() } else { x }
    }
}
