//! The command line of `m1-train`; each subcommand is a file.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub mod eval;
pub mod pretrain;

/// Train and evaluate models of the MiniMax-M1 architecture.
#[derive(Debug, Parser)]
#[command(name = "m1-train", version, about, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Pretrain(pretrain::Args),
    Eval(eval::Args),
}

/// Parses the command line and runs it.
pub fn run() -> anyhow::Result<ExitCode> {
    match Cli::parse().command {
        Command::Pretrain(args) => pretrain::run(args),
        Command::Eval(args) => eval::run(args),
    }
}
