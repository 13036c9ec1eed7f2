//! Jobs over a [`Batcher`]: a prompt with one or several answers, started from the prefix cache and leaving snapshots in
//! it. The server's thread and the chat both run on this.
//!
//! Where snapshots are taken (they are dear: one of M1 is 280 MiB): before the last tokens of the prompt, so that asking
//! again or editing the last message finds them; at the last ends of turns before it; at a coarse stride on a long way; and
//! at the end of the reply, so that the next turn reads only what is new. The last are inexact ([`super::prefix_cache`])
//! and are left out where every bit counts.

use super::pieces::{STRIDE, cut_before};
use super::prefix_cache::{CacheStats, PrefixCache};
use super::{BatchSettings, Batcher, Event, Keep, Request, RequestId, Scored};
use crate::engine::{EngineError, Finish};
use crate::guide::Guide;
use crate::sampler::{Sampled, Sampler};
use m1_model::M1;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Ends of turns of a prompt at which snapshots are taken, counted from its end.
const TURNS: usize = 2;

/// Tokens that a reply without a limit of its own may have however long its prompt is, if the memory holds them at all.
const LEAST_REPLY: usize = 1024;

/// The limits of a scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerSettings {
    /// Of the batch.
    pub batch: BatchSettings,
    /// Bytes for the prefix cache, beside [`BatchSettings::memory`].
    pub cache_bytes: u64,
    /// Only begin from what gives the bits of reading everything: replies are read again in the next turn.
    pub exact_cache: bool,
    /// Tokens of a prompt between snapshots.
    pub stride: usize,
}

impl SchedulerSettings {
    /// For `batch`, with a cache of `cache_bytes` and a snapshot every 4,096 tokens.
    pub fn new(batch: BatchSettings, cache_bytes: u64) -> Self {
        Self { batch, cache_bytes, exact_cache: false, stride: 4096 }
    }
}

/// One of the answers that a job asks for.
#[derive(Debug)]
pub struct Choice {
    /// Draws its ids.
    pub sampler: Sampler,
    /// What may be drawn, where not everything is.
    pub guide: Option<Box<dyn Guide>>,
}

/// A prompt to be continued once or several times.
#[derive(Debug)]
pub struct Job {
    /// Ids, at least one.
    pub prompt: Vec<u32>,
    /// Lengths of beginnings of `prompt` from which another conversation may go on (ends of turns), in any order.
    pub turns: Vec<usize>,
    /// The answers wanted, at least one. They share the reading of the prompt.
    pub choices: Vec<Choice>,
    /// Ids that end an answer.
    pub end_ids: Arc<[u32]>,
    /// The most ids drawn for each choice, an end id included; `None`: as the context allows.
    pub max_new: Option<usize>,
    /// How many of the likeliest ids come with each drawn or scored one.
    pub top_log_probs: usize,
    /// Whether the prompt's own tokens are scored ([`Update::Scored`]); it is then read whole, whatever the cache holds.
    pub score_prompt: bool,
}

/// What happens to a job.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// The prompt has been read.
    Read {
        /// Tokens of it that were in the cache.
        cached: usize,
    },
    /// More of the prompt's tokens, in their order from the second on (nothing is said of the first), before
    /// [`Update::Read`].
    Scored(Vec<Scored>),
    /// An id was drawn, also the one that ends the answer.
    Drawn {
        /// Index of the choice.
        choice: usize,
        /// The id.
        token: Sampled,
        /// The likeliest ids at this place with the log-probabilities of the full softmax, likeliest first.
        top: Vec<(u32, f32)>,
    },
    /// Nothing more comes of this choice.
    Finished {
        /// Index of the choice.
        choice: usize,
        /// Why.
        finish: Finish,
    },
    /// The job can't go on; nothing more comes of it.
    Failed(EngineError),
}

/// Names a job among all of one scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(u64);

/// A job that waits.
#[derive(Debug)]
struct Queued {
    id: JobId,
    leader: Request,
    turns: Vec<usize>,
    followers: Vec<Choice>,
}

/// A job under way.
#[derive(Debug)]
struct Running {
    /// Its requests that have not ended, with the index of their choice.
    requests: Vec<(RequestId, usize)>,
    /// Choices that wait until the first has read the prompt.
    followers: Vec<Choice>,
    /// What they need of the job.
    prompt: usize,
    end_ids: Arc<[u32]>,
    max_new: Option<usize>,
    top_log_probs: usize,
    cached: usize,
    /// Whether all that was read has the bits of a fresh start.
    exact: bool,
    /// [`Update::Read`] has been told.
    read: bool,
}

