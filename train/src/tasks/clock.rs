//! The time of day, on the 24-hour clock, after one or several spans. Difficulty 1: up to 9 hours; 2: up to 14 hours; 3: 5 to
//! 55 minutes; 4: hours and minutes, in steps of 5; 5: any; 6 to 10: two to six such spans. Answer: hh:mm.
//!
//! Steps: a span's minutes ([`super::columns`]) and the hour that they may fill, then the hours and the day that they may
//! fill; a span of whole hours has no minutes. For 23:45 and 1 hour 50 minutes:
//! ```text
//! 45+50
//! 5+0+0=05 5
//! 4+5+0=09 95
//! =95
//! 95-60=35
//! 23+1+1=25
//! 25-24=01
//! 01:35
//! ```

use super::{Draw, Problem, Task, columns};
use std::fmt::Write;

/// See the file's head.
pub struct Clock;

fn time(minutes: u64) -> String {
    format!("{:02}:{:02}", minutes / 60 % 24, minutes % 60)
}

/// Minutes as "2 hours 5 minutes".
fn span(minutes: u64) -> String {
    let unit = |count, name| match count {
        0 => String::new(),
        1 => format!("1 {name}"),
        _ => format!("{count} {name}s"),
    };
    [unit(minutes / 60, "hour"), unit(minutes % 60, "minute")].join(" ").trim().to_string()
}

/// The steps from the time `start` (minutes after midnight) over `minutes`, ending in a line with the new time.
fn steps(start: u64, minutes: u64) -> String {
    let (mut text, mut carry) = (String::new(), 0);
    if !minutes.is_multiple_of(60) {
        let sum = start % 60 + minutes % 60;
        text = columns::add(start % 60, minutes % 60);
        text.push('\n');
        if sum >= 60 {
            carry = 1;
            let _ = writeln!(text, "{sum}-60={:02}", sum - 60);
        }
    }
    let hours = start / 60 + minutes / 60 + carry;
    let _ = writeln!(text, "{:02}+{}+{carry}={hours:02}", start / 60, minutes / 60);
    if hours >= 24 {
        let _ = writeln!(text, "{hours}-24={:02}", hours - 24);
    }
    text.push_str(&time(start + minutes));
    text
}

impl Task for Clock {
    fn name(&self) -> &'static str {
        "clock"
    }

    fn draw(&self, draw: &mut Draw, difficulty: u8) -> Problem {
        let spans: Vec<u64> = (0..1 + usize::from(difficulty.saturating_sub(5)))
            .map(|_| match difficulty {
                1 => 60 * draw.range(1, 9),
                2 => 60 * draw.range(1, 14),
                3 => 5 * draw.range(1, 11),
                4 => 60 * draw.range(0, 9) + 5 * draw.range(1, 11),
                _ => 60 * draw.range(0, 9) + draw.range(1, 59),
            })
            .collect();
        let start = if difficulty < 5 { 5 * draw.range(0, 287) } else { draw.range(0, 1439) };
        let (mut now, mut thinking) = (start, Vec::new());
        for minutes in &spans {
            thinking.push(steps(now, *minutes));
            now = (now + minutes) % 1440;
        }
        let given = spans.iter().map(|&minutes| span(minutes)).collect::<Vec<_>>().join(" and then ");
        let start = time(start);
        let question = match draw.below(4) {
            0 => format!("It is {start}. What time will it be in {given}?"),
            1 => format!("What time is it {given} after {start}?"),
            2 => format!("The time is {start}. What time is it {given} later?"),
            _ => format!("A train leaves at {start} and travels {given}. When does it arrive?"),
        };
        Problem {
            task: self.name(),
            difficulty,
            key: format!("{start} {given}"),
            question,
            thinking: thinking.join("\n"),
            answer: time(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_every_task_holds() {
        crate::tasks::tests::check(&Clock);
    }

    #[test]
    fn steps_carry_into_hours_and_days() {
        assert_eq!(
            steps(23 * 60 + 45, 110),
            "45+50\n5+0+0=05 5\n4+5+0=09 95\n=95\n95-60=35\n23+1+1=25\n25-24=01\n01:35"
        );
        assert_eq!(steps(9 * 60 + 5, 180), "09+3+0=12\n12:05");
        assert_eq!(span(61), "1 hour 1 minute");
        assert_eq!(span(120), "2 hours");
        for (start, minutes) in (0..1440).step_by(7).flat_map(|start| [(start, 1), (start, 599), (start, 300)]) {
            assert!(steps(start, minutes).ends_with(&format!("\n{}", time((start + minutes) % 1440))));
        }
    }
}
