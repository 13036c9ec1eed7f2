//! Gradients of the attention of a text to itself, tile by tile: scores are made again from q, k and the saved logarithm
//! of their sums, and never leave a tile. No atomics: queries' cubes sum `dq`, keys' cubes `dk` and `dv`.
//!
//! ```text
//! P = exp(q·kᵀ/√d - L)    dv = Pᵀ·do    dS = P·(do·vᵀ - do·o)/√d    dq = dS·k    dk = dSᵀ·q
//! ```
//!
//! Instantiation: `SoftmaxBackwardQueries` and `SoftmaxBackwardKeys` with `p` by [`Backward::fitting`], types F (q, k, v
//! and gradients), O (operands): `[f32, f32]`, or `[T, bf16]` for T = f16, bf16 with fragments; `SoftmaxBackwardRows` with
//! head size.

// `#[cube]` writes a module and a struct for each kernel, without documentation.
#![allow(missing_docs)]

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::attend::{load_keys, load_queries};
use crate::base::cube::{FRAGMENT, Limits, Product, Team, here, nought, pitch, product};

/// What is known of a backward pass when it is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Backward {
    /// Size of a head.
    pub dim: usize,
    /// Query heads per key head.
    pub group: usize,
    /// Queries per tile, the heads of a group counted apart.
    pub queries: usize,
    /// Keys per tile.
    pub keys: usize,
    /// Units, and who multiplies.
    pub team: Team,
}

impl Backward {
    /// The largest tiles that the device holds.
    pub fn fitting(limits: &Limits, dim: usize, group: usize, fragments: bool) -> Option<Self> {
        let least = if fragments { FRAGMENT } else { 4 };
        if dim == 0 || !dim.is_multiple_of(if fragments { FRAGMENT } else { 8 }) {
            return None;
        }
        let team = limits.team(256, fragments);
        [(64, 64), (32, 64), (32, 32), (16, 32), (16, 16), (8, 8), (4, 4)]
            .into_iter()
            .filter(|(queries, _)| *queries >= least)
            .map(|(queries, keys)| Self { dim, group, queries, keys, team })
            .find(|backward| backward.shared_bytes() <= limits.shared)
    }

    /// Bytes of shared memory of the keys' kernel, the larger one.
    pub fn shared_bytes(&self) -> usize {
        let (fragments, operand) = (self.team.plane > 0, if self.team.plane > 0 { 2 } else { 4 });
        let tile = |rows: usize, cols: usize| rows * pitch(cols, fragments);
        let copies = if fragments { 2 * tile(self.queries, self.keys) } else { 2 };
        let operands = 2 * tile(self.queries, self.dim) + 2 * tile(self.keys, self.dim) + copies;
        let sums = 2 * tile(self.queries, self.keys) + 2 * tile(self.keys, self.dim).max(tile(self.queries, self.dim));
        operand * operands + 4 * (sums + 1)
    }
}

/// `[rows, heads, tokens, 2]`: of each query the logarithm of its sum (`lse`, contiguous) and `do·o`; one query per unit.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn softmax_backward_rows(
    o: &Tensor<f32>,
    d_o: &Tensor<f32>,
    lse: &Tensor<f32>,
    stats: &mut Tensor<f32>,
    #[comptime] dim: usize,
) {
    let tokens = o.shape(2);
    let heads = o.shape(1);
    if ABSOLUTE_POS >= o.shape(0) * heads * tokens {
        terminate!();
    }
    let token = ABSOLUTE_POS % tokens;
    let head = ABSOLUTE_POS / tokens % heads;
    let row = ABSOLUTE_POS / tokens / heads;
    let at = row * o.stride(0) + head * o.stride(1) + token * o.stride(2);
    let d_at = row * d_o.stride(0) + head * d_o.stride(1) + token * d_o.stride(2);
    let mut sum = 0.0f32;
    for e in 0..dim {
        sum = fma(o[at + e], d_o[d_at + e], sum);
    }
    stats[ABSOLUTE_POS * 2] = lse[ABSOLUTE_POS];
    stats[ABSOLUTE_POS * 2 + 1] = sum;
}

