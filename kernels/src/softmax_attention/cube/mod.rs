//! CubeCL: one source for CUDA and wgpu.
//!
//! q, keys and values may be f32, f16 or bf16, of any strides; `o` is f32. Scores, maxima and sums are f32; products of f32
//! stay f32, those of f16 and bf16 go to the tensor cores where the device has them for that type (the backward pass: for
//! bf16, whose range a gradient needs). Burn's own kernels are not used: their tiles are f16 whatever comes in.
//!
//! Launches: one for a text by itself; one for each [`pairs`] blocks of a cache, and one more to join pieces when a few
//! queries meet a long cache; three backward.

pub mod attend;
pub mod backward;

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::zspace::metadata::Metadata;

use self::attend::{Attend, Finish, Split, softmax_attend, softmax_join};
use self::backward::{Backward, softmax_backward_keys, softmax_backward_queries, softmax_backward_rows};
use super::{KeyValueBlocks, KeyValues, SoftmaxAttentionBackend};
use crate::base::cube::{
    Limits, Reach, addresses, empty, empty_tokens_first, has_fragments, limits, packed_rows, stored,
};
use crate::base::gpu::spread;

/// Keys per piece when a cache is split.
const PIECE: usize = 256;

/// Queries of the smallest tile for a text with the logarithms of its sums, where it fits.
pub const TEXT: usize = 16;

/// Cubes that keep a device busy: fewer, and a long cache is split.
const BUSY: usize = 128;

/// Whether the kernels take these: on a cube device, in f32, f16 or bf16, with tiles for this size of head that fit.
pub fn takes(q: &Tensor<4>, blocks: &[KeyValues]) -> bool {
    let [rows, heads, tokens, dim] = q.dims();
    let Some(first) = blocks.first() else { return false };
    let (dtype, kv_heads) = (first.keys.dtype(), first.keys.dims()[1]);
    let alike = |x: &Tensor<4>| x.dtype() == dtype && x.dims()[1] == kv_heads;
    stored(q.dtype())
        && stored(dtype)
        && kv_heads > 0
        && blocks.iter().all(|block| alike(&block.keys) && alike(&block.values))
        && limits(q).is_some_and(|(limits, reach)| {
            let group = heads / kv_heads;
            let longest = blocks.iter().map(|block| block.keys.dims()[2]).max().unwrap_or(0);
            let forward = |fragments| Attend::fitting(&limits, dim, group, group * tokens, fragments);
            let backward = |fragments| Backward::fitting(&limits, dim, group, fragments);
            let fits = forward(false).is_some() && backward(false).is_some();
            // The smallest tiles that a launch may be cut into.
            let tiles = [false, true].into_iter().filter_map(|fragments| {
                let (f, b) = (forward(fragments)?.queries, backward(fragments)?);
                Some(if q.device().is_autodiff() { f.min(b.queries).min(b.keys) } else { f })
            });
            fits && within(&reach, [rows, heads, tokens, dim], [kv_heads, longest], tiles.min().unwrap_or(1))
        })
}

/// Whether a device numbers the elements of `q [rows, heads, tokens, dim]` and of keys `[rows, kv_heads, keys, dim]`, and the
/// cubes of a launch, each of `tile` queries of a key head (or fewer, if those are all).
fn within(reach: &Reach, q: [usize; 4], [kv_heads, keys]: [usize; 2], tile: usize) -> bool {
    let [rows, heads, tokens, dim] = q;
    let tiles = (heads / kv_heads.max(1) * tokens.max(1)).div_ceil(tile.max(1));
    reach.holds(&q) && reach.holds(&[rows, kv_heads, keys, dim]) && reach.launches([tiles, heads, rows])
}

/// Blocks of keys and values that one launch binds if there are several, beside the queries, the outputs and the statistics;
/// fewer without fragments, where more would spill registers.
pub fn pairs(bindings: usize, fragments: bool) -> usize {
    (bindings.saturating_sub(3) / 2).clamp(1, if fragments { 4 } else { 2 })
}

fn attend_for(client: &Client, q: &CubeTensor, keys: &CubeTensor, total: usize) -> (Attend, DType) {
    let limits = Limits::of(client);
    let [_, heads, _, dim] = q.meta.shape().dims::<4>();
    let group = heads / keys.meta.shape()[1];
    let fragments = q.dtype == keys.dtype && has_fragments(client, q.dtype);
    fragments
        .then(|| Attend::fitting(&limits, dim, group, total, true))
        .flatten()
        .map(|p| (p, q.dtype))
        .or_else(|| Attend::fitting(&limits, dim, group, total, false).map(|p| (p, DType::F32)))
        .unwrap_or_else(|| panic!("no tiles for heads of {dim} in {limits:?}: see `takes`"))
}

