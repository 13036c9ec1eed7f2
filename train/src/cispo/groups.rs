//! The responses to one problem with their rewards, and what the groups of a batch say together.

use std::collections::BTreeMap;

use m1_infer::statistics::deviation;

use crate::generate::Ending;
use crate::loss::is_uniform;
use crate::metrics::{Response, RlMetrics, SampleRecord};
use crate::reward::Reward;
use crate::rollout::Rollout;
use crate::tasks::Problem;

/// A problem, the responses to it and what each earned.
#[derive(Debug, Clone)]
pub struct Group {
    /// What was asked.
    pub problem: Problem,
    /// The responses.
    pub rollouts: Vec<Rollout>,
    /// Their texts.
    pub texts: Vec<String>,
    /// Their rewards.
    pub rewards: Vec<Reward>,
    /// Whether it is learned from.
    pub kept: bool,
}

impl Group {
    /// What the advantages are made from.
    pub fn totals(&self) -> Vec<f64> {
        self.rewards.iter().map(|reward| reward.total).collect()
    }

    /// Whether all responses earned the same, so that none is better than another.
    pub fn is_uniform(&self) -> bool {
        is_uniform(&self.totals())
    }

    /// Share of the responses that are right.
    pub fn pass_rate(&self) -> f64 {
        self.rewards.iter().map(|reward| reward.correct).sum::<f64>() / self.rewards.len().max(1) as f64
    }

    /// As a record of `samples.jsonl`.
    pub fn record(&self, step: u64) -> SampleRecord {
        let responses = self.rollouts.iter().zip(&self.texts).zip(&self.rewards);
        let response = |((rollout, text), reward): ((&Rollout, &String), &Reward)| Response {
            text: text.clone(),
            reward: reward.total,
            correct: reward.correct > 0.0,
            finish: match rollout.ending {
                Ending::End => "stop",
                Ending::Length | Ending::Context => "length",
                Ending::Repetition => "repetition",
            }
            .into(),
            tokens: rollout.response.len() as u64,
        };
        SampleRecord {
            step,
            task: self.problem.task.into(),
            difficulty: self.problem.difficulty.into(),
            prompt: self.problem.question.clone(),
            responses: responses.map(response).collect(),
            answer: self.problem.answer.clone(),
        }
    }
}

/// Writes what all sampled groups say into a step's metrics; nothing without groups.
pub fn describe(groups: &[Group], metrics: &mut RlMetrics) {
    let rewards = || groups.iter().flat_map(|group| &group.rewards);
    let rollouts = || groups.iter().flat_map(|group| &group.rollouts);
    let count = rewards().count();
    if count == 0 {
        return;
    }
    let mean = |sum: f64| sum / count as f64;
    let share = |of: &[Ending]| mean(rollouts().filter(|r| of.contains(&r.ending)).count() as f64);
    metrics.reward = mean(rewards().map(|r| r.total).sum());
    metrics.correctness = mean(rewards().map(|r| r.correct).sum());
    metrics.format = mean(rewards().map(|r| r.format).sum());
    metrics.pass_rate = metrics.correctness;
    metrics.reward_std = groups.iter().map(|group| deviation(&group.totals())).sum::<f64>() / groups.len() as f64;
    let uniform = groups.iter().filter(|group| group.is_uniform()).count();
    metrics.frac_reward_zero_std = uniform as f64 / groups.len() as f64;
    metrics.groups = groups.iter().filter(|group| group.kept).count() as u64;
    metrics.groups_dropped = groups.len() as u64 - metrics.groups;

    let lengths = || rollouts().map(|rollout| rollout.response.len());
    metrics.response_length_mean = mean(lengths().sum::<usize>() as f64);
    metrics.response_length_max = lengths().max().unwrap_or(0) as f64;
    metrics.response_length_clipped = share(&[Ending::Length, Ending::Context]);
    metrics.repetition_stopped = share(&[Ending::Repetition]);
    metrics.truncated = share(&[Ending::Length, Ending::Context, Ending::Repetition]);

    let mut by_task: BTreeMap<&str, (f64, f64, f64)> = BTreeMap::new();
    for group in groups {
        let (passed, difficulty, n) = by_task.entry(group.problem.task).or_default();
        *passed += group.pass_rate();
        *difficulty += f64::from(group.problem.difficulty);
        *n += 1.0;
    }
    for (task, (passed, difficulty, n)) in by_task {
        metrics.pass_rate_by_task.insert(task.into(), passed / n);
        metrics.difficulty_by_task.insert(task.into(), difficulty / n);
    }
}

/// `e` to the mean of `-log π` over all tokens drawn, under the policy that drew them; NaN without tokens.
pub fn perplexity(groups: &[Group]) -> f64 {
    let log_probs = || groups.iter().flat_map(|g| &g.rollouts).flat_map(|r| &r.log_probs);
    (-log_probs().map(|&l| f64::from(l)).sum::<f64>() / log_probs().count() as f64).exp()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks;

    fn group(difficulty: u8, correct: &[f64], endings: &[Ending]) -> Group {
        let rollout = |(sample, &ending): (usize, &Ending)| Rollout {
            problem: 0,
            sample,
            seed: 0,
            prompt: vec![1],
            response: vec![2; sample + 1],
            log_probs: vec![-0.5; sample + 1],
            ending,
        };
        let reward = |&correct: &f64| Reward { total: correct, correct, format: 1.0, overlong: 0.0 };
        Group {
            problem: tasks::by_name("clock").unwrap().generate(1, 1, difficulty),
            rollouts: endings.iter().enumerate().map(rollout).collect(),
            texts: vec![String::new(); endings.len()],
            rewards: correct.iter().map(reward).collect(),
            kept: true,
        }
    }

    #[test]
    fn a_batch_in_numbers() {
        let mut none = RlMetrics::default();
        describe(&[], &mut none);
        assert!(none.reward.is_nan());

        let mut mixed =
            group(2, &[1.0, 0.0, 0.0, 0.0], &[Ending::End, Ending::Length, Ending::Repetition, Ending::End]);
        let solved = Group { kept: false, ..group(4, &[1.0; 4], &[Ending::End; 4]) };
        let mut m = RlMetrics::default();
        describe(&[mixed.clone(), solved], &mut m);
        assert_eq!((m.reward, m.pass_rate, m.format), (0.625, 0.625, 1.0));
        assert_eq!((m.reward_std, m.frac_reward_zero_std), (0.25, 0.5)); // 0.5 and 0
        assert_eq!((m.groups, m.groups_dropped), (1, 1));
        assert_eq!((m.response_length_mean, m.response_length_max), (2.5, 4.0));
        assert_eq!((m.response_length_clipped, m.repetition_stopped, m.truncated), (0.125, 0.125, 0.25));
        assert_eq!((m.pass_rate_by_task["clock"], m.difficulty_by_task["clock"]), (0.625, 3.0));
        assert!((perplexity(&[mixed.clone()]) - 0.5f64.exp()).abs() < 1e-12 && perplexity(&[]).is_nan());

        mixed.texts[2] = "and so on".into();
        let record = mixed.record(7);
        assert_eq!((record.step, record.task.as_str(), record.responses.len()), (7, "clock", 4));
        let third = &record.responses[2];
        assert_eq!((third.text.as_str(), third.finish.as_str(), third.tokens), ("and so on", "repetition", 3));
    }
}
