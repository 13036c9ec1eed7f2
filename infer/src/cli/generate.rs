//! `m1 generate`: completes a text as it is. The chat template belongs to `m1 chat`.

use super::common::{ModelArgs, SamplingArgs, whole};
use crate::chat::Stats;
use crate::engine::Finish;
use crate::interrupt::{self, Busy};
use crate::progress::ReadingBar;
use crate::render::printable;
use crate::stop::StopStrings;
use crate::stream::TextStream;
use anyhow::Context;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Flags of `m1 generate`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  m1 generate --model DIR --prompt 'Once upon a time' -n 64
  m1 generate --model DIR --prompt-file story.txt --temperature 0 --stop '\\n\\n'
  echo 'def f(x):' | m1 generate --model DIR --prompt-file - --seed 7 --json

The prompt is completed as it stands: no chat template is put around it (`m1 chat --prompt` does that), and special
tokens written in it count as such. Standard output gets the completion, without the prompt.")]
#[command(group(clap::ArgGroup::new("text").required(true).args(["prompt", "prompt_file"])))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to complete
    #[arg(long, short, value_name = "TEXT")]
    prompt: Option<String>,
    /// A file with the text to complete; - is standard input
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// The prompt as it is, without the chat template: what this command does in any case
    #[arg(long, hide = true)]
    raw: bool,
    /// The most tokens to make
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128, allow_negative_numbers = true,
        value_parser = whole::<usize>)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// End before this text; may be given several times (\n and \t are understood)
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after the ids that end a turn
    #[arg(long)]
    ignore_eos: bool,
    /// The most tokens of prompt and completion [default: max_position_embeddings]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole::<usize>)]
    context: Option<usize>,
    /// One JSON object: text, ids, their log-probabilities, why it ended, seed and times
    #[arg(long)]
    json: bool,
    /// Time to first token and tokens/s, on standard error
    #[arg(long)]
    stats: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    args.sampling.check()?;
    anyhow::ensure!(!args.stop.iter().any(String::is_empty), "--stop: the text is empty");
    let prompt = prompt(&args)?;
    let assets = args.model.load(args.context)?;
    let mut sampler = assets.sampler(args.sampling.over(assets.generation.sampling())?)?;
    let ids = assets.tokenizer.encode(&prompt, true)?;
    let end_ids = if args.ignore_eos { &[][..] } else { &assets.end_ids };
    let unescape = |stop: &String| stop.replace("\\n", "\n").replace("\\t", "\t");
    let mut stops = StopStrings::new(args.stop.iter().map(unescape));

    let busy = Busy::begin();
    let start = Instant::now();
    let mut session = assets.engine.session();
    let mut bar = ReadingBar::begin();
    let mut watch = |read, total| {
        bar.show(read, total);
        !busy.stopped()
    };
    let prefill = session.read(&ids, &mut watch);
    bar.clear();
    let prefill = match prefill {
        Err(_) if busy.stopped() => std::process::exit(interrupt::EXIT_STATUS),
        prefill => prefill?,
    };
    let prefill_seconds = start.elapsed().as_secs_f64();

    let mut out = std::io::stdout().lock();
    let terminal = out.is_terminal();
    let mut stream = TextStream::new(&*assets.tokenizer);
    let (mut text, mut made, mut log_probs) = (String::new(), Vec::new(), Vec::new());
    let (mut failed, mut first_token) = (None, None);
    let mut show = |piece: &str| {
        text.push_str(piece);
        if args.json || piece.is_empty() {
            return Ok(());
        }
        let piece = if terminal { printable(piece) } else { piece.into() };
        out.write_all(piece.as_bytes()).and_then(|()| out.flush())
    };
    let finish = session.generate(&mut sampler, end_ids, Some(args.max_tokens), &mut |drawn| {
        first_token.get_or_insert_with(|| start.elapsed());
        made.push(drawn.id);
        log_probs.push(drawn.log_prob);
        failed = show(&stops.push(&stream.push(drawn.id))).err();
        failed.is_none() && !stops.stopped() && !busy.stopped()
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    let rest = stops.push(&stream.finish()) + &stops.finish();
    show(&rest)?;
    let whole_time = start.elapsed();
    let decode_seconds = whole_time.as_secs_f64() - prefill_seconds;

    let reason = match finish {
        Finish::End(_) => "stop",
        Finish::Stopped if stops.stopped() => "stop",
        Finish::Stopped => "interrupted",
        Finish::Length => "length",
        Finish::Context => "context",
    };
    if args.json {
        let result = serde_json::json!({
            "text": text, "ids": made, "log_probs": log_probs, "finish_reason": reason,
            "prompt_tokens": ids.len(), "completion_tokens": made.len(), "seed": sampler.seed(),
            "prefill_seconds": prefill_seconds, "decode_seconds": decode_seconds,
        });
        let result = result.to_string();
        writeln!(out, "{}", if terminal { printable(&result) } else { result.into() })?;
    } else {
        writeln!(out)?;
    }
    out.flush()?;
    if finish == Finish::Context {
        note!("[the context of {} tokens is full]", assets.engine.context());
    }
    if args.stats {
        let stats = Stats {
            cached: prefill.cached,
            computed: prefill.computed,
            made: made.len(),
            first_token: first_token.unwrap_or(whole_time),
            decode: first_token.map_or(Duration::ZERO, |first| whole_time.saturating_sub(first)),
        };
        note!("{stats}, ended by {reason}");
    }
    if busy.stopped() {
        std::process::exit(interrupt::EXIT_STATUS);
    }
    Ok(())
}

fn prompt(args: &Args) -> anyhow::Result<String> {
    let (from, text) = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => ("--prompt".to_string(), text.clone()),
        (None, Some(path)) if path.as_os_str() == "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("--prompt-file -")?;
            ("standard input".to_string(), text)
        }
        (None, Some(path)) => {
            let name = path.display().to_string();
            (name.clone(), std::fs::read_to_string(path).context(name)?)
        }
        (None, None) => anyhow::bail!("--prompt or --prompt-file is needed"), // clap has refused this already
    };
    anyhow::ensure!(!text.is_empty(), "{from}: the prompt is empty");
    Ok(text)
}
