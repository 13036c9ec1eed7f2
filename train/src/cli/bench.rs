//! `m1-train bench`: how fast one training step is.
//!
//! Steps of the trainer itself, on random ids of which each predicts the next: forward, backward, clipping, AdamW. The
//! time is the whole step's, and every id of the batch counts as a token.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use burn::module::Module;
use m1_infer::cli::common::HubArgs;
use m1_infer::statistics::{deviation, mean};
use m1_infer::{hub, memory};
use m1_model::checkpoint::{LoadOptions, WeightDtype, load};
use m1_model::config::ModelConfig;
use m1_model::device::{DeviceChoice, OpenDevice};
use m1_model::flops;
use m1_model::model::M1;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::cli::{count, run_args, threads, up_to};
use crate::data::Example;
use crate::optimizer::OptimizerSettings;
use crate::trainer::Trainer;

/// Small enough that random ids do no harm to the weights in any number of steps.
const LEARNING_RATE: f64 = 1e-5;
/// Steps that are not counted: the memory of a run grows until the second has ended.
const WARM_UP: u64 = 2;

const AFTER_HELP: &str = "\
Examples:
  m1-train bench --preset nano
  m1-train bench --model DIR --batch 4 --tokens 512 -r 5
  m1-train bench --preset small --json

A step is forward, backward and AdamW in f32 on batch x tokens random ids. t/s is the mean over the
repetitions ± their standard deviation, after two steps that are not counted. GFLOP/s counts three
forward passes a step, 2 FLOPs a multiply-add, without embedding and head. Nothing is saved. Ctrl-C
ends with what has been measured.";

