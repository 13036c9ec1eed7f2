//! Queries against keys and values, forward.
//!
//! The heads of a group are more queries of one key head: query `n` of a cube is head `n % group` at token `n / group`, so
//! keys and values are read once for all heads that share them. Tiles of keys are joined by the online softmax, in f32.
//!
//! One kernel for three uses: a whole text at once (training; prefill without a past), a chunk against a cache (launches
//! of [`Attend::blocks`] cache blocks that carry maximum, sum and values from one to the next), and a few queries against a
//! long cache, whose pieces go to different cubes ([`Split::Pieces`]) and are joined by [`softmax_join`].
//!
//! Instantiation: `SoftmaxAttend` with `p` by [`Attend::fitting`], types F (queries), K (keys, values), O (operands):
//! `[f32, f32, f32]`, or `[T, T, T]` for T = f16, bf16 with fragments; `SoftmaxJoin` with head size and units.

// `#[cube]` writes a module and a struct for each kernel, without documentation.
#![allow(missing_docs)]

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::base::cube::{FRAGMENT, Limits, Product, Team, finite, here, nought, pitch, product};

/// The maximum before any key: finite, as it is a literal, and below every score that leaves a trace.
const LOWEST: f32 = -3.0e38;

/// Which keys a cube takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// All that its queries see, for one tile of queries: `CUBE_POS_X` counts these tiles.
    Queries,
    /// The piece of a block that `CUBE_POS_X` counts, so many keys long, for all queries (one tile).
    Pieces(usize),
}

/// What is left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Finish {
    /// `o`, and no statistics.
    Output,
    /// `o`, and the logarithm of each query's sum of exponentials.
    OutputAndLogSum,
    /// The sum over values not yet divided, and (maximum, sum of exponentials).
    Partial,
}

/// What is known of an attention when it is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Attend {
    /// Size of a head.
    pub dim: usize,
    /// Query heads per key head.
    pub group: usize,
    /// Queries per tile, the heads of a group counted apart.
    pub queries: usize,
    /// Keys per tile.
    pub keys: usize,
    /// Blocks of keys and values in this launch.
    pub blocks: usize,
    /// Which keys a cube takes.
    pub split: Split,
    /// Whether an earlier launch left its sums.
    pub resume: bool,
    /// What is left behind.
    pub finish: Finish,
    /// Units, and who multiplies.
    pub team: Team,
}

impl Attend {
    /// The largest tiles that the device holds for `total` queries (heads of a group counted apart).
    pub fn fitting(limits: &Limits, dim: usize, group: usize, total: usize, fragments: bool) -> Option<Self> {
        let least = if fragments { FRAGMENT } else { 4 };
        let most = total.next_power_of_two().clamp(least, 64);
        // Cubes of these sizes: others (256) make ptxas spill for the sake of a few more in flight.
        let units = if most < 64 { dim.next_power_of_two().max(128) } else { 512 };
        let team = limits.team(units, fragments);
        if dim == 0 || !dim.is_multiple_of(if fragments { FRAGMENT } else { 8 }) || dim > team.units {
            return None;
        }
        let sizes = [64, 32, 16, 8, 4].into_iter().filter(move |size| *size >= least);
        sizes
            .clone()
            .filter(|queries| *queries <= most)
            .flat_map(|queries| sizes.clone().map(move |keys| (queries, keys)))
            .map(|(queries, keys)| Self {
                dim,
                group,
                queries,
                keys,
                blocks: 1,
                split: Split::Queries,
                resume: false,
                finish: Finish::Output,
                team,
            })
            .find(|attend| 2 * attend.keys >= attend.queries.min(16) && attend.shared_bytes() <= limits.shared)
    }

    /// Bytes of shared memory.
    pub fn shared_bytes(&self) -> usize {
        let (fragments, operand) = (self.team.plane > 0, if self.team.plane > 0 { 2 } else { 4 });
        let tile = |rows: usize, cols: usize| rows * pitch(cols, fragments);
        let weights = if fragments { tile(self.queries, self.keys) } else { 1 };
        let operands = tile(self.queries, self.dim) + tile(self.keys, self.dim) + weights;
        let sums = tile(self.queries, self.keys) + tile(self.queries, self.dim);
        operand * operands + 4 * (sums + 4 * self.team.units + 2 * self.queries + 1)
    }
}

