//! `m1-train pretrain`: a model from nothing, on conversations that this crate makes itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use burn::module::Module;
use burn::tensor::Device;
use m1_model::config::ModelConfig;
use m1_model::model::M1;

use crate::cli::run_args::{Rates, RunArgs, load_tokenizer, not_negative, positive, refuse_a_model, stop_on_signal};
use crate::cli::{count, whole};
use crate::data::{Data, DataConfig};
use crate::run::{self, Progress, RunState, Settings};
use crate::supervised::{done, train};
use crate::tokenizer;
use crate::trainer::Trainer;

/// Conversations that the tokenizer is trained on.
const TOKENIZER_CONVERSATIONS: u64 = 20_000;
/// Its entries, at most.
const TOKENIZER_ENTRIES: usize = 1280;

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
    /// Highest learning rate [default: 0.002]
    #[arg(long, value_name = "RATE", allow_negative_numbers = true, value_parser = positive)]
    lr: Option<f64>,
    /// Steps of linear warm-up [default: 100]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole)]
    warmup: Option<u64>,
    /// Weight of the router's auxiliary loss, kept in config.json [default: the configuration's]
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = not_negative)]
    router_aux_loss_coef: Option<f64>,
    /// Seed of weights and examples [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole)]
    seed: Option<u64>,
    #[command(flatten)]
    run: RunArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let open = args.run.device.open()?;
    let threads = args.run.threads();
    eprintln!("device: {}", open.name);
    let device = open.device;
    let out = &args.run.out;
    let checkpoint = run::latest::<RunState>(out)?;
    let (mut state, mut trainer) = match (&checkpoint, args.run.resume) {
        (Some((folder, saved)), true) => resume(&args, folder, saved, threads, &device)?,
        (Some((_, saved)), false) => return Err(args.run.refuse_run(&saved.progress)),
        (None, resume) => {
            if resume {
                eprintln!("{}: no checkpoint yet, starting at step 0", out.display());
            }
            start(&args, threads, &device)?
        }
    };
    let data = Data::new(state.settings.data.clone(), load_tokenizer(out)?)?;
    describe(&trainer, &state, threads);
    let stop = stop_on_signal(|| eprintln!("\nstopping after this step; once more to leave without saving"))?;
    let ended = train(out, &mut trainer, &mut state, &data, None, args.run.pace(), &stop)?;
    Ok(args.run.tell(ended, &state.progress))
}

/// Says what is about to be trained.
pub(crate) fn describe<D>(trainer: &Trainer, state: &RunState<D>, threads: usize) {
    let config = trainer.model().config();
    eprintln!(
        "{:.2} M parameters, {} layers, vocabulary {}, {} threads; step {} ({:.0} % done)",
        trainer.model().num_params() as f64 / 1e6,
        config.num_hidden_layers,
        config.vocab_size,
        threads,
        state.progress.step,
        done(state) * 100.0,
    );
}

impl Args {
    fn rates(&self) -> Rates {
        Rates { seed: self.seed, lr: self.lr, warmup: self.warmup }
    }
}

/// A new run: tokenizer, configuration, random weights.
fn start(args: &Args, threads: usize, device: &Device) -> anyhow::Result<(RunState, Trainer)> {
    let data = DataConfig { seed: args.seed.unwrap_or(1), ..DataConfig::default() };
    let settings = Settings {
        steps: args.steps.or(args.minutes.is_none().then_some(3000)),
        minutes: args.minutes,
        ..args.run.settings(data, args.rates(), 2e-3, 100)
    };
    let out = &args.run.out;
    // Mistakes come to light before anything is made or written.
    let wanted = wanted_config(args)?;
    refuse_a_model(out)?;
    fs::create_dir_all(out).with_context(|| format!("--out {}", out.display()))?;
    if !out.join("tokenizer.json").exists() {
        eprintln!("making the tokenizer");
        let made = tokenizer::train(&settings.data, TOKENIZER_CONVERSATIONS, TOKENIZER_ENTRIES)?;
        tokenizer::save(&made, out)?;
    }
    let config = fit_to_tokenizer(wanted, out)?;
    device.seed(settings.seed);
    let model = M1::new(&config, device).materialize();
    let trainer = Trainer::new(model, settings.optimizer, settings.micro_tokens, threads, 0)?;
    let state = RunState { progress: Progress::default(), settings };
    Ok((state, trainer))
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
    args.run.refuse_changes(args.rates(), s)?;
    let out = &args.run.out;
    let p = &saved.progress;
    if let Some(steps) = args.steps.filter(|&n| n < p.step) {
        bail!("--steps {steps}: the run in {} is past it, at step {}; give more", out.display(), p.step);
    }
    // The minutes that a run was started with are always over when it has ended; that is no mistake.
    if let Some(minutes) = args.minutes.filter(|&m| m * 60.0 < p.elapsed_s && s.minutes != Some(m)) {
        let spent = p.elapsed_s / 60.0;
        bail!("--minutes {minutes}: the run in {} is past it, at {spent:.1} minutes; give more", out.display());
    }
    let mut state = saved.clone();
    // The length may change: a longer run is a wish people have, and the schedule simply follows.
    if args.steps.is_some() || args.minutes.is_some() {
        (state.settings.steps, state.settings.minutes) = (args.steps, args.minutes);
    }
    let trainer = run::load_trainer(folder, &state, threads, device)?;
    if args.preset.is_some() || args.config.is_some() || args.router_aux_loss_coef.is_some() {
        let wanted = fit_to_tokenizer(wanted_config(args)?, out)?;
        let sizes = |c: &ModelConfig| ModelConfig { extra: Default::default(), ..c.clone() };
        if sizes(&wanted) != sizes(trainer.model().config()) {
            bail!(
                "--preset, --config, --router-aux-loss-coef: the run in {} has another configuration; leave them out",
                out.display()
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
