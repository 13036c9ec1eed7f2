//! `m1-train pretrain`: a model from nothing, on conversations that this crate makes itself.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use burn::module::Module;
use burn::tensor::Device;
use m1_model::config::ModelConfig;
use m1_model::device::DeviceChoice;
use m1_model::model::M1;
use tokenizers::Tokenizer;

use crate::cli::{count, up_to, whole};
use crate::data::{Data, DataConfig};
use crate::optimizer::OptimizerSettings;
use crate::pretrain::{Ended, Pace, done, pretrain};
use crate::run::{self, Progress, RunState, Settings};
use crate::schedule::Schedule;
use crate::tokenizer;
use crate::trainer::Trainer;

/// Conversations that the tokenizer is trained on.
const TOKENIZER_CONVERSATIONS: u64 = 20_000;
/// Its entries, at most.
const TOKENIZER_ENTRIES: usize = 1280;

/// Tokens of the parts that a step is split into.
pub(crate) const MICRO_TOKENS: u64 = 1536;

const AFTER_HELP: &str = "\
Examples:
  m1-train pretrain --out runs/nano --steps 3000
  m1-train pretrain --out runs/nano --steps 3000 --resume     (after Ctrl-C, a crash or kill -9)
  m1-train pretrain --out runs/nano --minutes 75              (learning rate by the clock)

A run of --steps gives the same weights to the bit however often it is stopped and resumed, with any --threads.";

/// Train a model from scratch on generated conversations (reasoning problems and small talk)
///
/// Makes a tokenizer, trains, and leaves a model directory in Hugging Face form (bf16) in --out, beside metrics.jsonl, loss.svg
/// and the last checkpoint.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Directory of the run: checkpoints, metrics and the finished model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Size of the model: nano, small or base [default: nano]
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    preset: Option<String>,
    /// A config.json to take the sizes from (its vocabulary and special ids become the tokenizer's)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Steps in all [default: 3000]
    #[arg(long, value_name = "N", conflicts_with = "minutes", allow_negative_numbers = true, value_parser = count)]
    steps: Option<u64>,
    /// Minutes of training in all, resumptions together
    #[arg(long, value_name = "M", allow_negative_numbers = true, value_parser = positive)]
    minutes: Option<f64>,
    /// Tokens that each step reads, about [default: 6144]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = count)]
    batch_tokens: Option<u64>,
    /// Tokens of the parts that a step is split into, worked on side by side [default: 1536]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = count)]
    micro_tokens: Option<u64>,
    /// Highest learning rate [default: 0.002]
    #[arg(long, value_name = "RATE", allow_negative_numbers = true, value_parser = positive)]
    lr: Option<f64>,
    /// Steps of linear warm-up [default: 100]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole)]
    warmup: Option<u64>,
    /// Decoupled weight decay of matrices [default: 0.1]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = not_negative)]
    weight_decay: Option<f64>,
    /// Largest norm of the whole gradient; 0 never clips [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = not_negative)]
    clip: Option<f64>,
    /// Weight of the router's auxiliary loss, kept in config.json [default: the configuration's]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = not_negative)]
    router_aux_loss_coef: Option<f64>,
    /// Seed of weights and examples [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole)]
    seed: Option<u64>,
    /// Go on from the run's last checkpoint
    #[arg(long)]
    resume: bool,
    /// Steps between checkpoints
    #[arg(long, value_name = "N", default_value_t = 200, allow_negative_numbers = true, value_parser = count)]
    save_every: u64,
    /// Steps between lines on stderr where it is not a terminal
    #[arg(long, value_name = "N", default_value_t = 25, allow_negative_numbers = true, value_parser = count)]
    log_every: u64,
    /// Threads, each on its own part of a step; never changes the result [default: one a core]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = up_to::<1024>)]
    threads: Option<u64>,
    /// auto, cuda[:n], wgpu[:n] or cpu
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceChoice,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let open = args.device.open()?;
    let threads = match args.threads {
        Some(n) => n as usize,
        None => std::thread::available_parallelism().map_or(1, |n| n.get()),
    };
    eprintln!("device: {}", open.name);
    let device = open.device;
    let checkpoint = run::latest(&args.out)?;
    let (mut state, mut trainer) = match (&checkpoint, args.resume) {
        (Some((folder, saved)), true) => resume(&args, folder, saved, threads, &device)?,
        (Some((_, saved)), false) => bail!(
            "--out {}: holds a run at step {}; add --resume to go on with it, or name another directory",
            args.out.display(),
            saved.progress.step
        ),
        (None, resume) => {
            if resume {
                eprintln!("{}: no checkpoint yet, starting at step 0", args.out.display());
            }
            start(&args, threads, &device)?
        }
    };
    let data = Data::new(state.settings.data.clone(), load_tokenizer(&args.out)?)?;
    let config = trainer.model().config();
    eprintln!(
        "{:.2} M parameters, {} layers, vocabulary {}, {} threads; step {} ({:.0} % done)",
        trainer.model().num_params() as f64 / 1e6,
        config.num_hidden_layers,
        config.vocab_size,
        threads,
        state.progress.step,
        done(&state) * 100.0,
    );

    let stop = stop_on_signal("stopping after this step; once more to leave without saving")?;
    let pace = Pace { save_every: args.save_every, log_every: args.log_every };
    let ended = pretrain(&args.out, &mut trainer, &mut state, &data, pace, &stop)?;
    let p = &state.progress;
    match ended {
        Ended::Finished => {
            println!(
                "{}: finished model, {} steps, {} tokens, {:.1} minutes",
                args.out.display(),
                p.step,
                p.tokens,
                p.elapsed_s / 60.0
            );
            Ok(ExitCode::SUCCESS)
        }
        Ended::Interrupted => {
            eprintln!("stopped at step {} and saved; the same command with --resume goes on", p.step);
            Ok(ExitCode::from(130))
        }
    }
}

