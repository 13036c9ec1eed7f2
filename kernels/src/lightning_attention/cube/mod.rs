//! CubeCL: one source for CUDA and wgpu.
//!
//! `qkv` may be f32, f16 or bf16, of any strides; `o`, sums and states are f32. Products of f32 stay f32; those of
//! f16 and bf16 go to the tensor cores where the device has them for bf16, whose range a state and a gradient need.
//! Forward: one launch. Backward: three of the same kernel. Decode: one or two.

pub mod decode;
pub mod scan;

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Slice, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use self::decode::{Decode, lightning_decode_heads, lightning_decode_norm, lightning_decode_row};
use self::scan::{Direction, Scan, lightning_scan};
use super::{BlockPlan, LightningAttentionBackend};
use crate::base::cube::{
    Limits, Reach, addresses, constant, empty, empty_tokens_first, has_fragments, limits, packed_rows, stored, swapped,
    words,
};

/// Whether the kernels take these: on a cube device, in f32, f16 or bf16, with tiles for this size of head that fit.
pub fn takes(qkv: &Tensor<4>) -> bool {
    let dim = qkv.dims()[3] / 3;
    stored(qkv.dtype())
        && limits(qkv).is_some_and(|(limits, reach)| {
            within(&reach, qkv.dims()) && Scan::fitting(&limits, dim, false, Direction::Forward).is_some()
        })
}

/// Whether the decode kernels take these; see [`super::decode`].
pub fn takes_decode(qkv: &Tensor<2>, state: &Tensor<4>) -> bool {
    let [_, heads, dim, _] = state.dims();
    stored(qkv.dtype())
        && state.dtype() == DType::F32
        && limits(qkv).is_some_and(|(limits, reach)| {
            decode_within(&reach, state.dims()) && Decode::fitting(&limits, heads, dim).is_some()
        })
}

/// Whether a device numbers the elements of `qkv [rows, heads, tokens, 3 · dim]`, of its gradient and of the states, and the
/// cubes of a pass, of which there are at most `dim` for each row and head.
fn within(reach: &Reach, [rows, heads, tokens, width]: [usize; 4]) -> bool {
    let dim = width / 3;
    reach.holds(&[rows, heads, tokens, width])
        && reach.holds(&[rows, heads, dim, dim])
        && reach.launches([dim, heads, rows])
}

/// The same of a decode step with `state [rows, heads, dim, dim]`; a row's projections count three for each of its outputs, a
/// state `dim`.
fn decode_within(reach: &Reach, [rows, heads, dim, _]: [usize; 4]) -> bool {
    reach.holds(&[rows, heads, dim, dim.max(3)]) && reach.launches([dim.max(rows), heads, rows])
}

fn slope_bits(slopes: &[f64]) -> Vec<u32> {
    slopes.iter().map(|&slope| (slope as f32).to_bits()).collect()
}

/// The plan as the kernel reads it.
fn plan_words(plan: &BlockPlan) -> Vec<u32> {
    let mut words = slope_bits(&plan.slopes);
    for (&start, &length) in plan.starts.iter().zip(&plan.lengths) {
        // Of a start only the place within a block matters, and every block's size divides this one.
        words.extend([(start % super::BLOCK) as u32, length as u32]);
    }
    words
}

/// One pass of [`lightning_scan`] over `abc`, from and to the states given.
fn pass(
    [a, b, c]: [&CubeTensor; 3],
    plan: &CubeTensor,
    before: Option<CubeTensor>,
    want_state: bool,
    direction: Direction,
    out: DType,
) -> (CubeTensor, Option<CubeTensor>) {
    let [rows, heads, tokens, dim] = a.meta.shape().dims::<4>();
    let client = a.client.clone();
    let limits = Limits::of(&client);
    let halves = [a, b, c].iter().any(|x| x.dtype != DType::F32);
    let scan = (halves && has_fragments(&client, DType::BF16))
        .then(|| Scan::fitting(&limits, dim, true, direction))
        .flatten()
        .or_else(|| Scan::fitting(&limits, dim, false, direction))
        .unwrap_or_else(|| panic!("no tiles for heads of {dim} in {limits:?}: see `takes`"));
    let scan = Scan { has_state: before.is_some(), want_state, ..scan };
    let [a, b, c] = [a, b, c].map(packed_rows);
    let [a, b, c] = [&a, &b, &c];

    let o = empty_tokens_first(a, [rows, heads, tokens, dim], out);
    let after = want_state.then(|| empty(a, &[rows, heads, dim, dim], DType::F32));
    // A kernel has a binding for each argument, read or not.
    let unread = |x: &Option<CubeTensor>| x.clone().unwrap_or_else(|| empty(a, &[1, 1, 1, 1], DType::F32));
    let (first, last) = (unread(&before), unread(&after));
    let operand = if scan.team.plane > 0 { DType::BF16 } else { DType::F32 };
    let types = [a.dtype, b.dtype, c.dtype, out, operand].map(dtype_to_storage_type);
    // SAFETY: every index is made from the shapes of these tensors: rows, heads and columns by the count of cubes, tokens
    // by lengths that the public function holds to at most `tokens`.
    unsafe {
        lightning_scan::launch_unchecked(
            &client,
            CubeCount::Static((dim / scan.columns) as u32, heads as u32, rows as u32),
            CubeDim::new_1d(scan.team.units as u32),
            addresses(&[a, b, c, &first, &o, &last]),
            a.clone().into_tensor_arg(),
            b.clone().into_tensor_arg(),
            c.clone().into_tensor_arg(),
            plan.clone().into_tensor_arg(),
            first.into_tensor_arg(),
            o.clone().into_tensor_arg(),
            last.into_tensor_arg(),
            scan,
            types,
        );
    }
    (o, after)
}

