//! Flex: tiles of queries against tiles of keys, an online softmax over each span of keys, spans joined in order.
//!
//! Tiles and spans lie at absolute positions, every sum has one order, and what a query may not see is left out rather than
//! weighted with zero. So a token's bits are the same in a prefill, in a decode step, and wherever the keys' blocks or the
//! calls are cut; and spans may be computed side by side or one after the other.

use std::ops::Range;

use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Flex, TensorMetadata};

use super::cpu_few::{self, Few, Next, PAIRS, Tile};
use super::{KeyValueBlocks, Share, SoftmaxAttentionBackend, cpu_backward, cpu_decode};
use crate::base::buffer::SendPtr;
use crate::base::flex::tensor;
use crate::base::masked::{Init, Left, Limits, Right, Size, padded, parts, product, scratch, transpose};
use crate::base::math::{LANES, exp};
use crate::base::memory::arbitrary;
use crate::base::pool;
use crate::base::simd::{Level, level};
use crate::base::view::{Ahead, View, forward_strides, swapped};
use crate::simd;

type T = FloatTensor<Flex>;

/// Keys per tile.
pub(super) const KEYS: usize = 64;
/// Keys per span: what one thread sums up before the parts are joined. A multiple of [`KEYS`].
const SPAN: usize = 1024;
/// Queries (times heads that share their keys) per task.
const QUERIES: usize = 256;
/// Queries whose scores are in the first-level cache together.
pub(super) const STRIPE: usize = 32;
/// The most spans that a thread does in one go, and goes for each thread: what comes next is asked for in time only within one.
const TOGETHER: usize = 4;
const TURNS: usize = 8;
/// Floats of partial results that a call may keep to spread the spans of few queries over the threads.
const PARTIALS: usize = 4 << 20;

impl SoftmaxAttentionBackend for Flex {
    fn softmax_attention(q: T, blocks: KeyValueBlocks<Self>, past: usize) -> T {
        forward(q, blocks.keys, blocks.values, past, false).0
    }

    fn softmax_decode(q: T, k: T, v: T, blocks: KeyValueBlocks<Self>, shares: Vec<Share>) -> (T, Vec<T>, Vec<T>) {
        cpu_decode::step(q, k, v, blocks, &shares)
    }

    fn softmax_attention_train(q: T, k: T, v: T) -> (T, T) {
        forward(q, vec![k], vec![v], 0, true)
    }

    fn softmax_attention_backward(q: T, k: T, v: T, o: T, lse: T, d_o: T) -> (T, T, T) {
        cpu_backward::backward(q, k, v, o, lse, d_o)
    }
}

/// Keys and values of a row, wherever its blocks are cut.
pub(super) struct Cache<'a> {
    keys: Vec<View<'a>>,
    values: Vec<View<'a>>,
    /// Position of each block's first key.
    starts: Vec<usize>,
    len: usize,
    /// Whether all of it is bf16.
    halves: bool,
}

impl<'a> Cache<'a> {
    /// The first `len` of the blocks' tokens, or all.
    pub(super) fn new(keys: &'a [FlexTensor], values: &'a [FlexTensor], len: Option<usize>) -> Self {
        assert_eq!(keys.len(), values.len(), "as many blocks of values as of keys");
        let mut all = 0;
        let starts = keys.iter().map(|block| {
            let (shape, start) = (block.shape(), all);
            all += shape[shape.num_dims() - 2];
            start
        });
        let starts = starts.collect();
        let len = len.unwrap_or(all);
        assert!(len <= all, "{len} tokens in blocks of {all}");
        let views = |blocks: &'a [FlexTensor]| blocks.iter().map(View::new).collect::<Vec<_>>();
        let (keys, values) = (views(keys), views(values));
        let halves = keys.iter().chain(&values).all(View::is_bf16);
        Cache { keys, values, starts, len, halves }
    }

    /// Block and position in it of the key at position `from`.
    fn find(&self, from: usize) -> (usize, usize) {
        let block = self.starts.partition_point(|&start| start <= from) - 1;
        (block, from - self.starts[block])
    }

