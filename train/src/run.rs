//! A training run on disk: settings, progress, checkpoints, resumption.
//!
//! ```text
//! DIR/tokenizer.json …            what turns text into ids, made first
//! DIR/metrics.jsonl, loss.svg     how it went; eval.jsonl where there are evaluations
//! DIR/checkpoints/step-00000400/  weights (f32), optimizer.safetensors, run.json: all that a resumption needs
//! DIR/model.safetensors …         the finished model, bf16
//! ```
//! Different here: a checkpoint is complete or absent. It is written under a temporary name and renamed; the one before
//! goes only afterwards, so a kill at any moment leaves a good one. One of the same step is renamed first, to a name that
//! still counts.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use m1_model::checkpoint::{self, LoadOptions, SaveOptions, WeightDtype};
use m1_model::model::M1;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::data::DataConfig;
use crate::optimizer::{OptimizerError, OptimizerSettings};
use crate::schedule::Schedule;
use crate::trainer::{TrainError, Trainer};

/// What decides a run's result; kept in every checkpoint. `D` says where the examples come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings<D = DataConfig> {
    /// Seed of what is drawn: weights, order.
    pub seed: u64,
    /// What the examples are made from.
    pub data: D,
    /// Steps in all, unless `minutes` ends the run.
    pub steps: Option<u64>,
    /// Minutes of training in all. The learning rate then follows the clock, and the result is not reproducible to the bit.
    pub minutes: Option<f64>,
    /// Tokens that a step reads, about.
    pub batch_tokens: usize,
    /// Tokens of the parts that a step is split into.
    pub micro_tokens: usize,
    /// The learning rate.
    pub schedule: Schedule,
    /// AdamW and clipping.
    pub optimizer: OptimizerSettings,
}

/// How far a run has come.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// The next example's index.
    pub example: u64,
    /// Tokens read.
    pub tokens: u64,
    /// Seconds of training.
    pub elapsed_s: f64,
    /// Evaluations so far, where there are any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evaluations: Vec<Evaluated>,
}

/// One evaluation during a run; a line of `eval.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    /// Steps done.
    pub step: u64,
    /// Mean cross-entropy of the assistant's tokens in the evaluation set, in nats.
    pub loss: f64,
}

/// `run.json` of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunState<D = DataConfig> {
    /// How far it has come.
    pub progress: Progress,
    /// With what.
    pub settings: Settings<D>,
}

/// What can go wrong with a run's directory.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A file or folder could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// `run.json` is not what this command writes.
    #[error("{path}: not a run of this command: {source}")]
    State {
        /// The path.
        path: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The weights could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::CheckpointError),
    /// The optimizer's moments could not be read or written.
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    /// The trainer could not be set up.
    #[error(transparent)]
    Train(#[from] TrainError),
}

const STATE: &str = "run.json";
const MOMENTS: &str = "optimizer.safetensors";

/// The folder of a run's checkpoints.
pub fn checkpoints(out: &Path) -> PathBuf {
    out.join("checkpoints")
}

/// Writes a checkpoint and removes those before it; gives its folder.
///
/// `state` is whatever a resumption needs beside weights and moments, after `step` steps.
pub fn save<S: Serialize>(out: &Path, trainer: &Trainer, step: u64, state: &S) -> Result<PathBuf, RunError> {
    let folder = checkpoints(out);
    let name = format!("step-{step:08}");
    let partial = folder.join(format!(".{name}.partial"));
    let complete = folder.join(&name);
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(io_error(&partial))?;
    }
    fs::create_dir_all(&partial).map_err(io_error(&partial))?;
    save_model(&partial, trainer.model(), WeightDtype::F32)?;
    trainer.optimizer().save(&partial.join(MOMENTS))?;
    let path = partial.join(STATE);
    let text = serde_json::to_string_pretty(state)
        .map_err(|source| RunError::State { path: path.display().to_string(), source })?;
    fs::write(&path, text).map_err(io_error(&path))?;
    for entry in fs::read_dir(&partial).map_err(io_error(&partial))? {
        let path = entry.map_err(io_error(&partial))?.path();
        let file = File::open(&path).map_err(io_error(&path))?;
        file.sync_all().map_err(io_error(&path))?;
    }
    set_aside(&complete, step)?;
    fs::rename(&partial, &complete).map_err(io_error(&complete))?;
    for (before, path) in list(out)? {
        if before <= step && path != complete {
            fs::remove_dir_all(&path).map_err(io_error(&path))?;
        }
    }
    Ok(complete)
}

