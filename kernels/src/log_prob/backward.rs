//! Log-probability under autodiff: saves the inputs and four numbers a token.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use super::LogProbBackend;
use crate::base::packed::Packed;

/// With a head that is a tensor.
#[derive(Debug)]
struct LogProbBackward;

/// With a packed one.
#[derive(Debug)]
struct PackedBackward;

/// What the backward pass needs.
#[derive(Debug, Clone)]
struct Saved<T, H> {
    hidden: T,
    head: H,
    targets: Vec<u32>,
    temperature: f64,
    out: T,
}

impl<B: LogProbBackend> Backward<B, 2> for LogProbBackward {
    type State = Saved<FloatTensor<B>, FloatTensor<B>>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_out = grads.consume::<B>(&ops.node);
        let Saved { hidden, head, targets, temperature, out } = ops.state;
        let gradients = B::log_prob_backward(hidden, head, targets, temperature, out, d_out);
        for (node, gradient) in ops.parents.into_iter().zip([gradients.0, gradients.1]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: LogProbBackend> Backward<B, 1> for PackedBackward {
    type State = Saved<FloatTensor<B>, Packed>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_out = grads.consume::<B>(&ops.node);
        let Saved { hidden, head, targets, temperature, out } = ops.state;
        let [node] = ops.parents;
        if let Some(node) = node {
            let d_hidden = B::log_prob_packed_backward(hidden, head, targets, temperature, out, d_out);
            grads.register::<B>(node.id, d_hidden);
        }
    }
}

impl<B: LogProbBackend, C: CheckpointStrategy> LogProbBackend for Autodiff<B, C> {
    fn log_prob(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: Vec<u32>,
        temperature: f64,
    ) -> FloatTensor<Self> {
        let prepared = LogProbBackward.prepare::<C>([hidden.node(), head.node()]).compute_bound().stateful();
        let (hidden, head) = (hidden.into_primitive(), head.into_primitive());
        match prepared {
            OpsKind::Tracked(prep) => {
                let out = B::log_prob(hidden.clone(), head.clone(), targets.clone(), temperature);
                prep.finish(Saved { hidden, head, targets, temperature, out: out.clone() }, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::log_prob(hidden, head, targets, temperature)),
        }
    }

    fn log_prob_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: Vec<u32>,
        _: f64,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        panic!("the gradient of log_prob is not differentiable itself")
    }
    fn log_prob_packed(
        hidden: FloatTensor<Self>,
        head: Packed,
        targets: Vec<u32>,
        temperature: f64,
    ) -> FloatTensor<Self> {
        let prepared = PackedBackward.prepare::<C>([hidden.node()]).compute_bound().stateful();
        let hidden = hidden.into_primitive();
        match prepared {
            OpsKind::Tracked(prep) => {
                let out = B::log_prob_packed(hidden.clone(), head.clone(), targets.clone(), temperature);
                prep.finish(Saved { hidden, head, targets, temperature, out: out.clone() }, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::log_prob_packed(hidden, head, targets, temperature)),
        }
    }

    fn log_prob_packed_backward(
        _: FloatTensor<Self>,
        _: Packed,
        _: Vec<u32>,
        _: f64,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        panic!("the gradient of log_prob is not differentiable itself")
    }
}
