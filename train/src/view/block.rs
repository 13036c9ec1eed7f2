//! What the block says: where the run is, how it goes, task by task.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize};
use ratatui::symbols;
use ratatui::text::{Line, Span};
use ratatui::widgets::{LineGauge, Sparkline, Widget};

use crate::metrics::RlMetrics;

/// Steps that the curves keep; more than any terminal has columns.
const CURVE: usize = 1000;
/// Steps that the time left is judged by.
const PACE: usize = 20;
/// Lines of tasks, at most.
const TASK_LINES: usize = 5;

/// The state of the view.
#[derive(Debug, Default)]
pub(super) struct Block {
    steps: Option<u64>,
    last: RlMetrics,
    curves: [Vec<f64>; 4],
    seconds: Vec<f64>,
    held_out: Option<f64>,
    phase: Option<Phase>,
}

#[derive(Debug)]
struct Phase {
    name: String,
    done: u64,
    total: u64,
    since: Instant,
}

impl Block {
    pub(super) fn new(steps: Option<u64>) -> Self {
        Self { steps, ..Self::default() }
    }

    /// Whether this is another phase than the last.
    pub(super) fn phase(&mut self, name: &str, done: u64, total: u64) -> bool {
        match &mut self.phase {
            Some(phase) if phase.name == name && done >= phase.done => {
                (phase.done, phase.total) = (done, total);
                false
            }
            _ => {
                self.phase = Some(Phase { name: name.to_owned(), done, total, since: Instant::now() });
                true
            }
        }
    }

    pub(super) fn idle(&mut self) {
        self.phase = None;
    }

    pub(super) fn step(&mut self, m: &RlMetrics) {
        for (curve, value) in self.curves.iter_mut().zip(curves(m)) {
            push(curve, value, CURVE);
        }
        push(&mut self.seconds, m.elapsed_s, PACE + 1);
        self.held_out = m.eval_pass_rate.or(self.held_out);
        self.last = m.clone();
    }

    /// A step as a line of a log.
    pub(super) fn line(&self) -> String {
        let m = &self.last;
        let mut line = format!("step {}:", self.progress());
        let mut parts = vec![
            ("reward", m.reward),
            ("pass", m.pass_rate),
            ("entropy", m.entropy),
            ("length", m.response_length_mean),
            ("ratio max", m.ratio_max),
            ("grad norm", m.grad_norm),
            ("prob corr", m.rollout_train_prob_corr),
        ];
        parts.extend(m.eval_pass_rate.map(|rate| ("held-out", rate)));
        let parts: Vec<String> = parts
            .iter()
            .filter(|(_, value)| value.is_finite())
            .map(|(name, value)| format!("{name} {}", short(*value)))
            .collect();
        line += &format!(" {}", parts.join(", "));
        for (what, rate) in self.rates() {
            line += &format!(", {what} {} tokens/s", short(rate));
        }
        if let Some(left) = self.left() {
            line += &format!(", {} left", span(left));
        }
        line
    }

    /// Draws on at most `width` × `height` cells.
    pub(super) fn render(&self, width: u16, height: u16) -> Buffer {
        let tasks = self.tasks(width as usize);
        let wanted = [1, 1, 2, 1, 1, 1, tasks.len() as u16];
        let area = Rect::new(0, 0, width, height.min(wanted.iter().sum()));
        let mut buffer = Buffer::empty(area);
        let rows = Layout::vertical(wanted.map(Constraint::Length)).split(area);
        self.title().render(rows[0], &mut buffer);
        self.gauge(rows[1], &mut buffer);
        let shown = [("reward", 2), ("pass", 3), ("entropy", 4), ("length", 5)];
        for ((name, row), (curve, value)) in shown.into_iter().zip(self.curves.iter().zip(curves(&self.last))) {
            curve_line(name, value, curve, rows[row], &mut buffer);
        }
        for (n, line) in tasks.into_iter().enumerate() {
            let row = Rect { y: rows[6].y + n as u16, height: 1, ..rows[6] }.intersection(area);
            line.render(row, &mut buffer);
        }
        buffer
    }