fn zeros(like: &CubeTensor, shape: &[usize]) -> CubeTensor {
    burn_cubecl::ops::numeric::zeros_client(
        like.client.clone(),
        like.device.clone(),
        burn::tensor::Shape::from(shape.to_vec()),
        DType::F32,
    )
}

type T = FloatTensor<CubeBackend>;

/// q, k and v out of `[rows, heads, tokens, 3 · dim]`.
fn parts(qkv: T) -> [T; 3] {
    let dim = qkv.meta.shape()[3] / 3;
    [0, dim, 2 * dim].map(|from| {
        let all = Slice::full();
        CubeBackend::float_slice(qkv.clone(), &[all, all, all, Slice::from(from..from + dim)])
    })
}

impl LightningAttentionBackend for CubeBackend {
    fn lightning_block(qkv: T, state: T, plan: BlockPlan) -> (T, T) {
        let [rows, heads, tokens, width] = qkv.meta.shape().dims::<4>();
        let dim = width / 3;
        let before = plan.has_state.then_some(state);
        if rows * heads * tokens * dim == 0 {
            let o = empty(&qkv, &[rows, heads, tokens, dim], DType::F32);
            let state = before.unwrap_or_else(|| zeros(&qkv, &[rows, heads, dim, dim]));
            return (o, state);
        }
        let words = words(&qkv, &plan_words(&plan));
        let [q, k, v] = parts(qkv);
        let (o, state) = pass([&q, &k, &v], &words, before, plan.want_state, Direction::Forward, DType::F32);
        let state = state.unwrap_or_else(|| o.clone());
        (o, state)
    }

    fn lightning_block_backward(qkv: T, state: T, d_o: T, d_state: T, plan: BlockPlan) -> (T, T) {
        let [rows, heads, tokens, width] = qkv.meta.shape().dims::<4>();
        let dim = width / 3;
        if rows * heads * tokens * dim == 0 {
            let d_state = if plan.want_state { d_state } else { zeros(&qkv, &[rows, heads, dim, dim]) };
            return (qkv, d_state);
        }
        let words = words(&qkv, &plan_words(&plan));
        let [q, k, v] = parts(qkv);
        let before = plan.has_state.then(|| swapped(state, 2, 3));
        let d_state = plan.want_state.then_some(d_state);
        let turned = d_state.clone().map(|d_state| swapped(d_state, 2, 3));
        let (d_q, _) = pass([&d_o, &v, &k], &words, before, false, Direction::Forward, q.dtype);
        let (d_k, _) = pass([&v, &d_o, &q], &words, turned, false, Direction::Backward, k.dtype);
        let (d_v, d_first) = pass([&k, &q, &d_o], &words, d_state, plan.has_state, Direction::Backward, v.dtype);
        let d_first = d_first.unwrap_or_else(|| d_v.clone());
        // Joined as they lie in memory, tokens first.
        let d_qkv = Self::float_cat([d_q, d_k, d_v].map(|x| swapped(x, 1, 2)).into(), 3);
        (swapped(d_qkv, 1, 2), d_first)
    }