/// The tile of queries (or gradients towards their outputs) from `first` on; 0 behind the last.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn load_queries<F: Float, O: Float>(
    x: &Tensor<F>,
    tile: &mut Shared<[O]>,
    unit: usize,
    row: usize,
    kv_head: usize,
    first: usize,
    #[comptime] queries: usize,
    #[comptime] group: usize,
    #[comptime] dim: usize,
    #[comptime] team: Team,
) {
    let wide = comptime![pitch(dim, team.plane > 0)];
    let total = x.shape(2) * group;
    let start = row * x.stride(0) + kv_head * group * x.stride(1);
    for cell in range_stepped(unit, comptime![queries * dim], team.units) {
        let i = cell / dim;
        let e = cell % dim;
        let n = first + i;
        let mut value = 0.0f32;
        if n < total {
            value = f32::cast_from(x[start + n % group * x.stride(1) + n / group * x.stride(2) + e]);
        }
        tile[i * wide + e] = O::cast_from(value);
    }
}

/// The tile of keys from `first` on, `count` of them; 0 behind.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn load_keys<K: Float, O: Float>(
    x: &Tensor<K>,
    tile: &mut Shared<[O]>,
    unit: usize,
    row: usize,
    kv_head: usize,
    first: usize,
    count: usize,
    #[comptime] keys: usize,
    #[comptime] dim: usize,
    #[comptime] team: Team,
) {
    let start = row * x.stride(0) + kv_head * x.stride(1) + first * x.stride(2);
    load_run::<K, O>(x, tile, unit, start, x.stride(2), count, keys, dim, team);
}

/// The tile of `count` keys, the first at element `start` and each `step` behind the one before; 0 behind.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_run<K: Float, O: Float>(
    x: &Tensor<K>,
    tile: &mut Shared<[O]>,
    unit: usize,
    start: usize,
    step: usize,
    count: usize,
    #[comptime] keys: usize,
    #[comptime] dim: usize,
    #[comptime] team: Team,
) {
    let wide = comptime![pitch(dim, team.plane > 0)];
    for cell in range_stepped(unit, comptime![keys * dim], team.units) {
        let j = cell / dim;
        let e = cell % dim;
        let mut value = 0.0f32;
        if j < count {
            value = f32::cast_from(x[start + j * step + e]);
        }
        tile[j * wide + e] = O::cast_from(value);
    }
}

/// How many of a tile's `count` keys, the first at position `from`, are seen by a query that sees those below `end`.
#[cube]
fn seen_of_tile(end: usize, from: usize, count: usize) -> usize {
    let mut visible = 0usize;
    if end > from {
        visible = end - from;
    }
    if visible > count {
        visible = count;
    }
    visible
}

