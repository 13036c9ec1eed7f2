//! Lightning attention: linear attention whose state decays by `exp(-slope)` at every token.
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
//! Time and memory are linear in the number of tokens: nothing larger than `[BLOCK, BLOCK]` is formed per head at a time
//! (per row and head in the reference).

mod backward;
mod cpu;
mod cpu_decode;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[allow(clippy::collapsible_if, clippy::assign_op_pattern, clippy::manual_div_ceil, clippy::eq_op)] // CubeCL's language
pub mod cube;
pub mod reference;
#[cfg(test)]
mod tests;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Tensor};

use crate::base::on_cpu;
use crate::cast;

/// Tokens per block. Inside a block the cost is quadratic, between blocks it goes through the state. Blocks end at
/// multiples of it, counted from the beginning of a row's text. Of 64 and 128, measured on the CPU, 64 takes 11 to 18 % less
/// time at head_dim 64 to 128, forward and backward. Blocks of the other backends' own sizes divide it.
pub const BLOCK: usize = 64;

/// What a call computes, apart from its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockPlan {
    /// One positive decay slope per head (per token, natural exponent).
    pub slopes: Vec<f64>,
    /// Absolute position of each row's first token: its blocks end at multiples of [`BLOCK`], so a text cut there gives
    /// the same bits as the text in one piece.
    pub starts: Vec<usize>,
    /// Tokens of each row that count; the rest is padding behind them.
    pub lengths: Vec<usize>,
    /// Whether `state` is read; without one it is zero.
    pub has_state: bool,
    /// Whether the state after the last token is computed.
    pub want_state: bool,
}

