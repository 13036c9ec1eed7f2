//! The engine's thread: it alone touches the model. Jobs come in over a channel, what happens to them goes out over one
//! channel each; a job whose receiver is gone is cancelled before the next step.

use crate::engine::{EngineError, Finish};
use crate::guide::Guide;
use crate::sampler::{Sampled, Sampler};
use std::sync::Arc;

/// One of the `n` answers that a job asks for.
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
    /// How many of the likeliest ids come with each drawn one.
    pub top_log_probs: usize,
}

/// What happens to a job.
#[derive(Debug, Clone)]
pub enum Update {
    /// The prompt has been read.
    Read {
        /// Tokens of it that were in the cache.
        cached: usize,
    },
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
