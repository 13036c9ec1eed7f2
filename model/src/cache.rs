//! The cache as a value: what the model keeps of each row's past, and what can be done with it.
//!
//! A lightning layer keeps one `[heads, d_k, d_v]` state a row, whatever the length; a softmax layer keeps keys and
//! values in blocks. Tensors are reference-counted and copied on write, so a snapshot or a cloned row shares every
//! block with its origin. A lightning state can't be trimmed: going back needs a snapshot taken there.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use m1_kernels::base::on_cpu;
use m1_kernels::softmax_attention::{KeyValues, Past};

use crate::batch::ints;
use crate::config::{AttentionKind, ModelConfig};
use crate::model::M1;

/// Tokens of a row's first block of keys and values.
pub const BLOCK: usize = 256;

/// Tokens of the largest block on the CPU: to hand over a block costs a decode step two microseconds, and what shares a block that
/// is not full copies it.
pub const LARGEST_BLOCK_CPU: usize = 1024;

/// Tokens of the largest block on other devices, where each launch takes only a few blocks.
pub const LARGEST_BLOCK: usize = 4096;

/// Tokens of the block that begins at position `start`, a multiple of [`BLOCK`]: as many as lie before it, within bounds.
/// So a text fills at least half of what is held for it, and every block begins at a multiple of its size.
fn block_at(start: usize, largest: usize) -> usize {
    start.clamp(BLOCK, largest)
}

/// Why a cache can't go where it was sent.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CacheError {
    /// The snapshot is of another text, or of a later point of this one.
    #[error(
        "cache row {row} can't be truncated to the snapshot: its first {snapshot} tokens are not the snapshot's \
         (the row holds {tokens})"
    )]
    OtherText {
        /// Row asked for.
        row: usize,
        /// Tokens in the row.
        tokens: usize,
        /// Tokens in the snapshot.
        snapshot: usize,
    },
}

/// Keys and values of some tokens, `[kv_heads, tokens, head_dim]` each. Clones share them.
#[derive(Debug, Clone)]
struct Block {
    keys: Tensor<3>,
    values: Tensor<3>,
    /// Shared by the clones: tells which blocks are the same memory, and whether this is the only one.
    mark: Arc<()>,
}

impl Block {
    fn new(keys: Tensor<3>, values: Tensor<3>) -> Self {
        Self { keys, values, mark: Arc::new(()) }
    }

    /// Tokens that it has room for.
    fn room(&self) -> usize {
        self.keys.dims()[1]
    }

    /// After it was written to: where others hold the block too, this one is a copy from now on.
    fn written(self) -> Self {
        let mark = if Arc::strong_count(&self.mark) == 1 { self.mark } else { Arc::new(()) };
        Self { mark, ..self }
    }

    fn bytes(&self) -> u64 {
        2 * (self.keys.dtype().size() * self.keys.shape().num_elements()) as u64
    }
}

/// The mark of the block that [`KvRow::lend`] has given away.
pub(crate) struct Lent(Arc<()>);

/// Keys and values of one row in one softmax layer, in blocks that double from [`BLOCK`] tokens to the largest of the
/// device; the last one is filled in place.
#[derive(Debug, Clone)]
pub struct KvRow {
    blocks: Vec<Block>,
    len: usize,
    /// Tokens that all blocks have room for.
    room: usize,
    dtype: DType,
    largest: usize,
}

impl KvRow {
    fn new(dtype: DType, largest: usize) -> Self {
        Self { blocks: Vec::new(), len: 0, room: 0, dtype, largest }
    }

