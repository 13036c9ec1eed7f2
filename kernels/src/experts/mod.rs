//! Mixture of experts: `y = Σ_e share_e · w2_e(silu(w1_e·x) · (w3_e·x))` over the chosen experts of each token.
//!
//! The cost grows with tokens × chosen experts, not with the number of experts: tokens are grouped by expert, and the
//! weights of an expert that nobody chose are not touched.

mod backward;
mod cpu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[allow(clippy::collapsible_if, clippy::assign_op_pattern, clippy::manual_div_ceil, clippy::eq_op)] // CubeCL's language
#[allow(clippy::if_same_then_else)] // nor does it know `||` that stops early
pub mod cube;
mod groups;
pub mod reference;

use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{DType, Int, Tensor, TensorData, activation::softmax};

use crate::base::{device, device::on_cube, on_cpu, packed::Packed};
use crate::cast;
use crate::linear::Weight;

/// A layer's experts, stacked.
#[derive(Debug, Clone)]
pub struct ExpertsWeights {
    /// Gate projections `[experts, ffn, hidden]`.
    pub w1: Weight<3>,
    /// Down projections `[experts, hidden, ffn]`.
    pub w2: Weight<3>,
    /// Up projections `[experts, ffn, hidden]`.
    pub w3: Weight<3>,
}

/// The expert of every slot `token · k + rank`, best first: on the host, or still on the device that chose.
#[derive(Debug, Clone)]
pub struct Choices(Made);

#[derive(Debug, Clone)]
enum Made {
    OnHost(Arc<[u32]>),
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    OnDevice(Box<cube::route::OnDevice>),
}

impl Choices {
    /// Slots.
    pub fn len(&self) -> usize {
        match &self.0 {
            Made::OnHost(choices) => choices.len(),
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            Made::OnDevice(plan) => plan.layout().slots(),
        }
    }

    /// Whether there are no slots.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// On the host, where a device is read for them.
    ///
    /// # Panics
    /// If the device can't be read.
    pub fn host(&self) -> Arc<[u32]> {
        match &self.0 {
            Made::OnHost(choices) => choices.clone(),
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            Made::OnDevice(plan) => plan.read().into(),
        }
    }

    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    fn chosen(plan: cube::route::OnDevice) -> Self {
        Self(Made::OnDevice(Box::new(plan)))
    }

    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    fn on_device(&self) -> Option<&cube::route::OnDevice> {
        match &self.0 {
            Made::OnHost(_) => None,
            Made::OnDevice(plan) => Some(plan),
        }
    }
}

impl<T: Into<Arc<[u32]>>> From<T> for Choices {
    fn from(choices: T) -> Self {
        Self(Made::OnHost(choices.into()))
    }
}

/// Which experts each token goes to, and how much of each.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Expert of slot `token · k + rank`, best first.
    pub choices: Choices,
    /// `[tokens, k]`, f32: the chosen probabilities divided by their sum.
    pub shares: Tensor<2>,
}

