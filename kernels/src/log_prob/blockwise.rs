//! The same sums as tensor operations on blocks of tokens × vocabulary: what a device without a kernel runs. At most
//! [`TOKENS`] × [`VOCAB`] logits are in memory at a time.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, FloatDType, Shape, Slice, TensorData};

const TOKENS: usize = 1024;
const VOCAB: usize = 8192;

/// See [`super::LogProbBackend::log_prob`].
pub(super) fn log_prob<B: Backend>(
    hidden: FloatTensor<B>,
    head: FloatTensor<B>,
    targets: &[u32],
    temperature: f64,
) -> FloatTensor<B> {
    let (n, vocab) = (hidden.shape()[0], head.shape()[0]);
    if n == 0 {
        return zeros::<B>(&hidden, [0, 4]);
    }
    let blocks = (0..n).step_by(TOKENS).map(|start| {
        let end = n.min(start + TOKENS);
        let hidden = rows::<B>(&hidden, start, end);
        let targets = &targets[start..end];
        // Per token: the largest logit so far, Σ e^(z-m), Σ e^(z-m)·(z-m), and the target's logit.
        let mut sums: Option<[FloatTensor<B>; 3]> = None;
        let mut at_target = zeros::<B>(&hidden, [end - start, 1]);
        for first in (0..vocab).step_by(VOCAB) {
            let last = vocab.min(first + VOCAB);
            let z = logits::<B>(&hidden, &head, first, last, temperature);
            let (index, one_hot) = positions::<B>(&z, targets, first, last);
            at_target = B::float_add(at_target, B::float_mul(B::float_gather(1, z.clone(), index), one_hot));
            let m = B::float_max_dim(z.clone(), 1);
            let m = match &sums {
                None => m,
                Some([before, ..]) => B::float_max_dim(B::float_cat(vec![before.clone(), m], 1), 1),
            };
            let d = B::float_sub(z, m.clone());
            let e = B::float_exp(d.clone());
            let mut s = B::float_sum_dim(e.clone(), 1);
            let mut t = B::float_sum_dim(B::float_mul(e, d), 1);
            if let Some([before, s_before, t_before]) = sums {
                let d = B::float_sub(before, m.clone());
                let e = B::float_exp(d.clone());
                t = B::float_add(t, B::float_mul(e.clone(), B::float_add(t_before, B::float_mul(s_before.clone(), d))));
                s = B::float_add(s, B::float_mul(e, s_before));
            }
            sums = Some([m, s, t]);
        }
        let [m, s, t] = sums.expect("log_prob: the vocabulary is empty");
        let log_s = B::float_log(s.clone());
        let log_p = B::float_sub(B::float_sub(at_target, m.clone()), log_s.clone());
        let entropy = B::float_sub(log_s.clone(), B::float_div(t, s));
        B::float_cat(vec![log_p, entropy, m, log_s], 1)
    });
    B::float_cat(blocks.collect(), 0)
}