/// A new run: tokenizer, configuration, random weights.
fn start(args: &Args, threads: usize, device: &Device) -> anyhow::Result<(RunState, Trainer)> {
    let settings = Settings {
        seed: args.seed.unwrap_or(1),
        data: DataConfig { seed: args.seed.unwrap_or(1), ..DataConfig::default() },
        steps: args.steps.or(args.minutes.is_none().then_some(3000)),
        minutes: args.minutes,
        batch_tokens: args.batch_tokens.unwrap_or(6144) as usize,
        micro_tokens: args.micro_tokens.unwrap_or(MICRO_TOKENS) as usize,
        schedule: Schedule { peak: args.lr.unwrap_or(2e-3), warmup: args.warmup.unwrap_or(100) },
        optimizer: OptimizerSettings {
            weight_decay: args.weight_decay.unwrap_or(0.1) as f32,
            clip: args.clip.unwrap_or(1.0),
            ..OptimizerSettings::default()
        },
    };
    // Mistakes come to light before anything is made or written.
    let wanted = wanted_config(args)?;
    refuse_a_model(&args.out)?;
    fs::create_dir_all(&args.out).with_context(|| format!("--out {}", args.out.display()))?;
    if !args.out.join("tokenizer.json").exists() {
        eprintln!("making the tokenizer");
        let made = tokenizer::train(&settings.data, TOKENIZER_CONVERSATIONS, TOKENIZER_ENTRIES)?;
        tokenizer::save(&made, &args.out)?;
    }
    let config = fit_to_tokenizer(wanted, &args.out)?;
    device.seed(settings.seed);
    let model = M1::new(&config, device).materialize();
    let trainer = Trainer::new(model, settings.optimizer, settings.micro_tokens, threads, 0)?;
    let state = RunState { progress: Progress::default(), settings };
    Ok((state, trainer))
}