/// From scores `s` and `do·vᵀ` of a tile: P and dS, in place without fragments, else rounded into `p_tile` and `ds_tile`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn weights<O: Float>(
    s: &mut Shared<[f32]>,
    ds: &mut Shared<[f32]>,
    p_tile: &mut Shared<[O]>,
    ds_tile: &mut Shared<[O]>,
    stats: &Tensor<f32>,
    unit: usize,
    head_row: usize,
    tokens: usize,
    first_query: usize,
    first_key: usize,
    #[comptime] p: Backward,
) {
    let fragments = comptime![p.team.plane > 0];
    let square = comptime![pitch(p.keys, fragments)];
    let scale = 1.0f32 / (p.dim as f32).sqrt();
    for cell in range_stepped(unit, comptime![p.queries * p.keys], p.team.units) {
        let i = cell / p.keys;
        let j = cell % p.keys;
        let at = i * square + j;
        let n = first_query + i;
        let token = n / p.group;
        let key = first_key + j;
        let mut weight = 0.0f32;
        let mut d_score = 0.0f32;
        if token < tokens && key <= token {
            let stat = ((head_row + n % p.group) * tokens + token) * 2;
            weight = (s[at] * scale - stats[stat]).exp();
            d_score = weight * (ds[at] - stats[stat + 1]) * scale;
        }
        if comptime![fragments] {
            p_tile[at] = O::cast_from(weight);
            ds_tile[at] = O::cast_from(d_score);
        } else {
            s[at] = weight;
            ds[at] = d_score;
        }
    }
}

/// `CUBE_POS = (tile of queries, key head, row)`. All tensors but `stats` of any strides with 1 in the last place.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn softmax_backward_queries<F: Float, O: Float>(
    q: &Tensor<F>,
    k: &Tensor<F>,
    v: &Tensor<F>,
    d_o: &Tensor<f32>,
    stats: &Tensor<f32>,
    d_q: &mut Tensor<F>,
    #[comptime] p: Backward,
    #[define(F, O)] _types: [ElemType; 2],
) {
    let unit = UNIT_POS as usize;
    let kv_head = CUBE_POS_Y as usize;
    let row = CUBE_POS_Z as usize;
    let fragments = comptime![p.team.plane > 0];
    let tokens = q.shape(2);
    let head_row = row * q.shape(1) + kv_head * p.group;
    let first = CUBE_POS_X as usize * p.queries;
    let wide = comptime![pitch(p.dim, fragments)];
    let square = comptime![pitch(p.keys, fragments)];

    let mut q_tile = Shared::<[O]>::new_slice(comptime![p.queries * wide]);
    let mut do_tile = Shared::<[O]>::new_slice(comptime![p.queries * wide]);
    // Values, and keys after them.
    let mut tile = Shared::<[O]>::new_slice(comptime![p.keys * wide]);
    let mut s = Shared::<[f32]>::new_slice(comptime![p.queries * square]);
    let mut ds = Shared::<[f32]>::new_slice(comptime![p.queries * square]);
    let mut p_tile = Shared::<[O]>::new_slice(comptime![if fragments { p.queries * square } else { 1 }]);
    let mut ds_tile = Shared::<[O]>::new_slice(comptime![if fragments { p.queries * square } else { 1 }]);
    let mut sums = Shared::<[f32]>::new_slice(comptime![p.queries * wide]);
    let nought = nought();

    load_queries::<F, O>(q, &mut q_tile, unit, row, kv_head, first, p.queries, p.group, p.dim, p.team);
    load_queries::<f32, O>(d_o, &mut do_tile, unit, row, kv_head, first, p.queries, p.group, p.dim, p.team);
    for cell in range_stepped(unit, comptime![p.queries * wide], p.team.units) {
        sums[cell] = 0.0f32;
    }
    let scores = comptime![Product {
        m: p.queries,
        n: p.keys,
        k: p.dim,
        lda: wide,
        ldb: wide,
        ldc: square,
        a_transposed: false,
        b_transposed: true,
        add: false,
    }];
    let add = comptime![Product {
        m: p.queries,
        n: p.dim,
        k: p.keys,
        lda: square,
        ldb: wide,
        ldc: wide,
        a_transposed: false,
        b_transposed: false,
        add: true,
    }];
    let mut seen = (first + p.queries - 1) / p.group + 1;
    if seen > tokens {
        seen = tokens;
    }
    sync_cube();
    for key in range_stepped(0usize, seen, p.keys) {
        let mut count = tokens - key;
        if count > p.keys {
            count = comptime![p.keys].runtime();
        }
        load_keys::<F, O>(v, &mut tile, here(&nought), row, kv_head, key, count, p.keys, p.dim, p.team);
        sync_cube();
        product::<O, O>(&do_tile, &tile, &mut ds, 1.0f32, here(&nought), scores, p.team);
        sync_cube();
        load_keys::<F, O>(k, &mut tile, here(&nought), row, kv_head, key, count, p.keys, p.dim, p.team);
        sync_cube();
        product::<O, O>(&q_tile, &tile, &mut s, 1.0f32, here(&nought), scores, p.team);
        sync_cube();
        weights::<O>(&mut s, &mut ds, &mut p_tile, &mut ds_tile, stats, here(&nought), head_row, tokens, first, key, p);
        sync_cube();
        if comptime![fragments] {
            product::<O, O>(&ds_tile, &tile, &mut sums, 1.0f32, here(&nought), add, p.team);
        } else {
            product::<f32, O>(&ds, &tile, &mut sums, 1.0f32, here(&nought), add, p.team);
        }
        sync_cube();
    }
    for cell in range_stepped(here(&nought), comptime![p.queries * p.dim], p.team.units) {
        let i = cell / p.dim;
        let e = cell % p.dim;
        let n = first + i;
        if n / p.group < tokens {
            let at = row * d_q.stride(0)
                + (kv_head * p.group + n % p.group) * d_q.stride(1)
                + n / p.group * d_q.stride(2)
                + e;
            d_q[at] = F::cast_from(sums[i * wide + e]);
        }
    }
}

