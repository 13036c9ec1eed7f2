//! Matrix products with stored weights: what is multiplied, which rows, and which kernel takes it.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::{
    ir::{ElemType, UIntKind},
    prelude::*,
};

use super::{buffer, element, empty, gemv, mma, reduce, tile, vector};
use crate::base::packed::Format;

/// How a weight matrix lies in memory, `[.., out, in]` in rows.
///
/// Quantized values are biased, packed along `in` in 32-bit words, the first in the lowest bits; the scale of `block`
/// values stands in a tensor `[.., out, in / block]`. `block` is a multiple of 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// f32, bf16 or f16 elements.
    Float,
    /// Four values of -127..=127 a word, plus 128.
    Int8 {
        /// Values that share a scale.
        block: usize,
    },
    /// Eight values of -8..=7 a word, plus 8.
    Int4 {
        /// Values that share a scale.
        block: usize,
    },
}

impl Storage {
    /// That of a weight's format.
    pub fn of(format: Format) -> Self {
        match format {
            Format::F32 | Format::Bf16 => Storage::Float,
            Format::Int8 { block } => Storage::Int8 { block },
            Format::Int4 { block } => Storage::Int4 { block },
        }
    }

    /// Values in one stored element.
    pub fn per_word(self) -> usize {
        match self {
            Storage::Float => 1,
            Storage::Int8 { .. } => 4,
            Storage::Int4 { .. } => 8,
        }
    }

    /// Values that share a scale; 1 for floats.
    pub fn block(self) -> usize {
        match self {
            Storage::Float => 1,
            Storage::Int8 { block } | Storage::Int4 { block } => block,
        }
    }

    fn bits(self) -> u32 {
        match self {
            Storage::Float => 32,
            Storage::Int8 { .. } => 8,
            Storage::Int4 { .. } => 4,
        }
    }
}

/// Which rows a tile reads and writes, when a [`Plan`] groups them by expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rows {
    /// Row `i` of x gives row `i` of y.
    All,
    /// Sorted position `p` reads the row of its slot's token and writes row `p`.
    Gather,
    /// Sorted position `p` reads row `p` and writes the row of its slot.
    Scatter,
}

/// What becomes of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Store {
    /// `y = sum`, times the slot's share when there are shares.
    Plain,
    /// `y += sum`.
    Add,
    /// Two weights: `y = silu(sum1) · sum2`.
    Gated,
    /// Two weights: `y [2, m, n]`, both sums.
    Both,
}

/// Value `i` of a word in f32, without its scale. Exact: the bits of the value become the mantissa of 2²³ + value.
#[cube]
pub fn word_value(word: u32, i: u32, #[comptime] storage: Storage) -> f32 {
    let bits = comptime!(storage.bits());
    let mask = comptime!((1u32 << bits) - 1);
    let offset = comptime!(8_388_608.0f32 + (1u32 << (bits - 1)) as f32);
    let mantissa = ((word >> (i * bits)) & mask) | 0x4B00_0000u32;
    f32::reinterpret(mantissa) - offset
}

/// Value `at` of a stored matrix, in f32.
#[cube]
pub fn stored_value<B: Numeric, S: Float>(
    w: &[B],
    scales: &ComptimeOption<&[S]>,
    at: usize,
    #[comptime] storage: Storage,
) -> f32 {
    let mut value = 0.0f32;
    if comptime!(storage == Storage::Float) {
        value = f32::cast_from(w[at]);
    } else {
        #[comptime]
        if let ComptimeOption::Some(scales) = scales {
            let word = u32::cast_from(w[at / comptime!(storage.per_word())]);
            let scale = f32::cast_from(scales[at / comptime!(storage.block())]);
            value = word_value(word, (at % comptime!(storage.per_word())) as u32, storage) * scale;
        }
    }
    value
}

/// Stored weights on a device.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Elements, or words of quantized values, in rows.
    pub values: CubeTensor,
    /// Scales of quantized values.
    pub scales: Option<CubeTensor>,
    /// How they are stored.
    pub storage: Storage,
}

