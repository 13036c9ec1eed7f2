//! The day of the week some days on or ago. Difficulty 1: up to 4 days; d: fewer than 7 (d - 1) days.
//! Answer: the day's English name.
//!
//! Steps: weeks are taken off, then the days are told off. For Friday in 16 days:
//! ```text
//! 16-7=9
//! 9-7=2
//! - Friday0 Saturday1 Sunday2
//! ```

use super::{Draw, Problem, Task};
use std::fmt::Write;

/// See the file's head.
pub struct Weekday;

const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// The steps and the day they end at.
fn steps(today: usize, days: usize, back: bool) -> (String, &'static str) {
    let (mut text, mut left) = (String::new(), days);
    while left >= 7 {
        let _ = writeln!(text, "{left}-7={}", left - 7);
        left -= 7;
    }
    text.push('-');
    let mut day = today;
    for told in 0..=left {
        day = if back { today + 7 - told } else { today + told } % 7;
        let _ = write!(text, " {}{told}", DAYS[day]);
    }
    (text, DAYS[day])
}

impl Task for Weekday {
    fn name(&self) -> &'static str {
        "weekday"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let most = if difficulty == 1 { 4 } else { 7 * usize::from(difficulty) - 8 };
        // The upper half of the range more often: the lower belongs to the difficulties before.
        let days = if draw.chance(70) { most / 2 + 1 + draw.below(most - most / 2) } else { 1 + draw.below(most) };
        let (today, back) = (draw.below(7), draw.chance(35));
        let (thinking, answer) = steps(today, days, back);
        let (name, plural) = (DAYS[today], if days == 1 { "day" } else { "days" });
        let question = match (back, draw.below(3)) {
            (false, 0) => format!("Today is {name}. What day will it be in {days} {plural}?"),
            (false, 1) => format!("What day comes {days} {plural} after {name}?"),
            (false, _) => format!("If today is {name}, what day is it {days} {plural} later?"),
            (true, 0) => format!("Today is {name}. What day was it {days} {plural} ago?"),
            (true, 1) => format!("What day comes {days} {plural} before {name}?"),
            (true, _) => format!("If today is {name}, what day was it {days} {plural} earlier?"),
        };
        Problem {
            task: self.name(),
            difficulty,
            key: format!("{name}{}{days}", if back { '-' } else { '+' }),
            question,
            thinking,
            answer: answer.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&Weekday);
    }

    #[test]
    fn steps_take_off_weeks() {
        assert_eq!(steps(4, 16, false), ("16-7=9\n9-7=2\n- Friday0 Saturday1 Sunday2".into(), "Sunday"));
        assert_eq!(steps(0, 2, true), ("- Monday0 Sunday1 Saturday2".into(), "Saturday"));
        for (today, days) in (0..7).flat_map(|today| (1..100).map(move |days| (today, days))) {
            assert_eq!(steps(today, days, false).1, DAYS[(today + days) % 7]);
            assert_eq!(steps(today, days, true).1, DAYS[(today + 700 - days) % 7]);
        }
    }
}
