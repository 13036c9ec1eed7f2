//! The policy losses of reinforcement learning: CISPO and what it is compared with, as settings of one form.
//!
//! ```text
//! J = Σ_i s_i Σ_t  M_it · sg(w_it) · A_i · log π_it        r_it = exp(log π_it - log π_old,it)
//! ```
//! The loss is `-J`. `sg` stops the gradient, so the gradient of a token is exactly `-s·M·w·A`.
//! - **w**, the weight ([`Weight`]): 1, the ratio r, or r clipped to bounds (CISPO, MiniMax-M1 report).
//! - **M**, the mask ([`Mask`]): 1, or PPO's, which is 0 where A > 0 and r > 1 + eps_high or A < 0 and r < 1 - eps_low.
//!   With w = r its gradient is that of `min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)` (the report's unified form).
//! - **A**, the advantage ([`Advantage`]): from the rewards of a group of responses to one prompt.
//! - **s**, the scale ([`Aggregation`]): how tokens are added up. It is made from lengths and groups alone, so a
//!   mini-batch may be worked through in any parts: their losses add up to its own.
//!
//! | algorithm | w | M | s | A |
//! | --- | --- | --- | --- | --- |
//! | cispo | r within 0 … 5 | 1 | group_tokens | group_std |
//! | grpo | r | 0.2 / 0.2 | sequence_mean | group_std |
//! | dapo | r | 0.2 / 0.28 | batch_tokens | group_std |
//! | ppo | r | 0.2 / 0.2 | batch_tokens | batch_std |
//! | reinforce | 1 | 1 | group_tokens | group_std |
//!
//! Different here: the bound on CISPO's weight is given as the bound itself, `ratio_max`, never as an epsilon.
//! Elsewhere a knob called epsilon_high is the bound in some programs and the bound less 1 in others, and a silent 0.2
//! in the wrong one scales every gradient down to a fifth. Here a bound below 1 is refused.

mod advantage;
mod aggregation;
mod policy;
mod settings;
mod statistics;
#[cfg(test)]
mod tests;

pub use advantage::{Advantage, Deviation, advantages, is_uniform};
pub use aggregation::{Aggregation, per_token, scales};
pub use policy::{LOG_RATIO_BOUND, PolicyLoss, policy_loss};
pub use settings::{Algorithm, LossSettings, Mask, MaskKind, Objective, Weight, WeightKind};
pub use statistics::Statistics;

/// What can be wrong with the settings or the numbers of a loss.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum LossError {
    /// A bound on the ratio that does not leave 1 as it is: most often an epsilon where the bound belongs.
    #[error(
        "loss.{field} = {value}: this is the bound on the ratio itself, not an epsilon, and must leave the ratio 1 as \
         it is: {expected} (an eps_high of 0.2 is ratio_max = 1.2)"
    )]
    Bound {
        /// `ratio_max` or `ratio_min`.
        field: &'static str,
        /// What was given.
        value: f64,
        /// What would be right.
        expected: &'static str,
    },
    /// An epsilon of the mask that is negative, too large or no number.
    #[error("loss.{field} = {value}: must be {expected}")]
    Epsilon {
        /// `eps_low` or `eps_high`.
        field: &'static str,
        /// What was given.
        value: f64,
        /// What would be right.
        expected: &'static str,
    },
    /// A setting that nothing would read.
    #[error("loss.{field}: has no effect with {with}; leave it out, or set {needs}")]
    NoEffect {
        /// The setting.
        field: &'static str,
        /// What makes it void.
        with: &'static str,
        /// What would give it a meaning.
        needs: &'static str,
    },
    /// Lists that belong together have different lengths.
    #[error("loss: {what} has {found} entries, expected {expected}")]
    Lengths {
        /// The list.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The right one.
        expected: usize,
    },
    /// A number that is not finite.
    #[error("loss: {what}[{index}] is {value}, expected a finite number")]
    NotFinite {
        /// Which list.
        what: &'static str,
        /// The place in it, from 0.
        index: usize,
        /// What stands there.
        value: f64,
    },
}

/// Checks that a list has `expected` entries, all finite.
fn check<T: Into<f64> + Copy>(what: &'static str, values: &[T], expected: usize) -> Result<(), LossError> {
    if values.len() != expected {
        return Err(LossError::Lengths { what, found: values.len(), expected });
    }
    match values.iter().map(|&v| v.into()).enumerate().find(|(_, v)| !v.is_finite()) {
        Some((index, value)) => Err(LossError::NotFinite { what, index, value }),
        None => Ok(()),
    }
}