    /// Keys (of the block at least) in block `block`.
    fn length(&self, block: usize) -> usize {
        self.starts.get(block + 1).copied().unwrap_or(self.len) - self.starts[block]
    }

    fn blocks(&self, side: Side) -> &[View<'a>] {
        match side {
            Side::Keys => &self.keys,
            Side::Values => &self.values,
        }
    }

    /// The tile from position `from` on, or its beginning where a block ends inside, to be asked for if it is among `own`.
    fn ahead(&self, side: Side, at: (usize, usize), from: usize, own: &Range<usize>, dim: usize) -> Option<Ahead> {
        if !own.contains(&from) {
            return None;
        }
        let (block, inside) = self.find(from);
        let count = KEYS.min(self.length(block) - inside);
        self.blocks(side)[block].ahead(at, inside, count, dim)
    }

    /// A tile from position `from` on as pairs of bf16 where they lie.
    fn pairs(&self, side: Side, at: (usize, usize), from: usize) -> Option<(&'a [f32], usize)> {
        let (block, inside) = self.find(from);
        let whole = inside + KEYS <= self.length(block);
        whole.then(|| self.blocks(side)[block].pairs_in_place(at, inside))?
    }

    /// `count` keys or values from position `from` on as rows of `width` floats: where they lie or else copied to `memory`; and
    /// the distance of the rows.
    fn rows<'m>(
        &self,
        side: Side,
        call: &Call,
        at: (usize, usize),
        from: usize,
        count: usize,
        memory: &'m mut [f32],
    ) -> (&'m [f32], usize)
    where
        'a: 'm,
    {
        let blocks = self.blocks(side);
        let (mut block, mut inside) = self.find(from);
        // The product reads whole registers.
        let fits = side == Side::Keys || call.dim == call.width;
        if fits
            && inside + count <= self.length(block)
            && let Some(rows) = blocks[block].in_place(at, inside)
        {
            return rows;
        }
        let mut done = 0;
        while done < count {
            let n = (self.length(block) - inside).min(count - done);
            let to = &mut memory[done * call.width..];
            blocks[block].rows(call.level, at, inside, n, call.dim, to, call.width, call.width);
            done += n;
            (block, inside) = (block + 1, 0);
        }
        (memory, call.width)
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Keys,
    Values,
}

/// What one task works on: some tokens' queries of the heads that share a key head, token by token.
pub(super) struct Task {
    pub(super) row: usize,
    pub(super) kv_head: usize,
    /// First token, relative to the call.
    pub(super) token: usize,
    pub(super) tokens: usize,
}

/// Queries, and the keys and values that they look at.
pub(super) struct Call<'a> {
    level: Level,
    q: View<'a>,
    cache: Cache<'a>,
    past: usize,
    /// Heads per key head.
    group: usize,
    dim: usize,
    width: usize,
    scale: f32,
}

/// Of some queries over some keys: maximum and sum of exponentials of the scores, and the sum over the values.
pub(super) struct Partial<'a> {
    pub(super) max: &'a mut [f32],
    pub(super) sum: &'a mut [f32],
    pub(super) values: &'a mut [f32],
}

impl<'a> Partial<'a> {
    /// Whole cache lines: what lies behind begins with one, as the values do.
    fn words(rows: usize, width: usize) -> usize {
        (rows * (width + 2)).next_multiple_of(LANES)
    }

    /// Over `memory`, as it is.
    fn over(memory: &'a mut [f32], rows: usize, width: usize) -> Self {
        let [values, max, sum] = parts(memory, [rows * width, rows, rows]);
        Partial { max, sum, values }
    }

    /// The output of query `i`: its values over its sum.
    pub(super) fn write(&self, i: usize, width: usize, to: &mut [f32]) {
        for (to, value) in to.iter_mut().zip(&self.values[i * width..]) {
            *to = value / self.sum[i];
        }
    }
}

