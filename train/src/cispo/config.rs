//! What a run of reinforcement learning is made of: one TOML file, every value of which can be set on the command line.
//!
//! Different here: a key that nothing reads is an error, so is a value out of its range, and the file that is written beside
//! the run holds every value, the defaults too.

use m1_infer::sampler::SamplingOptions;
use m1_model::config::ModelConfig;
use serde::{Deserialize, Serialize};

use crate::curriculum::{Curriculum, CurriculumError, CurriculumSettings, WindowSettings};
use crate::eval::Mode;
use crate::generate::Repetition;
use crate::loss::{LossError, LossSettings, Objective};
use crate::optimizer::OptimizerSettings;
use crate::reward::{RewardError, RewardSettings};
use crate::schedule::Schedule;

/// What can be wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The TOML, or a key or a type in it.
    #[error("{file}: {reason}")]
    Toml {
        /// The file, or `--set`.
        file: String,
        /// What is wrong, in one line.
        reason: String,
    },
    /// An override without `=`, or into a value that is no table.
    #[error("--set {given}: expected key=value, with the key as in the file, such as --set train.lr=1e-4")]
    Set {
        /// What was given.
        given: String,
    },
    /// A value out of its range.
    #[error("{field} = {value}: must be {expected}")]
    Range {
        /// Section and field.
        field: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// The loss.
    #[error(transparent)]
    Loss(#[from] LossError),
    /// The reward.
    #[error(transparent)]
    Reward(#[from] RewardError),
    /// The curriculum or the length window.
    #[error(transparent)]
    Curriculum(#[from] CurriculumError),
}

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What the run is called in reports; runs of one name are seeds of one arm.
    pub name: String,
    /// Seed of problems, order and draws.
    pub seed: u64,
    /// Steps in all: batches of rollouts.
    pub steps: u64,
    /// Sampling.
    pub rollout: RolloutSettings,
    /// The objective.
    pub loss: LossSettings,
    /// What a response earns.
    pub reward: RewardSettings,
    /// What is asked.
    pub curriculum: CurriculumSettings,
    /// How long a response may be.
    pub window: WindowSettings,
    /// The updates.
    pub train: TrainSettings,
    /// Problems that training never sees.
    pub eval: EvalConfig,
    /// What is written down.
    pub output: OutputSettings,
}

/// The `[rollout]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RolloutSettings {
    /// Problems (groups) of a batch.
    pub prompts: usize,
    /// Responses to each (G).
    pub samples: usize,
    /// Responses made together.
    pub rows: usize,
    /// Drop groups whose rewards are all equal, or whose pass rate the curriculum's filter refuses, and sample others for them.
    pub dynamic_sampling: bool,
    /// Rounds of sampling a batch, at most; what is missing then stays missing.
    pub rounds: usize,
    /// 1 is the model's own distribution.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: usize,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// When a response is stopped because it repeats itself.
    pub repetition: Repetition,
}

/// Which log-probabilities the ratio is taken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OldLogProbs {
    /// Those recorded when the tokens were drawn.
    Rollout,
    /// Those of the training forward before the first update: one more forward pass a batch.
    Training,
}

/// What forward and backward passes are computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// The weights as they are trained.
    F32,
    /// Matrices rounded to bf16, beside masters in f32; routers, norms and head stay f32.
    Bf16,
}

/// The `[train]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSettings {
    /// Mini-batch updates made from a batch; each takes as many groups.
    pub updates: usize,
    /// `rollout` or `training`.
    pub old_log_probs: OldLogProbs,
    /// Learning rate after the warm-up.
    pub lr: f64,
    /// Updates of linear warm-up.
    pub warmup: u64,
    /// Decay of AdamW's first moment.
    pub beta_1: f32,
    /// Decay of the second.
    pub beta_2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f32,
    /// Largest norm of the whole gradient; 0 never clips.
    pub clip: f64,
    /// Weight of the mean entropy of the policy, which is added to what is maximised; 0 is off.
    pub entropy: f64,
    /// `f32`, or `bf16` with masters in f32: for devices that multiply bf16 faster.
    pub dtype: ComputeDtype,
    /// Tokens of the parts that an update is split into.
    pub micro_tokens: usize,
    /// Run each layer again in the backward pass instead of keeping its activations.
    pub gradient_checkpointing: bool,
    /// A run ends after so many updates in a row whose loss or gradient was no number.
    pub max_skipped: u64,
}

