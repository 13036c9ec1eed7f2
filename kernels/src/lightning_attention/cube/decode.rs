//! One token for many rows: the state is read and written once.
//!
//! Two launches: [`lightning_decode_heads`] spreads the state over the device by (columns, head, row) and leaves `o`;
//! [`lightning_decode_norm`] is the norm over all heads of a row and the gate. Where one cube can hold a row's work
//! ([`Decode::in_one`]), [`lightning_decode_row`] does both in one.
//!
//! Instantiation: `LightningDecodeHeads` and `LightningDecodeNorm`, with `p` by [`Decode::fitting`], types F (projections,
//! result) and W (norm's weight) each of f32, f16, bf16; `LightningDecodeRow` with `p` by [`Decode::in_one`].

// `#[cube]` writes a module and a struct for each kernel, without documentation.
#![allow(missing_docs)]

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::base::cube::Limits;

/// What is known of a decode step when it is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Decode {
    /// Heads of a row.
    pub heads: usize,
    /// Size of a head: rows and columns of the state.
    pub dim: usize,
    /// Columns of the state per cube.
    pub columns: usize,
    /// Units per cube.
    pub units: usize,
}

/// Elements of a row's states up to which one cube does the whole row.
const ROW: usize = 1 << 16;

impl Decode {
    /// Columns and units for cubes that share a head; `None` if the device has none for this `dim`.
    pub fn fitting(limits: &Limits, heads: usize, dim: usize) -> Option<Self> {
        let units = limits.team(256, false).units;
        let columns = [32, 16, 8, 4, 2, 1].into_iter().find(|columns| dim.is_multiple_of(*columns))?;
        let decode = Self { heads, dim, columns, units };
        (dim > 0 && units >= columns && decode.shared_bytes() <= limits.shared).then_some(decode)
    }

    /// The same for one cube per row.
    pub fn in_one(limits: &Limits, heads: usize, dim: usize) -> Option<Self> {
        let units = limits.team(256, false).units;
        let decode = Self { heads, dim, columns: dim, units };
        let bytes = decode.shared_bytes() + 4 * (heads * dim + 1);
        (dim > 0 && dim <= units && heads * dim * dim <= ROW && bytes <= limits.shared).then_some(decode)
    }

    fn shared_bytes(&self) -> usize {
        4 * (2 * self.dim + self.columns + self.units)
    }
}

/// `1 / (1 + e^-x)` without overflow. NaN of NaN, told by its bits: with the comparisons of the other kernels' sigmoid ptxas
/// spills here, and with these there.
#[cube]
fn sigmoid(x: f32) -> f32 {
    let e = (0.0f32 - x.abs()).exp();
    let small = e / (1.0f32 + e);
    let large = 1.0f32 / (1.0f32 + e);
    let open = if x < 0.0f32 { small } else { large };
    if (u32::reinterpret(x) & 0x7fff_ffffu32) > 0x7f80_0000u32 { x } else { open }
}

/// One head's columns `first ..`: the new state, and `o` of column `unit` for `unit < p.columns` (else 0).
#[cube]
#[allow(clippy::too_many_arguments)]
fn step<F: Float>(
    qkv: &Tensor<F>,
    slopes: &Tensor<u32>,
    before: &Tensor<f32>,
    after: &mut Tensor<f32>,
    q: &mut Shared<[f32]>,
    k: &mut Shared<[f32]>,
    v: &mut Shared<[f32]>,
    sums: &mut Shared<[f32]>,
    row: usize,
    head: usize,
    first: usize,
    #[comptime] p: Decode,
) -> f32 {
    let unit = UNIT_POS as usize;
    let lanes = comptime![p.units / p.columns];
    let lane = unit / p.columns;
    let column = unit % p.columns;
    let decay = (-f32::reinterpret(slopes[head])).exp();

    // The definition rounds the activation to the projections' dtype.
    let at = (row * p.heads + head) * (3 * p.dim);
    for x in range_stepped(unit, p.dim, p.units) {
        let raw = f32::cast_from(qkv[at + x]);
        q[x] = f32::cast_from(F::cast_from(raw * sigmoid(raw)));
        let raw = f32::cast_from(qkv[at + p.dim + x]);
        k[x] = f32::cast_from(F::cast_from(raw * sigmoid(raw)));
    }
    for x in range_stepped(unit, p.columns, p.units) {
        let raw = f32::cast_from(qkv[at + 2 * p.dim + first + x]);
        v[x] = f32::cast_from(F::cast_from(raw * sigmoid(raw)));
    }
    sync_cube();

    let at = (row * p.heads + head) * (p.dim * p.dim) + first + column;
    let mut sum = 0.0f32;
    if lane < lanes {
        let value = v[column];
        for r in range_stepped(lane, p.dim, lanes) {
            let s = fma(before[at + r * p.dim], decay, k[r] * value);
            after[at + r * p.dim] = s;
            sum = fma(q[r], s, sum);
        }
    }
    sums[unit] = sum;
    sync_cube();
    let mut o = 0.0f32;
    if unit < p.columns {
        for l in 0..lanes {
            o += sums[l * p.columns + unit];
        }
    }
    o
}