/// The fast paths. Every method takes `x [tokens, hidden]`, `shares [tokens, k]` and `choices[token · k + rank]`, which
/// [`experts`] has checked.
#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub trait ExpertsBackend: Backend {
    /// `y [tokens, hidden]` from stacked tensors `w1`, `w3 [experts, ffn, hidden]` and `w2 [experts, hidden, ffn]`.
    fn experts(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        w3: FloatTensor<Self>,
        choices: Arc<[u32]>,
    ) -> FloatTensor<Self>;

    /// As [`ExpertsBackend::experts`], with two tensors that [`ExpertsBackend::experts_backward_from`] wants to be kept until
    /// then: its own business, and x again where computing anew is as well.
    fn experts_saving(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        w3: FloatTensor<Self>,
        choices: Arc<[u32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        (Self::experts(x.clone(), shares, w1, w2, w3, choices), x.clone(), x)
    }

    /// As [`ExpertsBackend::experts_backward`], with the tensors of [`ExpertsBackend::experts_saving`].
    #[allow(clippy::too_many_arguments, clippy::type_complexity)]
    fn experts_backward_from(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        w3: FloatTensor<Self>,
        d_y: FloatTensor<Self>,
        saved: FloatTensor<Self>,
        also_saved: FloatTensor<Self>,
        choices: Arc<[u32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        drop((saved, also_saved));
        Self::experts_backward(x, shares, w1, w2, w3, d_y, choices)
    }

    /// The gradients of `(x, shares, w1, w2, w3)` from that of `y`; zero for an expert that nobody chose.
    #[allow(clippy::type_complexity)]
    fn experts_backward(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        w3: FloatTensor<Self>,
        d_y: FloatTensor<Self>,
        choices: Arc<[u32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// As [`ExpertsBackend::experts`] from packed weights, which are constants. On the CPU alone.
    fn experts_packed(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: Packed,
        w2: Packed,
        w3: Packed,
        choices: Arc<[u32]>,
    ) -> FloatTensor<Self>;
}

/// Chooses the `k` most probable experts of each token (ties: the lower number), or takes `replay`'s choices.
///
/// `logits [tokens, experts]`, f32. The gradient flows through the shares, not through the choice. For few tokens on a device
/// without autodiff the choice stays there.
///
/// # Panics
/// If `k` is more than there are experts, or `replay` has another length than `tokens · k` or names an expert that is
/// not there.
pub fn route(logits: Tensor<2>, k: usize, replay: Option<&[u32]>) -> Routing {
    let [tokens, experts] = logits.dims();
    assert!(k <= experts, "{k} experts a token were asked for, and there are {experts}");
    let logits = cast(logits, DType::F32);
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    if replay.is_none() && on_cube(&logits) && !logits.device().is_autodiff() && cube::route::fits(tokens, experts, k) {
        return cube::route::route(logits, k);
    }
    if on_cpu(&logits) && !logits.device().is_autodiff() && replay.is_none() && tokens * k > 0 {
        return route_on_host(logits, k);
    }
    let probabilities = softmax(logits, 1);
    let choices: Arc<[u32]> = match replay {
        Some(choices) => {
            assert_eq!(choices.len(), tokens * k, "routing needs {k} experts for each of {tokens} tokens");
            choices.into()
        }
        None => {
            let host: Vec<f32> = probabilities.clone().try_into_vec_as().expect("f32 probabilities read back");
            choose(&host, experts, k)
        }
    };
    check(&choices, k, experts);
    if tokens * k == 0 {
        return Routing { choices: choices.into(), shares: Tensor::zeros([tokens, k], &probabilities.device()) };
    }
    let indices: Vec<i32> = choices.iter().map(|&e| e as i32).collect();
    let indices = Tensor::<2, Int>::from_data(TensorData::new(indices, [tokens, k]), &probabilities.device());
    let chosen = probabilities.gather(1, indices);
    let shares = chosen.clone() / chosen.sum_dim(1);
    Routing { choices: choices.into(), shares }
}

/// [`route`] without tensor operations, of which a decode step would pay for eight a layer.
fn route_on_host(logits: Tensor<2>, k: usize) -> Routing {
    let ([tokens, experts], device) = (logits.dims(), logits.device());
    let mut p: Vec<f32> = logits.try_into_vec_as().expect("f32 logits read back");
    for row in p.chunks_exact_mut(experts) {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|p| *p = (*p - most).exp());
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|p| *p /= sum);
    }
    let choices = choose(&p, experts, k);
    let mut shares = Vec::with_capacity(tokens * k);
    for (row, choices) in p.chunks_exact(experts).zip(choices.chunks_exact(k)) {
        let chosen = choices.iter().map(|&e| row[e as usize]);
        let sum: f32 = chosen.clone().sum();
        shares.extend(chosen.map(|p| p / sum));
    }
    Routing { choices: choices.into(), shares: Tensor::from_data(TensorData::new(shares, [tokens, k]), &device) }
}

/// The `k` largest of each row of `probabilities [tokens, experts]`, best first; the earlier of equals. NaN counts as
/// smallest, so a broken row still has k experts.
fn choose(probabilities: &[f32], experts: usize, k: usize) -> Arc<[u32]> {
    let key = |p: f32| if p.is_nan() { f32::NEG_INFINITY } else { p };
    let mut choices = Vec::with_capacity(probabilities.len() / experts.max(1) * k);
    for row in probabilities.chunks_exact(experts.max(1)) {
        let start = choices.len();
        for (e, &p) in row.iter().enumerate() {
            let best = &choices[start..];
            let place = best.iter().rposition(|&b: &u32| key(row[b as usize]) >= key(p)).map_or(0, |i| i + 1);
            if place < k {
                if best.len() == k {
                    choices.pop();
                }
                choices.insert(start + place, e as u32);
            }
        }
    }
    choices.into()
}

/// # Panics
/// If a choice is not below `experts`.
fn check(choices: &[u32], k: usize, experts: usize) {
    if let Some(slot) = choices.iter().position(|&e| e as usize >= experts) {
        let (token, rank) = (slot / k, slot % k);
        panic!("the routing sends token {token} (rank {rank}) to expert {}, and there are {experts}", choices[slot]);
    }
}

/// Runs `x [tokens, hidden]` through the experts of `routing`; the result has the dtype of the weights: f32 for packed
/// ones, that of `x` for those that are quantized on a device.
///
/// On the CPU a token's result depends neither on the other tokens nor on the number of threads, to the bit.
///
/// # Panics
/// If the shapes do not agree or the routing names an expert that is not there.
pub fn experts(x: Tensor<2>, routing: &Routing, weights: &ExpertsWeights) -> Tensor<2> {
    let [tokens, hidden] = x.dims();
    let [count, ffn, _] = weights.w1.dims();
    let [rows, k] = routing.shares.dims();
    assert_eq!(weights.w1.dims(), [count, ffn, hidden], "w1 is [experts, ffn, hidden]");
    assert_eq!(weights.w2.dims(), [count, hidden, ffn], "w2 is [experts, hidden, ffn]");
    assert_eq!(weights.w3.dims(), [count, ffn, hidden], "w3 is [experts, ffn, hidden]");
    assert_eq!((rows, routing.choices.len()), (tokens, tokens * k), "the routing is of other tokens");
    match &routing.choices.0 {
        Made::OnHost(choices) => check(choices, k, count),
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        Made::OnDevice(plan) => {
            let chosen = plan.layout().sizes();
            assert_eq!(chosen, [tokens, k, count], "the device chose for other tokens, ranks or experts than these");
        }
    }
    if !slots_fit(tokens, k) {
        panic!("{tokens} tokens × {k} experts are more slots than an index of 32 bits has");
    }
    let f32_tensor = |w: &Weight<3>| matches!(w, Weight::Tensor(w) if w.dtype() == DType::F32);
    match (&weights.w1, &weights.w2, &weights.w3) {
        (Weight::Packed(w1), Weight::Packed(w2), Weight::Packed(w3))
            if on_cpu(&x) && !(x.is_tracked() || routing.shares.is_tracked()) =>
        {
            Tensor::from_dispatch(<Dispatch as ExpertsBackend>::experts_packed(
                cast(x, DType::F32).into_dispatch(),
                cast(routing.shares.clone(), DType::F32).into_dispatch(),
                w1.clone(),
                w2.clone(),
                w3.clone(),
                routing.choices.host(),
            ))
        }
        (Weight::Tensor(w1), Weight::Tensor(w2), Weight::Tensor(w3))
            if on_cpu(&x) && [&weights.w1, &weights.w2, &weights.w3].into_iter().all(f32_tensor) =>
        {
            Tensor::from_dispatch(<Dispatch as ExpertsBackend>::experts(
                cast(x, DType::F32).into_dispatch(),
                cast(routing.shares.clone(), DType::F32).into_dispatch(),
                w1.clone().into_dispatch(),
                w2.clone().into_dispatch(),
                w3.clone().into_dispatch(),
                routing.choices.host(),
            ))
        }
        (Weight::Tensor(w1), Weight::Tensor(w2), Weight::Tensor(w3))
            if [w1, w2, w3].into_iter().all(|w| on_cube(w) && w.dtype() == w1.dtype())
                && indexable(tokens * k, hidden, ffn) =>
        {
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            if let Some(plan) = routing.choices.on_device()
                && ![&x.device(), &w1.device(), &routing.shares.device()].into_iter().any(|d| d.is_autodiff())
            {
                return cube::experts_routed(x, routing, plan, [w1, w2, w3]);
            }
            Tensor::from_dispatch(<Dispatch as ExpertsBackend>::experts(
                cast(x, w1.dtype()).into_dispatch(),
                cast(routing.shares.clone(), DType::F32).into_dispatch(),
                w1.clone().into_dispatch(),
                w2.clone().into_dispatch(),
                w3.clone().into_dispatch(),
                routing.choices.host(),
            ))
        }
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        (Weight::Quantized(w1), Weight::Quantized(w2), Weight::Quantized(w3))
            if on_cube(&x)
                && !(x.device().is_autodiff() || routing.shares.device().is_autodiff())
                && [w1, w2, w3].into_iter().all(|w| w.indexable() && w.format() == w1.format())
                && indexable(tokens * k, hidden, ffn) =>
        {
            cube::experts_quantized(x, routing, [w1, w2, w3])
        }
        _ => reference::experts(x, routing, weights),
    }
}

/// Whether `tokens × k` slots can be numbered by the reference's and the devices' i32 indices.
fn slots_fit(tokens: usize, k: usize) -> bool {
    tokens.checked_mul(k).is_some_and(|slots| slots <= i32::MAX as usize)
}

/// Whether a device's kernels can number what lies between the products: a row of `hidden` for every slot, and gate and up of
/// `ffn` beside each other. The inputs are smaller, and the weights see to themselves.
fn indexable(slots: usize, hidden: usize, ffn: usize) -> bool {
    device::indexable(&[slots, hidden.max(ffn.saturating_mul(2))])
}

#[cfg(test)]
mod tests;
