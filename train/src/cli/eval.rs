//! `m1-train eval`: accuracy on problems that training never saw.

use std::collections::HashSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use m1_infer::cli::common::HubArgs;
use m1_infer::files;
use m1_infer::sampler::SamplingOptions;
use m1_model::checkpoint::{self, Bits, LoadOptions, Quantization, WeightDtype};
use m1_model::device::DeviceChoice;

use crate::cli::{count, threads, up_to, whole};
use crate::eval::{EvalSettings, Mode, Subject, evaluate, markdown};
use crate::language::Language;
use crate::tasks;
use crate::trainer::workers;

const AFTER_HELP: &str = "\
Examples:
  m1-train eval --model examples/m1-nano
  m1-train eval --model runs/nano --tasks addition,clock --difficulty 3..5 --n 200 --mode greedy --show 2";

/// Measure accuracy per task and difficulty on held-out problems
///
/// Prints Markdown tables (per cent solved), greedy decoding and sampling apart, and the perplexity of the right solutions.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Directory of the model, or its Hugging Face id, owner/name[@revision]
    #[arg(long, value_name = "DIR|ID")]
    model: PathBuf,
    #[command(flatten)]
    hub: HubArgs,
    /// Tasks by name, separated by commas [default: all]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    tasks: Vec<String>,
    /// One difficulty (3), a range (1..5, both included) or a list (1,3,5)
    #[arg(long, value_name = "D", default_value = "1..5", allow_negative_numbers = true)]
    difficulty: String,
    /// Problems per task and difficulty
    #[arg(long, value_name = "N", default_value_t = 50, allow_negative_numbers = true, value_parser = up_to::<1_000_000>)]
    n: u64,
    /// How replies are drawn
    #[arg(long, value_enum, default_value_t = Modes::Both)]
    mode: Modes,
    /// Temperature of the sampled mode
    #[arg(long, value_name = "T", default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Nucleus of the sampled mode
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true)]
    top_p: f32,
    /// Longest reply; one that is cut counts as wrong
    #[arg(long, value_name = "N", default_value_t = 400, allow_negative_numbers = true, value_parser = count)]
    max_new_tokens: u64,
    /// Replies decoded together in each batch
    #[arg(long, value_name = "N", default_value_t = 32, allow_negative_numbers = true, value_parser = up_to::<4096>)]
    rows: u64,
    /// Quantize the experts while loading, as `m1 quantize` would have written them: int8 or int4
    #[arg(long, value_name = "FORMAT")]
    quantize: Option<Bits>,
    /// With --quantize: attention, embedding and head too
    #[arg(long, requires = "quantize")]
    quantize_all: bool,
    /// Weights in memory: f32 or bf16 [default: as stored]
    #[arg(long, value_name = "DTYPE")]
    dtype: Option<WeightDtype>,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = whole)]
    seed: u64,
    /// Also print so many replies of each kind
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = whole)]
    show: u64,
    /// Training conversations to look through for the questions asked, which must not be there
    #[arg(long, value_name = "N", default_value_t = 20_000, allow_negative_numbers = true, value_parser = whole)]
    overlap: u64,
    /// Also write the scores to a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Batches decoded side by side [default: one a core]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = up_to::<1024>)]
    threads: Option<u64>,
    /// auto, cuda[:n], wgpu[:n] or cpu
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceChoice,
}

