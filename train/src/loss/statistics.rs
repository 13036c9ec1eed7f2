//! What a loss saw of its ratios: sums and extremes, so that parts of a mini-batch can be put together.

/// Sums over tokens; the means are methods.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Statistics {
    /// Tokens.
    pub tokens: u64,
    /// Tokens with a positive advantage.
    pub positive: u64,
    /// Tokens with a negative advantage.
    pub negative: u64,
    /// Of the positive ones, those whose weight was clipped or whose gradient was masked.
    pub positive_clipped: u64,
    /// Of the negative ones, the same.
    pub negative_clipped: u64,
    /// Lowest ratio; infinite without tokens.
    pub ratio_min: f32,
    /// Highest ratio; minus infinity without tokens.
    pub ratio_max: f32,
    /// Sum of the ratios.
    pub ratio_sum: f64,
    /// Sum of r - 1 - ln r.
    pub kl_sum: f64,
    /// The loss, added up in f64.
    pub loss: f64,
}

impl Default for Statistics {
    /// Of no token.
    fn default() -> Self {
        Self {
            tokens: 0,
            positive: 0,
            negative: 0,
            positive_clipped: 0,
            negative_clipped: 0,
            ratio_min: f32::INFINITY,
            ratio_max: f32::NEG_INFINITY,
            ratio_sum: 0.0,
            kl_sum: 0.0,
            loss: 0.0,
        }
    }
}

impl Statistics {
    /// Adds another part of the same mini-batch. Counts and extremes are exact, sums up to the rounding of f64.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.positive += other.positive;
        self.negative += other.negative;
        self.positive_clipped += other.positive_clipped;
        self.negative_clipped += other.negative_clipped;
        self.ratio_min = self.ratio_min.min(other.ratio_min);
        self.ratio_max = self.ratio_max.max(other.ratio_max);
        self.ratio_sum += other.ratio_sum;
        self.kl_sum += other.kl_sum;
        self.loss += other.loss;
    }

    /// Mean ratio; 1 without tokens.
    pub fn ratio_mean(&self) -> f64 {
        if self.tokens == 0 { 1.0 } else { self.ratio_sum / self.tokens as f64 }
    }

    /// Mean of r - 1 - ln r, the k3 estimate of KL(π_old ‖ π): never negative, 0 on-policy.
    pub fn approx_kl(&self) -> f64 {
        share(self.kl_sum, self.tokens)
    }

    /// The part of the tokens with a positive advantage that was clipped or masked.
    pub fn positive_clip_fraction(&self) -> f64 {
        share(self.positive_clipped as f64, self.positive)
    }

    /// The part of the tokens with a negative advantage that was clipped or masked.
    pub fn negative_clip_fraction(&self) -> f64 {
        share(self.negative_clipped as f64, self.negative)
    }
}

fn share(part: f64, of: u64) -> f64 {
    if of == 0 { 0.0 } else { part / of as f64 }
}
