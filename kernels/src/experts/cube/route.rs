//! The choice of experts for few tokens, left on the device: one launch gives the shares and the whole plan of the products,
//! so that a decode step never waits for the host to read the router's probabilities.
//!
//! Offline: `route_kernel` in f32; a cube of 256 units.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{DType, Int, Tensor};
use burn_cubecl::CubeBackend;
use cubecl::prelude::*;

use super::super::{Choices, Routing};
use crate::base::gpu::product::{FEW_ROWS, Plan};
use crate::base::gpu::{buffer, empty, rows};

const UNITS: usize = 256;
/// The most experts, and the most of them for one token, that the kernel has room for.
const EXPERTS: usize = 256;
const CHOSEN: usize = 16;

/// What a device chose: tiles, order and choices in one buffer, as [`Layout`] says.
#[derive(Debug, Clone)]
pub struct OnDevice {
    plan: Tensor<1, Int>,
    layout: Layout,
}

/// Sizes of a choice, and where its parts stand in the plan: `[tiles · 3 | order | choices]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    tokens: usize,
    k: usize,
    experts: usize,
}

impl Layout {
    /// Slots: one for each token and rank.
    pub fn slots(&self) -> usize {
        self.tokens * self.k
    }

    /// Experts to choose from.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Tokens, experts of each, and experts to choose from.
    pub(in super::super) fn sizes(&self) -> [usize; 3] {
        [self.tokens, self.k, self.experts]
    }

    /// Tiles of the plan: an expert's rows are few enough for one. Those that nobody chose have no rows.
    fn tiles(&self) -> usize {
        self.slots().min(self.experts)
    }

    fn order_at(&self) -> usize {
        3 * self.tiles()
    }

    fn choices_at(&self) -> usize {
        self.order_at() + self.slots()
    }

    fn len(&self) -> usize {
        self.choices_at() + self.slots()
    }

    /// The plan in `buffer` for the products.
    pub(super) fn plan(&self, buffer: IntTensor<CubeBackend>) -> Plan {
        Plan::on_device(buffer, self.tiles(), self.order_at(), self.tokens.next_power_of_two(), self.experts, self.k)
    }
}

impl OnDevice {
    /// Sizes and places.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The plan.
    pub fn plan(&self) -> Tensor<1, Int> {
        self.plan.clone()
    }

    /// The expert of every slot, read back.
    ///
    /// # Panics
    /// If the device can't be read.
    pub fn read(&self) -> Vec<u32> {
        let choices = self.plan.clone().narrow(0, self.layout.choices_at(), self.layout.slots());
        choices.into_data().iter::<u32>().collect()
    }
}

