//! A run's directory as the report sees it: columns of numbers, whatever their names, so that runs of older versions
//! and of pretraining are shown too.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value};

use super::{ReportError, io_error};
use crate::metrics::SampleRecord;

/// Steps whose samples are shown of a run.
const SAMPLE_STEPS: usize = 8;
/// Prompts of a step.
const PROMPTS: usize = 4;
/// Responses of a prompt.
const RESPONSES: usize = 4;
/// Characters of a text, at most and at least.
const TEXT: (usize, usize) = (6000, 300);

/// What a run left.
pub(super) struct Run {
    /// The folder as it was given.
    pub(super) folder: String,
    /// The folder's own name.
    pub(super) name: String,
    /// What it shares with the runs that differ in the seed alone.
    pub(super) arm: String,
    /// The step of each row.
    pub(super) steps: Vec<u64>,
    /// Every number by name, those of a map as `name/key`; NaN where a row has none.
    pub(super) series: BTreeMap<String, Vec<f64>>,
    /// config.toml, flat: `section.key`.
    pub(super) config: Option<BTreeMap<String, String>>,
    pub(super) samples: Vec<SampleRecord>,
    pub(super) warnings: Vec<String>,
}

impl Run {
    pub(super) fn read(folder: &Path) -> Result<Self, ReportError> {
        let shown = folder.display().to_string();
        if !folder.join("metrics.jsonl").is_file() {
            return Err(ReportError::NoRun(shown));
        }
        let whole = folder.canonicalize().map_err(io_error(folder))?;
        let name = whole.file_name().map_or(shown.clone(), |n| n.to_string_lossy().into_owned());
        let mut run = Self {
            arm: without_seed(&name).to_owned(),
            folder: shown,
            name,
            steps: Vec::new(),
            series: BTreeMap::new(),
            config: None,
            samples: Vec::new(),
            warnings: Vec::new(),
        };
        run.read_metrics(&folder.join("metrics.jsonl"))?;
        run.read_config(&folder.join("config.toml"))?;
        run.read_samples(&folder.join("samples.jsonl"))?;
        Ok(run)
    }

    fn read_metrics(&mut self, path: &Path) -> Result<(), ReportError> {
        let broken = each_line(path, |line| {
            let Ok(row) = serde_json::from_slice::<Map<String, Value>>(line) else { return false };
            let Some(step) = row.get("step").and_then(Value::as_u64) else { return false };
            self.push(step, &row);
            true
        })?;
        let shown = path.display().to_string();
        match broken {
            Some(1) => return Err(ReportError::NotMetrics(shown)),
            Some(line) => self.warnings.push(format!("{shown}: line {line} is broken; shown up to there")),
            None if self.steps.is_empty() => return Err(ReportError::Empty(shown)),
            None => {}
        }
        Ok(())
    }

    fn push(&mut self, step: u64, row: &Map<String, Value>) {
        let before = self.steps.len();
        let mut put = |name: String, value: &Value| {
            if let Some(number) = value.as_f64() {
                let column = self.series.entry(name).or_default();
                column.resize(before, f64::NAN);
                column.push(number);
            }
        };
        for (name, value) in row.iter().filter(|(name, _)| *name != "step") {
            match value {
                Value::Object(map) => map.iter().for_each(|(key, value)| put(format!("{name}/{key}"), value)),
                value => put(name.clone(), value),
            }
        }
        self.steps.push(step);
        self.series.values_mut().for_each(|column| column.resize(before + 1, f64::NAN));
    }