impl Stored {
    /// Floats as they are.
    pub fn float(values: CubeTensor) -> Self {
        Self { values: super::rows(values), scales: None, storage: Storage::Float }
    }

    /// Quantized words with their scales.
    pub fn quantized(words: CubeTensor, scales: CubeTensor, storage: Storage) -> Self {
        Self { values: super::rows(words), scales: Some(super::rows(scales)), storage }
    }

    fn element(&self) -> ElemType {
        match self.storage {
            Storage::Float => element(&self.values),
            _ => ElemType::UInt(UIntKind::U32),
        }
    }
}

/// Rows grouped by the expert that they chose, on the host.
///
/// A slot is `token · k + rank`. Slots sorted by expert (stable) stand in `order`; tiles cut every expert's run into
/// pieces of at most `tile_rows`; `table` has one entry for every expert, chosen or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grouping {
    /// Slots, by expert.
    pub order: Vec<u32>,
    /// (expert, first position in `order`, rows) of every tile.
    pub tiles: Vec<[u32; 3]>,
    /// (expert, first position, rows) of every expert.
    pub table: Vec<[u32; 3]>,
}

impl Grouping {
    /// Groups `choices` over `experts` experts. Panics when a choice names no expert.
    pub fn new(choices: &[u32], experts: usize, tile_rows: usize) -> Self {
        let mut counts = vec![0u32; experts];
        for &expert in choices {
            counts[expert as usize] += 1;
        }
        let mut table = Vec::with_capacity(experts);
        let mut tiles = Vec::new();
        let mut next = Vec::with_capacity(experts);
        let mut start = 0;
        for (expert, &count) in counts.iter().enumerate() {
            table.push([expert as u32, start, count]);
            next.push(start);
            for offset in (0..count).step_by(tile_rows) {
                tiles.push([expert as u32, start + offset, (count - offset).min(tile_rows as u32)]);
            }
            start += count;
        }
        let mut order = vec![0; choices.len()];
        for (slot, &expert) in choices.iter().enumerate() {
            order[next[expert as usize] as usize] = slot as u32;
            next[expert as usize] += 1;
        }
        Self { order, tiles, table }
    }
}

/// A [`Grouping`] on the device, in one buffer: tiles, table, order.
#[derive(Debug, Clone)]
pub struct Plan {
    buffer: CubeTensor,
    tiles: usize,
    /// Where the table of experts begins in the buffer.
    pub table_at: usize,
    /// Where the order begins in the buffer.
    pub order_at: usize,
    tile_rows: usize,
    experts: usize,
    choices: usize,
}

impl Plan {
    /// Groups and uploads: one copy to the device. `like` names the device and the dtype of the products.
    pub fn new(like: &CubeTensor, choices: &[u32], k: usize, experts: usize) -> Self {
        let mut counts = vec![0usize; experts];
        for &expert in choices {
            counts[expert as usize] += 1;
        }
        let most = counts.iter().copied().max().unwrap_or(0);
        let chosen = counts.iter().filter(|&&c| c > 0).count().max(1);
        let mean = choices.len().div_ceil(chosen);
        let tile_rows = if mean <= FEW_ROWS / 2 {
            most.clamp(1, FEW_ROWS).next_power_of_two()
        } else if mma::supported(like) {
            mma::tile_rows(mean)
        } else {
            tile::tile_rows(mean)
        };
        let grouping = Grouping::new(choices, experts, tile_rows);
        let words: Vec<u32> =
            grouping.tiles.iter().chain(&grouping.table).flatten().chain(&grouping.order).copied().collect();
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let buffer = CubeTensor::new_contiguous(
            like.client.clone(),
            like.device.clone(),
            [words.len()].into(),
            like.client.create_from_slice(&bytes),
            DType::U32,
        );
        let (tiles, table) = (grouping.tiles.len(), grouping.table.len());
        Self { buffer, tiles, table_at: 3 * tiles, order_at: 3 * (tiles + table), tile_rows, experts, choices: k }
    }

