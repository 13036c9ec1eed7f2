//! Reinforcement learning with MiniMax-M1's recipe (arXiv 2506.13585): sample, score, advantage, update.
//!
//! CISPO, GRPO, DAPO, PPO and REINFORCE are settings of one loss ([`crate::loss`]); the loop is the same for all. Generation and
//! training run the same forward, so the probabilities recorded when a token was drawn are those of training, and every
//! step says how nearly ([`crate::mismatch`]).
//!
//! ```text
//! RUN/config.toml                   every setting, with the defaults
//! RUN/metrics.jsonl, events.…, rl.svg, samples.jsonl, report.html
//! RUN/checkpoints/step-00000010/    weights (f32), moments, run.json: all that a resumption needs
//! RUN/model.safetensors …           the finished model, bf16
//! ```
//! Different here: whatever is drawn (problems, responses, the order of updates) is named by (seed, step, number), and all else
//! that decides a step is in [`State`]; so a run that was killed and resumed ends with the weights of one that was not.

pub mod config;
pub mod groups;
mod sums;
pub mod updates;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use indicatif::ProgressBar;
use m1_kernels::base::packed::PackError;
use m1_kernels::log_prob::log_prob;
use m1_model::checkpoint::WeightDtype;
use m1_model::model::M1;
use serde::{Deserialize, Serialize};

use crate::curriculum::{Curriculum, CurriculumError, CurriculumState, WindowState};
use crate::data::DataError;
use crate::eval::{self, EvalError, EvalSettings, Subject};
use crate::generate::{Ending, GenerateError, GenerateOptions};
use crate::language::Language;
use crate::loss::{LossError, Objective, policy_loss};
use crate::metrics::{EventWriter, MetricsLog, RlMetrics, SampleLog};
use crate::mismatch::Mismatch;
use crate::plot::{self, PlotError};
use crate::reward::Response;
use crate::rollout::{self, Ask, Draws, rollouts};
use crate::run::{self, RunError, io_error};
use crate::supervised::Ended;
use crate::tasks;
use crate::trainer::{TrainError, Trainer};
use crate::view::View;
use config::{ComputeDtype, Config, OldLogProbs, TrainSettings};
use groups::{Group, describe, perplexity};
use sums::Sums;
use updates::{Part, mini_batches};

/// What a resumption needs beside weights and moments; `run.json` of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Updates done, those that were skipped not counted.
    pub updates: u64,
    /// The next problem's number.
    pub problem: u64,
    /// Tokens drawn.
    pub tokens: u64,
    /// Seconds so far.
    pub elapsed_s: f64,
    /// Updates skipped since the last one that was made.
    pub skipped_in_a_row: u64,
    /// How far the tasks have come.
    pub curriculum: CurriculumState,
    /// How long responses may be.
    pub window: WindowState,
    /// With what.
    pub config: Config,
}

impl State {
    /// Nothing done yet.
    pub fn new(config: Config) -> Self {
        Self {
            step: 0,
            updates: 0,
            problem: 0,
            tokens: 0,
            elapsed_s: 0.0,
            skipped_in_a_row: 0,
            curriculum: CurriculumState::default(),
            window: WindowState::default(),
            config,
        }
    }
}

/// What can end a run before its time.
#[derive(Debug, thiserror::Error)]
pub enum CispoError {
    /// The device could not be read, or a prompt not be continued.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// No problem to ask.
    #[error(transparent)]
    Curriculum(#[from] CurriculumError),
    /// A problem could not be asked.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A reward or a recorded probability is no number.
    #[error(transparent)]
    Loss(#[from] LossError),
    /// An update failed, and not for a gradient that is no number.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// Too many updates in a row had to be skipped.
    #[error(
        "step {step}: {skipped} updates in a row had a loss or a gradient that is no number (the last: {last}); the state before \
         them is saved, and --resume with a lower train.lr or train.clip may go on"
    )]
    Diverged {
        /// The step, from 1.
        step: u64,
        /// How many.
        skipped: u64,
        /// What the last one said.
        last: String,
    },
    /// The evaluation.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// The weights do not pack for generation.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The folder of the run could not be written.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The plot could not be written.
    #[error(transparent)]
    Plot(#[from] PlotError),
}

/// A run under way.
pub struct Cispo<'a> {
    out: PathBuf,
    trainer: Trainer,
    state: State,
    objective: Objective,
    curriculum: Curriculum,
    language: &'a Language,
    log: MetricsLog<RlMetrics>,
    samples: SampleLog,
    events: EventWriter,
    view: View,
    /// The weights as an evaluation drew from them, for the rollouts that follow it.
    drawing: Option<M1>,
}

