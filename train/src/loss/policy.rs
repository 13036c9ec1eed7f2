//! The loss of one part of a mini-batch.
//!
//! Different here: ratios, masks and weights are made on the host. They carry no gradient, so all the device has to do
//! is multiply log-probabilities by constants and add them up; the log-probabilities are read once, and that one read
//! serves the weights, the statistics and the caller. Equal
//! log-probabilities give equal weights on every device.

use burn::tensor::{Tensor, TensorData};

use super::{LossError, Objective, Statistics, Weight, check};

/// Log-ratios are clamped to ± this before `exp`, as verl does: e^20 = 4.9e8 is beyond any bound that is ever set, and
/// finite in f32 with its advantage and its scale.
pub const LOG_RATIO_BOUND: f32 = 20.0;

/// The loss and what was seen on the way.
#[derive(Debug)]
pub struct PolicyLoss {
    /// `-Σ s·M·w·A·log π` over the given tokens, `[1]`, differentiable in log π alone. 0 without tokens.
    pub loss: Tensor<1>,
    /// Ratios, clipping, KL.
    pub statistics: Statistics,
    /// The log-probabilities as read from the device, one a token.
    pub log_probs: Vec<f32>,
}

/// The loss of some of a mini-batch's tokens. The parts' losses and gradients add up to the mini-batch's.
///
/// - `log_prob [n]`: log π of each token under the policy in training, f32; its graph leads back to the weights.
/// - `old_log_probs`: n log-probabilities under the policy that drew the tokens.
/// - `advantages`, `scales`: n each, see [`super::advantages`], [`super::scales`] and [`super::per_token`].
///
/// The loss's value is the unified form's: with PPO's mask its gradient is that of `min(r A, clip(r) A)`, its value is
/// not.
///
/// # Errors
/// Another number of entries than n, or a number that is not finite (which token is said).
pub fn policy_loss(
    objective: &Objective,
    log_prob: Tensor<1>,
    old_log_probs: &[f32],
    advantages: &[f32],
    scales: &[f32],
) -> Result<PolicyLoss, LossError> {
    let [n] = log_prob.dims();
    let device = log_prob.device();
    check("old_log_probs", old_log_probs, n)?;
    check("advantages", advantages, n)?;
    check("scales", scales, n)?;
    let mut statistics = Statistics::default();
    if n == 0 {
        let loss = Tensor::zeros([1], &device);
        return Ok(PolicyLoss { loss, statistics, log_probs: Vec::new() });
    }
    let log_probs: Vec<f32> = log_prob.clone().detach().into_data().iter::<f32>().collect();
    check("log_prob", &log_probs, n)?;

    let coefficients: Vec<f32> = (0..n)
        .map(|i| {
            let (advantage, log_prob) = (advantages[i], log_probs[i]);
            let log_ratio = (log_prob - old_log_probs[i]).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND);
            let ratio = log_ratio.exp();
            let weight = objective.weight.of(ratio);
            let kept = objective.mask.keeps(ratio, advantage);
            let clipped = !kept || (objective.weight != Weight::One && weight != ratio);
            let coefficient = if kept { -scales[i] * (weight * advantage) } else { 0.0 };
            statistics.add(log_ratio, ratio, advantage, clipped, f64::from(coefficient) * f64::from(log_prob));
            coefficient
        })
        .collect();
    let coefficients = Tensor::<1>::from_data(TensorData::new(coefficients, [n]), &device);
    Ok(PolicyLoss { loss: (log_prob * coefficients).sum(), statistics, log_probs })
}

impl Statistics {
    /// Counts one token.
    fn add(&mut self, log_ratio: f32, ratio: f32, advantage: f32, clipped: bool, loss: f64) {
        self.tokens += 1;
        if advantage > 0.0 {
            self.positive += 1;
            self.positive_clipped += u64::from(clipped);
        } else if advantage < 0.0 {
            self.negative += 1;
            self.negative_clipped += u64::from(clipped);
        }
        self.ratio_min = self.ratio_min.min(ratio);
        self.ratio_max = self.ratio_max.max(ratio);
        self.ratio_sum += f64::from(ratio);
        // exp_m1 keeps the digits that r - 1 loses where the policies are close, which is where this is read.
        let log_ratio = f64::from(log_ratio);
        self.kl_sum += log_ratio.exp_m1() - log_ratio;
        self.loss += loss;
    }
}
