//! The matrix products behind linear, experts and log_prob.

use cubecl::ir::{ElemType, FloatKind, UIntKind};
use m1_kernels::base::gpu::product::{Rows, Storage, Store};
use m1_kernels::base::gpu::{gemv, mma, reduce, tile};

use crate::catalogue::{BUFFER, Entry, TYPES, option, settings};
use crate::target::{properties, target};

/// Rows that the kernel of few rows is made for.
const FEW: [usize; 4] = [1, 2, 4, 8];

/// What an operation asks of a product.
#[derive(Clone, Copy)]
struct Use {
    name: &'static str,
    rows: Rows,
    store: Store,
    by_k: bool,
}

impl Use {
    const fn new(name: &'static str, rows: Rows, store: Store, by_k: bool) -> Self {
        Self { name, rows, store, by_k }
    }

    fn dual(self) -> bool {
        matches!(self.store, Store::Gated | Store::Both)
    }

    fn planned(self) -> bool {
        self.rows != Rows::All
    }

    /// Rows of the tiles that it is cut into: a plan without tensor cores asks for no more than 64.
    fn heights(self, half: bool) -> &'static [usize] {
        if self.planned() && !half { &[16, 64] } else { &[16, 64, 128] }
    }

    /// Whether rows are weighed by their slots' shares: experts' last product, forward.
    fn shared(self) -> bool {
        self.rows == Rows::Scatter && self.by_k
    }

    /// The result's type: experts sum slots, and keep what backward needs, in f32.
    fn result(self, operand: FloatKind) -> ElemType {
        match (self.rows, self.store) {
            (Rows::All, Store::Plain) | (_, Store::Gated) => operand.into(),
            _ => FloatKind::F32.into(),
        }
    }
}

const LINEAR: Use = Use::new("linear", Rows::All, Store::Plain, true);
const BACK: Use = Use::new("linear d_x", Rows::All, Store::Plain, false);
const HEAD: Use = Use::new("log_prob d_x", Rows::All, Store::Add, false);
const GATED: Use = Use::new("experts w1, w3", Rows::Gather, Store::Gated, true);
const DOWN: Use = Use::new("experts w2", Rows::Scatter, Store::Plain, true);
const BOTH: Use = Use::new("experts w1, w3 again", Rows::Gather, Store::Both, true);
const HIDDEN: Use = Use::new("experts d_h", Rows::Gather, Store::Plain, false);
const INPUT: Use = Use::new("experts d_x by w1", Rows::Scatter, Store::Plain, false);
const MORE_INPUT: Use = Use::new("experts d_x by w3", Rows::Scatter, Store::Add, false);

/// With weights in any storage.
const FORWARD: &[Use] = &[LINEAR, GATED, DOWN];
/// With floats, a few rows.
const FEW_FLOATS: &[Use] = &[LINEAR, GATED, DOWN, BOTH];
/// With floats in the dtype of x, more rows.
const EXPERTS: &[Use] = &[GATED, DOWN, BOTH, HIDDEN, INPUT, MORE_INPUT];
/// In f32, whose weights may be bf16. Halves go to Burn's product instead.
const WIDE: &[Use] = &[LINEAR, BACK, HEAD];