impl<'a> Cispo<'a> {
    /// A run in the folder `out`, which is there, with a trainer that stands where `state` does. `objective` is what
    /// [`Config::validate`] gave.
    ///
    /// # Errors
    /// Logs that cannot be opened, settings that were not validated.
    pub fn new(
        out: &Path,
        trainer: Trainer,
        state: State,
        objective: Objective,
        language: &'a Language,
    ) -> Result<Self, CispoError> {
        let at = |name: &str| out.join(name);
        let log = MetricsLog::open(&at("metrics.jsonl"), state.step).map_err(io_error(&at("metrics.jsonl")))?;
        let samples = SampleLog::open(&at("samples.jsonl"), state.step).map_err(io_error(&at("samples.jsonl")))?;
        let events = EventWriter::create(out, "rl", state.step).map_err(io_error(out))?;
        let view = View::stderr(Some(state.config.steps), log.history());
        let curriculum = Curriculum::new(state.config.curriculum.clone())?;
        let TrainSettings { gradient_checkpointing, dtype, .. } = state.config.train;
        let trainer =
            trainer.with_gradient_checkpointing(gradient_checkpointing).with_bf16(dtype == ComputeDtype::Bf16);
        Ok(Self {
            out: out.into(),
            trainer,
            state,
            objective,
            curriculum,
            language,
            log,
            samples,
            events,
            view,
            drawing: None,
        })
    }

    /// The live view, to send messages to.
    pub fn view(&self) -> View {
        self.view.clone()
    }

    /// How far the run has come.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The model as it stands.
    pub fn model(&self) -> &M1 {
        self.trainer.model()
    }

    /// Trains until the configuration's steps are done, `stop` is set or something fails. Where it is stopped, sampling ends at
    /// the next token and updates at the end of their step; a checkpoint of the last step is there.
    ///
    /// # Errors
    /// See [`CispoError`].
    pub fn train(&mut self, stop: &Arc<AtomicBool>) -> Result<Ended, CispoError> {
        let (before, began) = (self.state.elapsed_s, Instant::now());
        if let Some(warning) = rollout::bias_warning(&self.state.config.sampling()) {
            self.view.message(&format!("warning: {warning}"));
        }
        if self.state.step == 0 && self.state.config.eval.every > 0 {
            let mut first = RlMetrics::default();
            self.evaluate(&mut first)?;
            self.write_down(first)?;
        }
        let mut checkpoint_s = 0.0;
        while self.state.step < self.state.config.steps {
            if stop.load(Ordering::Relaxed) {
                self.checkpoint()?;
                self.view.close();
                return Ok(Ended::Interrupted);
            }
            let mut metrics = RlMetrics { step: self.state.step + 1, checkpoint_s, ..RlMetrics::default() };
            let start = self.state.clone();
            let groups = match self.sample(stop, &mut metrics) {
                // Nothing is learned yet: the step begins anew when the run is resumed.
                Err(CispoError::Generate(GenerateError::Interrupted)) => {
                    self.state = start;
                    continue;
                }
                sampled => sampled?,
            };
            let kept: Vec<&Group> = groups.iter().filter(|group| group.kept).collect();
            self.learn(&kept, &mut metrics)?;

            self.state.step += 1;
            let lengths: Vec<usize> =
                groups.iter().flat_map(|group| group.rollouts.iter().map(|r| r.response.len())).collect();
            let window = self.state.config.window.clone();
            if window.observe(&mut self.state.window, perplexity(&groups), &lengths) {
                let next = window.max_tokens(&self.state.window);
                self.view.message(&format!("step {}: responses may now have {next} tokens", self.state.step));
            }
            let (step, config) = (self.state.step, &self.state.config);
            let last = step >= config.steps;
            let (save, show) =
                (step.is_multiple_of(config.output.save_every), step.is_multiple_of(config.output.samples_every));
            let (count, every) = (config.output.samples, config.eval.every);
            if step == 1 || show || last {
                self.write_samples(&groups, count)?;
            }
            if every > 0 && (step.is_multiple_of(every) || last) {
                self.evaluate(&mut metrics)?;
            }
            self.state.elapsed_s = before + began.elapsed().as_secs_f64();
            metrics.tokens = self.state.tokens;
            metrics.elapsed_s = self.state.elapsed_s;
            self.write_down(metrics)?;
            checkpoint_s = 0.0;
            if save && !last {
                let saving = Instant::now();
                self.checkpoint()?;
                checkpoint_s = saving.elapsed().as_secs_f64();
            }
        }
        self.checkpoint()?;
        run::save_model(&self.out, self.trainer.model(), WeightDtype::Bf16)?;
        self.view.close();
        Ok(Ended::Finished)
    }

