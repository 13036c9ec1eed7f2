//! The definition, as plain tensor operations: online softmax over blocks.

use burn::tensor::{Bool, DType, Device, Tensor, TensorData};

use super::{KeyValues, QUERY_BLOCK};
use crate::cast;

/// Keys that scores are formed for at once.
const KEY_BLOCK: usize = 256;

/// See [`super::softmax_attention`].
pub fn softmax_attention(q: Tensor<4>, blocks: &[KeyValues], past: usize) -> Tensor<4> {
    let tokens = q.dims()[2];
    let blocks = &blocks.iter().flat_map(cut).collect::<Vec<_>>();
    if tokens <= QUERY_BLOCK {
        return query_block(q, blocks, past);
    }
    let parts = (0..tokens)
        .step_by(QUERY_BLOCK)
        .map(|start| {
            let m = QUERY_BLOCK.min(tokens - start);
            query_block(q.clone().narrow(2, start, m), blocks, past + start)
        })
        .collect();
    Tensor::cat(parts, 2)
}

/// At most [`KEY_BLOCK`] keys at a time, so that no matrix of scores grows with the text.
fn cut(block: &KeyValues) -> Vec<KeyValues> {
    let tokens = block.keys.dims()[2];
    if tokens <= KEY_BLOCK {
        return vec![block.clone()];
    }
    let part = |start: usize| {
        let narrow = |x: &Tensor<4>| x.clone().narrow(2, start, KEY_BLOCK.min(tokens - start));
        KeyValues { keys: narrow(&block.keys), values: narrow(&block.values) }
    };
    (0..tokens).step_by(KEY_BLOCK).map(part).collect()
}

/// What has been seen of the keys so far, per query: maximum, sum of exponentials, and their sum over the values.
struct Running {
    max: Tensor<4>,
    sum: Tensor<4>,
    values: Tensor<4>,
}

/// Queries at positions `past ..` against every block that holds a key at or before them.
fn query_block(q: Tensor<4>, blocks: &[KeyValues], past: usize) -> Tensor<4> {
    let [rows, heads, tokens, dim] = q.dims();
    let kv_heads = blocks[0].keys.dims()[1];
    let group = heads / kv_heads;
    let device = q.device();
    // The heads of a group stand below each other as more queries of one key head.
    let q = cast(q, DType::F32).mul_scalar(1.0 / (dim as f64).sqrt()).reshape([rows, kv_heads, group * tokens, dim]);

    let mut running: Option<Running> = None;
    let mut first_key = 0;
    for block in blocks {
        let count = block.keys.dims()[2];
        if first_key >= past + tokens {
            break;
        }
        let keys = cast(block.keys.clone(), DType::F32);
        let values = cast(block.values.clone(), DType::F32);
        let mut scores = q.clone().matmul(keys.swap_dims(2, 3));
        if first_key + count > past + 1 {
            let future = future_mask(group, tokens, past, first_key, count, &device);
            scores = scores.mask_fill(future.expand([rows, kv_heads, group * tokens, count]), f32::NEG_INFINITY);
        }
        // The maximum only keeps exp in range; the result does not depend on it, so no gradient goes through it.
        let max = scores.clone().detach().max_dim(3);
        running = Some(match running {
            None => {
                let weights = (scores - max.clone()).exp();
                Running { sum: weights.clone().sum_dim(3), values: weights.matmul(values), max }
            }
            Some(before) => {
                let max = before.max.clone().max_pair(max);
                let weights = (scores - max.clone()).exp();
                let shrink = (before.max - max.clone()).exp();
                Running {
                    sum: before.sum * shrink.clone() + weights.clone().sum_dim(3),
                    values: before.values * shrink + weights.matmul(values),
                    max,
                }
            }
        });
        first_key += count;
    }
    match running {
        Some(seen) => (seen.values / seen.sum).reshape([rows, heads, tokens, dim]),
        None => Tensor::zeros([rows, heads, tokens, dim], &device),
    }
}

/// True where a key comes after the query: `[1, 1, group · tokens, count]`.
fn future_mask(
    group: usize,
    tokens: usize,
    past: usize,
    first_key: usize,
    count: usize,
    device: &Device,
) -> Tensor<4, Bool> {
    let mut mask = Vec::with_capacity(group * tokens * count);
    for _ in 0..group {
        for query in past..past + tokens {
            mask.extend((first_key..first_key + count).map(|key| key > query));
        }
    }
    Tensor::from_data(TensorData::new(mask, [1, 1, group * tokens, count]), device)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tensor};

    use super::super::{KeyValues, QUERY_BLOCK, softmax_attention};

    /// Plain softmax in f64 for one query head.
    fn naive(q: &[f32], k: &[f32], v: &[f32], dim: usize, past: usize) -> Vec<f64> {
        let mut out = Vec::new();
        for t in 0..q.len() / dim {
            let dot = |j: usize| (0..dim).map(|c| q[t * dim + c] as f64 * k[j * dim + c] as f64).sum::<f64>();
            let e: Vec<f64> = (0..=past + t).map(|j| (dot(j) / (dim as f64).sqrt()).exp()).collect();
            let sum: f64 = e.iter().sum();
            out.extend(
                (0..dim).map(|c| e.iter().enumerate().map(|(j, e)| e / sum * v[j * dim + c] as f64).sum::<f64>()),
            );
        }
        out
    }

    #[test]
    fn blocks_equal_the_plain_softmax_at_odd_sizes() {
        let device = Device::flex();
        let (rows, dim) = (2, 6);
        for (heads, kv_heads) in [(4, 2), (3, 1), (2, 2)] {
            for (tokens, past, block) in [(1, 0, 4), (1, 13, 5), (7, 0, 256), (QUERY_BLOCK + 1, 3, 64), (5, 11, 8)] {
                let draw = |heads: usize, tokens: usize| {
                    Tensor::<4>::random([rows, heads, tokens, dim], Distribution::Normal(0.0, 1.5), &device)
                };
                let all = past + tokens;
                let (q, k, v) = (draw(heads, tokens), draw(kv_heads, all), draw(kv_heads, all));
                let blocks: Vec<KeyValues> = (0..all)
                    .step_by(block)
                    .map(|start| {
                        let n = block.min(all - start);
                        KeyValues { keys: k.clone().narrow(2, start, n), values: v.clone().narrow(2, start, n) }
                    })
                    .collect();
                let host = |x: Tensor<4>| x.try_into_vec_as::<f32>().unwrap();
                let o = host(softmax_attention(q.clone(), &blocks, past));
                let (q, k, v) = (host(q), host(k), host(v));
                for row in 0..rows {
                    for head in 0..heads {
                        let at = (row * heads + head) * tokens * dim;
                        let kv = (row * kv_heads + head / (heads / kv_heads)) * all * dim;
                        let expected =
                            naive(&q[at..at + tokens * dim], &k[kv..kv + all * dim], &v[kv..kv + all * dim], dim, past);
                        for (got, expected) in o[at..].iter().zip(&expected) {
                            assert!((*got as f64 - expected).abs() < 2e-6 * 10.0, "{got} is not {expected}");
                        }
                    }
                }
            }
        }
    }
}
