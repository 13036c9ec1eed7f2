//! Many replies at once, on all cores: what evaluation and rollouts share.
//!
//! Different here: every worker has a batch of its own that refills as rows end (see [`m1_infer::batching`]), and takes the
//! next prompt when it has room. A prompt with several replies is read once and shared. A reply draws from a generator of
//! its own, so it depends neither on its neighbours nor on which worker made it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use m1_infer::batching::{BatchSettings, Batcher, Event, Request, RequestId};
use m1_infer::engine::{EngineError, Finish};
use m1_infer::sampler::{Sampler, SamplerError, SamplingOptions};
use m1_kernels::base::pool;
use m1_model::model::M1;
use serde::{Deserialize, Serialize};

use crate::trainer::in_parallel;

/// How replies are drawn and ended.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Sampling; its seed is replaced by each reply's own.
    pub sampling: SamplingOptions,
    /// Ids that may be drawn; `None` allows all.
    pub allowed: Option<Vec<bool>>,
    /// Ids that end a reply.
    pub end_ids: Vec<u32>,
    /// A reply is cut after so many tokens.
    pub max_new_tokens: usize,
    /// When a reply is cut because it repeats itself; `None`: never.
    pub repetition: Option<Repetition>,
    /// Replies made together, over all workers.
    pub rows: usize,
    /// The most tokens of prompt and reply; `None`: the model's `max_position_embeddings`.
    pub context: Option<usize>,
    /// Set to end it between two tokens, with [`GenerateError::Interrupted`].
    pub stop: Option<Arc<AtomicBool>>,
}

/// A reply that has gone round in circles is told by its certainty (arXiv 2506.13585): `count` consecutive tokens, each of a
/// probability above `threshold`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Repetition {
    /// Consecutive tokens, at least 1.
    pub count: usize,
    /// Probability under the full softmax, 0 to 1.
    pub threshold: f32,
}

impl Default for Repetition {
    /// The report's: 3,000 tokens above 0.99.
    fn default() -> Self {
        Self { count: 3000, threshold: 0.99 }
    }
}

/// A prompt and the seeds of the replies to it, one each.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Token ids, at least one.
    pub ids: Vec<u32>,
    /// Seeds.
    pub seeds: Vec<u64>,
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ending {
    /// The model ended it; the end id is the reply's last.
    End,
    /// It was cut at the length window.
    Length,
    /// It was cut where the context was full.
    Context,
    /// It was cut for repetition.
    Repetition,
}

/// A reply.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// Token ids, with the one that ended it.
    pub ids: Vec<u32>,
    /// log π of each id under the full softmax at temperature 1.
    pub log_probs: Vec<f32>,
    /// Why it ended.
    pub ending: Ending,
}

impl Reply {
    /// The ids without the one that ended it.
    pub fn text(&self) -> &[u32] {
        &self.ids[..self.ids.len() - usize::from(self.ending == Ending::End)]
    }
}

/// Why there are no replies.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The sampling settings.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// A prompt that cannot be continued, or a failure on the way.
    #[error("prompt {prompt}: {source}")]
    Prompt {
        /// Its number in the call, from 0.
        prompt: usize,
        /// What is wrong.
        source: EngineError,
    },
    /// The device failed.
    #[error(transparent)]
    Engine(EngineError),
    /// [`GenerateOptions::stop`] was set.
    #[error("interrupted")]
    Interrupted,
}