impl<'a> Call<'a> {
    /// `q [rows, heads, tokens, dim]` after `past` tokens.
    pub(super) fn new(q: &'a FlexTensor, cache: Cache<'a>, past: usize, kv_heads: usize) -> Self {
        let [_, heads, _, dim] = q.shape().dims();
        Call {
            level: level(),
            q: View::new(q),
            cache,
            past,
            group: heads / kv_heads,
            dim,
            width: padded(dim),
            scale: (1.0 / (dim as f64).sqrt()) as f32,
        }
    }

    fn visible(&self, task: &Task, query: usize) -> usize {
        self.past + task.token + query / self.group + 1
    }

    /// Keys that the last query of the task sees.
    fn most(&self, task: &Task) -> usize {
        self.past + task.token + task.tokens
    }

    /// Spans of keys that the task looks at.
    fn spans(&self, task: &Task) -> usize {
        self.most(task).div_ceil(SPAN)
    }

    /// The queries, scaled.
    fn queries(&self, task: &Task, to: &mut [f32]) {
        for g in 0..self.group {
            let at = (task.row, task.kv_head * self.group + g);
            let row = self.group * self.width;
            self.q.rows(self.level, at, task.token, task.tokens, self.dim, &mut to[g * self.width..], row, self.width);
        }
        to[..task.tokens * self.group * self.width].iter_mut().for_each(|x| *x *= self.scale);
    }

    /// Words of scratch memory that [`Call::span`] needs.
    fn span_words(&self) -> usize {
        2 * KEYS * self.width + self.dim * KEYS + STRIPE * KEYS
    }

    /// A whole tile for [`cpu_few`].
    fn tile<'m>(
        &'m self,
        side: Side,
        at: (usize, usize),
        first: usize,
        own: &Range<usize>,
        halves: bool,
        memory: &'m mut [f32],
    ) -> Tile<'m> {
        if first == own.start {
            self.ask_for(side, at, first, own);
        }
        let (rows, row) = match halves {
            true => self.cache.pairs(side, at, first).unwrap_or_else(|| unreachable!("asked for before")),
            false => self.cache.rows(side, self, at, first, KEYS, memory),
        };
        // Or else what is at hand: to ask for it takes nothing from anybody.
        let next = self.cache.ahead(side, at, first + KEYS, own, self.dim).and_then(|ahead| ahead.in_one_piece());
        let next = Next(next.unwrap_or(rows.as_ptr()));
        Tile { rows, row, next }
    }

    /// Asks for a tile at once, if it is among `own`.
    fn ask_for(&self, side: Side, at: (usize, usize), first: usize, own: &Range<usize>) {
        if let Some(ahead) = self.cache.ahead(side, at, first, own, self.dim) {
            ahead.ask_all();
        }
    }

    /// All queries of the task over the keys of span `span`, one of those in `own`, which this thread does one after the other.
    fn span(
        &self,
        task: &Task,
        span: usize,
        own: &Range<usize>,
        queries: &[f32],
        memory: &mut [f32],
        partial: &mut Partial,
    ) {
        let (width, dim, level) = (self.width, self.dim, self.level);
        let rows = task.tokens * self.group;
        let tile = KEYS * width;
        let [keys, values, keys_t, scores] = parts(memory, [tile, tile, dim * KEYS, STRIPE * KEYS]);
        partial.max.fill(f32::NEG_INFINITY);
        partial.sum.fill(0.0);
        partial.values.fill(0.0);
        let few = rows <= cpu_few::most(level) && dim == width;
        let end = ((span + 1) * SPAN).min(self.most(task));
        for first in (span * SPAN..end).step_by(KEYS) {
            let count = KEYS.min(end - first);
            let at = (task.row, task.kv_head);
            if few && first + KEYS <= end.min(self.visible(task, 0)) {
                let pairs = |side| self.cache.pairs(side, at, first).is_some();
                let halves = self.cache.halves && dim.is_multiple_of(PAIRS) && pairs(Side::Keys) && pairs(Side::Values);
                let keys = self.tile(Side::Keys, at, first, own, halves, keys);
                let values = self.tile(Side::Values, at, first, own, halves, values);
                cpu_few::attend(level, &Few { queries, rows, dim, keys, values, halves }, scores, partial);
                continue;
            }
            // These values and the next keys come meanwhile.
            self.ask_for(Side::Values, at, first, own);
            self.ask_for(Side::Keys, at, first + KEYS, own);
            let (rows_k, row) = self.cache.rows(Side::Keys, self, at, first, count, keys);
            transpose(level, count, dim, rows_k, row, keys_t, KEYS);
            let (rows_v, row_v) = self.cache.rows(Side::Values, self, at, first, count, values);
            // Queries that see none of these keys come first.
            let begin = (first.saturating_sub(self.past + task.token) * self.group).min(rows);
            for from in (begin..rows).step_by(STRIPE) {
                let n = STRIPE.min(rows - from);
                let mut counts = [0; STRIPE];
                for (i, visible) in counts[..n].iter_mut().enumerate() {
                    *visible = (self.visible(task, from + i) - first).min(count);
                }
                let most = counts[n - 1];
                let size = Size { rows: n, width: padded(most), k: dim };
                let left = Left { data: &queries[from * width..], row: width, step: 1 };
                let right = Right { data: keys_t, row: KEYS };
                product(level, size, Limits::All, left, right, Init::Zero, scores, KEYS);
                let mut shrink = [0.0; STRIPE];
                let (max, sum) = (&mut partial.max[from..from + n], &mut partial.sum[from..from + n]);
                weigh(level, scores, &counts[..n], max, sum, &mut shrink);
                let left = Left { data: scores, row: KEYS, step: 1 };
                let (size, right) = (Size { rows: n, width, k: most }, Right { data: rows_v, row: row_v });
                let sums = &mut partial.values[from * width..];
                product(level, size, Limits::To(&counts), left, right, Init::Scaled(&shrink), sums, width);
            }
        }
    }
}