/// `norm(o)·sigmoid(gate)` of one row, whose `o` is read by `o[at + i]`.
#[cube]
fn norm_and_gate<F: Float, W: Float>(
    o: &[f32],
    at: usize,
    gate: &Tensor<F>,
    norm: &Tensor<W>,
    y: &mut Tensor<F>,
    sums: &mut Shared<[f32]>,
    row: usize,
    eps: f32,
    #[comptime] p: Decode,
) {
    let unit = UNIT_POS as usize;
    let width = comptime![p.heads * p.dim];
    let mut sum = 0.0f32;
    for i in range_stepped(unit, width, p.units) {
        let x = o[at + i];
        sum = fma(x, x, sum);
    }
    sums[unit] = sum;
    sync_cube();
    // Every unit adds the same terms in the same order.
    let mut squares = 0.0f32;
    for u in 0..p.units {
        squares += sums[u];
    }
    let scale = 1.0f32 / (squares / (width as f32) + eps).sqrt();
    for i in range_stepped(unit, width, p.units) {
        let normed = F::cast_from(o[at + i] * scale * f32::cast_from(norm[i]));
        let open = F::cast_from(sigmoid(f32::cast_from(gate[row * width + i])));
        y[row * width + i] = F::cast_from(f32::cast_from(normed) * f32::cast_from(open));
    }
}

/// `CUBE_POS = (columns, head, row)`; `qkv [rows, heads · 3 · dim]`, `slopes` as f32 bits `[heads]`, states `[rows, heads,
/// dim, dim]`, `o [rows, heads · dim]`, all contiguous. `after` may be `before`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn lightning_decode_heads<F: Float>(
    qkv: &Tensor<F>,
    slopes: &Tensor<u32>,
    before: &Tensor<f32>,
    o: &mut Tensor<f32>,
    after: &mut Tensor<f32>,
    #[comptime] p: Decode,
    #[define(F)] _types: ElemType,
) {
    let mut q = Shared::<[f32]>::new_slice(p.dim);
    let mut k = Shared::<[f32]>::new_slice(p.dim);
    let mut v = Shared::<[f32]>::new_slice(p.columns);
    let mut sums = Shared::<[f32]>::new_slice(p.units);
    let row = CUBE_POS_Z as usize;
    let head = CUBE_POS_Y as usize;
    let first = CUBE_POS_X as usize * p.columns;
    let value = step::<F>(qkv, slopes, before, after, &mut q, &mut k, &mut v, &mut sums, row, head, first, p);
    if UNIT_POS < p.columns as u32 {
        o[(row * p.heads + head) * p.dim + first + UNIT_POS as usize] = value;
    }
}

/// `CUBE_POS_X` = row; `y = norm(o)·sigmoid(gate)`, all `[rows, heads · dim]`, contiguous.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn lightning_decode_norm<F: Float, W: Float>(
    o: &Tensor<f32>,
    gate: &Tensor<F>,
    norm: &Tensor<W>,
    y: &mut Tensor<F>,
    eps: f32,
    #[comptime] p: Decode,
    #[define(F, W)] _types: [ElemType; 2],
) {
    let mut sums = Shared::<[f32]>::new_slice(p.units);
    let row = CUBE_POS_X as usize;
    norm_and_gate::<F, W>(o, row * comptime![p.heads * p.dim], gate, norm, y, &mut sums, row, eps, p);
}

/// Both in one: `CUBE_POS_X` = row.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn lightning_decode_row<F: Float, W: Float>(
    qkv: &Tensor<F>,
    gate: &Tensor<F>,
    slopes: &Tensor<u32>,
    norm: &Tensor<W>,
    before: &Tensor<f32>,
    y: &mut Tensor<F>,
    after: &mut Tensor<f32>,
    eps: f32,
    #[comptime] p: Decode,
    #[define(F, W)] _types: [ElemType; 2],
) {
    let mut q = Shared::<[f32]>::new_slice(p.dim);
    let mut k = Shared::<[f32]>::new_slice(p.dim);
    let mut v = Shared::<[f32]>::new_slice(p.columns);
    let mut sums = Shared::<[f32]>::new_slice(p.units);
    let mut o = Shared::<[f32]>::new_slice(comptime![p.heads * p.dim]);
    let row = CUBE_POS_X as usize;
    for head in 0..p.heads {
        let value = step::<F>(qkv, slopes, before, after, &mut q, &mut k, &mut v, &mut sums, row, head, 0usize, p);
        if UNIT_POS < p.dim as u32 {
            o[head * p.dim + UNIT_POS as usize] = value;
        }
        sync_cube();
    }
    norm_and_gate::<F, W>(&o, 0usize, gate, norm, y, &mut sums, row, eps, p);
}

#[cfg(test)]
mod tests {
    use super::Decode;
    use crate::base::cube::Limits;

    #[test]
    fn small_rows_go_in_one_launch() {
        let limits = Limits { shared: 16 << 10, units: 256, plane: None };
        assert!(Decode::in_one(&limits, 8, 64).is_some());
        assert!(Decode::in_one(&limits, 64, 128).is_none());
        assert_eq!(Decode::fitting(&limits, 64, 128).map(|p| p.columns), Some(32));
        assert_eq!(Decode::fitting(&limits, 3, 24).map(|p| p.columns), Some(8));
    }
}
