//! The rows that decode, those that wait, and the step that takes all of them on.

use super::reading::Reading;
use super::{BatchSettings, Event, Prefix, Request, RequestId};
use crate::engine::{EngineError, Finish, to_host};
use crate::sampler::{Sampled, Sampler, SamplerError};
use burn::tensor::Tensor;
use m1_kernels::base::pool;
use m1_model::{Batch, Cache, M1, Snapshot, Trace};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Logits from which drawing is worth spreading over the threads: some hundred microseconds of work.
const SPREAD: usize = 1 << 15;

/// What a sequence is apart from its text and its row.
#[derive(Debug)]
pub(super) struct Sequence {
    pub id: RequestId,
    sampler: Sampler,
    end_ids: Arc<[u32]>,
    max_new: usize,
    made: usize,
    /// The prompt's prefix is still to be handed out.
    keep: bool,
}

impl Sequence {
    /// Takes in what was drawn after `read` tokens had been read, and returns the id to be read next if the sequence goes
    /// on. The order of the checks is that of [`crate::Session::generate`].
    fn take(
        &mut self,
        drawn: Result<Sampled, SamplerError>,
        read: usize,
        context: usize,
        prefix: impl FnOnce() -> Prefix,
        events: &mut Vec<Event>,
    ) -> Option<u32> {
        let id = self.id;
        if std::mem::take(&mut self.keep) {
            events.push(Event::Read { id, prefix: Arc::new(prefix()) });
        }
        if self.max_new == 0 {
            events.push(Event::Finished { id, finish: Finish::Length });
            return None;
        }
        let token = match drawn {
            Ok(token) => token,
            Err(error) => {
                events.push(Event::Failed { id, error: error.into() });
                return None;
            }
        };
        events.push(Event::Drawn { id, token });
        self.made += 1;
        let finish = if self.end_ids.contains(&token.id) {
            Finish::End(token.id)
        } else if self.made >= self.max_new {
            Finish::Length
        } else if read + 1 >= context {
            Finish::Context
        } else {
            return Some(token.id);
        };
        events.push(Event::Finished { id, finish });
        None
    }
}

/// A sequence that has no row yet, what has been read of it and the id to be read next.
#[derive(Debug)]
struct Joining {
    sequence: Sequence,
    snapshot: Snapshot,
    next: u32,
}

/// Runs many sequences over one model.
#[derive(Debug)]
pub struct Batcher<'a> {
    model: &'a M1,
    settings: BatchSettings,
    waiting: VecDeque<(RequestId, Request)>,
    reading: Reading,
    joining: Vec<Joining>,
    cache: Cache,
    /// One for each row of the cache; `None` where the sequence has ended and its row waits for another.
    rows: Vec<Option<Sequence>>,
    /// The id that each row reads next.
    next: Vec<u32>,
    ids: u64,
}

impl<'a> Batcher<'a> {
    /// An empty batch.
    pub fn new(model: &'a M1, settings: BatchSettings) -> Self {
        Self {
            model,
            settings: BatchSettings { rows: settings.rows.max(1), ..settings },
            waiting: VecDeque::new(),
            reading: Reading::new(model),
            joining: Vec::new(),
            cache: Cache::new(model.config(), 0, &model.device()),
            rows: Vec::new(),
            next: Vec::new(),
            ids: 0,
        }
    }

    /// Takes a request in; it starts in one of the next steps, as rows are free, first come first.
    ///
    /// # Errors
    /// For an empty prompt, an unknown id, no room for a reply in the context, or a prefix of another text.
    pub fn admit(&mut self, request: Request) -> Result<RequestId, EngineError> {
        let (vocab, context) = (self.model.config().vocab_size, self.settings.context);
        let prompt = &request.prompt;
        if prompt.is_empty() {
            return Err(EngineError::Empty);
        }
        if let Some(position) = prompt.iter().position(|&id| id as usize >= vocab) {
            return Err(EngineError::UnknownId { position, id: prompt[position], vocab });
        }
        if prompt.len() >= context {
            return Err(EngineError::Context { tokens: prompt.len(), context });
        }
        if let Some(prefix) = request.prefix.as_ref().filter(|p| !prompt.starts_with(p.tokens())) {
            return Err(EngineError::Prefix { prefix: prefix.tokens().len(), tokens: prompt.len() });
        }
        let id = RequestId(self.ids);
        self.ids += 1;
        self.waiting.push_back((id, request));
        Ok(id)
    }