/// The `[eval]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Steps between evaluations, beside the first and the last; 0 never evaluates.
    pub every: u64,
    /// Problems per task and difficulty.
    pub problems: u64,
    /// Difficulties; the tasks are the curriculum's.
    pub difficulties: Vec<u8>,
    /// `greedy`, or `sampled` at temperature 1.
    pub mode: Mode,
}

/// The `[output]` section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OutputSettings {
    /// Steps between checkpoints.
    pub save_every: u64,
    /// Steps between samples that are written down.
    pub samples_every: u64,
    /// Problems whose responses are written down each time.
    pub samples: usize,
}

impl Default for Config {
    /// MiniMax-M1's recipe where the report gives it.
    fn default() -> Self {
        Self {
            name: "cispo".into(),
            seed: 1,
            steps: 100,
            rollout: RolloutSettings::default(),
            loss: LossSettings::default(),
            reward: RewardSettings::default(),
            curriculum: CurriculumSettings::default(),
            window: WindowSettings::default(),
            train: TrainSettings::default(),
            eval: EvalConfig::default(),
            output: OutputSettings::default(),
        }
    }
}

impl Default for RolloutSettings {
    fn default() -> Self {
        Self {
            prompts: 32,
            samples: 16,
            rows: 64,
            dynamic_sampling: true,
            rounds: 4,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition: Repetition::default(),
        }
    }
}

impl Default for TrainSettings {
    fn default() -> Self {
        let OptimizerSettings { beta_1, beta_2, epsilon, clip, .. } = OptimizerSettings::default();
        Self {
            updates: 16,
            old_log_probs: OldLogProbs::Rollout,
            lr: 1e-6,
            warmup: 10,
            beta_1,
            beta_2,
            epsilon,
            weight_decay: 0.0,
            clip,
            entropy: 0.0,
            dtype: ComputeDtype::F32,
            micro_tokens: 4096,
            gradient_checkpointing: false,
            max_skipped: 8,
        }
    }
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { every: 10, problems: 50, difficulties: vec![3], mode: Mode::Greedy }
    }
}

impl Default for OutputSettings {
    fn default() -> Self {
        Self { save_every: 10, samples_every: 10, samples: 2 }
    }
}

impl Config {
    /// The configuration in `text`, the contents of `file`, with `key=value` overrides in their order.
    ///
    /// # Errors
    /// TOML that is none, keys that nothing reads, values of a wrong type.
    pub fn read(file: &str, text: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let wrong = |file: &str, e: toml::de::Error| {
            let place = e.span().map(|span| format!(" (line {})", text[..span.start].matches('\n').count() + 1));
            let place = place.filter(|_| file != "--set").unwrap_or_default();
            ConfigError::Toml { file: file.into(), reason: e.message().replace('\n', " ") + &place }
        };
        // The file by itself first: its mistakes are told with their lines.
        toml::from_str::<Self>(text).map_err(|e| wrong(file, e))?;
        let mut table: toml::Table = toml::from_str(text).map_err(|e| wrong(file, e))?;
        for given in overrides {
            set(&mut table, given)?;
        }
        Self::deserialize(table).map_err(|e| wrong("--set", e))
    }

    /// As a file that [`Config::read`] reads: every value, the defaults too.
    pub fn to_toml(&self) -> String {
        // Strings, numbers and tables only: nothing that TOML lacks.
        toml::to_string_pretty(self).expect("a configuration is TOML")
    }