/// What a launch is given beside its plan.
struct Call<'a> {
    q: &'a CubeTensor,
    /// `[slots, rows, heads, tokens, dim]`.
    out: &'a CubeTensor,
    stats: &'a CubeTensor,
    past: usize,
    operand: DType,
}

/// One launch over some blocks, the first of which begins at position `from`.
fn launch(call: &Call, keys: &[CubeTensor], values: &[CubeTensor], p: Attend, cubes: usize, from: usize, slot: usize) {
    let Call { q, out, stats, past, operand } = call;
    let [rows, heads, _, _] = q.meta.shape().dims::<4>();
    // One kernel for any number of blocks: empty ones fill it up.
    let list = |blocks: &[CubeTensor]| {
        let mut list = SequenceArg::new();
        blocks.iter().for_each(|x| list.push(x.clone().into_tensor_arg()));
        (blocks.len()..p.blocks).for_each(|_| list.push(without_tokens(&blocks[0]).into_tensor_arg()));
        list
    };
    let all: Vec<&CubeTensor> = keys.iter().chain(values).chain([*q, *out, *stats]).collect();
    let types = [q.dtype, keys[0].dtype, *operand].map(dtype_to_storage_type);
    // SAFETY: every index is made from the shapes of these tensors; keys and values of a block are equally many, and cubes
    // are (tiles of queries or pieces of keys, key heads, rows).
    unsafe {
        softmax_attend::launch_unchecked(
            &q.client,
            CubeCount::Static(cubes as u32, (heads / p.group) as u32, rows as u32),
            CubeDim::new_1d(p.team.units as u32),
            addresses(&all),
            (*q).clone().into_tensor_arg(),
            list(keys),
            list(values),
            (*out).clone().into_tensor_arg(),
            (*stats).clone().into_tensor_arg(),
            *past as u32,
            from as u32,
            slot as u32,
            p,
            types,
        );
    }
}

/// No tokens of a block, in the same buffer.
fn without_tokens(x: &CubeTensor) -> CubeTensor {
    let mut none = x.clone();
    let [rows, heads, _, dim] = x.meta.shape().dims::<4>();
    none.meta = Box::new(Metadata::new([rows, heads, 0, dim], x.meta.strides().clone()));
    none
}

/// `[rows, heads, tokens, dim]` as the one slot of `[1, rows, heads, tokens, dim]`.
fn one_slot(x: &CubeTensor) -> CubeTensor {
    let mut slot = x.clone();
    let [rows, heads, tokens, dim] = x.meta.shape().dims::<4>();
    let strides = x.meta.strides();
    let strides = [0, strides[0], strides[1], strides[2], strides[3]];
    slot.meta = Box::new(Metadata::new([1, rows, heads, tokens, dim], strides));
    slot
}

