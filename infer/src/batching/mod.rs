//! Many sequences at once, ids in and ids with log-probabilities out: what the server and the rollouts of training run on.
//! Requests wait until a row is free, prompts are read in pieces between the steps of decoding, and whoever has ended
//! makes room within the same step.
//!
//! Different here: a sequence's ids and log-probabilities do not depend on its neighbours, nor on when it came in; on the
//! CPU to the bit, and they are those of a [`crate::Session`] alone. That needs three things beyond a sampler of its own.
//! What the model computes for a token there does not depend on the other rows of a call. Rows that read a piece of their
//! prompt and rows that decode go through the model in two calls, since the two have kernels of their own (and the first
//! would pad the second to the longest piece). And pieces end where they may ([`pieces`]).
//! On a device the shape of a product decides its kernel, so there the last bits may differ.

mod batcher;
pub(crate) mod lanes;
pub(crate) mod pieces;
pub mod prefix_cache;
mod reading;
pub mod scheduler;
#[cfg(test)]
mod tests;

pub use batcher::Batcher;
pub use scheduler::{Job, JobId, Scheduler, SchedulerSettings, Update};

use crate::engine::{EngineError, Finish, PREFILL_CHUNK};
use crate::guide::Guide;
use crate::sampler::{Sampled, Sampler, log_prob, top_log_probs};
use m1_model::Snapshot;
use std::sync::Arc;

/// The limits of a batcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchSettings {
    /// Sequences at once, at least 1; others wait. Each holds a state of its own (280 MiB for M1).
    pub rows: usize,
    /// Tokens of prompts read in one step, about; the steps of decoding wait for no more than that.
    pub prefill_tokens: usize,
    /// The most tokens that a sequence may have.
    pub context: usize,
    /// Bytes for the caches of all sequences, each counted at its longest; `None`: as many as there are.
    pub memory: Option<u64>,
}

impl BatchSettings {
    /// Room for `rows` sequences of at most `context` tokens, with prompts read in pieces of 512 tokens.
    pub fn new(rows: usize, context: usize) -> Self {
        Self { rows, prefill_tokens: PREFILL_CHUNK, context, memory: None }
    }
}

/// A text that has been read: what the model keeps of it, and what it says next. Sequences that begin with the same
/// text share it.
#[derive(Debug, Clone)]
pub struct Prefix {
    /// The cache's row after the text.
    pub snapshot: Snapshot,
    /// Raw logits `[vocab]` of what follows the text; empty where they were not computed, so that at least one more token
    /// has to be read.
    pub logits: Vec<f32>,
}

/// What of a sequence's past is handed out for others to begin from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Keep {
    /// The whole prompt with what follows it, once it has been read ([`Event::Read`]).
    pub prompt: bool,
    /// Beginnings of the prompt, as lengths ([`Event::Passed`]). Those at which reading may not be cut are left out:
    /// what is not a multiple of [`pieces::STRIDE`] tokens, or leaves less than two.
    pub marks: Vec<usize>,
    /// All that was read when the sequence ended ([`Event::Finished`]).
    pub end: bool,
}

impl Prefix {
    /// The text's ids.
    pub fn tokens(&self) -> &[u32] {
        self.snapshot.tokens()
    }
}

/// A prompt to be continued.
#[derive(Debug)]
pub struct Request {
    /// Ids, at least one.
    pub prompt: Vec<u32>,
    /// A beginning of `prompt`, or all of it, that has been read before.
    pub prefix: Option<Arc<Prefix>>,
    /// Draws this sequence's ids.
    pub sampler: Sampler,
    /// Ids that end the sequence.
    pub end_ids: Arc<[u32]>,
    /// The most ids drawn, an end id included; `None`: as the context allows. With 0 the prompt is read and nothing drawn.
    pub max_new: Option<usize>,
    /// What others may begin from.
    pub keep: Keep,
    /// What may be drawn, where not everything is.
    pub guide: Option<Box<dyn Guide>>,
    /// How many of the likeliest ids come with each one that is drawn or scored.
    pub top_log_probs: usize,
    /// Whether the prompt's own tokens are scored ([`Event::Scored`]), but for those that the prefix holds.
    pub score_prompt: bool,
}

impl Request {
    /// A request for one plain sequence from `prompt` on: all of it read here, nothing kept, no guide.
    pub fn new(prompt: Vec<u32>, sampler: Sampler, end_ids: Arc<[u32]>, max_new: Option<usize>) -> Self {
        let keep = Keep::default();
        Self {
            prompt,
            prefix: None,
            sampler,
            end_ids,
            max_new,
            keep,
            guide: None,
            top_log_probs: 0,
            score_prompt: false,
        }
    }

    /// The most tokens that the sequence may come to within `context`.
    pub fn longest(&self, context: usize) -> usize {
        self.prompt.len().saturating_add(self.max_new.unwrap_or(context)).min(context)
    }
}

/// A token with how likely the model found it.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The id.
    pub id: u32,
    /// Its log-probability under the model: log-softmax of the raw logits over the whole vocabulary.
    pub log_prob: f32,
    /// The likeliest ids at its place with theirs, likeliest first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

impl Scored {
    /// Of a drawn id.
    pub fn new(token: &Sampled, top: Vec<(u32, f32)>) -> Self {
        Self { id: token.id, log_prob: token.log_prob, top }
    }

    /// Of `id` under the `logits` `[vocab]` before it, with `top` others.
    fn of(id: u32, logits: &[f32], top: usize) -> Self {
        Self { id, log_prob: log_prob(logits, id), top: top_log_probs(logits, top) }
    }
}

/// Names a request among all of one batcher; later requests have larger ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// What happened to a request in a step.
#[derive(Debug, Clone)]
pub enum Event {
    /// One of the marks of [`Keep`] was passed on the way through the prompt.
    Passed {
        /// By this request.
        id: RequestId,
        /// The beginning of the prompt up to there.
        snapshot: Snapshot,
    },
    /// More of the prompt's tokens, in their order from the second on (nothing is said of the first).
    Scored {
        /// Of this request.
        id: RequestId,
        /// The tokens.
        tokens: Vec<Scored>,
    },
    /// The prompt has been read; only where [`Keep`] asked for it, and before the first id.
    Read {
        /// Of this request.
        id: RequestId,
        /// The whole prompt.
        prefix: Arc<Prefix>,
    },
    /// An id was drawn; also the one that ends the sequence.
    Drawn {
        /// For this request.
        id: RequestId,
        /// The id, with its log-probability under the full softmax.
        token: Sampled,
        /// The likeliest ids at this place, likeliest first, as many as were asked for.
        top: Vec<(u32, f32)>,
    },
    /// Nothing more comes of this request.
    Finished {
        /// This request.
        id: RequestId,
        /// Why; never [`Finish::Stopped`].
        finish: Finish,
        /// What had been read by then, where [`Keep`] asked for it; the last id drawn was not.
        past: Option<Snapshot>,
    },
    /// Nothing can be drawn for this request, and nothing more comes of it; the others go on.
    Failed {
        /// This request.
        id: RequestId,
        /// What is wrong.
        error: EngineError,
    },
}
