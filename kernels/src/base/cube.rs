//! What the CubeCL kernels share: products of tiles in shared memory, loads of tiles, and what a device allows.
//!
//! One source serves CUDA and wgpu. A cube keeps its tiles in shared memory and multiplies them with [`product`], which is
//! the only place that knows of tensor cores: with [`Team::plane`] set each plane multiplies 16 × 16 × 16 fragments (the
//! operands in f16 or bf16, the sum in f32), otherwise each unit sums a small square of f32 in registers. f32 operands
//! always take the second way, so nothing is ever rounded to TF32.

// `#[cube]` writes a module and a struct for each kernel, without documentation.
#![allow(missing_docs)]

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use burn::backend::DispatchDevice;
use burn::backend::cubecl::dtype_to_storage_type;
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::CubeDevice;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{AddressType, ElemType, FloatKind};
use cubecl::prelude::*;

use super::device::MAX_ELEMENTS;

/// Rows and columns of a tensor-core fragment.
pub const FRAGMENT: usize = 16;

/// What a device can number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// Elements of a tensor: WGSL counts in 32 bits, CUDA in 64 where it must ([`addresses`]).
    pub elements: usize,
    /// Cubes of a launch along x, y and z.
    pub cubes: [usize; 3],
}

impl Reach {
    /// That of the device behind `client`.
    pub fn of(client: &Client) -> Self {
        let properties = client.properties();
        let wide = properties.supports_address(AddressType::U64);
        let (x, y, z) = properties.hardware.max_cube_count;
        Self { elements: if wide { usize::MAX } else { MAX_ELEMENTS }, cubes: [x, y, z].map(|n| n as usize) }
    }

    /// Whether kernels can number the elements of a tensor of this shape.
    pub fn holds(&self, shape: &[usize]) -> bool {
        let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        count.is_some_and(|n| n <= self.elements)
    }

    /// Whether so many cubes can be launched.
    pub fn launches(&self, cubes: [usize; 3]) -> bool {
        cubes.iter().zip(&self.cubes).all(|(n, most)| n <= most)
    }
}

/// The units that work on one cube's tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Team {
    /// Units of the cube.
    pub units: usize,
    /// Units of a plane where fragments of tensor cores do the products; 0 where units do them in f32.
    pub plane: usize,
}

/// What a device allows a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of shared memory in a cube.
    pub shared: usize,
    /// Units of a cube.
    pub units: usize,
    /// Units of a plane if every plane has as many.
    pub plane: Option<usize>,
}

impl Limits {
    /// The limits of the device behind `client`.
    pub fn of(client: &Client) -> Self {
        let hardware = &client.properties().hardware;
        let plane = (hardware.plane_size_min == hardware.plane_size_max).then_some(hardware.plane_size_max as usize);
        Self { shared: hardware.max_shared_memory_size, units: hardware.max_units_per_cube as usize, plane }
    }

    /// At most `units`, by powers of two.
    pub fn team(&self, units: usize, tensor_cores: bool) -> Team {
        let mut fitting = units;
        while fitting > self.units {
            fitting /= 2;
        }
        Team { units: fitting, plane: if tensor_cores { self.plane.unwrap_or(0) } else { 0 } }
    }
}

/// Whether the device multiplies fragments of `operand` and sums them in f32.
pub fn has_fragments(client: &Client, operand: DType) -> bool {
    let elem = dtype_to_storage_type(operand);
    let side = FRAGMENT as u32;
    operand != DType::F32
        && Limits::of(client).plane.is_some()
        && client.features().matmul.cmma.contains(&MmaConfig {
            a_type: elem,
            b_type: elem,
            cd_type: ElemType::Float(FloatKind::F32),
            m: side,
            n: side,
            k: side,
        })
}

/// The widest index that any of `tensors` needs: past 2^32 elements the kernels count in 64 bits.
pub fn addresses(tensors: &[&CubeTensor]) -> AddressType {
    tensors.iter().map(|x| x.required_address_type()).max().unwrap_or_default()
}