/// Frees a checkpoint's name: only a run that was resumed after its last step finds it taken. One more zero makes another
/// name of the same step, one that [`list`] puts before the usual one.
fn set_aside(complete: &Path, step: u64) -> Result<(), RunError> {
    if !complete.exists() {
        return Ok(());
    }
    let aside = complete.with_file_name(format!("step-0{step:08}"));
    if aside.exists() {
        fs::remove_dir_all(&aside).map_err(io_error(&aside))?;
    }
    fs::rename(complete, &aside).map_err(io_error(&aside))
}

/// The run's last complete checkpoint with its state, if it has one.
pub fn latest<S: DeserializeOwned>(out: &Path) -> Result<Option<(PathBuf, S)>, RunError> {
    let Some((_, folder)) = list(out)?.pop() else {
        return Ok(None);
    };
    let path = folder.join(STATE);
    let text = fs::read_to_string(&path).map_err(io_error(&path))?;
    let state =
        serde_json::from_str(&text).map_err(|source| RunError::State { path: path.display().to_string(), source })?;
    Ok(Some((folder, state)))
}

/// The weights of a checkpoint, f32.
pub fn load_model(folder: &Path, device: &Device) -> Result<M1, RunError> {
    let options = LoadOptions { dtype: Some(WeightDtype::F32), tensors: true, ..LoadOptions::default() };
    Ok(checkpoint::load(folder, device, &options)?)
}

/// A trainer as a checkpoint left it.
pub fn load_trainer<D>(
    folder: &Path,
    state: &RunState<D>,
    threads: usize,
    device: &Device,
) -> Result<Trainer, RunError> {
    let settings = &state.settings;
    take_up(folder, settings.optimizer, settings.micro_tokens, threads, state.progress.step, device)
}

/// A trainer after `steps` steps of the optimizer, with a checkpoint's weights and moments.
pub fn take_up(
    folder: &Path,
    optimizer: OptimizerSettings,
    micro_tokens: usize,
    threads: usize,
    steps: u64,
    device: &Device,
) -> Result<Trainer, RunError> {
    let mut trainer = Trainer::new(load_model(folder, device)?, optimizer, micro_tokens, threads, steps)?;
    trainer.optimizer_mut().load(&folder.join(MOMENTS), device)?;
    Ok(trainer)
}

/// Writes weights and config.json in Hugging Face form.
pub fn save_model(folder: &Path, model: &M1, dtype: WeightDtype) -> Result<(), RunError> {
    let options = SaveOptions { dtype, ..SaveOptions::default() };
    Ok(checkpoint::save(folder, model, &options)?)
}

/// Complete checkpoints, the oldest first.
fn list(out: &Path) -> Result<Vec<(u64, PathBuf)>, RunError> {
    let folder = checkpoints(out);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io_error(&folder)(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(io_error(&folder))?.path();
        let name = path.file_name().and_then(|n| n.to_str());
        if let Some(step) = name.and_then(|n| n.strip_prefix("step-")?.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Names the path in an input/output error.
pub(crate) fn io_error(path: &Path) -> impl Fn(io::Error) -> RunError + use<> {
    let path = path.display().to_string();
    move |source| RunError::Io { path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_set_aside_counts_until_the_new_one_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let folder = checkpoints(dir.path());
        let names =
            || list(dir.path()).unwrap().into_iter().map(|(step, path)| (step, path.file_name().unwrap().to_owned()));
        let (old, new) = (folder.join("step-00000004"), folder.join("step-00000008"));
        fs::create_dir_all(&old).unwrap();
        fs::create_dir_all(&new).unwrap();
        fs::write(new.join(STATE), "first").unwrap();

        // Killed between the two renames: the run's last checkpoint is the one set aside.
        set_aside(&new, 8).unwrap();
        assert!(!new.exists());
        assert_eq!(names().next_back(), Some((8, "step-000000008".into())));
        set_aside(&new, 8).unwrap();
        assert_eq!(fs::read_to_string(folder.join("step-000000008").join(STATE)).unwrap(), "first");

        // Killed before the clearing up: the new one is the last, and the next to be set aside.
        fs::create_dir_all(&new).unwrap();
        fs::write(new.join(STATE), "second").unwrap();
        assert_eq!(names().next_back(), Some((8, "step-00000008".into())));
        set_aside(&new, 8).unwrap();
        assert_eq!(fs::read_to_string(folder.join("step-000000008").join(STATE)).unwrap(), "second");
        assert_eq!(names().count(), 2);
    }
}
