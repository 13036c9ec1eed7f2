//! `m1-train cispo`: a model that is there already, trained further on problems with verifiers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use burn::tensor::Device;
use m1_infer::cli::common::HubArgs;
use m1_infer::files;
use m1_model::config::ModelConfig;
use m1_model::device::DeviceChoice;

use crate::cispo::config::Config;
use crate::cispo::{Cispo, State};
use crate::cli::run_args::{refuse_a_model, stop_on_signal};
use crate::cli::sft::copy_text_side;
use crate::cli::{count, threads, up_to, whole};
use crate::language::Language;
use crate::report;
use crate::run;
use crate::supervised::Ended;
use crate::trainer::Trainer;

const AFTER_HELP: &str = "\
Examples:
  m1-train cispo --model examples/m1-nano --out runs/cispo --config train/configs/laptop.toml
  m1-train cispo --model runs/sft --out runs/grpo --set loss.algorithm=grpo --set name=grpo --steps 40
  m1-train cispo --out runs/cispo --resume                    (after Ctrl-C, a crash or kill -9)
  m1-train cispo --show-config --set train.lr=1e-4            (every setting, as a file)
  m1-train report runs/cispo runs/grpo                        (compare them in a browser)

Every value of the configuration file can be set with --set section.key=value. A run gives the same weights to the bit however
often it is stopped and resumed, with any --threads.";

/// Reinforcement learning on problems with verifiers: CISPO, and GRPO, DAPO, PPO or REINFORCE by its settings
///
/// Leaves a model directory in Hugging Face form (bf16) in --out, beside config.toml, metrics.jsonl, TensorBoard events,
/// samples.jsonl, rl.svg, report.html and the last checkpoint.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Directory of the model to begin from, or its Hugging Face id, owner/name[@revision] (not with --resume)
    #[arg(long, short, value_name = "DIR|ID")]
    model: Option<PathBuf>,
    #[command(flatten)]
    hub: HubArgs,
    /// Directory of the run
    #[arg(long, value_name = "DIR", required_unless_present = "show_config")]
    out: Option<PathBuf>,
    /// Settings in TOML [default: M1's recipe]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set a value of the configuration; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Steps in all: short for --set steps=N
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = count)]
    steps: Option<u64>,
    /// Seed of problems, order and draws: short for --set seed=N
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole)]
    seed: Option<u64>,
    /// Go on from the run's last checkpoint, with its settings; --steps may be changed
    #[arg(long)]
    resume: bool,
    /// Print the configuration that a run would have, and stop
    #[arg(long)]
    show_config: bool,
    /// Threads, each on its own part of the work; never changes the result [default: one a core]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = up_to::<1024>)]
    threads: Option<u64>,
    /// auto, cuda[:n], wgpu[:n] or cpu
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceChoice,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = resolve(&args)?;
    if args.show_config {
        print!("{}", config.to_toml());
        return Ok(ExitCode::SUCCESS);
    }
    let out = args.out.as_deref().context("--out: which directory?")?;
    let open = args.device.open()?;
    eprintln!("device: {}", open.name);
    let threads = threads(args.threads);
    let checkpoint = run::latest::<State>(out)?;
    let (state, trainer) = match (&checkpoint, args.resume) {
        (Some((folder, saved)), true) => resume(&args, config, folder, saved, threads, &open.device)?,
        (Some((_, saved)), false) => bail!(
            "--out {}: holds a run at step {}; add --resume to go on with it, or name another directory",
            out.display(),
            saved.step
        ),
        (None, _) => start(&args, config, out, threads, &open.device)?,
    };
    let model = ModelConfig::from_file(out.join("config.json"))?;
    let objective = state.config.validate(&model)?;
    let language = Language::open(out)?;
    eprintln!(
        "{}: {} steps of {} problems × {} responses, {} updates each, {threads} threads",
        state.config.name,
        state.config.steps,
        state.config.rollout.prompts,
        state.config.rollout.samples,
        state.config.train.updates
    );
    let mut run = Cispo::new(out, trainer, state, objective, &language)?;
    let view = run.view();
    let stop = stop_on_signal(move || view.message("stopping and saving; once more to leave without saving"))?;
    let ended = run.train(&stop)?;
    for warning in report::write(&out.join("report.html"), &[out.to_owned()], &report::Options::default())? {
        eprintln!("{warning}");
    }
    let (step, minutes) = (run.state().step, run.state().elapsed_s / 60.0);
    match ended {
        Ended::Finished => {
            println!("{}: finished model, {step} steps, {minutes:.1} minutes", out.display());
            Ok(ExitCode::SUCCESS)
        }
        Ended::Interrupted => {
            eprintln!("stopped at step {step} and saved; the same command with --resume goes on");
            Ok(ExitCode::from(130))
        }
    }
}

