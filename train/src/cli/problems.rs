//! `m1-train problems`: conversations of problems and their solutions, as a file to fine-tune on.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use m1_infer::files;

use crate::cli::eval::{chosen_tasks, difficulties};
use crate::cli::{up_to, whole};
use crate::conversation::Role;
use crate::data::training_problem;
use crate::jsonl;
use crate::tasks::Draw;

const AFTER_HELP: &str = "\
Examples:
  m1-train problems --n 2000 --out set.jsonl
  m1-train problems --tasks clock,equation --difficulties 6..8 --n 500 --seed 7 | head -1

Every problem is from the training side of the split: none of them is one that `m1-train eval` asks. The same flags
give the same file; another --seed gives other draws, of which easy tasks repeat many.";

/// Conversations that a file may have.
const MOST: u64 = 100_000_000;

/// Write reasoning problems with their solutions as conversations in JSON lines, for `m1-train sft`
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Tasks by name, separated by commas [default: all]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    tasks: Vec<String>,
    /// One difficulty (3), a range (1..5, both included) or a list (1,3,5)
    #[arg(long, visible_alias = "difficulty", value_name = "D", default_value = "1..5", allow_negative_numbers = true)]
    difficulties: String,
    /// Conversations, spread over tasks and difficulties by chance
    #[arg(long, value_name = "N", default_value_t = 1000, allow_negative_numbers = true, value_parser = up_to::<MOST>)]
    n: u64,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true, value_parser = whole)]
    seed: u64,
    /// The file to write [default: standard output]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let difficulties = difficulties(&args.difficulties)
        .with_context(|| format!("--difficulties {}: expected 1 to 10, as 3, 1..5 or 1,3,5", args.difficulties))?;
    let chosen = chosen_tasks(&args.tasks)?;
    let lines = (0..args.n).map(|index| {
        let mut draw = Draw::new(args.seed, index, "problems");
        let (task, difficulty) = (*draw.pick(&chosen), *draw.pick(&difficulties));
        let Some(problem) = training_problem(task, "problems", args.seed, index, difficulty, |_| true) else {
            bail!("--tasks {}: has no training problem of difficulty {difficulty}", task.name());
        };
        let reply = problem.reply();
        Ok(jsonl::line(&[(Role::User, problem.question), (Role::Assistant, reply)])?)
    });
    match &args.out {
        Some(path) => {
            let text = lines.collect::<anyhow::Result<String>>()?;
            files::write(path, text.as_bytes()).with_context(|| format!("--out {}", path.display()))?;
            eprintln!("{}: {} conversations", path.display(), args.n);
        }
        None => {
            let mut out = std::io::BufWriter::new(std::io::stdout().lock());
            for line in lines {
                out.write_all(line?.as_bytes())?;
            }
            out.flush()?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
