//! How many problems that training never saw a model solves, by task and difficulty.
//!
//! Different here: problems come from the questions that the data set keeps for evaluation alone (see [`crate::data`]),
//! the verifier is strict, and greedy and sampled replies are counted apart.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;

use indicatif::ProgressBar;
use m1_infer::sampler::SamplingOptions;
use m1_infer::tokenizer::Tokenizer;
use m1_model::Trace;
use m1_model::model::M1;
use serde::{Deserialize, Serialize};

use crate::conversation::Role;
use crate::data::{Data, DataError};
use crate::generate::{Ending, GenerateError, GenerateOptions, Prompt, generate};
use crate::tasks::{Problem, Task};
use crate::trainer::{cross_entropy_sum, in_parallel, targets};

/// What to evaluate and how.
#[derive(Debug, Clone)]
pub struct EvalSettings {
    /// Difficulties.
    pub difficulties: Vec<u8>,
    /// Problems per task and difficulty.
    pub problems: u64,
    /// Seed of the draws.
    pub seed: u64,
    /// Greedy, sampled or both.
    pub modes: Vec<Mode>,
    /// Temperature of the sampled mode.
    pub temperature: f32,
    /// Nucleus of the sampled mode.
    pub top_p: f32,
    /// A reply is cut after so many tokens, and then counts as wrong.
    pub max_new_tokens: usize,
    /// Replies decoded together in each worker's batch.
    pub rows: usize,
    /// Replies of each kind that the report keeps to be shown.
    pub samples: usize,
    /// Training conversations to look through for the questions asked.
    pub overlap_conversations: u64,
}

/// What can stop an evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// A problem could not be made.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model could not be asked.
    #[error(transparent)]
    Generate(#[from] GenerateError),
}

/// How replies are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The most likely token, always.
    Greedy,
    /// Drawn at a temperature from the nucleus.
    Sampled,
}

/// Results of one task at one difficulty in one mode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The task's name.
    pub task: String,
    /// 1 to 10.
    pub difficulty: u8,
    /// How replies were drawn.
    pub mode: Mode,
    /// Problems asked. Fewer than wanted where the task has no more different ones.
    pub problems: u64,
    /// Replies that the verifier accepted.
    pub solved: u64,
    /// Replies that did not end by themselves.
    pub unfinished: u64,
    /// Mean reply length in tokens.
    pub mean_tokens: f64,
}

impl Score {
    /// Share solved, 0 to 1.
    pub fn accuracy(&self) -> f64 {
        self.solved as f64 / self.problems.max(1) as f64
    }
}

/// A question and what became of it.
#[derive(Debug, Clone)]
pub struct Sample {
    /// The question.
    pub question: String,
    /// The model's reply, thinking included.
    pub reply: String,
    /// What the task's own solution ends in.
    pub expected: String,
    /// Whether the verifier accepted the reply.
    pub solved: bool,
}

/// What an evaluation found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Different questions asked.
    pub questions: usize,
    /// How many of them occur, word for word, among the training conversations looked through: 0 unless the split is broken.
    pub overlap: usize,
    /// How many training conversations were looked through.
    pub overlap_conversations: u64,
    /// `e` to the mean of `-ln p(token | before)` over the tokens of the problems' own solutions, all problems together.
    pub perplexity: f64,
    /// How many tokens that is.
    pub solution_tokens: u64,
    /// One entry per task, difficulty and mode.
    pub scores: Vec<Score>,
    /// The first few replies of each.
    #[serde(skip)]
    pub samples: Vec<(String, u8, Mode, Vec<Sample>)>,
}

/// Who is asked, and what about.
pub struct Subject<'a> {
    /// The model.
    pub model: &'a M1,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Ids that end a reply.
    pub end_ids: Vec<u32>,
    /// Where the problems come from.
    pub data: &'a Data,
}