/// The settings of the file and the command line.
fn resolve(args: &Args) -> anyhow::Result<Config> {
    let (name, text) = match &args.config {
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| format!("--config {}", path.display()))?;
            (path.display().to_string(), text)
        }
        None => ("the defaults".into(), String::new()),
    };
    let mut overrides = args.set.clone();
    overrides.extend(args.steps.map(|n| format!("steps={n}")));
    overrides.extend(args.seed.map(|n| format!("seed={n}")));
    Ok(Config::read(&name, &text, &overrides)?)
}

/// A new run. Mistakes come to light before anything is written.
fn start(args: &Args, config: Config, out: &Path, threads: usize, device: &Device) -> anyhow::Result<(State, Trainer)> {
    let Some(model) = &args.model else {
        bail!("--model: which model is to be trained? (a directory in Hugging Face form, such as examples/m1-nano)");
    };
    if args.resume {
        eprintln!("{}: no checkpoint yet, starting at step 0", out.display());
    }
    refuse_a_started_run(out)?;
    let model = &args.hub.directory(model)?;
    config.validate(&ModelConfig::from_file(model.join("config.json")).context("--model")?)?;
    Language::open(model).context("--model")?;
    let loaded = run::load_model(model, device).context("--model")?;
    let trainer = Trainer::new(loaded, config.optimizer(), config.train.micro_tokens, threads, 0)?;
    fs::create_dir_all(out).with_context(|| format!("--out {}", out.display()))?;
    copy_text_side(model, out)?;
    for (name, text) in
        [("config.json", fs::read_to_string(model.join("config.json"))?), ("config.toml", config.to_toml())]
    {
        files::write(&out.join(name), text.as_bytes()).with_context(|| out.join(name).display().to_string())?;
    }
    Ok((State::new(config), trainer))
}

/// A killed run that had not come to its first checkpoint left its configuration behind; a model is not written over.
fn refuse_a_started_run(out: &Path) -> anyhow::Result<()> {
    if out.join("config.toml").exists() && !out.join("model.safetensors").exists() {
        return Ok(());
    }
    refuse_a_model(out)
}

/// An old run. What decides its result stays as it was; only its length may change.
fn resume(
    args: &Args,
    given: Config,
    folder: &Path,
    saved: &State,
    threads: usize,
    device: &Device,
) -> anyhow::Result<(State, Trainer)> {
    let mut state = saved.clone();
    if args.steps.is_some() {
        state.config.steps = given.steps;
    }
    let untold = args.config.is_none() && args.set.is_empty() && args.seed.is_none();
    if !untold && (Config { steps: state.config.steps, ..given.clone() }) != state.config {
        let (was, now) = (state.config.to_toml(), given.to_toml());
        let differs = now.lines().find(|line| !was.lines().any(|l| l == *line)).unwrap_or("a setting").to_string();
        bail!(
            "--resume: {differs} is not what the run began with; leave --config, --set and --seed out to go on with it"
        );
    }
    if state.config.steps < state.step {
        bail!("--steps {}: the run is past it, at step {}; give more", state.config.steps, state.step);
    }
    let config = &state.config;
    let trainer = run::take_up(folder, config.optimizer(), config.train.micro_tokens, threads, state.updates, device)?;
    Ok((state, trainer))
}