    /// Checks every value, and those that depend on the model.
    ///
    /// # Errors
    /// What is wrong, by field.
    pub fn validate(&self, model: &ModelConfig) -> Result<Objective, ConfigError> {
        let range = |good: bool, field, value: String, expected: &str| {
            if good { Ok(()) } else { Err(ConfigError::Range { field, value, expected: expected.into() }) }
        };
        let at_least = |least: usize, field, value: usize| {
            range(value >= least, field, value.to_string(), &format!("{least} or above"))
        };
        at_least(1, "rollout.prompts", self.rollout.prompts)?;
        at_least(2, "rollout.samples", self.rollout.samples)?;
        at_least(1, "rollout.rows", self.rollout.rows)?;
        at_least(1, "rollout.rounds", self.rollout.rounds)?;
        at_least(1, "rollout.repetition.count", self.rollout.repetition.count)?;
        at_least(1, "train.updates", self.train.updates)?;
        at_least(1, "train.micro_tokens", self.train.micro_tokens)?;
        at_least(1, "train.max_skipped", self.train.max_skipped as usize)?;
        at_least(1, "output.save_every", self.output.save_every as usize)?;
        at_least(1, "output.samples_every", self.output.samples_every as usize)?;
        let (prompts, updates) = (self.rollout.prompts, self.train.updates);
        let whole = prompts.is_multiple_of(updates);
        range(whole, "train.updates", updates.to_string(), &format!("a divisor of rollout.prompts = {prompts}"))?;
        let t = &self.train;
        range(t.lr > 0.0 && t.lr.is_finite(), "train.lr", t.lr.to_string(), "above 0")?;
        range(t.clip >= 0.0 && t.clip.is_finite(), "train.clip", t.clip.to_string(), "0 (never) or above")?;
        range(t.entropy.is_finite(), "train.entropy", t.entropy.to_string(), "a finite number")?;
        for (field, beta) in [("train.beta_1", t.beta_1), ("train.beta_2", t.beta_2)] {
            range((0.0..1.0).contains(&beta), field, beta.to_string(), "from 0 to below 1")?;
        }
        range(t.epsilon > 0.0 && t.epsilon.is_finite(), "train.epsilon", t.epsilon.to_string(), "above 0")?;
        range((0.0..1.0).contains(&t.weight_decay), "train.weight_decay", t.weight_decay.to_string(), "0 to below 1")?;
        let p = self.rollout.repetition.threshold;
        range((0.0..1.0).contains(&p), "rollout.repetition.threshold", p.to_string(), "0 to below 1")?;
        self.sampling().validate().map_err(|e| ConfigError::Range {
            field: "rollout",
            value: String::new(),
            expected: e.to_string(),
        })?;
        range(
            self.rollout.temperature > 0.0,
            "rollout.temperature",
            self.rollout.temperature.to_string(),
            "above 0: greedy responses to a problem are all equal",
        )?;
        if self.eval.every > 0 {
            at_least(1, "eval.problems", self.eval.problems as usize)?;
            let d = &self.eval.difficulties;
            let good = !d.is_empty() && d.iter().all(|d| (1..=10).contains(d));
            range(good, "eval.difficulties", format!("{d:?}"), "a list of numbers from 1 to 10")?;
        }
        Curriculum::new(self.curriculum.clone())?;
        self.window.validate()?;
        let (longest, context) = (self.window.lengths.last().copied().unwrap_or(0), model.max_position_embeddings);
        let expected = format!("below the model's max_position_embeddings = {context}");
        range(longest < context, "window.lengths", longest.to_string(), &expected)?;
        for &length in &self.window.lengths {
            self.reward.validate(length)?;
        }
        Ok(self.loss.objective()?)
    }

    /// How responses are drawn; each has a seed of its own.
    pub fn sampling(&self) -> SamplingOptions {
        let RolloutSettings { temperature, top_k, top_p, min_p, .. } = self.rollout;
        SamplingOptions { temperature, top_k, top_p, min_p, ..SamplingOptions::default() }
    }

    /// AdamW and clipping.
    pub fn optimizer(&self) -> OptimizerSettings {
        let TrainSettings { beta_1, beta_2, epsilon, weight_decay, clip, .. } = self.train;
        OptimizerSettings { beta_1, beta_2, epsilon, weight_decay, clip }
    }

    /// The learning rate of update `update`, from 0: a warm-up, then a constant.
    pub fn lr(&self, update: u64) -> f64 {
        Schedule { peak: self.train.lr, warmup: self.train.warmup }.rate(update, 0.0)
    }
}

