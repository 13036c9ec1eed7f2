//! The block form as one kernel, which is also its own backward.
//!
//! ```text
//! out_i = Σ_{j≤i} e^{-s(i-j)}·(a_i·b_j)·c_j + e^{-s·(i+1)}·a_i·M     i, j from 0, along `Direction`
//! ```
//! Forward it is the attention (a, b, c = q, k, v; M = S). As `o` is linear in each of q, k and v, so are the gradients:
//! `dq` is the same sum over (do, v, k; Sᵀ), `dk` over (v, do, q; dSᵀ) and `dv` over (k, q, do; dS), the last two from the
//! last token back to the first and with `e^{-s·i}` before M, as S is behind its token and dS before it. What the pass for
//! `dv` leaves of M is the gradient of the first state.
//!
//! A cube owns [`Scan::columns`] columns of M for one row and head and goes through the tokens by blocks; M stays in
//! shared memory in f32. Of a product only the operands are rounded (to `O`), never M nor a sum.
//!
//! Instantiation: `LightningScan` with `p` by [`Scan::fitting`], types A, B, C (inputs), Y (output), O (operands):
//! `f32×5`, or forward `[T, T, T, f32, bf16]` and backward `[f32, T, T, T, bf16]`, `[T, f32, T, T, bf16]`,
//! `[T, T, f32, T, bf16]` for T = f16, bf16.

// `#[cube]` writes a module and a struct for each kernel, without documentation.
#![allow(missing_docs)]

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::base::cube::{FRAGMENT, Limits, Product, Team, finite, here, nought, pitch, product};

/// The order in which tokens are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the first token on; M decays before a token reads it.
    Forward,
    /// From the last token back; M decays after a token has read it.
    Backward,
}

/// What is known of a [`lightning_scan`] when it is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scan {
    /// Size of a head: rows and columns of M.
    pub dim: usize,
    /// Tokens per block.
    pub block: usize,
    /// Columns of M per cube.
    pub columns: usize,
    /// The order of tokens.
    pub direction: Direction,
    /// Whether M is read before the first token (else it is zero).
    pub has_state: bool,
    /// Whether M is written after the last token.
    pub want_state: bool,
    /// Units, and who multiplies.
    pub team: Team,
}

impl Scan {
    /// The largest tiles that the device holds; `None` if there are none for this `dim`.
    pub fn fitting(limits: &Limits, dim: usize, fragments: bool, direction: Direction) -> Option<Self> {
        let sizes = [(64, 32), (64, 16), (32, 32), (32, 16), (16, 32), (16, 16), (16, 8), (8, 8), (4, 8)];
        let least = if fragments { FRAGMENT } else { 8 };
        if dim == 0 || !dim.is_multiple_of(least) {
            return None;
        }
        // Units and blocks that ptxas finds registers for without a spill (kernels/offline/TABLE.md).
        let (units, longest) = match dim {
            ..=64 if !fragments => (192, 64),
            65..=96 if fragments => (192, 64),
            97.. if !fragments => (128, 32),
            _ => (256, 64),
        };
        let team = limits.team(units, fragments);
        sizes
            .into_iter()
            .map(|(block, columns)| Self { dim, block, columns, direction, has_state: true, want_state: true, team })
            .filter(|scan| scan.block <= longest)
            .filter(|scan| !fragments || scan.block >= FRAGMENT && scan.columns >= FRAGMENT)
            .find(|scan| {
                dim.is_multiple_of(scan.columns)
                    && team.units.is_multiple_of(scan.columns)
                    && scan.shared_bytes() <= limits.shared
            })
    }

    /// Bytes of shared memory.
    pub fn shared_bytes(&self) -> usize {
        let (fragments, operand) = (self.team.plane > 0, if self.team.plane > 0 { 2 } else { 4 });
        let tile = |rows: usize, cols: usize| rows * pitch(cols, fragments);
        let operands = 2 * tile(self.block, self.dim) + tile(self.block, self.columns);
        let copies = if fragments { tile(self.block, self.block) + tile(self.dim, self.columns) } else { 2 };
        let sums = tile(self.block, self.block) + tile(self.block, self.columns) + tile(self.dim, self.columns);
        operand * (operands + copies) + 4 * (sums + 2 * self.team.units + self.block + 2)
    }
}

