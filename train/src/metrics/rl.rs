//! One step of reinforcement learning: the names that people know from other trainers, flat, for any tool to plot.
//!
//! A line of an older version may lack a number and a diverged step may have none: both are read as NaN.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::{Row, nan, number};

/// One step: a batch of rollouts and the updates made from it. Fractions are from 0 to 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RlMetrics {
    /// Steps done, this one included: batches of rollouts, each with `staleness` updates.
    pub step: u64,
    /// Tokens sampled since the run began.
    #[serde(default)]
    pub tokens: u64,
    /// Mean reward over the responses of this step, penalties included.
    #[serde(default = "nan", deserialize_with = "number")]
    pub reward: f64,
    /// Standard deviation of the reward within a group, mean over the groups.
    #[serde(default = "nan", deserialize_with = "number")]
    pub reward_std: f64,
    /// Fraction of the groups sampled whose rewards are all equal: they teach nothing.
    #[serde(default = "nan", deserialize_with = "number")]
    pub frac_reward_zero_std: f64,
    /// Mean of the reward's part that the verifier gives.
    #[serde(default = "nan", deserialize_with = "number")]
    pub correctness: f64,
    /// Mean of the reward's part that the format gives.
    #[serde(default = "nan", deserialize_with = "number")]
    pub format: f64,
    /// Fraction of the responses that the verifier accepts, on the training problems.
    #[serde(default = "nan", deserialize_with = "number")]
    pub pass_rate: f64,
    /// The same per task.
    #[serde(default, deserialize_with = "numbers")]
    pub pass_rate_by_task: BTreeMap<String, f64>,
    /// Difficulty that problems of each task are drawn at, mean.
    #[serde(default, deserialize_with = "numbers")]
    pub difficulty_by_task: BTreeMap<String, f64>,
    /// Fraction solved of the held-out problems; only on steps with an evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_pass_rate: Option<f64>,
    /// The same per task; empty on steps without an evaluation.
    #[serde(default, deserialize_with = "numbers", skip_serializing_if = "BTreeMap::is_empty")]
    pub eval_pass_rate_by_task: BTreeMap<String, f64>,
    /// Mean entropy of the policy at the tokens trained on, in nats.
    #[serde(default = "nan", deserialize_with = "number")]
    pub entropy: f64,
    /// Smallest importance ratio π/π_old of a token, before clipping.
    #[serde(default = "nan", deserialize_with = "number")]
    pub ratio_min: f64,
    /// Mean of the ratio; 1 on policy.
    #[serde(default = "nan", deserialize_with = "number")]
    pub ratio_mean: f64,
    /// Largest ratio.
    #[serde(default = "nan", deserialize_with = "number")]
    pub ratio_max: f64,
    /// Fraction of the tokens with an advantage above 0 that are clipped.
    #[serde(default = "nan", deserialize_with = "number")]
    pub clip_frac_pos: f64,
    /// Fraction of the tokens with an advantage below 0 that are clipped.
    #[serde(default = "nan", deserialize_with = "number")]
    pub clip_frac_neg: f64,
    /// Estimate of KL(π_old ‖ π) per token, mean of r − 1 − ln r, in nats.
    #[serde(default = "nan", deserialize_with = "number")]
    pub approx_kl: f64,
    /// The policy's loss, mean over the updates of this step.
    #[serde(default = "nan", deserialize_with = "number")]
    pub loss: f64,
    /// The router's auxiliary loss, coefficient included.
    #[serde(default = "nan", deserialize_with = "number")]
    pub aux_loss: f64,
    /// Norm of the gradient over all parameters before clipping, mean over the updates.
    #[serde(default = "nan", deserialize_with = "number")]
    pub grad_norm: f64,
    /// Learning rate of the last update.
    #[serde(default = "nan", deserialize_with = "number")]
    pub lr: f64,
    /// Tokens of a response, mean.
    #[serde(default = "nan", deserialize_with = "number")]
    pub response_length_mean: f64,
    /// Tokens of the longest response.
    #[serde(default = "nan", deserialize_with = "number")]
    pub response_length_max: f64,
    /// Fraction of the responses that were cut at the length window.
    #[serde(default = "nan", deserialize_with = "number")]
    pub response_length_clipped: f64,
    /// Fraction of the responses that did not end by themselves, whatever cut them.
    #[serde(default = "nan", deserialize_with = "number")]
    pub truncated: f64,
    /// Fraction of the responses stopped early because they repeated themselves.
    #[serde(default = "nan", deserialize_with = "number")]
    pub repetition_stopped: f64,
    /// Longest response allowed at this step, in tokens.
    #[serde(default)]
    pub length_window: u64,
    /// Difference between a sampled token's probability at generation and at training, absolute, mean.
    #[serde(default = "nan", deserialize_with = "number")]
    pub rollout_train_prob_diff_mean: f64,
    /// The largest such difference.
    #[serde(default = "nan", deserialize_with = "number")]
    pub rollout_train_prob_diff_max: f64,
    /// Pearson correlation of the two probabilities (report §3.2: 0.987 before the fix, 0.997 after).
    #[serde(default = "nan", deserialize_with = "number")]
    pub rollout_train_prob_corr: f64,
    /// Groups trained on.
    #[serde(default)]
    pub groups: u64,
    /// Groups dropped because their rewards are all equal.
    #[serde(default)]
    pub groups_dropped: u64,
    /// Further rounds of sampling that dynamic sampling needed to fill the batch.
    #[serde(default)]
    pub refills: u64,
    /// Updates left out because loss or gradient was not finite.
    #[serde(default)]
    pub skipped_updates: u64,
    /// Updates made from this batch of rollouts: the last is that many steps off policy, less one.
    #[serde(default = "nan", deserialize_with = "number")]
    pub staleness: f64,
    /// The least used expert's share over its fair share, worst layer: 0 is an expert that no token went to.
    #[serde(default = "nan", deserialize_with = "number")]
    pub expert_load_min: f64,
    /// The most used expert's share over its fair share, worst layer: 1 is even.
    #[serde(default = "nan", deserialize_with = "number")]
    pub expert_load_max: f64,
    /// Tokens sampled per second of the rollout phase.
    #[serde(default = "nan", deserialize_with = "number")]
    pub rollout_tokens_per_s: f64,
    /// Tokens trained on per second of the train phase, all updates together.
    #[serde(default = "nan", deserialize_with = "number")]
    pub train_tokens_per_s: f64,
    /// Seconds of sampling.
    #[serde(default = "nan", deserialize_with = "number")]
    pub rollout_s: f64,
    /// Seconds of verifying and scoring.
    #[serde(default = "nan", deserialize_with = "number")]
    pub reward_s: f64,
    /// Seconds of the updates.
    #[serde(default = "nan", deserialize_with = "number")]
    pub train_s: f64,
    /// Seconds of the held-out evaluation; 0 without one.
    #[serde(default = "nan", deserialize_with = "number")]
    pub eval_s: f64,
    /// Seconds of writing a checkpoint; 0 without one.
    #[serde(default = "nan", deserialize_with = "number")]
    pub checkpoint_s: f64,
    /// Seconds since the run began, without the time between a stop and a resumption.
    #[serde(default = "nan", deserialize_with = "number")]
    pub elapsed_s: f64,
}