    /// What keys and values are kept in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds `keys` and `values`, `[kv_heads, tokens, head_dim]` each.
    pub fn append(&mut self, keys: Tensor<3>, values: Tensor<3>) {
        let [heads, tokens, dim] = keys.dims();
        let mut taken = 0;
        while taken < tokens {
            self.make_room(heads, dim, &keys.device());
            let n = (self.room - self.len).min(tokens - taken);
            let part = |x: &Tensor<3>| {
                let part = x.clone().narrow(1, taken, n);
                if part.dtype() == self.dtype { part } else { part.cast(self.dtype) }
            };
            // Taken out of the list so that its buffer has one owner and is written in place.
            if let Some(Block { keys: k, values: v, mark }) = self.blocks.pop() {
                let used = self.len + k.dims()[1] - self.room;
                let at = [0..heads, used..used + n, 0..dim];
                let (k, v) = (k.slice_assign(at.clone(), part(&keys)), v.slice_assign(at, part(&values)));
                self.blocks.push(Block { keys: k, values: v, mark }.written());
            }
            self.len += n;
            taken += n;
        }
    }

    /// Makes room for a token where there is none.
    fn make_room(&mut self, heads: usize, dim: usize, device: &Device) {
        if self.len == self.room {
            let size = block_at(self.len, self.largest);
            let zeros = || Tensor::zeros([heads, size, dim], (device, self.dtype));
            self.blocks.push(Block::new(zeros(), zeros()));
            self.room += size;
        }
    }

    /// Lends what is held, with room for a token of `heads` keys and values of `dim`. The last block goes out of hand, so that its
    /// buffer has one owner: [`KvRow::take_back`] has to follow.
    pub(crate) fn lend(&mut self, heads: usize, dim: usize, device: &Device) -> (Past, Lent) {
        self.make_room(heads, dim, device);
        let last = self.blocks.pop();
        let mut keys: Vec<Tensor<3>> = Vec::with_capacity(self.blocks.len() + 1);
        let mut values: Vec<Tensor<3>> = Vec::with_capacity(self.blocks.len() + 1);
        for block in &self.blocks {
            keys.push(block.keys.clone());
            values.push(block.values.clone());
        }
        let mark = last.map_or_else(Arc::default, |last| {
            keys.push(last.keys);
            values.push(last.values);
            last.mark
        });
        (Past { keys, values, tokens: self.len }, Lent(mark))
    }

    /// The last block comes back, with another token in it.
    pub(crate) fn take_back(&mut self, lent: Lent, [keys, values]: [Tensor<3>; 2]) {
        self.blocks.push(Block { keys, values, mark: lent.0 }.written());
        self.len += 1;
    }

    /// All blocks, cut to the tokens held.
    pub fn blocks(&self) -> Vec<KeyValues> {
        let mut left = self.len;
        self.blocks
            .iter()
            .map(|block| {
                let size = block.room();
                let used = size.min(left);
                left -= used;
                let cut = |x: &Tensor<3>| {
                    let x = x.clone().unsqueeze_dim::<4>(0);
                    if used == size { x } else { x.narrow(2, 0, used) }
                };
                KeyValues { keys: cut(&block.keys), values: cut(&block.values) }
            })
            .collect()
    }
}

/// What one layer keeps, for all rows.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // one a layer
pub enum LayerCache {
    /// `[rows, heads, d_k, d_v]`, f32.
    Lightning(Tensor<4>),
    /// Keys and values of each row.
    Softmax(Vec<KvRow>),
}

/// What one layer keeps of one row.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // one a layer
enum RowState {
    Lightning(Tensor<4>),
    Softmax(KvRow),
}

/// One row of a cache as it was at one moment. Holding it costs the lightning states (280 MiB for M1); blocks
/// of keys and values are shared with the row.
#[derive(Debug, Clone)]
pub struct Snapshot {
    tokens: Vec<u32>,
    layers: Vec<RowState>,
}

impl Snapshot {
    /// The tokens that had been read.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Bytes of the lightning states, which are this snapshot's own.
    pub fn state_bytes(&self) -> u64 {
        let states = self.layers.iter().map(|layer| match layer {
            RowState::Lightning(state) => 4 * state.shape().num_elements() as u64,
            RowState::Softmax(_) => 0,
        });
        states.sum()
    }

    /// The blocks of keys and values, each with its bytes. Blocks with equal names are one piece of memory.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockName, u64)> + '_ {
        let rows = self.layers.iter().filter_map(|layer| match layer {
            RowState::Softmax(row) => Some(&row.blocks),
            RowState::Lightning(_) => None,
        });
        rows.flatten().map(|block| (BlockName(Arc::as_ptr(&block.mark) as usize), block.bytes()))
    }
}