/// Output and, if wanted, the logarithms of the sums.
fn forward(
    q: &CubeTensor,
    keys: &[CubeTensor],
    values: &[CubeTensor],
    past: usize,
    log_sum: bool,
) -> (CubeTensor, CubeTensor) {
    let [rows, heads, tokens, dim] = q.meta.shape().dims::<4>();
    let q = &packed_rows(q);
    let (keys, values): (Vec<_>, Vec<_>) =
        keys.iter().zip(values).map(|(k, v)| (packed_rows(k), packed_rows(v))).unzip();
    let o = empty_tokens_first(q, [rows, heads, tokens, dim], DType::F32);
    let lengths: Vec<usize> = keys.iter().map(|block| block.meta.shape()[2]).collect();
    let whole = keys.len() == 1;
    let width = if whole && log_sum { vec![rows, heads, tokens] } else { vec![1, rows, heads, tokens, 2] };
    if rows * heads * tokens * dim == 0 {
        return (o, empty(q, &width, DType::F32));
    }
    let kv_heads = keys[0].meta.shape()[1];
    let queries = heads / kv_heads * tokens;
    // A text of fewer takes their tile too: one kernel less.
    let (p, operand) = attend_for(&q.client, q, &keys[0], if log_sum { queries.max(TEXT) } else { queries });
    let tiles = (p.group * tokens).div_ceil(p.queries);
    let pairs = pairs(q.client.properties().hardware.max_bindings as usize, p.team.plane > 0);
    let longest = lengths.iter().copied().max().unwrap_or(0);
    // The kernel of one block is for whole texts; few queries take that of several, whose registers suffice.
    let p = Attend { blocks: if whole && tiles > 1 { 1 } else { pairs }, ..p };

    let all: usize = lengths.iter().sum();
    let slots = lengths.len() * longest.div_ceil(PIECE);
    let reach = Reach::of(&q.client);
    let held = reach.holds(&[slots, rows, heads, tokens, dim]) && reach.launches([slots, heads, rows]);
    let split = !log_sum && tiles == 1 && kv_heads * rows < BUSY && all > PIECE && held;
    if split {
        let parts = empty(q, &[slots, rows, heads, tokens, dim], DType::F32);
        let stats = empty(q, &[slots, rows, heads, tokens, 2], DType::F32);
        let call = Call { q, out: &parts, stats: &stats, past, operand };
        let p = Attend { split: Split::Pieces(PIECE), finish: Finish::Partial, ..p };
        let (mut from, mut slot) = (0, 0);
        for (keys, values) in keys.chunks(pairs).zip(values.chunks(pairs)) {
            // A launch counts pieces by its own longest block: slots in order, without gaps.
            let longest = keys.iter().map(|block| block.meta.shape()[2]).max().unwrap_or(0);
            let cubes = keys.len() * longest.div_ceil(PIECE);
            launch(&call, keys, values, p, cubes, from, slot);
            from += keys.iter().map(|block| block.meta.shape()[2]).sum::<usize>();
            slot += cubes;
        }
        join(parts, stats, &o, slot, p.team.units.min(dim.next_power_of_two()));
        return (o, empty(q, &[1], DType::F32));
    }

    let stats = empty(q, &width, DType::F32);
    let out = one_slot(&o);
    let call = Call { q, out: &out, stats: &stats, past, operand };
    let launches = keys.len().div_ceil(pairs);
    let mut from = 0;
    for (n, (keys, values)) in keys.chunks(pairs).zip(values.chunks(pairs)).enumerate() {
        let finish = match n + 1 == launches {
            false => Finish::Partial,
            true if log_sum => Finish::OutputAndLogSum,
            true => Finish::Output,
        };
        launch(&call, keys, values, Attend { resume: n > 0, finish, ..p }, tiles, from, 0);
        from += keys.iter().map(|block| block.meta.shape()[2]).sum::<usize>();
    }
    (o, stats)
}

/// Joins the first `slots` of `parts` into `o`.
fn join(mut parts: CubeTensor, stats: CubeTensor, o: &CubeTensor, slots: usize, units: usize) {
    let [rows, heads, tokens, dim] = o.meta.shape().dims::<4>();
    let strides = parts.meta.strides().clone();
    parts.meta = Box::new(Metadata::new([slots, rows, heads, tokens, dim], strides));
    // SAFETY: cubes are (tokens, heads, rows) of `o`, and slots are those of `parts` and `stats`.
    unsafe {
        softmax_join::launch_unchecked(
            &o.client,
            CubeCount::Static(tokens as u32, heads as u32, rows as u32),
            CubeDim::new_1d(units as u32),
            addresses(&[&parts, &stats, o]),
            parts.into_tensor_arg(),
            stats.into_tensor_arg(),
            o.clone().into_tensor_arg(),
            dim,
            units,
        );
    }
}

type T = FloatTensor<CubeBackend>;

impl SoftmaxAttentionBackend for CubeBackend {
    fn softmax_attention(q: T, blocks: KeyValueBlocks<Self>, past: usize) -> T {
        // Blocks without a key, and those behind the last query, have nothing to say.
        let end = past + q.meta.shape()[2];
        let mut from = 0;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (k, v) in blocks.keys.into_iter().zip(blocks.values) {
            let length = k.meta.shape()[2];
            if length > 0 && from < end {
                keys.push(k);
                values.push(v);
            }
            from += length;
        }
        forward(&q, &keys, &values, past, false).0
    }

    fn softmax_attention_train(q: T, k: T, v: T) -> (T, T) {
        forward(&q, &[k], &[v], 0, true)
    }

