//! `m1-train sft`: a model that is there already, trained further on a file of conversations.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use burn::tensor::Device;
use m1_infer::cli::common::HubArgs;
use m1_infer::template::TemplateError;
use m1_model::config::ModelConfig;
use serde_json::json;

use crate::cli::pretrain::describe;
use crate::cli::run_args::{Rates, RunArgs, load_tokenizer, positive, refuse_a_model, stop_on_signal};
use crate::cli::{count, whole};
use crate::conversation::{Message, Role, render};
use crate::data::Source;
use crate::eval_loss::EvalSet;
use crate::run::{self, Progress, RunState, Settings};
use crate::sft::{Conversations, Limits, SftSource};
use crate::supervised::{steps_of, train};
use crate::trainer::Trainer;

/// What of a model's directory goes along, where it is there.
const COPIED: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
];

const AFTER_HELP: &str = "\
Examples:
  m1-train sft --model examples/m1-nano --data set.jsonl --out runs/sft --epochs 2
  m1-train sft --model examples/m1-nano --data set.jsonl --out runs/sft --epochs 2 --eval test.jsonl --resume
  m1-train problems --n 2000 --out set.jsonl                  (makes such a file from the tasks)

A line of the file is {\"messages\": [{\"role\": \"system|user|assistant\", \"content\": \"...\"}, ...]}. Loss is taken
on what the assistant says and on the token that ends it. A run gives the same weights to the bit however often it is
stopped and resumed, with any --threads.";

/// Fine-tune a model on conversations in JSON lines
///
/// Leaves a model directory in Hugging Face form (bf16) in --out, with the tokenizer, chat template and generation
/// settings of --model, beside metrics.jsonl, eval.jsonl, loss.svg and the last checkpoint.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Directory of the model to begin from, or its Hugging Face id, owner/name[@revision]
    #[arg(long, short, value_name = "DIR|ID")]
    model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// Conversations to learn from, a JSON object a line
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Conversations to measure the loss on: before the first step, every --eval-every steps and at the end
    #[arg(long, value_name = "FILE")]
    eval: Option<PathBuf>,
    /// Steps between measurements
    #[arg(long, value_name = "N", default_value_t = 100, allow_negative_numbers = true, value_parser = count)]
    eval_every: u64,
    /// How often the file is read, each time in another order [default: 1]
    #[arg(long, value_name = "N", conflicts_with = "steps", allow_negative_numbers = true, value_parser = count)]
    epochs: Option<u64>,
    /// Steps in all, in place of --epochs
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = count)]
    steps: Option<u64>,
    /// Highest learning rate [default: 0.0002]
    #[arg(long, value_name = "RATE", allow_negative_numbers = true, value_parser = positive)]
    lr: Option<f64>,
    /// Steps of linear warm-up [default: 10]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole)]
    warmup: Option<u64>,
    /// Seed of the order [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole)]
    seed: Option<u64>,
    #[command(flatten)]
    run: RunArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let open = args.run.device.open()?;
    eprintln!("device: {}", open.name);
    let (out, threads) = (&args.run.out, args.run.threads());
    let model = args.hub.directory(&args.model)?;
    let model = model.canonicalize().with_context(|| format!("--model {}", args.model.display()))?;
    let checkpoint = run::latest::<RunState<SftSource>>(out)?;
    let (mut state, mut trainer, source) = match (&checkpoint, args.run.resume) {
        (Some((folder, saved)), true) => resume(&args, &model, folder, saved, threads, &open.device)?,
        (Some((_, saved)), false) => return Err(args.run.refuse_run(&saved.progress)),
        (None, resume) => {
            if resume {
                eprintln!("{}: no checkpoint yet, starting at step 0", out.display());
            }
            start(&args, &model, threads, &open.device)?
        }
    };
    let micro_tokens = state.settings.micro_tokens;
    let eval = match &args.eval {
        Some(path) => {
            let set = read(path, out, trainer.model().config(), 0, None).context("--eval")?;
            Some(EvalSet::new(set.into_examples(), args.eval_every, micro_tokens, threads)?)
        }
        None => None,
    };
    describe(&trainer, &state, threads);
    eprintln!("{} conversations, {} steps in all", source.len(), state.settings.steps.unwrap_or(0));
    let stop = stop_on_signal(|| eprintln!("\nstopping after this step; once more to leave without saving"))?;
    let ended = train(out, &mut trainer, &mut state, &source, eval.as_ref(), args.run.pace(), &stop)?;
    Ok(args.run.tell(ended, &state.progress))
}

impl Args {
    fn rates(&self) -> Rates {
        Rates { seed: self.seed, lr: self.lr, warmup: self.warmup }
    }
}

