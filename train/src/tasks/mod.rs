//! Problems that can be checked: what m1-nano is trained on, and what CISPO is rewarded for.
//!
//! A task is one file that draws a question, the steps of a solution and its answer, all from (seed, index,
//! difficulty). The steps are written for a very small model: each line is a copy, one fact about single digits, or one move
//! along a list. Every task has one canonical answer, and [`Task::verify`] compares text with it: nothing that a model
//! wrote is ever evaluated.
//!
//! To add a task: a file with a unit struct that implements [`Task`], and its line in [`all`].

pub mod addition;
pub mod boolean;
pub mod brackets;
pub mod clock;
mod columns;
pub mod compare;
pub mod counting;
mod draw;
pub mod equation;
pub mod sort_numbers;
pub mod sort_words;
pub mod subtraction;
pub mod weekday;
pub mod word_problem;
mod words;

pub use draw::{Draw, text_hash};

/// The highest difficulty; the lowest is 1.
pub const MAX_DIFFICULTY: u8 = 10;

/// One question with its worked solution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The name of the task that drew it.
    pub task: &'static str,
    /// 1 to [`MAX_DIFFICULTY`].
    pub difficulty: u8,
    /// What is asked, apart from its wording: two problems with one key are the same problem. Decides the split of
    /// training and evaluation ([`crate::data`]).
    pub key: String,
    /// What the user says.
    pub question: String,
    /// The steps, one a line, without the `<think>` tags.
    pub thinking: String,
    /// The canonical answer.
    pub answer: String,
}

impl Problem {
    /// The reply that a perfect assistant gives, laid out as M1 writes its own.
    pub fn reply(&self) -> String {
        format!("<think>\n{}\n</think>\n\n{}", self.thinking, self.answer)
    }
}

/// A kind of problem.
pub trait Task: Sync {
    /// The name on the command line and in reports; also part of the random stream.
    fn name(&self) -> &'static str;

    /// Draws one problem. All randomness comes from `draw`; `difficulty` is within 1..=[`MAX_DIFFICULTY`].
    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem;

    /// The problem number `index` of the stream `seed`: the same three numbers give the same problem, for ever.
    /// A difficulty outside 1..=[`MAX_DIFFICULTY`] counts as the nearest within.
    fn generate(&self, seed: u64, index: u64, difficulty: u8) -> Problem {
        let difficulty = difficulty.clamp(1, MAX_DIFFICULTY);
        let mut draw = Draw::new(seed, index, &format!("task/{}/{difficulty}", self.name()));
        self.draw(&mut draw, difficulty)
    }

    /// Whether `reply` ends in exactly the canonical answer; see [`answer_of`].
    fn verify(&self, problem: &Problem, reply: &str) -> bool {
        answer_of(reply) == Some(problem.answer.as_str())
    }
}

/// The answer in a reply: what stands after `</think>`, without surrounding white space and without one full stop at
/// the end. A reply without any thinking is all answer. `None` where there is no answer to judge: thinking that never
/// ends, tags that occur twice or out of order, text before `<think>`, or nothing after the thinking.
pub fn answer_of(reply: &str) -> Option<&str> {
    let reply = reply.trim();
    let answer = match reply.split_once("</think>") {
        Some((thinking, answer)) => {
            // The opening tag may already have been part of the prompt.
            let thinking = thinking.strip_prefix("<think>").unwrap_or(thinking);
            if thinking.contains("<think>") {
                return None;
            }
            answer
        }
        None => reply,
    };
    if answer.contains("<think>") || answer.contains("</think>") {
        return None;
    }
    let answer = answer.trim();
    let answer = answer.strip_suffix('.').unwrap_or(answer);
    (!answer.is_empty() && !answer.ends_with(char::is_whitespace)).then_some(answer)
}

