//! The live view of a run, on stderr: a block of a few lines that is drawn over in place, messages above it.
//!
//! Different here: the terminal is never put into another mode (no alternate screen, no raw input, the cursor stays
//! visible). There is nothing to undo, so the end of the program, a panic and Ctrl-C all leave a clean terminal, with
//! the last state of the block in its history, and Ctrl-C stays the signal that it is. Where stderr is no terminal, a
//! step is one plain line.

mod block;
mod draw;

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use console::Term;

use crate::metrics::RlMetrics;
use block::Block;
use draw::Painter;

/// Between two drawings of a phase's progress.
const PAUSE: Duration = Duration::from_millis(100);

/// A handle on the live view; clones draw on the same lines, from any thread (a signal handler's too, by
/// [`Self::message`]). What cannot be drawn is left out: a run does not end because its terminal went away.
#[derive(Clone)]
pub struct View {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    out: Box<dyn Write + Send>,
    /// None where stderr is no terminal.
    painter: Option<Painter>,
    size: fn() -> Option<(u16, u16)>,
    block: Block,
    drawn: Option<Instant>,
    closed: bool,
}

impl View {
    /// A view on stderr. `steps` is the run's length where it is known; `history` the steps of a resumed run.
    pub fn stderr(steps: Option<u64>, history: &[RlMetrics]) -> Self {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let terminal = console::user_attended_stderr() && !dumb;
        Self::new(Box::new(io::stderr()), terminal, || Term::stderr().size_checked(), steps, history)
    }

    fn new(
        out: Box<dyn Write + Send>,
        terminal: bool,
        size: fn() -> Option<(u16, u16)>,
        steps: Option<u64>,
        history: &[RlMetrics],
    ) -> Self {
        let mut block = Block::new(steps);
        history.iter().for_each(|m| block.step(m));
        let painter = terminal.then(Painter::default);
        let inner = Inner { out, painter, size, block, drawn: None, closed: false };
        Self { inner: Arc::new(Mutex::new(inner)) }
    }

    /// What the run is doing (`rollout`, `reward`, `train`, `eval`, `checkpoint`) and how much of it is done.
    pub fn phase(&self, name: &str, done: u64, total: u64) {
        let mut inner = self.lock();
        let new = inner.block.phase(name, done, total);
        if new || inner.drawn.is_none_or(|at| at.elapsed() >= PAUSE) {
            inner.draw(&[]);
        }
    }

    /// A step is done.
    pub fn step(&self, metrics: &RlMetrics) {
        let mut inner = self.lock();
        inner.block.step(metrics);
        if inner.painter.is_some() {
            inner.draw(&[]);
        } else {
            let line = inner.block.line();
            inner.plain(&line);
        }
    }

    /// A line that stays.
    pub fn message(&self, text: &str) {
        let mut inner = self.lock();
        if inner.painter.is_some() && !inner.closed {
            inner.draw(&text.lines().collect::<Vec<_>>());
        } else {
            inner.plain(text);
        }
    }

    /// Draws the last state and leaves it; from now on messages are plain lines. Dropping the view does no more.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.block.idle();
        inner.draw(&[]);
        inner.closed = true;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A thread that panicked while it drew leaves a block that the next drawing replaces.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn draw(&mut self, messages: &[&str]) {
        let (Some(painter), false) = (&mut self.painter, self.closed) else { return };
        let (rows, columns) = (self.size)().unwrap_or((24, 80));
        // The last column stays free, so that no line wraps; the line under the block is the cursor's.
        let buffer = self.block.render(columns.saturating_sub(1), rows.saturating_sub(1));
        let frame = painter.frame(&buffer, messages, (rows, columns));
        let _ = self.out.write_all(frame.as_bytes()).and_then(|()| self.out.flush());
        self.drawn = Some(Instant::now());
    }

