//! cargo run --release --example serve
//!
//! Serves the model that ships in the repository, or the one that `--model DIR` names, over OpenAI's API: a page to talk
//! with it is at http://localhost:8000. `m1 serve` has all the settings; this is how a program of your own starts a server.

use clap::Parser;
use m1_infer::batching::{BatchSettings, SchedulerSettings};
use m1_infer::server::{self, state::Settings};
use m1_infer::{Assets, DeviceChoice, LoadSettings, cli};
use std::path::PathBuf;
use std::process::ExitCode;

/// Serve an M1 model.
#[derive(Parser)]
struct Args {
    /// Directory of a checkpoint
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/m1-nano"))]
    model: PathBuf,
    /// auto (CUDA, then a GPU through wgpu, then the CPU), cuda[:N], wgpu[:N] or cpu
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Port to listen on
    #[arg(long, default_value_t = 8000)]
    port: u16,
}

fn serve(args: Args) -> anyhow::Result<()> {
    let settings = Settings { port: args.port, ..Settings::default() };
    let rows = settings.parallel;
    // Eight replies at once, and 256 MiB for the beginnings of conversations.
    let limits =
        move |assets: &Assets| SchedulerSettings::new(BatchSettings::new(rows, assets.engine.context()), 256 << 20);
    let load = move || {
        let device = args.device.open()?;
        eprintln!("device: {}", device.name);
        Ok(Assets::load(&args.model, &device, &LoadSettings::default())?)
    };
    server::run(settings, limits, load)
}

fn main() -> ExitCode {
    match cli::parse() {
        Ok(args) => cli::exit(serve(args)),
        Err(status) => status,
    }
}