    /// A plan that a kernel wrote: tiles, which may have no rows, and the order at `order_at`. There is no table of experts,
    /// which only [`Outer`] asks for.
    pub(crate) fn on_device(
        buffer: CubeTensor,
        tiles: usize,
        order_at: usize,
        tile_rows: usize,
        experts: usize,
        k: usize,
    ) -> Self {
        debug_assert!(tile_rows <= FEW_ROWS, "only the kernel of few rows passes over a tile without rows");
        Self { buffer, tiles, table_at: usize::MAX, order_at, tile_rows, experts, choices: k }
    }

    /// The buffer as a launch argument.
    pub fn argument(&self) -> BufferArg {
        buffer(&self.buffer)
    }
}

/// Rows that go to the kernel of few rows.
pub const FEW_ROWS: usize = 8;

/// `y = x · Wᵀ` (or `x · W`), by rows or by expert.
#[derive(Debug)]
pub struct Product<'a> {
    /// `[.., k]`, in rows.
    pub x: &'a CubeTensor,
    /// `[experts, n, k]`, or `[experts, k, n]` when not `by_k`.
    pub w: &'a Stored,
    /// A second weight of the same shape, when `store` wants one.
    pub w2: Option<&'a Stored>,
    /// Rows by expert; without a plan there is one matrix, and `m` rows.
    pub plan: Option<&'a Plan>,
    /// Factor of each slot, f32, with [`Rows::Scatter`].
    pub shares: Option<&'a CubeTensor>,
    /// Which rows are read and written.
    pub rows: Rows,
    /// What becomes of the sums.
    pub store: Store,
    /// Whether K is the weight's last dimension.
    pub by_k: bool,
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