    fn plain(&mut self, text: &str) {
        let _ = writeln!(self.out, "{text}");
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Shared {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn row(step: u64) -> RlMetrics {
        RlMetrics {
            step,
            reward: step as f64 / 100.0,
            pass_rate: 0.5,
            entropy: 0.25,
            response_length_mean: 120.0,
            elapsed_s: step as f64 * 2.0,
            pass_rate_by_task: ["addition", "clock", "weekday"].map(|t| (t.to_owned(), 0.5)).into(),
            ..RlMetrics::default()
        }
    }

    /// What a terminal of endless height shows after `text`; only what a [`Painter`] sends is understood.
    fn screen(text: &str) -> Vec<String> {
        let mut lines: Vec<Vec<char>> = vec![Vec::new()];
        let (mut y, mut x) = (0, 0);
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            match c {
                '\r' => x = 0,
                '\n' => {
                    (x, y) = (0, y + 1);
                    lines.resize(lines.len().max(y + 1), Vec::new());
                }
                '\x1b' => {
                    assert_eq!(chars.next(), Some('['));
                    let mut number = String::new();
                    let letter = loop {
                        match chars.next().unwrap() {
                            c if c.is_ascii_alphabetic() => break c,
                            c => number.push(c),
                        }
                    };
                    match letter {
                        'A' => y -= number.parse::<usize>().unwrap(),
                        'K' => lines[y].truncate(x),
                        'J' => {
                            lines[y].truncate(x);
                            lines.truncate(y + 1);
                        }
                        'm' => {}
                        other => panic!("{other}"),
                    }
                }
                c => {
                    let line = &mut lines[y];
                    line.resize(line.len().max(x + 1), ' ');
                    line[x] = c;
                    x += 1;
                }
            }
        }
        lines.iter().map(|l| l.iter().collect::<String>().trim_end().to_owned()).collect()
    }

    #[test]
    fn a_file_gets_one_line_a_step() {
        let out = Shared::default();
        let view = View::new(Box::new(out.clone()), false, || None, Some(10), &[]);
        view.message("started");
        view.phase("rollout", 1, 8);
        view.step(&row(1));
        view.step(&row(2));
        view.close();
        view.message("done");
        let text = out.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert_eq!((lines[0], lines[3]), ("started", "done"));
        assert!(lines[2].starts_with("step 2/10: reward 0.0200, pass 0.500"), "{text}");
        assert!(!text.contains('\x1b'));
        assert!(!text.contains("NaN"), "what was not measured is not named: {text}");
    }

    #[test]
    fn a_terminal_shows_one_block_with_the_messages_above_it() {
        let out = Shared::default();
        let view = View::new(Box::new(out.clone()), true, || Some((24, 80)), Some(100), &[row(1), row(2)]);
        view.phase("rollout", 3, 12);
        view.message("a word");
        (3..40).for_each(|s| view.step(&row(s)));
        view.phase("train", 1, 16);
        view.clone().message("another\nin two lines");
        view.phase("eval", 1, 4);
        let shown = screen(&out.text());
        assert_eq!(shown[..3], ["a word", "another", "in two lines"]);
        let all = shown.join("\n");
        assert_eq!(all.matches("step 39/100").count(), 1, "{all}");
        assert!(all.contains("eval") && all.contains("1/4") && !all.contains("rollout  "), "{all}");
        for name in ["reward", "entropy", "length", "addition", "clock", "weekday"] {
            assert_eq!(all.matches(name).count(), 1, "{name}: {all}");
        }
        assert!(all.contains("2 min left"), "61 steps of 2 s: {all}");
        assert!(all.contains('█'), "a curve: {all}");
        assert!(shown.iter().all(|l| l.chars().count() < 80));

        view.close();
        view.message("the end");
        let shown = screen(&out.text());
        assert_eq!(shown.last().unwrap(), "", "the cursor is on a line of its own");
        assert_eq!(shown[shown.len() - 2], "the end");
    }

    #[test]
    fn a_small_terminal_gets_what_fits() {
        let out = Shared::default();
        let view = View::new(Box::new(out.clone()), true, || Some((4, 20)), None, &[]);
        view.phase("rollout", 0, 0);
        view.step(&row(1));
        view.close();
        let shown = screen(&out.text());
        assert!(shown.len() <= 4 && shown.iter().all(|l| l.chars().count() < 20), "{shown:?}");
    }
}