impl Row for RlMetrics {
    fn step(&self) -> u64 {
        self.step
    }
}

/// Step 0, counts 0, and NaN for every measure: what is not measured reads as such.
impl Default for RlMetrics {
    fn default() -> Self {
        Self {
            step: 0,
            tokens: 0,
            reward: f64::NAN,
            reward_std: f64::NAN,
            frac_reward_zero_std: f64::NAN,
            correctness: f64::NAN,
            format: f64::NAN,
            pass_rate: f64::NAN,
            pass_rate_by_task: BTreeMap::new(),
            difficulty_by_task: BTreeMap::new(),
            eval_pass_rate: None,
            eval_pass_rate_by_task: BTreeMap::new(),
            entropy: f64::NAN,
            ratio_min: f64::NAN,
            ratio_mean: f64::NAN,
            ratio_max: f64::NAN,
            clip_frac_pos: f64::NAN,
            clip_frac_neg: f64::NAN,
            approx_kl: f64::NAN,
            loss: f64::NAN,
            aux_loss: f64::NAN,
            grad_norm: f64::NAN,
            lr: f64::NAN,
            response_length_mean: f64::NAN,
            response_length_max: f64::NAN,
            response_length_clipped: f64::NAN,
            truncated: f64::NAN,
            repetition_stopped: f64::NAN,
            length_window: 0,
            rollout_train_prob_diff_mean: f64::NAN,
            rollout_train_prob_diff_max: f64::NAN,
            rollout_train_prob_corr: f64::NAN,
            groups: 0,
            groups_dropped: 0,
            refills: 0,
            skipped_updates: 0,
            staleness: f64::NAN,
            expert_load_min: f64::NAN,
            expert_load_max: f64::NAN,
            rollout_tokens_per_s: f64::NAN,
            train_tokens_per_s: f64::NAN,
            rollout_s: f64::NAN,
            reward_s: f64::NAN,
            train_s: f64::NAN,
            eval_s: f64::NAN,
            checkpoint_s: f64::NAN,
            elapsed_s: f64::NAN,
        }
    }
}