/// Measure tokens a second of a training step
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Directory of a checkpoint in Hugging Face form, or an id of the hub, owner/name[@revision]
    #[arg(long, short, value_name = "DIR|ID", conflicts_with = "preset")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Random weights of this size: nano, small or base [default: nano]
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// Rows of a step
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = up_to::<65_536>)]
    batch: u64,
    /// Tokens of a row
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = up_to::<1_000_000>)]
    tokens: u64,
    /// Steps that are timed
    #[arg(long, short, value_name = "N", default_value_t = 5, value_parser = up_to::<65_536>)]
    repetitions: u64,
    /// Tokens of the parts that a step is split into [default: as pretrain does]
    #[arg(long, value_name = "N", value_parser = count)]
    micro_tokens: Option<u64>,
    /// Run each layer again in the backward pass instead of keeping its activations
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Threads, each on its own part of a step [default: one a core]
    #[arg(long, value_name = "N", value_parser = up_to::<1024>)]
    threads: Option<u64>,
    /// auto, cuda[:n], wgpu[:n] or cpu
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceChoice,
    /// One JSON object in place of the table
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    ensure!(args.tokens > 1, "--tokens 1: a row of one token predicts nothing; give 2 or more");
    let device = args.device.open()?;
    eprintln!("device: {}", device.name);
    let (name, model) = model(&args, &device)?;
    let threads = threads(args.threads);
    let micro_tokens = args.micro_tokens.unwrap_or(run_args::MICRO_TOKENS) as usize;
    let config = model.config().clone();
    let mut trainer = Trainer::new(model, OptimizerSettings::default(), micro_tokens, threads, 0)?
        .with_gradient_checkpointing(args.gradient_checkpointing);

    let (batch, tokens) = (args.batch as usize, args.tokens as usize);
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut examples = || -> Vec<Example> {
        let vocab = config.vocab_size as u32;
        let mut row = || (0..tokens).map(|_| random.random_range(0..vocab)).collect();
        (0..batch).map(|_| Example { ids: row(), loss: vec![true; tokens] }).collect()
    };
    let stop = run_args::stop_on_signal(|| eprintln!("\nstopping after this step; once more to leave at once"))?;
    let (mut seconds, mut losses) = (Vec::new(), Vec::new());
    for step in 1..=WARM_UP + args.repetitions {
        let examples = examples();
        let start = Instant::now();
        losses.push(trainer.step(&examples, LEARNING_RATE)?.loss);
        let taken = start.elapsed().as_secs_f64();
        let rate = (batch * tokens) as f64 / taken;
        if step <= WARM_UP {
            eprintln!("warm-up: {rate:.1} t/s, loss {:.4}", losses[losses.len() - 1]);
        } else {
            eprintln!("{}/{}: {rate:.1} t/s, loss {:.4}", step - WARM_UP, args.repetitions, losses[losses.len() - 1]);
            seconds.push(taken);
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    let interrupted = seconds.len() < args.repetitions as usize;
    if !seconds.is_empty() {
        let result = Measured::new(&config, batch, tokens, seconds);
        let text = if args.json {
            let device = if device.is_cpu { "CPU" } else { &device.name };
            format!("{}\n", result.json(&name, device, threads, &losses))
        } else {
            result.table(&name, if device.is_cpu { "CPU" } else { &device.name }, threads)
        };
        std::io::stdout().write_all(text.as_bytes())?;
    }
    Ok(if interrupted { ExitCode::from(130) } else { ExitCode::SUCCESS })
}

/// The model, and what it is called.
fn model(args: &Args, device: &OpenDevice) -> anyhow::Result<(String, M1)> {
    let Some(given) = &args.model else {
        let name = args.preset.as_deref().unwrap_or("nano");
        let Some(config) = ModelConfig::preset(name) else {
            bail!("--preset {name}: expected nano, small or base");
        };
        device.device.seed(1);
        return Ok((name.into(), M1::new(&config, &device.device).materialize()));
    };
    // Training is in f32, whatever the checkpoint is stored in.
    let options =
        LoadOptions { dtype: Some(WeightDtype::F32), tensors: true, progress: true, ..LoadOptions::default() };
    let dir = args.hub.directory(given)?;
    let model = load(&dir, &device.device, &options).context("--model")?;
    Ok((hub::name(given), model))
}

/// Timed steps.
struct Measured {
    batch: usize,
    tokens: usize,
    seconds: Vec<f64>,
    /// Tokens a second, of each step.
    rates: Vec<f64>,
    parameters: u128,
    /// FLOPs of one step.
    flops: u128,
    /// Most bytes that the process has held, where the system tells.
    peak: Option<u64>,
}

impl Measured {
    fn new(config: &ModelConfig, batch: usize, tokens: usize, seconds: Vec<f64>) -> Self {
        let row: u128 = (0..tokens).map(|context| flops::flops_per_token(config, context)).sum();
        Self {
            batch,
            tokens,
            rates: seconds.iter().map(|s| (batch * tokens) as f64 / s).collect(),
            seconds,
            parameters: flops::parameters(config),
            flops: 3 * row * batch as u128,
            peak: memory::peak(),
        }
    }

    fn test(&self) -> String {
        format!("train {}x{}", self.batch, self.tokens)
    }

    fn gigaflops(&self) -> f64 {
        self.flops as f64 / mean(&self.seconds) / 1e9
    }

    fn json(&self, model: &str, device: &str, threads: usize, losses: &[f64]) -> serde_json::Value {
        json!({
            "model_filename": model,
            "model_n_params": u64::try_from(self.parameters).unwrap_or(u64::MAX),
            "dtype": "f32",
            "device": device,
            "n_threads": threads,
            "test": self.test(),
            "avg_ts": mean(&self.rates),
            "stddev_ts": deviation(&self.rates),
            "samples_ts": self.rates,
            "samples_s": self.seconds,
            "gflop_per_s": self.gigaflops(),
            "peak_bytes": self.peak,
            "losses": losses,
        })
    }

    fn table(&self, model: &str, device: &str, threads: usize) -> String {
        let peak = self.peak.map_or("-".into(), |bytes| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20)));
        format!(
            "| model        |    params | dtype | device | threads | test         |              t/s |  s/step | GFLOP/s | peak memory |\n\
             | ------------ | --------: | ----- | ------ | ------: | ------------ | ---------------: | ------: | ------: | ----------: |\n\
             | {model:<12} | {:>9} | f32   | {device:<6} | {threads:>7} | {:<12} | {:>16} | {:>7.3} | {:>7.1} | {peak:>11} |\n",
            format!("{:.2} M", self.parameters as f64 / 1e6),
            self.test(),
            format!("{:.1} ± {:.1}", mean(&self.rates), deviation(&self.rates)),
            mean(&self.seconds),
            self.gigaflops(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_counts_every_token_of_every_row_three_times() {
        let config = ModelConfig::preset("nano").unwrap();
        let measured = Measured::new(&config, 4, 3, vec![0.5, 1.0]);
        let at = |context| flops::flops_per_token(&config, context);
        assert_eq!(measured.flops, 3 * 4 * (at(0) + at(1) + at(2)));
        assert_eq!(measured.rates, [24.0, 12.0]);
        assert_eq!(measured.test(), "train 4x3");
        let table = measured.table("nano", "CPU", 2);
        assert!(table.contains("18.0 ± 8.5") && table.contains("3.91 M"), "{table}");
        let widths: Vec<usize> = table.lines().map(|line| line.chars().count()).collect();
        assert_eq!(widths, [widths[0]; 3], "{table}");
    }
}
