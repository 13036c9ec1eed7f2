//! The fast paths under autodiff. Saved: the inputs (for the residual sum its result); everything else is formed again.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};

use super::RmsNormBackend;

/// Of `rms_norm(x, w)`.
#[derive(Debug)]
struct NormBackward;

impl<B: RmsNormBackend> Backward<B, 2> for NormBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, f64);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_y = grads.consume::<B>(&ops.node);
        let (x, w, eps) = ops.state;
        let (d_x, d_w) = B::rms_norm_backward(x, w, d_y, eps);
        let [x, w] = ops.parents;
        if let Some(x) = x {
            grads.register::<B>(x.id, d_x);
        }
        if let Some(w) = w {
            grads.register::<B>(w.id, d_w);
        }
    }
}

/// Of `residual · alpha + branch · beta`.
#[derive(Debug)]
struct SumBackward;

impl<B: Backend> Backward<B, 2> for SumBackward {
    type State = (f64, f64);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_sum = grads.consume::<B>(&ops.node);
        let (alpha, beta) = ops.state;
        let scaled = |factor: f64| match factor {
            1.0 => d_sum.clone(),
            _ => B::float_mul_scalar(d_sum.clone(), factor.into()),
        };
        let [residual, branch] = ops.parents;
        if let Some(residual) = residual {
            grads.register::<B>(residual.id, scaled(alpha));
        }
        if let Some(branch) = branch {
            grads.register::<B>(branch.id, scaled(beta));
        }
    }
}

/// Of `rms_norm(o, w) · sigmoid(gate)`.
#[derive(Debug)]
struct GatedBackward;

impl<B: RmsNormBackend> Backward<B, 3> for GatedBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, f64);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_y = grads.consume::<B>(&ops.node);
        let (o, gate, w, eps) = ops.state;
        let (d_o, d_gate, d_w) = B::gated_rms_norm_backward(o, gate, w, d_y, eps);
        for (node, gradient) in ops.parents.into_iter().zip([d_o, d_gate, d_w]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: RmsNormBackend, C: CheckpointStrategy> RmsNormBackend for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        match NormBackward.prepare::<C>([x.node(), w.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (x, w) = (x.into_primitive(), w.into_primitive());
                let y = B::rms_norm(x.clone(), w.clone(), eps);
                prep.finish((x, w, eps), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x.into_primitive(), w.into_primitive(), eps)),
        }
    }

    fn rms_norm_backward(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        d_y: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let _ = (x, w, d_y, eps);
        panic!("the gradient of RMS norm is not differentiable itself")
    }

    // Two outputs are two nodes: the sum with its own trivial gradient, and the norm of that sum. Both values come from
    // one pass.
    fn add_rms_norm(
        residual: FloatTensor<Self>,
        branch: FloatTensor<Self>,
        w: FloatTensor<Self>,
        alpha: f64,
        beta: f64,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let sum = SumBackward.prepare::<C>([residual.node(), branch.node()]).compute_bound().stateful();
        let w_node = w.node();
        let (residual, branch, w) = (residual.into_primitive(), branch.into_primitive(), w.into_primitive());
        let (sum_value, normed) = B::add_rms_norm(residual, branch, w.clone(), alpha, beta, eps);
        let sum = match sum {
            OpsKind::Tracked(prep) => prep.finish((alpha, beta), sum_value.clone()),
            OpsKind::UnTracked(prep) => prep.finish(sum_value.clone()),
        };
        let normed = match NormBackward.prepare::<C>([sum.node(), w_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((sum_value, w, eps), normed),
            OpsKind::UnTracked(prep) => prep.finish(normed),
        };
        (sum, normed)
    }

    fn gated_rms_norm(
        o: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        match GatedBackward.prepare::<C>([o.node(), gate.node(), w.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (o, gate, w) = (o.into_primitive(), gate.into_primitive(), w.into_primitive());
                let y = B::gated_rms_norm(o.clone(), gate.clone(), w.clone(), eps);
                prep.finish((o, gate, w, eps), y)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::gated_rms_norm(o.into_primitive(), gate.into_primitive(), w.into_primitive(), eps))
            }
        }
    }

    fn gated_rms_norm_backward(
        o: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        w: FloatTensor<Self>,
        d_y: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let _ = (o, gate, w, d_y, eps);
        panic!("the gradient of RMS norm is not differentiable itself")
    }
}