    /// Sample and score: groups of responses to new problems, with others in the place of those that teach nothing.
    fn sample(&mut self, stop: &Arc<AtomicBool>, metrics: &mut RlMetrics) -> Result<Vec<Group>, CispoError> {
        let (began, step) = (Instant::now(), self.state.step);
        let (settings, seed) = (self.state.config.rollout.clone(), self.state.config.seed);
        let model = match self.drawing.take() {
            Some(model) => model,
            None => for_generation(&self.trainer.computing())?,
        };
        let window = self.state.config.window.max_tokens(&self.state.window);
        let options = GenerateOptions { stop: Some(stop.clone()), ..self.generate_options(&model, window) };
        let draws = Draws { run_seed: seed, step, samples: settings.samples };
        let (mut groups, mut tokens, mut reward_s): (Vec<Group>, u64, f64) = (Vec::new(), 0, 0.0);
        for round in 0..settings.rounds {
            let missing = settings.prompts - groups.iter().filter(|group| group.kept).count();
            if missing == 0 {
                break;
            }
            metrics.refills = round as u64;
            let numbers = self.state.problem..self.state.problem + missing as u64;
            self.state.problem = numbers.end;
            let problems = numbers
                .clone()
                .map(|number| self.curriculum.problem(&self.state.curriculum, seed, number))
                .collect::<Result<Vec<_>, _>>()?;
            let asks = numbers
                .zip(&problems)
                .map(|(problem, p)| Ok(Ask { problem, prompt: self.language.data.prompt(p)? }))
                .collect::<Result<Vec<_>, DataError>>()?;

            let (all, done) = ((missing * settings.samples) as u64, AtomicU64::new(0));
            self.view.phase("rollout", 0, all);
            let count = |_: usize, _: &_| {
                self.view.phase("rollout", done.fetch_add(1, Ordering::Relaxed) + 1, all);
            };
            let drawn = rollouts(&model, &asks, draws, &options, self.trainer.pools(), &count)?;

            let scoring = Instant::now();
            for (problem, rollouts) in problems.into_iter().zip(drawn) {
                tokens += rollouts.iter().map(|r| r.response.len() as u64).sum::<u64>();
                let mut group = self.score(problem, rollouts, window);
                let rate = group.pass_rate();
                self.curriculum.observe(&mut self.state.curriculum, &group.problem, rate);
                let teaches = !group.is_uniform() && self.curriculum.settings().filter.keeps(rate);
                group.kept = teaches || !settings.dynamic_sampling;
                groups.push(group);
            }
            reward_s += scoring.elapsed().as_secs_f64();
        }
        self.state.tokens += tokens;
        metrics.length_window = window as u64;
        metrics.reward_s = reward_s;
        metrics.rollout_s = began.elapsed().as_secs_f64() - reward_s;
        metrics.rollout_tokens_per_s = tokens as f64 / metrics.rollout_s;
        describe(&groups, metrics);
        Ok(groups)
    }

    /// What each response to a problem earns.
    fn score(&self, problem: tasks::Problem, rollouts: Vec<rollout::Rollout>, window: usize) -> Group {
        let texts: Vec<String> = rollouts.iter().map(|r| self.language.tokenizer.decode(r.text())).collect();
        let settings = &self.state.config.reward;
        let task = tasks::by_name(problem.task).expect("a problem is of a task that there is");
        let rewards = rollouts
            .iter()
            .zip(&texts)
            .map(|(r, text)| {
                let response = Response { text, tokens: r.response.len(), ended: r.ending == Ending::End };
                settings.reward(task, &problem, response, window)
            })
            .collect();
        Group { problem, rollouts, texts, rewards, kept: true }
    }