/// Asks the model all problems, as many batches side by side as there are pools, each refilled as replies end.
pub fn evaluate(
    subject: &Subject,
    tasks: &[&dyn Task],
    settings: &EvalSettings,
    pools: &[rayon::ThreadPool],
    bar: &ProgressBar,
) -> Result<Report, EvalError> {
    let Subject { model, tokenizer, data, .. } = *subject;
    let (mut asked, mut prompts) = (Vec::new(), Vec::new());
    let (mut questions, mut solutions) = (HashSet::new(), Vec::new());
    for &task in tasks {
        for &difficulty in &settings.difficulties {
            let problems = problems(data, task, difficulty, settings.problems)?;
            questions.extend(problems.iter().map(|p| p.question.clone()));
            solutions.extend(problems.chunks(SOLUTIONS).map(<[_]>::to_vec));
            for (problem, index) in problems.into_iter().zip(0..) {
                let seed = settings.seed.wrapping_mul(1_000_003).wrapping_add(index);
                prompts.push(Prompt { ids: data.prompt(&problem)?, seeds: vec![seed] });
                asked.push((task, difficulty, problem));
            }
        }
    }
    bar.set_length((asked.len() * settings.modes.len()) as u64);
    let mut results = Vec::new();
    for &mode in &settings.modes {
        let options = GenerateOptions {
            sampling: sampling(mode, settings),
            allowed: Some(tokenizer.known(model.config().vocab_size)),
            end_ids: subject.end_ids.clone(),
            max_new_tokens: settings.max_new_tokens,
            repetition: None,
            rows: settings.rows * pools.len().max(1),
            context: None,
            stop: None,
        };
        let replies = generate(model, &prompts, &options, pools, &|_, _| bar.inc(1))?;
        results.extend(asked.iter().zip(replies.into_iter().flatten()).map(|(asked, reply)| (mode, asked, reply)));
    }
    let (solution_tokens, surprise) = surprise(subject, &solutions, pools)?;
    let mut report = Report {
        perplexity: (surprise / solution_tokens.max(1) as f64).exp(),
        solution_tokens,
        questions: questions.len(),
        overlap: data.overlap(questions.iter().map(String::as_str), settings.overlap_conversations),
        overlap_conversations: settings.overlap_conversations,
        ..Report::default()
    };
    let mut scores: BTreeMap<(usize, u8, Mode), (Score, Vec<Sample>)> = BTreeMap::new();
    for (mode, (task, difficulty, problem), reply) in results {
        let place = tasks.iter().position(|t| t.name() == task.name()).unwrap_or(0);
        let (score, kept) = scores.entry((place, *difficulty, mode)).or_insert_with(|| {
            let score = Score {
                task: task.name().to_string(),
                difficulty: *difficulty,
                mode,
                problems: 0,
                solved: 0,
                unfinished: 0,
                mean_tokens: 0.0,
            };
            (score, Vec::new())
        });
        let ended = reply.ending == Ending::End;
        let (tokens, reply) = (reply.text().len(), tokenizer.decode(reply.text()));
        let solved = ended && task.verify(problem, &reply);
        score.mean_tokens = (score.mean_tokens * score.problems as f64 + tokens as f64) / (score.problems + 1) as f64;
        score.problems += 1;
        score.solved += u64::from(solved);
        score.unfinished += u64::from(!ended);
        if kept.len() < settings.samples {
            let (question, expected) = (problem.question.clone(), problem.answer.clone());
            kept.push(Sample { question, reply, expected, solved });
        }
    }
    for ((_, difficulty, mode), (score, samples)) in scores {
        report.samples.push((score.task.clone(), difficulty, mode, samples));
        report.scores.push(score);
    }
    Ok(report)
}

/// Solutions read together: a fixed number, so that no setting changes a digit of the sum.
const SOLUTIONS: usize = 16;

/// The tokens of the problems' own solutions, and the sum of `-ln p(token | before)` over them.
fn surprise(
    subject: &Subject,
    problems: &[Vec<Problem>],
    pools: &[rayon::ThreadPool],
) -> Result<(u64, f64), EvalError> {
    let Subject { model, data, .. } = *subject;
    let parts = in_parallel(pools, problems.len(), |i| {
        let solved = |p: &Problem| data.tokens_of(&[(Role::User, p.question.clone()), (Role::Assistant, p.reply())]);
        let examples = problems[i].iter().map(solved).collect::<Result<Vec<_>, _>>()?;
        let tokens: usize = examples.iter().map(targets).sum();
        let sum = cross_entropy_sum(model, &examples.iter().collect::<Vec<_>>(), &mut Trace::none());
        Ok::<_, EvalError>((tokens as u64, f64::from(sum.into_scalar::<f32>())))
    });
    parts.into_iter().try_fold((0, 0.0), |(tokens, sum), part| part.map(|(t, s)| (tokens + t, sum + s)))
}

