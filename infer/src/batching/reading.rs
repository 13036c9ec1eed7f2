//! The sequences whose prompts are being read, in a cache of their own until they can decode.

use super::batcher::Sequence;
use super::pieces::{most_texts, shared_ends};
use burn::tensor::Tensor;
use m1_model::{Batch, Cache, M1, Snapshot, Trace};

/// A sequence and its whole prompt.
#[derive(Debug)]
struct Reader {
    sequence: Sequence,
    prompt: Vec<u32>,
}

/// Sequences on their way through their prompts.
#[derive(Debug)]
pub(super) struct Reading {
    cache: Cache,
    readers: Vec<Reader>,
}

impl Reading {
    /// Nothing to read yet.
    pub fn new(model: &M1) -> Self {
        Self { cache: Cache::new(model.config(), 0, &model.device()), readers: Vec::new() }
    }

    /// Sequences here.
    pub fn len(&self) -> usize {
        self.readers.len()
    }

    /// Whether another prompt would only slow the others down.
    pub fn full(&self, budget: usize) -> bool {
        self.len() >= most_texts(budget)
    }

    /// Bytes of the cache.
    pub fn bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Begins to read `prompt` after what `snapshot` holds of it.
    pub fn add(&mut self, sequence: Sequence, prompt: Vec<u32>, snapshot: &Snapshot) {
        self.cache.append([snapshot]);
        self.readers.push(Reader { sequence, prompt });
    }

    /// Drops the sequences that `gone` names.
    pub fn remove(&mut self, gone: impl Fn(&Sequence) -> bool) -> bool {
        let kept: Vec<usize> = (0..self.len()).filter(|&i| !gone(&self.readers[i].sequence)).collect();
        let removed = kept.len() < self.len();
        if removed {
            self.cache.select(&kept);
            self.readers.retain(|reader| !gone(&reader.sequence));
        }
        removed
    }

    /// Reads about `budget` tokens, and gives the sequences whose prompts have been read, with their rows and with the
    /// hidden states of their last tokens, `[sequences, hidden]`.
    pub fn step(&mut self, model: &M1, budget: usize) -> (Vec<(Sequence, Snapshot)>, Option<Tensor<2>>) {
        if self.readers.is_empty() {
            return (Vec::new(), None);
        }
        let texts: Vec<(usize, usize)> =
            self.readers.iter().enumerate().map(|(i, reader)| (self.cache.len(i), reader.prompt.len())).collect();
        let ends = shared_ends(&texts, budget);
        let (mut rows, mut offsets) = (Vec::new(), Vec::new());
        for ((reader, &(start, total)), &end) in self.readers.iter().zip(&texts).zip(&ends) {
            rows.push(reader.prompt[start..end].to_vec());
            offsets.push(if end == total { vec![end - start - 1] } else { Vec::new() });
        }
        let hidden = model.forward(&Batch::new(rows).at(offsets), Some(&mut self.cache), &mut Trace::none());

        let (mut kept, mut done, mut going) = (Vec::new(), Vec::new(), Vec::new());
        for (i, reader) in std::mem::take(&mut self.readers).into_iter().enumerate() {
            if ends[i] == texts[i].1 {
                done.push((reader.sequence, self.cache.snapshot(i)));
            } else {
                kept.push(i);
                going.push(reader);
            }
        }
        self.readers = going;
        if !done.is_empty() {
            self.cache.select(&kept);
        }
        let hidden = (!done.is_empty()).then_some(hidden);
        (done, hidden)
    }
}
