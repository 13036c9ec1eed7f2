//! cargo run --release --example train_cispo
//!
//! Reinforcement learning in a few minutes on two CPU cores: m1-nano is set to problems that it solves now and then, and
//! CISPO raises how often. The same from the command line: `m1-train cispo --help`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use m1_infer::{DeviceChoice, cli};
use m1_model::ModelConfig;
use m1_train::cispo::config::Config;
use m1_train::cispo::{Cispo, State};
use m1_train::language::Language;
use m1_train::metrics::{RlMetrics, read};
use m1_train::run;
use m1_train::trainer::Trainer;

/// Train an M1 model by CISPO.
#[derive(Parser)]
struct Args {
    /// Directory of the model to begin from
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/m1-nano"))]
    model: PathBuf,
    /// Batches of rollouts
    #[arg(long, default_value_t = 60)]
    steps: u64,
    /// Where the run is kept [default: a folder that is removed]
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Two problems that m1-nano seldom or sometimes solves; one update a batch, so the policy is the one that drew the tokens.
const CONFIG: &str = r#"
[rollout]
prompts = 32
samples = 16
rows = 128
rounds = 1
repetition = { count = 100, threshold = 0.99 }
[window]
lengths = [200]
[reward]
format = 0.0
[train]
updates = 1
lr = 1e-4
warmup = 5
micro_tokens = 1536
[eval]
every = 20
problems = 100
difficulties = [7]
mode = "sampled"
[curriculum.tasks]
compare = { min = 7, max = 7 }
counting = { min = 7, max = 7 }
"#;

fn train(args: Args) -> anyhow::Result<()> {
    let temporary = tempfile::tempdir()?;
    let out = args.out.as_deref().unwrap_or(temporary.path());
    let config = Config::read("the example", CONFIG, &[format!("steps={}", args.steps)])?;
    let device = DeviceChoice::Cpu.open()?.device;
    let model = run::load_model(&args.model, &device)?;
    let objective = config.validate(&ModelConfig::from_file(args.model.join("config.json"))?)?;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let trainer = Trainer::new(model, config.optimizer(), config.train.micro_tokens, threads, 0)?;
    let language = Language::open(&args.model)?;
    std::fs::create_dir_all(out)?;
    Cispo::new(out, trainer, State::new(config), objective, &language)?.train(&Arc::new(AtomicBool::new(false)))?;

    let steps = read::<RlMetrics>(&out.join("metrics.jsonl"))?;
    let solved = |m: Option<&RlMetrics>| m.and_then(|m| m.eval_pass_rate).unwrap_or(f64::NAN) * 100.0;
    println!("held-out problems solved: {:.0} % before, {:.0} % after", solved(steps.first()), solved(steps.last()));
    Ok(())
}

fn main() -> ExitCode {
    match cli::parse() {
        Ok(args) => cli::exit(train(args)),
        Err(status) => status,
    }
}
