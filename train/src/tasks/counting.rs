//! Counting a letter in words, or a kind of item in a list. Difficulty d: a word of d + 1 to d + 3 letters (from 7 on two words,
//! from 9 on three), or 2 + d items. Answer: the count.
//!
//! Steps: letter by letter, or item by item, with the count so far: ` b0 e0 r1 r2 y2` for r in "berry".

use super::words::WORDS;
use super::{Draw, Problem, Task};

/// See the file's head.
pub struct Counting;

const KINDS: [&str; 8] = ["red", "blue", "green", "white", "black", "pink", "gold", "gray"];

/// Every item with how many so far equal `wanted`; the last count.
fn running<'a>(items: impl Iterator<Item = &'a str>, wanted: &str) -> (String, usize) {
    let (mut text, mut count) = (String::from("-"), 0);
    for item in items {
        count += usize::from(item == wanted);
        text.push_str(&format!(" {item}{count}"));
    }
    (text, count)
}

fn letters(draw: &mut Draw, difficulty: u8) -> (String, String, String, usize) {
    let length = usize::from(difficulty) + 1..=usize::from(difficulty) + 3;
    let fitting: Vec<_> = WORDS
        .iter()
        .filter(|word| if difficulty < 7 { length.contains(&word.len()) } else { word.len() >= 5 })
        .collect();
    let parts = [1, 2, 3][usize::from(difficulty >= 7) + usize::from(difficulty >= 9)];
    let text = (0..parts).map(|_| **draw.pick(&fitting)).collect::<Vec<_>>().join(" ");
    let all: Vec<_> = text.chars().filter(|letter| *letter != ' ').collect();
    // Three times in four a letter of the word, and then one that repeats if the first draw did not.
    let mut letter = *draw.pick(&all);
    if all.iter().filter(|other| **other == letter).count() == 1 {
        letter = *draw.pick(&all);
    }
    if draw.chance(20) {
        letter = *draw.pick(b"aeinorst") as char;
    }
    let question = match draw.below(4) {
        0 => format!("How many {letter} are in {text}?"),
        1 => format!("How many times does {letter} occur in {text}?"),
        2 => format!("Count the letter {letter} in {text}."),
        _ => format!("How often does the letter {letter} appear in {text}?"),
    };
    let spelled: Vec<_> = all.iter().map(char::to_string).collect();
    let (thinking, count) = running(spelled.iter().map(String::as_str), &letter.to_string());
    (format!("{letter} in {text}"), question, thinking, count)
}

fn items(draw: &mut Draw, difficulty: u8) -> (String, String, String, usize) {
    let mut kinds = KINDS;
    draw.shuffle(&mut kinds);
    let kinds = &kinds[..2 + usize::from(difficulty) / 4];
    let list: Vec<_> = (0..2 + usize::from(difficulty)).map(|_| *draw.pick(kinds)).collect();
    let wanted = *draw.pick(kinds);
    let text = list.join(", ");
    let question = match draw.below(3) {
        0 => format!("How many {wanted} are in this list: {text}?"),
        1 => format!("Count {wanted} in: {text}."),
        _ => format!("How many times does {wanted} occur in this list: {text}?"),
    };
    let (thinking, count) = running(list.into_iter(), wanted);
    (format!("{wanted} in {text}"), question, thinking, count)
}

impl Task for Counting {
    fn name(&self) -> &'static str {
        "counting"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let kind = if draw.chance(60) { letters } else { items };
        let (key, question, thinking, count) = kind(draw, difficulty);
        Problem { task: self.name(), difficulty, key, question, thinking, answer: count.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&Counting);
    }

    #[test]
    fn counts_are_right() {
        assert_eq!(running("berry".split("").filter(|s| !s.is_empty()), "r"), ("- b0 e0 r1 r2 y2".into(), 2));
        for index in 0..200 {
            let problem = Counting.generate(1, index, 1 + (index % 10) as u8);
            let (wanted, text) = problem.key.split_once(" in ").unwrap();
            let count = match wanted.len() {
                1 => text.matches(wanted).count(),
                _ => text.split(", ").filter(|item| *item == wanted).count(),
            };
            assert_eq!(problem.answer, count.to_string(), "{problem:?}");
            assert!(!Counting.verify(&problem, &(count + 1).to_string()));
        }
    }
}