impl Product<'_> {
    /// The product in a new tensor `[m, n]` (`[2, m, n]` for [`Store::Both`]) of `dtype`.
    pub fn run(&self, dtype: DType) -> CubeTensor {
        let out = match self.store {
            Store::Both => empty(self.x, [2, self.m, self.n], dtype),
            _ => empty(self.x, [self.m, self.n], dtype),
        };
        self.run_into(&out);
        out
    }

    /// The product into `out` (added to it, for [`Store::Add`]).
    pub fn run_into(&self, out: &CubeTensor) {
        if self.m == 0 || self.n == 0 || self.plan.is_some_and(|p| p.tiles == 0) {
            return;
        }
        debug_assert!(self.rows == Rows::All || self.plan.is_some());
        let rows = self.plan.map_or(self.m, |p| p.tile_rows);
        let half = matches!(self.x.dtype, DType::F16 | DType::BF16);
        if rows <= FEW_ROWS && self.by_k && self.store != Store::Add {
            self.launch_few(out, rows.next_power_of_two());
        } else if half && self.halves() && mma::supported(self.x) {
            self.launch_mma(out);
        } else {
            self.launch_tile(out);
        }
    }

    /// Whether the weights can be operands of the tensor cores beside x.
    fn halves(&self) -> bool {
        self.w.storage != Storage::Float || self.w.values.dtype == self.x.dtype
    }

    fn dtypes(&self, out: &CubeTensor) -> [ElemType; 4] {
        let scale = self.w.scales.as_ref().map_or(ElemType::Float(cubecl::ir::FloatKind::F32), element);
        [element(self.x), self.w.element(), scale, element(out)]
    }

    fn launch_few(&self, out: &CubeTensor, max_rows: usize) {
        let storage = self.w.storage;
        let halves = [self.x.dtype != DType::F32, self.w.values.dtype != DType::F32];
        let (spec, mut x_vector, mut w_vector) = gemv::Gemv::new(storage, self.rows, self.store, max_rows, halves);
        if storage == Storage::Float {
            (x_vector, w_vector) = (vector(self.k, x_vector), vector(self.k, w_vector));
        }
        let tiles = self.plan.map_or(1, |p| p.tiles);
        // SAFETY: the kernel reads and writes only rows below m, columns below n and K below k, which the tensors have.
        unsafe {
            gemv::few_rows::launch_unchecked(
                &self.x.client,
                CubeCount::Static(self.n.div_ceil(gemv::COLUMNS) as u32, tiles as u32, 1),
                CubeDim::new_1d((gemv::LANES * gemv::COLUMNS) as u32),
                x_vector,
                w_vector,
                buffer(self.x),
                buffer(&self.w.values),
                self.w2.map(|w| buffer(&w.values)).into(),
                self.w.scales.as_ref().map(buffer).into(),
                self.w2.and_then(|w| w.scales.as_ref()).map(buffer).into(),
                self.plan.map(|p| p.argument()).into(),
                self.shares.map(buffer).into(),
                buffer(out),
                self.m,
                self.n,
                self.k,
                self.plan.map_or(0, |p| p.order_at),
                self.plan.map_or(1, |p| p.choices),
                spec,
                self.dtypes(out),
            );
        }
    }

    fn launch_tile(&self, out: &CubeTensor) {
        let dual = self.w2.is_some();
        let rows = self.plan.map_or(self.m, |p| p.tile_rows);
        let spec = tile::Tile {
            storage: self.w.storage,
            rows: self.rows,
            store: self.store,
            by_k: self.by_k,
            shape: tile::Shape::choose(rows, self.n, dual),
        };
        let (height, width) = (spec.shape.height(), spec.shape.width());
        let tiles = self.plan.map_or(self.m.div_ceil(height), |p| p.tiles);
        debug_assert!(self.plan.is_none_or(|p| p.tile_rows <= height));
        // SAFETY: the kernel reads and writes only rows below m, columns below n and K below k, which the tensors have.
        unsafe {
            tile::tile_product::launch_unchecked(
                &self.x.client,
                CubeCount::Static(self.n.div_ceil(width) as u32, tiles as u32, 1),
                CubeDim::new_1d(tile::UNITS as u32),
                buffer(self.x),
                buffer(&self.w.values),
                self.w2.map(|w| buffer(&w.values)).into(),
                self.w.scales.as_ref().map(buffer).into(),
                self.w2.and_then(|w| w.scales.as_ref()).map(buffer).into(),
                self.plan.map(|p| p.argument()).into(),
                self.shares.map(buffer).into(),
                buffer(out),
                self.m,
                self.n,
                self.k,
                self.plan.map_or(0, |p| p.order_at),
                self.plan.map_or(1, |p| p.choices),
                spec,
                self.dtypes(out),
            );
        }
    }

    fn launch_mma(&self, out: &CubeTensor) {
        let dual = self.w2.is_some();
        let rows = self.plan.map_or(self.m, |p| p.tile_rows);
        let storage = self.w.storage;
        let along = if self.by_k { self.k } else { self.n };
        let x_vector = match storage {
            Storage::Float => vector(self.k, 8).min(vector(along, 8)),
            _ => storage.per_word(),
        };
        let w_vector = if storage == Storage::Float { x_vector } else { 1 };
        let spec = mma::Mma {
            storage,
            rows: self.rows,
            store: self.store,
            by_k: self.by_k,
            shape: mma::Shape::choose(rows, dual),
            lanes: mma::plane_size(self.x),
        };
        let (height, width) = (spec.shape.height(), spec.shape.width());
        let tiles = self.plan.map_or(self.m.div_ceil(height), |p| p.tiles);
        // SAFETY: the kernel reads and writes only rows below m, columns below n and K below k, which the tensors have.
        unsafe {
            mma::mma_product::launch_unchecked(
                &self.x.client,
                CubeCount::Static(self.n.div_ceil(width) as u32, tiles as u32, 1),
                CubeDim::new_2d(spec.lanes as u32, spec.shape.planes() as u32),
                x_vector,
                w_vector,
                buffer(self.x),
                buffer(&self.w.values),
                self.w2.map(|w| buffer(&w.values)).into(),
                self.w.scales.as_ref().map(buffer).into(),
                self.w2.and_then(|w| w.scales.as_ref()).map(buffer).into(),
                self.plan.map(|p| p.argument()).into(),
                self.shares.map(buffer).into(),
                buffer(out),
                self.m,
                self.n,
                self.k,
                self.plan.map_or(0, |p| p.order_at),
                self.plan.map_or(1, |p| p.choices),
                spec,
                self.dtypes(out),
            );
        }
    }
}

