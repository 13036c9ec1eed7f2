//! Products of f16 and bf16 on the tensor cores (cooperative matrices of 16 × 16 × 16, sums in f32).
//!
//! A cube is a grid of planes over one tile of the result; each plane keeps its fragments of the sums in registers,
//! operands pass through shared memory in steps of 32 along K, quantized weights are turned into the dtype of x on the
//! way. The plane size is what the device states, given as `lanes`: x of the cube is one plane.
//! Offline: `mma_product` with A in {bf16, f16}, B = A or u32 words, S in {f16, f32}, Y in {A, f32}; vector sizes
//! (NA, NB) = (8, 8) for floats, (4, 1) for int8, (8, 1) for int4; every `Shape`; cube of (lanes, planes) units.
//! `mma_outer` with A, Y alike, NA = 8, `Shape::OUTER`.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::{
    cmma::{self, Matrix, MatrixIdent, MatrixLayout},
    ir::{FloatKind, features::MmaConfig},
    prelude::*,
};

use super::{
    element,
    product::{Rows, Storage, Store, word_value},
    reduce::Reduce,
    sigmoid,
};

/// Side of a fragment.
const SIDE: usize = 16;
/// Depth of a step along K.
const DEPTH: usize = 32;
/// Padding of a line in shared memory, in elements: fragments stay 32-byte aligned and lines change banks.
const PAD: usize = 8;
/// Elements of a fragment.
const FRAGMENT: usize = SIDE * SIDE;

/// Planes of a cube and fragments of a plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Planes along the rows.
    pub planes_down: usize,
    /// Planes along the columns.
    pub planes_across: usize,
    /// Fragments of a plane along the rows.
    pub down: usize,
    /// Fragments of a plane along the columns, for each weight.
    pub across: usize,
}

impl Shape {
    /// For [`mma_outer`]: 64 × 64.
    pub const OUTER: Shape = Shape { planes_down: 2, planes_across: 2, down: 2, across: 2 };

    /// The shape for tiles of `rows` rows; `dual` keeps two sums for each result.
    pub fn choose(rows: usize, dual: bool) -> Self {
        let across = if dual { 1 } else { 2 };
        match rows {
            ..=16 => Self { planes_down: 1, planes_across: 4, down: 1, across },
            17..=64 => Self { planes_down: 2, planes_across: 4, down: 2, across },
            _ => Self { planes_down: 2, planes_across: 4, down: 4, across },
        }
    }

    /// Planes of a cube.
    pub fn planes(self) -> usize {
        self.planes_down * self.planes_across
    }

    /// Rows of a tile.
    pub fn height(self) -> usize {
        SIDE * self.planes_down * self.down
    }

    /// Columns of a tile.
    pub fn width(self) -> usize {
        SIDE * self.planes_across * self.across
    }
}

/// Rows of a tile when an expert has about `mean` rows.
pub fn tile_rows(mean: usize) -> usize {
    match mean {
        ..=16 => 16,
        17..=64 => 64,
        _ => 128,
    }
}

/// The plane size of the tensor's device.
pub fn plane_size(tensor: &CubeTensor) -> usize {
    tensor.client.properties().hardware.plane_size_max as usize
}

