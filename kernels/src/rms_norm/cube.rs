//! One CubeCL source for CUDA and wgpu: a cube for each row, one launch forward; backward one more for the weight.
//!
//! Offline: F and G alike in {f32, bf16, f16} (gated also F = f32 with G = bf16), vectors of 4, `units` = 256 (dim ≥
//! 1024); `rms_norm_forward` for without and with a gate, the two backward kernels without and with
//! a gate; cube of `units` units (256 for the weight's).

// The kernel macro writes modules and functions beside each kernel, which have no place for documentation.
#![allow(missing_docs)]

use burn::{
    backend::{TensorMetadata, tensor::FloatTensor},
    tensor::DType,
};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

use super::RmsNormBackend;
use crate::base::gpu::{buffer, cube_sum, element, empty, lanes, rows, sigmoid, spread, units_for, vector};

/// `y [rows, dim] = norm(x)`, times `sigmoid(gate)` when there is a gate.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_forward<F: Float, G: Float, N: Size>(
    x: &[Vector<F, N>],
    gate: ComptimeOption<&[Vector<G, N>]>,
    weight: &[Vector<f32, N>],
    y: &mut [Vector<G, N>],
    rows: usize,
    dim: usize,
    eps: f32,
    #[comptime] units: usize,
    #[define(F, G)] _dtypes: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let len = dim / N::value();
    let base = row * len;
    let mut scratch = Shared::<[f32]>::new_slice(units);
    let mut squares = Vector::<f32, N>::zeroed();
    for i in range_stepped(UNIT_POS as usize, len, units) {
        let value = Vector::<f32, N>::cast_from(x[base + i]);
        squares += value * value;
    }
    let total = cube_sum(lanes(squares), &mut scratch, units);
    let scale = 1.0f32 / (total / dim as f32 + eps).sqrt();
    for i in range_stepped(UNIT_POS as usize, len, units) {
        let mut value = Vector::<f32, N>::cast_from(x[base + i]) * Vector::new(scale) * weight[i];
        #[comptime]
        if let ComptimeOption::Some(gate) = &gate {
            value = value * sigmoids(Vector::<f32, N>::cast_from(gate[base + i]));
        }
        y[base + i] = Vector::<G, N>::cast_from(value);
    }
}

/// `sum = x · alpha + branch · beta` and `y = norm(sum)`, all `[rows, dim]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn add_rms_norm_forward<F: Float, N: Size>(
    x: &[Vector<F, N>],
    branch: &[Vector<F, N>],
    weight: &[Vector<f32, N>],
    sum: &mut [Vector<F, N>],
    y: &mut [Vector<F, N>],
    rows: usize,
    dim: usize,
    alpha: f32,
    beta: f32,
    eps: f32,
    #[comptime] units: usize,
    #[define(F)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let len = dim / N::value();
    let base = row * len;
    let mut scratch = Shared::<[f32]>::new_slice(units);
    let mut squares = Vector::<f32, N>::zeroed();
    for i in range_stepped(UNIT_POS as usize, len, units) {
        let value = Vector::<f32, N>::cast_from(x[base + i]) * Vector::new(alpha);
        let other = Vector::<f32, N>::cast_from(branch[base + i]) * Vector::new(beta);
        let stored = Vector::<F, N>::cast_from(value + other);
        sum[base + i] = stored;
        // the norm is of what is stored, in its dtype
        let value = Vector::<f32, N>::cast_from(stored);
        squares += value * value;
    }
    let total = cube_sum(lanes(squares), &mut scratch, units);
    let scale = 1.0f32 / (total / dim as f32 + eps).sqrt();
    for i in range_stepped(UNIT_POS as usize, len, units) {
        // a unit reads what it wrote itself
        let value = Vector::<f32, N>::cast_from(sum[base + i]) * Vector::new(scale) * weight[i];
        y[base + i] = Vector::<F, N>::cast_from(value);
    }
}