/// `y = aᵀ · b`: sums over rows, of all rows or of each expert's.
#[derive(Debug)]
pub struct Outer<'a> {
    /// `[rows, m]`, in rows.
    pub a: &'a CubeTensor,
    /// `[rows, n]`, in rows.
    pub b: &'a CubeTensor,
    /// Rows by expert: `y [experts, m, n]`; an expert that nobody chose gets zeros.
    pub plan: Option<&'a Plan>,
    /// Whether a has a row for every token (else one for every sorted position).
    pub a_by_token: bool,
    /// Whether b has a row for every token.
    pub b_by_token: bool,
    /// Add to what is there.
    pub add: bool,
    /// Rows in all.
    pub rows: usize,
    /// Columns of a.
    pub m: usize,
    /// Columns of b.
    pub n: usize,
}

impl Outer<'_> {
    /// The product into a new tensor `[m, n]` or `[experts, m, n]` of `dtype`.
    pub fn run(&self, dtype: DType) -> CubeTensor {
        let out = match self.plan {
            Some(plan) => empty(self.a, [plan.experts, self.m, self.n], dtype),
            None => empty(self.a, [self.m, self.n], dtype),
        };
        self.run_into(&out);
        out
    }

    /// The product into `out`.
    pub fn run_into(&self, out: &CubeTensor) {
        if self.m == 0 || self.n == 0 {
            return;
        }
        let half = matches!(self.a.dtype, DType::F16 | DType::BF16) && self.a.dtype == self.b.dtype;
        let experts = self.plan.map_or(1, |p| p.experts);
        let (table, order, choices) = self.plan.map_or((0, 0, 1), |p| (p.table_at, p.order_at, p.choices));
        let flags = reduce::Reduce { a_by_token: self.a_by_token, b_by_token: self.b_by_token, add: self.add };
        let dtypes = [element(self.a), element(self.b), element(out)];
        let count = |height: usize, width: usize| {
            CubeCount::Static(self.n.div_ceil(width) as u32, self.m.div_ceil(height) as u32, experts as u32)
        };
        if half && mma::supported(self.a) {
            let shape = mma::Shape::OUTER;
            let lanes = mma::plane_size(self.a);
            // SAFETY: the kernel reads and writes only columns below m and n and rows that the plan names.
            unsafe {
                mma::mma_outer::launch_unchecked(
                    &self.a.client,
                    count(shape.height(), shape.width()),
                    CubeDim::new_2d(lanes as u32, shape.planes() as u32),
                    vector(self.m, 8).min(vector(self.n, 8)),
                    buffer(self.a),
                    buffer(self.b),
                    self.plan.map(|p| p.argument()).into(),
                    buffer(out),
                    self.rows,
                    self.m,
                    self.n,
                    table,
                    order,
                    choices,
                    flags,
                    shape,
                    lanes,
                    [dtypes[0], dtypes[2]],
                );
            }
        } else {
            // SAFETY: as above.
            unsafe {
                reduce::outer::launch_unchecked(
                    &self.a.client,
                    count(reduce::TILE, reduce::TILE),
                    CubeDim::new_1d(tile::UNITS as u32),
                    buffer(self.a),
                    buffer(self.b),
                    self.plan.map(|p| p.argument()).into(),
                    buffer(out),
                    self.rows,
                    self.m,
                    self.n,
                    table,
                    order,
                    choices,
                    flags,
                    dtypes,
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Grouping;

    #[test]
    fn slots_sorted_by_expert_cut_into_tiles() {
        let grouping = Grouping::new(&[2, 0, 2, 1, 2, 0], 4, 2);
        assert_eq!(grouping.order, [1, 5, 3, 0, 2, 4]);
        assert_eq!(grouping.table, [[0, 0, 2], [1, 2, 1], [2, 3, 3], [3, 6, 0]]);
        assert_eq!(grouping.tiles, [[0, 0, 2], [1, 2, 1], [2, 3, 2], [2, 5, 1]]);
    }

    #[test]
    fn nothing_chosen() {
        let grouping = Grouping::new(&[], 2, 4);
        assert!(grouping.order.is_empty() && grouping.tiles.is_empty());
        assert_eq!(grouping.table, [[0, 0, 0], [1, 0, 0]]);
    }
}
