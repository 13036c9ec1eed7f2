//! The custom backward: the inputs are saved, and what the backend wants to keep of the hidden activations.

use std::sync::Arc;

use burn::backend::AutodiffBackend;
use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::FloatTensor;

use super::ExpertsBackend;
use crate::base::packed::Packed;

#[derive(Debug)]
struct ExpertsBackward;

#[derive(Debug, Clone)]
struct Saved<T> {
    x: T,
    shares: T,
    w1: T,
    w2: T,
    w3: T,
    hidden: [T; 2],
    choices: Arc<[u32]>,
}

impl<B: ExpertsBackend> Backward<B, 5> for ExpertsBackward {
    type State = Saved<FloatTensor<B>>;

    fn backward(self, ops: Ops<Self::State, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_y = grads.consume::<B>(&ops.node);
        let Saved { x, shares, w1, w2, w3, hidden: [saved, also_saved], choices } = ops.state;
        let (d_x, d_shares, d_w1, d_w2, d_w3) =
            B::experts_backward_from(x, shares, w1, w2, w3, d_y, saved, also_saved, choices);
        for (parent, grad) in ops.parents.into_iter().zip([d_x, d_shares, d_w1, d_w2, d_w3]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

impl<B: ExpertsBackend, C: CheckpointStrategy> ExpertsBackend for Autodiff<B, C> {
    fn experts(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        w3: FloatTensor<Self>,
        choices: Arc<[u32]>,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), shares.node(), w1.node(), w2.node(), w3.node()];
        let [x, shares, w1, w2, w3] = [x, shares, w1, w2, w3].map(|t| t.into_primitive());
        match ExpertsBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => {
                let [a, b, c, d, e] = [&x, &shares, &w1, &w2, &w3].map(Clone::clone);
                let (y, saved, also_saved) = B::experts_saving(a, b, c, d, e, choices.clone());
                prepared.finish(Saved { x, shares, w1, w2, w3, hidden: [saved, also_saved], choices }, y)
            }
            OpsKind::UnTracked(prepared) => prepared.finish(B::experts(x, shares, w1, w2, w3, choices)),
        }
    }

    fn experts_backward(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: FloatTensor<Self>,
        w2: FloatTensor<Self>,
        w3: FloatTensor<Self>,
        d_y: FloatTensor<Self>,
        choices: Arc<[u32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [x, shares, w1, w2, w3, d_y] = [x, shares, w1, w2, w3, d_y].map(|t| t.into_primitive());
        let (d_x, d_shares, d_w1, d_w2, d_w3) = B::experts_backward(x, shares, w1, w2, w3, d_y, choices);
        let up = |t| <Self as AutodiffBackend>::from_inner(t);
        (up(d_x), up(d_shares), up(d_w1), up(d_w2), up(d_w3))
    }

    fn experts_packed(
        x: FloatTensor<Self>,
        shares: FloatTensor<Self>,
        w1: Packed,
        w2: Packed,
        w3: Packed,
        choices: Arc<[u32]>,
    ) -> FloatTensor<Self> {
        let y = B::experts_packed(x.into_primitive(), shares.into_primitive(), w1, w2, w3, choices);
        <Self as AutodiffBackend>::from_inner(y)
    }
}
