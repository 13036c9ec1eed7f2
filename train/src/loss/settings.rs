//! What a user sets: the name of an algorithm, and whatever should differ from it.

use serde::{Deserialize, Serialize};

use super::{Advantage, Aggregation, Deviation, LossError};

/// A preset of weight, mask, aggregation and advantage; the table is in [`crate::loss`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Clipped importance weights, no mask (MiniMax-M1 report).
    #[default]
    Cispo,
    /// Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300), without its KL term.
    Grpo,
    /// GRPO with a wider upper clip and the token mean (arXiv 2503.14476).
    Dapo,
    /// PPO's clipped objective (arXiv 1707.06347) with group means in the place of a critic.
    Ppo,
    /// The plain policy gradient: no ratio at all.
    Reinforce,
}

/// The kind of weight, as a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightKind {
    /// 1.
    One,
    /// The ratio.
    Ratio,
    /// The ratio, clipped to `ratio_min` and `ratio_max`.
    ClippedRatio,
}

/// The kind of mask, as a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskKind {
    /// Every token counts.
    None,
    /// PPO's.
    Ppo,
}

/// The `[loss]` section of a configuration: a preset and what differs from it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossSettings {
    /// `cispo`, `grpo`, `dapo`, `ppo` or `reinforce`.
    pub algorithm: Algorithm,
    /// `one`, `ratio` or `clipped_ratio`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<WeightKind>,
    /// `none` or `ppo`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<MaskKind>,
    /// `group_tokens`, `batch_tokens`, `sequence_mean` or `sequence_mean_token_normalised`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aggregation: Option<Aggregation>,
    /// `group_std`, `group_mean` or `batch_std`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advantage: Option<Advantage>,
    /// `sample` or `population`; default `sample`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub std: Option<Deviation>,
    /// Highest weight of a clipped ratio, 1 or above: the bound itself. Default 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_max: Option<f64>,
    /// Lowest weight of a clipped ratio, 0 to 1. Default 0: no lower bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_min: Option<f64>,
    /// The mask stops negative advantages below 1 - eps_low; 0 to 1, where 1 never stops any. Default 0.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps_low: Option<f64>,
    /// The mask stops positive advantages above 1 + eps_high; 0 or above. Default 0.2, for `dapo` 0.28.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps_high: Option<f64>,
}

/// w of the unified form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weight {
    /// 1.
    One,
    /// r.
    Ratio,
    /// r clipped.
    ClippedRatio {
        /// Lowest weight, 0 to 1.
        min: f32,
        /// Highest weight, 1 or above.
        max: f32,
    },
}

/// M of the unified form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mask {
    /// 1.
    None,
    /// 0 where A > 0 and r > `high`, or A < 0 and r < `low`; else 1.
    Ppo {
        /// 1 - eps_low.
        low: f32,
        /// 1 + eps_high.
        high: f32,
    },
}

/// The settings with every default filled in, checked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// w.
    pub weight: Weight,
    /// M.
    pub mask: Mask,
    /// How tokens are added up.
    pub aggregation: Aggregation,
    /// How advantages are made.
    pub advantage: Advantage,
    /// Which standard deviation they are divided by.
    pub std: Deviation,
}

impl From<Algorithm> for LossSettings {
    /// The preset as it is.
    fn from(algorithm: Algorithm) -> Self {
        Self { algorithm, ..Self::default() }
    }
}