/// The stored weights: a name, how, their element type and that of their scales.
type Weights = (&'static str, Storage, ElemType, ElemType);

/// Floats of `kind`.
fn floats(kind: FloatKind, name: &'static str) -> Weights {
    (name, Storage::Float, kind.into(), FloatKind::F32.into())
}

/// Words of 8 or 4 bits a value, and how many values share a scale.
fn packed() -> [Weights; 4] {
    let word = ElemType::UInt(UIntKind::U32);
    [
        ("int8 by 32", Storage::Int8 { block: 32 }),
        ("int8 by 64", Storage::Int8 { block: 64 }),
        ("int4 by 32", Storage::Int4 { block: 32 }),
        ("int4 by 64", Storage::Int4 { block: 64 }),
    ]
    .map(|(name, storage)| (name, storage, word, FloatKind::F16.into()))
}

/// All of them.
pub fn entries() -> Vec<Entry> {
    let mut all = Vec::new();
    for (dtype, kind) in TYPES {
        let half = kind != FloatKind::F32;
        let mut add = |weights: Weights, few: &[Use], more: &[Use]| {
            let few = few.iter().flat_map(|&asked| FEW.map(|count| (asked, count)));
            all.extend(few.map(|(asked, count)| few_rows(dtype, kind, weights, asked, count)));
            let more = more.iter().flat_map(|&asked| asked.heights(half).iter().map(move |&height| (asked, height)));
            let product = if half { mma_product } else { tile_product };
            all.extend(more.map(|(asked, height)| product(dtype, kind, weights, asked, height)));
        };
        add(floats(kind, dtype), FEW_FLOATS, EXPERTS);
        packed().into_iter().for_each(|weights| add(weights, FORWARD, FORWARD));
        if half {
            all.push(mma_outer(dtype, kind, "experts d_w1, d_w3", D_W1));
            all.push(mma_outer(dtype, kind, "experts d_w2", D_W2));
            continue;
        }
        add(floats(kind, dtype), &[], WIDE);
        add(floats(FloatKind::BF16, "bf16"), &[LINEAR], WIDE);
        all.push(outer("linear, log_prob", ALL_ROWS, FloatKind::F32));
        all.push(outer("log_prob, added", reduce::Reduce { add: true, ..ALL_ROWS }, FloatKind::F32));
        all.push(outer("linear, weights bf16", ALL_ROWS, FloatKind::BF16));
        all.push(outer("experts d_w1, d_w3", D_W1, FloatKind::F32));
        all.push(outer("experts d_w2", D_W2, FloatKind::F32));
    }
    all
}

/// Sums over all rows, and over those of each expert.
const ALL_ROWS: reduce::Reduce = reduce::Reduce { a_by_token: false, b_by_token: false, add: false };
const D_W1: reduce::Reduce = reduce::Reduce { b_by_token: true, ..ALL_ROWS };
const D_W2: reduce::Reduce = reduce::Reduce { a_by_token: true, ..ALL_ROWS };

/// Whether the rows of a sum are those of an expert.
fn planned(spec: reduce::Reduce) -> bool {
    spec.a_by_token || spec.b_by_token
}

fn few_rows(
    dtype: &'static str,
    kind: FloatKind,
    (weights, storage, element, scale): Weights,
    asked: Use,
    max_rows: usize,
) -> Entry {
    let floating = storage == Storage::Float;
    let halves = [kind != FloatKind::F32, element != FloatKind::F32.into()];
    let (spec, x_vector, w_vector) = gemv::Gemv::new(storage, asked.rows, asked.store, max_rows, halves);
    let units = gemv::LANES * gemv::COLUMNS;
    let instance = Box::new(gemv::few_rows::FewRows::new(
        settings(units, 1),
        properties(),
        target(),
        BUFFER,
        BUFFER,
        option(asked.dual()),
        option(!floating),
        option(!floating && asked.dual()),
        option(asked.planned()),
        option(asked.shared()),
        BUFFER,
        (),
        (),
        (),
        (),
        (),
        x_vector,
        w_vector,
        spec,
        [kind.into(), element, scale, asked.result(kind)],
    ));
    let kernel = format!("few_rows ({})", asked.name);
    Entry { kernel, dtype, size: format!("{weights} weights, {max_rows} rows"), tensor_cores: false, instance }
}

fn tile_product(
    dtype: &'static str,
    kind: FloatKind,
    (weights, storage, element, scale): Weights,
    asked: Use,
    height: usize,
) -> Entry {
    let floating = storage == Storage::Float;
    let shape = tile::Shape::choose(height, 6144, asked.dual());
    let spec = tile::Tile { storage, rows: asked.rows, store: asked.store, by_k: asked.by_k, shape };
    let instance = Box::new(tile::tile_product::TileProduct::new(
        settings(tile::UNITS, 1),
        properties(),
        target(),
        BUFFER,
        BUFFER,
        option(asked.dual()),
        option(!floating),
        option(!floating && asked.dual()),
        option(asked.planned()),
        option(asked.shared()),
        BUFFER,
        (),
        (),
        (),
        (),
        (),
        spec,
        [kind.into(), element, scale, asked.result(kind)],
    ));
    let kernel = format!("tile_product ({})", asked.name);
    let size = format!("{weights} weights, {} × {}", shape.height(), shape.width());
    Entry { kernel, dtype, size, tensor_cores: false, instance }
}

fn mma_product(
    dtype: &'static str,
    kind: FloatKind,
    (weights, storage, element, scale): Weights,
    asked: Use,
    height: usize,
) -> Entry {
    let floating = storage == Storage::Float;
    let shape = mma::Shape::choose(height, asked.dual());
    let spec = mma::Mma { storage, rows: asked.rows, store: asked.store, by_k: asked.by_k, shape, lanes: 32 };
    let (x_vector, w_vector) = if floating { (8, 8) } else { (storage.per_word(), 1) };
    let instance = Box::new(mma::mma_product::MmaProduct::new(
        settings(32, shape.planes()),
        properties(),
        target(),
        BUFFER,
        BUFFER,
        option(asked.dual()),
        option(!floating),
        option(!floating && asked.dual()),
        option(asked.planned()),
        option(asked.shared()),
        BUFFER,
        (),
        (),
        (),
        (),
        (),
        x_vector,
        w_vector,
        spec,
        [kind.into(), element, scale, asked.result(kind)],
    ));
    let kernel = format!("mma_product ({})", asked.name);
    let size = format!("{weights} weights, {} × {}", shape.height(), shape.width());
    Entry { kernel, dtype, size, tensor_cores: true, instance }
}

fn mma_outer(dtype: &'static str, kind: FloatKind, name: &str, spec: reduce::Reduce) -> Entry {
    let shape = mma::Shape::OUTER;
    let instance = Box::new(mma::mma_outer::MmaOuter::new(
        settings(32, shape.planes()),
        properties(),
        target(),
        BUFFER,
        BUFFER,
        option(planned(spec)),
        BUFFER,
        (),
        (),
        (),
        (),
        (),
        (),
        8,
        spec,
        shape,
        32,
        [kind.into(), kind.into()],
    ));
    let size = format!("{} × {}", shape.height(), shape.width());
    Entry { kernel: format!("mma_outer ({name})"), dtype, size, tensor_cores: true, instance }
}

/// In f32, the result in the weights' dtype.
fn outer(name: &str, spec: reduce::Reduce, result: FloatKind) -> Entry {
    let f32 = FloatKind::F32.into();
    let instance = Box::new(reduce::outer::Outer::new(
        settings(tile::UNITS, 1),
        properties(),
        target(),
        BUFFER,
        BUFFER,
        option(planned(spec)),
        BUFFER,
        (),
        (),
        (),
        (),
        (),
        (),
        spec,
        [f32, f32, result.into()],
    ));
    let size = format!("{0} × {0}", reduce::TILE);
    Entry { kernel: format!("outer ({name})"), dtype: "f32", size, tensor_cores: false, instance }
}
