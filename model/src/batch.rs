//! What one forward pass reads: rows of token ids, of any lengths. Callers never see padding.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// Which tokens' hidden states the forward pass returns.
#[derive(Debug, Clone)]
enum Outputs {
    All,
    Last,
    None,
    At(Vec<Vec<usize>>),
}

/// Rows of new tokens. With a cache, each row continues where that row of the cache stands.
#[derive(Debug, Clone)]
pub struct Batch {
    rows: Vec<Vec<u32>>,
    outputs: Outputs,
}

impl Batch {
    /// Rows of ids; a row may be empty (that sequence rests). Hidden states of every token are returned.
    pub fn new(rows: Vec<Vec<u32>>) -> Self {
        Self { rows, outputs: Outputs::All }
    }

    /// Returns only each row's last token (nothing of an empty row).
    pub fn last(self) -> Self {
        Self { outputs: Outputs::Last, ..self }
    }

    /// Returns nothing: for a chunk that only fills the cache.
    pub fn none(self) -> Self {
        Self { outputs: Outputs::None, ..self }
    }

    /// Returns the tokens at these offsets of each row's new tokens.
    ///
    /// # Panics
    /// If there are not as many lists as rows or an offset is outside its row.
    pub fn at(self, offsets: Vec<Vec<usize>>) -> Self {
        assert_eq!(offsets.len(), self.rows.len(), "one list of offsets per row");
        for (row, offsets) in self.rows.iter().zip(&offsets) {
            assert!(offsets.iter().all(|&o| o < row.len()), "an offset is outside its row of {} tokens", row.len());
        }
        Self { outputs: Outputs::At(offsets), ..self }
    }

    /// The ids.
    pub fn rows(&self) -> &[Vec<u32>] {
        &self.rows
    }

    /// New tokens in all rows together.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(Vec::len).sum()
    }

    /// Where the wanted tokens stand among all tokens laid row after row; `None` when all are wanted, as in a step of
    /// decoding.
    pub(crate) fn wanted(&self) -> Option<Vec<usize>> {
        let mut start = 0;
        let mut wanted = Vec::new();
        for (i, row) in self.rows.iter().enumerate() {
            match &self.outputs {
                Outputs::All => return None,
                Outputs::Last if self.rows.iter().all(|row| row.len() == 1) => return None,
                Outputs::None => {}
                Outputs::Last if row.is_empty() => {}
                Outputs::Last => wanted.push(start + row.len() - 1),
                Outputs::At(offsets) => wanted.extend(offsets[i].iter().map(|o| start + o)),
            }
            start += row.len();
        }
        Some(wanted)
    }
}

/// How the tokens lie. All that works token by token (norms, linear maps, experts) sees them packed,
/// `[all tokens, …]`; attention sees them as `[rows, longest row, …]`, with padding behind the shorter rows.
#[derive(Debug)]
pub struct Layout {
    /// New tokens of each row.
    pub lengths: Vec<usize>,
    /// Tokens of the longest row.
    pub longest: usize,
    /// Absolute position of each row's first new token.
    pub starts: Vec<usize>,
    /// Absolute position of every packed token.
    pub positions: Vec<usize>,
    to_padded: Option<Tensor<1, Int>>,
    to_packed: Option<Tensor<1, Int>>,
}

impl Layout {
    /// `past[i]` tokens of row i came before.
    pub fn new(batch: &Batch, past: &[usize], device: &Device) -> Self {
        let lengths: Vec<usize> = batch.rows.iter().map(Vec::len).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let positions = lengths.iter().zip(past).flat_map(|(&n, &past)| past..past + n).collect();
        let (mut to_padded, mut to_packed) = (None, None);
        if lengths.iter().any(|&n| n != longest) {
            let (mut padded, mut packed, mut start) = (Vec::new(), Vec::new(), 0);
            for (row, &n) in lengths.iter().enumerate() {
                packed.extend((0..n).map(|t| (row * longest + t) as i32));
                // Padding repeats some real token: what it computes is never read.
                padded.extend((0..longest).map(|t| if t < n { (start + t) as i32 } else { 0 }));
                start += n;
            }
            to_padded = Some(ints(padded, device));
            to_packed = Some(ints(packed, device));
        }
        Self { lengths, longest, starts: past.to_vec(), positions, to_padded, to_packed }
    }

    /// Row lengths where they differ; `None` when all rows are equally long.
    pub fn uneven(&self) -> Option<&[usize]> {
        self.to_padded.as_ref().map(|_| self.lengths.as_slice())
    }

    /// Whether every row brings exactly one token: a step of decoding.
    pub fn one_each(&self) -> bool {
        self.longest == 1 && self.to_padded.is_none()
    }

    /// `[tokens, heads · dim] -> [rows, heads, longest, dim]`.
    pub fn heads(&self, x: Tensor<2>, heads: usize) -> Tensor<4> {
        let dim = x.dims()[1] / heads;
        let x = match &self.to_padded {
            Some(index) => x.select(0, index.clone()),
            None => x,
        };
        x.reshape([self.lengths.len(), self.longest, heads, dim]).swap_dims(1, 2)
    }

    /// `[rows, heads, longest, dim] -> [tokens, heads · dim]`.
    pub fn join(&self, x: Tensor<4>) -> Tensor<2> {
        let [rows, heads, longest, dim] = x.dims();
        let x = x.swap_dims(1, 2).reshape([rows * longest, heads * dim]);
        match &self.to_packed {
            Some(index) => x.select(0, index.clone()),
            None => x,
        }
    }
}

/// Host indices as a tensor.
pub(crate) fn ints(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}