/// Different evaluation problems; a small space at low difficulty has fewer than wanted.
fn problems(data: &Data, task: &dyn Task, difficulty: u8, wanted: u64) -> Result<Vec<Problem>, DataError> {
    let mut keys = HashSet::new();
    let mut problems = Vec::new();
    for index in 0..wanted.saturating_mul(4) {
        let Some(problem) = data.eval_problem(task, difficulty, index)? else {
            break;
        };
        if keys.insert(problem.key.clone()) {
            problems.push(problem);
        }
        if problems.len() as u64 == wanted {
            break;
        }
    }
    Ok(problems)
}

fn sampling(mode: Mode, settings: &EvalSettings) -> SamplingOptions {
    let plain = SamplingOptions { temperature: 0.0, top_p: 1.0, ..SamplingOptions::default() };
    match mode {
        Mode::Greedy => plain,
        Mode::Sampled => SamplingOptions { temperature: settings.temperature, top_p: settings.top_p, ..plain },
    }
}

/// A Markdown table: one row per task, one column per difficulty, percentages; a table for each mode.
pub fn markdown(scores: &[Score], settings: &EvalSettings) -> String {
    let mut text = String::new();
    for mode in &settings.modes {
        let of_mode: Vec<&Score> = scores.iter().filter(|s| s.mode == *mode).collect();
        let how = match mode {
            Mode::Greedy => "Greedy".to_owned(),
            Mode::Sampled => format!("Temperature {}, top_p {}", settings.temperature, settings.top_p),
        };
        let _ = write!(text, "{how}, % solved:\n\n| task |");
        for d in &settings.difficulties {
            let _ = write!(text, " {d} |");
        }
        text += " problems | tokens/reply |\n|---|";
        text += &"---:|".repeat(settings.difficulties.len() + 2);
        text.push('\n');
        let mut tasks: Vec<&str> = of_mode.iter().map(|s| s.task.as_str()).collect();
        tasks.dedup();
        for task in tasks {
            let row: Vec<&&Score> = of_mode.iter().filter(|s| s.task == task).collect();
            let _ = write!(text, "| {task} |");
            for d in &settings.difficulties {
                match row.iter().find(|s| s.difficulty == *d) {
                    Some(s) if s.problems > 0 => {
                        let _ = write!(text, " {:.0} |", 100.0 * s.accuracy());
                    }
                    _ => text += " – |",
                }
            }
            let asked: u64 = row.iter().map(|s| s.problems).sum();
            let tokens: f64 = row.iter().map(|s| s.mean_tokens * s.problems as f64).sum();
            let _ = writeln!(text, " {asked} | {:.0} |", tokens / asked.max(1) as f64);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_row_per_task_and_a_dash_where_nothing_was_asked() {
        let score = |task: &str, difficulty, problems, solved| Score {
            task: task.into(),
            difficulty,
            mode: Mode::Greedy,
            problems,
            solved,
            unfinished: 0,
            mean_tokens: 40.0,
        };
        let scores = [score("sort", 1, 50, 50), score("sort", 2, 40, 30), score("clock", 1, 50, 1)];
        let settings = EvalSettings {
            difficulties: vec![1, 2],
            problems: 50,
            seed: 0,
            modes: vec![Mode::Greedy],
            temperature: 1.0,
            top_p: 0.95,
            max_new_tokens: 400,
            rows: 32,
            samples: 0,
            overlap_conversations: 0,
        };
        let text = markdown(&scores, &settings);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "Greedy, % solved:");
        assert_eq!(lines[2], "| task | 1 | 2 | problems | tokens/reply |");
        assert_eq!(lines[4], "| sort | 100 | 75 | 90 | 40 |");
        assert_eq!(lines[5], "| clock | 2 | – | 50 | 40 |");
    }
}
