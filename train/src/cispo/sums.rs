//! What the updates of a step add up to.

use crate::loss::Statistics;
use crate::metrics::RlMetrics;

/// What the updates of a step say together.
#[derive(Debug)]
pub(super) struct Sums {
    pub statistics: Statistics,
    pub entropy: f64,
    pub aux_loss: f64,
    pub grad_norm: f64,
    pub load_min: f64,
    pub load_max: f64,
    pub made: u64,
    pub read: usize,
}

impl Default for Sums {
    fn default() -> Self {
        Self {
            statistics: Statistics::default(),
            entropy: 0.0,
            aux_loss: 0.0,
            grad_norm: 0.0,
            load_min: f64::INFINITY,
            load_max: 0.0,
            made: 0,
            read: 0,
        }
    }
}

impl Sums {
    /// Writes it into the step's metrics; nothing without an update.
    pub fn describe(&self, metrics: &mut RlMetrics) {
        if self.made == 0 || self.statistics.tokens == 0 {
            return;
        }
        let (made, s) = (self.made as f64, &self.statistics);
        metrics.loss = s.loss / made;
        metrics.aux_loss = self.aux_loss / made;
        metrics.grad_norm = self.grad_norm / made;
        metrics.entropy = self.entropy / s.tokens as f64;
        metrics.ratio_min = s.ratio_min.into();
        metrics.ratio_mean = s.ratio_mean();
        metrics.ratio_max = s.ratio_max.into();
        metrics.clip_frac_pos = s.positive_clip_fraction();
        metrics.clip_frac_neg = s.negative_clip_fraction();
        metrics.approx_kl = s.approx_kl();
        metrics.expert_load_min = self.load_min;
        metrics.expert_load_max = self.load_max;
    }
}
