//! `m1-train report`: runs side by side on one page.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;

use crate::report::{Options, write};

const AFTER_HELP: &str = "\
Examples:
  m1-train report runs/cispo                                        (writes runs/cispo/report.html)
  m1-train report runs/cispo-seed* runs/dapo-seed* --out compare.html
  m1-train report runs/a runs/b --name 'bound 5' --name 'bound 2' --thresholds 0.5,0.8

Runs of one arm differ in the seed alone and are drawn as one line with a band: those whose config.toml has the same
name, or, without one, whose folders are called alike but for -seedN or -sN at the end.";

/// Compare runs on one page: curves, tasks, samples, configurations
///
/// Reads metrics.jsonl and, where they are there, config.toml and samples.jsonl of each run. The page is one HTML file
/// that needs no network.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// Directories of runs
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The page [default: RUN/report.html of a single run, else report.html here]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Name of a run's arm, once for each run and in their order [default: by config.toml or folder]
    #[arg(long = "name", value_name = "NAME")]
    names: Vec<String>,
    /// Pass rates to tell the steps and seconds to, from 0 to 1
    #[arg(long, value_name = "P,…", value_delimiter = ',', default_value = "0.25,0.5,0.75,0.9",
        allow_negative_numbers = true, value_parser = rate)]
    thresholds: Vec<f64>,
    /// Title of the page
    #[arg(long, value_name = "TEXT", default_value = "Reinforcement learning runs")]
    title: String,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let out = match (&args.out, &args.runs[..]) {
        (Some(out), _) => out.clone(),
        (None, [run]) => run.join("report.html"),
        (None, _) => PathBuf::from("report.html"),
    };
    if !args.names.is_empty() && args.names.len() != args.runs.len() {
        bail!("--name: {} of them for {} runs; give one for each, or none", args.names.len(), args.runs.len());
    }
    let options = Options { title: args.title, names: args.names, thresholds: args.thresholds };
    for warning in write(&out, &args.runs, &options)? {
        eprintln!("warning: {warning}");
    }
    writeln!(std::io::stdout(), "{}", out.display())?;
    Ok(ExitCode::SUCCESS)
}

fn rate(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(x) if (0.0..=1.0).contains(&x) => Ok(x),
        _ => Err("expected numbers from 0 to 1, separated by commas".into()),
    }
}
