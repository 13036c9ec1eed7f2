//! Lightning attention: linear attention whose state decays by `exp(-slope)` at every token (SPEC §2).
//!
//! ```text
//! S ← exp(-s)·S + kᵀv ;  o = q·S            decay first; o includes its own token
//! ```
//! computed by blocks of `m` tokens (i, j = 1..m), exactly the same sum:
//! ```text
//! O_i = exp(-s·i)·q_i·S + Σ_{j≤i} exp(-s(i-j))·(q_i·k_j)·v_j
//! S   ← exp(-s·m)·S + Σ_j exp(-s(m-j))·k_jᵀ·v_j
//! ```
//! No exponent is ever positive: factoring `exp(-s(i-j))` into `exp(-s·i)·exp(s·j)` overflows f32 within one block.
//! Time and memory are linear in the number of tokens: nothing larger than `[rows, heads, BLOCK, BLOCK]` is formed.

pub mod reference;

use burn::tensor::Tensor;

/// Tokens per block. Inside a block the cost is quadratic, between blocks it goes through the state.
pub const BLOCK: usize = 128;

/// Runs rows of tokens through one layer's recurrence.
///
/// - `q`, `k`, `v`: `[rows, heads, tokens, head_dim]`, f32, already activated; no scale is applied.
/// - `slopes`: one positive decay slope per head (per token, natural exponent).
/// - `state`: `[rows, heads, d_k, d_v]`, f32, before the first token; `None` is zero and costs nothing.
/// - `lengths`: tokens of each row that count, when rows differ; the rest of a row is padding behind its last token: it
///   leaves the state untouched and its outputs are meaningless. A length of 0 leaves that row's state as it was.
/// - `want_state`: whether the state after the last token is computed (training has no use for it).
///
/// Returns `o [rows, heads, tokens, head_dim]` in f32 and the state if it was wanted.
pub fn lightning_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    slopes: &[f64],
    state: Option<Tensor<4>>,
    lengths: Option<&[usize]>,
    want_state: bool,
) -> (Tensor<4>, Option<Tensor<4>>) {
    reference::lightning_attention(q, k, v, slopes, state, lengths, want_state)
}