/// Which replies to draw.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Modes {
    Greedy,
    Sampled,
    Both,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let difficulties = difficulties(&args.difficulty)
        .with_context(|| format!("--difficulty {}: expected 1 to 10, as 3, 1..5 or 1,3,5", args.difficulty))?;
    let chosen = chosen_tasks(&args.tasks)?;
    let settings = EvalSettings {
        difficulties,
        problems: args.n,
        seed: args.seed,
        modes: match args.mode {
            Modes::Greedy => vec![Mode::Greedy],
            Modes::Sampled => vec![Mode::Sampled],
            Modes::Both => vec![Mode::Greedy, Mode::Sampled],
        },
        temperature: args.temperature,
        top_p: args.top_p,
        max_new_tokens: args.max_new_tokens as usize,
        rows: args.rows as usize,
        samples: args.show as usize,
        overlap_conversations: args.overlap,
    };
    // Found out before the work, not after it.
    SamplingOptions { temperature: args.temperature, top_p: args.top_p, ..SamplingOptions::default() }.validate()?;
    if let Some(path) = &args.json
        && !path.parent().is_none_or(|p| p.as_os_str().is_empty() || p.is_dir())
    {
        bail!("--json {}: its folder does not exist", path.display());
    }
    let dir = args.hub.directory(&args.model)?;
    let open = args.device.open()?;
    eprintln!("device: {}", open.name);
    let quantize = args.quantize.map(|bits| Quantization::new(bits, 32, args.quantize_all)).transpose();
    let quantize = quantize.map_err(anyhow::Error::msg)?;
    let options = LoadOptions { dtype: args.dtype, quantize, ..LoadOptions::default() };
    let model = checkpoint::load(&dir, &open.device, &options)?;
    let Language { data, tokenizer, end_ids } = Language::open(&dir)?;

    let pools = workers(threads(args.threads))?;
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template("{bar:30.cyan/dim} {pos}/{len} problems, {eta} left")?);
    let subject = Subject { model: &model, tokenizer: &tokenizer, end_ids, data: &data };
    let report = evaluate(&subject, &chosen, &settings, &pools, &bar)?;
    bar.finish_and_clear();

    if let Some(path) = &args.json {
        let scores = serde_json::to_string_pretty(&report)? + "\n";
        files::write(path, scores.as_bytes()).with_context(|| format!("--json {}", path.display()))?;
    }
    let mut out = std::io::stdout().lock();
    for (task, difficulty, mode, samples) in &report.samples {
        for sample in samples {
            let verdict = if sample.solved { "solved" } else { "wrong" };
            writeln!(out, "--- {task}, difficulty {difficulty}, {mode:?}: {verdict}")?;
            writeln!(out, "{}\n{}", sample.question, sample.reply)?;
            if !sample.solved {
                writeln!(out, "(expected: {})", sample.expected)?;
            }
        }
    }
    write!(out, "{}", markdown(&report.scores, &settings))?;
    writeln!(
        out,
        "Perplexity {:.4} over the {} tokens of the problems' own solutions.",
        report.perplexity, report.solution_tokens
    )?;
    writeln!(
        out,
        "{} different questions; {} of them occur in the first {} training conversations.",
        report.questions, report.overlap, report.overlap_conversations
    )?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn chosen_tasks(names: &[String]) -> anyhow::Result<Vec<&'static dyn tasks::Task>> {
    if names.is_empty() {
        return Ok(tasks::all().to_vec());
    }
    let known = || tasks::all().iter().map(|t| t.name()).collect::<Vec<_>>().join(", ");
    let by_name = |name: &String| {
        tasks::by_name(name).with_context(|| format!("--tasks {name}: no such task; there are {}", known()))
    };
    let mut seen = HashSet::new();
    names.iter().filter(|name| seen.insert(*name)).map(by_name).collect()
}

/// `3`, `1..5` (both ends included) or `1,3,5`; each from 1 to 10 and only once.
pub(crate) fn difficulties(text: &str) -> Option<Vec<u8>> {
    let number = |s: &str| s.trim().parse::<u8>().ok().filter(|d| (1..=10).contains(d));
    match text.split_once("..") {
        Some((low, high)) => {
            let (low, high) = (number(low)?, number(high.trim_start_matches('='))?);
            (low <= high).then(|| (low..=high).collect())
        }
        None => {
            let all: Vec<u8> = text.split(',').map(number).collect::<Option<_>>()?;
            let mut seen = HashSet::new();
            Some(all.into_iter().filter(|d| seen.insert(*d)).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn difficulties_as_people_write_them() {
        assert_eq!(difficulties("3"), Some(vec![3]));
        assert_eq!(difficulties("1..5"), Some(vec![1, 2, 3, 4, 5]));
        assert_eq!(difficulties("2..=3"), Some(vec![2, 3]));
        assert_eq!(difficulties("1,4, 10"), Some(vec![1, 4, 10]));
        assert_eq!(difficulties("4,1,4,1"), Some(vec![4, 1]));
        for wrong in ["", "0", "11", "5..1", "a", "1..", "1,,2"] {
            assert_eq!(difficulties(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_tasks_of_the_help_exist() {
        let names: Vec<&str> = AFTER_HELP.split("--tasks ").skip(1).flat_map(|s| s.split_whitespace().next()).collect();
        assert_eq!(names.len(), 1);
        for name in names[0].split(',') {
            assert!(tasks::by_name(name).is_some(), "{name}");
        }
    }
}
