//! Linear attention with a decaying state: 7 of every 8 layers. What it keeps of the past is one matrix per head,
//! whatever the length of the text.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use m1_kernels::lightning_attention::{decode, lightning_attention};
use m1_kernels::silu::silu;

use crate::batch::Layout;
use crate::config::ModelConfig;
use crate::layers::{Linear, RmsNorm};

/// The norm over the heads' outputs has its own epsilon, not the configuration's (`tests/reference/reference.py`).
const NORM_EPS: f64 = 1e-6;

/// `self_attn` of a lightning layer.
#[derive(Module, Debug)]
pub struct LightningAttention {
    /// `[heads · 3 · head_dim, hidden]`, rows grouped per head: q, k, v of head 0, then of head 1, …
    pub qkv_proj: Linear,
    /// `[heads · head_dim, hidden]`.
    pub output_gate: Linear,
    /// `[hidden, heads · head_dim]`.
    pub out_proj: Linear,
    /// One norm over all heads together.
    pub norm: RmsNorm,
    #[module(skip)]
    slopes: Vec<f64>,
}

impl LightningAttention {
    /// Fresh weights for layer `layer`.
    pub fn new(config: &ModelConfig, layer: usize, gain: f64, device: &Device) -> Self {
        let (hidden, inner) = (config.hidden_size, config.num_attention_heads * config.head_dim);
        Self {
            qkv_proj: Linear::new(hidden, 3 * inner, 1.0, device),
            output_gate: Linear::new(hidden, inner, 1.0, device),
            out_proj: Linear::new(inner, hidden, gain, device),
            norm: RmsNorm::new(inner, NORM_EPS, device),
            slopes: decay_slopes(config.num_attention_heads, layer, config.num_hidden_layers),
        }
    }

    /// `h [tokens, hidden] -> [tokens, hidden]`; `state [rows, heads, head_dim, head_dim]` f32 is read and replaced.
    ///
    /// Without a cache no state is computed at all.
    pub fn forward(&self, h: Tensor<2>, layout: &Layout, state: Option<&mut Tensor<4>>) -> Tensor<2> {
        let (qkv, gate) = self.qkv_proj.forward_pair(&self.output_gate, h);
        let o = match state {
            Some(state) if layout.one_each() => self.decode(qkv, gate, state),
            state => self.blocks(qkv, gate, layout, state),
        };
        self.out_proj.forward(o)
    }

    /// One token a row: a single pass over the state.
    fn decode(&self, qkv: Tensor<2>, gate: Tensor<2>, state: &mut Tensor<4>) -> Tensor<2> {
        let (o, after) = decode(qkv, gate, take(state), &self.slopes, self.norm.weight.val(), self.norm.eps());
        *state = after;
        o
    }

    /// Any number of tokens a row, in blocks.
    fn blocks(&self, qkv: Tensor<2>, gate: Tensor<2>, layout: &Layout, state: Option<&mut Tensor<4>>) -> Tensor<2> {
        // [rows, heads, tokens, 3 · head_dim]: each head's q, k and v lie side by side. In halves they go to a device's tensor cores;
        // sums and state are f32 there too.
        let qkv = layout.heads(silu(qkv), self.slopes.len());
        let (starts, lengths) = (Some(layout.starts.as_slice()), layout.uneven());
        let o = match state {
            None => lightning_attention(qkv, &self.slopes, None, starts, lengths, false).0,
            Some(state) => {
                let before = Some(take(state));
                let (o, after) = lightning_attention(qkv, &self.slopes, before, starts, lengths, true);
                *state = after.expect("the state was asked for");
                o
            }
        };
        self.norm.forward_gated(layout.join(o), gate)
    }
}

/// Moves the state out, so that its buffer has one owner and can be written in place.
fn take(state: &mut Tensor<4>) -> Tensor<4> {
    let empty = Tensor::empty([0, 0, 0, 0], &state.device());
    std::mem::replace(state, empty)
}

/// Decay slope of each head at `layer` of `layers`: `alibi(h) · (1 - layer / (layers - 1) + 1e-5)`; for a single layer
/// the factor is `1 + 1e-5`.
pub fn decay_slopes(heads: usize, layer: usize, layers: usize) -> Vec<f64> {
    let depth = if layers > 1 { layer as f64 / (layers - 1) as f64 } else { 0.0 };
    alibi_slopes(heads).into_iter().map(|slope| slope * (1.0 - depth + 1e-5)).collect()
}

/// ALiBi's slopes: `2^(-8(h+1)/H)`; off powers of two those of the power below, then every second of the one above.
fn alibi_slopes(heads: usize) -> Vec<f64> {
    let power = |n: usize| (0..n).map(move |h| (-8.0 * (h + 1) as f64 / n as f64).exp2());
    let lower = 1 << heads.ilog2();
    power(lower).chain(power(2 * lower).step_by(2).take(heads - lower)).collect()
}

#[cfg(test)]
mod tests {
    use super::{alibi_slopes, decay_slopes};

    #[test]
    fn slopes_follow_alibi() {
        assert_eq!(alibi_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625]);
        let six = alibi_slopes(6);
        assert_eq!(six[..4], alibi_slopes(4));
        assert_eq!(six[4..], [0.5, 0.125]);
        assert_eq!(alibi_slopes(1), [2f64.powi(-8)]);
        // the fastest head of M1: 2^(-1/8) · (1 + 1e-5)
        assert!((decay_slopes(64, 0, 80)[0] - 0.917_013_2).abs() < 1e-6);
        assert!((decay_slopes(64, 79, 80)[0] - 0.917_004 * 1e-5).abs() < 1e-10);
        assert_eq!(decay_slopes(1, 0, 1), [2f64.powi(-8) * (1.0 + 1e-5)]);
    }
}