/// `CUBE_POS = (tile of queries or piece of keys, key head, row)`.
///
/// - `q`: `[rows, heads, tokens, dim]`; `keys`, `values`: `[rows, kv_heads, tokens of the block, dim]`.
/// - `out`: `[slots, rows, heads, tokens, dim]`; of all, any strides with 1 in the last place; one slot, or one for each piece from `slot` on.
/// - `stats`: `[slots, rows, heads, tokens, 2]` for [`Finish::Partial`] and `resume`, `[rows, heads, tokens]` for
///   [`Finish::OutputAndLogSum`], contiguous.
/// - `past`: position of the first query; `from`: of the first key of the launch.
///
/// A NaN or infinity among the values makes NaN in its own column, for queries at or behind its position alone.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn softmax_attend<F: Float, K: Float, O: Float>(
    q: &Tensor<F>,
    keys: Sequence<OwnedTensor<K>>,
    values: Sequence<OwnedTensor<K>>,
    out: &mut Tensor<f32>,
    stats: &mut Tensor<f32>,
    past: u32,
    from: u32,
    slot: u32,
    #[comptime] p: Attend,
    #[define(F, K, O)] _types: [ElemType; 3],
) {
    let unit = UNIT_POS as usize;
    let kv_head = CUBE_POS_Y as usize;
    let row = CUBE_POS_Z as usize;
    let units = comptime![p.team.units];
    let fragments = comptime![p.team.plane > 0];
    let total = q.shape(2) * p.group;
    let past = past as usize;

    let pieces = comptime![match p.split {
        Split::Queries => None,
        Split::Pieces(keys) => Some(keys),
    }];
    let piece = comptime![pieces.unwrap_or(1)];
    let split = comptime![pieces.is_some()];

    // The keys of this cube: in block `block`, from `within` to `end`, and then the blocks behind up to `last_block`.
    let mut first = CUBE_POS_X as usize * p.queries;
    let mut slot = slot as usize;
    let mut block = 0usize;
    let mut within = 0usize;
    let mut end = 0usize;
    let mut last_block = comptime![p.blocks].runtime();
    if comptime![split] {
        first = 0usize;
        slot += CUBE_POS_X as usize;
        // Every block counts as many pieces as the longest.
        let mut longest = 0usize;
        #[unroll]
        for b in 0..p.blocks {
            if keys[b].shape(2) > longest {
                longest = keys[b].shape(2);
            }
        }
        let count = (longest + piece - 1) / piece;
        block = CUBE_POS_X as usize / count;
        within = CUBE_POS_X as usize % count * piece;
        end = within + piece;
        last_block = block + 1;
    }
    // Behind the last query of the tile no key is seen.
    let mut last = first + p.queries;
    if last > total {
        last = total;
    }
    let seen = past + (last - 1) / p.group + 1;

    let wide = comptime![pitch(p.dim, fragments)];
    let square = comptime![pitch(p.keys, fragments)];
    let mut q_tile = Shared::<[O]>::new_slice(comptime![p.queries * wide]);
    // Keys, and values after them.
    let mut tile = Shared::<[O]>::new_slice(comptime![p.keys * wide]);
    let mut scores = Shared::<[f32]>::new_slice(comptime![p.queries * square]);
    let mut weights = Shared::<[O]>::new_slice(comptime![if fragments { p.queries * square } else { 1 }]);
    let mut sums = Shared::<[f32]>::new_slice(comptime![p.queries * wide]);
    let mut maxima = Shared::<[f32]>::new_slice(p.queries);
    let mut totals = Shared::<[f32]>::new_slice(p.queries);
    let mut parts = Shared::<[f32]>::new_slice(units);
    let mut part_sums = Shared::<[f32]>::new_slice(units);
    let mut broken_at = Shared::<[u32]>::new_slice(units);
    let mut broken_by = Shared::<[f32]>::new_slice(units);
    let nought = nought();

    // Units side by side share a query in the softmax, and keep to a column where they touch values.
    // Not more than 8: the loop over them is unrolled.
    let helpers = comptime![(units / p.queries).min(8)];
    let lanes = comptime![units / p.dim];
    let scale = 1.0f32 / (p.dim as f32).sqrt();

    load_queries::<F, O>(q, &mut q_tile, unit, row, kv_head, first, p.queries, p.group, p.dim, p.team);
    for cell in range_stepped(unit, comptime![p.queries * p.dim], units) {
        let i = cell / p.dim;
        let e = cell % p.dim;
        let mut value = 0.0f32;
        if comptime![p.resume] {
            let n = first + i;
            if n < total {
                value = out[slot * out.stride(0)
                    + row * out.stride(1)
                    + (kv_head * p.group + n % p.group) * out.stride(2)
                    + n / p.group * out.stride(3)
                    + e];
            }
        }
        sums[i * wide + e] = value;
    }
    for i in range_stepped(unit, p.queries, units) {
        let mut max = LOWEST.runtime();
        let mut sum = 0.0f32;
        if comptime![p.resume] {
            let n = first + i;
            if n < total {
                let at = slot * stats.stride(0)
                    + row * stats.stride(1)
                    + (kv_head * p.group + n % p.group) * stats.stride(2)
                    + n / p.group * stats.stride(3);
                max = stats[at];
                sum = stats[at + 1];
            }
        }
        maxima[i] = max;
        totals[i] = sum;
    }

    // The first value of this unit's column that is not finite, and the NaN that it leaves.
    broken_at[unit] = u32::MAX.runtime();
    broken_by[unit] = 0.0f32;
    sync_cube();
    // Position of the next tile's first key.
    let mut position = from as usize;
    if comptime![split] {
        position += within;
        #[unroll]
        for b in 0..p.blocks {
            if b < block {
                position += keys[b].shape(2);
            }
        }
    }
    while block < last_block {
        // Shape and strides of the block, once for all loops below: fewer numbers to keep for each block.
        let mut length = 0usize;
        let mut key_start = 0usize;
        let mut key_step = 0usize;
        let mut value_start = 0usize;
        let mut value_step = 0usize;
        // As [`here`] does it for the units; without fragments that made other loops spill.
        let mut row = row;
        let mut kv_head = kv_head;
        if comptime![fragments] {
            row += nought[0] as usize;
            kv_head += nought[0] as usize;
        }
        #[unroll]
        for b in 0..p.blocks {
            if b == block {
                // As the values tell it: a split launch need not keep what the keys told it above.
                length = values[b].shape(2);
                key_step = keys[b].stride(2);
                key_start = row * keys[b].stride(0) + kv_head * keys[b].stride(1) + within * key_step;
                value_step = values[b].stride(2);
                value_start = row * values[b].stride(0) + kv_head * values[b].stride(1) + within * value_step;
            }
        }
        if comptime![split] {
            if end < length {
                length = end;
            }
        }
        if within < length && position < seen {
            let mut count = length - within;
            if count > p.keys {
                count = comptime![p.keys].runtime();
            }
            #[unroll]
            for b in 0..p.blocks {
                if b == block {
                    load_run::<K, O>(
                        &keys[b],
                        &mut tile,
                        here(&nought),
                        key_start,
                        key_step,
                        count,
                        p.keys,
                        p.dim,
                        p.team,
                    );
                }
            }
            sync_cube();

            product::<O, O>(
                &q_tile,
                &tile,
                &mut scores,
                1.0f32,
                here(&nought),
                comptime![Product {
                    m: p.queries,
                    n: p.keys,
                    k: p.dim,
                    lda: wide,
                    ldb: wide,
                    ldc: square,
                    a_transposed: false,
                    b_transposed: true,
                    add: false,
                }],
                p.team,
            );
            sync_cube();

            let unit = here(&nought);
            let query = unit / helpers;
            let helper = unit % helpers;
            let visible = seen_of_tile(past + (first + query) / p.group + 1, position, count);
            let mut max = LOWEST.runtime();
            if query < p.queries {
                // How many steps a loop has takes registers, unless it is a constant; but a short one that is a constant is unrolled.
                let end = if comptime![fragments || helpers <= 4] { p.keys.runtime() } else { visible };
                for j in range_stepped(helper, end, helpers) {
                    let score = scores[query * square + j] * scale;
                    if j < visible && score > max {
                        max = score;
                    }
                }
            }
            parts[unit] = max;
            let lane = unit / p.dim;
            let column = unit % p.dim;
            if lane < lanes {
                #[unroll]
                for b in 0..p.blocks {
                    if b == block {
                        let x = &values[b];
                        let start = value_start + column;
                        for j in range_stepped(lane, p.keys, lanes) {
                            let mut value = 0.0f32;
                            if j < count {
                                value = f32::cast_from(x[start + j * value_step]);
                                if !finite(value) {
                                    if broken_at[unit] == u32::MAX {
                                        broken_at[unit] = (position + j) as u32;
                                        broken_by[unit] = value - value;
                                    }
                                    value = 0.0f32;
                                }
                            }
                            tile[j * wide + column] = O::cast_from(value);
                        }
                    }
                }
            }
            sync_cube();

            let unit = here(&nought);
            let query = unit / helpers;
            let helper = unit % helpers;
            let visible = seen_of_tile(past + (first + query) / p.group + 1, position, count);
            let mut max = 0.0f32;
            let mut shrink = 1.0f32;
            if query < p.queries {
                let before = maxima[query];
                max = before;
                for h in 0..helpers {
                    let part = parts[query * helpers + h];
                    if part > max {
                        max = part;
                    }
                }
                shrink = (before - max).exp();
                let mut sum = 0.0f32;
                for j in range_stepped(helper, p.keys, helpers) {
                    let at = query * square + j;
                    let mut weight = 0.0f32;
                    if j < visible {
                        weight = (scores[at] * scale - max).exp();
                    }
                    sum += weight;
                    if comptime![fragments] {
                        weights[at] = O::cast_from(weight);
                    } else {
                        scores[at] = weight;
                    }
                }
                part_sums[unit] = sum;
                for e in range_stepped(helper, p.dim, helpers) {
                    sums[query * wide + e] = sums[query * wide + e] * shrink;
                }
            }
            sync_cube();

            let unit = here(&nought);
            let query = unit / helpers;
            if query < p.queries && unit % helpers == 0 {
                let mut sum = totals[query] * shrink;
                for h in 0..helpers {
                    sum += part_sums[query * helpers + h];
                }
                totals[query] = sum;
                maxima[query] = max;
            }
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
            if comptime![fragments] {
                product::<O, O>(&weights, &tile, &mut sums, 1.0f32, unit, add, p.team);
            } else {
                product::<f32, O>(&scores, &tile, &mut sums, 1.0f32, unit, add, p.team);
            }
            sync_cube();
        }
        within += p.keys;
        position += p.keys;
        if within >= length {
            if comptime![!split] {
                position -= within - length;
                within = 0usize;
            }
            block += 1;
        }
    }

    // Sizes as the outputs tell them: those of the queries need not be kept till here.
    let unit = here(&nought);
    let total = out.shape(3) * p.group;
    for cell in range_stepped(unit, comptime![p.queries * p.dim], units) {
        let i = cell / p.dim;
        let e = cell % p.dim;
        let n = first + i;
        if n < total {
            let mut value = sums[i * wide + e];
            for l in 0..lanes {
                if broken_at[l * p.dim + e] as usize <= past + n / p.group {
                    value += broken_by[l * p.dim + e];
                }
            }
            if comptime![p.finish != Finish::Partial] {
                value /= totals[i];
            }
            let at = slot * out.stride(0)
                + row * out.stride(1)
                + (kv_head * p.group + n % p.group) * out.stride(2)
                + n / p.group * out.stride(3)
                + e;
            out[at] = value;
        }
    }
    if comptime![p.finish != Finish::Output] {
        for i in range_stepped(unit, p.queries, units) {
            let n = first + i;
            if n < total {
                let head = kv_head * p.group + n % p.group;
                if comptime![p.finish == Finish::Partial] {
                    let at = slot * stats.stride(0)
                        + row * stats.stride(1)
                        + head * stats.stride(2)
                        + n / p.group * stats.stride(3);
                    stats[at] = maxima[i];
                    stats[at + 1] = totals[i];
                } else {
                    let at = row * stats.stride(0) + head * stats.stride(1) + n / p.group;
                    stats[at] = maxima[i] + totals[i].ln();
                }
            }
        }
    }
}