    /// Advantage and update: the batch's groups in mini-batches, one step of the optimizer for each.
    fn learn(&mut self, groups: &[&Group], metrics: &mut RlMetrics) -> Result<(), CispoError> {
        let began = Instant::now();
        let (settings, seed) = (self.state.config.train.clone(), self.state.config.seed);
        let each = self.state.config.rollout.prompts / settings.updates;
        let order = rollout::seed(seed, self.state.step, u64::MAX, 0);
        let minis = mini_batches(groups, &self.objective, each, settings.micro_tokens, order)?;
        let mut mismatch = Mismatch::default();
        let old = match settings.old_log_probs {
            OldLogProbs::Rollout => {
                minis.iter().map(|mini| mini.iter().map(|p| p.generation.clone()).collect()).collect()
            }
            OldLogProbs::Training => self.training_log_probs(&minis, &mut mismatch),
        };
        let mut sums = Sums::default();
        for (i, (mini, old)) in minis.iter().zip(&old).enumerate() {
            self.view.phase("train", i as u64, minis.len() as u64);
            // The first update's tokens are seen by the policy that drew them.
            let first = i == 0 && settings.old_log_probs == OldLogProbs::Rollout;
            self.update(mini, old, first.then_some(&mut mismatch), &mut sums, metrics)?;
        }
        metrics.train_s = began.elapsed().as_secs_f64();
        metrics.train_tokens_per_s = sums.read as f64 / metrics.train_s;
        metrics.staleness = sums.made as f64;
        sums.describe(metrics);
        let report = mismatch.report();
        if report.tokens > 0 {
            metrics.rollout_train_prob_diff_mean = report.mean_difference;
            metrics.rollout_train_prob_diff_max = report.max_difference;
            metrics.rollout_train_prob_corr = report.pearson.unwrap_or(f64::NAN);
        }
        Ok(())
    }

    /// One update, or none where loss or gradient is no number.
    fn update(
        &mut self,
        mini: &[Part],
        old: &[Vec<f32>],
        mismatch: Option<&mut Mismatch>,
        sums: &mut Sums,
        metrics: &mut RlMetrics,
    ) -> Result<(), CispoError> {
        let (objective, bonus) = (self.objective, self.state.config.train.entropy);
        let lr = self.state.config.lr(self.trainer.steps());
        let batches: Vec<_> = mini.iter().map(|part| part.batch.clone()).collect();
        let updated = self.trainer.update::<_, CispoError>(
            &batches,
            |i, hidden, head| {
                let part = &mini[i];
                let (log_probs, entropy) = log_prob(hidden, head, &part.next, 1.0);
                let policy = policy_loss(&objective, log_probs, &old[i], &part.advantages, &part.scales)?;
                let entropy_sum = f64::from(entropy.clone().detach().sum().into_scalar::<f32>());
                let mut loss = policy.loss;
                if bonus != 0.0 {
                    let scales = burn::tensor::Tensor::from_floats(part.scales.as_slice(), &entropy.device());
                    loss = loss - (entropy * scales).sum() * bonus;
                }
                Ok((loss, (policy.statistics, entropy_sum, policy.log_probs)))
            },
            lr,
        );
        let last = match updated {
            Ok((report, parts)) => {
                sums.made += 1;
                sums.read += report.tokens;
                sums.aux_loss += report.aux_loss;
                sums.grad_norm += report.grad_norm;
                sums.load_min = sums.load_min.min(report.expert_load_min);
                sums.load_max = sums.load_max.max(report.expert_load_max);
                if let Some(mismatch) = mismatch {
                    for (part, (_, _, log_probs)) in mini.iter().zip(&parts) {
                        mismatch.add_log_probs(&part.generation, log_probs);
                    }
                }
                for (statistics, entropy, _) in parts {
                    sums.statistics.merge(&statistics);
                    sums.entropy += entropy;
                }
                metrics.lr = lr;
                self.state.skipped_in_a_row = 0;
                self.state.updates = self.trainer.steps();
                return Ok(());
            }
            Err(CispoError::Train(e @ TrainError::Diverged { .. })) => e.to_string(),
            Err(CispoError::Loss(e @ LossError::NotFinite { what: "log_prob", .. })) => e.to_string(),
            Err(e) => return Err(e),
        };
        metrics.skipped_updates += 1;
        self.state.skipped_in_a_row += 1;
        self.view.message(&format!("step {}: an update is skipped: {last}", self.state.step + 1));
        if self.state.skipped_in_a_row >= self.state.config.train.max_skipped {
            let (step, skipped) = (self.state.step + 1, self.state.skipped_in_a_row);
            self.checkpoint()?;
            return Err(CispoError::Diverged { step, skipped, last });
        }
        Ok(())
    }

