//! A step of decoding: one token for each of many rows.

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use super::{KeyValueBlocks, KeyValues, Share, SoftmaxAttentionBackend, softmax_attention};
use crate::base::on_cpu;
use crate::cast;

/// What one row has read: keys and values of one sequence, in blocks.
#[derive(Debug, Clone)]
pub struct Past {
    /// Keys, already rotated: `[kv_heads, room, head_dim]` each, from position 0 on, all full but the last.
    pub keys: Vec<Tensor<3>>,
    /// Values, in blocks as the keys.
    pub values: Vec<Tensor<3>>,
    /// Tokens in them.
    pub tokens: usize,
}

/// One token for each of many rows: its key and value are added to the row's own, and its query attends to all of them.
///
/// - `q`: `[rows, heads · head_dim]`, rotated; `k`, rotated, and `v`: `[rows, kv_heads · head_dim]`.
/// - `pasts`: one for each row, with room for another token in its last block. On the CPU f32 and bf16 are written in place where that
///   block has no other owner.
///
/// Returns `[rows, heads · head_dim]` in f32, and the last block of keys and of values of each row. The bits are those of
/// [`softmax_attention`].
///
/// # Panics
/// If the shapes do not agree, or a row has no room.
pub fn decode(q: Tensor<2>, k: Tensor<2>, v: Tensor<2>, pasts: Vec<Past>) -> (Tensor<2>, Vec<[Tensor<3>; 2]>) {
    let [rows, inner] = q.dims();
    assert_eq!(pasts.len(), rows, "a past for every row");
    let dims = pasts.first().and_then(|past| past.keys.first()).map(|block| block.dims());
    let Some([kv_heads, _, dim]) = dims else {
        assert_eq!(rows, 0, "a row needs a block");
        return (Tensor::zeros([0, inner], &q.device()), Vec::new());
    };
    assert_eq!([k.dims(), v.dims()], [[rows, kv_heads * dim]; 2], "a key and a value of every row");
    assert!(inner % (kv_heads * dim) == 0, "{inner} query values share {kv_heads} heads of {dim} evenly");
    for (row, past) in pasts.iter().enumerate() {
        let room = |blocks: &[Tensor<3>]| blocks.iter().map(|block| block.dims()[1]).sum::<usize>();
        let fits = |blocks: &[Tensor<3>]| {
            let last = blocks.last().map_or(0, |block| block.dims()[1]);
            (room(blocks) - last..room(blocks)).contains(&past.tokens)
        };
        assert!(fits(&past.keys) && fits(&past.values), "row {row} has no room for token {}", past.tokens);
        let alike = |(k, v): (&Tensor<3>, &Tensor<3>)| k.dims() == v.dims() && k.dims() == [kv_heads, k.dims()[1], dim];
        let all = past.keys.len() == past.values.len() && past.keys.iter().zip(&past.values).all(alike);
        assert!(all, "row {row}: keys and values are blocks [{kv_heads}, room, {dim}], cut alike");
    }
    let new = [&q, &k, &v].into_iter().all(|x| x.dtype() == DType::F32 && !x.device().is_autodiff());
    let mut blocks = pasts.iter().flat_map(|past| past.keys.iter().chain(&past.values));
    if !(on_cpu(&q) && new && blocks.all(|x| matches!(x.dtype(), DType::F32 | DType::BF16))) {
        return decode_apart(q, k, v, pasts);
    }
    let shares = pasts.iter().map(|past| Share { blocks: past.keys.len(), tokens: past.tokens }).collect();
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for past in pasts {
        keys.extend(past.keys.into_iter().map(Tensor::into_dispatch));
        values.extend(past.values.into_iter().map(Tensor::into_dispatch));
    }
    let q = q.reshape([rows, inner / dim, 1, dim]);
    let blocks = KeyValueBlocks { keys, values };
    let (o, keys, values) =
        Dispatch::softmax_decode(q.into_dispatch(), k.into_dispatch(), v.into_dispatch(), blocks, shares);
    let last = keys.into_iter().zip(values).map(|(k, v)| [Tensor::from_dispatch(k), Tensor::from_dispatch(v)]);
    (Tensor::from_dispatch(o), last.collect())
}

/// [`decode`], each row alone.
pub(super) fn decode_apart(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    pasts: Vec<Past>,
) -> (Tensor<2>, Vec<[Tensor<3>; 2]>) {
    let inner = q.dims()[1];
    let (mut outputs, mut last) = (Vec::new(), Vec::new());
    for (row, Past { mut keys, mut values, tokens }) in pasts.into_iter().enumerate() {
        // Taken out of the list so that its buffer has one owner.
        let add = |blocks: &mut Vec<Tensor<3>>, new: &Tensor<2>| {
            let block = blocks.pop().expect("`decode` has looked");
            let [heads, room, dim] = block.dims();
            let at = tokens - blocks.iter().map(|block| block.dims()[1]).sum::<usize>();
            let new = cast(new.clone().narrow(0, row, 1).reshape([heads, 1, dim]), block.dtype());
            blocks.push(block.slice_assign([0..heads, at..at + 1, 0..dim], new));
            (at + 1, room)
        };
        let (used, room) = add(&mut keys, &k);
        add(&mut values, &v);
        let whole = keys.len() - 1;
        let cut = |i: usize, x: &Tensor<3>| {
            let x = x.clone().unsqueeze_dim::<4>(0);
            if i < whole || used == room { x } else { x.narrow(2, 0, used) }
        };
        let blocks = keys.iter().zip(&values).enumerate();
        let blocks: Vec<_> = blocks.map(|(i, (k, v))| KeyValues { keys: cut(i, k), values: cut(i, v) }).collect();
        let dim = keys[0].dims()[2];
        let q = q.clone().narrow(0, row, 1).reshape([1, inner / dim, 1, dim]);
        outputs.push(softmax_attention(q, &blocks, tokens).reshape([1, inner]));
        drop(blocks);
        last.extend(keys.pop().zip(values.pop()).map(|(k, v)| [k, v]));
    }
    let o = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(outputs, 0) };
    (o, last)
}
