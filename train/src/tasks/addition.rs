//! Addition with carries. Difficulty d: one number of 1 + d/2 digits and one of (d+1)/2, in either order.
//! Answer: the sum in plain digits. Steps: [`super::columns`].

use super::{Draw, Problem, Task, columns};

/// See the file's head.
pub struct Addition;

impl Task for Addition {
    fn name(&self) -> &'static str {
        "addition"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let longer = 1 + u32::from(difficulty) / 2;
        let shorter = u32::from(difficulty).div_ceil(2);
        let (mut a, mut b) = (draw.digits(longer), draw.digits(shorter));
        if draw.chance(50) {
            (a, b) = (b, a);
        }
        let question = match draw.below(5) {
            0 => format!("What is {a}+{b}?"),
            1 => format!("What is {a} + {b}?"),
            2 => format!("Calculate {a}+{b}."),
            3 => format!("Add {a} and {b}."),
            _ => format!("{a}+{b}=?"),
        };
        Problem {
            task: self.name(),
            difficulty,
            key: format!("{a}+{b}"),
            question,
            thinking: columns::add(a, b),
            answer: (a + b).to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&Addition);
    }

    #[test]
    fn answer_is_the_sum() {
        for index in 0..100 {
            let problem = Addition.generate(1, index, 5);
            let (a, b) = problem.key.split_once('+').unwrap();
            let sum = a.parse::<u64>().unwrap() + b.parse::<u64>().unwrap();
            assert_eq!(problem.answer, sum.to_string());
            assert!(!Addition.verify(&problem, &(sum + 1).to_string()));
            assert!(!Addition.verify(&problem, &format!("0{sum}")));
        }
    }
}