/// See [`super::LogProbBackend::log_prob_backward`].
pub(super) fn log_prob_backward<B: Backend>(
    hidden: FloatTensor<B>,
    head: FloatTensor<B>,
    targets: &[u32],
    temperature: f64,
    out: FloatTensor<B>,
    d_out: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let ([n, dim], vocab) = (hidden.shape().dims(), head.shape()[0]);
    let head_dtype = FloatDType::from(head.dtype());
    let mut d_hidden = zeros::<B>(&hidden, [n, dim]);
    let mut d_head = zeros::<B>(&hidden, [vocab, dim]);
    for start in (0..n).step_by(TOKENS) {
        let end = n.min(start + TOKENS);
        let tokens = [Slice::from(start..end), Slice::from(0..dim)];
        let hidden = rows::<B>(&hidden, start, end);
        let column =
            |x: &FloatTensor<B>, i: usize| B::float_slice(x.clone(), &[Slice::from(start..end), Slice::from(i..i + 1)]);
        let (entropy, most, log_s) = (column(&out, 1), column(&out, 2), column(&out, 3));
        let scale = |x| B::float_mul_scalar(x, (1.0 / temperature).into());
        let (d_log_pi, d_entropy) = (scale(column(&d_out, 0)), scale(column(&d_out, 1)));
        let mut d_block = zeros::<B>(&hidden, [end - start, dim]);
        for first in (0..vocab).step_by(VOCAB) {
            let last = vocab.min(first + VOCAB);
            let entries = [Slice::from(first..last), Slice::from(0..dim)];
            let z = logits::<B>(&hidden, &head, first, last, temperature);
            let log_p = B::float_sub(B::float_sub(z, most.clone()), log_s.clone());
            let p = B::float_exp(log_p.clone());
            let through_entropy = B::float_mul(B::float_add(log_p, entropy.clone()), d_entropy.clone());
            let d_z = B::float_neg(B::float_mul(p, B::float_add(through_entropy, d_log_pi.clone())));
            let (index, one_hot) = positions::<B>(&d_z, &targets[start..end], first, last);
            let at_target = B::float_mul(one_hot, d_log_pi.clone());
            let d_z = B::float_scatter(1, d_z, index, at_target, burn::tensor::IndexingUpdateOp::Add);

            let weights = rows::<B>(&head, first, last);
            d_block = B::float_add(d_block, B::float_matmul(d_z.clone(), weights));
            let d_entries = B::float_matmul(B::float_transpose(d_z), hidden.clone());
            let d_entries = B::float_add(B::float_slice(d_head.clone(), &entries), d_entries);
            d_head = B::float_slice_assign(d_head, &entries, d_entries);
        }
        d_hidden = B::float_slice_assign(d_hidden, &tokens, d_block);
    }
    let d_head = if head_dtype == FloatDType::F32 { d_head } else { B::float_cast(d_head, head_dtype) };
    (d_hidden, d_head)
}

/// Logits of the vocabulary's entries `first..last`, `[tokens, last - first]`.
fn logits<B: Backend>(
    hidden: &FloatTensor<B>,
    head: &FloatTensor<B>,
    first: usize,
    last: usize,
    temperature: f64,
) -> FloatTensor<B> {
    let z = B::float_matmul(hidden.clone(), B::float_transpose(rows::<B>(head, first, last)));
    if temperature == 1.0 { z } else { B::float_mul_scalar(z, (1.0 / temperature).into()) }
}

/// Rows `start..end` in f32.
fn rows<B: Backend>(x: &FloatTensor<B>, start: usize, end: usize) -> FloatTensor<B> {
    let [n, dim] = x.shape().dims();
    let x = x.clone();
    let x = if (start, end) == (0, n) { x } else { B::float_slice(x, &[Slice::from(start..end), Slice::from(0..dim)]) };
    if x.dtype() == DType::F32 { x } else { B::float_cast(x, FloatDType::F32) }
}

/// Where each target lies in the block `first..last` of the vocabulary (0 when elsewhere), and 1 or 0 for whether it does:
/// both `[tokens, 1]`.
fn positions<B: Backend>(
    like: &FloatTensor<B>,
    targets: &[u32],
    first: usize,
    last: usize,
) -> (burn::backend::tensor::IntTensor<B>, FloatTensor<B>) {
    let place = |&t: &u32| (first..last).contains(&(t as usize)).then(|| (t as usize - first) as i32);
    let shape = [targets.len(), 1];
    let index: Vec<i32> = targets.iter().map(|t| place(t).unwrap_or(0)).collect();
    let one_hot: Vec<f32> = targets.iter().map(|t| f32::from(place(t).is_some())).collect();
    let device = like.device();
    (
        B::int_from_data(TensorData::new(index, shape), &device),
        B::float_from_data(TensorData::new(one_hot, shape), &device),
    )
}

fn zeros<B: Backend>(like: &FloatTensor<B>, shape: [usize; 2]) -> FloatTensor<B> {
    B::float_zeros(Shape::from(shape), &like.device(), FloatDType::F32)
}