simd! {
    /// Per row: the new running maximum, `scores` turned into `exp(score - maximum)` (zero from `counts` on), the running sum, and
    /// in `shrink` what earlier sums are multiplied with.
    fn weigh(scores: &mut [f32], counts: &[usize], max: &mut [f32], sum: &mut [f32], shrink: &mut [f32; STRIPE]) = weigh_body;
}

#[inline(always)]
pub(super) fn weigh_body<const FMA: bool>(
    scores: &mut [f32],
    counts: &[usize],
    max: &mut [f32],
    sum: &mut [f32],
    shrink: &mut [f32; STRIPE],
) {
    let mut highest = [0.0_f32; STRIPE];
    for (i, (&count, line)) in counts.iter().zip(scores.chunks_exact_mut(KEYS)).enumerate() {
        let line = &mut line[..padded(count)];
        line[count..].fill(f32::NEG_INFINITY);
        let mut most = [f32::NEG_INFINITY; LANES];
        for x in line.chunks_exact(LANES) {
            for lane in 0..LANES {
                // A NaN is no maximum; it comes through the exponential.
                most[lane] = if x[lane] > most[lane] { x[lane] } else { most[lane] };
            }
        }
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                most[lane] = if most[lane + half] > most[lane] { most[lane + half] } else { most[lane] };
            }
            half /= 2;
        }
        let new = if most[0] > max[i] { most[0] } else { max[i] };
        // Nothing but -inf so far: the sum stays 0, where -inf - -inf would be NaN.
        highest[i] = if new == f32::NEG_INFINITY { 0.0 } else { new };
        shrink[i] = max[i] - highest[i];
        max[i] = new;
    }
    for chunk in shrink[..padded(counts.len())].chunks_exact_mut(LANES) {
        let mut x = [0.0; LANES];
        x.copy_from_slice(chunk);
        chunk.copy_from_slice(&exp::<FMA>(x));
    }
    for (i, (&count, line)) in counts.iter().zip(scores.chunks_exact_mut(KEYS)).enumerate() {
        let mut sums = [0.0_f32; LANES];
        let highest = highest[i];
        for chunk in line[..padded(count)].chunks_exact_mut(LANES) {
            let mut x = [0.0; LANES];
            for lane in 0..LANES {
                x[lane] = chunk[lane] - highest;
            }
            let x = exp::<FMA>(x);
            chunk.copy_from_slice(&x);
            for lane in 0..LANES {
                sums[lane] += x[lane];
            }
        }
        sum[i] = sum[i] * shrink[i] + total(sums);
    }
}