    /// log π of every token under the training forward as it stands, by mini-batch and part.
    fn training_log_probs(&self, minis: &[Vec<Part>], mismatch: &mut Mismatch) -> Vec<Vec<Vec<f32>>> {
        let parts: Vec<&Part> = minis.iter().flatten().collect();
        let batches: Vec<_> = parts.iter().map(|part| &part.batch).collect();
        let mut found = self
            .trainer
            .forward(&batches, |i, hidden, head| {
                let (log_probs, _) = log_prob(hidden, head, &parts[i].next, 1.0);
                log_probs.detach().into_data().iter::<f32>().collect::<Vec<_>>()
            })
            .into_iter();
        minis
            .iter()
            .map(|mini| {
                let found: Vec<Vec<f32>> = found.by_ref().take(mini.len()).collect();
                mini.iter().zip(&found).for_each(|(part, found)| mismatch.add_log_probs(&part.generation, found));
                found
            })
            .collect()
    }

    /// How many held-out problems the model solves.
    fn evaluate(&mut self, metrics: &mut RlMetrics) -> Result<(), CispoError> {
        let began = Instant::now();
        let config = &self.state.config;
        let model = for_generation(&self.trainer.computing())?;
        let settings = EvalSettings {
            difficulties: config.eval.difficulties.clone(),
            problems: config.eval.problems,
            seed: 0, // the same for every run, so that arms compare
            modes: vec![config.eval.mode],
            temperature: 1.0,
            top_p: 1.0,
            max_new_tokens: config.window.max_tokens(&self.state.window),
            rows: config.rollout.rows.div_ceil(self.trainer.pools().len().max(1)),
            samples: 0,
            overlap_conversations: 0,
        };
        let Language { data, tokenizer, end_ids } = self.language;
        let subject = Subject { model: &model, tokenizer, end_ids: end_ids.clone(), data };
        let tasks: Vec<_> = config.curriculum.tasks.keys().filter_map(|name| tasks::by_name(name)).collect();
        self.view.phase("eval", 0, 1);
        let report = eval::evaluate(&subject, &tasks, &settings, self.trainer.pools(), &ProgressBar::hidden())?;
        let (mut solved, mut asked) = (0, 0);
        for task in &tasks {
            let of_task = report.scores.iter().filter(|score| score.task == task.name());
            let (s, n) = of_task.fold((0, 0), |(s, n), score| (s + score.solved, n + score.problems));
            metrics.eval_pass_rate_by_task.insert(task.name().into(), s as f64 / n.max(1) as f64);
            (solved, asked) = (solved + s, asked + n);
        }
        metrics.eval_pass_rate = Some(solved as f64 / asked.max(1) as f64);
        metrics.eval_s = began.elapsed().as_secs_f64();
        self.drawing = Some(model);
        Ok(())
    }

    fn generate_options(&self, model: &M1, window: usize) -> GenerateOptions {
        GenerateOptions {
            sampling: self.state.config.sampling(),
            allowed: Some(self.language.tokenizer.known(model.config().vocab_size)),
            end_ids: self.language.end_ids.clone(),
            max_new_tokens: window,
            repetition: Some(self.state.config.rollout.repetition),
            rows: self.state.config.rollout.rows,
            context: None,
            stop: None,
        }
    }

    fn write_samples(&mut self, groups: &[Group], count: usize) -> Result<(), CispoError> {
        let path = self.out.join("samples.jsonl");
        for group in groups.iter().take(count) {
            self.samples.push(group.record(self.state.step)).map_err(io_error(&path))?;
        }
        Ok(())
    }

    fn write_down(&mut self, metrics: RlMetrics) -> Result<(), CispoError> {
        self.events.push(&metrics).map_err(io_error(self.events.path()))?;
        if metrics.step > 0 {
            self.view.step(&metrics);
        }
        self.log.push(metrics).map_err(io_error(&self.out.join("metrics.jsonl")))?;
        Ok(())
    }

    fn checkpoint(&self) -> Result<(), CispoError> {
        self.view.phase("checkpoint", 0, 1);
        run::save(&self.out, &self.trainer, self.state.step, &self.state)?;
        plot::rl_svg(&self.out.join("rl.svg"), &self.state.config.name, self.log.history())?;
        Ok(())
    }
}

/// The model that draws: the trained weights, on the CPU in the form that decoding reads fastest.
fn for_generation(model: &M1) -> Result<M1, PackError> {
    if m1_kernels::base::on_cpu(&model.model.norm.weight.val()) { model.packed() } else { Ok(model.clone()) }
}
