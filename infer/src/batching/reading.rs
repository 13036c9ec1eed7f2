//! The sequences whose prompts are being read, in caches of their own until they can decode: one, or some where the model is
//! small enough for a thread to read alone ([`super::lanes`]).

use super::RequestId;
use super::batcher::Sequence;
use super::lanes::Most;
use super::pieces::{STRIDE, most_texts, shared_ends};
use crate::parallel::on_pool;
use burn::tensor::Tensor;
use m1_model::{Batch, Cache, M1, Snapshot, Trace};

/// A sequence and its whole prompt.
#[derive(Debug)]
struct Reader {
    sequence: Sequence,
    prompt: Vec<u32>,
    /// Where snapshots are still to be taken, the next one last.
    marks: Vec<usize>,
    /// Its tokens are scored.
    score: bool,
}

/// What came of reading a piece of every prompt.
#[derive(Debug, Default)]
pub(super) struct Step {
    /// Sequences whose prompts have been read, with their rows.
    pub done: Vec<(Sequence, Snapshot)>,
    /// Hidden states of their last tokens, `[sequences, hidden]`; `None` where there are none.
    pub hidden: Option<Tensor<2>>,
    /// Marks that were reached.
    pub passed: Vec<(RequestId, Snapshot)>,
    /// What the prompts' own tokens are scored with.
    pub scored: Vec<Unscored>,
}

/// Tokens of a prompt, whose scores are to be taken from the hidden states before them.
#[derive(Debug)]
pub(super) struct Unscored {
    pub id: RequestId,
    pub top_log_probs: usize,
    /// The tokens.
    pub ids: Vec<u32>,
    /// `[ids, hidden]`.
    pub hidden: Tensor<2>,
}

impl Step {
    fn extend(&mut self, other: Step) {
        self.done.extend(other.done);
        self.passed.extend(other.passed);
        self.scored.extend(other.scored);
        self.hidden = match (self.hidden.take(), other.hidden) {
            (Some(before), Some(hidden)) => Some(Tensor::cat(vec![before, hidden], 0)),
            (before, hidden) => before.or(hidden),
        };
    }
}

/// All sequences on their way through their prompts.
#[derive(Debug)]
pub(super) struct Readings<'a> {
    model: &'a M1,
    most: Most,
    /// At least one.
    lanes: Vec<Reading>,
}

impl<'a> Readings<'a> {
    /// Nothing to read yet.
    pub fn new(model: &'a M1) -> Self {
        Self { model, most: Most::of(model), lanes: vec![Reading::new(model)] }
    }

    /// The sequences here.
    pub fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.lanes.iter().flat_map(Reading::sequences)
    }

    /// Whether another prompt would only slow the others down.
    pub fn full(&self, budget: usize) -> bool {
        self.full_with(0, budget)
    }

    /// The same when `more` have come.
    pub fn full_with(&self, more: usize, budget: usize) -> bool {
        self.sequences().count() + more >= most_texts(budget)
    }

    /// Bytes of the caches.
    pub fn bytes(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.cache.bytes()).sum()
    }

    /// Begins to read `prompt` after what `snapshot` holds of it, and to `score` what is read.
    pub fn add(&mut self, sequence: Sequence, prompt: Vec<u32>, marks: Vec<usize>, snapshot: &Snapshot, score: bool) {
        let lanes = self.most.lanes();
        while self.lanes.len() < lanes {
            self.lanes.push(Reading::new(self.model));
        }
        if let Some(lane) = self.lanes[..lanes].iter_mut().min_by_key(|lane| lane.unread()) {
            lane.add(sequence, prompt, marks, snapshot, score);
        }
    }

    /// Drops the sequences that `gone` names.
    pub fn remove(&mut self, gone: impl Fn(&Sequence) -> bool) -> bool {
        let mut removed = false;
        for lane in &mut self.lanes {
            removed |= lane.remove(&gone);
        }
        removed
    }

    /// Tokens read of the prompt of a sequence that is here.
    pub fn read(&self, of: impl Fn(&Sequence) -> bool) -> Option<usize> {
        self.lanes.iter().find_map(|lane| lane.read(&of))
    }

    /// What was read of the prompt of a sequence that is here.
    pub fn past(&self, of: impl Fn(&Sequence) -> bool) -> Option<Snapshot> {
        self.lanes.iter().find_map(|lane| lane.past(&of))
    }

    /// Reads about `budget` tokens: each lane on a thread where they have about as much to read, else one after the other.
    pub fn step(&mut self, budget: usize) -> Step {
        let model = self.model;
        let used: Vec<&mut Reading> = self.lanes.iter_mut().filter(|lane| !lane.readers.is_empty()).collect();
        let share = budget / used.len().max(1);
        let pieces: Vec<usize> = used.iter().map(|lane| lane.unread().min(share)).collect();
        let (longest, all) = (pieces.iter().max().copied().unwrap_or(0), pieces.iter().sum::<usize>());
        let steps: Vec<Step> = if 2 * used.len() * longest <= 3 * all {
            on_pool(used, |lane| lane.step(model, share))
        } else {
            // What some don't need of their share is the others'.
            let mut left = budget.saturating_sub(all);
            let one = |(lane, piece): (&mut Reading, usize)| {
                let more = left.min(lane.unread() - piece);
                left -= more;
                lane.step(model, piece + more)
            };
            used.into_iter().zip(pieces).map(one).collect()
        };
        let mut all = Step::default();
        steps.into_iter().for_each(|step| all.extend(step));
        all
    }
}