/// The sum of all lanes, always in the same order.
#[inline(always)]
pub(super) fn total(mut sums: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
        half /= 2;
    }
    sums[0]
}

simd! {
    /// Adds the partial sums of the next span of keys, `row` floats of values per query.
    fn join(max: &mut [f32], sum: &mut [f32], values: &mut [f32], more: (&[f32], &[f32], &[f32]), row: usize) = join_body;
}

#[inline(always)]
fn join_body<const FMA: bool>(
    max: &mut [f32],
    sum: &mut [f32],
    values: &mut [f32],
    (more_max, more_sum, more_values): (&[f32], &[f32], &[f32]),
    row: usize,
) {
    for i in 0..max.len() {
        let new = if more_max[i] > max[i] { more_max[i] } else { max[i] };
        let safe = if new == f32::NEG_INFINITY { 0.0 } else { new };
        let mut factors = [0.0; LANES];
        (factors[0], factors[1]) = (max[i] - safe, more_max[i] - safe);
        let factors = exp::<FMA>(factors);
        max[i] = new;
        sum[i] = sum[i] * factors[0] + more_sum[i] * factors[1];
        for (x, y) in values[i * row..][..row].iter_mut().zip(&more_values[i * row..][..row]) {
            *x = *x * factors[0] + y * factors[1];
        }
    }
}

/// `o` and, if asked for, the logarithm of each query's sum of exponentials (else an empty tensor).
fn forward(q: T, keys: Vec<T>, values: Vec<T>, past: usize, want_lse: bool) -> (T, T) {
    let [rows, heads, tokens, dim] = q.shape().dims();
    let q = forward_strides(q);
    let keys: Vec<FlexTensor> = keys.into_iter().map(forward_strides).collect();
    let values: Vec<FlexTensor> = values.into_iter().map(forward_strides).collect();
    let kv_heads = keys[0].shape()[1];
    let mut o = arbitrary(rows * tokens * heads * dim);
    let mut lse = vec![0.0_f32; if want_lse { rows * heads * tokens } else { 0 }];
    if !o.is_empty() {
        let group = heads / kv_heads;
        let call = Call::new(&q, Cache::new(&keys, &values, None), past, kv_heads);
        let each = (QUERIES / group).clamp(1, tokens);
        let tiles = tokens.div_ceil(each);
        // The last tokens see the most keys: they begin.
        let task = |i: usize| {
            let token = (tiles - 1 - i % tiles) * each;
            let head = i / tiles;
            let (row, kv_head) = (head / kv_heads, head % kv_heads);
            (&call, Task { row, kv_head, token, tokens: each.min(tokens - token) })
        };
        let width = call.width;
        let (o, lse) = (SendPtr(o.as_mut_ptr()), SendPtr(lse.as_mut_ptr()));
        // SAFETY (of `finish`): `o` and `lse` hold a part for every token and head; each is written by one task.
        let finish = |_: usize, task: &Task, sums: &Partial| {
            for i in 0..task.tokens * group {
                let (token, head) = (task.token + i / group, task.kv_head * group + i % group);
                let at = ((task.row * tokens + token) * heads + head) * dim;
                // SAFETY: as above.
                sums.write(i, width, unsafe { std::slice::from_raw_parts_mut(o.get().add(at), dim) });
                if want_lse {
                    // SAFETY: as above.
                    unsafe {
                        *lse.get().add((task.row * heads + head) * tokens + token) = sums.max[i] + sums.sum[i].ln();
                    }
                }
            }
        };
        attend(rows * kv_heads * tiles, task, finish);
    }
    let lse_shape = if want_lse { [rows, heads, tokens] } else { [0; 3] };
    (swapped(tensor(o, [rows, tokens, heads, dim])), tensor(lse, lse_shape))
}

