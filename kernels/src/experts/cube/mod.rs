//! One CubeCL source for CUDA and wgpu.
//!
//! The host groups the slots by expert and uploads the grouping once ([`Plan`]); every product then runs over the chosen
//! experts alone, so that one token reads exactly k experts' weights. Forward: `w1` and `w3` with `silu · mul` in one
//! launch, `w2` times the share into a row for each slot, and the sum of a token's slots in the order of their ranks:
//! three launches, and the same bits however the tokens are grouped by chance. Backward forms `w1·x` and `w3·x` again.
//! For few tokens [`mod@route`] chooses and groups on the device, and the host neither reads nor uploads anything.
//! Offline: the products of `base::gpu` with `Rows::Gather` and `Rows::Scatter` and a plan; here `sum_slots`, `weigh` and
//! `slopes` with F in {f32, bf16, f16}, cubes of 256 units.

// The kernel macro writes modules and functions beside each kernel, which have no place for documentation.
#![allow(missing_docs)]

use std::sync::Arc;

use burn::{
    backend::{
        Backend, Dispatch, TensorMetadata, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, Shape, Tensor},
};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

pub mod route;

use super::{ExpertsBackend, Routing};
use crate::base::gpu::{
    buffer, cube_sum, element, empty,
    product::{Outer, Plan, Product, Rows, Storage, Store, Stored},
    rows, sigmoid, spread, zeros,
};
use crate::base::packed::Packed;
use crate::cast;
use crate::linear::Quantized;
use route::{Layout, OnDevice};

const UNITS: usize = 256;

/// `y [tokens, dim] = Σ_rank slots [tokens · choices, dim]`, from f32.
#[cube(launch_unchecked)]
pub fn sum_slots<F: Float>(
    slots: &[f32],
    y: &mut [F],
    tokens: usize,
    dim: usize,
    choices: usize,
    #[define(F)] _dtype: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at >= tokens * dim {
        terminate!();
    }
    let (token, column) = (at / dim, at % dim);
    let mut sum = 0.0f32;
    for rank in 0..choices {
        sum += slots[(token * choices + rank) * dim + column];
    }
    y[at] = F::cast_from(sum);
}

/// Row by sorted position: `h = silu(g) · u`, weighed by the slot's share, and the share's gradient `Σ h · d_h`.
///
/// `sums [2, slots, ffn]` are g and u, `d_h [slots, ffn]` is not yet weighed. A cube for each row.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn weigh<F: Float>(
    sums: &[f32],
    d_h: &[f32],
    shares: &[f32],
    plan: &[u32],
    weighed: &mut [F],
    d_shares: &mut [f32],
    slots: usize,
    ffn: usize,
    order: usize,
    #[define(F)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= slots {
        terminate!();
    }
    let slot = plan[order + row] as usize;
    let share = shares[slot];
    let mut scratch = Shared::<[f32]>::new_slice(UNITS);
    let mut product = 0.0f32;
    for i in range_stepped(UNIT_POS as usize, ffn, UNITS) {
        let at = row * ffn + i;
        let g = sums[at];
        let h = g * sigmoid(g) * sums[slots * ffn + at];
        product += h * d_h[at];
        weighed[at] = F::cast_from(h * share);
    }
    let product = cube_sum(product, &mut scratch, UNITS);
    if UNIT_POS == 0 {
        d_shares[slot] = product;
    }
}

/// `d_g` and `d_u` by sorted position, from what [`weigh`] reads.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn slopes<F: Float>(
    sums: &[f32],
    d_h: &[f32],
    shares: &[f32],
    plan: &[u32],
    d_g: &mut [F],
    d_u: &mut [F],
    slots: usize,
    ffn: usize,
    order: usize,
    #[define(F)] _dtype: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at >= slots * ffn {
        terminate!();
    }
    let share = shares[plan[order + at / ffn] as usize];
    let (g, u) = (sums[at], sums[slots * ffn + at]);
    let slope = d_h[at] * share;
    let open = sigmoid(g);
    d_g[at] = F::cast_from(slope * u * open * (1.0f32 + g * (1.0f32 - open)));
    d_u[at] = F::cast_from(slope * g * open);
}