    /// Drops a request, wherever it stands; no event comes of it any more. Returns whether it was there.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let waiting = self.waiting.len();
        self.waiting.retain(|(other, _)| *other != id);
        let joining = self.joining.len();
        self.joining.retain(|joining| joining.sequence.id != id);
        if self.waiting.len() < waiting || self.joining.len() < joining {
            return true;
        }
        match self.rows.iter_mut().find(|row| row.as_ref().is_some_and(|sequence| sequence.id == id)) {
            Some(row) => row.take().is_some(),
            None => self.reading.remove(|sequence| sequence.id == id),
        }
    }

    /// Requests that hold a row or read their prompt.
    pub fn active(&self) -> usize {
        self.rows.iter().flatten().count() + self.reading.len() + self.joining.len()
    }

    /// Requests that wait for a row.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether a step would do nothing.
    pub fn is_idle(&self) -> bool {
        self.active() == 0 && self.waiting.is_empty()
    }

    /// Bytes that the caches hold.
    pub fn bytes(&self) -> u64 {
        self.cache.bytes() + self.reading.bytes()
    }

    /// Takes every sequence on by one id, and prompts by a piece; starts those that wait where there is room.
    ///
    /// # Errors
    /// [`EngineError::Device`]: no sequence can go on. What goes wrong with one alone is its [`Event::Failed`].
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        let mut events = Vec::new();
        self.start(&mut events);
        self.seat();
        let (read, read_hidden) = self.reading.step(self.model, self.settings.prefill_tokens);
        let decoded = (!self.rows.is_empty()).then(|| {
            let rows = self.next.iter().map(|&id| vec![id]).collect();
            self.model.forward(&Batch::new(rows), Some(&mut self.cache), &mut Trace::none())
        });
        let mut hidden: Vec<Tensor<2>> = read_hidden.into_iter().chain(decoded).collect();
        let hidden = if hidden.len() > 1 { Some(Tensor::cat(hidden, 0)) } else { hidden.pop() };
        if let Some(hidden) = hidden {
            // One product with the head and one transfer, whoever asks.
            let logits = to_host(self.model.logits(hidden))?;
            self.draw(&logits, read, &mut events);
        }
        if self.is_idle() {
            self.seat(); // nobody holds memory any more
        }
        Ok(events)
    }

    /// Lets those begin for whom there is room. One whose whole prompt is read already draws its first id at once.
    fn start(&mut self, events: &mut Vec<Event>) {
        let context = self.settings.context;
        loop {
            let mut free = self.settings.rows.saturating_sub(self.active());
            let mut ready = Vec::new();
            let mut passed = VecDeque::new();
            while let Some((id, request)) = self.waiting.pop_front() {
                let known = request.prefix.as_ref().map_or(0, |p| p.tokens().len());
                let unread = request.prompt.len() - known;
                if free == 0 || unread > 1 && self.reading.full(self.settings.prefill_tokens) {
                    passed.push_back((id, request));
                    if free == 0 {
                        break;
                    }
                    continue;
                }
                free -= 1;
                let Request { prompt, prefix, sampler, end_ids, max_new, keep } = request;
                let max_new = max_new.unwrap_or(usize::MAX);
                let sequence = Sequence { id, sampler, end_ids, max_new, made: 0, keep };
                match (unread, prefix) {
                    (0, Some(prefix)) => ready.push((sequence, prefix)),
                    (unread, prefix) => {
                        let snapshot = match prefix {
                            Some(prefix) => prefix.snapshot.clone(),
                            None => Cache::new(self.model.config(), 1, &self.model.device()).snapshot(0),
                        };
                        match prompt.last() {
                            // A token alone goes the way of decoding, as it would in a session.
                            Some(&next) if unread == 1 => self.joining.push(Joining { sequence, snapshot, next }),
                            _ => self.reading.add(sequence, prompt, &snapshot),
                        }
                    }
                }
            }
            passed.append(&mut self.waiting);
            self.waiting = passed;
            if ready.is_empty() {
                return;
            }
            let draws = ready.iter_mut().map(|(sequence, prefix)| Draw {
                sampler: &mut sequence.sampler,
                logits: &prefix.logits,
                text: prefix.tokens(),
            });
            let drawn = draw_all(draws.collect());
            for ((mut sequence, prefix), drawn) in ready.into_iter().zip(drawn) {
                let read = prefix.tokens().len();
                if let Some(next) = sequence.take(drawn, read, context, || (*prefix).clone(), events) {
                    self.joining.push(Joining { sequence, snapshot: prefix.snapshot.clone(), next });
                }
            }
        }
    }

    /// Gives a row to those who join: first the rows of those that have ended, which are written alone; only when the
    /// number of rows changes are all states copied.
    fn seat(&mut self) {
        let mut joining = std::mem::take(&mut self.joining).into_iter();
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

    /// Draws for those whose prompts have been `read` and for every row, in the order of the `logits`.
    fn draw(&mut self, logits: &[f32], mut read: Vec<(Sequence, Snapshot)>, events: &mut Vec<Event>) {
        let (vocab, context) = (self.model.config().vocab_size, self.settings.context);
        let of_read = read.iter_mut().map(|(sequence, snapshot)| (&mut sequence.sampler, snapshot.tokens()));
        let cache = &self.cache;
        let of_rows = (self.rows.iter_mut().enumerate())
            .filter_map(|(row, sequence)| Some((&mut sequence.as_mut()?.sampler, cache.tokens(row))));
        let draws = of_read.chain(of_rows).zip(logits.chunks_exact(vocab));
        let drawn = draw_all(draws.map(|((sampler, text), logits)| Draw { sampler, logits, text }).collect());

        let mut drawn = drawn.into_iter().zip(logits.chunks_exact(vocab));
        for (mut sequence, snapshot) in read {
            let Some((drawn, logits)) = drawn.next() else { break };
            let prefix = || Prefix { snapshot: snapshot.clone(), logits: logits.to_vec() };
            if let Some(next) = sequence.take(drawn, snapshot.tokens().len(), context, prefix, events) {
                self.joining.push(Joining { sequence, snapshot, next });
            }
        }
        for (row, slot) in self.rows.iter_mut().enumerate() {
            let Some(sequence) = slot else { continue };
            let Some((drawn, logits)) = drawn.next() else { break };
            let prefix = || Prefix { snapshot: cache.snapshot(row), logits: logits.to_vec() };
            match sequence.take(drawn, cache.len(row), context, prefix, events) {
                Some(next) => self.next[row] = next,
                None => *slot = None,
            }
        }
    }
}

/// One id to be drawn.
struct Draw<'a> {
    sampler: &'a mut Sampler,
    logits: &'a [f32],
    text: &'a [u32],
}

/// Draws all, each with its own sampler, on as many threads as it is worth.
fn draw_all(draws: Vec<Draw>) -> Vec<Result<Sampled, SamplerError>> {
    let size: usize = draws.iter().map(|draw| draw.logits.len()).sum();
    let draw = |draw: &mut Draw| draw.sampler.sample(draw.logits, draw.text);
    if size < SPREAD {
        return draws.into_iter().map(|mut d| draw(&mut d)).collect();
    }
    // Each is locked once, by the thread that draws it.
    let cells: Vec<Mutex<(Draw, Option<_>)>> = draws.into_iter().map(|draw| Mutex::new((draw, None))).collect();
    pool::run(cells.len(), |i| {
        let mut cell = cells[i].lock().unwrap_or_else(PoisonError::into_inner);
        let drawn = draw(&mut cell.0);
        cell.1 = Some(drawn);
    });
    let result = |cell: Mutex<(Draw, Option<_>)>| cell.into_inner().unwrap_or_else(PoisonError::into_inner).1;
    cells.into_iter().filter_map(result).collect()
}
