//! Linear equations in x with whole solutions. Difficulty 1: x + b = c or a x = c; 2: x ± b = c; 3: a x + b = c with a up to 5;
//! 4: a up to 9; 5: a x ± b = c; above, solutions and numbers grow. Answer: the number alone.
//!
//! Steps: the product by [`super::columns`], then the quotient, digit by digit with its remainder where x has several
//! digits. For 3x+4=19 and 7x=98:
//! ```text
//! 19-4               98/7
//! 09-4-0=5 5         9/7=1 r2
//! 01-0-0=1 15        28/7=4 r0
//! =15                =14
//! 15/3=5
//! ```

use super::{Draw, Problem, Task, columns};
use std::fmt::Write;

/// See the file's head.
pub struct Equation;

/// The steps of `c / a`, which leaves no remainder.
fn divide(c: u64, a: u64) -> String {
    if c / a < 10 {
        return format!("{c}/{a}={}", c / a);
    }
    let (mut text, mut rest) = (format!("{c}/{a}\n"), 0);
    for digit in c.to_string().bytes() {
        let part = 10 * rest + u64::from(digit - b'0');
        rest = part % a;
        let _ = writeln!(text, "{part}/{a}={} r{rest}", part / a);
    }
    let _ = write!(text, "={}", c / a);
    text
}

impl Task for Equation {
    fn name(&self) -> &'static str {
        "equation"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let x = draw.range(1, [9, 12, 6, 9, 12, 20, 40, 99, 250, 999][usize::from(difficulty) - 1]);
        let a = match difficulty {
            1 if draw.chance(50) => draw.range(2, 9),
            1 | 2 => 1,
            3 => draw.range(2, 5),
            _ => draw.range(2, 9),
        };
        let product = a * x;
        let minus = (difficulty == 2 || difficulty > 4) && product > 1 && draw.chance(40);
        let most = [9, 12, 9, 9, 30, 40, 60, 99, 250, 999][usize::from(difficulty) - 1];
        let mut b = if difficulty == 1 && a > 1 { 0 } else { draw.range(1, most) };
        if minus {
            b = b.min(product - 1);
        }
        let term = if a == 1 { "x".to_string() } else { format!("{a}x") };
        let (equation, step) = match (b, minus) {
            (0, _) => (format!("{term}={product}"), None),
            (_, true) => (format!("{term}-{b}={}", product - b), Some(columns::add(product - b, b))),
            (_, false) => (format!("{term}+{b}={}", product + b), Some(columns::subtract(product + b, b))),
        };
        let division = (a > 1).then(|| divide(product, a));
        let thinking = step.into_iter().chain(division).collect::<Vec<_>>().join("\n");
        let question = match draw.below(4) {
            0 => format!("Solve {equation}."),
            1 => format!("Solve for x: {equation}"),
            2 => format!("What is x if {equation}?"),
            _ => format!("{equation}. Find x."),
        };
        Problem { task: self.name(), difficulty, key: equation, question, thinking, answer: x.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&Equation);
    }

    #[test]
    fn division_is_written_out() {
        assert_eq!(divide(15, 3), "15/3=5");
        assert_eq!(divide(98, 7), "98/7\n9/7=1 r2\n28/7=4 r0\n=14");
    }

    /// The answer put back into the equation solves it.
    #[test]
    fn answer_solves_the_equation() {
        for index in 0..500 {
            let problem = Equation.generate(1, index, 1 + (index % 10) as u8);
            let x: i64 = problem.answer.parse().unwrap();
            let (left, right) = problem.key.split_once('=').unwrap();
            let (a, rest) = left.split_once('x').unwrap();
            let a = if a.is_empty() { 1 } else { a.parse::<i64>().unwrap() };
            let b = if rest.is_empty() { 0 } else { rest.parse::<i64>().unwrap() };
            assert_eq!(a * x + b, right.parse::<i64>().unwrap(), "{problem:?}");
            assert!(!Equation.verify(&problem, &format!("x={x}")));
        }
    }
}