/// A new run's folder may hold a tokenizer, but no model: the run would end up in its place.
fn refuse_a_model(out: &Path) -> anyhow::Result<()> {
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

/// An old run. What decides its result stays as it was; a flag that says otherwise is a mistake worth a line.
fn resume(
    args: &Args,
    folder: &Path,
    saved: &RunState,
    threads: usize,
    device: &Device,
) -> anyhow::Result<(RunState, Trainer)> {
    let s = &saved.settings;
    let float = |v: Option<u64>| v.map(|v| v as f64);
    for (flag, given, was) in [
        ("--seed", float(args.seed), s.seed as f64),
        ("--batch-tokens", float(args.batch_tokens), s.batch_tokens as f64),
        ("--micro-tokens", float(args.micro_tokens), s.micro_tokens as f64),
        ("--lr", args.lr, s.schedule.peak),
        ("--warmup", float(args.warmup), s.schedule.warmup as f64),
        ("--weight-decay", args.weight_decay.map(|x| f64::from(x as f32)), s.optimizer.weight_decay.into()),
        ("--clip", args.clip, s.optimizer.clip),
    ] {
        if let Some(given) = given.filter(|&g| g != was) {
            bail!("{flag} {given}: the run in {} has {was}; leave the flag out to go on with it", args.out.display());
        }
    }
    let p = &saved.progress;
    if let Some(steps) = args.steps.filter(|&n| n < p.step) {
        bail!("--steps {steps}: the run in {} is past it, at step {}; give more", args.out.display(), p.step);
    }
    // The minutes that a run was started with are always over when it has ended; that is no mistake.
    if let Some(minutes) = args.minutes.filter(|&m| m * 60.0 < p.elapsed_s && s.minutes != Some(m)) {
        let spent = p.elapsed_s / 60.0;
        bail!("--minutes {minutes}: the run in {} is past it, at {spent:.1} minutes; give more", args.out.display());
    }
    let mut state = saved.clone();
    // The length may change: a longer run is a wish people have, and the schedule simply follows.
    if args.steps.is_some() || args.minutes.is_some() {
        (state.settings.steps, state.settings.minutes) = (args.steps, args.minutes);
    }
    let trainer = run::load_trainer(folder, &state, threads, device)?;
    if args.preset.is_some() || args.config.is_some() || args.router_aux_loss_coef.is_some() {
        let wanted = fit_to_tokenizer(wanted_config(args)?, &args.out)?;
        let sizes = |c: &ModelConfig| ModelConfig { extra: Default::default(), ..c.clone() };
        if sizes(&wanted) != sizes(trainer.model().config()) {
            bail!(
                "--preset, --config, --router-aux-loss-coef: the run in {} has another configuration; leave them out",
                args.out.display()
            );
        }
    }
    Ok((state, trainer))
}

/// The configuration that the flags name.
fn wanted_config(args: &Args) -> anyhow::Result<ModelConfig> {
    let mut config = match (&args.config, args.preset.as_deref().unwrap_or("nano")) {
        (Some(file), _) => ModelConfig::from_file(file).context("--config")?,
        (None, name) => {
            ModelConfig::preset(name).with_context(|| format!("--preset {name}: expected nano, small or base"))?
        }
    };
    if let Some(coefficient) = args.router_aux_loss_coef {
        config.router_aux_loss_coef = coefficient;
    }
    Ok(config)
}

/// Gives a configuration the vocabulary and special ids of the tokenizer in `folder`.
fn fit_to_tokenizer(mut config: ModelConfig, folder: &Path) -> anyhow::Result<ModelConfig> {
    let made = load_tokenizer(folder)?;
    config.vocab_size = tokenizer::vocab_size(&made);
    config.max_position_embeddings = config.max_position_embeddings.min(4096);
    for (key, token) in [("bos_token_id", "<beginning_of_sentence>"), ("eos_token_id", "<end_of_sentence>")] {
        config.extra.insert(key.into(), tokenizer::special_id(&made, token)?.into());
    }
    config.validate()?;
    Ok(config)
}

/// Reads the tokenizer of a model's folder.
pub(crate) fn load_tokenizer(folder: &Path) -> anyhow::Result<Tokenizer> {
    let path = folder.join("tokenizer.json");
    Tokenizer::from_file(&path).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))
}

/// Set by the first Ctrl-C (or a termination signal), which says `what` follows; the second one ends the process at once.
pub(crate) fn stop_on_signal(what: &'static str) -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\n{what}");
    })?;
    Ok(stop)
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x.is_finite() => Ok(x),
        _ => Err("expected a number above 0".into()),
    }
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x >= 0.0 && x.is_finite() => Ok(x),
        _ => Err("expected a number, 0 or above".into()),
    }
}