/// Whether the device multiplies this dtype by fragments of 16 × 16 × 16 with sums in f32, and has one plane size.
pub fn supported(tensor: &CubeTensor) -> bool {
    if !matches!(tensor.dtype, DType::F16 | DType::BF16) {
        return false;
    }
    let properties = tensor.client.properties();
    let hardware = &properties.hardware;
    let operand = element(tensor);
    let config = MmaConfig { a_type: operand, b_type: operand, cd_type: FloatKind::F32.into(), m: 16, n: 16, k: 16 };
    hardware.plane_size_min == hardware.plane_size_max
        && hardware.plane_size_max * 8 <= hardware.max_units_per_cube
        && FRAGMENT.is_multiple_of(hardware.plane_size_max as usize)
        && properties.features.matmul.cmma.contains(&config)
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mma {
    /// How the weights are stored.
    pub storage: Storage,
    /// Which rows a tile reads and writes.
    pub rows: Rows,
    /// What becomes of the sums.
    pub store: Store,
    /// Whether K is the weight's last dimension.
    pub by_k: bool,
    /// The tile.
    pub shape: Shape,
    /// The plane size.
    pub lanes: usize,
}

impl Mma {
    fn dual(self) -> bool {
        matches!(self.store, Store::Gated | Store::Both)
    }

    /// Elements of a line of the weights' tile.
    fn pitch(self) -> usize {
        PAD + if self.by_k { DEPTH } else { self.shape.width() }
    }

    /// Elements of the weights' tile.
    fn weights(self) -> usize {
        self.pitch() * if self.by_k { self.shape.width() } else { DEPTH }
    }

    fn layout(self) -> MatrixLayout {
        if self.by_k { MatrixLayout::ColMajor } else { MatrixLayout::RowMajor }
    }
}

/// See [`super::product::Product`]. Grid: (column tiles, row tiles).
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn mma_product<A: Float, B: Numeric, S: Float, Y: Float, NA: Size, NB: Size>(
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
    #[comptime] spec: Mma,
    #[define(A, B, S, Y)] _dtypes: [ElemType; 4],
) {
    let shape = comptime!(spec.shape);
    let (height, width) = comptime!((shape.height(), shape.width()));
    let dual = comptime!(spec.dual());
    let units = comptime!(spec.lanes * shape.planes());
    let x_pitch = comptime!(DEPTH + PAD);
    let vector = NA::value();

    let unit = UNIT_POS as usize;
    let lane = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    let row0 = plane / shape.planes_across * comptime!(SIDE * shape.down);
    let column0 = plane % shape.planes_across * comptime!(SIDE * shape.across);
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
    for row in range_stepped(unit, height, units) {
        let mut read = start;
        let mut write = start;
        if row < count {
            read = start + row;
            write = start + row;
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
        from[row] = read as u32;
        to[row] = write as u32;
    }

    let mut x_tile = Shared::<[Vector<A, NA>]>::new_aligned_slice(comptime!(height * x_pitch / vector), 128usize);
    let mut w_tile = Shared::<[Vector<A, NA>]>::new_aligned_slice(comptime!(spec.weights() / vector), 128usize);
    let mut w2_tile = Shared::<[Vector<A, NA>]>::new_aligned_slice(
        comptime!(if dual { spec.weights() / vector } else { 1 }),
        128usize,
    );
    let mut scratch = Shared::<[f32]>::new_aligned_slice(comptime!(FRAGMENT * shape.planes()), 128usize);

    let mut sums = Sequence::<Matrix<f32>>::new();
    let mut sums2 = Sequence::<Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(shape.down * shape.across) {
        sums.push(zeros());
        if comptime!(dual) {
            sums2.push(zeros());
        }
    }
    sync_cube();

    for k0 in range_stepped(0usize, k, DEPTH) {
        for at in range_stepped(unit, height * DEPTH / NA::value(), units) {
            let row = at / (DEPTH / NA::value());
            let depth = at % (DEPTH / NA::value()) * NA::value();
            let mut value = Vector::<A, NA>::zeroed();
            if row < count && k0 + depth < k {
                value = x[(from[row] as usize * k + k0 + depth) / NA::value()];
            }
            x_tile[(row * x_pitch + depth) / NA::value()] = value;
        }
        for at in range_stepped(unit, width * DEPTH / NA::value(), units) {
            let mut column = at / (DEPTH / NA::value());
            let mut depth = at % (DEPTH / NA::value()) * NA::value();
            let mut line = column;
            let mut place = depth;
            if comptime!(!spec.by_k) {
                depth = at / (width / NA::value());
                column = at % (width / NA::value()) * NA::value();
                line = depth;
                place = column;
            }
            let mut value = Vector::<A, NA>::zeroed();
            let mut value2 = Vector::<A, NA>::zeroed();
            if first_column + column < n && k0 + depth < k {
                let mut index = (expert * n + first_column + column) * k + k0 + depth;
                if comptime!(!spec.by_k) {
                    index = (expert * k + k0 + depth) * n + first_column + column;
                }
                value = operand::<A, B, S, NA, NB>(w, &scales, index, spec.storage);
                #[comptime]
                if let ComptimeOption::Some(w2) = w2 {
                    value2 = operand::<A, B, S, NA, NB>(w2, &scales2, index, spec.storage);
                }
            }
            let target = (line * comptime!(spec.pitch()) + place) / NA::value();
            w_tile[target] = value;
            if comptime!(dual) {
                w2_tile[target] = value2;
            }
        }
        sync_cube();

        #[unroll]
        for step in 0..comptime!(DEPTH / SIDE) {
            let depth = comptime!(step * SIDE);
            let mut xs = Sequence::<Matrix<A>>::new();
            #[unroll]
            for i in 0..comptime!(shape.down) {
                let at = ((row0 + i * SIDE) * x_pitch + depth) / NA::value();
                let end = comptime!(height * x_pitch / vector);
                xs.push(fragment::<A, NA>(&x_tile[at..end], x_pitch as u32, MatrixIdent::A, MatrixLayout::RowMajor));
            }
            #[unroll]
            for j in 0..comptime!(shape.across) {
                let column = column0 + j * SIDE;
                let mut at = (column * comptime!(spec.pitch()) + depth) / NA::value();
                if comptime!(!spec.by_k) {
                    at = (depth * comptime!(spec.pitch()) + column) / NA::value();
                }
                let end = comptime!(spec.weights() / vector);
                let weights = fragment::<A, NA>(
                    &w_tile[at..end],
                    comptime!(spec.pitch() as u32),
                    MatrixIdent::B,
                    comptime!(spec.layout()),
                );
                #[unroll]
                for i in 0..comptime!(shape.down) {
                    let sum = &sums[comptime!(i * shape.across + j)];
                    cmma::execute(&xs[i], &weights, sum, sum);
                }
                if comptime!(dual) {
                    let weights2 = fragment::<A, NA>(
                        &w2_tile[at..end],
                        comptime!(spec.pitch() as u32),
                        MatrixIdent::B,
                        comptime!(spec.layout()),
                    );
                    #[unroll]
                    for i in 0..comptime!(shape.down) {
                        let sum = &sums2[comptime!(i * shape.across + j)];
                        cmma::execute(&xs[i], &weights2, sum, sum);
                    }
                }
            }
        }
        sync_cube();
    }

    // fragment by fragment through shared memory: only there is it known which unit holds which element
    let each = comptime!(FRAGMENT / spec.lanes);
    #[unroll]
    for i in 0..comptime!(shape.down) {
        #[unroll]
        for j in 0..comptime!(shape.across) {
            let mut held = Array::<f32>::new(each);
            cmma::store(
                &mut scratch[plane * FRAGMENT..(plane + 1) * FRAGMENT],
                &sums[comptime!(i * shape.across + j)],
                SIDE as u32,
                MatrixLayout::RowMajor,
            );
            sync_cube();
            #[unroll]
            for e in 0..each {
                held[e] = scratch[plane * FRAGMENT + e * spec.lanes + lane];
            }
            if comptime!(dual) {
                sync_cube();
                cmma::store(
                    &mut scratch[plane * FRAGMENT..(plane + 1) * FRAGMENT],
                    &sums2[comptime!(i * shape.across + j)],
                    SIDE as u32,
                    MatrixLayout::RowMajor,
                );
                sync_cube();
            }
            #[unroll]
            for e in 0..each {
                let place = e * spec.lanes + lane;
                let row = row0 + i * SIDE + place / SIDE;
                let column = first_column + column0 + j * SIDE + place % SIDE;
                if row < count && column < n {
                    let target = to[row] as usize;
                    let mut sum = held[e];
                    #[comptime]
                    if let ComptimeOption::Some(shares) = &shares {
                        sum *= shares[target];
                    }
                    let at = target * n + column;
                    if comptime!(spec.store == Store::Plain) {
                        y[at] = Y::cast_from(sum);
                    } else if comptime!(spec.store == Store::Add) {
                        y[at] = Y::cast_from(f32::cast_from(y[at]) + sum);
                    } else if comptime!(spec.store == Store::Gated) {
                        y[at] = Y::cast_from(sum * sigmoid(sum) * scratch[plane * FRAGMENT + place]);
                    } else {
                        y[at] = Y::cast_from(sum);
                        y[m * n + at] = Y::cast_from(scratch[plane * FRAGMENT + place]);
                    }
                }
            }
            sync_cube();
        }
    }
}

/// See [`super::product::Outer`]. Grid: (column tiles, row tiles, experts).
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn mma_outer<A: Float, Y: Float, NA: Size>(
    a: &[Vector<A, NA>],
    b: &[Vector<A, NA>],
    plan: ComptimeOption<&[u32]>,
    y: &mut [Y],
    rows: usize,
    m: usize,
    n: usize,
    table: usize,
    order: usize,
    choices: usize,
    #[comptime] spec: Reduce,
    #[comptime] shape: Shape,
    #[comptime] plane_lanes: usize,
    #[define(A, Y)] _dtypes: [ElemType; 2],
) {
    let (height, width) = comptime!((shape.height(), shape.width()));
    let units = comptime!(plane_lanes * shape.planes());
    let (a_pitch, b_pitch) = comptime!((height + PAD, width + PAD));
    let vector = NA::value();

    let unit = UNIT_POS as usize;
    let lane = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    let row0 = plane / shape.planes_across * comptime!(SIDE * shape.down);
    let column0 = plane % shape.planes_across * comptime!(SIDE * shape.across);
    let i0 = CUBE_POS_Y as usize * height;
    let j0 = CUBE_POS_X as usize * width;
    let expert = CUBE_POS_Z as usize;

    let mut start = 0usize;
    let mut count = rows;
    #[comptime]
    if let ComptimeOption::Some(plan) = &plan {
        start = plan[table + expert * 3 + 1] as usize;
        count = plan[table + expert * 3 + 2] as usize;
    }

    let mut a_tile = Shared::<[Vector<A, NA>]>::new_aligned_slice(comptime!(DEPTH * a_pitch / vector), 128usize);
    let mut b_tile = Shared::<[Vector<A, NA>]>::new_aligned_slice(comptime!(DEPTH * b_pitch / vector), 128usize);
    let mut scratch = Shared::<[f32]>::new_aligned_slice(comptime!(FRAGMENT * shape.planes()), 128usize);
    let mut sums = Sequence::<Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(shape.down * shape.across) {
        sums.push(zeros());
    }

    for p0 in range_stepped(0usize, count, DEPTH) {
        for at in range_stepped(unit, height * DEPTH / NA::value(), units) {
            let depth = at / (height / NA::value());
            let column = at % (height / NA::value()) * NA::value();
            let mut value = Vector::<A, NA>::zeroed();
            if p0 + depth < count && i0 + column < m {
                let mut row = start + p0 + depth;
                #[comptime]
                if let ComptimeOption::Some(plan) = &plan {
                    if comptime!(spec.a_by_token) {
                        row = plan[order + row] as usize / choices;
                    }
                }
                value = a[(row * m + i0 + column) / NA::value()];
            }
            a_tile[(depth * a_pitch + column) / NA::value()] = value;
        }
        for at in range_stepped(unit, width * DEPTH / NA::value(), units) {
            let depth = at / (width / NA::value());
            let column = at % (width / NA::value()) * NA::value();
            let mut value = Vector::<A, NA>::zeroed();
            if p0 + depth < count && j0 + column < n {
                let mut row = start + p0 + depth;
                #[comptime]
                if let ComptimeOption::Some(plan) = &plan {
                    if comptime!(spec.b_by_token) {
                        row = plan[order + row] as usize / choices;
                    }
                }
                value = b[(row * n + j0 + column) / NA::value()];
            }
            b_tile[(depth * b_pitch + column) / NA::value()] = value;
        }
        sync_cube();

        #[unroll]
        for step in 0..comptime!(DEPTH / SIDE) {
            let mut left = Sequence::<Matrix<A>>::new();
            #[unroll]
            for i in 0..comptime!(shape.down) {
                let at = (step * SIDE * a_pitch + row0 + i * SIDE) / NA::value();
                let end = comptime!(DEPTH * a_pitch / vector);
                left.push(fragment::<A, NA>(&a_tile[at..end], a_pitch as u32, MatrixIdent::A, MatrixLayout::ColMajor));
            }
            #[unroll]
            for j in 0..comptime!(shape.across) {
                let at = (step * SIDE * b_pitch + column0 + j * SIDE) / NA::value();
                let end = comptime!(DEPTH * b_pitch / vector);
                let right = fragment::<A, NA>(&b_tile[at..end], b_pitch as u32, MatrixIdent::B, MatrixLayout::RowMajor);
                #[unroll]
                for i in 0..comptime!(shape.down) {
                    let sum = &sums[comptime!(i * shape.across + j)];
                    cmma::execute(&left[i], &right, sum, sum);
                }
            }
        }
        sync_cube();
    }

    let each = comptime!(FRAGMENT / plane_lanes);
    #[unroll]
    for i in 0..comptime!(shape.down) {
        #[unroll]
        for j in 0..comptime!(shape.across) {
            cmma::store(
                &mut scratch[plane * FRAGMENT..(plane + 1) * FRAGMENT],
                &sums[comptime!(i * shape.across + j)],
                SIDE as u32,
                MatrixLayout::RowMajor,
            );
            sync_cube();
            #[unroll]
            for e in 0..each {
                let place = e * plane_lanes + lane;
                let row = i0 + row0 + i * SIDE + place / SIDE;
                let column = j0 + column0 + j * SIDE + place % SIDE;
                if row < m && column < n {
                    let at = (expert * m + row) * n + column;
                    let mut sum = scratch[plane * FRAGMENT + place];
                    if comptime!(spec.add) {
                        sum += f32::cast_from(y[at]);
                    }
                    y[at] = Y::cast_from(sum);
                }
            }
            sync_cube();
        }
    }
}

/// A fragment of sums, zero.
#[cube]
fn zeros() -> Matrix<f32> {
    Matrix::<f32>::from_value(MatrixIdent::Accumulator, SIDE, SIDE, SIDE, MatrixLayout::Undefined, 0.0f32)
}

/// A fragment of an operand, from a tile in shared memory.
#[cube]
fn fragment<A: Float, NA: Size>(
    tile: &[Vector<A, NA>],
    pitch: u32,
    #[comptime] ident: MatrixIdent,
    #[comptime] layout: MatrixLayout,
) -> Matrix<A> {
    // SAFETY: the next line fills all of it.
    let mut matrix = unsafe { Matrix::<A>::uninitialized(ident, SIDE, SIDE, SIDE, layout) };
    cmma::load(&mut matrix, tile, pitch);
    matrix
}

/// `NA` weights along the stored direction in the dtype of x: floats as they are, or one word of quantized values.
#[cube]
fn operand<A: Float, B: Numeric, S: Float, NA: Size, NB: Size>(
    w: &[Vector<B, NB>],
    scales: &ComptimeOption<&[S]>,
    at: usize,
    #[comptime] storage: Storage,
) -> Vector<A, NA> {
    let packed = w[at / NA::value()];
    let mut values = Vector::<A, NA>::zeroed();
    if comptime!(storage == Storage::Float) {
        values = Vector::<A, NA>::cast_from(packed);
    } else {
        #[comptime]
        if let ComptimeOption::Some(scales) = scales {
            let scale = f32::cast_from(scales[at / comptime!(storage.block())]);
            let bits = u32::cast_from(packed.extract(0usize));
            #[unroll]
            for i in 0..NA::value() {
                values.insert(i, A::cast_from(word_value(bits, i as u32, storage) * scale));
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cubecl::ir::{
        AddressType, DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties, MemoryDeviceProperties,
        TargetProperties, UIntKind, features::Features,
    };

    use super::*;

    /// A device with tensor cores, as CubeCL's CUDA runtime describes one; none is here.
    fn properties() -> Arc<DeviceProperties> {
        let hardware = HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 64,
            max_shared_memory_size: 32 << 10,
            max_cube_count: (65_535, 65_535, 65_535),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(132),
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            last_level_cache_size: None,
            max_vector_size: VectorSize::MAX,
            cube_mma_reserved_shared_memory: 0,
        };
        let mut features = Features::default();
        for kind in [FloatKind::BF16, FloatKind::F16] {
            let operand: ElemType = kind.into();
            let sums: ElemType = FloatKind::F32.into();
            features.matmul.cmma.insert(MmaConfig {
                a_type: operand,
                b_type: operand,
                cd_type: sums,
                m: 16,
                n: 16,
                k: 16,
            });
        }
        Arc::new(DeviceProperties::new(
            features,
            MemoryDeviceProperties::new(1 << 30, 512),
            hardware,
            cubecl::profile::TimingMethod::Device,
            DeviceIdentity { name: "none".into(), fingerprint: "none".into(), physical: None },
        ))
    }

    fn settings(lanes: usize, planes: usize) -> KernelSettings {
        KernelSettings::new(
            *CubeDim::new_2d(lanes as u32, planes as u32),
            cubecl::ExecutionMode::Unchecked,
            AddressType::U32,
        )
    }

    const BUFFER: BufferCompilationArg = BufferCompilationArg { inplace: None };

    fn option<T: CubePrimitive>(some: bool) -> ComptimeOptionCompilationArg<&'static [T]> {
        if some { ComptimeOptionCompilationArg::Some(BUFFER) } else { ComptimeOptionCompilationArg::None }
    }

    /// Every shape, storage and destination of the sums that operations launch becomes a kernel; a fragment that the
    /// device has not, or a vector that does not divide a tile, would panic here.
    #[test]
    fn every_variant_expands() {
        let float = |kind: FloatKind| -> ElemType { kind.into() };
        let mut count = 0;
        for (storage, vector) in [
            (Storage::Float, 8),
            (Storage::Float, 1),
            (Storage::Int8 { block: 32 }, 4),
            (Storage::Int4 { block: 64 }, 8),
        ] {
            for (rows, store, by_k) in [
                (Rows::All, Store::Plain, true),
                (Rows::Gather, Store::Gated, true),
                (Rows::Gather, Store::Both, true),
                (Rows::Scatter, Store::Plain, true),
                (Rows::Scatter, Store::Add, false),
            ] {
                if !by_k && storage != Storage::Float {
                    continue;
                }
                for height in [16, 64, 128] {
                    let dual = matches!(store, Store::Gated | Store::Both);
                    let shape = Shape::choose(height, dual);
                    assert_eq!(shape.height(), height);
                    let spec = Mma { storage, rows, store, by_k, shape, lanes: 32 };
                    let operand = float(FloatKind::BF16);
                    let (w_vector, weight) = match storage {
                        Storage::Float => (vector, operand),
                        _ => (1, ElemType::UInt(UIntKind::U32)),
                    };
                    let kernel = mma_product::MmaProduct::new(
                        settings(32, shape.planes()),
                        properties(),
                        Arc::new(TargetProperties::default()),
                        BUFFER,
                        BUFFER,
                        option(dual),
                        option(storage != Storage::Float),
                        option(dual && storage != Storage::Float),
                        option(rows != Rows::All),
                        option(rows == Rows::Scatter),
                        BUFFER,
                        (),
                        (),
                        (),
                        (),
                        (),
                        vector,
                        w_vector,
                        spec,
                        [operand, weight, float(FloatKind::F16), float(FloatKind::F32)],
                    );
                    let _ = kernel.define();
                    count += 1;
                }
            }
        }
        for a_by_token in [false, true] {
            let spec = Reduce { a_by_token, b_by_token: !a_by_token, add: a_by_token };
            let kernel = mma_outer::MmaOuter::new(
                settings(32, Shape::OUTER.planes()),
                properties(),
                Arc::new(TargetProperties::default()),
                BUFFER,
                BUFFER,
                option(true),
                BUFFER,
                (),
                (),
                (),
                (),
                (),
                (),
                8,
                spec,
                Shape::OUTER,
                32,
                [float(FloatKind::F16), float(FloatKind::F16)],
            );
            let _ = kernel.define();
            count += 1;
        }
        assert_eq!(count, 2 * 15 + 2 * 12 + 2);
    }
}
