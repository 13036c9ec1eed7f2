//! The sequences that wait, those under way, and the step that takes all of them on.

use super::lanes::{Lane, Lanes};
use super::reading::{Readings, Unscored};
use super::{BatchSettings, Event, Prefix, Request, RequestId, Scored};
use crate::engine::{EngineError, Finish, to_host};
use crate::guide::{Guide, Next};
use crate::parallel::on_pool;
use crate::sampler::{Sampled, Sampler, top_log_probs};
use burn::tensor::Tensor;
use m1_model::{Cache, M1, Snapshot};
use std::collections::VecDeque;
use std::sync::Arc;

/// Logits from which drawing is worth spreading over the threads: some twenty microseconds of work.
const SPREAD: usize = 1 << 13;

/// Logits of a prompt's tokens that are held at once.
const SCORED: usize = 4 << 20;

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
    /// Its past is to be handed out at the end.
    keep_end: bool,
    guide: Option<Box<dyn Guide>>,
    pub top_log_probs: usize,
    /// Bytes that its cache may come to.
    memory: u64,
}

/// An id with the likeliest at its place.
type Drawn = (Sampled, Vec<(u32, f32)>);

impl Sequence {
    /// Takes in what was drawn after `read` tokens had been read, and returns the id to be read next if the sequence goes
    /// on. The order of the checks is that of [`crate::Session::generate`]. `past` gives its row.
    fn take(
        &mut self,
        drawn: Result<Drawn, EngineError>,
        read: usize,
        context: usize,
        logits: &[f32],
        past: impl Fn() -> Snapshot,
        events: &mut Vec<Event>,
    ) -> Option<u32> {
        let id = self.id;
        if std::mem::take(&mut self.keep) {
            events.push(Event::Read { id, prefix: Arc::new(Prefix { snapshot: past(), logits: logits.to_vec() }) });
        }
        let keep_end = self.keep_end;
        let end = |finish| Event::Finished { id, finish, past: keep_end.then(&past) };
        if self.max_new == 0 {
            events.push(end(Finish::Length));
            return None;
        }
        let (token, top) = match drawn {
            Ok(drawn) => drawn,
            Err(error) => {
                events.push(Event::Failed { id, error });
                return None;
            }
        };
        events.push(Event::Drawn { id, token, top });
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
        events.push(end(finish));
        None
    }
}

/// A sequence that has no row yet, what has been read of it and the id to be read next.
#[derive(Debug)]
pub(super) struct Joining {
    pub sequence: Sequence,
    pub snapshot: Snapshot,
    pub next: u32,
}

/// Runs many sequences over one model.
#[derive(Debug)]
pub struct Batcher<'a> {
    model: &'a M1,
    settings: BatchSettings,
    waiting: VecDeque<(RequestId, Request)>,
    reading: Readings<'a>,
    joining: Vec<Joining>,
    lanes: Lanes<'a>,
    ids: u64,
    /// Bytes that the caches of all that are active may come to.
    reserved: u64,
}

impl<'a> Batcher<'a> {
    /// An empty batch.
    pub fn new(model: &'a M1, settings: BatchSettings) -> Self {
        Self {
            model,
            settings: BatchSettings { rows: settings.rows.max(1), ..settings },
            waiting: VecDeque::new(),
            reading: Readings::new(model),
            joining: Vec::new(),
            lanes: Lanes::new(model),
            ids: 0,
            reserved: 0,
        }
    }

    /// Takes a request in; it starts in one of the next steps, as rows are free, first come first.
    ///
    /// # Errors
    /// As [`Batcher::check`].
    pub fn admit(&mut self, request: Request) -> Result<RequestId, EngineError> {
        self.check(&request)?;
        let id = RequestId(self.ids);
        self.ids += 1;
        self.waiting.push_back((id, request));
        Ok(id)
    }

    /// Whether a request could ever run.
    ///
    /// # Errors
    /// For an empty prompt, an unknown id, no room for a reply in the context, a prefix of another text, or a sequence
    /// that the memory can't hold even alone.
    pub fn check(&self, request: &Request) -> Result<(), EngineError> {
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
        if request.prefix.as_ref().is_some_and(|p| p.tokens().len() == prompt.len() && p.logits.len() != vocab) {
            return Err(EngineError::Prefix { prefix: prompt.len(), tokens: prompt.len() });
        }
        let (tokens, needed) = (request.longest(context), self.needed(request));
        match self.settings.memory.filter(|&memory| needed > memory) {
            Some(memory) => Err(EngineError::Memory { tokens, needed, memory }),
            None => Ok(()),
        }
    }

    /// Bytes that the cache of `request` may come to.
    pub fn needed(&self, request: &Request) -> u64 {
        self.lanes.row_bytes(request.longest(self.settings.context))
    }