    fn title(&self) -> Line<'static> {
        let mut spans = vec![format!("step {}", self.progress()).bold()];
        if let Some(left) = self.left() {
            spans.push(format!("  {} left", span(left)).into());
        }
        for (what, rate) in self.rates() {
            spans.push(format!("  {what} {} tok/s", short(rate)).dim());
        }
        if let Some(rate) = self.held_out {
            spans.push(format!("  held-out {}", short(rate)).green());
        }
        if self.last.length_window > 0 {
            spans.push(format!("  window {}", self.last.length_window).dim());
        }
        Line::from(spans)
    }

    fn gauge(&self, area: Rect, buffer: &mut Buffer) {
        let Some(phase) = &self.phase else { return };
        let ratio = (phase.done as f64 / phase.total.max(1) as f64).clamp(0.0, 1.0);
        let [left, right] = Layout::horizontal([Constraint::Min(20), Constraint::Length(26)]).areas(area);
        LineGauge::default()
            .label(format!("{:<10}", phase.name))
            .ratio(ratio)
            .filled_symbol(symbols::line::THICK_HORIZONTAL)
            .unfilled_symbol(symbols::line::THICK_HORIZONTAL)
            .filled_style(Style::new().cyan())
            .unfilled_style(Style::new().dim())
            .render(left, buffer);
        let seconds = phase.since.elapsed().as_secs();
        Line::from(format!("  {}/{}  {seconds} s", phase.done, phase.total)).render(right, buffer);
    }

    /// The tasks' pass rates side by side, as many as fit.
    fn tasks(&self, width: usize) -> Vec<Line<'static>> {
        let rates: &BTreeMap<String, f64> = &self.last.pass_rate_by_task;
        let longest = rates.keys().map(|n| n.chars().count()).max().unwrap_or(0);
        // Name, a bar of five cells, the number, room between.
        let column = longest + 14;
        let fit = (width / column.max(1)).max(1);
        let mut all = Vec::new();
        for line in rates.iter().collect::<Vec<_>>().chunks(fit) {
            let mut spans: Vec<Span> = Vec::new();
            for (name, rate) in line {
                let full = if rate.is_finite() { (rate.clamp(0.0, 1.0) * 5.0).round() as usize } else { 0 };
                spans.push(format!("{name:<longest$} ").into());
                spans.push("━".repeat(full).cyan());
                spans.push("━".repeat(5 - full).dim());
                let rate = if rate.is_finite() { format!("{rate:.2}") } else { "–".to_owned() };
                spans.push(format!(" {rate:<7}").into());
            }
            all.push(Line::from(spans));
        }
        all.truncate(TASK_LINES);
        all
    }

    fn progress(&self) -> String {
        match self.steps {
            Some(steps) => format!("{}/{steps}", self.last.step),
            None => self.last.step.to_string(),
        }
    }

    fn rates(&self) -> impl Iterator<Item = (&'static str, f64)> {
        [("sampled", self.last.rollout_tokens_per_s), ("trained", self.last.train_tokens_per_s)]
            .into_iter()
            .filter(|(_, rate)| rate.is_finite())
    }

    /// By the pace of the last steps.
    fn left(&self) -> Option<Duration> {
        let (first, last) = (self.seconds.first()?, self.seconds.last()?);
        let pace = (last - first) / (self.seconds.len() - 1) as f64;
        let steps = self.steps?.checked_sub(self.last.step)?;
        Duration::try_from_secs_f64(pace * steps as f64).ok().filter(|_| steps > 0)
    }
}

/// What the four curves show.
fn curves(m: &RlMetrics) -> [f64; 4] {
    [m.reward, m.pass_rate, m.entropy, m.response_length_mean]
}

fn push(all: &mut Vec<f64>, value: f64, keep: usize) {
    if all.len() == keep {
        all.remove(0);
    }
    all.push(value);
}

/// A name, its last value and its curve, the newest at the right.
fn curve_line(name: &str, value: f64, curve: &[f64], area: Rect, buffer: &mut Buffer) {
    let [head, tail] = Layout::horizontal([Constraint::Length(18), Constraint::Min(0)]).areas(area);
    let value = if value.is_finite() { short(value) } else { "–".to_owned() };
    Line::from(vec![format!("{name:<8}").into(), format!("{value:>8}").bold()]).render(head, buffer);
    let shown = &curve[curve.len().saturating_sub(tail.width as usize)..];
    let finite = || shown.iter().copied().filter(|v| v.is_finite());
    let (low, high) = (finite().fold(f64::MAX, f64::min), finite().fold(f64::MIN, f64::max));
    let levels = f64::from(tail.height) * 8.0;
    // The lowest is one eighth high, so that it is seen; what is no number leaves a gap.
    let bar = |v: &f64| {
        let part = if high > low { (v - low) / (high - low) } else { 0.5 };
        v.is_finite().then(|| (1.0 + part * (levels - 1.0)).round() as u64)
    };
    Sparkline::default().data(shown.iter().map(bar)).max(levels as u64).style(Style::new().cyan()).render(tail, buffer);
}

/// Three significant digits.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if !(1e-4..1e6).contains(&v) => format!("{value:.2e}"),
        v => format!("{value:.*}", (2 - v.log10().floor() as i32).max(0) as usize),
    }
}

fn span(time: Duration) -> String {
    match time.as_secs() {
        s @ 0..=89 => format!("{s} s"),
        s @ 90..=5399 => format!("{} min", (s + 30) / 60),
        s => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        let pairs =
            [(0.0, "0"), (0.5, "0.500"), (-0.02, "-0.0200"), (123.4, "123"), (1e7, "1.00e7"), (-1e-9, "-1.00e-9")];
        for (value, text) in pairs {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn spans_read_as_people_say_them() {
        for (seconds, text) in [(5, "5 s"), (122, "2 min"), (5400, "1 h 30 min")] {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_new_phase_is_told_from_progress() {
        let mut block = Block::new(None);
        assert!(block.phase("train", 1, 16));
        assert!(!block.phase("train", 2, 16));
        assert!(block.phase("train", 1, 16), "the next step's");
        assert!(block.phase("eval", 2, 16));
    }
}
