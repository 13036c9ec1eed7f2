//! The kernels of both attentions.

use cubecl::ir::{AddressType, ElemType, FloatKind};
use cubecl::prelude::*;
use m1_kernels::base::cube::Limits;
use m1_kernels::lightning_attention::cube::{decode, scan};
use m1_kernels::softmax_attention::cube::{self, attend, backward};

use crate::catalogue::{Entry, TYPES, settings};
use crate::target::{properties, target};

/// Query heads of a key head, as M1 has them.
const GROUP: usize = 8;
/// Heads of a row whose states are spread over cubes when decoding, and of one that a single cube holds.
const HEADS: usize = 64;
const FEW_HEADS: usize = 4;
/// Keys of a piece where a cache is split.
const PIECE: usize = 256;

fn tensor() -> TensorCompilationArg {
    TensorCompilationArg {
        meta: TensorMetaCompilationArg { len: (), rank: () },
        buffer: BufferCompilationArg { inplace: None },
    }
}

/// A result that is written over the argument at `place`.
fn over(place: usize) -> TensorCompilationArg {
    TensorCompilationArg { buffer: BufferCompilationArg { inplace: Some(place) }, ..tensor() }
}

/// The sizes and types that a set of kernels shares.
#[derive(Clone, Copy)]
struct Case {
    dim: usize,
    addresses: AddressType,
    dtype: &'static str,
    kind: FloatKind,
}

impl Case {
    fn half(self) -> bool {
        self.kind != FloatKind::F32
    }

    fn wide(self) -> bool {
        self.addresses == AddressType::U64
    }

    fn settings(self, units: usize) -> KernelSettings {
        settings(units, 1).address_type(self.addresses)
    }

    fn entry(self, kernel: impl Into<String>, tensor_cores: bool, instance: impl CubeKernel) -> Entry {
        let size = if self.wide() { format!("{}, 64-bit addresses", self.dim) } else { self.dim.to_string() };
        Entry { kernel: kernel.into(), dtype: self.dtype, size, tensor_cores, instance: Box::new(instance) }
    }
}

/// All of them, for heads of 64, 96 and 128, and with the addresses of long texts for M1's own.
pub fn entries() -> Vec<Entry> {
    let properties = properties();
    let hardware = &properties.hardware;
    let limits = Limits {
        shared: hardware.max_shared_memory_size,
        units: hardware.max_units_per_cube as usize,
        plane: Some(hardware.plane_size_max as usize),
    };
    let mut all = Vec::new();
    let sizes = [(64, AddressType::U32), (96, AddressType::U32), (128, AddressType::U32), (128, AddressType::U64)];
    for (dim, addresses) in sizes {
        for (dtype, kind) in TYPES {
            let case = Case { dim, addresses, dtype, kind };
            all.extend(lightning_scan(case, &limits));
            all.extend(lightning_decode(case, &limits));
            all.extend(softmax_forward(case, &limits, hardware.max_bindings as usize));
            all.extend(softmax_backward(case, &limits));
        }
    }
    all
}

