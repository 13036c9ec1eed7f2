//! The reward of one response: is it right, does it keep the form, is it too long.
//!
//! Different here: a response that was cut off counts as wrong even where its text happens to end in the answer, as in
//! evaluation. Rewards for length alone therefore never make up for not ending.

use serde::{Deserialize, Serialize};

use crate::tasks::{Problem, Task, answer_of};

/// What can be wrong with the `[reward]` settings.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RewardError {
    /// A weight below zero or no number.
    #[error("reward.{field} = {value}: must be a finite number, 0 or above")]
    Weight {
        /// The field.
        field: &'static str,
        /// Its value.
        value: f64,
    },
    /// Nothing would be rewarded.
    #[error("reward: correct and format are both 0, so nothing would be rewarded; set one of them above 0")]
    Nothing,
    /// A soft zone that is longer than the response may be.
    #[error(
        "reward.overlong_buffer = {buffer}: must be below the longest response, {max_tokens} tokens; 0 is no penalty"
    )]
    Buffer {
        /// Lc.
        buffer: usize,
        /// Lmax.
        max_tokens: usize,
    },
}

/// Weights of the parts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RewardSettings {
    /// For an answer that the task's verifier accepts.
    pub correct: f64,
    /// For the form `<think>…</think>` answer, ended by the model.
    pub format: f64,
    /// Of the soft overlong penalty, which is 0 to -1.
    pub overlong: f64,
    /// Lc, the tokens before the longest response over which the penalty grows; 0 for no penalty.
    pub overlong_buffer: usize,
}

impl Default for RewardSettings {
    /// Being right outweighs the form by far; no penalty for length.
    fn default() -> Self {
        Self { correct: 1.0, format: 0.1, overlong: 1.0, overlong_buffer: 0 }
    }
}

/// A response as it is judged.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a> {
    /// Its text, special tokens left out.
    pub text: &'a str,
    /// Its tokens, the one that ended it included.
    pub tokens: usize,
    /// Whether the model ended it itself: neither the limit nor a stop for repetition did.
    pub ended: bool,
}

/// A reward and what it is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reward {
    /// What the advantage is made from: the weighted sum.
    pub total: f64,
    /// 1 where the answer is right and the response ended, else 0.
    pub correct: f64,
    /// 1 where the form was kept, else 0.
    pub format: f64,
    /// 0 to -1.
    pub overlong: f64,
}

impl RewardSettings {
    /// Checks the settings for responses of at most `max_tokens` (Lmax).
    ///
    /// # Errors
    /// What is wrong, by field.
    pub fn validate(&self, max_tokens: usize) -> Result<(), RewardError> {
        for (field, value) in [("correct", self.correct), ("format", self.format), ("overlong", self.overlong)] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(RewardError::Weight { field, value });
            }
        }
        if self.correct == 0.0 && self.format == 0.0 {
            return Err(RewardError::Nothing);
        }
        if self.overlong_buffer > 0 && self.overlong_buffer >= max_tokens {
            return Err(RewardError::Buffer { buffer: self.overlong_buffer, max_tokens });
        }
        Ok(())
    }

    /// The reward of a response that may have at most `max_tokens` tokens.
    pub fn reward(&self, task: &dyn Task, problem: &Problem, response: Response, max_tokens: usize) -> Reward {
        let unit = |yes| if yes { 1.0 } else { 0.0 };
        let correct = unit(response.ended && task.verify(problem, response.text));
        let format = unit(response.ended && keeps_form(response.text));
        let overlong = overlong_penalty(response.tokens, max_tokens, self.overlong_buffer);
        let total = self.correct * correct + self.format * format + self.overlong * overlong;
        Reward { total, correct, format, overlong }
    }
}

/// Whether a reply is `<think>…</think>` and then an answer, each tag once and nothing before the first. The thinking
/// may be empty: that it helps is for the other reward to teach.
pub fn keeps_form(reply: &str) -> bool {
    let reply = reply.trim_start();
    reply.starts_with("<think>") && reply.contains("</think>") && answer_of(reply).is_some()
}