/// Sizes of a call.
struct Sizes {
    tokens: usize,
    hidden: usize,
    ffn: usize,
    experts: usize,
    slots: usize,
    k: usize,
}

impl Sizes {
    fn new(x: &CubeTensor, experts: usize, ffn: usize, slots: usize) -> Self {
        let [tokens, hidden] = x.shape().dims();
        Self { tokens, hidden, ffn, experts, slots, k: slots.checked_div(tokens).unwrap_or(1) }
    }
}

/// The forward pass with weights in any storage; all of one dtype or quantized.
fn forward(
    x: &CubeTensor,
    shares: &CubeTensor,
    [w1, w2, w3]: [&Stored; 3],
    sizes: &Sizes,
    plan: impl FnOnce() -> Plan,
) -> CubeTensor {
    let Sizes { tokens, hidden, ffn, slots, .. } = *sizes;
    if slots == 0 || hidden == 0 {
        return zeros(x, Shape::from([tokens, hidden]), x.dtype);
    }
    let plan = plan();
    let h = Product {
        x,
        w: w1,
        w2: Some(w3),
        plan: Some(&plan),
        shares: None,
        rows: Rows::Gather,
        store: Store::Gated,
        by_k: true,
        m: slots,
        n: ffn,
        k: hidden,
    }
    .run(x.dtype);
    let outputs = Product {
        x: &h,
        w: w2,
        w2: None,
        plan: Some(&plan),
        shares: Some(shares),
        rows: Rows::Scatter,
        store: Store::Plain,
        by_k: true,
        m: slots,
        n: hidden,
        k: ffn,
    }
    .run(DType::F32);
    sum(&outputs, sizes, x.dtype)
}

