//! What the model wrote: prompts and responses with their rewards, a few a step, in `samples.jsonl`.

use std::fs::File;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::log::{append, cut};
use super::{Row, number};

/// Responses that [`SampleLog`] keeps of one step, at most: a run of thousands of steps stays readable.
pub const RESPONSES_PER_STEP: usize = 16;

/// A prompt and some of its responses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleRecord {
    /// The step they were sampled at.
    pub step: u64,
    /// The task's name.
    pub task: String,
    /// The problem's difficulty.
    #[serde(deserialize_with = "number")]
    pub difficulty: f64,
    /// What was asked.
    pub prompt: String,
    /// What was written, from the start of the turn to its end.
    pub responses: Vec<Response>,
    /// What would be right.
    pub answer: String,
}

/// One response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// The text, its reasoning included.
    pub text: String,
    /// Its reward, penalties included.
    #[serde(deserialize_with = "number")]
    pub reward: f64,
    /// Whether the verifier accepted it.
    pub correct: bool,
    /// Why it ended: `stop`, `length`, `repetition`.
    pub finish: String,
    /// Its length.
    pub tokens: u64,
}

impl Row for SampleRecord {
    fn step(&self) -> u64 {
        self.step
    }
}

/// The open `samples.jsonl` of a run.
#[derive(Debug)]
pub struct SampleLog {
    file: File,
    step: u64,
    responses: usize,
}

impl SampleLog {
    /// Opens (or creates) the file, keeping the records up to `step` and dropping all that follow.
    pub fn open(path: &Path, step: u64) -> io::Result<Self> {
        // Counted again, so that a resumed step does not get its share twice.
        let (mut last, mut responses) = (0, 0);
        let file = cut(path, step, |record: SampleRecord| {
            if record.step != last {
                (last, responses) = (record.step, 0);
            }
            responses += record.responses.len();
        })?;
        Ok(Self { file, step: last, responses })
    }

    /// Appends a record as far as its step has room: a step keeps [`RESPONSES_PER_STEP`] responses, the first ones.
    /// Says whether anything was written.
    pub fn push(&mut self, mut record: SampleRecord) -> io::Result<bool> {
        if record.step != self.step {
            (self.step, self.responses) = (record.step, 0);
        }
        record.responses.truncate(RESPONSES_PER_STEP - self.responses.min(RESPONSES_PER_STEP));
        if record.responses.is_empty() {
            return Ok(false);
        }
        self.responses += record.responses.len();
        append(&mut self.file, &record)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::read;

    fn record(step: u64, responses: usize) -> SampleRecord {
        let response = |n| Response {
            text: format!("<think>\n{n}\n</think>\n\"{n}\""),
            reward: 1.0,
            correct: true,
            finish: "stop".into(),
            tokens: 9,
        };
        SampleRecord {
            step,
            task: "addition".into(),
            difficulty: 2.0,
            prompt: "1 + 1?".into(),
            responses: (0..responses).map(response).collect(),
            answer: "2".into(),
        }
    }

    #[test]
    fn a_step_keeps_so_many_and_a_resumed_file_is_cut_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        let mut log = SampleLog::open(&path, 0).unwrap();
        for step in 1..=3 {
            assert!(log.push(record(step, 10)).unwrap());
            assert!(log.push(record(step, 10)).unwrap(), "6 of them");
            assert!(!log.push(record(step, 10)).unwrap(), "full");
        }
        let lengths = |path: &Path| -> Vec<(u64, usize)> {
            read(path).unwrap().iter().map(|r: &SampleRecord| (r.step, r.responses.len())).collect()
        };
        assert_eq!(lengths(&path), [(1, 10), (1, 6), (2, 10), (2, 6), (3, 10), (3, 6)]);

        let mut log = SampleLog::open(&path, 2).unwrap();
        assert!(!log.push(record(2, 1)).unwrap(), "step 2 is full already");
        assert!(log.push(record(3, 4)).unwrap());
        assert_eq!(lengths(&path), [(1, 10), (1, 6), (2, 10), (2, 6), (3, 4)]);
        assert_eq!(read::<SampleRecord>(&path).unwrap()[4], record(3, 4));
    }
}