/// A contiguous tensor beside `like`, not yet written.
pub fn empty(like: &CubeTensor, shape: &[usize], dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), Shape::from(shape.to_vec()), dtype)
}

/// The axes `a` and `b` of a view exchanged; no data moves.
pub fn swapped(mut x: CubeTensor, a: usize, b: usize) -> CubeTensor {
    x.meta.swap(a, b);
    x
}

/// `x` if its last axis lies side by side in memory, as the kernels read it; else a contiguous copy.
pub fn packed_rows(x: &CubeTensor) -> CubeTensor {
    let packed = x.meta.strides().last().is_none_or(|&stride| stride == 1);
    if packed { x.clone() } else { into_contiguous(x.clone()) }
}

/// `[rows, heads, tokens, dim]` that lies in memory as `[rows, tokens, heads, dim]`: a token's heads side by side, as the
/// projection behind an attention wants them.
pub fn empty_tokens_first(like: &CubeTensor, [rows, heads, tokens, dim]: [usize; 4], dtype: DType) -> CubeTensor {
    swapped(empty(like, &[rows, tokens, heads, dim], dtype), 1, 2)
}

/// 32-bit words of the host on the device, `[words]`.
pub fn words(like: &CubeTensor, words: &[u32]) -> CubeTensor {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let handle = like.client.create_from_slice(&bytes);
    CubeTensor::new_contiguous(
        like.client.clone(),
        like.device.clone(),
        Shape::from(vec![words.len()]),
        handle,
        DType::U32,
    )
}

/// [`words`] that come again call after call: uploaded once for each device and kept.
pub fn constant(like: &CubeTensor, values: &[u32]) -> CubeTensor {
    type Kept = Mutex<HashMap<(CubeDevice, Vec<u32>), CubeTensor>>;
    static KEPT: LazyLock<Kept> = LazyLock::new(Kept::default);
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.len() >= 4096 {
        kept.clear();
    }
    kept.entry((like.device.clone(), values.to_vec())).or_insert_with(|| words(like, values)).clone()
}

/// The limits and the reach of the device where `x` lies, if CubeCL runs it, with or without autodiff.
pub fn limits<const D: usize>(x: &Tensor<D>) -> Option<(Limits, Reach)> {
    match x.device().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => Some((Limits::of(&device.client()), Reach::of(&device.client()))),
        _ => None,
    }
}

/// Whether the kernels read this type.
pub fn stored(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// A product of tiles in shared memory: `c [m, n] = (add ? c · factor : 0) + a [m, k] · b [k, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Product {
    /// Rows of `c`.
    pub m: usize,
    /// Columns of `c`.
    pub n: usize,
    /// Terms of each sum.
    pub k: usize,
    /// Elements from one row of `a`'s tile to the next.
    pub lda: usize,
    /// The same of `b`.
    pub ldb: usize,
    /// The same of `c`.
    pub ldc: usize,
    /// The tile of `a` holds `[k, m]`.
    pub a_transposed: bool,
    /// The tile of `b` holds `[n, k]`.
    pub b_transposed: bool,
    /// Adds to what `c` holds.
    pub add: bool,
}

/// Elements between the rows of a tile of `cols`: fragments want rows of 16 bytes, off the same banks; units an odd number.
pub const fn pitch(cols: usize, fragments: bool) -> usize {
    if fragments { cols + 8 } else { cols + 1 }
}

/// Rows and columns of the square that one unit sums: the largest that gives every unit one.
fn square(m: usize, n: usize, units: usize) -> (usize, usize) {
    let fits = |&(r, c): &(usize, usize)| m.is_multiple_of(r) && n.is_multiple_of(c);
    let sizes = [(4, 4), (2, 4), (4, 2), (2, 2), (1, 2), (2, 1), (1, 1)];
    sizes.into_iter().filter(fits).find(|(r, c)| (m / r) * (n / c) >= units).unwrap_or((1, 1))
}