/// Names a block of keys and values as long as any snapshot holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockName(usize);

/// The past of a batch of rows.
#[derive(Debug, Clone)]
pub struct Cache {
    layers: Vec<LayerCache>,
    tokens: Vec<Vec<u32>>,
    heads: usize,
    head_dim: usize,
    kv_dtype: DType,
    device: Device,
    largest_block: usize,
}

impl Cache {
    /// `rows` empty rows on the model's device; keys and values are kept in [`M1::kv_dtype`], the lightning state in f32 always.
    pub fn new(model: &M1, rows: usize) -> Self {
        let (config, device, kv_dtype) = (model.config(), &model.device(), model.kv_dtype().dtype());
        let mut cache = Self {
            layers: Vec::with_capacity(config.num_hidden_layers),
            tokens: vec![Vec::new(); rows],
            heads: config.num_attention_heads,
            head_dim: config.head_dim,
            kv_dtype,
            device: device.clone(),
            largest_block: if on_cpu(&Tensor::<1>::zeros([1], device)) { LARGEST_BLOCK_CPU } else { LARGEST_BLOCK },
        };
        for layer in 0..config.num_hidden_layers {
            cache.layers.push(match config.kind(layer) {
                AttentionKind::Lightning => LayerCache::Lightning(cache.zero_state(rows)),
                AttentionKind::Softmax => LayerCache::Softmax(vec![KvRow::new(kv_dtype, cache.largest_block); rows]),
            });
        }
        cache
    }

