//! Whether brackets of three kinds match. Difficulty d: about 2 d + 2 brackets. Answer: "yes" or "no".
//!
//! Steps: each bracket, and after `:` the ones that are open then; a bracket that closes nothing open gives `x`, and
//! that is the end. Here for `([)]`:
//! ```text
//! (:(
//! [:([
//! ):x
//! ```

use super::{Draw, Problem, Task};

/// See the file's head.
pub struct Brackets;

const KINDS: [(char, char); 3] = [('(', ')'), ('[', ']'), ('{', '}')];

fn closing(open: char) -> char {
    KINDS.iter().find(|kind| kind.0 == open).map_or(open, |kind| kind.1)
}

/// A matching sequence of that many pairs, no deeper than 4.
fn matching(draw: &mut Draw, pairs: usize) -> String {
    let (mut text, mut open, mut left) = (String::new(), Vec::new(), pairs);
    while left > 0 || !open.is_empty() {
        let may_open = left > 0 && open.len() < 4;
        if may_open && (open.is_empty() || draw.chance(55)) {
            let kind = draw.pick(&KINDS);
            text.push(kind.0);
            open.push(kind.1);
            left -= 1;
        } else if let Some(close) = open.pop() {
            text.push(close);
        }
    }
    text
}

/// The steps, and whether all matches.
fn steps(text: &str) -> (String, bool) {
    let (mut lines, mut open) = (Vec::new(), String::new());
    for bracket in text.chars() {
        if KINDS.iter().any(|kind| kind.0 == bracket) {
            open.push(bracket);
        } else if open.pop().map(closing) != Some(bracket) {
            lines.push(format!("{bracket}:x"));
            return (lines.join("\n"), false);
        }
        lines.push(format!("{bracket}:{}", if open.is_empty() { "0" } else { &open }));
    }
    (lines.join("\n"), open.is_empty())
}

impl Task for Brackets {
    fn name(&self) -> &'static str {
        "brackets"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let mut text: Vec<char> = matching(draw, usize::from(difficulty) + 1).chars().collect();
        if draw.chance(55) {
            // One change: a bracket lost, doubled, or of another kind (which may be the same, and then all matches).
            let place = draw.below(text.len());
            match draw.below(4) {
                0 => drop(text.remove(place)),
                1 => text.insert(place, text[place]),
                _ => {
                    let kind = draw.pick(&KINDS);
                    let opens = KINDS.iter().any(|kind| kind.0 == text[place]);
                    text[place] = if opens { kind.0 } else { kind.1 };
                }
            }
        }
        let key: String = text.into_iter().collect();
        let (thinking, matches) = steps(&key);
        let question = match draw.below(4) {
            0 => format!("Do these brackets match: {key}"),
            1 => format!("Are these brackets balanced: {key}"),
            2 => format!("Is this balanced: {key}"),
            _ => format!("Check the brackets: {key}"),
        };
        let answer = if matches { "yes" } else { "no" }.to_string();
        Problem { task: self.name(), difficulty, key, question, thinking, answer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&Brackets);
    }

    #[test]
    fn steps_follow_the_open_brackets() {
        assert_eq!(steps("([])"), ("(:(\n[:([\n]:(\n):0".into(), true));
        assert_eq!(steps("([)]"), ("(:(\n[:([\n):x".into(), false));
        assert_eq!(steps("]"), ("]:x".into(), false));
        assert_eq!(steps("(("), ("(:(\n(:((".into(), false));
    }

    /// Removing adjacent pairs is another way to the same answer.
    #[test]
    fn answers_agree_with_cancelling_pairs() {
        let mut yes = 0;
        for index in 0..600 {
            let problem = Brackets.generate(1, index, 1 + (index % 10) as u8);
            let mut text = problem.key.clone();
            while let Some(at) = ["()", "[]", "{}"].iter().find_map(|pair| text.find(pair)) {
                text.replace_range(at..at + 2, "");
            }
            assert_eq!(problem.answer == "yes", text.is_empty(), "{problem:?}");
            yes += usize::from(text.is_empty());
        }
        assert!((240..400).contains(&yes), "{yes}");
    }
}
