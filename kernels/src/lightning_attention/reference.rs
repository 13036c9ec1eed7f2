//! The definition, as plain tensor operations on blocks.

use burn::tensor::{DType, Device, Tensor, TensorData, activation};

use super::BLOCK;
use crate::cast;

/// See [`super::lightning_attention`]; in f32 whatever comes in.
pub fn lightning_attention(
    qkv: Tensor<4>,
    slopes: &[f64],
    state: Option<Tensor<4>>,
    starts: Option<&[usize]>,
    lengths: Option<&[usize]>,
    want_state: bool,
) -> (Tensor<4>, Option<Tensor<4>>) {
    let [rows, heads, tokens, dim] = qkv.dims();
    let dim = dim / 3;
    let (qkv, mut state) = (cast(qkv, DType::F32), state.map(|state| cast(state, DType::F32)));
    let [q, k, v] = [0, dim, 2 * dim].map(|from| qkv.clone().narrow(3, from, dim));
    let device = qkv.device();
    if rows == 0 || tokens == 0 {
        let state = want_state.then(|| state.unwrap_or_else(|| Tensor::zeros([rows, heads, dim, dim], &device)));
        return (v, state);
    }
    let mut outputs = Vec::with_capacity(tokens.div_ceil(BLOCK) + 1);
    // One table serves every whole block of the call.
    let full = (tokens >= BLOCK).then(|| within_block(slopes, BLOCK, &device));
    // Where rows disagree about the boundaries, those of the first row serve all: the sum is the same.
    let first_end = BLOCK - starts.and_then(|starts| starts.first()).map_or(0, |start| start % BLOCK);
    let mut start = 0;
    while start < tokens {
        let end = if start == 0 { first_end } else { start + BLOCK }.min(tokens);
        let m = end - start;
        let last = end == tokens;
        let (q, k, v) = if m == tokens {
            (q.clone(), k.clone(), v.clone())
        } else {
            (q.clone().narrow(2, start, m), k.clone().narrow(2, start, m), v.clone().narrow(2, start, m))
        };
        // How many tokens of the block count, per row.
        let counts: Option<Vec<usize>> = lengths
            .map(|lengths| lengths.iter().map(|&n| n.saturating_sub(start).min(m)).collect())
            .filter(|counts: &Vec<usize>| counts.iter().any(|&n| n != m));

        let mut scores = q.clone().matmul(k.clone().swap_dims(2, 3));
        if m > 1 {
            scores = scores
                * match &full {
                    Some(full) if m == BLOCK => full.clone(),
                    _ => within_block(slopes, m, &device),
                };
        }
        let mut o = scores.matmul(v.clone());
        if let Some(state) = &state {
            o = o + q.matmul(state.clone()) * since_start(slopes, m, &device);
        }
        outputs.push(o);

        if want_state || !last {
            let (until_end, whole) = match &counts {
                None => (until_end(slopes, &[m], m, &device), whole_block(slopes, &[m], &device)),
                Some(counts) => (until_end(slopes, counts, m, &device), whole_block(slopes, counts, &device)),
            };
            let k = if m > 1 || counts.is_some() { k * until_end } else { k };
            let update = k.swap_dims(2, 3).matmul(v);
            state = Some(match state {
                None => update,
                Some(state) => state * whole + update,
            });
        }
        start = end;
    }
    debug_assert_eq!(slopes.len(), heads);
    debug_assert!(lengths.is_none_or(|lengths| lengths.len() == rows));
    let o = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(outputs, 2) };
    (o, state.filter(|_| want_state))
}

/// See [`super::decode`].
pub fn decode(
    qkv: Tensor<2>,
    gate: Tensor<2>,
    state: Tensor<4>,
    slopes: &[f64],
    norm: Tensor<1>,
    eps: f64,
) -> (Tensor<2>, Tensor<4>) {
    let [rows, heads, dim, _] = state.dims();
    let dtype = qkv.dtype();
    let qkv = cast(activation::silu(qkv), DType::F32).reshape([rows, heads, 1, 3 * dim]);
    let (o, state) = lightning_attention(qkv, slopes, Some(state), None, None, true);
    let o = o.reshape([rows, heads * dim]);
    let scale = o.clone().square().mean_dim(1).add_scalar(eps).sqrt().recip();
    let o = o * scale * cast(norm, DType::F32).unsqueeze();
    (cast(o, dtype) * cast(activation::sigmoid(gate), dtype), state.unwrap_or_else(|| unreachable!("asked for")))
}

/// `exp(-s(i-j))` for j ≤ i, else 0: `[1, heads, m, m]`.
fn within_block(slopes: &[f64], m: usize, device: &Device) -> Tensor<4> {
    // The m powers of a head fill its whole triangle: no m² exponentials.
    let mut values = vec![0f32; slopes.len() * m * m];
    for (h, slope) in slopes.iter().enumerate() {
        let powers: Vec<f32> = (0..m).map(|n| (-slope * n as f64).exp() as f32).collect();
        for i in 0..m {
            let row = (h * m + i) * m;
            for j in 0..=i {
                values[row + j] = powers[i - j];
            }
        }
    }
    Tensor::from_data(TensorData::new(values, [1, slopes.len(), m, m]), device)
}

