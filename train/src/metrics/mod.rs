//! What a run says about itself: one JSON line per step, in `metrics.jsonl`.
//!
//! ```text
//! RUN/metrics.jsonl              a row a step: [`StepMetrics`] in pretraining, [`RlMetrics`] in RL
//! RUN/samples.jsonl              prompts and responses with their rewards: [`SampleRecord`]
//! RUN/events.out.tfevents.*      the same numbers for TensorBoard: [`EventWriter`]
//! ```
//! Different here: a resumed run first cuts the files back to the step it resumes from, so that they read as if the run
//! had never been interrupted (a killed process leaves steps, or half a line, that will be done again).

mod log;
mod rl;
mod samples;
mod tensorboard;

use serde::{Deserialize, Serialize};

pub use log::{MetricsLog, Row, read};
pub use rl::RlMetrics;
pub use samples::{RESPONSES_PER_STEP, Response, SampleLog, SampleRecord};
pub use tensorboard::EventWriter;

/// One optimizer step of pretraining.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens read since the run began (the assistant's and the others').
    pub tokens: u64,
    /// Mean cross-entropy of the assistant's tokens of this step, in nats.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// The router's auxiliary loss, coefficient included.
    #[serde(deserialize_with = "number")]
    pub aux_loss: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Norm of the gradient over all parameters, before clipping.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    /// Tokens per second of this step.
    pub tokens_per_s: f64,
    /// Seconds of training since the run began, without the time between a stop and a resumption.
    pub elapsed_s: f64,
    /// The most used expert's share of the tokens over its fair share, worst layer: 1 is even, experts / top-k the
    /// worst.
    pub expert_load_max: f64,
    /// The least used expert's share over its fair share, worst layer: 0 is an expert that no token went to.
    pub expert_load_min: f64,
}

impl Row for StepMetrics {
    fn step(&self) -> u64 {
        self.step
    }
}

/// A number that JSON may lack: NaN and the infinities are written as null, and null is read as NaN.
fn number<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// What a line of an older version does not say.
fn nan() -> f64 {
    f64::NAN
}