/// The slots of each token summed.
fn sum(slots: &CubeTensor, sizes: &Sizes, dtype: DType) -> CubeTensor {
    let y = empty(slots, [sizes.tokens, sizes.hidden], dtype);
    let count = sizes.tokens * sizes.hidden;
    // SAFETY: the kernel stays below `tokens` and `dim` of y and `tokens · choices` rows of the slots.
    unsafe {
        sum_slots::launch_unchecked(
            &slots.client,
            spread(count.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            buffer(slots),
            buffer(&y),
            sizes.tokens,
            sizes.hidden,
            sizes.k,
            element(&y),
        );
    }
    y
}

type T = FloatTensor<CubeBackend>;

impl ExpertsBackend for CubeBackend {
    fn experts(x: T, shares: T, w1: T, w2: T, w3: T, choices: Arc<[u32]>) -> T {
        let sizes = Sizes::new(&x, w1.shape()[0], w1.shape()[1], choices.len());
        let (x, shares) = (rows(x), rows(shares));
        let [w1, w2, w3] = [w1, w2, w3].map(Stored::float);
        forward(&x, &shares, [&w1, &w2, &w3], &sizes, || Plan::new(&x, &choices, sizes.k, sizes.experts))
    }

    fn experts_backward(x: T, shares: T, w1: T, w2: T, w3: T, d_y: T, choices: Arc<[u32]>) -> (T, T, T, T, T) {
        let sizes = Sizes::new(&x, w1.shape()[0], w1.shape()[1], choices.len());
        let Sizes { hidden, ffn, slots, k, .. } = sizes;
        if slots == 0 || hidden == 0 || ffn == 0 {
            let [x, shares, w1, w2, w3] = [x, shares, w1, w2, w3].map(|t| zeros(&t, t.shape(), t.dtype));
            return (x, shares, w1, w2, w3);
        }
        let (x, shares, d_y) = (rows(x), rows(shares), rows(d_y));
        let [w1, w2, w3] = [w1, w2, w3].map(Stored::float);
        let dtype = x.dtype;
        let plan = Plan::new(&x, &choices, k, sizes.experts);
        let product = |x, w, w2, rows, store, by_k, n, k| Product {
            x,
            w,
            w2,
            plan: Some(&plan),
            shares: None,
            rows,
            store,
            by_k,
            m: slots,
            n,
            k,
        };
        let sums = product(&x, &w1, Some(&w3), Rows::Gather, Store::Both, true, ffn, hidden).run(DType::F32);
        let d_h = product(&d_y, &w2, None, Rows::Gather, Store::Plain, false, ffn, hidden).run(DType::F32);

        let (weighed, d_g, d_u) =
            (empty(&x, [slots, ffn], dtype), empty(&x, [slots, ffn], dtype), empty(&x, [slots, ffn], dtype));
        let d_shares = empty(&shares, shares.shape(), DType::F32);
        // SAFETY: the kernels stay below `slots` rows of `ffn` elements, and the plan names slots below `slots`.
        unsafe {
            weigh::launch_unchecked(
                &x.client,
                spread(slots),
                CubeDim::new_1d(UNITS as u32),
                buffer(&sums),
                buffer(&d_h),
                buffer(&shares),
                plan.argument(),
                buffer(&weighed),
                buffer(&d_shares),
                slots,
                ffn,
                plan.order_at,
                element(&x),
            );
            slopes::launch_unchecked(
                &x.client,
                spread((slots * ffn).div_ceil(UNITS)),
                CubeDim::new_1d(UNITS as u32),
                buffer(&sums),
                buffer(&d_h),
                buffer(&shares),
                plan.argument(),
                buffer(&d_g),
                buffer(&d_u),
                slots,
                ffn,
                plan.order_at,
                element(&x),
            );
        }

        let d_x = product(&d_g, &w1, None, Rows::Scatter, Store::Plain, false, hidden, ffn).run(DType::F32);
        product(&d_u, &w3, None, Rows::Scatter, Store::Add, false, hidden, ffn).run_into(&d_x);
        let outer = |a, b, a_by_token, b_by_token, m, n| {
            let plan = Some(&plan);
            Outer { a, b, plan, a_by_token, b_by_token, add: false, rows: slots, m, n }.run(dtype)
        };
        let d_w1 = outer(&d_g, &x, false, true, ffn, hidden);
        let d_w2 = outer(&d_y, &weighed, true, false, hidden, ffn);
        let d_w3 = outer(&d_u, &x, false, true, ffn, hidden);
        (sum(&d_x, &sizes, dtype), d_shares, d_w1, d_w2, d_w3)
    }

    fn experts_packed(_: T, _: T, _: Packed, _: Packed, _: Packed, _: Arc<[u32]>) -> T {
        unreachable!("packed weights are the CPU's; the public function never sends them to a device")
    }
}

/// What only a device has: weights that are quantized, constants, and choices that it made itself.
#[backend_extension(Cube)]
pub trait ExpertsOnDeviceBackend: Backend {
    /// As [`ExpertsBackend::experts`], from the device's own plan.
    fn experts_routed(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        w3: FloatTensor<Self>,
        plan: IntTensor<Self>,
        layout: Layout,
    ) -> FloatTensor<Self>;

    /// As [`ExpertsBackend::experts`], in the dtype of `x`, from the words and scales of `w1`, `w2`, `w3`: `[experts · out, in
    /// / values of a word]` and `[experts · out, in / block]`, as [`Storage`] says.
    fn experts_quantized(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: IntTensor<Self>,
        w2: IntTensor<Self>,
        w3: IntTensor<Self>,
        scales1: FloatTensor<Self>,
        scales2: FloatTensor<Self>,
        scales3: FloatTensor<Self>,
        experts: usize,
        storage: Storage,
        choices: Arc<[u32]>,
    ) -> FloatTensor<Self>;

    /// The same from the device's own plan.
    fn experts_quantized_routed(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: IntTensor<Self>,
        w2: IntTensor<Self>,
        w3: IntTensor<Self>,
        scales1: FloatTensor<Self>,
        scales2: FloatTensor<Self>,
        scales3: FloatTensor<Self>,
        storage: Storage,
        plan: IntTensor<Self>,
        layout: Layout,
    ) -> FloatTensor<Self>;
}

type Words = IntTensor<CubeBackend>;

impl ExpertsOnDeviceBackend for CubeBackend {
    fn experts_routed(x: T, shares: T, w1: T, w2: T, w3: T, plan: Words, layout: Layout) -> T {
        let sizes = Sizes::new(&x, w1.shape()[0], w1.shape()[1], layout.slots());
        let (x, shares) = (rows(x), rows(shares));
        let [w1, w2, w3] = [w1, w2, w3].map(Stored::float);
        forward(&x, &shares, [&w1, &w2, &w3], &sizes, || layout.plan(plan))
    }

    fn experts_quantized(
        x: T,
        shares: T,
        w1: Words,
        w2: Words,
        w3: Words,
        scales1: T,
        scales2: T,
        scales3: T,
        experts: usize,
        storage: Storage,
        choices: Arc<[u32]>,
    ) -> T {
        let sizes = Sizes::new(&x, experts, scales1.shape()[0] / experts.max(1), choices.len());
        let (x, shares) = (rows(x), rows(shares));
        let stored = [(w1, scales1), (w2, scales2), (w3, scales3)];
        let [w1, w2, w3] = stored.map(|(words, scales)| Stored::quantized(words, scales, storage));
        forward(&x, &shares, [&w1, &w2, &w3], &sizes, || Plan::new(&x, &choices, sizes.k, experts))
    }

    fn experts_quantized_routed(
        x: T,
        shares: T,
        w1: Words,
        w2: Words,
        w3: Words,
        scales1: T,
        scales2: T,
        scales3: T,
        storage: Storage,
        plan: Words,
        layout: Layout,
    ) -> T {
        let experts = layout.experts();
        let sizes = Sizes::new(&x, experts, scales1.shape()[0] / experts.max(1), layout.slots());
        let (x, shares) = (rows(x), rows(shares));
        let stored = [(w1, scales1), (w2, scales2), (w3, scales3)];
        let [w1, w2, w3] = stored.map(|(words, scales)| Stored::quantized(words, scales, storage));
        forward(&x, &shares, [&w1, &w2, &w3], &sizes, || layout.plan(plan))
    }
}

/// See [`super::experts`], with tensors as weights, and choices that the device made.
pub(super) fn experts_routed(
    x: Tensor<2>,
    routing: &Routing,
    plan: &OnDevice,
    [w1, w2, w3]: [&Tensor<3>; 3],
) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as ExpertsOnDeviceBackend>::experts_routed(
        cast(x, w1.dtype()).into_dispatch(),
        cast(routing.shares.clone(), DType::F32).into_dispatch(),
        w1.clone().into_dispatch(),
        w2.clone().into_dispatch(),
        w3.clone().into_dispatch(),
        plan.plan().into_dispatch(),
        plan.layout(),
    ))
}

