//! Flex: one token for many rows, each over its own keys and values, in one parallel region. A batch of short texts would
//! otherwise spend its time on tensor operations that move one row each.

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Element, bf16};
use bytemuck::Pod;

use super::cpu::{Cache, Call, Partial, Task, attend};
use super::{KeyValueBlocks, Share};
use crate::base::buffer::SendPtr;
use crate::base::flex::{stored_mut, tensor};
use crate::base::masked::padded;
use crate::base::memory::arbitrary;
use crate::base::view::{forward_strides, whole};

type T = FloatTensor<Flex>;

/// See [`super::decode`].
pub(super) fn step(q: T, k: T, v: T, blocks: KeyValueBlocks<Flex>, shares: &[Share]) -> (T, Vec<T>, Vec<T>) {
    let [rows, heads, _, dim] = q.shape().dims();
    let KeyValueBlocks { mut keys, mut values } = blocks;
    let kv_heads = keys[0].shape()[0];
    add(&mut keys, k, shares, dim);
    add(&mut values, v, shares, dim);
    let q = forward_strides(q);
    let group = heads / kv_heads;
    let mut o = arbitrary(rows * heads * dim);
    let mut end = 0;
    let calls: Vec<Call> = (shares.iter())
        .map(|share| {
            let own = end..end + share.blocks;
            end = own.end;
            let cache = Cache::new(&keys[own.clone()], &values[own], Some(share.tokens + 1));
            Call::new(&q, cache, share.tokens, kv_heads)
        })
        .collect();
    // The longest begin.
    let mut order: Vec<usize> = (0..rows).collect();
    order.sort_by_key(|&row| std::cmp::Reverse(shares[row].tokens));
    let task = |i: usize| {
        let row = order[i / kv_heads];
        (&calls[row], Task { row, kv_head: i % kv_heads, token: 0, tokens: 1 })
    };
    let (width, to) = (padded(dim), SendPtr(o.as_mut_ptr()));
    attend(rows * kv_heads, task, |_, task: &Task, sums: &Partial| {
        for i in 0..group {
            let at = (task.row * heads + task.kv_head * group + i) * dim;
            // SAFETY: `o` holds a part for every head of every row; each is written by one task.
            sums.write(i, width, unsafe { std::slice::from_raw_parts_mut(to.get().add(at), dim) });
        }
    });
    drop(calls);
    (tensor(o, [rows, heads * dim]), last(keys, shares), last(values, shares))
}

/// Adds a token `[rows, kv_heads · dim]` to the last block of each row, in the block's dtype.
fn add(blocks: &mut [T], new: T, shares: &[Share], dim: usize) {
    let new = whole(new);
    let new = new.storage::<f32>();
    let mut first = 0;
    for (row, share) in shares.iter().enumerate() {
        let (before, rest) = blocks[first..].split_at_mut(share.blocks - 1);
        first += share.blocks;
        let at = share.tokens - before.iter().map(|block| block.shape()[1]).sum::<usize>();
        let [kv_heads, room, _] = rest[0].shape().dims();
        let own = &new[row * kv_heads * dim..][..kv_heads * dim];
        let places = (0..kv_heads).map(|head| (head * room + at) * dim).zip(own.chunks_exact(dim));
        match rest[0].dtype() {
            DType::BF16 => write::<bf16>(&mut rest[0], places, bf16::from_f32),
            _ => write::<f32>(&mut rest[0], places, |x| x),
        }
    }
}

/// Writes values to these places of `block`: in place if nobody else holds it, else in a copy.
fn write<'a, E: Element + Pod>(block: &mut T, places: impl Iterator<Item = (usize, &'a [f32])>, to: impl Fn(f32) -> E) {
    let block = stored_mut::<E>(block);
    for (at, values) in places {
        block[at..at + values.len()].iter_mut().zip(values).for_each(|(place, &x)| *place = to(x));
    }
}

/// The last block of each row.
fn last(blocks: Vec<T>, shares: &[Share]) -> Vec<T> {
    let mut blocks = blocks.into_iter();
    shares.iter().filter_map(|share| blocks.by_ref().take(share.blocks).last()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::flex::FlexTensor;
    use burn::tensor::TensorData;

    /// The buffer of a block that nobody else holds stays; another holder keeps what it has.
    #[test]
    fn a_block_is_written_where_it_is() {
        let shares = [Share { blocks: 2, tokens: 5 }, Share { blocks: 1, tokens: 0 }];
        let ones = |shape: [usize; 3]| tensor(vec![1.0; shape.iter().product()], shape);
        let draw = || vec![ones([1, 4, 8]), ones([1, 4, 8]), ones([1, 2, 8])];
        let place = |x: &T| x.storage::<f32>().as_ptr() as usize;
        let (keys, values) = (draw(), draw());
        let (places, held) = ([place(&keys[1]), place(&keys[2])], values[2].clone());
        let new = || tensor(vec![2.0; 16], [2, 8]);
        let q = tensor(vec![0.5; 16], [2, 1, 1, 8]);
        let (_, keys, values) = step(q.clone(), new(), new(), KeyValueBlocks { keys, values }, &shares);
        assert_eq!(keys.iter().map(place).collect::<Vec<_>>(), places);
        assert_eq!(keys[0].storage::<f32>()[8..16], [2.0; 8]);
        assert_ne!(place(&values[1]), place(&held));
        assert_eq!((held.storage::<f32>()[0], values[1].storage::<f32>()[0]), (1.0, 2.0));

        let halves =
            |shape: [usize; 3]| FlexTensor::from_data(TensorData::new(vec![bf16::ONE; shape.iter().product()], shape));
        let draw = || vec![halves([1, 4, 8]), halves([1, 4, 8]), halves([1, 2, 8])];
        let place = |x: &T| x.storage::<bf16>().as_ptr() as usize;
        let (keys, values) = (draw(), draw());
        let places = [place(&keys[1]), place(&keys[2])];
        let (_, keys, _) = step(q, new(), new(), KeyValueBlocks { keys, values }, &shares);
        assert_eq!(keys.iter().map(place).collect::<Vec<_>>(), places);
        assert_eq!(keys[0].storage::<bf16>()[7..9], [1.0, 2.0].map(bf16::from_f32));
    }
}