/// Sequences that are read side by side.
#[derive(Debug)]
struct Reading {
    cache: Cache,
    readers: Vec<Reader>,
}

impl Reading {
    fn new(model: &M1) -> Self {
        Self { cache: Cache::new(model, 0), readers: Vec::new() }
    }

    fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.readers.iter().map(|reader| &reader.sequence)
    }

    /// Tokens to be read.
    fn unread(&self) -> usize {
        self.readers.iter().enumerate().map(|(i, reader)| reader.prompt.len() - self.cache.len(i)).sum()
    }

    fn add(&mut self, sequence: Sequence, prompt: Vec<u32>, mut marks: Vec<usize>, snapshot: &Snapshot, score: bool) {
        let (begin, total) = (snapshot.tokens().len(), prompt.len());
        // No piece is a single token, so that none takes another way through the kernels than it would have uncut.
        marks.retain(|&m| m.is_multiple_of(STRIDE) && m > begin + 1 && m + 2 <= total);
        marks.sort_unstable_by(|a, b| b.cmp(a));
        marks.dedup();
        self.cache.append([snapshot]);
        self.readers.push(Reader { sequence, prompt, marks, score });
    }

    fn remove(&mut self, gone: impl Fn(&Sequence) -> bool) -> bool {
        let kept: Vec<usize> = (0..self.readers.len()).filter(|&i| !gone(&self.readers[i].sequence)).collect();
        let removed = kept.len() < self.readers.len();
        if removed {
            self.cache.select(&kept);
            self.readers.retain(|reader| !gone(&reader.sequence));
        }
        removed
    }

    fn read(&self, of: impl Fn(&Sequence) -> bool) -> Option<usize> {
        let row = self.readers.iter().position(|reader| of(&reader.sequence))?;
        Some(self.cache.len(row))
    }

    fn past(&self, of: impl Fn(&Sequence) -> bool) -> Option<Snapshot> {
        let row = self.readers.iter().position(|reader| of(&reader.sequence))?;
        Some(self.cache.snapshot(row))
    }

    /// Reads about `budget` tokens.
    fn step(&mut self, model: &M1, budget: usize) -> Step {
        if self.readers.is_empty() {
            return Step::default();
        }
        let texts: Vec<(usize, usize)> = (self.readers.iter().enumerate())
            .map(|(i, reader)| (self.cache.len(i), reader.marks.last().map_or(reader.prompt.len(), |&mark| mark)))
            .collect();
        let ends = shared_ends(&texts, budget);
        let (mut rows, mut offsets) = (Vec::new(), Vec::new());
        for ((reader, &(start, _)), &end) in self.readers.iter().zip(&texts).zip(&ends) {
            rows.push(reader.prompt[start..end].to_vec());
            let last = end - start - 1;
            offsets.push(match (reader.score, end == reader.prompt.len()) {
                (true, _) => (0..=last).collect(),
                (false, true) => vec![last],
                (false, false) => Vec::new(),
            });
        }
        let counts: Vec<usize> = offsets.iter().map(Vec::len).collect();
        let mut hidden = model.forward(&Batch::new(rows).at(offsets), Some(&mut self.cache), &mut Trace::none());
        let mut scored = Vec::new();
        if self.readers.iter().any(|reader| reader.score) {
            let (mut at, mut last) = (0, Vec::new());
            for (i, reader) in self.readers.iter().enumerate() {
                let done = ends[i] == reader.prompt.len();
                // What follows a prompt is drawn.
                let count = counts[i] - usize::from(done);
                if count > 0 {
                    scored.push(Unscored {
                        id: reader.sequence.id,
                        top_log_probs: reader.sequence.top_log_probs,
                        ids: reader.prompt[texts[i].0 + 1..][..count].to_vec(),
                        hidden: hidden.clone().narrow(0, at, count),
                    });
                }
                at += counts[i];
                if done {
                    last.push(hidden.clone().narrow(0, at - 1, 1));
                }
            }
            if !last.is_empty() {
                hidden = Tensor::cat(last, 0);
            }
        }

        let (mut step, mut kept, mut going) = (Step { scored, ..Step::default() }, Vec::new(), Vec::new());
        for (i, mut reader) in std::mem::take(&mut self.readers).into_iter().enumerate() {
            if ends[i] == reader.prompt.len() {
                step.done.push((reader.sequence, self.cache.snapshot(i)));
                continue;
            }
            if reader.marks.last() == Some(&ends[i]) {
                reader.marks.pop();
                step.passed.push((reader.sequence.id, self.cache.snapshot(i)));
            }
            kept.push(i);
            going.push(reader);
        }
        self.readers = going;
        if !step.done.is_empty() {
            self.cache.select(&kept);
            step.hidden = Some(hidden);
        }
        step
    }
}