/// The pass over a text and the three of its gradients, each with the states that it may be given or asked for.
fn lightning_scan(case: Case, limits: &Limits) -> Vec<Entry> {
    use scan::Direction::{Backward, Forward};
    let (t, f32): (ElemType, ElemType) = (case.kind.into(), FloatKind::F32.into());
    let operand = if case.half() { FloatKind::BF16.into() } else { f32 };
    let passes = if case.half() {
        vec![
            ("forward", Forward, [t, t, t, f32, operand], true),
            ("dq", Forward, [f32, t, t, t, operand], false),
            ("dk", Backward, [t, f32, t, t, operand], false),
            ("dv", Backward, [t, t, f32, t, operand], true),
        ]
    } else {
        // Where all types are one, two passes share a kernel.
        vec![("forward, dq", Forward, [f32; 5], true), ("dk, dv", Backward, [f32; 5], true)]
    };
    let mut all = Vec::new();
    for (pass, direction, types, leaves) in passes {
        for (states, has_state, want_state) in
            [("no state", false, false), ("state in", true, false), ("state out", false, true), ("states", true, true)]
        {
            if want_state && !leaves || case.wide() && has_state != want_state {
                continue;
            }
            let p = scan::Scan::fitting(limits, case.dim, case.half(), direction).expect("fits");
            let p = scan::Scan { has_state, want_state, ..p };
            let kernel = scan::lightning_scan::LightningScan::new(
                case.settings(p.team.units),
                properties(),
                target(),
                tensor(),
                tensor(),
                tensor(),
                tensor(),
                tensor(),
                tensor(),
                tensor(),
                p,
                types,
            );
            all.push(case.entry(format!("lightning_scan ({pass}, {states})"), case.half(), kernel));
        }
    }
    all
}

/// A token's step, on the state where it lies if nobody else holds it. The norm's weight is f32 in every model.
fn lightning_decode(case: Case, limits: &Limits) -> Vec<Entry> {
    let (t, f32): (ElemType, ElemType) = (case.kind.into(), FloatKind::F32.into());
    let mut all = Vec::new();
    let p = decode::Decode::fitting(limits, HEADS, case.dim).expect("fits");
    for (how, after) in [("in place", over(2)), ("new state", tensor())] {
        let kernel = decode::lightning_decode_heads::LightningDecodeHeads::new(
            case.settings(p.units),
            properties(),
            target(),
            tensor(),
            tensor(),
            tensor(),
            tensor(),
            after,
            p,
            t,
        );
        all.push(case.entry(format!("lightning_decode_heads ({how})"), false, kernel));
    }
    let kernel = decode::lightning_decode_norm::LightningDecodeNorm::new(
        case.settings(p.units),
        properties(),
        target(),
        tensor(),
        tensor(),
        tensor(),
        tensor(),
        (),
        p,
        [t, f32],
    );
    all.push(case.entry("lightning_decode_norm", false, kernel));
    let p = decode::Decode::in_one(limits, FEW_HEADS, case.dim).expect("fits");
    for (how, after) in [("in place", over(4)), ("new state", tensor())] {
        let kernel = decode::lightning_decode_row::LightningDecodeRow::new(
            case.settings(p.units),
            properties(),
            target(),
            tensor(),
            tensor(),
            tensor(),
            tensor(),
            tensor(),
            tensor(),
            after,
            (),
            p,
            [t, f32],
        );
        all.push(case.entry(format!("lightning_decode_row ({how})"), false, kernel));
    }
    all
}

/// What a launch of [`attend::softmax_attend`] is for, and its plan.
fn plans(limits: &Limits, dim: usize, bindings: usize, fragments: bool) -> Vec<(String, attend::Attend)> {
    use attend::{Attend, Finish, Split};
    let tiles = |total| Attend::fitting(limits, dim, GROUP, total, fragments).expect("fits");
    let blocks = cube::pairs(bindings, fragments);
    let p = tiles(4096);
    let several = Attend { blocks, ..p };
    let mut plans = vec![
        // One block: a text for training, and what begins a cache.
        ("text".to_string(), Attend { finish: Finish::OutputAndLogSum, ..p }),
        ("first chunk".to_string(), p),
        // A chunk meets the blocks of a cache, in one launch or in several.
        ("chunk".to_string(), several),
        ("chunk, first launch".to_string(), Attend { finish: Finish::Partial, ..several }),
        ("chunk, middle launch".to_string(), Attend { finish: Finish::Partial, resume: true, ..several }),
        ("chunk, last launch".to_string(), Attend { resume: true, ..several }),
    ];
    for total in [8, 16, 32, 64] {
        let p = Attend { blocks, ..tiles(total) };
        // Fragments have 16 rows for fewer queries too.
        if p.queries != total {
            continue;
        }
        // 64 are a whole tile, as of a chunk.
        if p.queries != several.queries {
            plans.push((format!("{total} queries"), p));
        }
        if total >= cube::TEXT {
            plans.push((format!("{total} queries, text"), Attend { finish: Finish::OutputAndLogSum, ..p }));
        }
        let split = Split::Pieces(PIECE);
        plans.push((format!("{total} queries, pieces"), Attend { split, finish: Finish::Partial, ..p }));
    }
    plans
}

