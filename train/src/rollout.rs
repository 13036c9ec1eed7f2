//! Rollouts: several responses to each problem, drawn from the model as it stands, with the probability of every token.
//!
//! Different here: a rollout is named by (run seed, step, problem, sample) and depends on nothing else, whatever the rows of
//! the batch and the workers, so that a resumed run draws what the first would have drawn. Generation and training are one
//! forward, and the recorded probabilities are what the training forward finds, to rounding
//! ([`crate::mismatch`]).

use m1_infer::sampler::SamplingOptions;
use m1_model::model::M1;
use serde::{Deserialize, Serialize};

use crate::generate::{Ending, GenerateError, GenerateOptions, Prompt, Reply, generate};

/// A problem to respond to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// The problem's number in the run's data; it goes into the seeds.
    pub problem: u64,
    /// The prompt's ids, at least one.
    pub prompt: Vec<u32>,
}

/// One response. The end id is an action like the others, so it is part of the response where it was drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// The problem's number.
    pub problem: u64,
    /// The response's number in its group, from 0.
    pub sample: usize,
    /// Seed of its draws.
    pub seed: u64,
    /// Ids of the prompt.
    pub prompt: Vec<u32>,
    /// Ids of the response, with the end id if it was drawn.
    pub response: Vec<u32>,
    /// log π of each id of the response when it was drawn: full softmax, temperature 1.
    pub log_probs: Vec<f32>,
    /// Why it ended.
    pub ending: Ending,
}

impl Rollout {
    /// The response without the end id: what a verifier reads.
    pub fn text(&self) -> &[u32] {
        &self.response[..self.response.len() - usize::from(self.ending == Ending::End)]
    }
}

/// The sampling of rollouts unless something else is asked for: the model's own distribution.
pub fn plain_sampling() -> SamplingOptions {
    SamplingOptions { top_p: 1.0, ..SamplingOptions::default() }
}

/// What to tell whoever draws rollouts from another distribution than the model's own; `None` for [`plain_sampling`].
pub fn bias_warning(sampling: &SamplingOptions) -> Option<String> {
    let plain = plain_sampling();
    let mut changed = Vec::new();
    let mut differs = |name: &str, value: f32, plain: f32| {
        if value != plain {
            changed.push(format!("{name} {value} instead of {plain}"));
        }
    };
    differs("temperature", sampling.temperature, plain.temperature);
    differs("top_k", sampling.top_k as f32, plain.top_k as f32);
    differs("top_p", sampling.top_p, plain.top_p);
    differs("min_p", sampling.min_p, plain.min_p);
    differs("repetition_penalty", sampling.repetition_penalty, plain.repetition_penalty);
    differs("presence_penalty", sampling.presence_penalty, plain.presence_penalty);
    differs("frequency_penalty", sampling.frequency_penalty, plain.frequency_penalty);
    differs("ids with a logit_bias", sampling.logit_bias.len() as f32, 0.0);
    (!changed.is_empty()).then(|| {
        format!(
            "rollouts are drawn with {}, but their recorded log-probabilities are those of the full softmax at \
             temperature 1: the importance ratio is biased",
            changed.join(", ")
        )
    })
}

/// The seed of one rollout: its four numbers, mixed one after the other by the finaliser of SplitMix64 (Steele et al.,
/// OOPSLA 2014), so that neighbours share nothing.
pub fn seed(run: u64, step: u64, problem: u64, sample: usize) -> u64 {
    mix([step, problem, sample as u64].into_iter().fold(run, |state, part| mix(state).wrapping_add(part)))
}

fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Which rollouts: their part of the seeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draws {
    /// The run's seed.
    pub run_seed: u64,
    /// The step, from 0.
    pub step: u64,
    /// Responses to each problem (G).
    pub samples: usize,
}

/// `draws.samples` responses to each of `asks`, in their order. Each of `pools` gets a worker; none is right for a GPU.
/// `done` is called as each response ends.
///
/// # Errors
/// As [`generate`].
pub fn rollouts(
    model: &M1,
    asks: &[Ask],
    draws: Draws,
    options: &GenerateOptions,
    pools: &[rayon::ThreadPool],
    done: &(dyn Fn(usize, &Reply) + Sync),
) -> Result<Vec<Vec<Rollout>>, GenerateError> {
    let seed = |problem, sample| seed(draws.run_seed, draws.step, problem, sample);
    let prompts: Vec<Prompt> = asks
        .iter()
        .map(|ask| Prompt {
            ids: ask.prompt.clone(),
            seeds: (0..draws.samples).map(|sample| seed(ask.problem, sample)).collect(),
        })
        .collect();
    let groups = generate(model, &prompts, options, pools, done)?;
    let rollout = |ask: &Ask, (sample, reply): (usize, Reply)| Rollout {
        problem: ask.problem,
        sample,
        seed: seed(ask.problem, sample),
        prompt: ask.prompt.clone(),
        response: reply.ids,
        log_probs: reply.log_probs,
        ending: reply.ending,
    };
    let group = |(ask, replies): (&Ask, Vec<Reply>)| {
        replies.into_iter().enumerate().map(|reply| rollout(ask, reply)).collect::<Vec<_>>()
    };
    Ok(asks.iter().zip(groups).map(group).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn seeds_of_different_rollouts_differ() {
        let mut seen = HashSet::new();
        for run in 0..4 {
            for step in 0..8 {
                for problem in 0..16 {
                    for sample in 0..16 {
                        assert!(seen.insert(seed(run, step, problem, sample)));
                    }
                }
            }
        }
        // The numbers are not interchangeable, and a seed stays what it is: recorded runs depend on it.
        assert_ne!(seed(1, 2, 3, 4), seed(2, 1, 3, 4));
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn the_warning_names_what_differs() {
        assert_eq!(bias_warning(&plain_sampling()), None);
        let warning = bias_warning(&SamplingOptions { top_p: 0.95, temperature: 0.8, ..plain_sampling() }).unwrap();
        assert!(warning.contains("temperature 0.8 instead of 1, top_p 0.95 instead of 1,"), "{warning}");
        assert!(!warning.contains("top_k") && warning.contains("biased"));
        assert!(bias_warning(&SamplingOptions { repetition_penalty: 1.1, ..plain_sampling() }).is_some());
        // A seed is no bias.
        assert_eq!(bias_warning(&SamplingOptions { seed: Some(3), ..plain_sampling() }), None);
    }

    #[test]
    fn a_rollout_survives_json_to_the_bit() {
        let rollout = Rollout {
            problem: 7,
            sample: 1,
            seed: u64::MAX,
            prompt: vec![1, 2],
            response: vec![3, 4],
            log_probs: vec![-1.234_567_9e-7, -0.1],
            ending: Ending::End,
        };
        let text = serde_json::to_string(&rollout).unwrap();
        assert!(text.contains(r#""ending":"end""#), "{text}");
        assert_eq!(serde_json::from_str::<Rollout>(&text).unwrap(), rollout);
        assert_eq!(rollout.text(), [3]);
        assert_eq!(Rollout { ending: Ending::Length, ..rollout }.text(), [3, 4]);
    }
}
