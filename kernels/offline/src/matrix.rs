//! The matrix products behind linear, experts and log_prob.

use cubecl::ir::{ElemType, FloatKind, UIntKind};
use cubecl::prelude::*;
use m1_kernels::base::gpu::product::{Rows, Storage, Store};
use m1_kernels::base::gpu::{gemv, mma, reduce, tile};

use crate::catalogue::{BUFFER, Definition, Entry, TYPES, option, settings};
use crate::target::{properties, target};

const INT8: Storage = Storage::Int8 { block: 32 };
const INT4: Storage = Storage::Int4 { block: 32 };

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
const GATED: Use = Use::new("experts w1, w3", Rows::Gather, Store::Gated, true);
const DOWN: Use = Use::new("experts w2", Rows::Scatter, Store::Plain, true);
const BOTH: Use = Use::new("experts w1, w3 again", Rows::Gather, Store::Both, true);
const HIDDEN: Use = Use::new("experts d_h", Rows::Gather, Store::Plain, false);
const INPUT: Use = Use::new("experts d_x", Rows::Scatter, Store::Add, false);
const BACK: Use = Use::new("linear d_x", Rows::All, Store::Plain, false);
const HEAD: Use = Use::new("log_prob d_x", Rows::All, Store::Add, false);

/// The stored weights: a name, how, their element type and that of their scales.
type Weights = (&'static str, Storage, ElemType, ElemType);

/// Floats of `kind`.
fn floats(kind: FloatKind, name: &'static str) -> Weights {
    (name, Storage::Float, kind.into(), FloatKind::F32.into())
}

/// Words of 8 or 4 bits a value.
fn packed() -> [Weights; 2] {
    let word = ElemType::UInt(UIntKind::U32);
    [("int8", INT8, word, FloatKind::F16.into()), ("int4", INT4, word, FloatKind::F16.into())]
}

/// All of them.
pub fn entries() -> Vec<Entry> {
    let mut all = Vec::new();
    for (dtype, kind) in TYPES {
        let half = kind != FloatKind::F32;
        let mut weights = vec![floats(kind, dtype)];
        if !half {
            weights.push(floats(FloatKind::BF16, "bf16"));
        }
        weights.extend(packed());
        for stored in weights {
            let floating = stored.1 == Storage::Float;
            for asked in [LINEAR, GATED, DOWN, BOTH] {
                // Each count of rows for linear; experts by the ends of the scale.
                let counts: &[usize] = if asked.planned() || !floating { &[1, 8] } else { &[1, 2, 4, 8] };
                all.extend(counts.iter().map(|&count| few_rows(dtype, kind, stored, asked, count)));
            }
            let mut uses = vec![LINEAR, GATED, DOWN, BOTH];
            if floating {
                uses.extend([BACK, HIDDEN, INPUT, HEAD]);
            }
            for asked in uses {
                let heights: &[usize] = if floating { &[16, 64, 128] } else { &[16, 128] };
                for &height in heights {
                    if half {
                        all.push(mma_product(dtype, kind, stored, asked, height));
                    } else {
                        all.push(tile_product(dtype, kind, stored, asked, height));
                    }
                }
            }
        }
        if half {
            // Where a device has no tensor cores.
            all.push(tile_product(dtype, kind, floats(kind, dtype), LINEAR, 128));
            all.push(tile_product(dtype, kind, floats(kind, dtype), GATED, 128));
        }
        for (name, planned, a_by_token, add) in [
            ("linear, log_prob", false, false, true),
            ("experts d_w1, d_w3", true, false, false),
            ("experts d_w2", true, true, false),
        ] {
            let spec = reduce::Reduce { a_by_token, b_by_token: planned && !a_by_token, add };
            if half {
                all.push(mma_outer(dtype, kind, name, planned, spec));
            }
            all.push(outer(dtype, kind, name, planned, spec));
        }
    }
    all
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
    let definition: Definition = Box::new(move || {
        gemv::few_rows::FewRows::new(
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
        )
        .define()
    });
    let kernel = format!("few_rows ({})", asked.name);
    Entry { kernel, dtype, size: format!("{weights} weights, {max_rows} rows"), units, tensor_cores: false, definition }
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
    let definition: Definition = Box::new(move || {
        tile::tile_product::TileProduct::new(
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
        )
        .define()
    });
    let kernel = format!("tile_product ({})", asked.name);
    let size = format!("{weights} weights, {} × {}", shape.height(), shape.width());
    Entry { kernel, dtype, size, units: tile::UNITS, tensor_cores: false, definition }
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
    let definition: Definition = Box::new(move || {
        mma::mma_product::MmaProduct::new(
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
        )
        .define()
    });
    let kernel = format!("mma_product ({})", asked.name);
    let size = format!("{weights} weights, {} × {}", shape.height(), shape.width());
    Entry { kernel, dtype, size, units: 32 * shape.planes(), tensor_cores: true, definition }
}

fn mma_outer(dtype: &'static str, kind: FloatKind, name: &str, planned: bool, spec: reduce::Reduce) -> Entry {
    let shape = mma::Shape::OUTER;
    let definition: Definition = Box::new(move || {
        mma::mma_outer::MmaOuter::new(
            settings(32, shape.planes()),
            properties(),
            target(),
            BUFFER,
            BUFFER,
            option(planned),
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
        )
        .define()
    });
    let size = format!("{} × {}", shape.height(), shape.width());
    Entry {
        kernel: format!("mma_outer ({name})"),
        dtype,
        size,
        units: 32 * shape.planes(),
        tensor_cores: true,
        definition,
    }
}

fn outer(dtype: &'static str, kind: FloatKind, name: &str, planned: bool, spec: reduce::Reduce) -> Entry {
    let definition: Definition = Box::new(move || {
        reduce::outer::Outer::new(
            settings(tile::UNITS, 1),
            properties(),
            target(),
            BUFFER,
            BUFFER,
            option(planned),
            BUFFER,
            (),
            (),
            (),
            (),
            (),
            (),
            spec,
            [kind.into(), kind.into(), kind.into()],
        )
        .define()
    });
    let size = format!("{0} × {0}", reduce::TILE);
    Entry { kernel: format!("outer ({name})"), dtype, size, units: tile::UNITS, tensor_cores: false, definition }
}
