//! Products of few rows with a stored matrix: each weight is read once, at its stored size.
//!
//! A cube of 256 units serves 8 columns of the result (rows of the weight), 32 units to a column; a unit walks K in
//! vectors 32 apart, so that a column's units read one run of memory together. Partial sums meet in shared memory: two
//! barriers, no plane operations. Offline: `few_rows` with A in {f32, bf16, f16}, B the weight's element (u32 words when
//! quantized), S the scales' element (f32 when there are none), Y the result's; specification and vector sizes by
//! [`Gemv::new`]; `max_rows` in {1, 2, 4, 8}; cube of 256 units.

use cubecl::prelude::*;

use super::{
    product::{Rows, Storage, Store, word_value},
    sigmoid,
};

/// Units that share a column.
pub const LANES: usize = 32;
/// Columns of a cube.
pub const COLUMNS: usize = 8;

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gemv {
    /// How the weights are stored.
    pub storage: Storage,
    /// Which rows a cube reads and writes.
    pub rows: Rows,
    /// What becomes of the sums.
    pub store: Store,
    /// Accumulators of a unit: a tile has at most as many rows.
    pub max_rows: usize,
    /// Vectors of x that one read of the weights serves: 1 for floats, the words of a vector when quantized.
    pub words: usize,
    /// Whether the numbers of a tile's rows stand in shared memory rather than in registers.
    pub rows_shared: bool,
}

impl Gemv {
    /// The kernel for tiles of at most `max_rows` rows, and the elements of a vector of x and of one of the weights, for a K
    /// that they divide; `halves` says of x and of the weights whether they are f16 or bf16.
    ///
    /// The sums of eight rows need registers, or they would spill (kernels/offline/TABLE.md): floats then come by half as much
    /// at a time; where quantized weights meet halves, the rows' numbers stand elsewhere.
    pub fn new(storage: Storage, rows: Rows, store: Store, max_rows: usize, halves: [bool; 2]) -> (Self, usize, usize) {
        let many = max_rows >= 8;
        let (x_vector, w_vector, words) = match storage {
            Storage::Float if halves[1] && !many => (8, 8, 1),
            Storage::Float => (4, 4, 1),
            _ => (storage.per_word(), 4, 4),
        };
        let rows_shared = many && halves[0] && storage != Storage::Float;
        (Self { storage, rows, store, max_rows, words, rows_shared }, x_vector, w_vector)
    }
}

