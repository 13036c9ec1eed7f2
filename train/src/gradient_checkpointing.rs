//! Backward with the activations of one layer at a time (Chen et al., arXiv 1604.06174): the forward pass keeps what goes
//! into each layer, and the backward pass runs a layer again before it goes through it.
//!
//! Different here: the layers are the model's own, called one by one as its forward calls them. The choice of experts is
//! replayed, since a probability that rounds otherwise the second time must not send a token elsewhere.

use burn::tensor::{Gradients, Tensor, activation::softmax};
use m1_kernels::linear::Weight;
use m1_model::batch::Batch;
use m1_model::layers::Stream;
use m1_model::model::{M1, Places, router_load};
use m1_model::trace::Trace;

use crate::parameters::{take_gradients, tracked};

/// What a forward and a backward pass give.
pub struct Passed<T> {
    /// The loss without the router's auxiliary loss.
    pub loss: f64,
    /// The auxiliary loss, times the share that was asked for.
    pub aux_loss: f64,
    /// What the loss reports.
    pub report: T,
    /// Chosen experts of each layer.
    pub choices: Vec<Vec<u32>>,
    /// Of every parameter, in the order of [`take_gradients`].
    pub gradients: Vec<Option<Tensor<1>>>,
}

/// Forward and backward of `loss(hidden, head)` plus `aux_share` of the router's auxiliary loss; `model` is not tracked.
///
/// # Errors
/// Those of `loss`.
pub fn forward_backward<T, E>(
    model: &M1,
    batch: &Batch,
    loss: impl FnOnce(Tensor<2>, &Weight<2>) -> Result<(Tensor<1>, T), E>,
    aux_share: f64,
) -> Result<Passed<T>, E> {
    let config = model.config();
    let past = vec![0; batch.rows().len()];
    let mut trace = Trace::router();
    let mut inputs = layer_inputs(model, batch, &mut trace);
    let choices = trace.choices;

    // The top: final norm, head and loss.
    let top = leaves(inputs.pop().expect("the embeddings at least"));
    let mut ending = with_tracked_top(model);
    let hidden = ending.finish(top.clone(), batch, &mut Trace::none());
    let (value, report) = loss(hidden, &ending.lm_head.weight.value())?;
    let mut gradients = value.clone().backward();
    let of_norm = take_gradients(&ending.model.norm, &mut gradients);
    let of_head = take_gradients(&ending.lm_head, &mut gradients);
    let mut slope = Slope::new(top, &mut gradients);

    // The layers, from the last to the first.
    let rows = batch.tokens() * model.model.layers.len();
    let load = router_load(&choices, config.num_local_experts, rows);
    let tracked_device = model.device().autodiff();
    let load = Tensor::<1>::from_floats(load.as_slice(), &tracked_device);
    let places = Places::new(batch, &past, config, &tracked_device);
    let (mut aux_loss, mut of_layers) = (0.0, Vec::new());
    for layer in model.model.layers.iter().rev() {
        let layer = tracked(layer);
        let x = leaves(inputs.pop().expect("one a layer"));
        let mut trace = Trace::router().replaying(choices.clone());
        let out = places.through(&layer, x.clone(), None, &mut trace);
        let probabilities: Tensor<1> = softmax(trace.router_logits.remove(0), 1).sum_dim(0).squeeze_dim(0);
        let scale = config.num_local_experts as f64 * config.router_aux_loss_coef * aux_share / rows as f64;
        let aux = (probabilities * load.clone()).sum().mul_scalar(scale);
        aux_loss += f64::from(aux.clone().inner().into_scalar::<f32>());
        // The gradient of `Σ out · slope` is that of the loss.
        let mut gradients = (slope.of(&out) + aux).backward();
        of_layers.push(take_gradients(&layer, &mut gradients));
        slope = Slope::new(x, &mut gradients);
    }

    // The embeddings.
    ending.model.embed_tokens = tracked(&model.model.embed_tokens);
    let mut gradients = slope.of(&ending.embed(batch)).backward();
    let mut all = take_gradients(&ending.model.embed_tokens, &mut gradients);
    all.extend(of_layers.into_iter().rev().flatten());
    all.extend(of_norm);
    all.extend(of_head);
    Ok(Passed { loss: value.inner().into_scalar::<f32>().into(), aux_loss, report, choices, gradients: all })
}

/// What [`forward_backward`] gives to its loss: hidden states and head, to the bit.
pub fn forward(model: &M1, batch: &Batch) -> (Tensor<2>, Weight<2>) {
    let top = leaves(layer_inputs(model, batch, &mut Trace::none()).pop().expect("the embeddings at least"));
    let ending = with_tracked_top(model);
    (ending.finish(top, batch, &mut Trace::none()), ending.lm_head.weight.value())
}

/// What goes into each layer and, last, what comes out of all.
fn layer_inputs(model: &M1, batch: &Batch, trace: &mut Trace) -> Vec<Stream> {
    let past = vec![0; batch.rows().len()];
    let places = Places::new(batch, &past, model.config(), &model.device());
    let mut inputs = vec![model.embed(batch)];
    for layer in &model.model.layers {
        let x = inputs[inputs.len() - 1].clone();
        inputs.push(places.through(layer, x, None, trace));
    }
    inputs
}

/// The model with a final norm and a head that are tracked.
fn with_tracked_top(model: &M1) -> M1 {
    let mut ending = model.clone(); // shares every weight
    ending.model.norm = tracked(&model.model.norm);
    ending.lm_head = tracked(&model.lm_head);
    ending
}

/// What goes into a layer, as the beginning of a graph.
fn leaves(x: Stream) -> Stream {
    x.map(|x| x.autodiff().require_grad())
}

/// The loss's gradient at what flows between two layers.
struct Slope {
    residual: Option<Tensor<2>>,
    branch: Option<Tensor<2>>,
}

impl Slope {
    /// At `leaves`.
    fn new(leaves: Stream, gradients: &mut Gradients) -> Self {
        let (residual, branch) = leaves.parts();
        Self {
            residual: residual.grad_remove(gradients),
            branch: branch.and_then(|branch| branch.grad_remove(gradients)),
        }
    }

    /// `Σ x · slope`, whose gradient is the loss's.
    fn of(self, x: &Stream) -> Tensor<1> {
        let (residual, branch) = x.parts();
        let mut sum = Tensor::zeros([1], &residual.device());
        for (x, slope) in [(Some(residual), self.residual), (branch, self.branch)] {
            if let (Some(x), Some(slope)) = (x, slope) {
                sum = sum + (x.clone() * Tensor::from_inner(slope)).sum();
            }
        }
        sum
    }
}