    fn zero_state(&self, rows: usize) -> Tensor<4> {
        Tensor::zeros([rows, self.heads, self.head_dim, self.head_dim], (&self.device, DType::F32))
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens that row `row` has read.
    pub fn len(&self, row: usize) -> usize {
        self.tokens[row].len()
    }

    /// Whether no row has read anything.
    pub fn is_empty(&self) -> bool {
        self.tokens.iter().all(Vec::is_empty)
    }

    /// The ids that row `row` has read.
    pub fn tokens(&self, row: usize) -> &[u32] {
        &self.tokens[row]
    }

    /// What is kept of `row` now, shared rather than copied.
    pub fn snapshot(&self, row: usize) -> Snapshot {
        let layers = self
            .layers
            .iter()
            .map(|layer| match layer {
                LayerCache::Lightning(state) => RowState::Lightning(self.state_row(state, row)),
                LayerCache::Softmax(rows) => RowState::Softmax(rows[row].clone()),
            })
            .collect();
        Snapshot { tokens: self.tokens[row].clone(), layers }
    }

    /// A row's state as a tensor of its own, so that a snapshot does not keep the whole batch alive.
    fn state_row(&self, state: &Tensor<4>, row: usize) -> Tensor<4> {
        if self.rows() == 1 { state.clone() } else { state.clone().select(0, ints(vec![row as i32], &self.device)) }
    }

    /// Puts `snapshot` in the place of whatever `row` holds.
    ///
    /// # Panics
    /// If the snapshot is of a model of another configuration.
    pub fn restore(&mut self, row: usize, snapshot: &Snapshot) {
        let rows = self.rows();
        assert_eq!(snapshot.layers.len(), self.layers.len(), "the snapshot is of another model");
        for (layer, kept) in self.layers.iter_mut().zip(&snapshot.layers) {
            match (layer, kept) {
                (LayerCache::Lightning(state), RowState::Lightning(kept)) if rows == 1 => *state = kept.clone(),
                (LayerCache::Lightning(state), RowState::Lightning(kept)) => {
                    let [_, heads, d_k, d_v] = state.dims();
                    // Taken out, so that its buffer has one owner and only this row of it is written.
                    let all = std::mem::replace(state, kept.clone());
                    *state = all.slice_assign([row..row + 1, 0..heads, 0..d_k, 0..d_v], kept.clone());
                }
                (LayerCache::Softmax(rows), RowState::Softmax(kept)) => rows[row] = kept.clone(),
                _ => panic!("the snapshot is of another model"),
            }
        }
        self.tokens[row] = snapshot.tokens.clone();
    }

    /// Takes `row` back to `snapshot`, which must have been taken on the way to where the row is now.
    ///
    /// # Errors
    /// [`CacheError::OtherText`] if the row's text does not begin with the snapshot's; the row is left as it was.
    pub fn truncate(&mut self, row: usize, snapshot: &Snapshot) -> Result<(), CacheError> {
        if !self.tokens[row].starts_with(&snapshot.tokens) {
            return Err(CacheError::OtherText { row, tokens: self.tokens[row].len(), snapshot: snapshot.tokens.len() });
        }
        self.restore(row, snapshot);
        Ok(())
    }

    /// Makes the cache hold these of its rows, in this order: reorders, drops and repeats sequences.
    ///
    /// # Panics
    /// If a row does not exist.
    pub fn select(&mut self, rows: &[usize]) {
        assert!(rows.iter().all(|&row| row < self.rows()), "no such row among {}", self.rows());
        let index = ints(rows.iter().map(|&row| row as i32).collect(), &self.device);
        let empty = rows.is_empty().then(|| self.zero_state(0));
        for layer in &mut self.layers {
            match layer {
                LayerCache::Lightning(state) => {
                    let [before, heads, d_k, d_v] = state.dims();
                    *state = match &empty {
                        Some(empty) => empty.clone(),
                        // As a matrix: a row is one piece of memory, and is copied as one.
                        None => (state.clone().reshape([before, heads * d_k * d_v]).select(0, index.clone()))
                            .reshape([rows.len(), heads, d_k, d_v]),
                    };
                }
                LayerCache::Softmax(kept) => *kept = rows.iter().map(|&row| kept[row].clone()).collect(),
            }
        }
        self.tokens = rows.iter().map(|&row| self.tokens[row].clone()).collect();
    }

    /// Adds an empty row at the end and returns its number.
    pub fn push_row(&mut self) -> usize {
        let zero = self.zero_state(1);
        let none = self.tokens.is_empty();
        for layer in &mut self.layers {
            match layer {
                LayerCache::Lightning(state) if none => *state = zero.clone(),
                LayerCache::Lightning(state) => *state = Tensor::cat(vec![state.clone(), zero.clone()], 0),
                LayerCache::Softmax(rows) => rows.push(KvRow::new(self.kv_dtype, self.largest_block)),
            }
        }
        self.tokens.push(Vec::new());
        self.tokens.len() - 1
    }

    /// Adds a row for each snapshot at the end; the states are copied once, however many come.
    ///
    /// # Panics
    /// If a snapshot is of a model of another configuration.
    pub fn append<'a>(&mut self, snapshots: impl IntoIterator<Item = &'a Snapshot>) {
        let snapshots: Vec<&Snapshot> = snapshots.into_iter().collect();
        if snapshots.is_empty() {
            return;
        }
        let none = self.tokens.is_empty();
        let fits = |s: &&Snapshot| s.layers.len() == self.layers.len();
        assert!(snapshots.iter().all(fits), "the snapshot is of another model");
        for (i, layer) in self.layers.iter_mut().enumerate() {
            match layer {
                LayerCache::Lightning(state) => {
                    let new = snapshots.iter().map(|s| match &s.layers[i] {
                        RowState::Lightning(kept) => kept.clone(),
                        RowState::Softmax(_) => panic!("the snapshot is of another model"),
                    });
                    let mut states: Vec<Tensor<4>> = (!none).then(|| state.clone()).into_iter().chain(new).collect();
                    *state = if states.len() == 1 { states.remove(0) } else { Tensor::cat(states, 0) };
                }
                LayerCache::Softmax(rows) => rows.extend(snapshots.iter().map(|s| match &s.layers[i] {
                    RowState::Softmax(kept) => kept.clone(),
                    RowState::Lightning(_) => panic!("the snapshot is of another model"),
                })),
            }
        }
        self.tokens.extend(snapshots.iter().map(|s| s.tokens.clone()));
    }