/// Replies to all prompts in their order, one for each seed in the seeds' order. Each of `pools` gets a worker; with none
/// the calling thread is the only one (right for a GPU). `done` is called with the prompt's number as each reply ends.
///
/// # Errors
/// For settings out of range, and for the first thing that went wrong with a prompt.
pub fn generate(
    model: &M1,
    prompts: &[Prompt],
    options: &GenerateOptions,
    pools: &[rayon::ThreadPool],
    done: &(dyn Fn(usize, &Reply) + Sync),
) -> Result<Vec<Vec<Reply>>, GenerateError> {
    let sampling = SamplingOptions { seed: Some(0), ..options.sampling.clone() };
    let sampler = Sampler::new(sampling, options.allowed.clone())?;
    let units = units(prompts, pools.len().max(1));
    let replies: usize = prompts.iter().map(|p| p.seeds.len()).sum();
    // As many workers as have something to do, with rows that leave none of them idle.
    let most = options.rows.max(1);
    let workers = pools.len().min(units.len()).min(most).max(1);
    let rows = (most / workers).min(replies.div_ceil(workers)).max(1);
    let (next, busy) = (AtomicUsize::new(0), AtomicUsize::new(workers));
    let threads = pool::threads();
    let shared = Shared { model, prompts, options, sampler, units, rows, next, busy, threads, done };
    let made = match pools {
        [] => vec![shared.work()],
        pools => in_parallel(pools, workers, |_| shared.work()),
    };
    let mut results: Vec<Vec<Option<Reply>>> = prompts.iter().map(|p| vec![None; p.seeds.len()]).collect();
    let mut errors = Vec::new();
    for made in made {
        match made {
            Ok(made) => made.into_iter().for_each(|(at, reply)| results[at.prompt][at.sample] = Some(reply)),
            Err(error) => errors.push(error),
        }
    }
    match errors.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(results.into_iter().map(|replies| replies.into_iter().flatten().collect()).collect()),
    }
}

/// Replies to one prompt that one worker makes: `from..to` of its seeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unit {
    prompt: usize,
    from: usize,
    to: usize,
}

/// One unit a prompt, or more where there would be less than workers.
fn units(prompts: &[Prompt], workers: usize) -> Vec<Unit> {
    let parts = workers.div_ceil(prompts.len().max(1));
    let mut units = Vec::new();
    for (prompt, p) in prompts.iter().enumerate() {
        let size = p.seeds.len().div_ceil(parts).max(1);
        for from in (0..p.seeds.len()).step_by(size) {
            units.push(Unit { prompt, from, to: p.seeds.len().min(from + size) });
        }
    }
    units
}

/// Which reply.
#[derive(Debug, Clone, Copy)]
struct Place {
    prompt: usize,
    sample: usize,
}

/// A reply under way.
struct Running {
    at: Place,
    reply: Reply,
    /// Consecutive tokens at its end whose probability is above the threshold.
    certain: usize,
}

struct Shared<'a> {
    model: &'a M1,
    prompts: &'a [Prompt],
    options: &'a GenerateOptions,
    sampler: Sampler,
    units: Vec<Unit>,
    /// Rows of each worker.
    rows: usize,
    next: AtomicUsize,
    /// Workers that have not finished. They share the kernels' threads: a helper of one would take a core from another.
    busy: AtomicUsize,
    /// The kernels' threads.
    threads: usize,
    done: &'a (dyn Fn(usize, &Reply) + Sync),
}

impl Shared<'_> {
    /// One worker: takes units until there are none.
    fn work(&self) -> Result<Vec<(Place, Reply)>, GenerateError> {
        let result = Worker { shared: self, running: HashMap::new(), units: HashMap::new(), made: Vec::new() }.run();
        self.busy.fetch_sub(1, Ordering::Relaxed);
        if result.is_err() {
            self.next.store(self.units.len(), Ordering::Relaxed); // the others need not begin anything more
        }
        result
    }

    fn request(&self, at: Place) -> Request {
        let prompt = &self.prompts[at.prompt];
        let mut sampler = self.sampler.clone();
        sampler.reseed(prompt.seeds[at.sample]);
        let end_ids = Arc::from(self.options.end_ids.as_slice());
        Request::new(prompt.ids.clone(), sampler, end_ids, Some(self.options.max_new_tokens.max(1)))
    }
}

struct Worker<'a> {
    shared: &'a Shared<'a>,
    running: HashMap<RequestId, Running>,
    /// Units whose prompt is being read, under the request that reads it.
    units: HashMap<RequestId, Unit>,
    made: Vec<(Place, Reply)>,
}