    /// The most tokens, up to the context, whose cache takes no more than `bytes`.
    pub fn longest_in(&self, bytes: u64) -> usize {
        let fits = |tokens: usize| self.lanes.row_bytes(tokens) <= bytes;
        let (mut low, mut high) = (0, self.settings.context);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            (low, high) = if fits(middle) { (middle, high) } else { (low, middle - 1) };
        }
        low
    }

    /// Whether `request` would start in the next step, beside those that wait already.
    pub fn has_room(&self, request: &Request) -> bool {
        let promised = self.waiting.iter().map(|(_, request)| self.needed(request)).sum::<u64>();
        let all = self.reserved + promised + self.needed(request);
        self.active() + self.waiting() < self.settings.rows
            && !self.reading.full_with(self.waiting(), self.settings.prefill_tokens)
            && self.settings.memory.is_none_or(|memory| all <= memory)
    }

    /// What has been read of a request that is under way; `None` while it waits and once it has ended.
    pub fn past(&self, id: RequestId) -> Option<Snapshot> {
        let of = |sequence: &Sequence| sequence.id == id;
        let joining =
            || self.joining.iter().find(|joining| of(&joining.sequence)).map(|joining| joining.snapshot.clone());
        self.lanes.past(id).or_else(joining).or_else(|| self.reading.past(of))
    }

    /// Tokens of its prompt that a request has read, if it is at that.
    pub fn read(&self, id: RequestId) -> Option<usize> {
        self.reading.read(|sequence| sequence.id == id)
    }

    /// Drops a request, wherever it stands; no event comes of it any more. Returns whether it was there.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let waiting = self.waiting.len();
        self.waiting.retain(|(other, _)| *other != id);
        let joining = self.joining.len();
        self.joining.retain(|joining| joining.sequence.id != id);
        let there = self.waiting.len() < waiting
            || self.joining.len() < joining
            || self.lanes.cancel(id)
            || self.reading.remove(|sequence| sequence.id == id);
        self.count_reserved();
        there
    }

    /// All sequences that are active.
    fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        let joining = self.joining.iter().map(|joining| &joining.sequence);
        self.lanes.sequences().chain(joining).chain(self.reading.sequences())
    }

    fn count_reserved(&mut self) {
        self.reserved = self.sequences().map(|sequence| sequence.memory).sum();
    }

    /// Requests that hold a row or read their prompt.
    pub fn active(&self) -> usize {
        self.sequences().count()
    }

    /// Lanes that decode.
    #[cfg(test)]
    pub(super) fn lanes(&self) -> usize {
        self.lanes.used()
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
        self.lanes.bytes() + self.reading.bytes()
    }

    /// Takes every sequence on by one id, and prompts by a piece; starts those that wait where there is room.
    ///
    /// # Errors
    /// [`EngineError::Device`]: no sequence can go on. What goes wrong with one alone is its [`Event::Failed`].
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        let mut events = Vec::new();
        self.start(&mut events);
        self.lanes.seat(std::mem::take(&mut self.joining));
        let read = self.reading.step(self.settings.prefill_tokens);
        events.extend(read.passed.into_iter().map(|(id, snapshot)| Event::Passed { id, snapshot }));
        for unscored in read.scored {
            events.push(Event::Scored { id: unscored.id, tokens: score(self.model, unscored)? });
        }
        let (vocab, context) = (self.model.config().vocab_size, self.settings.context);
        let mut lane = self.lanes.alone();
        let decoded = lane.as_mut().map(|lane| lane.forward(self.model));
        let several = lane.is_none();
        let mut hidden: Vec<Tensor<2>> = read.hidden.into_iter().chain(decoded).collect();
        let hidden = if hidden.len() > 1 { Some(Tensor::cat(hidden, 0)) } else { hidden.pop() };
        if let Some(hidden) = hidden {
            // One product with the head and one transfer, whoever asks.
            let logits = to_host(self.model.logits(hidden))?;
            self.joining.extend(draw(&logits, vocab, context, read.done, lane, &mut events));
        }
        if several {
            events.extend(self.lanes.step(context)?);
        }
        if self.is_idle() {
            self.lanes.seat(Vec::new()); // nobody holds memory any more
        }
        self.count_reserved();
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
                let memory = self.needed(&request);
                let fits = self.settings.memory.is_none_or(|all| self.reserved + memory <= all);
                if free == 0 || !fits || unread > 1 && self.reading.full(self.settings.prefill_tokens) {
                    passed.push_back((id, request));
                    // Whoever needs much memory is not overtaken for ever by those that need little.
                    if free == 0 || !fits {
                        break;
                    }
                    continue;
                }
                free -= 1;
                self.reserved += memory;
                let Request { prompt, prefix, sampler, end_ids, max_new, keep, guide, top_log_probs, score_prompt } =
                    request;
                let sequence = Sequence {
                    id,
                    sampler,
                    end_ids,
                    max_new: max_new.unwrap_or(usize::MAX),
                    made: 0,
                    keep: keep.prompt,
                    keep_end: keep.end,
                    guide,
                    top_log_probs,
                    memory,
                };
                match (unread, prefix) {
                    (0, Some(prefix)) => ready.push((sequence, prefix)),
                    (unread, prefix) => {
                        let snapshot = match prefix {
                            Some(prefix) => prefix.snapshot.clone(),
                            None => Cache::new(self.model, 1).snapshot(0),
                        };
                        match prompt.last() {
                            // A token alone goes the way of decoding, as it would in a session.
                            Some(&next) if unread == 1 => self.joining.push(Joining { sequence, snapshot, next }),
                            _ => self.reading.add(sequence, prompt, keep.marks, &snapshot, score_prompt),
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
                sequence,
                logits: &prefix.logits,
                text: prefix.tokens(),
            });
            let drawn = draw_all(draws.collect());
            for ((mut sequence, prefix), drawn) in ready.into_iter().zip(drawn) {
                let (read, past) = (prefix.tokens().len(), || prefix.snapshot.clone());
                if let Some(next) = sequence.take(drawn, read, context, &prefix.logits, past, events) {
                    self.joining.push(Joining { sequence, snapshot: prefix.snapshot.clone(), next });
                }
            }
        }
    }
}