/// Runs jobs.
#[derive(Debug)]
pub struct Scheduler<'a> {
    batcher: Batcher<'a>,
    cache: PrefixCache,
    settings: SchedulerSettings,
    queue: VecDeque<Queued>,
    jobs: HashMap<JobId, Running>,
    owners: HashMap<RequestId, JobId>,
    ids: u64,
}

impl<'a> Scheduler<'a> {
    /// With nothing to do.
    pub fn new(model: &'a M1, settings: SchedulerSettings) -> Self {
        Self {
            batcher: Batcher::new(model, settings.batch),
            cache: PrefixCache::new(settings.cache_bytes),
            settings: SchedulerSettings { stride: settings.stride.max(STRIDE) / STRIDE * STRIDE, ..settings },
            queue: VecDeque::new(),
            jobs: HashMap::new(),
            owners: HashMap::new(),
            ids: 0,
        }
    }

    /// Takes a job in; it starts in one of the next steps, first come first.
    ///
    /// # Errors
    /// As [`Batcher::admit`], and [`EngineError::Empty`] for a job without choices.
    pub fn submit(&mut self, job: Job) -> Result<JobId, EngineError> {
        let Job { prompt, turns, mut choices, end_ids, max_new, top_log_probs, score_prompt } = job;
        if choices.is_empty() {
            return Err(EngineError::Empty);
        }
        let max_new = max_new.or_else(|| self.room(prompt.len()));
        let Choice { sampler, guide } = choices.remove(0);
        let plain = Request::new(prompt, sampler, end_ids, max_new);
        let leader = Request { guide, top_log_probs, score_prompt, ..plain };
        self.batcher.check(&leader)?;
        let id = JobId(self.ids);
        self.ids += 1;
        self.queue.push_back(Queued { id, leader, turns, followers: choices });
        Ok(id)
    }

    /// How much a reply without a limit of its own may say where memory is limited: what its row's share of the memory
    /// holds, or a little more than a long prompt. So it leaves room for others, and is not refused for what it might say.
    fn room(&self, prompt: usize) -> Option<usize> {
        let BatchSettings { memory, rows, .. } = self.settings.batch;
        let memory = memory?;
        let share = self.batcher.longest_in(memory / rows.max(1) as u64);
        let least = (prompt + LEAST_REPLY).min(self.batcher.longest_in(memory));
        Some(share.max(least).saturating_sub(prompt).max(1))
    }

    /// Drops a job; nothing more is told of it. What was read of it stays in the cache.
    pub fn cancel(&mut self, id: JobId) {
        self.queue.retain(|queued| queued.id != id);
        let Some(running) = self.jobs.remove(&id) else { return };
        for (request, _) in &running.requests {
            self.owners.remove(request);
            if let Some(past) = self.batcher.past(*request) {
                // On the way through the prompt every piece ends where reading may be cut.
                let exact = running.exact && cut_before(past.tokens().len(), running.prompt) == past.tokens().len();
                if exact || !self.settings.exact_cache {
                    self.cache.insert(past, exact);
                }
            }
            self.batcher.cancel(*request);
        }
    }

    /// Tokens of its prompt that a job has read; 0 before it starts, and once it has read all of them.
    pub fn read(&self, id: JobId) -> usize {
        let leader = self.jobs.get(&id).and_then(|running| running.requests.first());
        leader.and_then(|&(request, _)| self.batcher.read(request)).unwrap_or(0)
    }

    /// Answers that are being made.
    pub fn active(&self) -> usize {
        self.batcher.active()
    }

    /// Jobs that wait.
    pub fn waiting(&self) -> usize {
        self.queue.len() + self.batcher.waiting()
    }

