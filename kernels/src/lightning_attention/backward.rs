//! The backward pass on Burn's autodiff; its maths is each backend's own.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, TensorMetadata};
use burn::tensor::{Shape, Slice};

use super::{BlockPlan, LightningAttentionBackend};

/// One node has one output: without a wanted state it is `o`; with one it is `o [rows, tokens, heads, dim]` and the state
/// `[rows, heads, dim, dim]` behind each other in one list.
#[derive(Debug)]
struct BlockBackward;

/// `qkv`, state and plan.
type Saved<B> = (FloatTensor<B>, FloatTensor<B>, BlockPlan);

impl<B: LightningAttentionBackend> Backward<B, 2> for BlockBackward {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (qkv, state, plan) = ops.state;
        let has_state = plan.has_state;
        let (d_o, d_state) = if plan.want_state { unpack::<B>(grad, qkv.shape()) } else { (grad.clone(), grad) };
        let (d_qkv, d_state) = B::lightning_block_backward(qkv, state, d_o, d_state, plan);
        let [qkv, state] = ops.parents;
        for (parent, grad) in [(qkv, d_qkv), (state.filter(|_| has_state), d_state)] {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

/// `o` and the state as one list.
fn pack<B: LightningAttentionBackend>(o: FloatTensor<B>, state: FloatTensor<B>) -> FloatTensor<B> {
    let flat = |x: FloatTensor<B>| {
        let count = x.shape().num_elements();
        B::float_reshape(x, Shape::new([count]))
    };
    B::float_cat(vec![flat(B::float_swap_dims(o, 1, 2)), flat(state)], 0)
}

/// What [`pack`] joined; `shape`: of `qkv`.
fn unpack<B: LightningAttentionBackend>(packed: FloatTensor<B>, shape: Shape) -> (FloatTensor<B>, FloatTensor<B>) {
    let [rows, heads, tokens, width] = shape.dims();
    let dim = width / 3;
    let (outputs, all) = (rows * heads * tokens * dim, rows * heads * (tokens + dim) * dim);
    let part = |from: usize, to: usize| B::float_slice(packed.clone(), &[Slice::from(from..to)]);
    let o = B::float_reshape(part(0, outputs), Shape::new([rows, tokens, heads, dim]));
    let state = B::float_reshape(part(outputs, all), Shape::new([rows, heads, dim, dim]));
    (B::float_swap_dims(o, 1, 2), state)
}

impl<B: LightningAttentionBackend, C: CheckpointStrategy> LightningAttentionBackend for Autodiff<B, C> {
    fn lightning_block(
        qkv: FloatTensor<Self>,
        state: FloatTensor<Self>,
        plan: BlockPlan,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let shape = qkv.shape();
        let want_state = plan.want_state;
        let nodes = [qkv.node(), state.node()];
        let (qkv, state) = (qkv.into_primitive(), state.into_primitive());
        let forward = |qkv, state, plan| {
            let (o, state) = B::lightning_block(qkv, state, plan);
            if want_state { pack::<B>(o, state) } else { o }
        };
        let output = match BlockBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let output = forward(qkv.clone(), state.clone(), plan.clone());
                prep.finish((qkv, state, plan), output)
            }
            OpsKind::UnTracked(prep) => prep.finish(forward(qkv, state, plan)),
        };
        if want_state { unpack::<Self>(output, shape) } else { (output.clone(), output) }
    }

    fn lightning_block_backward(
        _qkv: FloatTensor<Self>,
        _state: FloatTensor<Self>,
        _d_o: FloatTensor<Self>,
        _d_state: FloatTensor<Self>,
        _plan: BlockPlan,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        panic!("lightning attention has no second derivative")
    }

    fn lightning_decode(
        _qkv: FloatTensor<Self>,
        _gate: FloatTensor<Self>,
        _state: FloatTensor<Self>,
        _norm: FloatTensor<Self>,
        _slopes: Vec<f64>,
        _eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        panic!("decode is not differentiable: the public function takes the reference on such devices")
    }
}