/// A map of [`number`]s.
fn numbers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let all = BTreeMap::<String, Option<f64>>::deserialize(deserializer)?;
    Ok(all.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_comes_back_as_it_was() {
        let row = RlMetrics {
            step: 7,
            tokens: 1 << 40,
            reward: 0.1 + 0.2,
            ratio_max: 4.75,
            pass_rate_by_task: [("addition".to_owned(), 0.5), ("clock".to_owned(), 1.0 / 3.0)].into(),
            eval_pass_rate: Some(0.25),
            eval_pass_rate_by_task: [("addition".to_owned(), 0.25)].into(),
            ..RlMetrics::default()
        };
        let text = serde_json::to_string(&row).unwrap();
        let back: RlMetrics = serde_json::from_str(&text).unwrap();
        // NaN is not equal to itself, so the comparison is one of texts, and of one field as it is.
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
        assert_eq!(back.reward, row.reward);
        assert_eq!(back.pass_rate_by_task, row.pass_rate_by_task);
        assert_eq!(back.eval_pass_rate, Some(0.25));
        assert!(!text.contains('\n'));
    }

    #[test]
    fn what_is_not_finite_or_not_there_reads_as_nan() {
        let row = RlMetrics {
            loss: f64::NAN,
            grad_norm: f64::INFINITY,
            ratio_max: f64::NEG_INFINITY,
            pass_rate_by_task: [("clock".to_owned(), f64::NAN)].into(),
            ..RlMetrics::default()
        };
        let text = serde_json::to_string(&row).unwrap();
        assert!(text.contains("\"loss\":null") && text.contains("\"clock\":null"), "{text}");
        assert!(!text.contains("eval_pass_rate"), "absent without an evaluation: {text}");
        let back: RlMetrics = serde_json::from_str(&text).unwrap();
        assert!(back.loss.is_nan() && back.grad_norm.is_nan() && back.ratio_max.is_nan());
        assert!(back.pass_rate_by_task["clock"].is_nan());

        let old: RlMetrics = serde_json::from_str("{\"step\":3,\"reward\":0.5,\"of_a_later_version\":1}").unwrap();
        assert_eq!((old.step, old.reward, old.refills), (3, 0.5, 0));
        assert!(old.entropy.is_nan());
        assert!(serde_json::from_str::<RlMetrics>("{\"reward\":0.5}").is_err(), "a row has a step");
    }
}