    /// Whether a step would do nothing.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.batcher.is_idle()
    }

    /// Bytes of the caches of running sequences.
    pub fn bytes(&self) -> u64 {
        self.batcher.bytes()
    }

    /// The prefix cache's figures.
    pub fn cache(&self) -> CacheStats {
        self.cache.stats()
    }

    /// Takes every job on by one step.
    ///
    /// # Errors
    /// As [`Batcher::step`]: nothing can go on.
    pub fn step(&mut self) -> Result<Vec<(JobId, Update)>, EngineError> {
        let mut updates = Vec::new();
        self.start(&mut updates);
        for event in self.batcher.step()? {
            self.take(event, &mut updates);
        }
        Ok(updates)
    }

    /// Starts waiting jobs as there is room, each from the longest beginning that is known at this moment.
    fn start(&mut self, updates: &mut Vec<(JobId, Update)>) {
        while self.queue.front().is_some_and(|queued| self.batcher.has_room(&queued.leader)) {
            let Some(Queued { id, mut leader, turns, followers }) = self.queue.pop_front() else { break };
            let found = if leader.score_prompt { None } else { self.cache.find(&leader.prompt) };
            let (cached, exact) = found.as_ref().map_or((0, true), |f| (f.prefix.tokens().len(), f.exact));
            leader.prefix = found.map(|found| found.prefix);
            leader.keep = Keep {
                prompt: !followers.is_empty(),
                marks: marks(&turns, leader.prompt.len(), self.settings.stride),
                end: !self.settings.exact_cache,
            };
            let running = Running {
                requests: Vec::new(),
                followers,
                prompt: leader.prompt.len(),
                end_ids: leader.end_ids.clone(),
                max_new: leader.max_new,
                top_log_probs: leader.top_log_probs,
                cached,
                exact,
                read: false,
            };
            match self.batcher.admit(leader) {
                Ok(request) => {
                    self.owners.insert(request, id);
                    self.jobs.insert(id, Running { requests: vec![(request, 0)], ..running });
                }
                Err(error) => updates.push((id, Update::Failed(error))),
            }
        }
    }

    fn take(&mut self, event: Event, updates: &mut Vec<(JobId, Update)>) {
        let request = match &event {
            Event::Passed { id, .. } | Event::Scored { id, .. } | Event::Read { id, .. } => *id,
            Event::Drawn { id, .. } | Event::Finished { id, .. } | Event::Failed { id, .. } => *id,
        };
        let Some(&job) = self.owners.get(&request) else { return };
        let Some(running) = self.jobs.get_mut(&job) else { return };
        let choice = running.requests.iter().find(|r| r.0 == request).map_or(0, |r| r.1);
        let read_now = !matches!(event, Event::Passed { .. } | Event::Scored { .. } | Event::Failed { .. });
        if read_now && !std::mem::replace(&mut running.read, true) {
            updates.push((job, Update::Read { cached: running.cached }));
        }
        match event {
            Event::Passed { snapshot, .. } => {
                if running.exact || !self.settings.exact_cache {
                    self.cache.insert(snapshot, running.exact);
                }
            }
            Event::Scored { tokens, .. } => updates.push((job, Update::Scored(tokens))),
            Event::Read { prefix, .. } => {
                let prompt = prefix.tokens().to_vec();
                for (i, Choice { sampler, guide }) in std::mem::take(&mut running.followers).into_iter().enumerate() {
                    let follower = Request {
                        prefix: Some(prefix.clone()),
                        guide,
                        top_log_probs: running.top_log_probs,
                        ..Request::new(prompt.clone(), sampler, running.end_ids.clone(), running.max_new)
                    };
                    match self.batcher.admit(follower) {
                        Ok(request) => {
                            running.requests.push((request, i + 1));
                            self.owners.insert(request, job);
                        }
                        Err(error) => return self.fail(job, error, updates),
                    }
                }
            }
            Event::Drawn { token, top, .. } => updates.push((job, Update::Drawn { choice, token, top })),
            Event::Finished { finish, past, .. } => {
                if let Some(past) = past {
                    self.cache.insert(past, false);
                }
                running.requests.retain(|r| r.0 != request);
                self.owners.remove(&request);
                if running.requests.is_empty() {
                    self.jobs.remove(&job);
                }
                updates.push((job, Update::Finished { choice, finish }));
            }
            Event::Failed { error, .. } => self.fail(job, error, updates),
        }
    }

    /// One choice that fails takes the others of its job with it.
    fn fail(&mut self, job: JobId, error: EngineError, updates: &mut Vec<(JobId, Update)>) {
        self.cancel(job);
        updates.push((job, Update::Failed(error)));
    }
}

/// Where snapshots of a prompt of `total` tokens are taken.
fn marks(turns: &[usize], total: usize, stride: usize) -> Vec<usize> {
    let mut ends: Vec<usize> = turns.iter().map(|&turn| cut_before(turn, total)).collect();
    ends.sort_unstable();
    ends.dedup();
    let mut marks = ends.split_off(ends.len().saturating_sub(TURNS));
    let last = cut_before(total, total);
    marks.push(last);
    marks.extend((1..).map(|i| i * stride).take_while(|&mark| mark < last));
    marks
}

#[cfg(test)]
mod tests;
