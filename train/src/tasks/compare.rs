//! Which of two numbers is larger, or smaller. Difficulty d: numbers of about 1 + d/2 digits, often with equal first digits,
//! one time in four of unequal length. Answer: that number.
//!
//! Steps for 473 and 458: the lengths, then digit by digit until two differ.
//! ```text
//! length 3=3
//! 4=4
//! 7>5
//! ```

use super::{Draw, Problem, Task};
use std::cmp::Ordering;
use std::fmt::Write;

/// See the file's head.
pub struct Compare;

fn relation(a: usize, b: usize) -> char {
    match a.cmp(&b) {
        Ordering::Less => '<',
        Ordering::Equal => '=',
        Ordering::Greater => '>',
    }
}

fn steps(a: &str, b: &str) -> String {
    let mut text = format!("length {}{}{}", a.len(), relation(a.len(), b.len()), b.len());
    if a.len() == b.len() {
        for (x, y) in a.bytes().zip(b.bytes()) {
            let (x, y) = (usize::from(x - b'0'), usize::from(y - b'0'));
            let _ = write!(text, "\n{x}{}{y}", relation(x, y));
            if x != y {
                break;
            }
        }
    }
    text
}

impl Task for Compare {
    fn name(&self) -> &'static str {
        "compare"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let digits = 1 + (u32::from(difficulty) + draw.below(2) as u32) / 2;
        let a = draw.digits(digits);
        let b = loop {
            let b = if draw.chance(25) {
                let fewer = digits > 1 && draw.chance(50);
                draw.digits(if fewer { digits - 1 } else { digits + 1 })
            } else {
                // The first digits are kept, the rest drawn anew.
                let unit = 10u64.pow(1 + draw.below(digits as usize) as u32);
                let kept = a / unit * unit;
                if kept == 0 { draw.digits(digits) } else { kept + draw.range(0, unit - 1) }
            };
            if b != a {
                break b;
            }
        };
        let (a, b) = if draw.chance(50) { (a, b) } else { (b, a) };
        let larger = draw.chance(50);
        let word = match (larger, draw.chance(50)) {
            (true, true) => "larger",
            (true, false) => "greater",
            (false, true) => "smaller",
            (false, false) => "less",
        };
        let question = match draw.below(3) {
            0 => format!("Which is {word}, {a} or {b}?"),
            1 => format!("Which number is {word}: {a} or {b}?"),
            _ => format!("{a} or {b}: which is {word}?"),
        };
        Problem {
            task: self.name(),
            difficulty,
            key: format!("{}{a} {b}", if larger { '>' } else { '<' }),
            question,
            thinking: steps(&a.to_string(), &b.to_string()),
            answer: if larger { a.max(b) } else { a.min(b) }.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&Compare);
    }

    #[test]
    fn steps_end_at_the_first_difference() {
        assert_eq!(steps("473", "458"), "length 3=3\n4=4\n7>5");
        assert_eq!(steps("99", "100"), "length 2<3");
        for index in 0..100 {
            let problem = Compare.generate(1, index, 4);
            let (a, b) = problem.key[1..].split_once(' ').unwrap();
            let a_is_larger = a.parse::<u64>().unwrap() > b.parse::<u64>().unwrap();
            let last = problem.thinking.lines().last().unwrap();
            assert_eq!(last.contains('>'), a_is_larger, "{problem:?}");
            let (right, wrong) = if a_is_larger == problem.key.starts_with('>') { (a, b) } else { (b, a) };
            assert!(Compare.verify(&problem, right) && !Compare.verify(&problem, wrong));
        }
    }
}
