//! What every command that trains takes: the run's folder, the size of its steps, the optimizer, saving, threads.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use m1_model::device::DeviceChoice;
use tokenizers::Tokenizer;

use crate::cli::{count, threads, up_to};
use crate::optimizer::OptimizerSettings;
use crate::run::{Progress, Settings};
use crate::schedule::Schedule;
use crate::supervised::{Ended, Pace};

/// Tokens of the parts that a step is split into.
pub(crate) const MICRO_TOKENS: u64 = 1536;

/// Flags of a run.
#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// Directory of the run: checkpoints, metrics and the finished model
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Tokens that each step reads, about [default: 6144]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = count)]
    pub batch_tokens: Option<u64>,
    /// Tokens of the parts that a step is split into, worked on side by side [default: 1536]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = count)]
    pub micro_tokens: Option<u64>,
    /// Decay of AdamW's first moment [default: 0.9]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = below_one)]
    pub beta_1: Option<f64>,
    /// Decay of AdamW's second moment [default: 0.95]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = below_one)]
    pub beta_2: Option<f64>,
    /// Decoupled weight decay of matrices [default: 0.1]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = not_negative)]
    pub weight_decay: Option<f64>,
    /// Largest norm of the whole gradient; 0 never clips [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = not_negative)]
    pub clip: Option<f64>,
    /// Go on from the run's last checkpoint
    #[arg(long)]
    pub resume: bool,
    /// Steps between checkpoints
    #[arg(long, value_name = "N", default_value_t = 200, allow_negative_numbers = true, value_parser = count)]
    pub save_every: u64,
    /// Steps between lines on stderr where it is not a terminal
    #[arg(long, value_name = "N", default_value_t = 25, allow_negative_numbers = true, value_parser = count)]
    pub log_every: u64,
    /// Threads, each on its own part of a step; never changes the result [default: one a core]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = up_to::<1024>)]
    pub threads: Option<u64>,
    /// auto, cuda[:n], wgpu[:n] or cpu
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: DeviceChoice,
}

/// Flags whose defaults each command says for itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    pub seed: Option<u64>,
    pub lr: Option<f64>,
    pub warmup: Option<u64>,
}

impl RunArgs {
    /// How many threads to use.
    pub fn threads(&self) -> usize {
        threads(self.threads)
    }

    /// How often things are written.
    pub fn pace(&self) -> Pace {
        Pace { save_every: self.save_every, log_every: self.log_every }
    }

    /// A new run's settings, without an end; `peak` and `warmup` where the flags do not say otherwise.
    pub fn settings<D>(&self, data: D, rates: Rates, peak: f64, warmup: u64) -> Settings<D> {
        let default = OptimizerSettings::default();
        let float = |given: Option<f64>, default| given.map_or(default, |x| x as f32);
        Settings {
            seed: rates.seed.unwrap_or(1),
            data,
            steps: None,
            minutes: None,
            batch_tokens: self.batch_tokens.unwrap_or(6144) as usize,
            micro_tokens: self.micro_tokens.unwrap_or(MICRO_TOKENS) as usize,
            schedule: Schedule { peak: rates.lr.unwrap_or(peak), warmup: rates.warmup.unwrap_or(warmup) },
            optimizer: OptimizerSettings {
                beta_1: float(self.beta_1, default.beta_1),
                beta_2: float(self.beta_2, default.beta_2),
                weight_decay: float(self.weight_decay, default.weight_decay),
                clip: self.clip.unwrap_or(default.clip),
                ..default
            },
        }
    }

    /// What decides the result of a run stays as it was; a flag that says otherwise is a mistake worth a line.
    pub fn refuse_changes<D>(&self, rates: Rates, s: &Settings<D>) -> anyhow::Result<()> {
        let float = |v: Option<u64>| v.map(|v| v as f64);
        let narrow = |v: Option<f64>| v.map(|x| f64::from(x as f32));
        for (flag, given, was) in [
            ("--seed", float(rates.seed), s.seed as f64),
            ("--batch-tokens", float(self.batch_tokens), s.batch_tokens as f64),
            ("--micro-tokens", float(self.micro_tokens), s.micro_tokens as f64),
            ("--lr", rates.lr, s.schedule.peak),
            ("--warmup", float(rates.warmup), s.schedule.warmup as f64),
            ("--beta-1", narrow(self.beta_1), s.optimizer.beta_1.into()),
            ("--beta-2", narrow(self.beta_2), s.optimizer.beta_2.into()),
            ("--weight-decay", narrow(self.weight_decay), s.optimizer.weight_decay.into()),
            ("--clip", self.clip, s.optimizer.clip),
        ] {
            if let Some(given) = given.filter(|&g| g != was) {
                let out = self.out.display();
                bail!("{flag} {given}: the run in {out} has {was}; leave the flag out to go on with it");
            }
        }
        Ok(())
    }

    /// A run that is there already, where no resumption was asked for.
    pub fn refuse_run(&self, progress: &Progress) -> anyhow::Error {
        let out = self.out.display();
        let step = progress.step;
        anyhow::anyhow!(
            "--out {out}: holds a run at step {step}; add --resume to go on with it, or name another directory"
        )
    }

    /// Tells how a run ended.
    pub fn tell(&self, ended: Ended, p: &Progress) -> ExitCode {
        match ended {
            Ended::Finished => {
                println!(
                    "{}: finished model, {} steps, {} tokens, {:.1} minutes",
                    self.out.display(),
                    p.step,
                    p.tokens,
                    p.elapsed_s / 60.0
                );
                ExitCode::SUCCESS
            }
            Ended::Interrupted => {
                eprintln!("stopped at step {} and saved; the same command with --resume goes on", p.step);
                ExitCode::from(130)
            }
        }
    }
}

/// A new run's folder may hold a tokenizer, but no model: the run would end up in its place.
pub(crate) fn refuse_a_model(out: &Path) -> anyhow::Result<()> {
    let entries = match fs::read_dir(out) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("--out {}", out.display())),
    };
    for entry in entries {
        let name = entry.with_context(|| format!("--out {}", out.display()))?.file_name();
        let name = name.to_string_lossy();
        if name == "config.json" || name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
            bail!(
                "--out {}: holds a model ({name}) without a checkpoint to resume from; name another directory",
                out.display()
            );
        }
    }
    Ok(())
}

/// Reads the tokenizer of a model's folder.
pub(crate) fn load_tokenizer(folder: &Path) -> anyhow::Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    Tokenizer::from_file(&path).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}

/// Set by the first Ctrl-C (or a termination signal), upon which `tell` says what follows; the second one ends the process at
/// once.
pub(crate) fn stop_on_signal(tell: impl Fn() + Send + 'static) -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        tell();
    })?;
    Ok(stop)
}

/// A number above 0.
pub(crate) fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x.is_finite() => Ok(x),
        _ => Err("expected a number above 0".into()),
    }
}

/// A number, 0 or above.
pub(crate) fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x >= 0.0 && x.is_finite() => Ok(x),
        _ => Err("expected a number, 0 or above".into()),
    }
}

/// A number from 0 to below 1.
fn below_one(text: &str) -> Result<f64, String> {
    not_negative(text).ok().filter(|&x| x < 1.0).ok_or_else(|| "expected a number from 0 to below 1".into())
}