/// The fast paths; all tensors are f32, of any strides.
#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub trait LightningAttentionBackend: Backend {
    /// `qkv` `[rows, heads, tokens, 3 · dim]`; `state` `[rows, heads, dim, dim]` (any tensor when the plan has none).
    ///
    /// Returns `o [rows, heads, tokens, dim]` (zero behind a row's length) and the state (`o` again when it isn't wanted).
    fn lightning_block(
        qkv: FloatTensor<Self>,
        state: FloatTensor<Self>,
        plan: BlockPlan,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Gradients of [`LightningAttentionBackend::lightning_block`] towards `qkv` and state, given those towards `o` and
    /// towards the state (any tensor when the plan wants none). What lies behind a row's length gets zero.
    /// Without a state in the plan the last gradient is any tensor.
    fn lightning_block_backward(
        qkv: FloatTensor<Self>,
        state: FloatTensor<Self>,
        d_o: FloatTensor<Self>,
        d_state: FloatTensor<Self>,
        plan: BlockPlan,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// See [`decode`]. `norm [heads · dim]`; the state is written in place when nobody else holds it. Not differentiable.
    fn lightning_decode(
        qkv: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        state: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        slopes: Vec<f64>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// Runs rows of tokens through one layer's recurrence.
///
/// - `qkv`: `[rows, heads, tokens, 3 · head_dim]`, already activated, q, k and v of a head side by side as its
///   projection makes them: so its gradient is one tensor too, written once. No scale is applied. Any strides. Taken in f32
///   but by a device's kernels, which read f16 and bf16 as they are.
/// - `slopes`: one positive decay slope per head (per token, natural exponent).
/// - `state`: `[rows, heads, head_dim, head_dim]`, f32, before the first token; `None` is zero and costs nothing.
/// - `starts`: absolute position of each row's first token, `None` for 0 everywhere. It decides where blocks end, not
///   the result beyond rounding: with it, a text that is cut at multiples of [`BLOCK`] gives the same bits on the CPU.
/// - `lengths`: tokens of each row that count, when rows differ; the rest of a row is padding behind its last token: it
///   leaves the state untouched and its outputs are meaningless. A length of 0 leaves that row's state as it was.
/// - `want_state`: whether the state after the last token is computed (training has no use for it).
///
/// Returns `o [rows, heads, tokens, head_dim]` and the state if it was wanted, both in f32. On the CPU `o` is a view of
/// `[rows, tokens, heads, head_dim]` in memory, so that joining its heads costs nothing.
///
/// # Panics
/// If `qkv` is not three parts wide, `state` has another shape, `slopes`, `starts` or `lengths` are not as many as heads or
/// rows, or a length exceeds the tokens.
pub fn lightning_attention(
    qkv: Tensor<4>,
    slopes: &[f64],
    state: Option<Tensor<4>>,
    starts: Option<&[usize]>,
    lengths: Option<&[usize]>,
    want_state: bool,
) -> (Tensor<4>, Option<Tensor<4>>) {
    let [rows, heads, tokens, width] = qkv.dims();
    assert!(width.is_multiple_of(3), "q, k and v of every head");
    if let Some(state) = &state {
        let dim = width / 3;
        assert_eq!(state.dims(), [rows, heads, dim, dim], "a state for every head: [rows, heads, head_dim, head_dim]");
    }
    assert_eq!(slopes.len(), heads, "one slope per head");
    assert!(starts.is_none_or(|starts| starts.len() == rows), "one start per row");
    assert!(
        lengths.is_none_or(|lengths| lengths.len() == rows && lengths.iter().all(|&n| n <= tokens)),
        "one length per row, of at most {tokens} tokens"
    );
    let cpu = on_cpu(&qkv);
    let (qkv, state) =
        if cpu { (cast(qkv, DType::F32), state.map(|state| cast(state, DType::F32))) } else { (qkv, state) };
    if !(cpu || on_cube(&qkv, state.as_ref())) {
        return reference::lightning_attention(qkv, slopes, state, starts, lengths, want_state);
    }
    let plan = BlockPlan {
        slopes: slopes.to_vec(),
        starts: starts.map_or_else(|| vec![0; rows], <[usize]>::to_vec),
        lengths: lengths.map_or_else(|| vec![tokens; rows], <[usize]>::to_vec),
        has_state: state.is_some(),
        want_state,
    };
    let state = state.unwrap_or_else(|| qkv.clone());
    let (o, state) = Dispatch::lightning_block(qkv.into_dispatch(), state.into_dispatch(), plan);
    (Tensor::from_dispatch(o), want_state.then(|| Tensor::from_dispatch(state)))
}

/// Whether the CubeCL kernels take these tensors.
fn on_cube(qkv: &Tensor<4>, state: Option<&Tensor<4>>) -> bool {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    return cube::takes(qkv) && state.is_none_or(|state| state.dtype() == DType::F32);
    #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
    {
        let _ = (qkv, state);
        false
    }
}

/// The same for [`decode`].
fn decode_on_cube(qkv: &Tensor<2>, gate: &Tensor<2>, norm: &Tensor<1>, state: &Tensor<4>) -> bool {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    return gate.dtype() == qkv.dtype() && norm.dtype().is_float() && cube::takes_decode(qkv, state);
    #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
    {
        let _ = (qkv, gate, norm, state);
        false
    }
}

/// One token for each of many rows, from the projections to what the output projection reads: SiLU on `qkv`, one step of
/// the recurrence, RMS norm over all heads of a row, gate.
///
/// - `qkv`: `[rows, heads · 3 · dim]` before SiLU; each head's q, k, v lie side by side.
/// - `gate`: `[rows, heads · dim]` before the sigmoid.
/// - `state`: `[rows, heads, dim, dim]`, f32. On the CPU it is updated in place when this is its only owner.
/// - `slopes`: one positive decay slope per head; `norm`: `[heads · dim]`; `eps`: of the norm.
///
/// Returns `norm(o)·sigmoid(gate)` as `[rows, heads · dim]` in the dtype of `qkv`, and the state after the token.
///
/// # Panics
/// If the shapes do not agree.
pub fn decode(
    qkv: Tensor<2>,
    gate: Tensor<2>,
    state: Tensor<4>,
    slopes: &[f64],
    norm: Tensor<1>,
    eps: f64,
) -> (Tensor<2>, Tensor<4>) {
    let [rows, heads, dim, d_v] = state.dims();
    assert_eq!(slopes.len(), heads, "one slope per head");
    assert_eq!(dim, d_v, "a state is square");
    assert_eq!(qkv.dims(), [rows, heads * 3 * dim], "q, k and v of every head");
    assert_eq!(gate.dims(), [rows, heads * dim], "a gate for every output");
    assert_eq!(norm.dims(), [heads * dim], "a norm weight for every output");
    let f32s = [qkv.dtype(), gate.dtype(), state.dtype(), norm.dtype()].iter().all(|&dtype| dtype == DType::F32);
    // Nothing here is recorded for a backward pass.
    let fast = f32s && on_cpu(&qkv) || decode_on_cube(&qkv, &gate, &norm, &state);
    if !fast || [qkv.device(), gate.device(), state.device(), norm.device()].iter().any(|d| d.is_autodiff()) {
        return reference::decode(qkv, gate, state, slopes, norm, eps);
    }
    let (y, state) = Dispatch::lightning_decode(
        qkv.into_dispatch(),
        gate.into_dispatch(),
        state.into_dispatch(),
        norm.into_dispatch(),
        slopes.to_vec(),
        eps,
    );
    (Tensor::from_dispatch(y), Tensor::from_dispatch(state))
}