/// See [`super::experts`]; all three weights are of one format.
pub(super) fn experts_quantized(x: Tensor<2>, routing: &Routing, weights: [&Quantized; 3]) -> Tensor<2> {
    let (experts, storage) = (weights[0].dims()[0], Storage::of(weights[0].format()));
    let [(w1, scales1), (w2, scales2), (w3, scales3)] = weights.map(Quantized::parts);
    let x = x.into_dispatch();
    let shares = cast(routing.shares.clone(), DType::F32).into_dispatch();
    let [w1, w2, w3] = [w1, w2, w3].map(Tensor::into_dispatch);
    let [scales1, scales2, scales3] = [scales1, scales2, scales3].map(Tensor::into_dispatch);
    Tensor::from_dispatch(match routing.choices.on_device() {
        Some(made) => {
            let plan = made.plan().into_dispatch();
            <Dispatch as ExpertsOnDeviceBackend>::experts_quantized_routed(
                x,
                shares,
                w1,
                w2,
                w3,
                scales1,
                scales2,
                scales3,
                storage,
                plan,
                made.layout(),
            )
        }
        None => <Dispatch as ExpertsOnDeviceBackend>::experts_quantized(
            x,
            shares,
            w1,
            w2,
            w3,
            scales1,
            scales2,
            scales3,
            experts,
            storage,
            routing.choices.host(),
        ),
    })
}
