//! Products whose sums run over rows, `aᵀ · b`: gradients of weights.
//!
//! As [`super::tile`], with both operands read along their columns; the rows of an expert come from the plan's table, so
//! an expert without rows gets zeros. Offline: `outer` with A, B, Y in {f32, bf16, f16}; cube of 256 units.

use cubecl::prelude::*;

/// Side of a tile of the result.
pub const TILE: usize = 64;
const SIDE: usize = 16;
const DEPTH: usize = 16;
const UNITS: usize = 256;
const EACH: usize = TILE / SIDE;

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Reduce {
    /// Whether a has a row for every token (else one for every sorted position).
    pub a_by_token: bool,
    /// Whether b has a row for every token.
    pub b_by_token: bool,
    /// Add to what is there.
    pub add: bool,
}

/// See [`super::product::Outer`]. Grid: (column tiles, row tiles, experts).
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn outer<A: Float, B: Float, Y: Float>(
    a: &[A],
    b: &[B],
    plan: ComptimeOption<&[u32]>,
    y: &mut [Y],
    rows: usize,
    m: usize,
    n: usize,
    table: usize,
    order: usize,
    choices: usize,
    #[comptime] spec: Reduce,
    #[define(A, B, Y)] _dtypes: [ElemType; 3],
) {
    let pitch = comptime!(TILE + 1);
    let unit = UNIT_POS as usize;
    let (across, down) = (unit % SIDE, unit / SIDE);
    let (i0, j0) = (CUBE_POS_Y as usize * TILE, CUBE_POS_X as usize * TILE);
    let expert = CUBE_POS_Z as usize;

    let mut start = 0usize;
    let mut count = rows;
    #[comptime]
    if let ComptimeOption::Some(plan) = &plan {
        start = plan[table + expert * 3 + 1] as usize;
        count = plan[table + expert * 3 + 2] as usize;
    }

    let mut a_tile = Shared::<[f32]>::new_slice(comptime!(DEPTH * pitch));
    let mut b_tile = Shared::<[f32]>::new_slice(comptime!(DEPTH * pitch));
    let mut sums = Array::<f32>::new(comptime!(EACH * EACH));
    #[unroll]
    for i in 0..comptime!(EACH * EACH) {
        sums[i] = 0.0f32;
    }

    for p0 in range_stepped(0usize, count, DEPTH) {
        #[unroll]
        for part in 0..comptime!(TILE * DEPTH / UNITS) {
            let at = part * UNITS + unit;
            let (depth, column) = (at / TILE, at % TILE);
            let mut a_value = 0.0f32;
            let mut b_value = 0.0f32;
            if p0 + depth < count {
                let mut a_row = start + p0 + depth;
                let mut b_row = a_row;
                #[comptime]
                if let ComptimeOption::Some(plan) = &plan {
                    let token = plan[order + a_row] as usize / choices;
                    if comptime!(spec.a_by_token) {
                        a_row = token;
                    }
                    if comptime!(spec.b_by_token) {
                        b_row = token;
                    }
                }
                if i0 + column < m {
                    a_value = f32::cast_from(a[a_row * m + i0 + column]);
                }
                if j0 + column < n {
                    b_value = f32::cast_from(b[b_row * n + j0 + column]);
                }
            }
            a_tile[depth * pitch + column] = a_value;
            b_tile[depth * pitch + column] = b_value;
        }
        sync_cube();
        for depth in 0..DEPTH {
            #[unroll]
            for i in 0..EACH {
                let value = a_tile[depth * pitch + i * SIDE + down];
                #[unroll]
                for j in 0..EACH {
                    let other = b_tile[depth * pitch + j * SIDE + across];
                    sums[i * EACH + j] = fma(value, other, sums[i * EACH + j]);
                }
            }
        }
        sync_cube();
    }

    #[unroll]
    for i in 0..EACH {
        #[unroll]
        for j in 0..EACH {
            let (row, column) = (i0 + i * SIDE + down, j0 + j * SIDE + across);
            if row < m && column < n {
                let at = (expert * m + row) * n + column;
                let mut sum = sums[i * EACH + j];
                if comptime!(spec.add) {
                    sum += f32::cast_from(y[at]);
                }
                y[at] = Y::cast_from(sum);
            }
        }
    }
}
