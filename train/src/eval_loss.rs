//! The loss on a fixed set of examples, for watching a run: no gradients, nothing drawn.

use m1_model::model::M1;
use m1_model::trace::Trace;

use crate::data::Example;
use crate::trainer::{TrainError, cross_entropy_sum, in_parallel, split, targets, workers};

/// Examples to measure by and when to do it.
pub struct EvalSet {
    examples: Vec<Example>,
    /// Steps between measurements.
    pub every: u64,
    micro_tokens: usize,
    pools: Vec<rayon::ThreadPool>,
}

impl EvalSet {
    /// A set that is worked through in parts of about `micro_tokens` tokens, `threads` of them at once.
    ///
    /// # Errors
    /// No token to predict, or threads that do not start.
    pub fn new(examples: Vec<Example>, every: u64, micro_tokens: usize, threads: usize) -> Result<Self, TrainError> {
        if examples.iter().all(|example| targets(example) == 0) {
            return Err(TrainError::NothingToLearn { step: 0, examples: examples.len() });
        }
        Ok(Self { examples, every: every.max(1), micro_tokens, pools: workers(threads)? })
    }

    /// Mean cross-entropy of the tokens to be predicted, in nats. The same for any number of threads.
    pub fn loss(&self, model: &M1) -> f64 {
        let examples: Vec<&Example> = self.examples.iter().filter(|example| targets(example) > 0).collect();
        let lengths: Vec<usize> = examples.iter().map(|example| example.ids.len()).collect();
        let parts = split(&lengths, self.micro_tokens);
        let sums = in_parallel(&self.pools, parts.len(), |i| {
            let part: Vec<&Example> = parts[i].iter().map(|&at| examples[at]).collect();
            f64::from(cross_entropy_sum(model, &part, &mut Trace::none()).into_scalar::<f32>())
        });
        sums.into_iter().sum::<f64>() / self.examples.iter().map(targets).sum::<usize>() as f64
    }
}
