//! Sorting words alphabetically. Difficulty d: 3 + d/2 words; up to 5 their first letters differ, above they need not.
//! Answer: the words with ", " between them. Steps: the selection of [`super::sort_numbers`].

use super::sort_numbers::selection;
use super::words::WORDS;
use super::{Draw, Problem, Task};

/// See the file's head.
pub struct SortWords;

impl Task for SortWords {
    fn name(&self) -> &'static str {
        "sort_words"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let count = 3 + usize::from(difficulty) / 2;
        let mut words: Vec<&str> = Vec::new();
        while words.len() < count {
            let word = *draw.pick(&WORDS);
            let clash = |other: &&str| {
                if difficulty <= 5 { other[..1] == word[..1] } else { *other == word }
            };
            if !words.iter().any(clash) {
                words.push(word);
            }
        }
        let (thinking, sorted) = selection(&words, |a, b| a < b);
        let given = words.join(", ");
        let question = match draw.below(4) {
            0 => format!("Sort these words: {given}."),
            1 => format!("Sort alphabetically: {given}."),
            2 => format!("Put in alphabetical order: {given}."),
            _ => format!("What is the alphabetical order of {given}?"),
        };
        Problem { task: self.name(), difficulty, key: given, question, thinking, answer: sorted.join(", ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&SortWords);
    }

    #[test]
    fn answer_is_sorted() {
        for (index, difficulty) in (0..100).flat_map(|index| [(index, 3), (index, 9)]) {
            let problem = SortWords.generate(1, index, difficulty);
            let mut words: Vec<_> = problem.key.split(", ").collect();
            words.sort_unstable();
            assert_eq!(problem.answer, words.join(", "));
            assert!(problem.thinking.lines().last().unwrap().ends_with(words[words.len() - 1]));
            words.swap(1, 2);
            assert!(!SortWords.verify(&problem, &words.join(", ")));
        }
    }
}
