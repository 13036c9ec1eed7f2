//! Sorting numbers up or down. Difficulty d: 3 + d/3 numbers of up to 1 + (d+1)/3 digits.
//! Answer: the numbers with ", " between them.
//!
//! Steps: the next one is picked out of those left, and the rest is copied.
//! ```text
//! - 45 12 31:12
//! - 45 31:31
//! - 45:45
//! ```

use super::{Draw, Problem, Task};

/// See the file's head.
pub struct SortNumbers;

/// Selection sort written out; `before` says which of two comes first. Returns the steps and the sorted items.
pub(super) fn selection<T: ToString + Copy>(items: &[T], mut before: impl FnMut(&T, &T) -> bool) -> (String, Vec<T>) {
    let (mut left, mut lines, mut sorted) = (items.to_vec(), Vec::new(), Vec::new());
    while !left.is_empty() {
        let mut next = 0;
        for index in 1..left.len() {
            if before(&left[index], &left[next]) {
                next = index;
            }
        }
        let listed: Vec<_> = left.iter().map(T::to_string).collect();
        // Words are one token with the space before them: none is left at the head of a line without it.
        let space = if listed[next].starts_with(|c: char| c.is_ascii_digit()) { "" } else { " " };
        lines.push(format!("- {}:{space}{}", listed.join(" "), listed[next]));
        sorted.push(left.remove(next));
    }
    (lines.join("\n"), sorted)
}

impl Task for SortNumbers {
    fn name(&self) -> &'static str {
        "sort_numbers"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let count = 3 + usize::from(difficulty) / 3;
        let digits = 1 + (u32::from(difficulty) + 1) / 3;
        let mut numbers: Vec<u64> = Vec::new();
        while numbers.len() < count {
            let fewer = digits > 1 && draw.chance(20);
            let number = draw.digits(if fewer { digits - 1 } else { digits });
            if !numbers.contains(&number) {
                numbers.push(number);
            }
        }
        let up = draw.chance(60);
        let (thinking, sorted) = selection(&numbers, |a, b| if up { a < b } else { a > b });
        let list = |numbers: &[u64]| numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let given = list(&numbers);
        let question = match (up, draw.below(3)) {
            (true, 0) => format!("Sort these numbers: {given}."),
            (true, 1) => format!("Sort from smallest to largest: {given}."),
            (true, _) => format!("Put in ascending order: {given}."),
            (false, 0) => format!("Sort these numbers in descending order: {given}."),
            (false, 1) => format!("Sort from largest to smallest: {given}."),
            (false, _) => format!("Put in descending order: {given}."),
        };
        Problem {
            task: self.name(),
            difficulty,
            key: format!("{}{given}", if up { '<' } else { '>' }),
            question,
            thinking,
            answer: list(&sorted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&SortNumbers);
    }

    #[test]
    fn steps_pick_and_copy() {
        let (steps, sorted) = selection(&[45, 12, 31], |a, b| a < b);
        assert_eq!(steps, "- 45 12 31:12\n- 45 31:31\n- 45:45");
        assert_eq!(sorted, [12, 31, 45]);
    }

    #[test]
    fn answer_is_sorted_as_asked() {
        for index in 0..100 {
            let problem = SortNumbers.generate(1, index, 5);
            let mut numbers: Vec<u64> = problem.key[1..].split(", ").map(|n| n.parse().unwrap()).collect();
            numbers.sort_unstable();
            if problem.key.starts_with('>') {
                numbers.reverse();
            }
            let text: Vec<_> = numbers.iter().map(u64::to_string).collect();
            assert_eq!(problem.answer, text.join(", "));
            assert!(!SortNumbers.verify(&problem, &text.join(",")));
            numbers.swap(0, 1);
            let swapped: Vec<_> = numbers.iter().map(u64::to_string).collect();
            assert!(!SortNumbers.verify(&problem, &swapped.join(", ")));
        }
    }
}
