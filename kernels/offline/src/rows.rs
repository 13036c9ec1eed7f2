//! The kernels that go row by row or element by element.

use cubecl::ir::FloatKind;
use cubecl::prelude::*;
use m1_kernels::experts::cube as experts;
use m1_kernels::log_prob::cube as log_prob;
use m1_kernels::rms_norm::cube as rms_norm;
use m1_kernels::rotary::cube as rotary;
use m1_kernels::silu::cube as silu;

use crate::catalogue::{BUFFER, Entry, TYPES, option, settings};
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
        let mut add = |kernel: &str, size: &str, instance: Box<dyn CubeKernel>| {
            let (kernel, size) = (kernel.to_string(), size.to_string());
            all.push(Entry { kernel, dtype, size, tensor_cores: false, instance });
        };
        let mut norms = vec![("rms_norm", false, t, t), ("gated_rms_norm", true, t, t)];
        if kind != FloatKind::F32 {
            // Attention leaves f32.
            norms.push(("gated_rms_norm of f32", true, FloatKind::F32.into(), t));
        }
        for (name, gated, x, gate) in norms {
            let instance = rms_norm::rms_norm_forward::RmsNormForward::new(
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
            );
            add(&format!("rms_norm_forward ({name})"), "6144", Box::new(instance));
            let instance = rms_norm::rms_norm_input::RmsNormInput::new(
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
            );
            add(&format!("rms_norm_input ({name})"), "6144", Box::new(instance));
            let instance = rms_norm::rms_norm_weight::RmsNormWeight::new(
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
            );
            add(&format!("rms_norm_weight ({name})"), "6144", Box::new(instance));
        }
        let instance = rms_norm::add_rms_norm_forward::AddRmsNormForward::new(
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
        );
        add("add_rms_norm_forward", "6144", Box::new(instance));
        for (name, backward) in [("silu_kernel", false), ("silu_kernel (backward)", true)] {
            let instance = silu::silu_kernel::SiluKernel::new(
                settings(UNITS, 1),
                properties(),
                target(),
                BUFFER,
                option(backward),
                BUFFER,
                (),
                VECTOR,
                t,
            );
            add(name, "any", Box::new(instance));
        }
        let instance = rotary::rotary_kernel::RotaryKernel::new(
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
        );
        add("rotary_kernel", "any", Box::new(instance));
        let instance = experts::sum_slots::SumSlots::new(
            settings(UNITS, 1),
            properties(),
            target(),
            BUFFER,
            BUFFER,
            (),
            (),
            (),
            t,
        );
        add("sum_slots", "any", Box::new(instance));
        let instance = experts::weigh::Weigh::new(
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
        );
        add("weigh", "9216", Box::new(instance));
        let instance = experts::slopes::Slopes::new(
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
        );
        add("slopes", "9216", Box::new(instance));
        if kind != FloatKind::F32 {
            continue;
        }
        let instance = experts::route::route_kernel::RouteKernel::new(
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
        );
        add("route_kernel", "32 experts", Box::new(instance));
        for (name, first, last) in
            [("first", true, false), ("middle", false, false), ("last", false, true), ("only", true, true)]
        {
            let instance = log_prob::gather_stats::GatherStats::new(
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
            );
            add(&format!("gather_stats ({name} block)"), "any", Box::new(instance));
        }
        let instance = log_prob::form_gradient::FormGradient::new(
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
        );
        add("form_gradient", "any", Box::new(instance));
    }
    all
}