impl LossSettings {
    /// The preset with what differs from it.
    ///
    /// # Errors
    /// A bound that changes the ratio 1, an epsilon out of range, NaN, or a setting that nothing would read.
    pub fn objective(&self) -> Result<Objective, LossError> {
        use Advantage as A;
        use Aggregation as G;
        let (weight, mask, eps_high, aggregation, advantage) = match self.algorithm {
            Algorithm::Cispo => (WeightKind::ClippedRatio, MaskKind::None, 0.2, G::GroupTokens, A::GroupStd),
            Algorithm::Grpo => (WeightKind::Ratio, MaskKind::Ppo, 0.2, G::SequenceMean, A::GroupStd),
            Algorithm::Dapo => (WeightKind::Ratio, MaskKind::Ppo, 0.28, G::BatchTokens, A::GroupStd),
            Algorithm::Ppo => (WeightKind::Ratio, MaskKind::Ppo, 0.2, G::BatchTokens, A::BatchStd),
            Algorithm::Reinforce => (WeightKind::One, MaskKind::None, 0.2, G::GroupTokens, A::GroupStd),
        };
        let advantage = self.advantage.unwrap_or(advantage);
        if advantage == A::GroupMean && self.std.is_some() {
            let needs = "advantage = group_std or batch_std";
            return Err(LossError::NoEffect { field: "std", with: "advantage = group_mean", needs });
        }
        Ok(Objective {
            weight: self.resolve_weight(self.weight.unwrap_or(weight))?,
            mask: self.resolve_mask(self.mask.unwrap_or(mask), eps_high)?,
            aggregation: self.aggregation.unwrap_or(aggregation),
            advantage,
            std: self.std.unwrap_or_default(),
        })
    }

    fn resolve_weight(&self, kind: WeightKind) -> Result<Weight, LossError> {
        if kind != WeightKind::ClippedRatio {
            for (field, given) in [("ratio_max", self.ratio_max), ("ratio_min", self.ratio_min)] {
                if given.is_some() {
                    let with = if kind == WeightKind::One { "weight = one" } else { "weight = ratio" };
                    let needs = "weight = clipped_ratio (what algorithm = cispo has)";
                    return Err(LossError::NoEffect { field, with, needs });
                }
            }
            return Ok(if kind == WeightKind::One { Weight::One } else { Weight::Ratio });
        }
        let (min, max) = (self.ratio_min.unwrap_or(0.0), self.ratio_max.unwrap_or(5.0));
        if !(1.0..=f64::from(f32::MAX)).contains(&max) {
            return Err(LossError::Bound { field: "ratio_max", value: max, expected: "a finite number, 1 or above" });
        }
        if !(0.0..=1.0).contains(&min) {
            return Err(LossError::Bound { field: "ratio_min", value: min, expected: "0 to 1" });
        }
        Ok(Weight::ClippedRatio { min: min as f32, max: max as f32 })
    }

    fn resolve_mask(&self, kind: MaskKind, eps_high: f64) -> Result<Mask, LossError> {
        if kind == MaskKind::None {
            for (field, given) in [("eps_low", self.eps_low), ("eps_high", self.eps_high)] {
                if given.is_some() {
                    let needs = "mask = ppo; the bound on CISPO's weight is ratio_max";
                    return Err(LossError::NoEffect { field, with: "mask = none", needs });
                }
            }
            return Ok(Mask::None);
        }
        let (low, high) = (self.eps_low.unwrap_or(0.2), self.eps_high.unwrap_or(eps_high));
        if !(0.0..=1.0).contains(&low) {
            return Err(LossError::Epsilon { field: "eps_low", value: low, expected: "0 to 1 (1 masks nothing)" });
        }
        if !(0.0..=f64::from(f32::MAX)).contains(&high) {
            return Err(LossError::Epsilon { field: "eps_high", value: high, expected: "a finite number, 0 or above" });
        }
        Ok(Mask::Ppo { low: (1.0 - low) as f32, high: (1.0 + high) as f32 })
    }
}

impl Weight {
    /// The weight of a token.
    pub fn of(self, ratio: f32) -> f32 {
        match self {
            Self::One => 1.0,
            Self::Ratio => ratio,
            Self::ClippedRatio { min, max } => ratio.clamp(min, max),
        }
    }
}

impl Mask {
    /// Whether a token keeps its gradient.
    pub fn keeps(self, ratio: f32, advantage: f32) -> bool {
        match self {
            Self::None => true,
            Self::Ppo { low, high } => !((advantage > 0.0 && ratio > high) || (advantage < 0.0 && ratio < low)),
        }
    }
}