/// Draws for those whose prompts have been `read` and for every row of `lane`, in the order of the `logits`; who has been
/// read and goes on is returned.
pub(super) fn draw(
    logits: &[f32],
    vocab: usize,
    context: usize,
    mut read: Vec<(Sequence, Snapshot)>,
    mut lane: Option<&mut Lane>,
    events: &mut Vec<Event>,
) -> Vec<Joining> {
    let of_read = read.iter_mut().map(|(sequence, snapshot)| (sequence, snapshot.tokens()));
    let of_rows = lane.iter_mut().flat_map(|lane| {
        let Lane { cache, rows, .. } = &mut **lane;
        let rows = rows.iter_mut().enumerate();
        rows.filter_map(|(row, sequence)| Some((sequence.as_mut()?, cache.tokens(row))))
    });
    let draws = of_read.chain(of_rows).zip(logits.chunks_exact(vocab));
    let drawn = draw_all(draws.map(|((sequence, text), logits)| Draw { sequence, logits, text }).collect());

    let (mut drawn, mut joining) = (drawn.into_iter().zip(logits.chunks_exact(vocab)), Vec::new());
    for (mut sequence, snapshot) in read {
        let Some((drawn, logits)) = drawn.next() else { break };
        let past = || snapshot.clone();
        if let Some(next) = sequence.take(drawn, snapshot.tokens().len(), context, logits, past, events) {
            joining.push(Joining { sequence, snapshot, next });
        }
    }
    if let Some(Lane { cache, rows, next }) = lane {
        for (row, slot) in rows.iter_mut().enumerate() {
            let Some(sequence) = slot else { continue };
            let Some((drawn, logits)) = drawn.next() else { break };
            match sequence.take(drawn, cache.len(row), context, logits, || cache.snapshot(row), events) {
                Some(id) => next[row] = id,
                None => *slot = None,
            }
        }
    }
    joining
}

/// Scores tokens, a part at a time: the logits of a whole piece are hundreds of megabytes for a vocabulary as large as M1's.
fn score(model: &M1, unscored: Unscored) -> Result<Vec<Scored>, EngineError> {
    let Unscored { top_log_probs, ids, hidden, .. } = unscored;
    let vocab = model.config().vocab_size;
    let mut scored = Vec::with_capacity(ids.len());
    for part in ids.chunks((SCORED / vocab).max(1)) {
        let logits = to_host(model.logits(hidden.clone().narrow(0, scored.len(), part.len())))?;
        scored.extend(on_pool(0..part.len(), |i| Scored::of(part[i], &logits[i * vocab..][..vocab], top_log_probs)));
    }
    Ok(scored)
}

/// One id to be drawn.
struct Draw<'a> {
    sequence: &'a mut Sequence,
    logits: &'a [f32],
    text: &'a [u32],
}

impl Draw<'_> {
    /// Draws it and tells the guide.
    fn draw(&mut self) -> Result<Drawn, EngineError> {
        let Sequence { sampler, guide, top_log_probs: top, .. } = &mut *self.sequence;
        let next = guide.as_mut().map_or(Ok(Next::Any), |guide| guide.next())?;
        let token = sampler.sample_next(self.logits, self.text, next)?;
        if let Some(guide) = guide {
            guide.take(token.id)?;
        }
        Ok((token, top_log_probs(self.logits, *top)))
    }

    /// How much work it is, in logits looked at; a guide looks at the whole vocabulary with more care.
    fn work(&self) -> usize {
        self.logits.len() * if self.sequence.guide.is_some() { 8 } else { 1 }
    }
}

/// Draws all, each with its own sampler, on as many threads as it is worth.
fn draw_all(draws: Vec<Draw>) -> Vec<Result<Drawn, EngineError>> {
    if draws.iter().map(Draw::work).sum::<usize>() < SPREAD {
        return draws.into_iter().map(|mut draw| draw.draw()).collect();
    }
    on_pool(draws, |mut draw| draw.draw())
}
