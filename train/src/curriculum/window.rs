//! The limit on a response's length, raised in stages.
//!
//! MiniMax-M1 (by its report) went from 40K tokens to 80K in six stages, each time when the perplexity of what the model
//! generates had converged and the 99th percentile of its lengths came near the limit. It gives no thresholds: both
//! signals' are settings here.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{CurriculumError, in_range};

/// The `[window]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WindowSettings {
    /// The limits in tokens, the first one first.
    pub lengths: Vec<usize>,
    /// Over how many steps the signals are judged; at least 2. The count begins anew at each window.
    pub steps: usize,
    /// Perplexity has converged when its mean over the later half of these steps differs from that over the
    /// earlier half by no more than this share of it.
    pub tolerance: f64,
    /// Lengths are near the limit when the median, over these steps, of each step's 99th percentile is at least this
    /// share of the limit.
    pub near: f64,
}

impl Default for WindowSettings {
    /// One window, which a small model's context holds. The report's are 40, 48, 56, 64, 72 and 80 K
    /// (train/configs/8xh800.toml).
    fn default() -> Self {
        Self { lengths: vec![1024], steps: 20, tolerance: 0.02, near: 0.9 }
    }
}

/// Where a run stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WindowState {
    /// Which of the windows, from 0.
    pub index: usize,
    /// Perplexities of the last steps, the oldest first.
    pub perplexities: VecDeque<f32>, // f32: JSON gives an f64 back to its last digit but one
    /// The 99th percentiles of the last steps' lengths, the oldest first.
    pub percentiles: VecDeque<usize>,
}

impl WindowSettings {
    /// # Errors
    /// What is wrong, by field.
    pub fn validate(&self) -> Result<(), CurriculumError> {
        let rising = self.lengths.windows(2).all(|pair| pair[0] < pair[1]);
        if !rising || self.lengths.first().is_none_or(|&first| first == 0) {
            return Err(CurriculumError::Lengths);
        }
        in_range("window.steps", self.steps as f64, self.steps >= 2, "2 or above")?;
        let tolerance = self.tolerance;
        in_range("window.tolerance", tolerance, tolerance >= 0.0 && tolerance.is_finite(), "a number, 0 or above")?;
        in_range("window.near", self.near, (0.0..=1.0).contains(&self.near), "0 to 1")
    }

    /// The longest response now, in tokens. A state from a longer row of windows is at the last of these; 0 where the
    /// row is empty, which [`Self::validate`] refuses.
    pub fn max_tokens(&self, state: &WindowState) -> usize {
        self.lengths.get(state.index).or(self.lengths.last()).copied().unwrap_or(0)
    }

    /// Takes in a step: the perplexity of its responses under the policy that drew them, and their lengths in tokens.
    /// Gives whether the next window begins with the next step. A step without responses says nothing; a perplexity
    /// that is not finite begins the count anew.
    pub fn observe(&self, state: &mut WindowState, perplexity: f64, lengths: &[usize]) -> bool {
        let Some(percentile) = percentile_99(lengths) else { return false };
        if !perplexity.is_finite() {
            // Nothing converges there, and JSON could not keep it.
            *state = WindowState { index: state.index, ..WindowState::default() };
            return false;
        }
        state.perplexities.push_back(perplexity as f32);
        state.percentiles.push_back(percentile);
        while state.perplexities.len() > self.steps {
            state.perplexities.pop_front();
            state.percentiles.pop_front();
        }
        let last = state.index + 1 >= self.lengths.len();
        if last || state.perplexities.len() < self.steps || !self.converged(state) || !self.near_limit(state) {
            return false;
        }
        *state = WindowState { index: state.index + 1, ..WindowState::default() };
        true
    }

    fn converged(&self, state: &WindowState) -> bool {
        let half = state.perplexities.len() / 2;
        let mean = |values: &mut dyn Iterator<Item = &f32>| values.map(|&v| f64::from(v)).sum::<f64>() / half as f64;
        // The middle one of an odd number belongs to neither half.
        let earlier = mean(&mut state.perplexities.iter().take(half));
        let later = mean(&mut state.perplexities.iter().rev().take(half));
        (later - earlier).abs() <= self.tolerance * earlier
    }

