//! The products under autodiff. Saved: both operands.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use super::LinearBackend;
use crate::base::packed::Packed;

/// Of `x · wᵀ`.
#[derive(Debug)]
struct LinearBackward;

impl<B: LinearBackend> Backward<B, 2> for LinearBackward {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_y = grads.consume::<B>(&ops.node);
        let (x, w) = ops.state;
        let (d_x, d_w) = B::linear_backward(x, w, d_y);
        for (node, gradient) in ops.parents.into_iter().zip([d_x, d_w]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

/// Of `x · wᵀ` with a packed weight.
#[derive(Debug)]
struct PackedBackward;

impl<B: LinearBackend> Backward<B, 1> for PackedBackward {
    type State = Packed;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_y = grads.consume::<B>(&ops.node);
        let [x] = ops.parents;
        if let Some(x) = x {
            grads.register::<B>(x.id, B::linear_packed_backward(ops.state, d_y));
        }
    }
}

impl<B: LinearBackend, C: CheckpointStrategy> LinearBackend for Autodiff<B, C> {
    fn linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        match LinearBackward.prepare::<C>([x.node(), w.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (x, w) = (x.into_primitive(), w.into_primitive());
                let y = <B as LinearBackend>::linear(x.clone(), w.clone());
                prep.finish((x, w), y)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(<B as LinearBackend>::linear(x.into_primitive(), w.into_primitive()))
            }
        }
    }

    fn linear_backward(
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
        _: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        panic!("the gradient of a linear map is not differentiable itself")
    }

    fn linear_packed(x: FloatTensor<Self>, w: Packed, exact: bool) -> FloatTensor<Self> {
        match PackedBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(w.clone(), B::linear_packed(x.into_primitive(), w, exact)),
            OpsKind::UnTracked(prep) => prep.finish(B::linear_packed(x.into_primitive(), w, exact)),
        }
    }

    fn linear_packed_backward(_: Packed, _: FloatTensor<Self>) -> FloatTensor<Self> {
        panic!("the gradient of a linear map is not differentiable itself")
    }
}