/// DAPO's soft overlong penalty (arXiv 2503.14476), Lmax = `max_tokens`, Lc = `buffer`: 0 up to Lmax - Lc
/// tokens, from there a straight line to -1 at Lmax, and -1 beyond. 0 where `buffer` is 0.
pub fn overlong_penalty(tokens: usize, max_tokens: usize, buffer: usize) -> f64 {
    if buffer == 0 {
        return 0.0;
    }
    let over = tokens.saturating_sub(max_tokens.saturating_sub(buffer));
    -(over as f64 / buffer as f64).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks;

    fn judged(settings: RewardSettings, text: &str, tokens: usize, ended: bool) -> Reward {
        let task = tasks::by_name("addition").unwrap();
        let mut problem = task.generate(1, 0, 2);
        problem.answer = "42".into();
        settings.reward(task, &problem, Response { text, tokens, ended }, 100)
    }

    #[test]
    fn parts_are_told_apart() {
        let settings = RewardSettings { overlong_buffer: 20, ..RewardSettings::default() };
        let parts = |text: &str, tokens, ended| {
            let r = judged(settings, text, tokens, ended);
            assert_eq!(r.total, r.correct + 0.1 * r.format + r.overlong);
            (r.correct, r.format, r.overlong)
        };
        assert_eq!(parts("<think>\n6 * 7\n</think>\n\n42", 30, true), (1.0, 1.0, 0.0));
        assert_eq!(parts("<think>\n6 * 7\n</think>\n\n41", 30, true), (0.0, 1.0, 0.0));
        assert_eq!(parts("42", 30, true), (1.0, 0.0, 0.0), "right without thinking");
        assert_eq!(parts("<think>\n6 * 7\n</think>\n\n42", 100, false), (0.0, 0.0, -1.0), "cut off");
        assert_eq!(parts("<think>\n</think>\n\n42", 90, true), (1.0, 1.0, -0.5));
    }

    #[test]
    fn the_form_is_strict() {
        for good in ["<think>a</think>1", " \n<think>\na\n</think>\n\nyes", "<think></think>1."] {
            assert!(keeps_form(good), "{good}");
        }
        for bad in [
            "",
            "1",
            "a</think>1",
            "So: <think>a</think>1",
            "<think>a",
            "<think>a</think>",
            "<think>a</think> \n",
            "<think>a<think>b</think>1",
            "<think>a</think>1</think>",
            "<think>a</think>1<think>b</think>",
        ] {
            assert!(!keeps_form(bad), "{bad}");
        }
    }

    #[test]
    fn the_penalty_is_a_ramp() {
        // Lmax 100, Lc 20.
        for (tokens, penalty) in [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (5000, -1.0)]
        {
            assert_eq!(overlong_penalty(tokens, 100, 20), penalty, "{tokens}");
        }
        assert_eq!(overlong_penalty(1000, 100, 0), 0.0);
    }

    #[test]
    fn settings_are_checked_and_named() {
        let read = |json: &str| serde_json::from_str::<RewardSettings>(json);
        assert_eq!(read("{}").unwrap(), RewardSettings::default());
        assert!(read(r#"{"corect": 1.0}"#).unwrap_err().to_string().contains("corect"));
        let error = |s: RewardSettings| s.validate(100).unwrap_err().to_string();
        let good = RewardSettings::default();
        assert!(good.validate(100).is_ok());
        assert!(error(RewardSettings { correct: -1.0, ..good }).contains("reward.correct = -1"));
        assert!(error(RewardSettings { format: f64::NAN, ..good }).contains("reward.format"));
        assert!(error(RewardSettings { correct: 0.0, format: 0.0, ..good }).contains("nothing would be rewarded"));
        assert!(error(RewardSettings { overlong_buffer: 100, ..good }).contains("100 tokens"));
        assert!(RewardSettings { overlong_buffer: 99, ..good }.validate(100).is_ok());
    }
}
