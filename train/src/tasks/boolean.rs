//! Expressions of true, false, not, and, or. Difficulty d: d + 1 operators, all inner ones in parentheses.
//! Answer: "true" or "false".
//!
//! Steps: the expression again and again, each time with all parentheses that hold no others replaced by their value.
//! ```text
//! (true and false) or (not false)
//! false or true
//! true
//! ```

use super::{Draw, Problem, Task};

/// See the file's head.
pub struct Boolean;

enum Expression {
    Value(bool),
    Not(Box<Expression>),
    And(Box<Expression>, Box<Expression>),
    Or(Box<Expression>, Box<Expression>),
}

use Expression::{And, Not, Or, Value};

impl Expression {
    /// A random expression of that many operators.
    fn draw(draw: &mut Draw, operators: usize) -> Self {
        if operators == 0 {
            return Value(draw.chance(50));
        }
        if draw.chance(30) {
            return Not(Box::new(Self::draw(draw, operators - 1)));
        }
        let left = draw.below(operators);
        let (a, b) = (Self::draw(draw, left), Self::draw(draw, operators - 1 - left));
        if draw.chance(50) { And(Box::new(a), Box::new(b)) } else { Or(Box::new(a), Box::new(b)) }
    }

    fn text(&self) -> String {
        let inner = |part: &Self| match part {
            Value(value) => value.to_string(),
            part => format!("({})", part.text()),
        };
        match self {
            Value(value) => value.to_string(),
            Not(a) => format!("not {}", inner(a)),
            And(a, b) => format!("{} and {}", inner(a), inner(b)),
            Or(a, b) => format!("{} or {}", inner(a), inner(b)),
        }
    }

    /// Replaces every operator whose operands are values.
    fn reduce(self) -> Self {
        match self {
            Value(value) => Value(value),
            Not(a) => match *a {
                Value(value) => Value(!value),
                a => Not(Box::new(a.reduce())),
            },
            And(a, b) => match (*a, *b) {
                (Value(a), Value(b)) => Value(a && b),
                (a, b) => And(Box::new(a.reduce()), Box::new(b.reduce())),
            },
            Or(a, b) => match (*a, *b) {
                (Value(a), Value(b)) => Value(a || b),
                (a, b) => Or(Box::new(a.reduce()), Box::new(b.reduce())),
            },
        }
    }
}

impl Task for Boolean {
    fn name(&self) -> &'static str {
        "boolean"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let mut expression = Expression::draw(draw, usize::from(difficulty) + 1);
        let key = expression.text();
        let mut lines = vec![key.clone()];
        while !matches!(expression, Value(_)) {
            expression = expression.reduce();
            lines.push(expression.text());
        }
        let question = match draw.below(4) {
            0 => format!("What is {key}?"),
            1 => format!("Evaluate {key}."),
            2 => format!("True or false: {key}?"),
            _ => format!("What is the value of {key}?"),
        };
        let answer = expression.text();
        Problem { task: self.name(), difficulty, key, question, thinking: lines.join("\n"), answer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&Boolean);
    }

    #[test]
    fn reduces_from_the_inside() {
        let value = |v| Box::new(Value(v));
        let expression = Or(Box::new(And(value(true), value(false))), Box::new(Not(value(false))));
        assert_eq!(expression.text(), "(true and false) or (not false)");
        let expression = expression.reduce();
        assert_eq!(expression.text(), "false or true");
        assert_eq!(expression.reduce().text(), "true");
    }

    #[test]
    fn both_answers_come_up() {
        let truths = (0..400).filter(|&index| Boolean.generate(1, index, 3).answer == "true").count();
        assert!((140..260).contains(&truths), "{truths}");
        let problem = Boolean.generate(1, 0, 3);
        let other = if problem.answer == "true" { "false" } else { "true" };
        assert!(!Boolean.verify(&problem, other));
        assert!(!Boolean.verify(&problem, &problem.answer.to_uppercase()));
    }
}
