//! The loop of pretraining and supervised fine-tuning: read, step, write down, now and then evaluate and save.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use m1_infer::files;
use m1_model::checkpoint::WeightDtype;
use serde::Serialize;

use crate::data::{DataError, Example, Source};
use crate::eval_loss::EvalSet;
use crate::metrics::{MetricsLog, StepMetrics};
use crate::plot::{self, PlotError};
use crate::run::{self, Evaluated, RunError, RunState, io_error};
use crate::trainer::{TrainError, Trainer};

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The finished model is in the run's folder.
    Finished,
    /// Interrupted; a checkpoint of the last step is there.
    Interrupted,
}

/// What can end a run before its time.
#[derive(Debug, thiserror::Error)]
pub enum SupervisedError {
    /// A step failed.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// An example could not be made.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The folder of the run could not be written.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The plot could not be written.
    #[error(transparent)]
    Plot(#[from] PlotError),
}

/// How often things are written.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Steps between checkpoints.
    pub save_every: u64,
    /// Steps between lines on stderr where it is no terminal.
    pub log_every: u64,
}

/// Trains until the settings' steps or minutes are reached, `stop` is set or something fails.
///
/// With an evaluation set, its loss is measured before the first step, every so many steps and at the end.
pub fn train<D: Serialize>(
    out: &Path,
    trainer: &mut Trainer,
    state: &mut RunState<D>,
    source: &dyn Source,
    eval: Option<&EvalSet>,
    pace: Pace,
    stop: &AtomicBool,
) -> Result<Ended, SupervisedError> {
    let log_path = out.join("metrics.jsonl");
    let log_error = io_error(&log_path);
    let mut log = MetricsLog::open(&log_path, state.progress.step).map_err(&log_error)?;
    let bar = Bar::new(state, pace.log_every);
    let before = state.progress.elapsed_s;
    let start = Instant::now();
    if let Some(eval) = eval.filter(|_| state.progress.step == 0) {
        evaluate(out, trainer, state, eval, &bar)?;
    }
    while done(state) < 1.0 {
        if stop.load(Ordering::Relaxed) {
            bar.clear();
            checkpoint(out, trainer, state, &log)?;
            return Ok(Ended::Interrupted);
        }
        let step_start = Instant::now();
        let lr = state.settings.schedule.rate(state.progress.step, done(state));
        let examples = next_examples(state, source)?;
        let report = trainer.step(&examples, lr)?;
        let progress = &mut state.progress;
        progress.step = trainer.steps();
        progress.example += examples.len() as u64;
        progress.tokens += report.tokens as u64;
        progress.elapsed_s = before + start.elapsed().as_secs_f64();
        let metrics = StepMetrics {
            step: progress.step,
            tokens: progress.tokens,
            loss: report.loss,
            aux_loss: report.aux_loss,
            lr,
            grad_norm: report.grad_norm,
            tokens_per_s: report.tokens as f64 / step_start.elapsed().as_secs_f64(),
            elapsed_s: progress.elapsed_s,
            expert_load_max: report.expert_load_max,
            expert_load_min: report.expert_load_min,
        };
        log.push(metrics).map_err(&log_error)?;
        bar.show(state, log.history());
        if let Some(eval) = eval.filter(|e| state.progress.step.is_multiple_of(e.every) || done(state) >= 1.0) {
            evaluate(out, trainer, state, eval, &bar)?;
        }
        if state.progress.step.is_multiple_of(pace.save_every) && done(state) < 1.0 {
            checkpoint(out, trainer, state, &log)?;
        }
    }
    bar.clear();
    checkpoint(out, trainer, state, &log)?;
    run::save_model(out, trainer.model(), WeightDtype::Bf16)?;
    Ok(Ended::Finished)
}

/// The part of the run that lies behind, 0 to 1.
pub fn done<D>(state: &RunState<D>) -> f64 {
    let by_steps = state.settings.steps.map(|n| state.progress.step as f64 / n.max(1) as f64);
    let by_time = state.settings.minutes.map(|m| state.progress.elapsed_s / (m * 60.0));
    by_steps.unwrap_or(0.0).max(by_time.unwrap_or(0.0)).min(1.0)
}

/// Whether a step of `batch_tokens` that holds `tokens` so far takes one more example.
fn takes_more(tokens: usize, batch_tokens: usize) -> bool {
    tokens < batch_tokens.max(1)
}