/// Puts `a.b=value` into a table: TOML's own values, and text where it is none.
fn set(table: &mut toml::Table, given: &str) -> Result<(), ConfigError> {
    let wrong = || ConfigError::Set { given: given.into() };
    let (key, value) = given.split_once('=').ok_or_else(wrong)?;
    let (key, value) = (key.trim(), value.trim());
    let parsed = toml::from_str::<toml::Table>(&format!("v = {value}")).ok().and_then(|mut t| t.remove("v"));
    let value = parsed.unwrap_or_else(|| toml::Value::String(value.into()));
    let mut path: Vec<&str> = key.split('.').map(str::trim).collect();
    let last = path.pop().filter(|last| !last.is_empty()).ok_or_else(wrong)?;
    let mut table = table;
    for part in path {
        let inner = table.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        table = inner.as_table_mut().ok_or_else(wrong)?;
    }
    table.insert(last.into(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::Algorithm;

    fn nano() -> ModelConfig {
        ModelConfig { max_position_embeddings: 100_000, ..ModelConfig::preset("nano").unwrap() }
    }

    fn told(text: &str, overrides: &[&str]) -> String {
        let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        let read = Config::read("run.toml", text, &overrides);
        read.and_then(|config| config.validate(&nano())).unwrap_err().to_string()
    }

    #[test]
    fn what_is_written_is_read_again() {
        let config = Config::read(
            "f",
            "name = 'x'\n[loss]\nalgorithm = 'dapo'\n[curriculum.tasks]\nclock = { max = 4 }",
            &[
                "train.lr=3e-4".into(),
                "rollout.prompts = 16".into(),
                "name=two words".into(),
                "window.lengths=[64]".into(),
            ],
        )
        .unwrap();
        assert_eq!((config.name.as_str(), config.train.lr, config.rollout.prompts), ("two words", 3e-4, 16));
        assert_eq!((config.loss.algorithm, config.window.lengths.clone()), (Algorithm::Dapo, vec![64]));
        assert_eq!(config.curriculum.tasks.len(), 1);
        assert_eq!(Config::read("g", &config.to_toml(), &[]).unwrap(), config);
        config.validate(&nano()).unwrap();
        Config::default().validate(&nano()).unwrap();
        assert_eq!(Config::read("g", &Config::default().to_toml(), &[]).unwrap(), Config::default());
    }

    #[test]
    fn mistakes_are_told_in_a_line_each() {
        let unknown = told("steps = 3\n[train]\nlearning_rate = 1", &[]);
        assert!(unknown.starts_with("run.toml: unknown field `learning_rate`, expected one of `updates`"), "{unknown}");
        assert!(unknown.ends_with("(line 3)") && !unknown.contains('\n'), "{unknown}");
        assert!(told("", &["train.lrr=1"]).starts_with("--set: unknown field `lrr`"));
        assert!(told("", &["train.lr"]).starts_with("--set train.lr: expected key=value"));
        assert!(told("", &["seed.x=1", "seed.y=2"]).starts_with("--set: invalid type"));
        assert!(told("seed = 'a'", &[]).contains("expected u64 (line 1)"));
        for (given, wanted) in [
            ("train.updates=5", "train.updates = 5: must be a divisor of rollout.prompts = 32"),
            ("rollout.samples=1", "rollout.samples = 1: must be 2 or above"),
            ("train.lr=-1", "train.lr = -1: must be above 0"),
            ("train.lr=nan", "train.lr = NaN: must be above 0"),
            ("loss.ratio_max=0.2", "loss.ratio_max = 0.2: this is the bound on the ratio itself"),
            ("rollout.temperature=0", "rollout.temperature = 0: must be above 0"),
            ("eval.difficulties=[11]", "eval.difficulties = [11]: must be a list of numbers from 1 to 10"),
            ("window.lengths=[200000]", "window.lengths = 200000: must be below the model's max_position_embeddings"),
            ("curriculum.tasks.poetry.weight=1", "curriculum.tasks: no task is called \"poetry\""),
        ] {
            let found = told("", &[given]);
            assert!(found.starts_with(wanted), "{given}: {found}");
        }
    }

    #[test]
    fn the_ready_configurations_are_good() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let mut found = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let (name, text) = (path.display().to_string(), std::fs::read_to_string(&path).unwrap());
            let config = Config::read(&name, &text, &[]).unwrap();
            // Two are for m1-nano, whose context is 4,096.
            let context = if name.contains("800") { 1_000_000 } else { 4096 };
            config.validate(&ModelConfig { max_position_embeddings: context, ..nano() }).unwrap();
            found += 1;
        }
        assert_eq!(found, 4);
    }

    #[test]
    fn the_learning_rate_warms_up_and_stays() {
        let config =
            Config { train: TrainSettings { lr: 1e-3, warmup: 4, ..TrainSettings::default() }, ..Config::default() };
        assert_eq!([0, 3, 4, 4000].map(|update| config.lr(update)), [2.5e-4, 1e-3, 1e-3, 1e-3]);
    }
}
