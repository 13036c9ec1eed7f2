//! From the groups of a batch to mini-batches, and from a mini-batch to the parts that are worked on side by side.

use m1_model::batch::Batch;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::groups::Group;
use crate::loss::{LossError, Objective, advantages, per_token, scales};
use crate::trainer::split;

/// A part of a mini-batch: the batch that the model reads, and for every token of a response, row after row, what the loss
/// needs.
#[derive(Debug, Clone)]
pub struct Part {
    /// Prompts with their responses; gives the hidden state before each token of a response.
    pub batch: Batch,
    /// The responses' tokens.
    pub next: Vec<u32>,
    /// log π of each when it was drawn.
    pub generation: Vec<f32>,
    /// Advantage of each.
    pub advantages: Vec<f32>,
    /// Scale of each.
    pub scales: Vec<f32>,
}

/// The mini-batches of a batch, as parts of about `micro_tokens` tokens: `groups_each` groups an update, in an order that
/// `seed` draws. Advantages are made over the whole batch, scales over each mini-batch.
///
/// # Errors
/// A reward that is no finite number.
pub fn mini_batches(
    groups: &[&Group],
    objective: &Objective,
    groups_each: usize,
    micro_tokens: usize,
    seed: u64,
) -> Result<Vec<Vec<Part>>, LossError> {
    let rewards: Vec<f64> = groups.iter().flat_map(|group| group.totals()).collect();
    let ids: Vec<usize> = groups.iter().enumerate().flat_map(|(i, g)| vec![i; g.rollouts.len()]).collect();
    let advantages = advantages(&rewards, &ids, objective.advantage, objective.std)?;
    let mut starts = Vec::with_capacity(groups.len());
    let mut start = 0;
    for group in groups {
        starts.push(start);
        start += group.rollouts.len();
    }
    let mut order: Vec<usize> = (0..groups.len()).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    order
        .chunks(groups_each.max(1))
        .map(|chosen| {
            let responses: Vec<_> = chosen
                .iter()
                .flat_map(|&g| groups[g].rollouts.iter().zip(starts[g]..).map(move |(r, i)| (g, i, r)))
                .collect();
            let lengths: Vec<usize> = responses.iter().map(|(_, _, r)| r.response.len()).collect();
            let of_group: Vec<usize> = responses.iter().map(|(g, _, _)| *g).collect();
            let scales = scales(objective.aggregation, &lengths, &of_group)?;
            let texts: Vec<usize> = responses.iter().map(|(_, _, r)| r.prompt.len() + r.response.len()).collect();
            let parts = split(&texts, micro_tokens).into_iter().map(|rows| {
                let (mut ids, mut offsets) = (Vec::new(), Vec::new());
                let (mut next, mut generation) = (Vec::new(), Vec::new());
                for (_, _, r) in rows.iter().map(|&i| responses[i]) {
                    let (prompt, all) = (r.prompt.len(), r.prompt.len() + r.response.len());
                    // The last token predicts nothing here, so it is not read at all.
                    let mut text = r.prompt.clone();
                    text.extend(&r.response);
                    text.pop();
                    ids.push(text);
                    offsets.push((prompt - 1..all - 1).collect());
                    next.extend(&r.response);
                    generation.extend(&r.log_probs);
                }
                let lengths: Vec<usize> = rows.iter().map(|&i| lengths[i]).collect();
                let of = |values: &dyn Fn(usize) -> f64| {
                    per_token(&rows.iter().map(|&i| values(i)).collect::<Vec<_>>(), &lengths)
                };
                Ok(Part {
                    batch: Batch::new(ids).at(offsets),
                    next,
                    generation,
                    advantages: of(&|i| advantages[responses[i].1])?,
                    scales: of(&|i| scales[i])?,
                })
            });
            parts.collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::Ending;
    use crate::loss::{Algorithm, LossSettings};
    use crate::reward::Reward;
    use crate::rollout::Rollout;
    use crate::tasks;

    fn group(problem: u64, lengths: &[usize], rewards: &[f64]) -> Group {
        let rollout = |(sample, &n): (usize, &usize)| Rollout {
            problem,
            sample,
            seed: 0,
            prompt: vec![1, 2, 3],
            response: (0..n as u32).map(|i| 100 * problem as u32 + 10 * sample as u32 + i).collect(),
            log_probs: vec![-0.25; n],
            ending: Ending::End,
        };
        Group {
            problem: tasks::by_name("clock").unwrap().generate(1, problem, 2),
            rollouts: lengths.iter().enumerate().map(rollout).collect(),
            texts: vec![String::new(); lengths.len()],
            rewards: rewards.iter().map(|&total| Reward { total, ..Reward::default() }).collect(),
            kept: true,
        }
    }

    #[test]
    fn every_token_is_in_one_part_with_what_belongs_to_it() {
        let all = [group(1, &[2, 4], &[1.0, 0.0]), group(2, &[1, 1], &[0.0, 1.0]), group(3, &[3, 5], &[0.5, 0.5])];
        let groups: Vec<&Group> = all.iter().collect();
        let objective = LossSettings::from(Algorithm::Cispo).objective().unwrap();
        let minis = mini_batches(&groups, &objective, 2, 8, 5).unwrap();
        assert_eq!(minis.len(), 2);
        let mut seen = Vec::new();
        for mini in &minis {
            for part in mini {
                let n = part.next.len();
                assert_eq!([part.generation.len(), part.advantages.len(), part.scales.len()], [n; 3]);
                // One row: a prompt of 3, and all of the response but its last token.
                let tokens: usize = part.batch.rows().iter().map(|row| row.len() - 2).sum();
                assert_eq!(tokens, n);
                seen.extend(part.next.iter().copied().zip(part.advantages.iter().copied()));
            }
            // group_tokens: a group's scales add up to 1 / groups.
            let total: f32 = mini.iter().flat_map(|part| &part.scales).sum();
            assert!((total - 1.0).abs() < 1e-6);
        }
        seen.sort_by_key(|(token, _)| *token);
        let tokens: Vec<u32> = seen.iter().map(|(token, _)| *token).collect();
        assert_eq!(tokens, [100, 101, 110, 111, 112, 113, 200, 210, 300, 301, 302, 310, 311, 312, 313, 314]);
        let half = std::f32::consts::FRAC_1_SQRT_2; // two rewards, sample deviation
        for (token, advantage) in seen {
            let wanted = [(half, -half), (-half, half), (0.0, 0.0)][token as usize / 100 - 1];
            let wanted = if token % 100 < 10 { wanted.0 } else { wanted.1 };
            assert!((advantage - wanted).abs() < 1e-6, "{token}: {advantage}");
        }
        // Another seed, another order; the same seed, the same.
        let order = |seed| mini_batches(&groups, &objective, 1, 99, seed).unwrap().concat().remove(0).next;
        assert_eq!(order(5), order(5));
        assert!((0..9).any(|seed| order(seed) != order(5)));
    }
}
