//! Causal softmax attention with grouped heads, over keys and values that lie in blocks.
//!
//! `o = softmax(q·kᵀ / √head_dim)·v`, query head `h` reads key head `h / (heads / kv_heads)`; keys and values are never
//! repeated for the heads that share them. Scores exist for one block of queries against one block of keys at a time;
//! the blocks are joined by the online softmax (running maximum and sum), all in f32.

mod backward;
mod cpu;
mod cpu_backward;
mod cpu_decode;
mod cpu_few;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[allow(
    clippy::collapsible_if,
    clippy::assign_op_pattern,
    clippy::manual_div_ceil,
    clippy::manual_is_multiple_of,
    clippy::eq_op
)] // CubeCL's language
pub mod cube;
mod decode;
pub mod reference;
#[cfg(test)]
mod tests;

pub use decode::{Past, decode};

use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind, ExtensionType,
    backend_extension,
};
use burn::tensor::{DType, Tensor};

use crate::base::on_cpu;
use crate::cast;

/// Queries per block in the reference; the caller chooses the blocks of keys.
pub const QUERY_BLOCK: usize = 256;

/// Consecutive keys and values: `[rows, kv_heads, tokens, head_dim]` each.
#[derive(Debug, Clone)]
pub struct KeyValues {
    /// Keys, already rotated.
    pub keys: Tensor<4>,
    /// Values.
    pub values: Tensor<4>,
}

/// A row's share of the blocks of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Blocks of keys, and as many of values.
    pub blocks: usize,
    /// Tokens in them.
    pub tokens: usize,
}

/// [`KeyValues`] as a backend sees them: keys and values from position 0 on, in order, as many of one as of the other.
#[derive(Debug, Clone)]
pub struct KeyValueBlocks<B: Backend> {
    /// `[rows, kv_heads, tokens of the block, head_dim]` each, f32 or bf16, of any strides.
    pub keys: Vec<FloatTensor<B>>,
    /// As the keys.
    pub values: Vec<FloatTensor<B>>,
}

/// By hand, as the derive knows tensors but no lists of them.
impl<B: Backend> ExtensionType<B> for KeyValueBlocks<B> {
    type Target = KeyValueBlocks<Dispatch>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Self::Target
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        let map = |list: Vec<FloatTensor<B>>| {
            list.into_iter().map(|x| DispatchTensor { kind: map_kind(BackendTensor::Float(x)), autodiff }).collect()
        };
        KeyValueBlocks { keys: map(self.keys), values: map(self.values) }
    }

    fn map_from_dispatch<F>(target: Self::Target, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        let map = |list: Vec<DispatchTensor>| list.into_iter().map(|x| unwrap_kind(x).float()).collect();
        Self { keys: map(target.keys), values: map(target.values) }
    }

    fn routing_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.keys.first()
    }

    fn routing_float_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.keys.first()
    }

    fn autodiff_context(target: &Self::Target) -> DispatchAutodiffContext {
        target
            .keys
            .iter()
            .chain(&target.values)
            .fold(DispatchAutodiffContext::Disabled, |context, x| context.merge(x.autodiff))
    }
}

