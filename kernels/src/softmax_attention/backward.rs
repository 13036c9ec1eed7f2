//! The backward pass on Burn's autodiff; its maths is each backend's own.

use burn::backend::Autodiff;
use burn::backend::AutodiffBackend;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use super::{KeyValueBlocks, SoftmaxAttentionBackend};

#[derive(Debug)]
struct TrainBackward;

impl<B: SoftmaxAttentionBackend> Backward<B, 3> for TrainBackward {
    /// q, k, v, o and each query's logarithm of the sum of exponentials.
    type State = [FloatTensor<B>; 5];

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let d_o = grads.consume::<B>(&ops.node);
        let [q, k, v, o, lse] = ops.state;
        let (d_q, d_k, d_v) = B::softmax_attention_backward(q, k, v, o, lse, d_o);
        for (parent, grad) in ops.parents.into_iter().zip([d_q, d_k, d_v]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

impl<B: SoftmaxAttentionBackend, C: CheckpointStrategy> SoftmaxAttentionBackend for Autodiff<B, C> {
    fn softmax_attention(_q: FloatTensor<Self>, _blocks: KeyValueBlocks<Self>, _past: usize) -> FloatTensor<Self> {
        panic!("attention over a cache is not differentiable: the public function takes the reference on such devices")
    }

    fn softmax_attention_train(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let nodes = [q.node(), k.node(), v.node()];
        let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
        match TrainBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (o, lse) = B::softmax_attention_train(q.clone(), k.clone(), v.clone());
                (prep.finish([q, k, v, o.clone(), lse.clone()], o), <Self as AutodiffBackend>::from_inner(lse))
            }
            OpsKind::UnTracked(prep) => {
                let (o, lse) = B::softmax_attention_train(q, k, v);
                (prep.finish(o), <Self as AutodiffBackend>::from_inner(lse))
            }
        }
    }

    fn softmax_attention_backward(
        _q: FloatTensor<Self>,
        _k: FloatTensor<Self>,
        _v: FloatTensor<Self>,
        _o: FloatTensor<Self>,
        _lse: FloatTensor<Self>,
        _d_o: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        panic!("softmax attention has no second derivative")
    }
}