/// Gradients for x (and the gate; without one `d_gate` is not touched), and the scale `rsqrt(mean(x²) + eps)` of each
/// row for [`rms_norm_weight`].
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_input<F: Float, G: Float, N: Size>(
    x: &[Vector<F, N>],
    gate: ComptimeOption<&[Vector<G, N>]>,
    weight: &[Vector<f32, N>],
    d_y: &[Vector<G, N>],
    d_x: &mut [Vector<F, N>],
    d_gate: &mut [Vector<G, N>],
    scales: &mut [f32],
    rows: usize,
    dim: usize,
    eps: f32,
    #[comptime] units: usize,
    #[define(F, G)] _dtypes: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let len = dim / N::value();
    let base = row * len;
    let mut scratch = Shared::<[f32]>::new_slice(units);
    let mut squares = Vector::<f32, N>::zeroed();
    let mut products = Vector::<f32, N>::zeroed();
    for i in range_stepped(UNIT_POS as usize, len, units) {
        let value = Vector::<f32, N>::cast_from(x[base + i]);
        let mut slope = Vector::<f32, N>::cast_from(d_y[base + i]) * weight[i];
        #[comptime]
        if let ComptimeOption::Some(gate) = &gate {
            slope = slope * sigmoids(Vector::<f32, N>::cast_from(gate[base + i]));
        }
        squares += value * value;
        products += value * slope;
    }
    let total = cube_sum(lanes(squares), &mut scratch, units);
    let product = cube_sum(lanes(products), &mut scratch, units);
    let scale = 1.0f32 / (total / dim as f32 + eps).sqrt();
    let pull = product * scale * scale * scale / dim as f32;
    for i in range_stepped(UNIT_POS as usize, len, units) {
        let value = Vector::<f32, N>::cast_from(x[base + i]);
        let incoming = Vector::<f32, N>::cast_from(d_y[base + i]);
        let mut slope = incoming * weight[i];
        #[comptime]
        if let ComptimeOption::Some(gate) = &gate {
            let open = sigmoids(Vector::<f32, N>::cast_from(gate[base + i]));
            let normed = value * Vector::new(scale);
            d_gate[base + i] = Vector::<G, N>::cast_from(slope * normed * open * (Vector::new(1.0f32) - open));
            slope = slope * open;
        }
        d_x[base + i] = Vector::<F, N>::cast_from(slope * Vector::new(scale) - value * Vector::new(pull));
    }
    if UNIT_POS == 0 {
        scales[row] = scale;
    }
}

/// Columns of a cube of [`rms_norm_weight`]; the rest of its 256 units walk rows.
const COLUMNS: usize = 64;
const WALKERS: usize = 4;

/// `d_w [dim] = Σ_rows d_y · x · scale (· sigmoid(gate))`, in a fixed order. Grid: dim / 64.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_weight<F: Float, G: Float>(
    x: &[F],
    gate: ComptimeOption<&[G]>,
    d_y: &[G],
    scales: &[f32],
    d_w: &mut [f32],
    rows: usize,
    dim: usize,
    #[define(F, G)] _dtypes: [ElemType; 2],
) {
    let unit = UNIT_POS as usize;
    let (lane, walker) = (unit % COLUMNS, unit / COLUMNS);
    let column = CUBE_POS_X as usize * COLUMNS + lane;
    let mut sum = 0.0f32;
    if column < dim {
        for row in range_stepped(walker, rows, WALKERS) {
            let at = row * dim + column;
            let mut value = f32::cast_from(d_y[at]) * f32::cast_from(x[at]) * scales[row];
            #[comptime]
            if let ComptimeOption::Some(gate) = &gate {
                value *= sigmoid(f32::cast_from(gate[at]));
            }
            sum += value;
        }
    }
    let mut partial = Shared::<[f32]>::new_slice(comptime!(COLUMNS * WALKERS));
    partial[unit] = sum;
    sync_cube();
    if walker == 0 && column < dim {
        let mut total = 0.0f32;
        #[unroll]
        for i in 0..WALKERS {
            total += partial[i * COLUMNS + lane];
        }
        d_w[column] = total;
    }
}

/// [`sigmoid`] of every lane.
#[cube]
fn sigmoids<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let mut open = Vector::<f32, N>::zeroed();
    #[unroll]
    for lane in 0..N::value() {
        open.insert(lane, sigmoid(x.extract(lane)));
    }
    open
}

/// `x` of any shape whose elements in row-major order are `[n, dim]`; the result `[n, dim]` in the dtype of the gate.
fn forward(x: CubeTensor, gate: Option<CubeTensor>, weight: CubeTensor, eps: f64) -> CubeTensor {
    let dim = weight.shape()[0];
    let count = x.shape().num_elements() / dim.max(1);
    let (x, gate, weight) = (rows(x), gate.map(rows), rows(weight));
    let like = gate.as_ref().unwrap_or(&x);
    let y = empty(like, [count, dim], like.dtype);
    if count * dim > 0 {
        let size = vector(dim, 4);
        let units = units_for(dim / size);
        // SAFETY: the kernel stays below `rows` and `dim`, which all tensors have.
        unsafe {
            rms_norm_forward::launch_unchecked(
                &x.client,
                spread(count),
                CubeDim::new_1d(units as u32),
                size,
                buffer(&x),
                gate.as_ref().map(buffer).into(),
                buffer(&weight),
                buffer(&y),
                count,
                dim,
                eps as f32,
                units,
                [element(&x), element(&y)],
            );
        }
    }
    y
}