    fn softmax_attention_backward(q: T, k: T, v: T, o: T, lse: T, d_o: T) -> (T, T, T) {
        let [rows, heads, tokens, dim] = q.meta.shape().dims::<4>();
        let kv_heads = k.meta.shape()[1];
        let gradient = |x: &CubeTensor| empty_tokens_first(x, x.meta.shape().dims::<4>(), x.dtype);
        let (d_q, d_k, d_v) = (gradient(&q), gradient(&k), gradient(&v));
        if rows * heads * tokens * dim == 0 {
            return (d_q, d_k, d_v);
        }
        let [q, k, v, o, d_o] = [q, k, v, o, d_o].map(|x| packed_rows(&x));
        let client = q.client.clone();
        let limits = Limits::of(&client);
        let group = heads / kv_heads;
        let fragments = q.dtype != DType::F32 && has_fragments(&client, DType::BF16);
        let p = fragments
            .then(|| Backward::fitting(&limits, dim, group, true))
            .flatten()
            .or_else(|| Backward::fitting(&limits, dim, group, false))
            .unwrap_or_else(|| panic!("no tiles for heads of {dim} in {limits:?}: see `takes`"));
        let operand = if p.team.plane > 0 { DType::BF16 } else { DType::F32 };
        let types = [q.dtype, operand].map(dtype_to_storage_type);
        let stats = empty(&q, &[rows, heads, tokens, 2], DType::F32);
        let queries = rows * heads * tokens;
        let cubes = |tiles: usize| CubeCount::Static(tiles as u32, kv_heads as u32, rows as u32);
        let units = CubeDim::new_1d(p.team.units as u32);
        let address = addresses(&[&q, &k, &v, &o, &d_o, &stats]);
        // SAFETY: every index is made from the shapes of these tensors, which agree; cubes are (tiles, key heads, rows).
        unsafe {
            softmax_backward_rows::launch_unchecked(
                &client,
                spread(queries.div_ceil(p.team.units)),
                units,
                address,
                o.into_tensor_arg(),
                d_o.clone().into_tensor_arg(),
                into_contiguous(lse).into_tensor_arg(),
                stats.clone().into_tensor_arg(),
                dim,
            );
            softmax_backward_queries::launch_unchecked(
                &client,
                cubes((group * tokens).div_ceil(p.queries)),
                units,
                address,
                q.clone().into_tensor_arg(),
                k.clone().into_tensor_arg(),
                v.clone().into_tensor_arg(),
                d_o.clone().into_tensor_arg(),
                stats.clone().into_tensor_arg(),
                d_q.clone().into_tensor_arg(),
                p,
                types,
            );
            softmax_backward_keys::launch_unchecked(
                &client,
                cubes(tokens.div_ceil(p.keys)),
                units,
                address,
                q.into_tensor_arg(),
                k.into_tensor_arg(),
                v.into_tensor_arg(),
                d_o.into_tensor_arg(),
                stats.into_tensor_arg(),
                d_k.clone().into_tensor_arg(),
                d_v.clone().into_tensor_arg(),
                p,
                types,
            );
        }
        (d_q, d_k, d_v)
    }
}

#[cfg(test)]
mod tests {
    use super::{Reach, within};

    #[test]
    fn sizes_that_a_device_cannot_number_are_refused() {
        let narrow = Reach { elements: 1 << 31, cubes: [65_535; 3] };
        let wide = Reach { elements: usize::MAX, cubes: [i32::MAX as usize, 65_535, 65_535] };
        // M1: 64 heads of 128 over 8 of keys. Tokens of q are the most below 2^31 values.
        let q = |tokens: usize| [1, 64, tokens, 128];
        assert!(within(&narrow, q(1 << 18), [8, 1 << 18], 64) && !within(&narrow, q((1 << 18) + 1), [8, 1 << 18], 64));
        assert!(within(&wide, q(1 << 20), [8, 1 << 20], 64));
        // One query of a long cache: keys alone.
        assert!(within(&narrow, q(1), [8, 1 << 21], 64) && !within(&narrow, q(1), [8, (1 << 21) + 1], 64));
        // Tiles of queries are the first axis of a launch: 8 · tokens / 4 of them.
        let few = |tokens: usize| within(&narrow, [1, 8, tokens, 8], [1, tokens], 4);
        assert!(few(32_767) && !few(32_768));
        // Heads and rows are the others.
        assert!(!within(&wide, [65_536, 1, 1, 8], [1, 1], 4) && !within(&wide, [1, 65_536, 1, 8], [65_536, 1], 4));
    }

    #[test]
    fn launches_bind_what_the_device_allows() {
        assert_eq!((super::pairs(7, true), super::pairs(7, false)), (2, 2));
        assert_eq!((super::pairs(64, true), super::pairs(64, false)), (4, 2));
        assert_eq!(super::pairs(4, true), 1);
    }
}
