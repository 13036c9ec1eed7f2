//! Aggregation: the share that a response's tokens have in the loss of a mini-batch.
//!
//! Different here: the share is one number per response, made from lengths and groups before any forward pass. The
//! parts that a mini-batch is split into only multiply by it and add up, so no split can change the loss.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::LossError;

/// How tokens are added up. With n responses in all, |o_i| tokens in response i, T in the mini-batch, T_g in a group of
/// n_g responses and G groups, where an empty response or group does not count:
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// `1 / (G · T_g)`: the mean over a group's tokens, then over groups (the report's).
    GroupTokens,
    /// `1 / T`: the mean over all tokens (DAPO).
    BatchTokens,
    /// `1 / (n · |o_i|)`: the mean over a response's tokens, then over responses (GRPO).
    SequenceMean,
    /// `T_g / (T · n_g · |o_i|)`: the mean over a response's tokens, then over its group, and groups weighed by their
    /// tokens.
    ///
    /// The report names "sample-level loss and token-level normalisation" as its cure where long negative responses
    /// outweigh short positive ones and the ends of responses collapse, and gives no formula. This is our reading:
    /// within a group every response counts the same however long it is, while the groups together are normalised
    /// by tokens. Where all responses of each group are equally long it is `batch_tokens`.
    SequenceMeanTokenNormalised,
}

/// The scale of each response: what every one of its tokens is multiplied by. A response without tokens gets 0.
///
/// `lengths[i]` is the number of tokens of response i that count towards the loss, `groups[i]` the name of its group.
/// All responses of a mini-batch belong into one call; a group counts with those of its responses that are in it.
///
/// # Errors
/// Lists of different lengths.
pub fn scales(aggregation: Aggregation, lengths: &[usize], groups: &[usize]) -> Result<Vec<f64>, LossError> {
    if lengths.len() != groups.len() {
        let (found, expected) = (groups.len(), lengths.len());
        return Err(LossError::Lengths { what: "groups", found, expected });
    }
    // Responses and tokens of each group.
    let mut sizes: HashMap<usize, (usize, usize)> = HashMap::new();
    for (&length, &group) in lengths.iter().zip(groups).filter(|(length, _)| **length > 0) {
        let size = sizes.entry(group).or_default();
        *size = (size.0 + 1, size.1 + length);
    }
    let responses: usize = sizes.values().map(|s| s.0).sum();
    let tokens: usize = sizes.values().map(|s| s.1).sum();
    let scale = |(&length, group): (&usize, &usize)| {
        let Some(&(own_responses, own_tokens)) = sizes.get(group).filter(|_| length > 0) else { return 0.0 };
        match aggregation {
            Aggregation::GroupTokens => 1.0 / (sizes.len() as f64 * own_tokens as f64),
            Aggregation::BatchTokens => 1.0 / tokens as f64,
            Aggregation::SequenceMean => 1.0 / (responses as f64 * length as f64),
            Aggregation::SequenceMeanTokenNormalised => {
                own_tokens as f64 / (tokens as f64 * own_responses as f64 * length as f64)
            }
        }
    };
    Ok(lengths.iter().zip(groups).map(scale).collect())
}

/// One number per response as one per token, response after response: what [`super::policy_loss`] takes.
///
/// # Errors
/// Lists of different lengths.
pub fn per_token(values: &[f64], lengths: &[usize]) -> Result<Vec<f32>, LossError> {
    if values.len() != lengths.len() {
        let (found, expected) = (lengths.len(), values.len());
        return Err(LossError::Lengths { what: "lengths", found, expected });
    }
    let repeat = |(&value, &length): (&f64, &usize)| std::iter::repeat_n(value as f32, length);
    Ok(values.iter().zip(lengths).flat_map(repeat).collect())
}