    fn near_limit(&self, state: &WindowState) -> bool {
        let mut sorted: Vec<usize> = state.percentiles.iter().copied().collect();
        sorted.sort_unstable();
        let median = sorted[sorted.len() / 2];
        median as f64 >= self.near * self.max_tokens(state) as f64
    }
}

/// The 99th percentile: the smallest of the values that at least 99 % do not exceed.
fn percentile_99(values: &[usize]) -> Option<usize> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * 99).div_ceil(100);
    sorted.get(rank.checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> WindowSettings {
        WindowSettings { lengths: vec![100, 200, 300], steps: 4, tolerance: 0.05, near: 0.9 }
    }

    /// Whether each step opened the next window.
    fn run(steps: &[(f64, usize)]) -> (Vec<bool>, WindowState) {
        let mut state = WindowState::default();
        let opened = steps.iter().map(|&(ppl, len)| settings().observe(&mut state, ppl, &[len])).collect();
        (opened, state)
    }

    #[test]
    fn both_signals_are_needed() {
        let (converged, near) = (2.0, 95);
        assert_eq!(run(&[(converged, near); 4]).0, [false, false, false, true]);
        // Near, but the perplexity still falls.
        assert_eq!(run(&[(4.0, near), (3.0, near), (2.5, near), (2.0, near)]).0, [false; 4]);
        // Converged, but no response is long.
        assert_eq!(run(&[(converged, 60); 8]).0, [false; 8]);
        // As soon as both hold: means of 2.1 and 2.0, then a median of 95.
        let opened = run(&[(2.1, 60), (2.1, 60), (2.0, 95), (2.0, 95)]);
        assert_eq!(opened.0, [false, false, false, true]);
        // No number is no convergence, and leaves a state that a checkpoint can hold.
        let (opened, state) = run(&[(2.0, near), (2.0, near), (2.0, near), (f64::NAN, near), (2.0, near)]);
        assert_eq!((opened, state.perplexities.len()), (vec![false; 5], 1));
    }

    #[test]
    fn windows_follow_and_end() {
        let s = settings();
        let mut state = WindowState::default();
        assert_eq!(s.max_tokens(&state), 100);
        for _ in 0..4 {
            s.observe(&mut state, 2.0, &[99]);
        }
        assert_eq!(state, WindowState { index: 1, ..WindowState::default() }, "and the count begins anew");
        assert_eq!(s.max_tokens(&state), 200);
        // 99 is not near 200.
        assert!((0..10).all(|_| !s.observe(&mut state, 2.0, &[99])));
        assert!((0..4).any(|_| s.observe(&mut state, 2.0, &[180])));
        assert_eq!(s.max_tokens(&state), 300);
        assert!((0..10).all(|_| !s.observe(&mut state, 2.0, &[300])), "the last one stays");
        // A resumed state is the state.
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<WindowState>(&text).unwrap(), state);
        assert!(!s.observe(&mut state.clone(), 2.0, &[]));
    }

    #[test]
    fn percentile_is_the_nearest_rank() {
        let up_to = |n: usize| (1..=n).rev().collect::<Vec<_>>();
        assert_eq!(percentile_99(&up_to(100)), Some(99));
        assert_eq!(percentile_99(&up_to(200)), Some(198));
        assert_eq!(percentile_99(&up_to(101)), Some(100));
        assert_eq!(percentile_99(&[7]), Some(7));
        assert_eq!(percentile_99(&[]), None);
    }

    #[test]
    fn mistakes_name_their_field() {
        assert!(WindowSettings::default().validate().is_ok());
        let told = |s: WindowSettings| s.validate().unwrap_err().to_string();
        for lengths in [vec![], vec![0, 5], vec![5, 5], vec![9, 5]] {
            assert!(told(WindowSettings { lengths, ..settings() }).contains("window.lengths"));
        }
        assert!(told(WindowSettings { steps: 1, ..settings() }).contains("window.steps = 1"));
        assert!(told(WindowSettings { tolerance: f64::NAN, ..settings() }).contains("window.tolerance"));
        assert!(told(WindowSettings { near: 1.5, ..settings() }).contains("window.near = 1.5"));
        assert!(serde_json::from_str::<WindowSettings>(r#"{"length": [1]}"#).is_err());
    }
}