/// `exp(-s·i)`, i = 1..m: what is left at token i of the state before the block: `[1, heads, m, 1]`.
fn since_start(slopes: &[f64], m: usize, device: &Device) -> Tensor<4> {
    let values: Vec<f32> = slopes.iter().flat_map(|s| (1..=m).map(move |i| (-s * i as f64).exp() as f32)).collect();
    Tensor::from_data(TensorData::new(values, [1, slopes.len(), m, 1]), device)
}

/// `exp(-s(n-j))` for j ≤ n, 0 for the padding behind a row's n tokens: `[rows or 1, heads, m, 1]`.
fn until_end(slopes: &[f64], counts: &[usize], m: usize, device: &Device) -> Tensor<4> {
    let mut values = Vec::with_capacity(counts.len() * slopes.len() * m);
    for &n in counts {
        for slope in slopes {
            values.extend((1..=m).map(|j| if j <= n { (-slope * (n - j) as f64).exp() as f32 } else { 0.0 }));
        }
    }
    Tensor::from_data(TensorData::new(values, [counts.len(), slopes.len(), m, 1]), device)
}

/// `exp(-s·n)`: `[rows or 1, heads, 1, 1]`.
fn whole_block(slopes: &[f64], counts: &[usize], device: &Device) -> Tensor<4> {
    let values: Vec<f32> =
        counts.iter().flat_map(|&n| slopes.iter().map(move |s| (-s * n as f64).exp() as f32)).collect();
    Tensor::from_data(TensorData::new(values, [counts.len(), slopes.len(), 1, 1]), device)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tensor};

    use super::{BLOCK, lightning_attention};

    /// q, k and v.
    fn random(rows: usize, heads: usize, tokens: usize, dim: usize) -> [Tensor<4>; 3] {
        let device = Device::flex();
        [0; 3].map(|_| Tensor::random([rows, heads, tokens, dim], Distribution::Normal(0.0, 1.0), &device))
    }

    /// The recurrence in f64, token by token: outputs and the state, row-major.
    fn recurrence(q: &[f32], k: &[f32], v: &[f32], slope: f64, dim: usize, state: &mut [f64]) -> Vec<f64> {
        let mut out = Vec::new();
        for t in 0..q.len() / dim {
            let at = |x: &[f32], i: usize| x[t * dim + i] as f64;
            for a in 0..dim {
                for b in 0..dim {
                    state[a * dim + b] = (-slope).exp() * state[a * dim + b] + at(k, a) * at(v, b);
                }
            }
            out.extend((0..dim).map(|b| (0..dim).map(|a| at(q, a) * state[a * dim + b]).sum::<f64>()));
        }
        out
    }

    fn close(got: &[f32], expected: &[f64]) {
        let norm = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
        for (i, (g, e)) in got.iter().zip(expected).enumerate() {
            assert!((*g as f64 - e).abs() < 1e-5 * norm.max(1.0) * 10.0, "at {i}: {g} is not {e}");
        }
    }

    #[test]
    fn blocks_equal_the_recurrence_at_odd_sizes() {
        let slopes = [0.917, 0.01, 0.3];
        for tokens in [1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 37] {
            let (rows, dim) = (2, 5);
            let [q, k, v] = random(rows, slopes.len(), tokens, dim);
            let initial =
                Tensor::<4>::random([rows, slopes.len(), dim, dim], Distribution::Normal(0.0, 1.0), &q.device());
            let lengths = [tokens, tokens / 2];
            let qkv = Tensor::cat(vec![q.clone(), k.clone(), v.clone()], 3);
            let before = Some(initial.clone());
            let (o, state) = lightning_attention(qkv, &slopes, before, Some(&[3, 3]), Some(&lengths), true);
            let host = |x: Tensor<4>| x.try_into_vec_as::<f32>().unwrap();
            let (q, k, v, o) = (host(q), host(k), host(v), host(o));
            let (initial, state) = (host(initial), host(state.unwrap()));
            for (row, &length) in lengths.iter().enumerate() {
                for (h, &slope) in slopes.iter().enumerate() {
                    let at = (row * slopes.len() + h) * tokens * dim;
                    let used = at..at + length * dim;
                    let s = (row * slopes.len() + h) * dim * dim;
                    let mut expected_state: Vec<f64> = initial[s..s + dim * dim].iter().map(|&x| x as f64).collect();
                    let expected = recurrence(
                        &q[used.clone()],
                        &k[used.clone()],
                        &v[used.clone()],
                        slope,
                        dim,
                        &mut expected_state,
                    );
                    if length > 0 {
                        close(&o[used], &expected);
                    }
                    close(&state[s..s + dim * dim], &expected_state);
                }
            }
        }
    }
}
