//! `m1`: results on standard output, everything else on standard error, one line for every mistake of the user, exit
//! status 0 only on success (2 for a wrong command line, 130 after Ctrl-C). A reader that goes away is no error.

pub mod bench;
pub mod chat;
pub mod common;
pub mod generate;
pub mod inspect;
pub mod logits;
pub mod quantize;
pub mod serve;

use anyhow::Context;
use clap::{Parser, Subcommand};
use m1_kernels::base::{memory, pool};
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "m1",
    version,
    about = "MiniMax-M1 in Rust: talk to it, serve it, complete text, look at its numbers, make it smaller",
    after_help = "Examples:\n  m1 chat --model examples/m1-nano\n  m1 generate --model DIR --prompt 'Once upon a time' -n 64\n  m1 inspect --model DIR\n\n`m1 COMMAND --help` tells more."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Talk to the model in its chat template, at a prompt or for one question
    Chat(chat::Args),
    /// Serve it over OpenAI's API, many conversations at once, with a page to chat
    Serve(serve::Args),
    /// Complete a text as it is, without the chat template
    Generate(generate::Args),
    /// Write the logits of given token ids to a safetensors file
    Logits(logits::Args),
    /// Write a checkpoint whose experts, or all matrices, are in blocks of 8 or 4 bits
    Quantize(quantize::Args),
    /// Measure tokens a second, reading and writing
    Bench(bench::Args),
    /// Say what a checkpoint holds and needs
    Inspect(inspect::Args),
}

/// The whole program.
pub fn main() -> ExitCode {
    let cli: Cli = match parse() {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    let threads = match &cli.command {
        Command::Bench(args) => args.threads(),
        _ => pool::threads(),
    };
    exit(prepare(threads).and_then(|()| match cli.command {
        Command::Chat(args) => chat::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Logits(args) => logits::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Inspect(args) => inspect::run(args),
    }))
}

/// What a program does before it runs a command: it keeps the memory that is freed, and gives Burn's own operations, which are on
/// rayon's threads, as many of them as the kernels' pool has. Once in a process.
pub fn prepare(threads: usize) -> anyhow::Result<()> {
    memory::keep_freed();
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().with_context(|| format!("{threads} threads"))
}

/// Reads the command line; a mistake in it is told in one line.
pub fn parse<P: Parser>() -> Result<P, ExitCode> {
    P::try_parse().map_err(|error| {
        if !error.use_stderr() {
            let _ = error.print(); // --help, --version
            return ExitCode::SUCCESS;
        }
        // clap's first paragraph says what is wrong; without a command it is the help itself.
        let text = error.to_string();
        if !text.starts_with("error:") {
            note!("{}", text.trim_end());
            return ExitCode::from(2);
        }
        let first: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
        note!("{} (--help tells more)", first.join(" "));
        ExitCode::from(2)
    })
}

/// The exit status of a command, its error told in one line.
pub fn exit(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    let broken_pipe = |e: &(dyn std::error::Error + 'static)| {
        let io = e.downcast_ref::<std::io::Error>();
        io.is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(broken_pipe) {
        return ExitCode::SUCCESS;
    }
    note!("error: {}", format!("{error:#}").replace('\n', " "));
    ExitCode::FAILURE
}
