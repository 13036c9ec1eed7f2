//! The rows that decode. They share one cache, and all threads work on each of its products; or they stand in *lanes*, each a
//! cache of its own and a thread's alone from the first product to the drawing.
//!
//! Lanes are for small models. There a step is hundreds of products of some microseconds: to hand each one over costs as much
//! as the half of it that is saved, and what lies between the products has one thread anyway. The price is that every thread
//! reads all weights, which is little as long as they stay in the processor's caches. No bit depends on it: what the model
//! computes for a row does not depend on its neighbours, nor on the number of threads.

use super::batcher::{Joining, Sequence, draw};
use super::{Event, RequestId};
use crate::engine::{EngineError, to_host};
use crate::parallel::on_pool;
use burn::tensor::Tensor;
use m1_kernels::base::{on_cpu, pool};
use m1_model::{Batch, Cache, M1, Snapshot, Trace};

/// Bytes of weights that a token may read for lanes to pay. Two cores of a Zen 3, at 18 GB/s: 16 rows of nano (4.9 MB) decode 20 %
/// faster in lanes, those of a model of 16 MB 18 % slower.
const SMALL: u64 = 8 << 20;

/// Rows that a lane has at least: a thread alone is slower with one than all are with two.
const LEAST: usize = 2;

/// How many lanes there may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Most {
    small: bool,
}

impl Most {
    /// For a model: some if it is small and on the CPU.
    pub fn of(model: &M1) -> Self {
        Self { small: on_cpu(&Tensor::<1>::zeros([1], &model.device())) && model.token_bytes() <= SMALL }
    }

    /// Lanes now; the number of threads may change.
    pub fn lanes(self) -> usize {
        if self.small { pool::threads() } else { 1 }
    }

    /// Lanes for so many rows that decode.
    pub fn lanes_for(self, rows: usize) -> usize {
        self.lanes().min(rows / LEAST).max(1)
    }
}

/// A cache and the sequences of its rows.
#[derive(Debug)]
pub(super) struct Lane {
    pub cache: Cache,
    /// One for each row of the cache; `None` where the sequence has ended and its row waits for another.
    pub rows: Vec<Option<Sequence>>,
    /// The id that each row reads next.
    pub next: Vec<u32>,
}

impl Lane {
    fn new(model: &M1) -> Self {
        Self { cache: Cache::new(model, 0), rows: Vec::new(), next: Vec::new() }
    }

    fn active(&self) -> usize {
        self.rows.iter().flatten().count()
    }

    /// Takes every row through the model; hidden states `[rows, hidden]`.
    pub fn forward(&mut self, model: &M1) -> Tensor<2> {
        let rows = self.next.iter().map(|&id| vec![id]).collect();
        model.forward(&Batch::new(rows), Some(&mut self.cache), &mut Trace::none())
    }

    /// Gives a row to those who join: first the rows of those that have ended, which are written alone; only when the
    /// number of rows changes are all states copied.
    fn seat(&mut self, joining: Vec<Joining>) {
        let mut joining = joining.into_iter();
        for row in 0..self.rows.len() {
            if self.rows[row].is_none() {
                let Some(Joining { sequence, snapshot, next }) = joining.next() else { break };
                self.cache.restore(row, &snapshot);
                self.rows[row] = Some(sequence);
                self.next[row] = next;
            }
        }
        let more: Vec<Joining> = joining.collect();
        self.cache.append(more.iter().map(|joining| &joining.snapshot));
        for Joining { sequence, next, .. } in more {
            self.rows.push(Some(sequence));
            self.next.push(next);
        }
        if self.rows.iter().any(Option::is_none) {
            let kept: Vec<usize> = (0..self.rows.len()).filter(|&row| self.rows[row].is_some()).collect();
            self.cache.select(&kept);
            self.next = kept.iter().map(|&row| self.next[row]).collect();
            self.rows.retain(Option::is_some);
        }
    }

    /// Takes out the last of its rows, of which none is empty.
    fn leave(&mut self) -> Option<Joining> {
        let (sequence, next) = (self.rows.pop()??, self.next.pop()?);
        let snapshot = self.cache.snapshot(self.rows.len());
        self.cache.select(&(0..self.rows.len()).collect::<Vec<_>>());
        Some(Joining { sequence, snapshot, next })
    }
}

/// All rows that decode.
#[derive(Debug)]
pub(super) struct Lanes<'a> {
    model: &'a M1,
    most: Most,
    /// At least one.
    lanes: Vec<Lane>,
}