/// `shares [tokens, k]` and the plan, from `logits [tokens, experts]`; at most [`FEW_ROWS`] tokens.
///
/// One cube. A unit takes a token through softmax and choice, as [`super::super::choose`] does; then a unit takes a slot to
/// its place in the order by expert. An expert's first slot writes its tile.
#[cube(launch_unchecked)]
pub fn route_kernel(
    logits: &[f32],
    shares: &mut [f32],
    plan: &mut [u32],
    tokens: usize,
    experts: usize,
    k: usize,
    tiles: usize,
) {
    let unit = UNIT_POS as usize;
    let mut p = Shared::<[f32]>::new_slice(comptime!(FEW_ROWS * EXPERTS));
    let mut chosen = Shared::<[u32]>::new_slice(comptime!(FEW_ROWS * CHOSEN));
    let mut first = Shared::<[u32]>::new_slice(comptime!(FEW_ROWS * CHOSEN));
    for i in range_stepped(unit, tokens * experts, UNITS) {
        p[i] = logits[i];
    }
    sync_cube();

    if unit < tokens {
        let row = unit * experts;
        let mut most = p[row];
        for e in 1..experts {
            if p[row + e] > most {
                most = p[row + e];
            }
        }
        let mut sum = 0.0f32;
        for e in 0..experts {
            let weight = (p[row + e] - most).exp();
            p[row + e] = weight;
            sum += weight;
        }
        for e in 0..experts {
            p[row + e] = p[row + e] / sum;
        }
        let mut of_chosen = 0.0f32;
        for rank in 0..k {
            // the best that is left; of equals, and of NaN alone, the lower number
            let mut best = experts;
            for e in 0..experts {
                let mut taken = false;
                for before in 0..rank {
                    taken = taken || chosen[unit * k + before] as usize == e;
                }
                if !taken {
                    if best == experts {
                        best = e;
                    } else if p[row + e] > p[row + best] {
                        best = e;
                    }
                }
            }
            chosen[unit * k + rank] = best as u32;
            of_chosen += p[row + best];
        }
        for rank in 0..k {
            let expert = chosen[unit * k + rank] as usize;
            shares[unit * k + rank] = p[row + expert] / of_chosen;
        }
    }
    sync_cube();

    let slots = tokens * k;
    let mut mine = 0u32;
    let mut start = 0usize;
    let mut before = 0usize;
    let mut count = 0usize;
    if unit < slots {
        mine = chosen[unit];
        for slot in 0..slots {
            if chosen[slot] < mine {
                start += 1;
            } else if chosen[slot] == mine {
                count += 1;
                if slot < unit {
                    before += 1;
                }
            }
        }
        first[unit] = if before == 0 { 1u32 } else { 0u32 };
        plan[tiles * 3 + start + before] = unit as u32;
        plan[tiles * 3 + slots + unit] = mine;
    }
    sync_cube();

    // how many experts stand before mine, and how many there are
    let mut place = 0usize;
    let mut all = 0usize;
    if unit < tiles {
        for slot in 0..slots {
            all += first[slot] as usize;
        }
        if unit >= all {
            plan[unit * 3] = 0u32;
            plan[unit * 3 + 1] = 0u32;
            plan[unit * 3 + 2] = 0u32;
        }
    }
    if unit < slots {
        if first[unit] == 1u32 {
            for slot in 0..slots {
                if chosen[slot] < mine {
                    place += first[slot] as usize;
                }
            }
            plan[place * 3] = mine;
            plan[place * 3 + 1] = start as u32;
            plan[place * 3 + 2] = count as u32;
        }
    }
}

/// The choice of a router on a device.
#[backend_extension(Cube)]
pub trait RouteBackend: Backend {
    /// The shares `[tokens, k]` of `logits [tokens, experts]`, f32, and the plan that [`Layout`] describes.
    fn route(logits: FloatTensor<Self>, k: usize) -> (FloatTensor<Self>, IntTensor<Self>);
}

impl RouteBackend for CubeBackend {
    fn route(logits: FloatTensor<Self>, k: usize) -> (FloatTensor<Self>, IntTensor<Self>) {
        let logits = rows(logits);
        let [tokens, experts] = logits.shape().dims();
        let layout = Layout { tokens, k, experts };
        let (shares, plan) = (empty(&logits, [tokens, k], DType::F32), empty(&logits, [layout.len()], DType::I32));
        // SAFETY: `fits` holds the sizes below those of shared memory; the plan is as long as its layout.
        unsafe {
            route_kernel::launch_unchecked(
                &logits.client,
                CubeCount::Static(1, 1, 1),
                CubeDim::new_1d(UNITS as u32),
                buffer(&logits),
                buffer(&shares),
                buffer(&plan),
                tokens,
                experts,
                k,
                layout.tiles(),
            );
        }
        (shares, plan)
    }
}

/// Whether the kernel has room for these sizes.
pub(in super::super) fn fits(tokens: usize, experts: usize, k: usize) -> bool {
    (1..=FEW_ROWS).contains(&tokens) && experts <= EXPERTS && (1..=CHOSEN).contains(&k)
}

/// See [`super::super::route`]; `logits` are f32, and [`fits`] their sizes.
pub(in super::super) fn route(logits: Tensor<2>, k: usize) -> Routing {
    let [tokens, experts] = logits.dims();
    let (shares, plan) = <Dispatch as RouteBackend>::route(logits.into_dispatch(), k);
    let plan = OnDevice { plan: Tensor::from_dispatch(plan), layout: Layout { tokens, k, experts } };
    Routing { choices: Choices::chosen(plan), shares: Tensor::from_dispatch(shares) }
}
