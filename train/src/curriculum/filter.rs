//! Which problems teach something, by how often they are solved.

use serde::{Deserialize, Serialize};

use super::{CurriculumError, in_range};

/// Bounds on a measured pass rate, both outside: `above < rate < below`.
///
/// The default, 0 and 1, keeps the groups with both right and wrong responses, as dynamic sampling does (DAPO). 0 and
/// 0.9 also drops what is nearly always solved (ScaleRL, arXiv 2510.13786).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PassRates {
    /// A kept rate is higher than this; below 0 keeps problems that were never solved.
    pub above: f64,
    /// A kept rate is lower than this; above 1 keeps problems that were always solved.
    pub below: f64,
}

impl Default for PassRates {
    fn default() -> Self {
        Self { above: 0.0, below: 1.0 }
    }
}

impl PassRates {
    /// # Errors
    /// Bounds that are no numbers or keep nothing.
    pub fn validate(&self) -> Result<(), CurriculumError> {
        let expected = "below the upper bound (curriculum.filter.below), both finite";
        let good = self.above < self.below && self.above.is_finite() && self.below.is_finite();
        in_range("curriculum.filter.above", self.above, good, expected)
    }

    /// Whether a problem that was solved in `rate` (0 to 1) of its responses is kept.
    pub fn keeps(&self, rate: f64) -> bool {
        self.above < rate && rate < self.below
    }

    /// The items whose measured pass rate lies within the bounds, in their order.
    pub fn filter<T>(&self, measured: impl IntoIterator<Item = (T, f64)>) -> Vec<T> {
        measured.into_iter().filter(|(_, rate)| self.keeps(*rate)).map(|(item, _)| item).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_outside() {
        let measured = [("a", 0.0), ("b", 0.25), ("c", 0.9), ("d", 1.0), ("e", 0.89), ("f", f64::NAN)];
        assert_eq!(PassRates::default().filter(measured), ["b", "c", "e"]);
        assert_eq!(PassRates { above: 0.0, below: 0.9 }.filter(measured), ["b", "e"]);
        assert_eq!(PassRates { above: -1.0, below: 2.0 }.filter(measured), ["a", "b", "c", "d", "e"]);
        assert_eq!(PassRates { above: 0.25, below: 0.5 }.filter(measured), [""; 0]);
    }

    #[test]
    fn bounds_that_keep_nothing_are_refused() {
        for (above, below) in [(0.5, 0.5), (1.0, 0.0), (f64::NAN, 1.0), (0.0, f64::NAN), (f64::NEG_INFINITY, 1.0)] {
            let told = PassRates { above, below }.validate().unwrap_err().to_string();
            assert!(told.contains("curriculum.filter.above"), "{told}");
        }
        assert!(PassRates::default().validate().is_ok());
    }
}