    fn lightning_decode(qkv: T, gate: T, state: T, norm: T, slopes: Vec<f64>, eps: f64) -> (T, T) {
        let [rows, heads, dim, _] = state.meta.shape().dims::<4>();
        let y = empty(&qkv, &[rows, heads * dim], qkv.dtype);
        if rows * heads * dim == 0 {
            return (y, state);
        }
        let client = qkv.client.clone();
        let limits = Limits::of(&client);
        let slopes = constant(&qkv, &slope_bits(&slopes));
        let (qkv, gate, norm) = (into_contiguous(qkv), into_contiguous(gate), into_contiguous(norm));
        let state = into_contiguous(state);
        // The only owner's state is written over.
        let after = if state.can_mut() { None } else { Some(empty(&qkv, &[rows, heads, dim, dim], DType::F32)) };
        let (f, w) = (dtype_to_storage_type(qkv.dtype), dtype_to_storage_type(norm.dtype));
        let address = addresses(&[&qkv, &state]);
        if let Some(p) = Decode::in_one(&limits, heads, dim) {
            let target = match &after {
                Some(after) => after.clone().into_tensor_arg(),
                None => state.as_tensor_alias(4),
            };
            // SAFETY: cubes are rows, and every index is below the sizes that `p` holds.
            unsafe {
                lightning_decode_row::launch_unchecked(
                    &client,
                    CubeCount::Static(rows as u32, 1, 1),
                    CubeDim::new_1d(p.units as u32),
                    address,
                    qkv.into_tensor_arg(),
                    gate.into_tensor_arg(),
                    slopes.into_tensor_arg(),
                    norm.into_tensor_arg(),
                    state.clone().into_tensor_arg(),
                    y.clone().into_tensor_arg(),
                    target,
                    eps as f32,
                    p,
                    [f, w],
                );
            }
        } else {
            let p = Decode::fitting(&limits, heads, dim)
                .unwrap_or_else(|| panic!("no tiles for heads of {dim} in {limits:?}: see `takes_decode`"));
            let o = empty(&qkv, &[rows, heads * dim], DType::F32);
            let target = match &after {
                Some(after) => after.clone().into_tensor_arg(),
                None => state.as_tensor_alias(2),
            };
            // SAFETY: cubes are (columns, heads, rows), then rows, and every index is below the sizes that `p` holds.
            unsafe {
                lightning_decode_heads::launch_unchecked(
                    &client,
                    CubeCount::Static((dim / p.columns) as u32, heads as u32, rows as u32),
                    CubeDim::new_1d(p.units as u32),
                    address,
                    qkv.into_tensor_arg(),
                    slopes.into_tensor_arg(),
                    state.clone().into_tensor_arg(),
                    o.clone().into_tensor_arg(),
                    target,
                    p,
                    f,
                );
                lightning_decode_norm::launch_unchecked(
                    &client,
                    CubeCount::Static(rows as u32, 1, 1),
                    CubeDim::new_1d(p.units as u32),
                    address,
                    o.into_tensor_arg(),
                    gate.into_tensor_arg(),
                    norm.into_tensor_arg(),
                    y.clone().into_tensor_arg(),
                    eps as f32,
                    p,
                    [f, w],
                );
            }
        }
        (y, after.unwrap_or(state))
    }
}

#[cfg(test)]
mod tests {
    use super::{Reach, decode_within, within};

    #[test]
    fn sizes_that_a_device_cannot_number_are_refused() {
        let narrow = Reach { elements: 1 << 31, cubes: [65_535; 3] };
        let wide = Reach { elements: usize::MAX, cubes: [i32::MAX as usize, 65_535, 65_535] };
        // M1: 64 heads of 128. 87 381 tokens are the most below 2^31 values of q, k and v.
        assert!(within(&narrow, [1, 64, 87_381, 384]) && !within(&narrow, [1, 64, 87_382, 384]));
        assert!(within(&wide, [1, 64, 1 << 20, 384]));
        // States alone: 2048 rows of 64 heads.
        assert!(within(&narrow, [2048, 64, 1, 384]) && !within(&narrow, [2049, 64, 1, 384]));
        assert!(decode_within(&narrow, [2048, 64, 128, 128]) && !decode_within(&narrow, [2049, 64, 128, 128]));
        assert!(decode_within(&wide, [2049, 64, 128, 128]));
        // Rows and heads are axes of a launch, the step's rows the first of them too.
        assert!(decode_within(&narrow, [65_535, 1, 1, 1]) && !decode_within(&wide, [65_536, 1, 1, 1]));
        assert!(!decode_within(&narrow, [1, 65_536, 1, 1]) && !within(&wide, [1, 65_536, 1, 24]));
    }
}
