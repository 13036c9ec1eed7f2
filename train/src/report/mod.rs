//! One page that compares runs: curves, final values, tasks before and after, samples, configurations.
//!
//! Different here: the page is one file that asks nothing of the network. Rust reads the runs and measures them on
//! every step (`measures.rs`); the page gets thinned curves and draws them itself (`chart.js`, `page.js`). What a model
//! wrote is untrusted: it travels as JSON in which no `<` occurs and is put on the page as text.

mod measures;
mod run;
#[cfg(test)]
mod sample_runs;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use m1_infer::files;
use serde::Serialize;

use self::measures::{Curves, Reached, TaskChange};
use self::run::Run;
use crate::metrics::SampleRecord;

const HTML: &str = include_str!("page.html");
const CSS: &str = include_str!("page.css");
const JS: &str = concat!(include_str!("chart.js"), include_str!("page.js"));

/// Numbers of all curves together, about: what keeps the page at a few MB however many runs there are.
const NUMBERS: usize = 400_000;
/// Characters of all samples together, about.
const CHARACTERS: usize = 1_500_000;

/// What the page says beside the runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// The page's title.
    pub title: String,
    /// A name for each run, in their order; runs of one name are seeds of one arm. Empty: by config.toml or folder.
    pub names: Vec<String>,
    /// Pass rates, from 0 to 1, that the table tells the way to.
    pub thresholds: Vec<f64>,
}

impl Default for Options {
    fn default() -> Self {
        Self { title: "Reinforcement learning runs".into(), names: Vec::new(), thresholds: vec![0.25, 0.5, 0.75, 0.9] }
    }
}

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// A folder without metrics.
    #[error("{0}: not the directory of a run, it has no metrics.jsonl")]
    NoRun(String),
    /// A run without a step.
    #[error("{0}: no step in it yet")]
    Empty(String),
    /// metrics.jsonl begins with something else.
    #[error("{0}: line 1 is not a JSON object with a number \"step\"")]
    NotMetrics(String),
    /// A wrong number of names.
    #[error("{names} names for {runs} runs: give one for each, or none")]
    Names {
        /// Names given.
        names: usize,
        /// Runs given.
        runs: usize,
    },
    /// Nothing to show.
    #[error("no run given")]
    NoRuns,
}

/// Writes the page about `runs` to `out`, whole or not at all. Gives what was left out of it, a line each: broken ends
/// of files, a configuration that is no TOML.
pub fn write(out: &Path, runs: &[PathBuf], options: &Options) -> Result<Vec<String>, ReportError> {
    let (html, warnings) = page(runs, options)?;
    files::write(out, html.as_bytes()).map_err(io_error(out))?;
    Ok(warnings)
}

/// The page as text, and what was left out of it.
pub fn page(runs: &[PathBuf], options: &Options) -> Result<(String, Vec<String>), ReportError> {
    if runs.is_empty() {
        return Err(ReportError::NoRuns);
    }
    if !options.names.is_empty() && options.names.len() != runs.len() {
        return Err(ReportError::Names { names: options.names.len(), runs: runs.len() });
    }
    let mut loaded = runs.iter().map(|folder| Run::read(folder)).collect::<Result<Vec<_>, _>>()?;
    for (run, name) in loaded.iter_mut().zip(&options.names) {
        run.arm.clone_from(name);
    }
    let warnings = loaded.iter_mut().flat_map(|run| std::mem::take(&mut run.warnings)).collect();
    let data = data(&loaded, options);
    // Within a script element only `<` could begin something that ends it.
    let json = serde_json::to_string(&data).expect("numbers and texts").replace('<', "\\u003c");
    let title = escaped(&options.title);
    let mut html = String::with_capacity(json.len() + HTML.len() + CSS.len() + JS.len());
    // Piece by piece: what is put in is never searched for marks.
    let mut rest = HTML;
    for (mark, text) in [("{{title}}", &*title), ("{{css}}", CSS), ("{{data}}", &json), ("{{js}}", JS)] {
        let (before, after) = rest.split_once(mark).expect("page.html has the marks in this order");
        html += before;
        html += text;
        rest = after;
    }
    html += rest;
    Ok((html, warnings))
}

/// What page.js reads.
#[derive(Serialize)]
struct Data<'a> {
    title: &'a str,
    thresholds: &'a [f64],
    last_steps: usize,
    runs: Vec<RunData<'a>>,
}

#[derive(Serialize)]
struct RunData<'a> {
    name: &'a str,
    folder: &'a str,
    arm: &'a str,
    step: u64,
    seconds: Option<f64>,
    curves: Curves,
    end: BTreeMap<&'a str, f64>,
    /// Which metric the thresholds are about.
    reached_by: &'static str,
    reached: Vec<Option<Reached>>,
    tasks: BTreeMap<String, TaskChange>,
    config: Option<&'a BTreeMap<String, String>>,
    samples: Vec<SampleRecord>,
}

fn data<'a>(runs: &'a [Run], options: &'a Options) -> Data<'a> {
    let series: usize = runs.iter().map(|r| r.series.len()).sum();
    let points = (NUMBERS / series.max(1)).clamp(50, 1000);
    let per_run = |run: &'a Run| {
        let reached_by = measures::pass_rate(run);
        RunData {
            name: &run.name,
            folder: &run.folder,
            arm: &run.arm,
            step: run.steps[run.steps.len() - 1],
            seconds: run.series.get("elapsed_s").and_then(|s| s.iter().copied().rfind(|v| v.is_finite())),
            curves: measures::thin(run, points),
            end: run.series.iter().filter_map(|(name, s)| Some((&**name, measures::end(name, s)?))).collect(),
            reached_by,
            reached: options.thresholds.iter().map(|&t| measures::reached(run, reached_by, t)).collect(),
            tasks: measures::tasks(run),
            config: run.config.as_ref(),
            samples: run.chosen_samples(CHARACTERS / runs.len()),
        }
    };
    Data {
        title: &options.title,
        thresholds: &options.thresholds,
        last_steps: measures::LAST,
        runs: runs.iter().map(per_run).collect(),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> ReportError + use<> {
    let path = path.display().to_string();
    move |source| ReportError::Io { path: path.clone(), source }
}

#[cfg(test)]
mod tests;