/// Every task, in the order of reports.
pub fn all() -> &'static [&'static dyn Task] {
    &[
        &addition::Addition,
        &subtraction::Subtraction,
        &compare::Compare,
        &sort_numbers::SortNumbers,
        &sort_words::SortWords,
        &counting::Counting,
        &boolean::Boolean,
        &brackets::Brackets,
        &weekday::Weekday,
        &clock::Clock,
        &equation::Equation,
        &word_problem::WordProblem,
    ]
}

/// The task of that name.
pub fn by_name(name: &str) -> Option<&'static dyn Task> {
    all().iter().copied().find(|task| task.name() == name)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::HashSet;

    /// What holds for every task: determinism, gold replies accepted, near misses refused, growth with difficulty.
    pub(crate) fn check(task: &dyn Task) {
        let mut sizes = Vec::new();
        for difficulty in 1..=MAX_DIFFICULTY {
            let mut size = 0;
            let mut keys = HashSet::new();
            for index in 0..200 {
                let problem = task.generate(7, index, difficulty);
                assert_eq!(problem, task.generate(7, index, difficulty));
                assert_eq!((problem.task, problem.difficulty), (task.name(), difficulty));
                assert!(task.verify(&problem, &problem.reply()), "{problem:?}");
                assert!(task.verify(&problem, &format!("{}.\n", problem.reply())));
                assert!(task.verify(&problem, &problem.answer), "an answer without thinking counts");
                for wrong in near_misses(&problem.answer) {
                    let reply = format!("<think>\n{}\n</think>\n\n{wrong}", problem.thinking);
                    assert!(!task.verify(&problem, &reply), "{wrong:?} for {problem:?}");
                }
                let unfinished = format!("<think>\n{}\n{}", problem.thinking, problem.answer);
                assert!(!task.verify(&problem, &unfinished));
                size += problem.question.len() + problem.thinking.len();
                keys.insert(problem.key);
            }
            assert!(keys.len() >= 30, "{} has {} problems at {difficulty}", task.name(), keys.len());
            sizes.push(size);
        }
        let first = |seed| task.generate(seed, 0, 5);
        assert!((1..9).any(|seed| first(seed).question != first(0).question), "the seed matters");
        assert!(sizes[2] > sizes[0] && sizes[4] > sizes[2] && sizes[6] > sizes[4] && sizes[9] > sizes[6], "{sizes:?}");
        assert_eq!(task.generate(7, 0, 0), task.generate(7, 0, 1));
        assert_eq!(task.generate(7, 0, 200), task.generate(7, 0, 10));
    }

    fn near_misses(answer: &str) -> Vec<String> {
        vec![
            String::new(),
            format!("{answer}0"),
            format!("{answer}.."),
            format!("{answer} {answer}"),
            format!("The answer is {answer}"),
            format!("{answer}</think>{answer}"),
            format!("<think>{answer}"),
            answer[1..].to_string(),
            answer[..answer.len() - 1].to_string(),
        ]
    }

    #[test]
    fn names_are_unique_and_found() {
        let names: HashSet<_> = all().iter().map(|task| task.name()).collect();
        assert_eq!(names.len(), all().len());
        assert!(all().iter().all(|task| by_name(task.name()).is_some_and(|found| found.name() == task.name())));
        assert!(by_name("no such task").is_none());
    }

    #[test]
    fn answers_are_cut_out_strictly() {
        assert_eq!(answer_of("<think>\n1\n</think>\n\n42."), Some("42"));
        assert_eq!(answer_of("1\n</think>\n\n 42 \n"), Some("42"));
        assert_eq!(answer_of("<think>\n\n</think>\n\n42"), Some("42"));
        assert_eq!(answer_of("42"), Some("42"));
        assert_eq!(answer_of("<think>\n42"), None);
        assert_eq!(answer_of("42 <think>\n1\n</think>\n\n42"), None);
        assert_eq!(answer_of("<think>1</think>"), None);
        assert_eq!(answer_of("<think>1</think>."), None);
        assert_eq!(answer_of("<think>1</think>42 ."), None);
        assert_eq!(answer_of("<think>1</think>42</think>42"), None);
        assert_eq!(answer_of(""), None);
    }
}