/// A new run. Mistakes come to light before anything is written.
fn start(
    args: &Args,
    model: &Path,
    threads: usize,
    device: &Device,
) -> anyhow::Result<(RunState<SftSource>, Trainer, Conversations)> {
    let out = &args.run.out;
    refuse_a_model(out)?;
    check_template(model)?;
    let config = ModelConfig::from_file(model.join("config.json")).context("--model")?;
    let epochs = args.epochs.or(args.steps.is_none().then_some(1));
    let source = read(&args.data, model, &config, args.seed.unwrap_or(1), epochs).context("--data")?;
    let data =
        SftSource { model: model.display().to_string(), hash: source.hash(), conversations: source.len(), epochs };
    let settings = args.run.settings(data, args.rates(), 2e-4, 10);
    let steps = args.steps.unwrap_or_else(|| steps_of(source.lengths(0), settings.batch_tokens));
    let settings = Settings { steps: Some(steps), ..settings };
    let loaded = run::load_model(model, device).context("--model")?;
    fs::create_dir_all(out).with_context(|| format!("--out {}", out.display()))?;
    copy_text_side(model, out)?;
    let trainer = Trainer::new(loaded, settings.optimizer, settings.micro_tokens, threads, 0)?;
    Ok((RunState { progress: Progress::default(), settings }, trainer, source))
}

/// An old run. What decides its result stays as it was; its length may change.
fn resume(
    args: &Args,
    model: &Path,
    folder: &Path,
    saved: &RunState<SftSource>,
    threads: usize,
    device: &Device,
) -> anyhow::Result<(RunState<SftSource>, Trainer, Conversations)> {
    let (s, p, out) = (&saved.settings, &saved.progress, &args.run.out);
    args.run.refuse_changes(args.rates(), s)?;
    if Path::new(&s.data.model) != model {
        bail!("--model {}: the run in {} began from {}", model.display(), out.display(), s.data.model);
    }
    let mut state = saved.clone();
    if args.steps.is_some() || args.epochs.is_some() {
        state.settings.data.epochs = args.epochs;
    }
    let trainer = run::load_trainer(folder, &state, threads, device)?;
    let epochs = state.settings.data.epochs;
    let source = read(&args.data, out, trainer.model().config(), s.seed, epochs).context("--data")?;
    if (source.hash(), source.len()) != (s.data.hash, s.data.conversations) {
        let (data, out) = (args.data.display(), out.display());
        bail!("--data {data}: not the {} conversations that the run in {out} began with", s.data.conversations);
    }
    if let Some(limit) = source.limit().filter(|&limit| limit < p.example) {
        let read = p.example as f64 / source.len() as f64;
        bail!("--epochs {}: the run in {} is past it, at {read:.2}; give more", limit / source.len(), out.display());
    }
    if let Some(steps) = args.steps.filter(|&n| n < p.step) {
        bail!("--steps {steps}: the run in {} is past it, at step {}; give more", out.display(), p.step);
    }
    if let Some(steps) = args.steps {
        state.settings.steps = Some(steps);
    } else if args.epochs.is_some() {
        state.settings.steps = Some(p.step + steps_of(source.lengths(p.example), s.batch_tokens));
    }
    Ok((state, trainer, source))
}

/// Reads conversations for the model of that configuration, with the tokenizer in `folder`.
fn read(
    path: &Path,
    folder: &Path,
    config: &ModelConfig,
    seed: u64,
    epochs: Option<u64>,
) -> anyhow::Result<Conversations> {
    let limits = Limits { tokens: config.max_position_embeddings, vocab: config.vocab_size };
    Ok(Conversations::open(path, &load_tokenizer(folder)?, limits, seed, epochs)?)
}

/// Refuses a model whose chat template renders other text than what training makes of a conversation: it would be
/// asked in another form than it has learned.
fn check_template(model: &Path) -> anyhow::Result<()> {
    let template = match m1_infer::tokenizer::Tokenizer::from_dir(model)?.template() {
        Ok(template) => template,
        Err(TemplateError::Missing { .. }) => {
            eprintln!("{}: has no chat template; training in MiniMax-M1's form", model.display());
            return Ok(());
        }
        Err(e) => return Err(e.into()),
    };
    let conversation: Vec<Message> =
        [(Role::System, "Be good."), (Role::User, "Hi"), (Role::Assistant, "Hey"), (Role::User, "1+1?")]
            .map(|(role, text)| (role, text.to_string()))
            .to_vec();
    for messages in [&conversation[..], &conversation[1..]] {
        let of = |(role, text): &Message| json!({"role": role, "content": text});
        let json: Vec<_> = messages.iter().map(of).collect();
        let rendered = template.render(&json, &[], false, false)?;
        if rendered != render(messages) {
            bail!(
                "--model {}: its chat template is not MiniMax-M1's, the form that sft trains in; it begins with {:?}",
                model.display(),
                rendered.chars().take(60).collect::<String>()
            );
        }
    }
    Ok(())
}

/// Copies what turns text into ids and back, and how replies are drawn.
pub(crate) fn copy_text_side(model: &Path, out: &Path) -> anyhow::Result<()> {
    COPIED.iter().try_for_each(|name| copy(&model.join(name), &out.join(name)))
}

/// Copies a file under a temporary name and renames it; one that is not there is left out.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    if !from.exists() {
        return Ok(());
    }
    let mut partial = to.to_path_buf().into_os_string();
    partial.push(".partial");
    let copied = fs::copy(from, &partial).and_then(|_| fs::rename(&partial, to));
    copied.with_context(|| format!("{} to {}", from.display(), to.display()))
}