/// Examples until the step's tokens or the source's end are reached: at least one, if there is one.
fn next_examples<D>(state: &RunState<D>, source: &dyn Source) -> Result<Vec<Example>, DataError> {
    let mut examples = Vec::new();
    let mut tokens = 0;
    while takes_more(tokens, state.settings.batch_tokens) {
        let index = state.progress.example + examples.len() as u64;
        if source.limit().is_some_and(|limit| index >= limit) {
            break;
        }
        let next = source.example(index)?;
        tokens += next.ids.len();
        examples.push(next);
    }
    Ok(examples)
}

/// How many steps the loop makes of examples whose numbers of tokens are these.
pub fn steps_of(lengths: impl Iterator<Item = usize>, batch_tokens: usize) -> u64 {
    let (mut steps, mut tokens) = (0, usize::MAX);
    for length in lengths {
        if !takes_more(tokens, batch_tokens) {
            (steps, tokens) = (steps + 1, 0);
        }
        tokens += length;
    }
    steps
}

/// Measures the loss on the evaluation set, tells it and writes `eval.jsonl` anew, which so never holds a step that
/// a resumed run has yet to do.
fn evaluate<D>(
    out: &Path,
    trainer: &Trainer,
    state: &mut RunState<D>,
    eval: &EvalSet,
    bar: &Bar,
) -> Result<(), SupervisedError> {
    let step = state.progress.step;
    let loss = eval.loss(trainer.model());
    bar.bar.suspend(|| eprintln!("step {step}  evaluation loss {loss:.4}  perplexity {:.3}", loss.exp()));
    state.progress.evaluations.push(Evaluated { step, loss });
    let lines = state.progress.evaluations.iter().map(serde_json::to_string);
    let path = out.join("eval.jsonl");
    let named = io_error(&path);
    let text = lines.map(|line| line.map(|line| line + "\n")).collect::<Result<String, _>>();
    let text = text.map_err(|e| named(e.into()))?;
    files::write(&path, text.as_bytes()).map_err(named)?;
    Ok(())
}

fn checkpoint<D: Serialize>(
    out: &Path,
    trainer: &Trainer,
    state: &RunState<D>,
    log: &MetricsLog,
) -> Result<(), SupervisedError> {
    run::save(out, trainer, state.progress.step, state)?;
    let config = trainer.model().config();
    let title = format!(
        "Training loss: {} layers, hidden {}, {} experts",
        config.num_hidden_layers, config.hidden_size, config.num_local_experts
    );
    plot::loss_svg(&out.join("loss.svg"), &title, log.history())?;
    Ok(())
}

/// Progress on stderr: a bar on a terminal, a line now and then elsewhere.
struct Bar {
    bar: ProgressBar,
    log_every: u64,
}

impl Bar {
    const PARTS: u64 = 10_000;

    fn new<D>(state: &RunState<D>, log_every: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(Self::PARTS), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{bar:30.cyan/dim} {percent:>3}% {msg}");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_position((done(state) * Self::PARTS as f64) as u64);
        Self { bar, log_every }
    }

    fn show<D>(&self, state: &RunState<D>, history: &[StepMetrics]) {
        let Some(last) = history.last() else { return };
        // A mean over some steps: single ones jump with what the batch happens to hold.
        let recent = &history[history.len().saturating_sub(20)..];
        let mean = |f: fn(&StepMetrics) -> f64| recent.iter().map(f).sum::<f64>() / recent.len() as f64;
        let of = state.settings.steps.map(|n| format!("/{n}")).unwrap_or_default();
        let line = format!(
            "step {}{of}  loss {:.4}  lr {:.1e}  grad {:.2}  load {:.2}-{:.2}  {:.0} tokens/s  {:.1} min",
            last.step,
            mean(|m| m.loss),
            last.lr,
            mean(|m| m.grad_norm),
            last.expert_load_min,
            last.expert_load_max,
            mean(|m| m.tokens_per_s),
            last.elapsed_s / 60.0,
        );
        if self.bar.is_hidden() {
            if last.step.is_multiple_of(self.log_every) || done(state) >= 1.0 {
                eprintln!("{line}");
            }
        } else {
            self.bar.set_position((done(state) * Self::PARTS as f64) as u64);
            self.bar.set_message(line);
        }
    }

    fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_counted_as_they_are_made() {
        for (lengths, batch, steps) in [
            (&[][..], 10, 0),
            (&[1], 10, 1),
            (&[10, 10, 10], 10, 3),
            (&[9, 9, 9], 10, 2),
            (&[4, 4, 4, 4], 10, 2),
            (&[50, 1, 1], 10, 2),
            (&[3, 3], 0, 2),
        ] {
            assert_eq!(steps_of(lengths.iter().copied(), batch), steps, "{lengths:?} in {batch}");
        }
    }
}
