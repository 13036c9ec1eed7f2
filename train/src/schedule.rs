//! The learning rate over a run: a linear warm-up, then a straight line down to zero.
//!
//! Different here: the line runs over the *fraction done*, which is counted in steps or, for a run that has a
//! time and no number of steps, in minutes. Only the first is reproducible to the bit.

use serde::{Deserialize, Serialize};

/// Peak and shape of the learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// The highest learning rate, reached at the end of the warm-up.
    pub peak: f64,
    /// Steps of linear warm-up; 0 begins at the peak.
    pub warmup: u64,
}

impl Schedule {
    /// The learning rate of `step` (from 0) when `done` (0 to 1) of the run lies behind it.
    ///
    /// `peak * min((step + 1) / warmup, 1) * (1 - done)`: the decay acts during the warm-up as well, which
    /// changes nothing worth a case of its own.
    pub fn rate(&self, step: u64, done: f64) -> f64 {
        let warm = if step < self.warmup { (step + 1) as f64 / self.warmup as f64 } else { 1.0 };
        self.peak * warm * (1.0 - done.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Schedule = Schedule { peak: 2e-3, warmup: 10 };

    #[test]
    fn warms_up_linearly() {
        assert!((S.rate(0, 0.0) - 2e-4).abs() < 1e-15);
        assert!((S.rate(4, 0.0) - 1e-3).abs() < 1e-15);
        assert!((S.rate(10, 0.0) - 2e-3).abs() < 1e-15);
    }

    #[test]
    fn falls_to_zero_and_not_below() {
        assert!((S.rate(500, 0.5) - 1e-3).abs() < 1e-15);
        assert_eq!(S.rate(1000, 1.0), 0.0);
        assert_eq!(S.rate(1001, 1.7), 0.0);
    }

    #[test]
    fn no_warm_up_begins_at_the_peak() {
        let s = Schedule { peak: 1.0, warmup: 0 };
        assert_eq!(s.rate(0, 0.0), 1.0);
    }
}