impl Worker<'_> {
    fn run(mut self) -> Result<Vec<(Place, Reply)>, GenerateError> {
        let Shared { model, options, units, rows, next, busy, threads, .. } = self.shared;
        let context = options.context.unwrap_or(model.config().max_position_embeddings);
        let mut batcher = Batcher::new(model, BatchSettings::new(*rows, context));
        loop {
            let to_come = |w: &Self| w.units.values().map(|u| u.to - u.from - 1).sum::<usize>();
            while batcher.active() + batcher.waiting() + to_come(&self) < *rows {
                let Some(&unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                let at = Place { prompt: unit.prompt, sample: unit.from };
                let several = unit.to - unit.from > 1;
                let id = self.admit(&mut batcher, at, |request| request.keep.prompt = several)?;
                if several {
                    self.units.insert(id, unit);
                }
            }
            if batcher.is_idle() {
                return Ok(self.made);
            }
            if options.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed)) {
                return Err(GenerateError::Interrupted);
            }
            let threads = *threads / busy.load(Ordering::Relaxed).max(1);
            pool::with_threads(threads, || self.step(&mut batcher))?;
        }
    }

    fn admit(
        &mut self,
        batcher: &mut Batcher,
        at: Place,
        change: impl FnOnce(&mut Request),
    ) -> Result<RequestId, GenerateError> {
        let mut request = self.shared.request(at);
        change(&mut request);
        let id = batcher.admit(request).map_err(|source| GenerateError::Prompt { prompt: at.prompt, source })?;
        let reply = Reply { ids: Vec::new(), log_probs: Vec::new(), ending: Ending::Length };
        self.running.insert(id, Running { at, reply, certain: 0 });
        Ok(id)
    }

    fn step(&mut self, batcher: &mut Batcher) -> Result<(), GenerateError> {
        let repetition = self.shared.options.repetition;
        let mut repeating = Vec::new();
        for event in batcher.step().map_err(GenerateError::Engine)? {
            match event {
                Event::Read { id, prefix } => {
                    let Some(unit) = self.units.remove(&id) else { continue };
                    for sample in unit.from + 1..unit.to {
                        let at = Place { prompt: unit.prompt, sample };
                        self.admit(batcher, at, |request| request.prefix = Some(prefix.clone()))?;
                    }
                }
                Event::Drawn { id, token, .. } => {
                    let Some(running) = self.running.get_mut(&id) else { continue };
                    running.reply.ids.push(token.id);
                    running.reply.log_probs.push(token.log_prob);
                    if let Some(Repetition { count, threshold }) = repetition {
                        let certain = token.log_prob.exp() > threshold;
                        running.certain = if certain { running.certain + 1 } else { 0 };
                        if running.certain >= count.max(1) {
                            repeating.push(id);
                        }
                    }
                }
                Event::Finished { id, finish, .. } => self.end(
                    id,
                    match finish {
                        Finish::End(_) => Ending::End,
                        Finish::Context => Ending::Context,
                        Finish::Length | Finish::Stopped => Ending::Length,
                    },
                ),
                Event::Passed { .. } | Event::Scored { .. } => {} // nothing here asks for them
                Event::Failed { id, error } => {
                    let prompt = self.running.get(&id).map_or(0, |running| running.at.prompt);
                    return Err(GenerateError::Prompt { prompt, source: error });
                }
            }
        }
        // One that ended by itself with that token is no longer there.
        for id in repeating {
            if batcher.cancel(id) {
                self.end(id, Ending::Repetition);
            }
        }
        Ok(())
    }

    fn end(&mut self, id: RequestId, ending: Ending) {
        if let Some(Running { at, mut reply, .. }) = self.running.remove(&id) {
            reply.ending = ending;
            (self.shared.done)(at.prompt, &reply);
            self.made.push((at, reply));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_one_unit_unless_workers_would_stand_idle() {
        let prompts = |n: usize, samples: u64| {
            (0..n).map(|_| Prompt { ids: vec![1], seeds: (0..samples).collect() }).collect::<Vec<_>>()
        };
        assert_eq!(units(&prompts(2, 4), 2).len(), 2);
        let parts = units(&prompts(1, 5), 2);
        assert_eq!(parts, [Unit { prompt: 0, from: 0, to: 3 }, Unit { prompt: 0, from: 3, to: 5 }]);
        assert_eq!(units(&prompts(1, 1), 4).len(), 1);
        assert_eq!(units(&prompts(3, 0), 2), []);
    }
}