/// Does `tasks` tasks on the pool: `task(i)` says which, for the i-th, and `finish(i, …)` takes its sums over all keys.
/// All calls are of one `dim` and `group`.
pub(super) fn attend<'a, 'c: 'a>(
    tasks: usize,
    task: impl Fn(usize) -> (&'a Call<'c>, Task) + Sync,
    finish: impl Fn(usize, &Task, &Partial) + Sync,
) {
    if tasks == 0 {
        return;
    }
    let (mut deepest, mut tallest) = (0, 0);
    for (call, task) in (0..tasks).map(&task) {
        deepest = deepest.max(call.most(&task).div_ceil(SPAN));
        tallest = tallest.max(task.tokens);
    }
    let &Call { group, width, level, .. } = task(0).0;
    let words = Partial::words(tallest * group, width);
    if deepest > 1 && tasks < 4 * pool::threads() && tasks * deepest * words <= PARTIALS {
        let mut partials = arbitrary(tasks * deepest * words);
        let all = SendPtr(partials.as_mut_ptr());
        let together = (tasks * deepest / (TURNS * pool::threads())).clamp(1, TOGETHER);
        let runs = deepest.div_ceil(together);
        pool::run(tasks * runs, |i| {
            let (number, (call, task)) = (i / runs, task(i / runs));
            let count = task.tokens * group;
            let first = i % runs * together;
            let list = first..(first + together).min(call.spans(&task));
            let own = list.start * SPAN..(list.end * SPAN).min(call.most(&task));
            if list.is_empty() {
                return;
            }
            scratch(count * width + call.span_words(), |memory| {
                let (queries, memory) = memory.split_at_mut(count * width);
                call.queries(&task, queries);
                for span in list {
                    let start = (number * deepest + span) * words;
                    // SAFETY: each (task, span) has `words` floats of its own.
                    let sums = unsafe { std::slice::from_raw_parts_mut(all.get().add(start), words) };
                    call.span(&task, span, &own, queries, memory, &mut Partial::over(sums, count, width));
                }
            });
        });
        let all = SendPtr(partials.as_mut_ptr());
        let last = |i: usize| {
            let (call, task) = task(i);
            let count = task.tokens * group;
            // SAFETY: the task's partial sums, which nobody else touches now.
            let own = unsafe { std::slice::from_raw_parts_mut(all.get().add(i * deepest * words), deepest * words) };
            let (first, rest) = own.split_at_mut(words);
            let sums = Partial::over(first, count, width);
            for more in rest.chunks_exact_mut(words).take(call.spans(&task) - 1) {
                let more = Partial::over(more, count, width);
                let more = (&*more.max, &*more.sum, &*more.values);
                join(level, sums.max, sums.sum, sums.values, more, width);
            }
            finish(i, &task, &sums);
        };
        if tasks * deepest * words < 1 << 16 { (0..tasks).for_each(last) } else { pool::run(tasks, last) }
    } else {
        pool::run(tasks, |i| {
            let (call, task) = task(i);
            let count = task.tokens * group;
            let words = Partial::words(count, width);
            scratch(count * width + call.span_words() + 2 * words, |memory| {
                let [queries, sums, more, memory] = parts(memory, [count * width, words, words, call.span_words()]);
                call.queries(&task, queries);
                let mut sums = Partial::over(sums, count, width);
                let own = 0..call.most(&task);
                call.span(&task, 0, &own, queries, memory, &mut sums);
                for span in 1..call.spans(&task) {
                    let mut more = Partial::over(more, count, width);
                    call.span(&task, span, &own, queries, memory, &mut more);
                    let more = (&*more.max, &*more.sum, &*more.values);
                    join(level, sums.max, sums.sum, sums.values, more, width);
                }
                finish(i, &task, &sums);
            });
        });
    }
}