impl<'a> Lanes<'a> {
    /// No rows.
    pub fn new(model: &'a M1) -> Self {
        Self { model, most: Most::of(model), lanes: vec![Lane::new(model)] }
    }

    /// Lanes with rows.
    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.lanes.iter().filter(|lane| !lane.rows.is_empty()).count()
    }

    /// The sequences.
    pub fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.lanes.iter().flat_map(|lane| lane.rows.iter().flatten())
    }

    /// Bytes of the caches.
    pub fn bytes(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.cache.bytes()).sum()
    }

    /// Bytes that a row of `tokens` tokens takes.
    pub fn row_bytes(&self, tokens: usize) -> u64 {
        self.lanes[0].cache.row_bytes(self.model.config(), tokens)
    }

    /// The past of a sequence that has a row.
    pub fn past(&self, id: RequestId) -> Option<Snapshot> {
        self.lanes.iter().find_map(|lane| {
            let row = lane.rows.iter().position(|row| row.as_ref().is_some_and(|sequence| sequence.id == id))?;
            Some(lane.cache.snapshot(row))
        })
    }

    /// Drops a sequence; whether it had a row.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let mut rows = self.lanes.iter_mut().flat_map(|lane| &mut lane.rows);
        rows.find(|row| row.as_ref().is_some_and(|sequence| sequence.id == id)).is_some_and(|row| row.take().is_some())
    }

    /// Gives rows to those who join, takes them from those that have ended, and makes the lanes equal.
    pub fn seat(&mut self, joining: Vec<Joining>) {
        let rows = self.sequences().count() + joining.len();
        let lanes = self.most.lanes_for(rows);
        while self.lanes.len() < lanes {
            self.lanes.push(Lane::new(self.model));
        }
        let mut coming: Vec<Vec<Joining>> = self.lanes.iter().map(|_| Vec::new()).collect();
        let mut active: Vec<usize> = self.lanes.iter().map(Lane::active).collect();
        for joining in joining {
            let lane = (0..lanes).min_by_key(|&lane| active[lane]).unwrap_or(0);
            active[lane] += 1;
            coming[lane].push(joining);
        }
        for (lane, coming) in self.lanes.iter_mut().zip(coming) {
            lane.seat(coming);
        }
        // Threads may have gone to others.
        for lane in self.lanes.split_off(lanes) {
            self.gather(lane);
        }
        while let Some((longest, shortest)) = self.uneven() {
            let Some(joining) = self.lanes[longest].leave() else { break };
            self.lanes[shortest].seat(vec![joining]);
        }
    }

    /// Spreads the rows of a lane over the others.
    fn gather(&mut self, mut lane: Lane) {
        while let Some(joining) = lane.leave() {
            if let Some(shortest) = self.lanes.iter_mut().min_by_key(|lane| lane.rows.len()) {
                shortest.seat(vec![joining]);
            }
        }
    }

    /// A lane that should give a row to another.
    fn uneven(&self) -> Option<(usize, usize)> {
        let rows = |&lane: &usize| self.lanes[lane].rows.len();
        let longest = (0..self.lanes.len()).max_by_key(rows)?;
        let shortest = (0..self.lanes.len()).min_by_key(rows)?;
        (rows(&longest) > rows(&shortest) + 1).then_some((longest, shortest))
    }

    /// The lane with all rows, if it is one.
    pub fn alone(&mut self) -> Option<&mut Lane> {
        let mut used = self.lanes.iter_mut().filter(|lane| !lane.rows.is_empty());
        let lane = used.next()?;
        used.next().is_none().then_some(lane)
    }

    /// Takes every row on by an id, each lane on a thread.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn step(&mut self, context: usize) -> Result<Vec<Event>, EngineError> {
        let model = self.model;
        let used = self.lanes.iter_mut().filter(|lane| !lane.rows.is_empty());
        let steps = on_pool(used, |lane| {
            let hidden = lane.forward(model);
            let logits = to_host(model.logits(hidden))?;
            let (mut events, vocab) = (Vec::new(), model.config().vocab_size);
            draw(&logits, vocab, context, Vec::new(), Some(lane), &mut events);
            Ok(events)
        });
        let steps: Vec<Vec<Event>> = steps.into_iter().collect::<Result<_, EngineError>>()?;
        Ok(steps.into_iter().flatten().collect())
    }
}