/// `(d_x in the shape of x, d_gate, d_w)`; without a gate the second means nothing.
fn backward(
    x: CubeTensor,
    gate: Option<CubeTensor>,
    weight: CubeTensor,
    d_y: CubeTensor,
    eps: f64,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let dim = weight.shape()[0];
    let count = x.shape().num_elements() / dim.max(1);
    let (x, gate, weight, d_y) = (rows(x), gate.map(rows), rows(weight), rows(d_y));
    let d_x = empty(&x, x.shape(), x.dtype);
    let d_gate = match &gate {
        Some(gate) => empty(gate, gate.shape(), gate.dtype),
        // as long as the widest vector, which a binding must hold
        None => empty(&d_y, [4], d_y.dtype),
    };
    let d_w = empty(&x, [dim], DType::F32);
    let scales = empty(&x, [count.max(1)], DType::F32);
    if dim == 0 {
        return (d_x, d_gate, d_w);
    }
    let size = vector(dim, 4);
    let units = units_for(dim / size);
    let dtypes = [element(&x), element(&d_y)];
    // SAFETY: the kernels stay below `rows` and `dim`, which all tensors have.
    unsafe {
        if count > 0 {
            rms_norm_input::launch_unchecked(
                &x.client,
                spread(count),
                CubeDim::new_1d(units as u32),
                size,
                buffer(&x),
                gate.as_ref().map(buffer).into(),
                buffer(&weight),
                buffer(&d_y),
                buffer(&d_x),
                buffer(&d_gate),
                buffer(&scales),
                count,
                dim,
                eps as f32,
                units,
                dtypes,
            );
        }
        rms_norm_weight::launch_unchecked(
            &x.client,
            CubeCount::Static(dim.div_ceil(COLUMNS) as u32, 1, 1),
            CubeDim::new_1d((COLUMNS * WALKERS) as u32),
            buffer(&x),
            gate.as_ref().map(buffer).into(),
            buffer(&d_y),
            buffer(&scales),
            buffer(&d_w),
            count,
            dim,
            dtypes,
        );
    }
    (d_x, d_gate, d_w)
}

type T = FloatTensor<CubeBackend>;

impl RmsNormBackend for CubeBackend {
    fn rms_norm(x: T, w: T, eps: f64) -> T {
        forward(x, None, w, eps)
    }

    fn rms_norm_backward(x: T, w: T, d_y: T, eps: f64) -> (T, T) {
        let (d_x, _, d_w) = backward(x, None, w, d_y, eps);
        (d_x, d_w)
    }

    fn add_rms_norm(residual: T, branch: T, w: T, alpha: f64, beta: f64, eps: f64) -> (T, T) {
        let [count, dim] = residual.shape().dims();
        let (x, branch, weight) = (rows(residual), rows(branch), rows(w));
        let sum = empty(&x, [count, dim], x.dtype);
        let y = empty(&x, [count, dim], x.dtype);
        if count * dim > 0 {
            let size = vector(dim, 4);
            let units = units_for(dim / size);
            // SAFETY: the kernel stays below `rows` and `dim`, which all tensors have.
            unsafe {
                add_rms_norm_forward::launch_unchecked(
                    &x.client,
                    spread(count),
                    CubeDim::new_1d(units as u32),
                    size,
                    buffer(&x),
                    buffer(&branch),
                    buffer(&weight),
                    buffer(&sum),
                    buffer(&y),
                    count,
                    dim,
                    alpha as f32,
                    beta as f32,
                    eps as f32,
                    units,
                    element(&x),
                );
            }
        }
        (sum, y)
    }

    fn gated_rms_norm(o: T, gate: T, w: T, eps: f64) -> T {
        forward(o, Some(gate), w, eps)
    }

    fn gated_rms_norm_backward(o: T, gate: T, w: T, d_y: T, eps: f64) -> (T, T, T) {
        backward(o, Some(gate), w, d_y, eps)
    }
}
