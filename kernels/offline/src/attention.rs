//! The kernels of both attentions.

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use m1_kernels::base::cube::Limits;
use m1_kernels::lightning_attention::cube::{decode, scan};
use m1_kernels::softmax_attention::cube::{self, attend, backward};

use crate::catalogue::{Definition, Entry};
use crate::target::{properties, sm90, target};

fn tensor() -> TensorCompilationArg {
    TensorCompilationArg {
        meta: TensorMetaCompilationArg { len: (), rank: () },
        buffer: BufferCompilationArg { inplace: None },
    }
}

fn list(count: usize) -> SequenceCompilationArg<OwnedTensor<f32>> {
    (0..count).map(|_| tensor()).collect()
}

fn settings(units: usize) -> KernelSettings {
    KernelSettings::new(*CubeDim::new_1d(units as u32), ExecutionMode::Unchecked, AddressType::U32)
}

/// All of them, for heads of 64, 96 and 128.
pub fn entries() -> Vec<Entry> {
    let limits = Limits { shared: sm90::SHARED_PER_BLOCK, units: 1024, plane: Some(32) };
    let f32: ElemType = FloatKind::F32.into();
    let bf16: ElemType = FloatKind::BF16.into();
    let mut all = Vec::new();
    for dim in [64, 96, 128] {
        for (name, kind) in [("f32", FloatKind::F32), ("f16", FloatKind::F16), ("bf16", FloatKind::BF16)] {
            let t: ElemType = kind.into();
            let half = name != "f32";
            let operand = if half { bf16 } else { f32 };
            let mut add = |kernel: &str, units: usize, tensor_cores: bool, definition: Definition| {
                all.push(Entry {
                    kernel: kernel.into(),
                    dtype: name,
                    size: dim.to_string(),
                    units,
                    tensor_cores,
                    definition,
                });
            };
            for (kernel, direction, types) in [
                ("lightning_scan", scan::Direction::Forward, [t, t, t, f32, operand]),
                ("lightning_scan (dq)", scan::Direction::Forward, [f32, t, t, t, operand]),
                ("lightning_scan (dk)", scan::Direction::Backward, [t, f32, t, t, operand]),
                ("lightning_scan (dv)", scan::Direction::Backward, [t, t, f32, t, operand]),
            ] {
                let p = scan::Scan::fitting(&limits, dim, half, direction).expect("fits");
                add(
                    kernel,
                    p.team.units,
                    half,
                    Box::new(move || {
                        scan::lightning_scan::LightningScan::new(
                            settings(p.team.units),
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
                        )
                        .define()
                    }),
                );
            }
            let p = decode::Decode::fitting(&limits, 64, dim).expect("fits");
            add(
                "lightning_decode_heads",
                p.units,
                false,
                Box::new(move || {
                    decode::lightning_decode_heads::LightningDecodeHeads::new(
                        settings(p.units),
                        properties(),
                        target(),
                        tensor(),
                        tensor(),
                        tensor(),
                        tensor(),
                        tensor(),
                        p,
                        t,
                    )
                    .define()
                }),
            );
            add(
                "lightning_decode_norm",
                p.units,
                false,
                Box::new(move || {
                    decode::lightning_decode_norm::LightningDecodeNorm::new(
                        settings(p.units),
                        properties(),
                        target(),
                        tensor(),
                        tensor(),
                        tensor(),
                        tensor(),
                        (),
                        p,
                        [t, t],
                    )
                    .define()
                }),
            );
            let p = decode::Decode::in_one(&limits, 4, dim).expect("fits");
            add(
                "lightning_decode_row",
                p.units,
                false,
                Box::new(move || {
                    decode::lightning_decode_row::LightningDecodeRow::new(
                        settings(p.units),
                        properties(),
                        target(),
                        tensor(),
                        tensor(),
                        tensor(),
                        tensor(),
                        tensor(),
                        tensor(),
                        tensor(),
                        (),
                        p,
                        [t, t],
                    )
                    .define()
                }),
            );
            // Keys and values in the queries' dtype, and in f32 as the cache keeps them by default.
            let kinds = [(t, if half { t } else { f32 }, ""), (f32, f32, ", keys f32")];
            for (keys, operand, of) in kinds.into_iter().take(if half { 2 } else { 1 }) {
                let fragments = half && keys == t;
                let blocks = cube::pairs(64, fragments);
                for (kernel, total, blocks, split, finish) in [
                    ("text", 4096, 1, attend::Split::Queries, attend::Finish::OutputAndLogSum),
                    ("chunk", 4096, blocks, attend::Split::Queries, attend::Finish::Output),
                    ("short token", 8, blocks, attend::Split::Queries, attend::Finish::Output),
                    ("token", 8, blocks, attend::Split::Pieces(256), attend::Finish::Partial),
                ] {
                    let p = attend::Attend::fitting(&limits, dim, 8, total, fragments).expect("fits");
                    let p = attend::Attend { blocks, split, finish, ..p };
                    add(
                        &format!("softmax_attend ({kernel}{of}, blocks: {blocks})"),
                        p.team.units,
                        fragments,
                        Box::new(move || {
                            attend::softmax_attend::SoftmaxAttend::new(
                                settings(p.team.units),
                                properties(),
                                target(),
                                tensor(),
                                list(blocks).values.into_iter().collect(),
                                list(blocks).values.into_iter().collect(),
                                tensor(),
                                tensor(),
                                (),
                                (),
                                (),
                                p,
                                [t, keys, operand],
                            )
                            .define()
                        }),
                    );
                }
            }
            if !half {
                add(
                    "softmax_join",
                    128,
                    false,
                    Box::new(move || {
                        attend::softmax_join::SoftmaxJoin::new(
                            settings(128),
                            properties(),
                            target(),
                            tensor(),
                            tensor(),
                            tensor(),
                            dim,
                            128,
                        )
                        .define()
                    }),
                );
                add(
                    "softmax_backward_rows",
                    256,
                    false,
                    Box::new(move || {
                        backward::softmax_backward_rows::SoftmaxBackwardRows::new(
                            settings(256),
                            properties(),
                            target(),
                            tensor(),
                            tensor(),
                            tensor(),
                            tensor(),
                            dim,
                        )
                        .define()
                    }),
                );
            }
            let p = backward::Backward::fitting(&limits, dim, 8, half).expect("fits");
            add(
                "softmax_backward_queries",
                p.team.units,
                half,
                Box::new(move || {
                    backward::softmax_backward_queries::SoftmaxBackwardQueries::new(
                        settings(p.team.units),
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
                    )
                    .define()
                }),
            );
            add(
                "softmax_backward_keys",
                p.team.units,
                half,
                Box::new(move || {
                    backward::softmax_backward_keys::SoftmaxBackwardKeys::new(
                        settings(p.team.units),
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
                    )
                    .define()
                }),
            );
        }
    }
    all
}
