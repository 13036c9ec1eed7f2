//! Files of one JSON row per line that a resumed run cuts back to its step.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::StepMetrics;

/// A row of such a file; rows stand in the order of their steps.
pub trait Row: Serialize + DeserializeOwned {
    /// The step it tells of.
    fn step(&self) -> u64;
}

/// The open `metrics.jsonl` of a run, and what it holds.
#[derive(Debug)]
pub struct MetricsLog<R = StepMetrics> {
    file: File,
    history: Vec<R>,
}

impl<R: Row> MetricsLog<R> {
    /// Opens (or creates) the log, keeping the lines up to `step` and dropping all that follow.
    pub fn open(path: &Path, step: u64) -> io::Result<Self> {
        let mut history = Vec::new();
        let file = cut(path, step, |row: R| history.push(row))?;
        Ok(Self { file, history })
    }

    /// Appends one step.
    pub fn push(&mut self, metrics: R) -> io::Result<()> {
        append(&mut self.file, &metrics)?;
        self.history.push(metrics);
        Ok(())
    }

    /// Every step so far, the oldest first.
    pub fn history(&self) -> &[R] {
        &self.history
    }
}

/// Reads a log up to its end or its first broken line; a missing file holds nothing.
pub fn read<R: Row>(path: &Path) -> io::Result<Vec<R>> {
    let mut all = Vec::new();
    each(path, |_, row| {
        all.push(row);
        Ok(true)
    })?;
    Ok(all)
}

/// Rewrites a file with its lines up to `step` as they stand, their rows shown to `kept`, and gives it open at its end.
pub(super) fn cut<R: Row>(path: &Path, step: u64, mut kept: impl FnMut(R)) -> io::Result<File> {
    let partial = partial(path);
    let mut file = BufWriter::new(File::create(&partial)?);
    each(path, |line, row: R| {
        if row.step() > step {
            return Ok(false);
        }
        file.write_all(line)?;
        file.write_all(b"\n")?;
        kept(row);
        Ok(true)
    })?;
    let file = file.into_inner().map_err(|e| e.into_error())?;
    file.sync_all()?;
    fs::rename(&partial, path)?;
    Ok(file)
}

/// Writes one row in one go: a killed process leaves at most one broken line, the last.
pub(super) fn append(file: &mut File, row: &impl Serialize) -> io::Result<()> {
    file.write_all((serde_json::to_string(row)? + "\n").as_bytes())
}

/// Calls `take` with every line and its row up to the first broken line, or until it says false.
fn each<R: Row>(path: &Path, mut take: impl FnMut(&[u8], R) -> io::Result<bool>) -> io::Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for line in BufReader::new(file).split(b'\n') {
        let line = line?;
        let Ok(row) = serde_json::from_slice(&line) else { break };
        if !take(&line, row)? {
            break;
        }
    }
    Ok(())
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
        assert_eq!(read::<StepMetrics>(&path).unwrap(), (1..=4).map(step).collect::<Vec<_>>());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file");
    }

    #[test]
    fn a_step_that_diverged_does_not_end_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        log.push(StepMetrics { loss: f64::NAN, grad_norm: f64::INFINITY, ..step(1) }).unwrap();
        log.push(step(2)).unwrap();
        let found: Vec<StepMetrics> = read(&path).unwrap();
        assert!(found[0].loss.is_nan() && found[0].grad_norm.is_nan());
        assert_eq!(found[1], step(2));
    }
}