/// Fragments side by side that one plane sums at once, so that each of `a` is loaded once for them.
fn strip(m: usize, n: usize, planes: usize) -> usize {
    let (rows, cols) = (m / FRAGMENT, n / FRAGMENT);
    [4, 2].into_iter().find(|w| cols.is_multiple_of(*w) && rows * cols / w >= planes).unwrap_or(1)
}

/// `UNIT_POS`, by way of a word of shared memory that holds 0, as no compiler can know behind a barrier. So none makes all
/// addresses of a loop before it and carries them round in registers until these spill.
#[cube]
pub fn here(nought: &Shared<[u32]>) -> usize {
    (UNIT_POS + nought[0]) as usize
}

/// The word for [`here`], which holds behind the next barrier.
#[cube]
pub fn nought() -> Shared<[u32]> {
    let mut nought = Shared::<[u32]>::new_slice(1usize);
    if UNIT_POS == 0 {
        nought[0] = 0u32;
    }
    nought
}

/// See [`Product`]; `unit` is the caller's number. `factor` scales `c` where it is added to, and only without fragments:
/// with them it must be 1.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn product<A: Float, B: Float>(
    a: &[A],
    b: &[B],
    c: &mut [f32],
    factor: f32,
    unit: usize,
    #[comptime] p: Product,
    #[comptime] team: Team,
) {
    if comptime![team.plane > 0] {
        product_of_fragments::<A, B>(a, b, c, unit, p, team);
    } else {
        product_of_units::<A, B>(a, b, c, factor, unit, p, team);
    }
}

#[cube]
fn product_of_fragments<A: Float, B: Float>(
    a: &[A],
    b: &[B],
    c: &mut [f32],
    unit: usize,
    #[comptime] p: Product,
    #[comptime] team: Team,
) {
    let planes = comptime![team.units / team.plane];
    let width = comptime![strip(p.m, p.n, planes)];
    let across = comptime![p.n / FRAGMENT / width];
    let down = comptime![p.m / FRAGMENT];
    let steps = comptime![p.k / FRAGMENT];
    let a_layout = comptime![if p.a_transposed { cmma::MatrixLayout::ColMajor } else { cmma::MatrixLayout::RowMajor }];
    let b_layout = comptime![if p.b_transposed { cmma::MatrixLayout::ColMajor } else { cmma::MatrixLayout::RowMajor }];
    let first = unit / team.plane;
    for strip in range_stepped(first, across * down, planes) {
        let row = strip / across * FRAGMENT;
        let col = strip % across * (width * FRAGMENT);
        let mut sums = Sequence::<cmma::Matrix<f32>>::new();
        #[unroll]
        for x in 0..width {
            let at = row * p.ldc + col + x * FRAGMENT;
            if comptime![p.add] {
                sums.push(cmma::Matrix::<f32>::from_slice(
                    cmma::MatrixIdent::Accumulator,
                    FRAGMENT,
                    FRAGMENT,
                    FRAGMENT,
                    cmma::MatrixLayout::RowMajor,
                    &c[at..comptime![p.m * p.ldc]],
                    comptime![p.ldc as u32],
                ));
            } else {
                sums.push(cmma::Matrix::<f32>::from_value(
                    cmma::MatrixIdent::Accumulator,
                    FRAGMENT,
                    FRAGMENT,
                    FRAGMENT,
                    cmma::MatrixLayout::Undefined,
                    0.0f32,
                ));
            }
        }
        for step in 0..steps {
            let k = step * FRAGMENT;
            let a_at = if comptime![p.a_transposed] { k * p.lda + row } else { row * p.lda + k };
            let a_end = comptime![if p.a_transposed { p.k * p.lda } else { p.m * p.lda }];
            let left = cmma::Matrix::<A>::from_slice(
                cmma::MatrixIdent::A,
                FRAGMENT,
                FRAGMENT,
                FRAGMENT,
                a_layout,
                &a[a_at..a_end],
                comptime![p.lda as u32],
            );
            #[unroll]
            for x in 0..width {
                let n = col + x * FRAGMENT;
                let b_at = if comptime![p.b_transposed] { n * p.ldb + k } else { k * p.ldb + n };
                let b_end = comptime![if p.b_transposed { p.n * p.ldb } else { p.k * p.ldb }];
                let right = cmma::Matrix::<B>::from_slice(
                    cmma::MatrixIdent::B,
                    FRAGMENT,
                    FRAGMENT,
                    FRAGMENT,
                    b_layout,
                    &b[b_at..b_end],
                    comptime![p.ldb as u32],
                );
                cmma::execute(&left, &right, &sums[x], &sums[x]);
            }
        }
        #[unroll]
        for x in 0..width {
            let at = row * p.ldc + col + x * FRAGMENT;
            cmma::store(
                &mut c[at..comptime![p.m * p.ldc]],
                &sums[x],
                comptime![p.ldc as u32],
                cmma::MatrixLayout::RowMajor,
            );
        }
    }
}