fn softmax_forward(case: Case, limits: &Limits, bindings: usize) -> Vec<Entry> {
    fn list<T: CubePrimitive>(count: usize) -> SequenceCompilationArg<OwnedTensor<T>> {
        (0..count).map(|_| tensor()).collect()
    }
    let (t, f32): (ElemType, ElemType) = (case.kind.into(), FloatKind::F32.into());
    let mut kinds = vec![("", [t, t, t])];
    if case.kind == FloatKind::BF16 && !case.wide() {
        // The rotation leaves f32, whatever the cache keeps.
        kinds.push(("queries f32, ", [f32, t, f32]));
    }
    let mut all = Vec::new();
    for (of, types) in kinds {
        let fragments = types[2] != f32;
        for (name, p) in plans(limits, case.dim, bindings, fragments) {
            let alike = types[0] == types[1];
            // Training takes all in one dtype; addresses of 64 bits are for a text or cache in one block.
            if !alike && p.finish == attend::Finish::OutputAndLogSum || case.wide() && p.blocks > 1 {
                continue;
            }
            let kernel = attend::softmax_attend::SoftmaxAttend::new(
                case.settings(p.team.units),
                properties(),
                target(),
                tensor(),
                list(p.blocks),
                list(p.blocks),
                tensor(),
                tensor(),
                (),
                (),
                (),
                p,
                types,
            );
            all.push(case.entry(format!("softmax_attend ({of}{name}, blocks: {})", p.blocks), fragments, kernel));
        }
    }
    if !case.half() {
        let units = case.dim.next_power_of_two();
        let kernel = attend::softmax_join::SoftmaxJoin::new(
            case.settings(units),
            properties(),
            target(),
            tensor(),
            tensor(),
            tensor(),
            case.dim,
            units,
        );
        all.push(case.entry("softmax_join", false, kernel));
    }
    all
}

fn softmax_backward(case: Case, limits: &Limits) -> Vec<Entry> {
    let (t, f32): (ElemType, ElemType) = (case.kind.into(), FloatKind::F32.into());
    let operand = if case.half() { FloatKind::BF16.into() } else { f32 };
    let p = backward::Backward::fitting(limits, case.dim, GROUP, case.half()).expect("fits");
    let mut all = Vec::new();
    if !case.half() {
        let kernel = backward::softmax_backward_rows::SoftmaxBackwardRows::new(
            case.settings(p.team.units),
            properties(),
            target(),
            tensor(),
            tensor(),
            tensor(),
            tensor(),
            case.dim,
        );
        all.push(case.entry("softmax_backward_rows", false, kernel));
    }
    let kernel = backward::softmax_backward_queries::SoftmaxBackwardQueries::new(
        case.settings(p.team.units),
        properties(),
        target(),
        tensor(),
        tensor(),
        tensor(),
        tensor(),
        tensor(),
        tensor(),
        p,
        [t, operand],
    );
    all.push(case.entry("softmax_backward_queries", case.half(), kernel));
    let kernel = backward::softmax_backward_keys::SoftmaxBackwardKeys::new(
        case.settings(p.team.units),
        properties(),
        target(),
        tensor(),
        tensor(),
        tensor(),
        tensor(),
        tensor(),
        tensor(),
        tensor(),
        p,
        [t, operand],
    );
    all.push(case.entry("softmax_backward_keys", case.half(), kernel));
    all
}
