//! cargo run --release --example chat
//!
//! Talks with the model that ships in the repository, or with the one that `--model DIR` names.

use clap::Parser;
use m1_infer::repl::{self, ReplOptions};
use m1_infer::{Assets, Chat, DeviceChoice, LoadSettings, cli};
use std::path::PathBuf;
use std::process::ExitCode;

/// Talk with an M1 model.
#[derive(Parser)]
struct Args {
    /// Directory of a checkpoint
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/m1-nano"))]
    model: PathBuf,
    /// auto (CUDA, then a GPU through wgpu, then the CPU), cuda[:N], wgpu[:N] or cpu
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Ask this, print the reply, leave
    #[arg(long)]
    prompt: Option<String>,
}

fn chat(args: Args) -> anyhow::Result<()> {
    let device = args.device.open()?;
    eprintln!("device: {}", device.name);
    let assets = Assets::load(&args.model, &device, &LoadSettings::default())?;
    let mut chat = Chat::new(&assets, assets.generation.sampling())?;
    match args.prompt {
        Some(prompt) => drop(repl::one_shot(&mut chat, &prompt, &ReplOptions::default())?),
        None => repl::run(&mut chat, ReplOptions::default())?,
    }
    Ok(())
}

fn main() -> ExitCode {
    match cli::parse() {
        Ok(args) => cli::exit(chat(args)),
        Err(status) => status,
    }
}
