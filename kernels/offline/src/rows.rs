//! The kernels that go row by row or element by element.

use cubecl::ir::FloatKind;
use cubecl::prelude::*;
use m1_kernels::experts::cube as experts;
use m1_kernels::log_prob::cube as log_prob;
use m1_kernels::rms_norm::cube as rms_norm;
use m1_kernels::rotary::cube as rotary;
use m1_kernels::silu::cube as silu;

use crate::catalogue::{BUFFER, Definition, Entry, TYPES, option, settings};
use crate::target::{properties, target};

/// Units of every cube here.
const UNITS: usize = 256;
/// Elements of a vector.
const VECTOR: usize = 4;

/// All of them.
pub fn entries() -> Vec<Entry> {
    let mut all = Vec::new();
    for (dtype, kind) in TYPES {
        let t: cubecl::ir::ElemType = kind.into();
        let mut add = |kernel: &str, size: &str, definition: Definition| {
            let (kernel, size) = (kernel.to_string(), size.to_string());
            all.push(Entry { kernel, dtype, size, units: UNITS, tensor_cores: false, definition });
        };
        let mut norms = vec![("rms_norm", false, t, t), ("gated_rms_norm", true, t, t)];
        if kind == FloatKind::BF16 {
            norms.push(("gated_rms_norm of f32", true, FloatKind::F32.into(), t));
        }
        for (name, gated, x, gate) in norms {
            let definition = move || {
                rms_norm::rms_norm_forward::RmsNormForward::new(
                    settings(UNITS, 1),
                    properties(),
                    target(),
                    BUFFER,
                    option(gated),
                    BUFFER,
                    BUFFER,
                    (),
                    (),
                    (),
                    VECTOR,
                    UNITS,
                    [x, gate],
                )
                .define()
            };
            add(&format!("rms_norm_forward ({name})"), "6144", Box::new(definition));
            let definition = move || {
                rms_norm::rms_norm_input::RmsNormInput::new(
                    settings(UNITS, 1),
                    properties(),
                    target(),
                    BUFFER,
                    option(gated),
                    BUFFER,
                    BUFFER,
                    BUFFER,
                    BUFFER,
                    BUFFER,
                    (),
                    (),
                    (),
                    VECTOR,
                    UNITS,
                    [x, gate],
                )
                .define()
            };
            add(&format!("rms_norm_input ({name})"), "6144", Box::new(definition));
            let definition = move || {
                rms_norm::rms_norm_weight::RmsNormWeight::new(
                    settings(UNITS, 1),
                    properties(),
                    target(),
                    BUFFER,
                    option(gated),
                    BUFFER,
                    BUFFER,
                    BUFFER,
                    (),
                    (),
                    [x, gate],
                )
                .define()
            };
            add(&format!("rms_norm_weight ({name})"), "6144", Box::new(definition));
        }
        let definition = move || {
            rms_norm::add_rms_norm_forward::AddRmsNormForward::new(
                settings(UNITS, 1),
                properties(),
                target(),
                BUFFER,
                BUFFER,
                BUFFER,
                BUFFER,
                BUFFER,
                (),
                (),
                (),
                (),
                (),
                VECTOR,
                UNITS,
                t,
            )
            .define()
        };
        add("add_rms_norm_forward", "6144", Box::new(definition));
        for (name, backward) in [("silu_kernel", false), ("silu_kernel (backward)", true)] {
            let definition = move || {
                silu::silu_kernel::SiluKernel::new(
                    settings(UNITS, 1),
                    properties(),
                    target(),
                    BUFFER,
                    option(backward),
                    BUFFER,
                    (),
                    VECTOR,
                    t,
                )
                .define()
            };
            add(name, "any", Box::new(definition));
        }
        let definition = move || {
            rotary::rotary_kernel::RotaryKernel::new(
                settings(UNITS, 1),
                properties(),
                target(),
                BUFFER,
                BUFFER,
                BUFFER,
                BUFFER,
                (),
                (),
                (),
                (),
                (),
                (),
                t,
            )
            .define()
        };
        add("rotary_kernel", "any", Box::new(definition));
        let definition = move || {
            experts::sum_slots::SumSlots::new(settings(UNITS, 1), properties(), target(), BUFFER, BUFFER, (), (), (), t)
                .define()
        };
        add("sum_slots", "any", Box::new(definition));
        let definition = move || {
            experts::weigh::Weigh::new(
                settings(UNITS, 1),
                properties(),
                target(),
                BUFFER,
                BUFFER,
                BUFFER,
                BUFFER,
                BUFFER,
                BUFFER,
                (),
                (),
                (),
                t,
            )
            .define()
        };
        add("weigh", "9216", Box::new(definition));
        let definition = move || {
            experts::slopes::Slopes::new(
                settings(UNITS, 1),
                properties(),
                target(),
                BUFFER,
                BUFFER,
                BUFFER,
                BUFFER,
                BUFFER,
                BUFFER,
                (),
                (),
                (),
                t,
            )
            .define()
        };
        add("slopes", "9216", Box::new(definition));
        if kind != FloatKind::F32 {
            continue;
        }
        let definition = move || {
            experts::route::route_kernel::RouteKernel::new(
                settings(UNITS, 1),
                properties(),
                target(),
                BUFFER,
                BUFFER,
                BUFFER,
                (),
                (),
                (),
                (),
            )
            .define()
        };
        add("route_kernel", "32 experts", Box::new(definition));
        for (name, first, last) in
            [("first", true, false), ("middle", false, false), ("last", false, true), ("only", true, true)]
        {
            let definition = move || {
                log_prob::gather_stats::GatherStats::new(
                    settings(UNITS, 1),
                    properties(),
                    target(),
                    BUFFER,
                    BUFFER,
                    BUFFER,
                    (),
                    (),
                    (),
                    (),
                    (),
                    first,
                    last,
                )
                .define()
            };
            add(&format!("gather_stats ({name} block)"), "any", Box::new(definition));
        }
        let definition = move || {
            log_prob::form_gradient::FormGradient::new(
                settings(UNITS, 1),
                properties(),
                target(),
                BUFFER,
                BUFFER,
                BUFFER,
                BUFFER,
                (),
                (),
                (),
                (),
                (),
            )
            .define()
        };
        add("form_gradient", "any", Box::new(definition));
    }
    all
}