/// One (row, head, columns) per cube: `CUBE_POS = (columns, head, row)`.
///
/// - `a`, `b`, `c`, `out`: `[rows, heads, tokens, dim]`, any strides with 1 in the last place; padding behind a row's length is not read, and
///   written as 0.
/// - `plan`: f32 bits of the slopes `[heads]`, then start and length of each row.
/// - `before`, `after`: M `[rows, heads, dim, dim]` f32, any strides.
///
/// A NaN or infinity in `c` makes NaN from its own token on, in its own column: no zero weight of an earlier token
/// multiplies it.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn lightning_scan<A: Float, B: Float, C: Float, Y: Float, O: Float>(
    a: &Tensor<A>,
    b: &Tensor<B>,
    c: &Tensor<C>,
    plan: &Tensor<u32>,
    before: &Tensor<f32>,
    out: &mut Tensor<Y>,
    after: &mut Tensor<f32>,
    #[comptime] p: Scan,
    #[define(A, B, C, Y, O)] _types: [ElemType; 5],
) {
    let unit = UNIT_POS as usize;
    let head = CUBE_POS_Y as usize;
    let row = CUBE_POS_Z as usize;
    let units = comptime![p.team.units];
    let fragments = comptime![p.team.plane > 0];
    let forward = comptime![p.direction == Direction::Forward];
    let tokens = out.shape(2);

    // In what touches M or `out` a unit keeps to one column.
    let lanes = comptime![units / p.columns];
    let lane = unit / p.columns;
    let column = unit % p.columns;
    let first_column = CUBE_POS_X as usize * p.columns;

    let slope = f32::reinterpret(plan[head]);
    let start = plan[a.shape(1) + 2 * row] as usize;
    let length = plan[a.shape(1) + 2 * row + 1] as usize;

    let wide = comptime![pitch(p.dim, fragments)];
    let narrow = comptime![pitch(p.columns, fragments)];
    let square = comptime![pitch(p.block, fragments)];
    let mut a_tile = Shared::<[O]>::new_slice(comptime![p.block * wide]);
    let mut b_tile = Shared::<[O]>::new_slice(comptime![p.block * wide]);
    let mut c_tile = Shared::<[O]>::new_slice(comptime![p.block * narrow]);
    let mut scores = Shared::<[f32]>::new_slice(comptime![p.block * square]);
    let mut sums = Shared::<[f32]>::new_slice(comptime![p.block * narrow]);
    let mut state = Shared::<[f32]>::new_slice(comptime![p.dim * narrow]);
    // Fragments have one type: f32 scores and states are rounded to `O` into these.
    let mut weights = Shared::<[O]>::new_slice(comptime![if fragments { p.block * square } else { 1 }]);
    let mut operand = Shared::<[O]>::new_slice(comptime![if fragments { p.dim * narrow } else { 1 }]);
    let mut decay = Shared::<[f32]>::new_slice(comptime![p.block + 1]);
    // The first token of the block that is not finite in a column, by lane, and the NaN that it leaves.
    let mut broken_at = Shared::<[u32]>::new_slice(units);
    let mut broken_by = Shared::<[f32]>::new_slice(units);
    let nought = nought();

    for n in range_stepped(unit, comptime![p.block + 1], units) {
        decay[n] = (-slope * f32::cast_from(n)).exp();
    }
    for r in range_stepped(lane, p.dim, lanes) {
        let mut value = 0.0f32;
        if comptime![p.has_state] {
            value = before[row * before.stride(0)
                + head * before.stride(1)
                + r * before.stride(2)
                + (first_column + column) * before.stride(3)];
        }
        state[r * narrow + column] = value;
    }

    sync_cube();

    // 0, or NaN once this unit's column is broken.
    let mut poison = 0.0f32;
    let mut done = 0usize;
    while done < length {
        // Forward, blocks end at multiples of their size: a text gives the same blocks however it is cut into calls.
        let mut count = length - done;
        let room = if comptime![forward] { p.block - (start + done) % p.block } else { p.block.runtime() };
        if room < count {
            count = room;
        }

        let unit = here(&nought);
        let lane = unit / p.columns;
        let column = unit % p.columns;
        for x in range_stepped(unit, comptime![p.block * p.dim], units) {
            let i = x / p.dim;
            let e = x % p.dim;
            let mut a_value = 0.0f32;
            let mut b_value = 0.0f32;
            if i < count {
                let token = if comptime![forward] { done + i } else { length - 1 - done - i };
                a_value = f32::cast_from(a[row * a.stride(0) + head * a.stride(1) + token * a.stride(2) + e]);
                b_value = f32::cast_from(b[row * b.stride(0) + head * b.stride(1) + token * b.stride(2) + e]);
            }
            a_tile[i * wide + e] = O::cast_from(a_value);
            b_tile[i * wide + e] = O::cast_from(b_value);
        }
        let mut at = comptime![p.block as u32].runtime();
        let mut by = 0.0f32;
        for i in range_stepped(lane, p.block, lanes) {
            let mut value = 0.0f32;
            if i < count {
                let token = if comptime![forward] { done + i } else { length - 1 - done - i };
                value = f32::cast_from(
                    c[row * c.stride(0) + head * c.stride(1) + token * c.stride(2) + first_column + column],
                );
                if !finite(value) {
                    if at == p.block as u32 {
                        at = i as u32;
                        by = value - value;
                    }
                    value = 0.0f32;
                }
            }
            c_tile[i * narrow + column] = O::cast_from(value);
        }
        broken_at[unit] = at;
        broken_by[unit] = by;
        sync_cube();

        product::<O, O>(
            &a_tile,
            &b_tile,
            &mut scores,
            1.0f32,
            here(&nought),
            comptime![Product {
                m: p.block,
                n: p.block,
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
        for x in range_stepped(unit, comptime![p.block * p.block], units) {
            let i = x / p.block;
            let j = x % p.block;
            let mut weight = 0.0f32;
            if j <= i {
                weight = scores[i * square + j] * decay[i - j];
            }
            if comptime![fragments] {
                weights[i * square + j] = O::cast_from(weight);
            } else {
                scores[i * square + j] = weight;
            }
        }
        let behind = comptime![if forward { 1usize } else { 0usize }];
        for x in range_stepped(unit, comptime![p.block * p.dim], units) {
            let i = x / p.dim;
            let at = i * wide + x % p.dim;
            if i < count {
                a_tile[at] = O::cast_from(f32::cast_from(a_tile[at]) * decay[i + behind]);
                b_tile[at] = O::cast_from(f32::cast_from(b_tile[at]) * decay[count - i - behind]);
            }
        }
        if comptime![fragments] {
            for r in range_stepped(unit / p.columns, p.dim, lanes) {
                let at = r * narrow + unit % p.columns;
                operand[at] = O::cast_from(state[at]);
                state[at] = state[at] * decay[count];
            }
        }
        sync_cube();

        let within = comptime![Product {
            m: p.block,
            n: p.columns,
            k: p.block,
            lda: square,
            ldb: narrow,
            ldc: narrow,
            a_transposed: false,
            b_transposed: false,
            add: false,
        }];
        let across = comptime![Product { k: p.dim, lda: wide, add: true, ..within }];
        let update = comptime![Product {
            m: p.dim,
            n: p.columns,
            k: p.block,
            lda: wide,
            ldb: narrow,
            ldc: narrow,
            a_transposed: true,
            b_transposed: false,
            add: true,
        }];
        if comptime![fragments] {
            product::<O, O>(&weights, &c_tile, &mut sums, 1.0f32, here(&nought), within, p.team);
            sync_cube();
            product::<O, O>(&a_tile, &operand, &mut sums, 1.0f32, here(&nought), across, p.team);
            product::<O, O>(&b_tile, &c_tile, &mut state, 1.0f32, here(&nought), update, p.team);
            sync_cube();
        } else {
            product::<f32, O>(&scores, &c_tile, &mut sums, 1.0f32, here(&nought), within, p.team);
            sync_cube();
            product::<O, f32>(&a_tile, &state, &mut sums, 1.0f32, here(&nought), across, p.team);
            sync_cube();
            product::<O, O>(&b_tile, &c_tile, &mut state, decay[count], here(&nought), update, p.team);
            sync_cube();
        }

        let unit = here(&nought);
        let lane = unit / p.columns;
        let column = unit % p.columns;
        let mut broken = comptime![p.block as u32].runtime();
        let mut nan = 0.0f32;
        for l in 0..lanes {
            let seen = broken_at[l * p.columns + column];
            if seen < broken {
                broken = seen;
            }
            nan += broken_by[l * p.columns + column];
        }
        for i in range_stepped(lane, count, lanes) {
            let token = if comptime![forward] { done + i } else { length - 1 - done - i };
            let mut value = sums[i * narrow + column] + poison;
            if i as u32 >= broken {
                value += nan;
            }
            let at = row * out.stride(0) + head * out.stride(1) + token * out.stride(2) + first_column + column;
            out[at] = Y::cast_from(value);
        }
        poison += nan;
        sync_cube();
        done += count;
    }

    let unit = here(&nought);
    let lane = unit / p.columns;
    let column = unit % p.columns;
    for token in range_stepped(length + lane, tokens, lanes) {
        let at = row * out.stride(0) + head * out.stride(1) + token * out.stride(2) + first_column + column;
        out[at] = Y::cast_from(0.0f32);
    }
    if comptime![p.want_state] {
        sync_cube();
        for r in range_stepped(lane, p.dim, lanes) {
            let at = row * after.stride(0)
                + head * after.stride(1)
                + r * after.stride(2)
                + (first_column + column) * after.stride(3);
            after[at] = state[r * narrow + column] + poison;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Direction, Scan};
    use crate::base::cube::Limits;

    #[test]
    fn heads_of_m1_fit_every_device() {
        for (shared, block, columns) in [(16 << 10, 8, 8), (32 << 10, 16, 16), (48 << 10, 16, 32), (227 << 10, 32, 32)]
        {
            let limits = Limits { shared, units: 256, plane: None };
            let scan = Scan::fitting(&limits, 128, false, Direction::Forward).expect("128 fits");
            assert_eq!((scan.block, scan.columns), (block, columns), "in {shared} bytes");
            assert!(scan.shared_bytes() <= shared);
        }
        let hopper = Limits { shared: 227 << 10, units: 1024, plane: Some(32) };
        let scan = Scan::fitting(&hopper, 128, true, Direction::Forward).expect("128 fits");
        assert_eq!((scan.block, scan.columns, scan.team.units, scan.team.plane), (64, 32, 256, 32));
        assert!(Scan::fitting(&hopper, 20, false, Direction::Forward).is_none());
        assert!(Scan::fitting(&hopper, 24, true, Direction::Forward).is_none());
    }
}
