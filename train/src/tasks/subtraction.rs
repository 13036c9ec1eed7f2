//! Subtraction with borrowing, never below zero. Difficulty d: from a number of 1 + d/2 digits, one of (d+1)/2 digits.
//! Answer: the difference in plain digits. Steps: [`super::columns`].

use super::{Draw, Problem, Task, columns};

/// See the file's head.
pub struct Subtraction;

impl Task for Subtraction {
    fn name(&self) -> &'static str {
        "subtraction"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let longer = 1 + u32::from(difficulty) / 2;
        let shorter = u32::from(difficulty).div_ceil(2);
        let (a, b) = (draw.digits(longer), draw.digits(shorter));
        let (a, b) = (a.max(b), a.min(b));
        let question = match draw.below(5) {
            0 => format!("What is {a}-{b}?"),
            1 => format!("What is {a} - {b}?"),
            2 => format!("Calculate {a}-{b}."),
            3 => format!("Subtract {b} from {a}."),
            _ => format!("{a}-{b}=?"),
        };
        Problem {
            task: self.name(),
            difficulty,
            key: format!("{a}-{b}"),
            question,
            thinking: columns::subtract(a, b),
            answer: (a - b).to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&Subtraction);
    }

    #[test]
    fn answer_is_the_difference() {
        for index in 0..100 {
            let problem = Subtraction.generate(1, index, 4);
            let (a, b) = problem.key.split_once('-').unwrap();
            let difference = a.parse::<u64>().unwrap() - b.parse::<u64>().unwrap();
            assert_eq!(problem.answer, difference.to_string());
            assert!(!Subtraction.verify(&problem, &format!("-{difference}")));
        }
    }
}
