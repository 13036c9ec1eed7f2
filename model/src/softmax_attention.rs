//! Causal softmax attention with grouped heads and partial rotation: every 8th layer.

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};
use m1_kernels::rotary::{Rotation, rotary};
use m1_kernels::softmax_attention::{KeyValues, decode, softmax_attention};

use crate::batch::Layout;
use crate::cache::KvRow;
use crate::config::ModelConfig;
use crate::layers::Linear;

/// `self_attn` of a softmax layer.
#[derive(Module, Debug)]
pub struct SoftmaxAttention {
    /// `[heads · head_dim, hidden]`.
    pub q_proj: Linear,
    /// `[kv_heads · head_dim, hidden]`.
    pub k_proj: Linear,
    /// `[kv_heads · head_dim, hidden]`.
    pub v_proj: Linear,
    /// `[hidden, heads · head_dim]`.
    pub o_proj: Linear,
    heads: usize,
    kv_heads: usize,
}

impl SoftmaxAttention {
    /// Fresh weights.
    pub fn new(config: &ModelConfig, gain: f64, device: &Device) -> Self {
        let inner = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        Self {
            q_proj: Linear::new(config.hidden_size, inner, 1.0, device),
            k_proj: Linear::new(config.hidden_size, kv, 1.0, device),
            v_proj: Linear::new(config.hidden_size, kv, gain, device),
            o_proj: Linear::new(inner, config.hidden_size, gain, device),
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
        }
    }

    /// `h [tokens, hidden] -> [tokens, hidden]`; new keys (after rotation) and values are added to each row of `cache`.
    pub fn forward(
        &self,
        h: Tensor<2>,
        layout: &Layout,
        rotation: &Rotation,
        cache: Option<&mut [KvRow]>,
    ) -> Tensor<2> {
        let dtype = h.dtype();
        let q = self.rotated(self.q_proj.forward(h.clone()), self.heads, rotation);
        let (k, v) = self.k_proj.forward_pair(&self.v_proj, h);
        let k = self.rotated(k, self.kv_heads, rotation);
        // Halves meet halves, so that a device multiplies them on its tensor cores: in the activations' dtype, if that is also
        // what keys and values are kept in. Rotation gives f32.
        let kept = cache.as_ref().and_then(|rows| rows.first()).map_or(dtype, KvRow::dtype);
        let (q, k) = if kept == dtype { (cast(q, dtype), cast(k, dtype)) } else { (q, k) };
        let o = match cache {
            Some(rows) if layout.one_each() => self.decode(q, k, v, rows),
            cache => layout.join(self.chunk(q, k, v, layout, cache)),
        };
        self.o_proj.forward(cast(o, dtype))
    }

    /// Any number of tokens a row.
    fn chunk(
        &self,
        q: Tensor<2>,
        k: Tensor<2>,
        v: Tensor<2>,
        layout: &Layout,
        cache: Option<&mut [KvRow]>,
    ) -> Tensor<4> {
        let (q, k, v) = (layout.heads(q, self.heads), layout.heads(k, self.kv_heads), layout.heads(v, self.kv_heads));
        match cache {
            None => softmax_attention(q, &[KeyValues { keys: k, values: v }], 0),
            Some(rows) => self.over_cache(q, k, v, layout, rows),
        }
    }

    /// One token a row.
    fn decode(&self, q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, rows: &mut [KvRow]) -> Tensor<2> {
        let (dim, device) = (k.dims()[1] / self.kv_heads, k.device());
        let (pasts, lent): (Vec<_>, Vec<_>) = rows.iter_mut().map(|row| row.lend(self.kv_heads, dim, &device)).unzip();
        let (o, last) = decode(q, k, v, pasts);
        for ((row, lent), last) in rows.iter_mut().zip(lent).zip(last) {
            row.take_back(lent, last);
        }
        o
    }

    fn rotated(&self, x: Tensor<2>, heads: usize, rotation: &Rotation) -> Tensor<2> {
        let [tokens, inner] = x.dims();
        rotary(x.reshape([tokens, heads, inner / heads]), rotation).reshape([tokens, inner])
    }

    /// Rows stand at different depths, so each attends to its own blocks.
    fn over_cache(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, layout: &Layout, rows: &mut [KvRow]) -> Tensor<4> {
        let [_, heads, longest, dim] = q.dims();
        let mut outputs = Vec::with_capacity(rows.len());
        for (i, (row, &tokens)) in rows.iter_mut().zip(&layout.lengths).enumerate() {
            let at = |x: &Tensor<4>| x.clone().narrow(0, i, 1).narrow(2, 0, tokens);
            if tokens == 0 {
                outputs.push(Tensor::zeros([1, heads, longest, dim], &q.device()));
                continue;
            }
            let past = row.len();
            row.append(at(&k).squeeze_dim(0), at(&v).squeeze_dim(0));
            let o = softmax_attention(at(&q), &row.blocks(), past);
            outputs.push(if tokens == longest {
                o
            } else {
                let padding = Tensor::zeros([1, heads, longest - tokens, dim], &o.device());
                Tensor::cat(vec![o, padding], 2)
            });
        }
        if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(outputs, 0) }
    }
}

fn cast(x: Tensor<2>, dtype: DType) -> Tensor<2> {
    if x.dtype() == dtype { x } else { x.cast(dtype) }
}
