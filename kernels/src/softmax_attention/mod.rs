//! Causal softmax attention with grouped heads, over keys and values that lie in blocks.
//!
//! `o = softmax(q·kᵀ / √head_dim)·v`, query head `h` reads key head `h / (heads / kv_heads)`; keys and values are never
//! repeated for the heads that share them. Scores exist for one block of queries against one block of keys at a time;
//! the blocks are joined by the online softmax (running maximum and sum), all in f32.

pub mod reference;

use burn::tensor::Tensor;

/// Queries per block; the caller chooses the blocks of keys.
pub const QUERY_BLOCK: usize = 256;

/// Consecutive keys and values: `[rows, kv_heads, tokens, head_dim]` each.
#[derive(Debug, Clone)]
pub struct KeyValues {
    /// Keys, already rotated.
    pub keys: Tensor<4>,
    /// Values.
    pub values: Tensor<4>,
}

/// Attends queries to all keys at or before their own position.
///
/// - `q`: `[rows, heads, tokens, head_dim]`; its first token has absolute position `past`.
/// - `blocks`: keys and values from position 0 on, in order, `past + tokens` of them in all.
///
/// Returns `[rows, heads, tokens, head_dim]` in f32.
pub fn softmax_attention(q: Tensor<4>, blocks: &[KeyValues], past: usize) -> Tensor<4> {
    reference::softmax_attention(q, blocks, past)
}