    /// Bytes that one row of `tokens` tokens takes: its states, and whole blocks of keys and values.
    pub fn row_bytes(&self, config: &ModelConfig, tokens: usize) -> u64 {
        let mut room = 0;
        while room < tokens {
            room += block_at(room, self.largest_block);
        }
        let kind = |wanted| (0..config.num_hidden_layers).filter(|&layer| config.kind(layer) == wanted).count();
        let state = 4 * self.heads * self.head_dim * self.head_dim;
        let keys_values = 2 * self.kv_dtype.size() * config.num_key_value_heads * self.head_dim * room;
        (kind(AttentionKind::Lightning) * state + kind(AttentionKind::Softmax) * keys_values) as u64
    }

    /// Bytes held on the device: states, and whole blocks of keys and values (shared ones counted for each row).
    pub fn bytes(&self) -> u64 {
        self.layers
            .iter()
            .map(|layer| match layer {
                LayerCache::Lightning(state) => 4 * state.shape().num_elements() as u64,
                LayerCache::Softmax(rows) => rows.iter().flat_map(|row| &row.blocks).map(Block::bytes).sum(),
            })
            .sum()
    }

    /// State of a lightning layer, `[rows, heads, d_k, d_v]`; `None` for a softmax layer.
    pub fn lightning_state(&self, layer: usize) -> Option<Tensor<4>> {
        match &self.layers[layer] {
            LayerCache::Lightning(state) => Some(state.clone()),
            LayerCache::Softmax(_) => None,
        }
    }

    /// Keys (after rotation) and values of one row of a softmax layer, `[kv_heads, tokens, head_dim]` each; `None` for a
    /// lightning layer or an empty row.
    pub fn keys_values(&self, layer: usize, row: usize) -> Option<(Tensor<3>, Tensor<3>)> {
        let LayerCache::Softmax(rows) = &self.layers[layer] else {
            return None;
        };
        if rows[row].is_empty() {
            return None;
        }
        let blocks = rows[row].blocks();
        let join =
            |part: fn(&KeyValues) -> Tensor<4>| Tensor::cat(blocks.iter().map(part).collect(), 2).squeeze_dim::<3>(0);
        Some((join(|b| b.keys.clone()), join(|b| b.values.clone())))
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }

    pub(crate) fn advance(&mut self, rows: &[Vec<u32>]) {
        for (tokens, new) in self.tokens.iter_mut().zip(rows) {
            tokens.extend_from_slice(new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Batch;
    use crate::checkpoint::{LoadOptions, WeightDtype, random};
    use crate::trace::Trace;
    use burn::tensor::Distribution;

    #[test]
    fn blocks_double_up_to_the_largest() {
        let sizes = |largest| {
            let mut start = 0;
            std::iter::from_fn(move || {
                let size = block_at(start, largest);
                assert_eq!(start % size, 0);
                start += size;
                Some(size)
            })
        };
        assert_eq!(sizes(BLOCK).take(3).collect::<Vec<_>>(), [256; 3]);
        let wanted = [256, 256, 512, 1024, 2048, 4096, 4096, 4096];
        assert_eq!(sizes(LARGEST_BLOCK).take(8).collect::<Vec<_>>(), wanted);
    }

    #[test]
    fn what_is_appended_comes_back_from_blocks_of_any_size() {
        let device = Device::flex();
        for largest in [BLOCK, 2 * BLOCK, LARGEST_BLOCK] {
            let all = Tensor::<3>::random([2, 1300, 3], Distribution::Normal(0.0, 1.0), &device);
            let mut row = KvRow::new(DType::F32, largest);
            let mut snapshot = row.clone();
            let mut at = 0;
            for n in [1, 254, 1, 1, 300, 211, 500, 32] {
                let part = all.clone().narrow(1, at, n);
                row.append(part.clone(), part * 2.0);
                at += n;
                if at == 557 {
                    snapshot = row.clone();
                }
            }
            assert_eq!((at, row.len()), (1300, 1300));
            for (row, len) in [(&row, 1300), (&snapshot, 557)] {
                let blocks = row.blocks();
                let keys = Tensor::cat(blocks.iter().map(|b| b.keys.clone()).collect(), 2).squeeze_dim::<3>(0);
                let values = Tensor::cat(blocks.iter().map(|b| b.values.clone()).collect(), 2).squeeze_dim::<3>(0);
                let wanted = all.clone().narrow(1, 0, len);
                assert_eq!(keys.into_data(), wanted.clone().into_data());
                assert_eq!(values.into_data(), (wanted * 2.0).into_data());
            }
        }
    }

    /// What a prefix cache counts: states are each snapshot's own, blocks are shared until one of the holders writes.
    #[test]
    fn memory_is_counted_once() {
        let model = tiny();
        let mut cache = Cache::new(&model, 1);
        read(&model, &mut cache, &[&text(300, 1)]);
        let first = cache.snapshot(0);
        assert_eq!(first.state_bytes() + first.blocks().map(|b| b.1).sum::<u64>(), cache.bytes());
        for tokens in [1, 255, 256, 257, 300, 1000] {
            let mut cache = Cache::new(&model, 1);
            read(&model, &mut cache, &[&text(tokens, 1)]);
            assert_eq!(cache.row_bytes(model.config(), tokens as usize), cache.bytes(), "{tokens} tokens");
        }
        assert_eq!(cache.row_bytes(model.config(), 0), first.state_bytes());

        let names = |snapshot: &Snapshot| snapshot.blocks().map(|b| b.0).collect::<Vec<_>>();
        read(&model, &mut cache, &[&[7]]);
        let second = cache.snapshot(0);
        assert_eq!(names(&second)[0], names(&first)[0], "the full block is shared");
        assert_ne!(names(&second)[1], names(&first)[1], "the other was written to, and so was copied");
        assert_eq!(names(&second).len(), 2);
        assert_eq!(names(&cache.snapshot(0)), names(&second));
    }

    /// With keys and values in bf16 a text is read and decoded to about what f32 gives, whatever the cuts, and takes half the memory.
    #[test]
    fn keys_and_values_in_bf16_are_near_and_half_as_large() {
        let exact = tiny();
        let model = exact.clone().with_kv_dtype(WeightDtype::Bf16);
        let text = text(600, 1);
        let states = |model: &M1, cuts: &[usize]| {
            let mut cache = Cache::new(model, 1);
            let mut last = Vec::new();
            for cut in cuts.windows(2) {
                last = read(model, &mut cache, &[&text[cut[0]..cut[1]]]);
            }
            (last, cache)
        };
        let (wanted, whole) = states(&exact, &[0, 600]);
        let (at_once, half) = states(&model, &[0, 600]);
        let singly: Vec<usize> = [0, 255, 256, 590].into_iter().chain(591..=600).collect();
        let off = |got: &[f32]| wanted.iter().zip(got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let scale = wanted.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        for (way, error) in [("at once", off(&at_once)), ("singly", off(&states(&model, &singly).0))] {
            assert!(error > 1e-5 * scale && error < 0.01 * scale, "{way}: {error} of {scale}");
        }
        let state = half.snapshot(0).state_bytes();
        assert_eq!(2 * (half.bytes() - state), whole.bytes() - state);
        assert_eq!(half.row_bytes(model.config(), 600), half.bytes());
        assert!(half.keys_values(1, 0).unwrap().0.dtype() == DType::BF16);
    }

    /// As on a device in bf16: queries, keys and values are all halves, and a cache changes no more than the order of sums.
    #[test]
    fn a_model_in_halves_reads_a_cache_of_halves_as_its_own_text() {
        let half = Some(WeightDtype::Bf16);
        let options = LoadOptions { dtype: half, kv_dtype: half, tensors: true, ..LoadOptions::default() };
        let model = random(&config(), 1, &Device::flex(), &options).unwrap();
        let text = text(300, 1);
        let batch = Batch::new(vec![text.clone()]).last();
        let values = |x: Tensor<2>| x.into_data().convert::<f32>().try_to_vec::<f32>().unwrap();
        let wanted = values(model.forward(&batch, None, &mut Trace::none()));
        let mut cache = Cache::new(&model, 1);
        let mut got = Vec::new();
        for part in [&text[..256], &text[256..299], &text[299..]] {
            let batch = Batch::new(vec![part.to_vec()]).last();
            got = values(model.forward(&batch, Some(&mut cache), &mut Trace::none()));
        }
        let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>();
        let error = square(&mut wanted.iter().zip(&got).map(|(a, b)| a - b)) / square(&mut wanted.iter().copied());
        assert!(error.sqrt() < 0.02, "{}", error.sqrt());
        assert!(cache.keys_values(1, 0).unwrap().0.dtype() == DType::BF16);
    }

    fn tiny() -> M1 {
        let device = Device::flex();
        device.seed(5);
        M1::new(&config(), &device)
    }

    fn config() -> ModelConfig {
        ModelConfig {
            vocab_size: 64,
            hidden_size: 32,
            num_hidden_layers: 3,
            attn_type_list: vec![0, 1, 0],
            num_local_experts: 2,
            ..ModelConfig::preset("nano").unwrap()
        }
    }

    fn read(model: &M1, cache: &mut Cache, rows: &[&[u32]]) -> Vec<f32> {
        let batch = Batch::new(rows.iter().map(|r| r.to_vec()).collect()).last();
        model.forward(&batch, Some(cache), &mut Trace::none()).into_data().try_to_vec().unwrap()
    }

    fn text(n: u32, salt: u32) -> Vec<u32> {
        (0..n).map(|i| (i * 11 + salt * 7) % 64).collect()
    }

    /// Rows that are appended, put in the place of others and selected go on as they would have alone, to the bit.
    #[test]
    fn rows_that_join_and_move_go_on_as_alone() {
        let model = tiny();
        let texts = [text(5, 1), text(300, 2), text(64, 3), text(9, 4)];
        let snapshots: Vec<Snapshot> = texts
            .iter()
            .map(|t| {
                let mut cache = Cache::new(&model, 1);
                read(&model, &mut cache, &[t]);
                cache.snapshot(0)
            })
            .collect();
        let alone = |i: usize, next: &[u32]| {
            let mut cache = Cache::new(&model, 1);
            cache.restore(0, &snapshots[i]);
            next.iter().map(|&id| read(&model, &mut cache, &[&[id]])).collect::<Vec<_>>().concat()
        };
        let mut cache = Cache::new(&model, 0);
        cache.append([]);
        assert_eq!(cache.rows(), 0);
        cache.append([&snapshots[0]]);
        cache.append([&snapshots[1], &snapshots[2], &snapshots[1]]);
        assert_eq!((cache.rows(), cache.len(2), cache.tokens(3)), (4, 64, &texts[1][..]));
        let first = read(&model, &mut cache, &[&[7], &[8], &[9], &[10]]);
        let wanted = [alone(0, &[7]), alone(1, &[8]), alone(2, &[9]), alone(1, &[10])].concat();
        assert_eq!(first, wanted);
        // Row 2 gives its place to another text; then rows 3 and 0 leave and the others change places.
        cache.restore(2, &snapshots[3]);
        cache.select(&[2, 1]);
        let second = read(&model, &mut cache, &[&[11], &[12]]);
        let last = |i, next: &[u32]| alone(i, next)[(next.len() - 1) * 32..].to_vec();
        assert_eq!(second, [last(3, &[11]), last(1, &[8, 12])].concat());
        // What was written since has not touched the snapshots that the rows began from.
        assert_eq!(alone(1, &[8]), first[32..64]);
        let mut again = Cache::new(&model, 0);
        again.append(&snapshots);
        assert_eq!(read(&model, &mut again, &[&[1], &[8], &[9], &[11]])[32..64], first[32..64]);
    }
}