#[cube]
#[allow(clippy::too_many_arguments)]
fn product_of_units<A: Float, B: Float>(
    a: &[A],
    b: &[B],
    c: &mut [f32],
    factor: f32,
    unit: usize,
    #[comptime] p: Product,
    #[comptime] team: Team,
) {
    let size = comptime![square(p.m, p.n, team.units)];
    let height = comptime![size.0];
    let width = comptime![size.1];
    // A unit's rows and columns lie `down` and `across` apart: neighbours read neighbouring banks.
    let across = comptime![p.n / width];
    let down = comptime![p.m / height];
    for square in range_stepped(unit, across * down, team.units) {
        let row = square / across;
        let col = square % across;
        let mut sums = Array::<f32>::new(comptime![height * width]);
        #[unroll]
        for y in 0..height {
            #[unroll]
            for x in 0..width {
                if comptime![p.add] {
                    sums[y * width + x] = c[(row + y * down) * p.ldc + col + x * across] * factor;
                } else {
                    sums[y * width + x] = 0.0f32;
                }
            }
        }
        let mut left = Array::<f32>::new(height);
        for k in 0..p.k {
            #[unroll]
            for y in 0..height {
                let i = row + y * down;
                let at = if comptime![p.a_transposed] { k * p.lda + i } else { i * p.lda + k };
                left[y] = f32::cast_from(a[at]);
            }
            #[unroll]
            for x in 0..width {
                let j = col + x * across;
                let at = if comptime![p.b_transposed] { j * p.ldb + k } else { k * p.ldb + j };
                let right = f32::cast_from(b[at]);
                #[unroll]
                for y in 0..height {
                    sums[y * width + x] = fma(left[y], right, sums[y * width + x]);
                }
            }
        }
        #[unroll]
        for y in 0..height {
            #[unroll]
            for x in 0..width {
                c[(row + y * down) * p.ldc + col + x * across] = sums[y * width + x];
            }
        }
    }
}

/// Whether `x` is neither NaN nor infinite, by its bits: compilers may assume that no NaN exists.
#[cube]
pub fn finite(x: f32) -> bool {
    (u32::reinterpret(x) & 0x7f80_0000u32) != 0x7f80_0000u32
}

#[cfg(test)]
mod tests {
    use super::{square, strip};

    #[test]
    fn every_unit_has_work_where_there_is_enough() {
        assert_eq!(square(64, 64, 256), (4, 4));
        assert_eq!(square(64, 32, 256), (2, 4));
        assert_eq!(square(16, 16, 256), (1, 1));
        assert_eq!(square(5, 7, 256), (1, 1));
        assert_eq!(strip(64, 64, 8), 2);
        assert_eq!(strip(128, 64, 8), 4);
        assert_eq!(strip(64, 32, 8), 1);
        assert_eq!(strip(16, 48, 8), 1);
    }
}
