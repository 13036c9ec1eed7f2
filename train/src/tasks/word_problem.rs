//! Stories of two steps: someone has things, and twice gets more or gives some away. Difficulty d: numbers up to 3 d + 2 and,
//! from 6 on, one more step for every 2. Answer: the number alone.
//!
//! Steps: one written sum or difference ([`super::columns`]) after another.

use super::{Draw, Problem, Task, columns};

/// See the file's head.
pub struct WordProblem;

const NAMES: [&str; 8] = ["Tom", "Anna", "Ben", "Lisa", "Max", "Mia", "Sam", "Eva"];
const THINGS: [&str; 8] = ["apples", "books", "coins", "eggs", "cards", "pens", "stamps", "balls"];
const MORE: [&str; 4] = ["gets", "buys", "finds", "receives"];
const LESS: [&str; 4] = ["gives away", "loses", "sells", "uses"];

impl Task for WordProblem {
    fn name(&self) -> &'static str {
        "word_problem"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let most = 3 * u64::from(difficulty) + 2;
        let changes = 2 + usize::from(difficulty.saturating_sub(4)) / 2;
        let (name, things) = (*draw.pick(&NAMES), *draw.pick(&THINGS));
        let start = draw.range(most / 2, most);
        let (mut have, mut thinking, mut events, mut key) = (start, Vec::new(), Vec::new(), start.to_string());
        for change in 0..changes {
            let more = have < 2 || draw.chance(50);
            let count = draw.range(2, if more { most.max(2) } else { have.min(most).max(2) });
            let verb = *draw.pick(if more { &MORE } else { &LESS });
            // "gets 5 more" the first time, "then" from the second on.
            let then = if change == 0 { "" } else { "then " };
            events.push(format!("{then}{verb} {count}"));
            thinking.push(if more { columns::add(have, count) } else { columns::subtract(have, count) });
            key.push_str(&format!("{}{count}", if more { '+' } else { '-' }));
            have = if more { have + count } else { have - count };
        }
        let story = format!("{name} has {start} {things}, {}", events.join(", "));
        let question = match draw.below(3) {
            0 => format!("{story}. How many {things} does {name} have now?"),
            1 => format!("{story}. How many {things} are left?"),
            _ => format!("{story}. How many {things} does {name} have in the end?"),
        };
        Problem {
            task: self.name(),
            difficulty,
            key,
            question,
            thinking: thinking.join("\n"),
            answer: have.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&WordProblem);
    }

    #[test]
    fn answer_follows_the_story() {
        for index in 0..300 {
            let problem = WordProblem.generate(1, index, 1 + (index % 10) as u8);
            let mut have = 0i64;
            for part in problem.key.replace('+', " ").replace('-', " -").split(' ') {
                have += part.parse::<i64>().unwrap();
                assert!(have >= 0, "{problem:?}");
            }
            assert_eq!(problem.answer, have.to_string());
            let told: Vec<_> =
                problem.question.split(|c: char| !c.is_ascii_digit()).filter(|s| !s.is_empty()).collect();
            assert_eq!(told.join(" "), problem.key.replace(['+', '-'], " "));
        }
    }
}
