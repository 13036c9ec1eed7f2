//! The command line of `m1-train`; each subcommand is a file.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use m1_infer::cli::{parse, prepare};
use m1_kernels::base::pool;

pub mod bench;
pub mod cispo;
pub mod eval;
pub mod pretrain;
pub mod problems;
pub mod report;
mod run_args;
pub mod sft;

const AFTER_HELP: &str = "\
Examples:
  m1-train pretrain --out runs/nano --steps 3000
  m1-train cispo --model examples/m1-nano --out runs/cispo --config train/configs/laptop.toml
  m1-train eval --model runs/cispo

`m1-train COMMAND --help` tells more.";

/// Train and evaluate models of the MiniMax-M1 architecture.
#[derive(Debug, Parser)]
#[command(name = "m1-train", version, about, arg_required_else_help = true, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Pretrain(pretrain::Args),
    Sft(sft::Args),
    Cispo(cispo::Args),
    Problems(problems::Args),
    Eval(eval::Args),
    Report(report::Args),
    Bench(bench::Args),
}

/// Parses the command line and runs it; a mistake in it is told in one line.
pub fn run() -> anyhow::Result<ExitCode> {
    let cli: Cli = match parse() {
        Ok(cli) => cli,
        Err(status) => return Ok(status),
    };
    prepare(pool::threads())?;
    match cli.command {
        Command::Pretrain(args) => pretrain::run(args),
        Command::Sft(args) => sft::run(args),
        Command::Cispo(args) => cispo::run(args),
        Command::Problems(args) => problems::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Report(args) => report::run(args),
        Command::Bench(args) => bench::run(args),
    }
}

/// An error and its causes in one line, each once: many errors name their cause themselves.
pub fn told(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(|e| e.to_string().replace('\n', " ")) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

/// How many threads to use: as asked, or one a core (which `M1_THREADS` lowers).
fn threads(asked: Option<u64>) -> usize {
    asked.map_or_else(pool::threads, |n| n as usize)
}

/// A whole number of the command line.
fn whole(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "expected a whole number, 0 or above".into())
}

/// One that is not 0.
fn count(text: &str) -> Result<u64, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number, 1 or above".into())
}

/// One from 1 to MAX.
fn up_to<const MAX: u64>(text: &str) -> Result<u64, String> {
    count(text).ok().filter(|&n| n <= MAX).ok_or_else(|| format!("expected a whole number from 1 to {MAX}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_cause_is_told_once() {
        let io = |path: &str| crate::run::io_error(std::path::Path::new(path))(std::io::Error::other("disk on fire"));
        assert_eq!(told(&io("a").into()), "a: disk on fire");
        let error = Err::<(), _>(io("a")).context("--out b").unwrap_err();
        assert_eq!(told(&error), "--out b: a: disk on fire");
    }
}
