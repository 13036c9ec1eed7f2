//! What a run says about itself: one JSON line per step, in `metrics.jsonl`.
//!
//! Different here: a resumed run first cuts the file back to the step it resumes from, so that the file reads
//! as if the run had never been interrupted (a killed process leaves steps, or half a line, that will be done again).

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens read since the run began (the assistant's and the others').
    pub tokens: u64,
    /// Mean cross-entropy of the assistant's tokens of this step, in nats.
    pub loss: f64,
    /// The router's auxiliary loss, coefficient included.
    pub aux_loss: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Norm of the gradient over all parameters, before clipping.
    pub grad_norm: f64,
    /// Tokens per second of this step.
    pub tokens_per_s: f64,
    /// Seconds of training since the run began, without the time between a stop and a resumption.
    pub elapsed_s: f64,
    /// The most used expert's share of the tokens over its fair share, worst layer: 1 is even, experts / top-k the worst.
    pub expert_load_max: f64,
    /// The least used expert's share over its fair share, worst layer: 0 is an expert that no token went to.
    pub expert_load_min: f64,
}

/// The open `metrics.jsonl` of a run, and what it holds.
#[derive(Debug)]
pub struct MetricsLog {
    file: File,
    history: Vec<StepMetrics>,
}

impl MetricsLog {
    /// Opens (or creates) the log, keeping the lines up to `step` and dropping all that follow.
    pub fn open(path: &Path, step: u64) -> io::Result<Self> {
        let history = read(path)?.into_iter().take_while(|m| m.step <= step).collect::<Vec<_>>();
        let partial = partial(path);
        let mut file = File::create(&partial)?;
        for metrics in &history {
            writeln!(file, "{}", serde_json::to_string(metrics)?)?;
        }
        file.sync_all()?;
        fs::rename(&partial, path)?;
        Ok(Self { file, history })
    }

    /// Appends one step.
    pub fn push(&mut self, metrics: StepMetrics) -> io::Result<()> {
        // One write per line: a killed process leaves at most one broken line, the last.
        let line = serde_json::to_string(&metrics)? + "\n";
        self.file.write_all(line.as_bytes())?;
        self.history.push(metrics);
        Ok(())
    }

    /// Every step so far, the oldest first.
    pub fn history(&self) -> &[StepMetrics] {
        &self.history
    }
}

/// Reads a log up to its end or its first broken line; a missing file holds nothing.
pub fn read(path: &Path) -> io::Result<Vec<StepMetrics>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut all = Vec::new();
    for line in BufReader::new(file).split(b'\n') {
        match serde_json::from_slice(&line?) {
            Ok(metrics) => all.push(metrics),
            Err(_) => break,
        }
    }
    Ok(all)
}

/// The temporary name beside `path`.
fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            tokens: step * 10,
            loss: 1.0 / step as f64,
            aux_loss: 0.002,
            lr: 1e-3,
            grad_norm: 0.5,
            tokens_per_s: 1000.0,
            elapsed_s: step as f64,
            expert_load_max: 1.25,
            expert_load_min: 0.75,
        }
    }

    #[test]
    fn a_resumed_log_is_cut_back_to_its_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        (1..=5).for_each(|s| log.push(step(s)).unwrap());
        drop(log);
        // What a kill in the middle of a write leaves.
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"{\"step\":6,\"tok").unwrap();

        let mut log = MetricsLog::open(&path, 3).unwrap();
        assert_eq!(log.history(), &[step(1), step(2), step(3)]);
        log.push(step(4)).unwrap();
        assert_eq!(read(&path).unwrap(), (1..=4).map(step).collect::<Vec<_>>());
    }
}
