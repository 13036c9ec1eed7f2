//! Products of many rows in f32 on the ordinary units: for f32 operands, for formats that are multiplied in f32, and for
//! devices without tensor cores.
//!
//! A cube of 16 × 16 units holds a tile of the result in registers, each unit every 16th row and column, and walks K in
//! steps of 16 through shared memory. Offline: `tile_product` with A, Y in {f32, bf16, f16}, B the weight's element (u32
//! words when quantized), S the scales' element; every `Shape`; cube of 256 units.

use cubecl::prelude::*;

use super::{
    product::{Rows, Storage, Store, stored_value},
    sigmoid,
};

/// Units of a cube.
pub const UNITS: usize = 256;
/// Units along one side of a tile.
const SIDE: usize = 16;
/// Depth of a step along K.
const DEPTH: usize = 16;

/// Results of one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Rows of a unit.
    pub rows: usize,
    /// Columns of a unit.
    pub columns: usize,
}

impl Shape {
    /// The shape for tiles of `rows` rows and `n` columns in all; `dual` keeps two sums for each result.
    pub fn choose(rows: usize, n: usize, dual: bool) -> Self {
        match (rows, n) {
            (..=16, _) => Self { rows: 1, columns: 4 },
            (65.., 65..) if !dual => Self { rows: 8, columns: 8 },
            _ => Self { rows: 4, columns: 4 },
        }
    }

    /// Rows of a tile.
    pub fn height(self) -> usize {
        SIDE * self.rows
    }

    /// Columns of a tile.
    pub fn width(self) -> usize {
        SIDE * self.columns
    }
}

/// Rows of a tile when an expert has about `mean` rows.
pub fn tile_rows(mean: usize) -> usize {
    if mean <= 16 { 16 } else { 64 }
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// How the weights are stored.
    pub storage: Storage,
    /// Which rows a tile reads and writes.
    pub rows: Rows,
    /// What becomes of the sums.
    pub store: Store,
    /// Whether K is the weight's last dimension.
    pub by_k: bool,
    /// Results of a unit.
    pub shape: Shape,
}