/// `y[i] = x[i] · W[e]ᵀ` for tiles of at most `max_rows` rows; `y [.., n]`, `x [.., k]`, `W [experts, n, k]`.
///
/// Grid: (columns / 8, tiles). `plan` and `shares` as [`super::product::Plan`] lays them out.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn few_rows<A: Float, B: Numeric, S: Float, Y: Float, NA: Size, NB: Size>(
    x: &[Vector<A, NA>],
    w: &[Vector<B, NB>],
    w2: ComptimeOption<&[Vector<B, NB>]>,
    scales: ComptimeOption<&[S]>,
    scales2: ComptimeOption<&[S]>,
    plan: ComptimeOption<&[u32]>,
    shares: ComptimeOption<&[f32]>,
    y: &mut [Y],
    m: usize,
    n: usize,
    k: usize,
    order: usize,
    choices: usize,
    #[comptime] spec: Gemv,
    #[define(A, B, S, Y)] _dtypes: [ElemType; 4],
) {
    let max_rows = comptime!(spec.max_rows);
    let lane = UNIT_POS as usize % LANES;
    let slot = UNIT_POS as usize / LANES;
    let column = CUBE_POS_X as usize * COLUMNS + slot;
    let tile = CUBE_POS_Y as usize;

    let mut expert = 0usize;
    let mut start = tile * max_rows;
    let mut count = m - start;
    if count > max_rows {
        count = max_rows;
    }
    #[comptime]
    if let ComptimeOption::Some(plan) = &plan {
        expert = plan[tile * 3] as usize;
        start = plan[tile * 3 + 1] as usize;
        count = plan[tile * 3 + 2] as usize;
    }

    // the rows of x that this tile reads
    let kept = comptime!(!spec.rows_shared);
    let mut from = Array::<usize>::new(comptime!(if kept { max_rows } else { 1 }));
    let mut rows = Shared::<[u32]>::new_slice(comptime!(if kept { 1 } else { max_rows }));
    if comptime!(kept) {
        #[unroll]
        for r in 0..max_rows {
            from[r] = source(&plan, r, start, count, order, choices, spec) * (k / NA::value());
        }
    } else {
        if (UNIT_POS as usize) < max_rows {
            let row = source(&plan, UNIT_POS as usize, start, count, order, choices, spec);
            rows[UNIT_POS as usize] = row as u32;
        }
        sync_cube();
    }

    let dual = comptime!(spec.store == Store::Gated || spec.store == Store::Both);
    let mut sums = Array::<f32>::new(max_rows);
    let mut sums2 = Array::<f32>::new(max_rows);
    #[unroll]
    for r in 0..max_rows {
        sums[r] = 0.0f32;
        sums2[r] = 0.0f32;
    }

    // a tile without rows reads no weights; only a device's own plan has such, and it takes no gradient
    let mut wanted = column < n;
    if comptime!(spec.store != Store::Both) {
        wanted = wanted && count > 0;
    }
    if wanted {
        let words = comptime!(spec.words);
        let steps = k / (NA::value() * words);
        let line = (expert * n + column) * steps;
        for step in range_stepped(lane, steps, LANES) {
            let packed = w[line + step];
            let mut packed2 = packed;
            #[comptime]
            if let ComptimeOption::Some(w2) = &w2 {
                packed2 = w2[line + step];
            }
            #[unroll]
            for word in 0..words {
                let values = weights::<B, S, NA, NB>(packed, &scales, line + step, word, spec);
                let mut values2 = values;
                if comptime!(dual) {
                    values2 = weights::<B, S, NA, NB>(packed2, &scales2, line + step, word, spec);
                }
                #[unroll]
                for r in 0..max_rows {
                    let mut at = step * words + word;
                    if comptime!(kept) {
                        at += from[r];
                    } else {
                        at += rows[r] as usize * (k / NA::value());
                    }
                    let xs = Vector::<f32, NA>::cast_from(x[at]);
                    #[unroll]
                    for i in 0..NA::value() {
                        sums[r] = fma(xs.extract(i), values.extract(i), sums[r]);
                        if comptime!(dual) {
                            sums2[r] = fma(xs.extract(i), values2.extract(i), sums2[r]);
                        }
                    }
                }
            }
        }
    }

    // one padding column per line: the 32 partial sums of a result lie in different banks for every reader
    let pitch = comptime!(LANES + 1);
    let plane = comptime!(max_rows * COLUMNS * pitch);
    let mut partial = Shared::<[f32]>::new_slice(comptime!(if dual { 2 * plane } else { plane }));
    #[unroll]
    for r in 0..max_rows {
        partial[(r * COLUMNS + slot) * pitch + lane] = sums[r];
        if comptime!(dual) {
            partial[plane + (r * COLUMNS + slot) * pitch + lane] = sums2[r];
        }
    }
    sync_cube();

    let result = UNIT_POS as usize;
    let r = result / COLUMNS;
    let column = CUBE_POS_X as usize * COLUMNS + result % COLUMNS;
    if r < count && column < n {
        if r < max_rows {
            let mut sum = 0.0f32;
            let mut sum2 = 0.0f32;
            for i in 0..LANES {
                sum += partial[result * pitch + i];
                if comptime!(dual) {
                    sum2 += partial[plane + result * pitch + i];
                }
            }
            let mut row = start + r;
            #[comptime]
            if let ComptimeOption::Some(plan) = &plan {
                if comptime!(spec.rows == Rows::Scatter) {
                    row = plan[order + row] as usize;
                }
            }
            #[comptime]
            if let ComptimeOption::Some(shares) = &shares {
                sum *= shares[row];
            }
            if comptime!(spec.store == Store::Gated) {
                sum = sum * sigmoid(sum) * sum2;
            }
            y[row * n + column] = Y::cast_from(sum);
            if comptime!(spec.store == Store::Both) {
                y[(m + row) * n + column] = Y::cast_from(sum2);
            }
        }
    }
}

/// The row of x behind row `r` of a tile; one that is not there repeats the first: it is read from the nearest cache and
/// never written.
#[cube]
fn source(
    plan: &ComptimeOption<&[u32]>,
    r: usize,
    start: usize,
    count: usize,
    order: usize,
    choices: usize,
    #[comptime] spec: Gemv,
) -> usize {
    let mut row = start;
    if r < count {
        row = start + r;
    }
    #[comptime]
    if let ComptimeOption::Some(plan) = plan {
        if comptime!(spec.rows == Rows::Gather) {
            row = plan[order + row] as usize / choices;
        }
    }
    row
}

/// `NA` values along K, in f32: a vector of floats, or word `word` of a vector of words, scaled.
#[cube]
fn weights<B: Numeric, S: Float, NA: Size, NB: Size>(
    packed: Vector<B, NB>,
    scales: &ComptimeOption<&[S]>,
    at: usize,
    #[comptime] word: usize,
    #[comptime] spec: Gemv,
) -> Vector<f32, NA> {
    let storage = comptime!(spec.storage);
    let mut values = Vector::<f32, NA>::zeroed();
    if comptime!(storage == Storage::Float) {
        values = Vector::<f32, NA>::cast_from(packed);
    } else {
        #[comptime]
        if let ComptimeOption::Some(scales) = scales {
            // a vector of words never crosses a block
            let scale =
                f32::cast_from(scales[at * comptime!(spec.words * storage.per_word()) / comptime!(storage.block())]);
            let bits = u32::cast_from(packed.extract(word));
            #[unroll]
            for i in 0..NA::value() {
                values.insert(i, word_value(bits, i as u32, storage) * scale);
            }
        }
    }
    values
}
