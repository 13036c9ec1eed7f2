//! Advantages: how much better a response was than the others to the same prompt.
//!
//! Different here: no epsilon is added to a standard deviation. Equal rewards give exactly 0, whatever rounding says of
//! their deviation, and all others the plain quotient; so a group of 0 and 1 has the advantages that the formula says.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::{LossError, check};

/// Rewards that differ by no more than this are equal.
const EQUAL: f64 = 1e-9;

/// What a reward is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Advantage {
    /// (R - mean of the group) / std of the group (the report's).
    GroupStd,
    /// R - mean of the group.
    GroupMean,
    /// (R - mean of the group) / std of these differences over the whole batch (as ScaleRL, arXiv 2510.13786). Groups
    /// of equal rewards count in the std, as zeros: drop them before, as ScaleRL does, if they should not.
    BatchStd,
}

/// Which standard deviation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Deviation {
    /// Squares are divided by n - 1: PyTorch's `std`, so what verl and TRL do.
    #[default]
    Sample,
    /// Squares are divided by n: NumPy's `std`.
    Population,
}

impl Deviation {
    /// The standard deviation of `values`; 0 for fewer than two.
    fn of(self, values: &[f64]) -> f64 {
        let n = values.len();
        if n < 2 {
            return 0.0;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        (squares / if self == Self::Sample { n - 1 } else { n } as f64).sqrt()
    }
}

/// Whether all rewards are equal: such a group teaches nothing, and dynamic sampling drops it. True for one reward or
/// none.
pub fn is_uniform(rewards: &[f64]) -> bool {
    let high = rewards.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let low = rewards.iter().copied().fold(f64::INFINITY, f64::min);
    high - low <= EQUAL
}

/// One advantage for each reward. `groups[i]` names the group (the prompt) of response i: any numbers, in any order.
///
/// Groups of equal rewards and groups of one get zeros.
///
/// # Errors
/// Lists of different lengths, a reward that is not finite.
pub fn advantages(rewards: &[f64], groups: &[usize], kind: Advantage, std: Deviation) -> Result<Vec<f64>, LossError> {
    check("rewards", rewards, groups.len())?;
    let mut members: HashMap<usize, Vec<usize>> = HashMap::new();
    for (i, &group) in groups.iter().enumerate() {
        members.entry(group).or_default().push(i);
    }
    let mut advantages = vec![0.0; rewards.len()];
    for indices in members.values() {
        let own: Vec<f64> = indices.iter().map(|&i| rewards[i]).collect();
        if is_uniform(&own) {
            continue;
        }
        let mean = own.iter().sum::<f64>() / own.len() as f64;
        let scale = if kind == Advantage::GroupStd { std.of(&own) } else { 1.0 };
        for (&i, reward) in indices.iter().zip(own) {
            advantages[i] = (reward - mean) / scale;
        }
    }
    if kind == Advantage::BatchStd && !is_uniform(&advantages) {
        let scale = std.of(&advantages);
        advantages.iter_mut().for_each(|a| *a /= scale);
    }
    Ok(advantages)
}