/// See [`super::product::Product`]. Grid: (column tiles, row tiles).
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn tile_product<A: Float, B: Numeric, S: Float, Y: Float>(
    x: &[A],
    w: &[B],
    w2: ComptimeOption<&[B]>,
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
    #[comptime] spec: Tile,
    #[define(A, B, S, Y)] _dtypes: [ElemType; 4],
) {
    let (rows, columns) = comptime!((spec.shape.rows, spec.shape.columns));
    let (height, width) = comptime!((spec.shape.height(), spec.shape.width()));
    let dual = comptime!(spec.store == Store::Gated || spec.store == Store::Both);
    // one element of padding: the units that store a column along K touch different banks
    let (x_pitch, w_pitch) = comptime!((height + 1, width + 1));

    let unit = UNIT_POS as usize;
    let (across, down) = (unit % SIDE, unit / SIDE);
    let tile = CUBE_POS_Y as usize;
    let first_column = CUBE_POS_X as usize * width;

    let mut expert = 0usize;
    let mut start = tile * height;
    let mut count = m - start;
    if count > height {
        count = height;
    }
    #[comptime]
    if let ComptimeOption::Some(plan) = &plan {
        expert = plan[tile * 3] as usize;
        start = plan[tile * 3 + 1] as usize;
        count = plan[tile * 3 + 2] as usize;
    }

    // the rows of x and y behind each row of the tile
    let mut from = Shared::<[u32]>::new_slice(height);
    let mut to = Shared::<[u32]>::new_slice(height);
    if unit < height {
        let mut read = start;
        let mut write = start;
        if unit < count {
            read = start + unit;
            write = start + unit;
            #[comptime]
            if let ComptimeOption::Some(plan) = &plan {
                if comptime!(spec.rows == Rows::Gather) {
                    read = plan[order + read] as usize / choices;
                }
                if comptime!(spec.rows == Rows::Scatter) {
                    write = plan[order + write] as usize;
                }
            }
        }
        from[unit] = read as u32;
        to[unit] = write as u32;
    }

    let mut x_tile = Shared::<[f32]>::new_slice(comptime!(DEPTH * x_pitch));
    let mut w_tile = Shared::<[f32]>::new_slice(comptime!(DEPTH * w_pitch));
    let mut w2_tile = Shared::<[f32]>::new_slice(comptime!(if dual { DEPTH * w_pitch } else { 1 }));
    let mut sums = Array::<f32>::new(comptime!(rows * columns));
    let mut sums2 = Array::<f32>::new(comptime!(if dual { rows * columns } else { 1 }));
    #[unroll]
    for i in 0..comptime!(rows * columns) {
        sums[i] = 0.0f32;
        if comptime!(dual) {
            sums2[i] = 0.0f32;
        }
    }
    sync_cube();

    for k0 in range_stepped(0usize, k, DEPTH) {
        #[unroll]
        for part in 0..comptime!(height * DEPTH / UNITS) {
            let at = part * UNITS + unit;
            let (row, depth) = (at / DEPTH, at % DEPTH);
            let mut value = 0.0f32;
            if row < count && k0 + depth < k {
                value = f32::cast_from(x[from[row] as usize * k + k0 + depth]);
            }
            x_tile[depth * x_pitch + row] = value;
        }
        // two unpackings at once are enough: with all of them registers spill
        #[unroll(spec.storage == Storage::Float || !dual)]
        for part in 0..comptime!(width * DEPTH / UNITS) {
            let at = part * UNITS + unit;
            let mut column = at / DEPTH;
            let mut depth = at % DEPTH;
            if comptime!(!spec.by_k) {
                column = at % width;
                depth = at / width;
            }
            let mut value = 0.0f32;
            let mut value2 = 0.0f32;
            if first_column + column < n && k0 + depth < k {
                let mut index = (expert * n + first_column + column) * k + k0 + depth;
                if comptime!(!spec.by_k) {
                    index = (expert * k + k0 + depth) * n + first_column + column;
                }
                value = stored_value::<B, S>(w, &scales, index, spec.storage);
                #[comptime]
                if let ComptimeOption::Some(w2) = w2 {
                    value2 = stored_value::<B, S>(w2, &scales2, index, spec.storage);
                }
            }
            w_tile[depth * w_pitch + column] = value;
            if comptime!(dual) {
                w2_tile[depth * w_pitch + column] = value2;
            }
        }
        sync_cube();
        for depth in 0..DEPTH {
            let mut xs = Array::<f32>::new(rows);
            #[unroll]
            for i in 0..rows {
                xs[i] = x_tile[depth * x_pitch + i * SIDE + down];
            }
            #[unroll]
            for j in 0..columns {
                let value = w_tile[depth * w_pitch + j * SIDE + across];
                #[unroll]
                for i in 0..rows {
                    sums[i * columns + j] = fma(xs[i], value, sums[i * columns + j]);
                }
                if comptime!(dual) {
                    let value2 = w2_tile[depth * w_pitch + j * SIDE + across];
                    #[unroll]
                    for i in 0..rows {
                        sums2[i * columns + j] = fma(xs[i], value2, sums2[i * columns + j]);
                    }
                }
            }
        }
        sync_cube();
    }

    #[unroll]
    for i in 0..rows {
        let row = i * SIDE + down;
        if row < count {
            let target = to[row] as usize;
            let mut share = 1.0f32;
            #[comptime]
            if let ComptimeOption::Some(shares) = &shares {
                share = shares[target];
            }
            #[unroll]
            for j in 0..columns {
                let column = first_column + j * SIDE + across;
                if column < n {
                    let sum = sums[i * columns + j] * share;
                    let at = target * n + column;
                    if comptime!(spec.store == Store::Plain) {
                        y[at] = Y::cast_from(sum);
                    } else if comptime!(spec.store == Store::Add) {
                        y[at] = Y::cast_from(f32::cast_from(y[at]) + sum);
                    } else if comptime!(spec.store == Store::Gated) {
                        y[at] = Y::cast_from(sum * sigmoid(sum) * sums2[i * columns + j]);
                    } else {
                        y[at] = Y::cast_from(sum);
                        y[m * n + at] = Y::cast_from(sums2[i * columns + j]);
                    }
                }
            }
        }
    }
}
