//! How far the reading of a long prompt is, on standard error; silent where that is no terminal.

use indicatif::{ProgressBar, ProgressStyle};
use std::time::{Duration, Instant};

/// What is read sooner needs no bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// A bar that comes when reading takes its time, and leaves nothing behind.
#[derive(Debug)]
pub struct ReadingBar {
    start: Instant,
    bar: Option<ProgressBar>,
}

impl ReadingBar {
    /// Reading begins now.
    pub fn begin() -> Self {
        Self { start: Instant::now(), bar: None }
    }

    /// So many of all tokens have been read.
    pub fn show(&mut self, read: usize, total: usize) {
        if self.bar.is_none() && self.start.elapsed() < PATIENCE {
            return;
        }
        self.bar.get_or_insert_with(|| bar(total)).set_position(read as u64);
    }

    /// Takes the bar away.
    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for ReadingBar {
    fn drop(&mut self) {
        self.clear();
    }
}

fn bar(total: usize) -> ProgressBar {
    let bar = ProgressBar::new(total as u64);
    match ProgressStyle::with_template("reading {bar:30} {human_pos}/{human_len} tokens {eta}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