/// Joins what the pieces of a split attention left: `CUBE_POS = (token, head, row)`.
///
/// `parts [slots, rows, heads, tokens, dim]` and `stats [slots, rows, heads, tokens, 2]`, contiguous; `out [rows, heads,
/// tokens, dim]`, any strides with 1 in the last place.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn softmax_join(
    parts: &Tensor<f32>,
    stats: &Tensor<f32>,
    out: &mut Tensor<f32>,
    #[comptime] dim: usize,
    #[comptime] units: usize,
) {
    let slots = parts.shape(0);
    let query = (CUBE_POS_Z as usize * parts.shape(2) + CUBE_POS_Y as usize) * parts.shape(3) + CUBE_POS_X as usize;
    let queries = parts.shape(1) * parts.shape(2) * parts.shape(3);
    let mut max = LOWEST.runtime();
    for slot in 0..slots {
        let part = stats[(slot * queries + query) * 2];
        if part > max {
            max = part;
        }
    }
    let to =
        CUBE_POS_Z as usize * out.stride(0) + CUBE_POS_Y as usize * out.stride(1) + CUBE_POS_X as usize * out.stride(2);
    for e in range_stepped(UNIT_POS as usize, dim, units) {
        let mut total = 0.0f32;
        let mut sum = 0.0f32;
        for slot in 0..slots {
            let at = slot * queries + query;
            let weight = (stats[at * 2] - max).exp();
            total += weight * stats[at * 2 + 1];
            sum += weight * parts[at * dim + e];
        }
        let at = to + e;
        out[at] = sum / total;
    }
}

#[cfg(test)]
mod tests {
    use super::Attend;
    use crate::base::cube::Limits;

    #[test]
    fn heads_of_m1_fit_every_device() {
        for (shared, queries, keys) in [(16 << 10, 8, 4), (32 << 10, 16, 16), (48 << 10, 32, 16), (227 << 10, 64, 64)] {
            let limits = Limits { shared, units: 256, plane: None };
            let attend = Attend::fitting(&limits, 128, 8, 4096, false).expect("128 fits");
            assert_eq!((attend.queries, attend.keys), (queries, keys), "in {shared} bytes");
        }
        let hopper = Limits { shared: 227 << 10, units: 1024, plane: Some(32) };
        let decode = Attend::fitting(&hopper, 128, 8, 8, true).expect("128 fits");
        assert_eq!((decode.queries, decode.keys), (16, 64));
    }
}