/// The fast paths.
#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub trait SoftmaxAttentionBackend: Backend {
    /// `q [rows, heads, tokens, head_dim]` in f32; `past`: the absolute position of its first token; `blocks` hold at
    /// least the keys at positions `0 .. past + tokens`. Not differentiable.
    ///
    /// Returns `[rows, heads, tokens, head_dim]` in f32.
    fn softmax_attention(
        q: FloatTensor<Self>,
        #[extension_type] blocks: KeyValueBlocks<Self>,
        past: usize,
    ) -> FloatTensor<Self>;

    /// See [`decode`], on the CPU alone: `q [rows, heads, 1, head_dim]`, `k` and `v` `[rows, kv_heads · head_dim]`, all in f32,
    /// and the blocks of all rows, `[kv_heads, room, head_dim]` in f32 or bf16, those of a row (at least one) behind each other. The last
    /// block of each row is written in place when nobody else holds it. Not differentiable.
    ///
    /// Returns `o [rows, heads · head_dim]`, and the last block of keys and of values of each row.
    fn softmax_decode(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] blocks: KeyValueBlocks<Self>,
        shares: Vec<Share>,
    ) -> (FloatTensor<Self>, Vec<FloatTensor<Self>>, Vec<FloatTensor<Self>>) {
        let _ = (q, k, v, blocks, shares);
        unreachable!("the public function sends nothing here but what is the CPU's")
    }

    /// Self-attention of whole texts: `q [rows, heads, tokens, head_dim]`, `k` and `v` `[rows, kv_heads, tokens,
    /// head_dim]`, all f32.
    ///
    /// Returns `o [rows, heads, tokens, head_dim]` and, for the backward pass, the logarithm of each query's sum of
    /// exponentials, `[rows, heads, tokens]` (no gradient goes through it).
    fn softmax_attention_train(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Gradients towards q, k and v of [`SoftmaxAttentionBackend::softmax_attention_train`], given its inputs, both its
    /// outputs and the gradient towards `o`.
    fn softmax_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        o: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        d_o: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

/// Whether the CubeCL kernels take these tensors.
fn on_cube(q: &Tensor<4>, blocks: &[KeyValues]) -> bool {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    return cube::takes(q, blocks);
    #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
    {
        let _ = (q, blocks);
        false
    }
}

/// Attends queries to all keys at or before their own position.
///
/// - `q`: `[rows, heads, tokens, head_dim]`; its first token has absolute position `past`.
/// - `blocks`: keys and values from position 0 on, in order, `past + tokens` of them in all; f32 or bf16. Training
///   (gradients, `past` = 0) is fastest with all of them in one block.
///
/// Returns `[rows, heads, tokens, head_dim]` in f32. On the CPU the bits of a token's output depend on its position and
/// on the keys and values alone: neither on how many queries share the call nor on where the blocks are cut.
///
/// # Panics
/// If there are fewer keys than `past + tokens`, `heads` is no multiple of the keys' heads, or a block's keys or values are of
/// other rows, heads, tokens or sizes of head than the rest.
pub fn softmax_attention(q: Tensor<4>, blocks: &[KeyValues], past: usize) -> Tensor<4> {
    let [rows, heads, tokens, dim] = q.dims();
    let keys: usize = blocks.iter().map(|block| block.keys.dims()[2]).sum();
    assert!(keys >= past + tokens, "{keys} keys for {tokens} queries after {past} tokens");
    let Some(first) = blocks.first() else {
        return cast(q, DType::F32); // without any query
    };
    let kv_heads = first.keys.dims()[1];
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} heads share {kv_heads} heads of keys evenly");
    for (i, block) in blocks.iter().enumerate() {
        let (k, v) = (block.keys.dims(), block.values.dims());
        let fits = k == v && k == [rows, kv_heads, k[2], dim];
        assert!(
            fits,
            "block {i}: keys {k:?} and values {v:?} are [{rows}, {kv_heads}, tokens, {dim}], of the same tokens"
        );
    }
    let cube = on_cube(&q, blocks);
    if !(cube || on_cpu(&q)) {
        return reference::softmax_attention(q, blocks, past);
    }
    let autodiff = |x: &Tensor<4>| x.device().is_autodiff();
    if autodiff(&q) || blocks.iter().any(|block| autodiff(&block.keys) || autodiff(&block.values)) {
        if past > 0 || keys != tokens {
            return reference::softmax_attention(q, blocks, past);
        }
        let join = |part: fn(&KeyValues) -> &Tensor<4>| match blocks {
            [one] => part(one).clone(),
            blocks => Tensor::cat(blocks.iter().map(|block| part(block).clone()).collect(), 2),
        };
        let (k, v) = (join(|block| &block.keys), join(|block| &block.values));
        // A device multiplies halves as they are, if all three are alike.
        let as_is = cube && [k.dtype(), v.dtype()] == [q.dtype(); 2];
        let wide = |x: Tensor<4>| if as_is { x } else { cast(x, DType::F32) }.into_dispatch();
        let (o, _) = Dispatch::softmax_attention_train(wide(q), wide(k), wide(v));
        return Tensor::from_dispatch(o);
    }
    let stored = |x: &Tensor<4>| {
        let x = x.clone();
        if cube || x.dtype() == DType::BF16 { x } else { cast(x, DType::F32) }.into_dispatch()
    };
    let blocks = KeyValueBlocks {
        keys: blocks.iter().map(|block| stored(&block.keys)).collect(),
        values: blocks.iter().map(|block| stored(&block.values)).collect(),
    };
    let q = if cube { q } else { cast(q, DType::F32) };
    Tensor::from_dispatch(Dispatch::softmax_attention(q.into_dispatch(), blocks, past))
}