    fn read_config(&mut self, path: &Path) -> Result<(), ReportError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(io_error(path)(e)),
        };
        match text.parse::<toml::Table>() {
            Ok(table) => {
                if let Some(name) = table.get("name").and_then(toml::Value::as_str).filter(|n| !n.trim().is_empty()) {
                    self.arm = name.to_owned();
                }
                let mut flat = BTreeMap::new();
                flatten("", &table, &mut flat);
                self.config = Some(flat);
            }
            Err(e) => self.warnings.push(format!("{}: {}; left out", path.display(), e.message())),
        }
        Ok(())
    }

    fn read_samples(&mut self, path: &Path) -> Result<(), ReportError> {
        if !path.is_file() {
            return Ok(());
        }
        let broken = each_line(path, |line| match serde_json::from_slice(line) {
            Ok(record) => {
                self.samples.push(record);
                true
            }
            Err(_) => false,
        })?;
        if let Some(line) = broken {
            self.warnings.push(format!("{}: line {line} is broken; shown up to there", path.display()));
        }
        Ok(())
    }

    /// Samples of a few steps from the first to the last, of `characters` together, about; longer texts are cut.
    pub(super) fn chosen_samples(&self, characters: usize) -> Vec<SampleRecord> {
        let mut steps: Vec<u64> = self.samples.iter().map(|r| r.step).collect();
        steps.dedup();
        let last = steps.len().saturating_sub(1);
        let shown = SAMPLE_STEPS.min(steps.len());
        let mut steps: Vec<u64> = (0..shown).map(|n| steps[n * last / (shown - 1).max(1)]).collect();
        // A run with one shown step shows its last.
        if shown == 1 {
            steps = self.samples.last().map(|r| r.step).into_iter().collect();
        }
        let length = (characters / (SAMPLE_STEPS * PROMPTS * (RESPONSES + 1))).clamp(TEXT.1, TEXT.0);
        let mut chosen = Vec::new();
        for step in steps {
            for record in self.samples.iter().filter(|r| r.step == step).take(PROMPTS) {
                let mut record = record.clone();
                record.responses.truncate(RESPONSES);
                cut(&mut record.prompt, length);
                cut(&mut record.answer, length);
                record.responses.iter_mut().for_each(|r| cut(&mut r.text, length));
                chosen.push(record);
            }
        }
        chosen
    }
}

/// Calls `take` with every line; gives the number of the first that it refuses and stops there.
fn each_line(path: &Path, mut take: impl FnMut(&[u8]) -> bool) -> Result<Option<usize>, ReportError> {
    let file = File::open(path).map_err(io_error(path))?;
    for (n, line) in BufReader::new(file).split(b'\n').enumerate() {
        let line = line.map_err(io_error(path))?;
        if !line.iter().all(u8::is_ascii_whitespace) && !take(&line) {
            return Ok(Some(n + 1));
        }
    }
    Ok(None)
}

/// `cispo-seed3` and `cispo-s3` are `cispo`.
fn without_seed(name: &str) -> &str {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let seeded = ["-seed", "_seed", "-s", "_s"].iter().find_map(|end| stem.strip_suffix(end));
    seeded.filter(|arm| stem.len() < name.len() && !arm.is_empty()).unwrap_or(name)
}

fn flatten(prefix: &str, table: &toml::Table, flat: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            toml::Value::Table(table) => flatten(&key, table, flat),
            toml::Value::String(text) => drop(flat.insert(key, text.clone())),
            other => drop(flat.insert(key, other.to_string())),
        }
    }
}

/// Cuts a text to `length` characters and says so.
fn cut(text: &mut String, length: usize) {
    if let Some((at, _)) = text.char_indices().nth(length) {
        let more = text[at..].chars().count();
        text.truncate(at);
        *text += &format!(" … ({more} characters more)");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_one_arm_share_its_name() {
        for name in ["cispo-seed3", "cispo-s12", "cispo_seed0", "cispo"] {
            assert_eq!(without_seed(name), "cispo", "{name}");
        }
        for name in ["ratio-5", "-s1", "runs3", "cispo-s", "dapo-s1b"] {
            assert_eq!(without_seed(name), name);
        }
    }

    #[test]
    fn texts_are_cut_between_characters() {
        let mut text = "äöüß".to_owned();
        cut(&mut text, 4);
        assert_eq!(text, "äöüß");
        cut(&mut text, 1);
        assert_eq!(text, "ä … (3 characters more)");
    }
}