/// `CUBE_POS = (tile of keys, key head, row)`. All tensors but `stats` of any strides with 1 in the last place.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn softmax_backward_keys<F: Float, O: Float>(
    q: &Tensor<F>,
    k: &Tensor<F>,
    v: &Tensor<F>,
    d_o: &Tensor<f32>,
    stats: &Tensor<f32>,
    d_k: &mut Tensor<F>,
    d_v: &mut Tensor<F>,
    #[comptime] p: Backward,
    #[define(F, O)] _types: [ElemType; 2],
) {
    let unit = UNIT_POS as usize;
    let kv_head = CUBE_POS_Y as usize;
    let row = CUBE_POS_Z as usize;
    let fragments = comptime![p.team.plane > 0];
    let tokens = q.shape(2);
    let head_row = row * q.shape(1) + kv_head * p.group;
    let key = CUBE_POS_X as usize * p.keys;
    let wide = comptime![pitch(p.dim, fragments)];
    let square = comptime![pitch(p.keys, fragments)];

    let mut k_tile = Shared::<[O]>::new_slice(comptime![p.keys * wide]);
    let mut v_tile = Shared::<[O]>::new_slice(comptime![p.keys * wide]);
    let mut q_tile = Shared::<[O]>::new_slice(comptime![p.queries * wide]);
    let mut do_tile = Shared::<[O]>::new_slice(comptime![p.queries * wide]);
    let mut s = Shared::<[f32]>::new_slice(comptime![p.queries * square]);
    let mut ds = Shared::<[f32]>::new_slice(comptime![p.queries * square]);
    let mut p_tile = Shared::<[O]>::new_slice(comptime![if fragments { p.queries * square } else { 1 }]);
    let mut ds_tile = Shared::<[O]>::new_slice(comptime![if fragments { p.queries * square } else { 1 }]);
    let mut k_sums = Shared::<[f32]>::new_slice(comptime![p.keys * wide]);
    let mut v_sums = Shared::<[f32]>::new_slice(comptime![p.keys * wide]);
    let nought = nought();

    let mut count = tokens - key;
    if count > p.keys {
        count = comptime![p.keys].runtime();
    }
    load_keys::<F, O>(k, &mut k_tile, unit, row, kv_head, key, count, p.keys, p.dim, p.team);
    load_keys::<F, O>(v, &mut v_tile, unit, row, kv_head, key, count, p.keys, p.dim, p.team);
    for cell in range_stepped(unit, comptime![p.keys * wide], p.team.units) {
        k_sums[cell] = 0.0f32;
        v_sums[cell] = 0.0f32;
    }
    let scores = comptime![Product {
        m: p.queries,
        n: p.keys,
        k: p.dim,
        lda: wide,
        ldb: wide,
        ldc: square,
        a_transposed: false,
        b_transposed: true,
        add: false,
    }];
    let add = comptime![Product {
        m: p.keys,
        n: p.dim,
        k: p.queries,
        lda: square,
        ldb: wide,
        ldc: wide,
        a_transposed: true,
        b_transposed: false,
        add: true,
    }];
    // Queries before the first key of the tile don't see it.
    let start = key * p.group / p.queries * p.queries;
    sync_cube();
    for first in range_stepped(start, tokens * p.group, p.queries) {
        load_queries::<F, O>(q, &mut q_tile, here(&nought), row, kv_head, first, p.queries, p.group, p.dim, p.team);
        load_queries::<f32, O>(
            d_o,
            &mut do_tile,
            here(&nought),
            row,
            kv_head,
            first,
            p.queries,
            p.group,
            p.dim,
            p.team,
        );
        sync_cube();
        product::<O, O>(&q_tile, &k_tile, &mut s, 1.0f32, here(&nought), scores, p.team);
        product::<O, O>(&do_tile, &v_tile, &mut ds, 1.0f32, here(&nought), scores, p.team);
        sync_cube();
        weights::<O>(&mut s, &mut ds, &mut p_tile, &mut ds_tile, stats, here(&nought), head_row, tokens, first, key, p);
        sync_cube();
        if comptime![fragments] {
            product::<O, O>(&p_tile, &do_tile, &mut v_sums, 1.0f32, here(&nought), add, p.team);
            product::<O, O>(&ds_tile, &q_tile, &mut k_sums, 1.0f32, here(&nought), add, p.team);
        } else {
            product::<f32, O>(&s, &do_tile, &mut v_sums, 1.0f32, here(&nought), add, p.team);
            product::<f32, O>(&ds, &q_tile, &mut k_sums, 1.0f32, here(&nought), add, p.team);
        }
        sync_cube();
    }
    for cell in range_stepped(here(&nought), comptime![p.keys * p.dim], p.team.units) {
        let j = cell / p.dim;
        let e = cell % p.dim;
        if j < count {
            let at = row * d_k.stride(0) + kv_head * d_k.stride(1) + (key + j) * d_k.stride(2) + e;
            d_k[at] = F::cast_from(k_sums[j * wide + e]);
            let at = row * d_v.stride(0) + kv_head * d_v.stride(1) + (key + j) * d_v.stride(2) + e;
            d_v[at] = F::cast_from(v_sums[j * wide + e]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Backward;
    use crate::base::cube::Limits;

    #[test]
    fn heads_of_m1_fit_every_device() {
        for (shared, queries, keys) in [(16 << 10, 4, 4), (32 << 10, 8, 8), (48 << 10, 8, 8), (227 << 10, 64, 64)] {
            let limits = Limits { shared, units: 256, plane: None };
            let backward = Backward::fitting(&limits, 128, 8, false).expect("128 fits");
            assert_eq!((backward.queries, backward.keys), (queries, keys), "in {shared} bytes");
        }
        let hopper = Limits { shared: 227 << 10, units: 1024, plane: Some(32) };
        assert!(Backward::fitting(&hopper, 128, 8, true).is_some_and(|p| p.queries >= 32 && p.keys == 64));
    }
}
