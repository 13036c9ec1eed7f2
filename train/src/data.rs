//! Conversations to train on and problems to be judged by, made as they are needed: nothing is stored.
//!
//! Example number `index` depends on the configuration and `index` alone, so a resumed run goes on where it stopped.
//! **Split.** A problem belongs to evaluation if [`text_hash`] of "task key" is divisible by [`HELD_OUT`], else to training,
//! whatever its wording, its difficulty and its seed. Each side draws until the split fits, so no problem is
//! in both; [`Data::overlap`] counts to make sure. Training and evaluation also have different random streams.
//! **Loss** is taken on the assistant's tokens: its text and the `<end_of_sentence>` that ends it.

use crate::conversation::{Message, Role, render, segments};
use crate::small_talk::{self, Exchange};
use crate::tasks::{self, Draw, MAX_DIFFICULTY, Problem, Task, text_hash};
use crate::tokenizer::{self, TokenizerError};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use tokenizers::Tokenizer;

/// One problem in so many is kept for evaluation.
pub const HELD_OUT: u64 = 8;

/// Draws before a search for a problem of the right split gives up. A problem of training is found at once; one for
/// evaluation is missed by chance in one search out of 10^59, so a miss means that the task has none there.
const MOST_DRAWS: u64 = 1024;

/// What a configuration of the data can have wrong.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A task that does not exist.
    #[error("data.tasks: no task is called {name:?}; there are {known}")]
    UnknownTask {
        /// The name given.
        name: String,
        /// All names.
        known: String,
    },
    /// A weight below zero or not finite, or all zero.
    #[error("data.{field}: weights must be finite, not negative and not all zero")]
    Weights {
        /// The field with the weights.
        field: &'static str,
    },
    /// A share outside 0..=1.
    #[error("data.{field}: {value} is no share between 0 and 1")]
    Share {
        /// The field.
        field: &'static str,
        /// Its value.
        value: f64,
    },
    /// A difficulty outside 1..=10.
    #[error("difficulty {0}: must be from 1 to 10")]
    Difficulty(u8),
    /// The tokenizer lacks something or cannot encode.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// The mixture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Of all random streams of the training data.
    pub seed: u64,
    /// How often each task is drawn, relative to the others; a task that is not named is left out.
    pub tasks: BTreeMap<String, f64>,
    /// How often difficulty 1, 2, … 10 is drawn.
    pub difficulties: [f64; MAX_DIFFICULTY as usize],
    /// The share of conversations that are small talk only.
    pub small_talk: f64,
    /// The share of conversations with two turns, of which at least one is a problem.
    pub two_turns: f64,
    /// The share of conversations that begin with a system prompt.
    pub system: f64,
}

impl Default for DataConfig {
    /// The mixture of m1-nano: what is learned quickly comes more seldom, low difficulties more often.
    fn default() -> Self {
        let weights = [
            ("addition", 1.2),
            ("subtraction", 1.2),
            ("compare", 0.8),
            ("sort_numbers", 1.3),
            ("sort_words", 1.2),
            ("counting", 1.0),
            ("boolean", 0.8),
            ("brackets", 1.0),
            ("weekday", 0.8),
            ("clock", 1.0),
            ("equation", 1.2),
            ("word_problem", 1.0),
        ];
        Self {
            seed: 1,
            tasks: weights.iter().map(|(name, weight)| (name.to_string(), *weight)).collect(),
            difficulties: [0.26, 0.25, 0.25, 0.14, 0.10, 0.0, 0.0, 0.0, 0.0, 0.0],
            small_talk: 0.10,
            two_turns: 0.12,
            system: 0.10,
        }
    }
}

/// A conversation in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The token ids.
    pub ids: Vec<u32>,
    /// For each token, whether it is the assistant's to predict: `loss[i]` belongs to the prediction OF `ids[i]`.
    pub loss: Vec<bool>,
}

/// Where a run's examples come from: the same index gives the same example, whatever was asked before.
pub trait Source {
    /// The example number `index`.
    ///
    /// # Errors
    /// The tokenizer's.
    fn example(&self, index: u64) -> Result<Example, DataError>;

    /// How many examples a run may read in all; `None` where they never end.
    fn limit(&self) -> Option<u64> {
        None
    }
}

/// Makes examples and evaluation problems.
pub struct Data {
    config: DataConfig,
    tasks: Vec<(&'static dyn Task, f64)>,
    tokenizer: Tokenizer,
}

fn check_weights(field: &'static str, weights: impl Iterator<Item = f64> + Clone) -> Result<(), DataError> {
    let good = weights.clone().all(|weight| weight.is_finite() && weight >= 0.0);
    if good && weights.sum::<f64>() > 0.0 { Ok(()) } else { Err(DataError::Weights { field }) }
}

/// Whether a problem is one that training never sees.
pub fn is_held_out(problem: &Problem) -> bool {
    text_hash(&format!("{} {}", problem.task, problem.key)).is_multiple_of(HELD_OUT)
}

/// The first problem of the stream from (seed, index) on that is fit.
fn find(
    task: &dyn Task,
    domain: &str,
    seed: u64,
    index: u64,
    difficulty: u8,
    fit: impl Fn(&Problem) -> bool,
) -> Option<Problem> {
    let mut draw = Draw::new(seed, index, &format!("{domain}/{}/{difficulty}", task.name()));
    (0..MOST_DRAWS).map(|_| task.draw(&mut draw, difficulty)).find(fit)
}

/// The first problem on the training side, from (seed, index) on in the stream that `domain` names, which `fit`
/// accepts; never one that is held out. `None` where no such problem turns up in some thousand draws.
///
/// `difficulty` is within 1..=[`MAX_DIFFICULTY`]. The same arguments give the same problem, for ever.
pub fn training_problem(
    task: &dyn Task,
    domain: &str,
    seed: u64,
    index: u64,
    difficulty: u8,
    fit: impl Fn(&Problem) -> bool,
) -> Option<Problem> {
    find(task, domain, seed, index, difficulty, |problem| !is_held_out(problem) && fit(problem))
}

impl DataConfig {
    /// Checks the mixture and finds its tasks.
    fn resolve(&self) -> Result<Vec<(&'static dyn Task, f64)>, DataError> {
        check_weights("tasks", self.tasks.values().copied())?;
        check_weights("difficulties", self.difficulties.iter().copied())?;
        let shares = [("small_talk", self.small_talk), ("two_turns", self.two_turns), ("system", self.system)];
        for (field, value) in shares {
            if !(0.0..=1.0).contains(&value) {
                return Err(DataError::Share { field, value });
            }
        }
        let known = || tasks::all().iter().map(|task| task.name()).collect::<Vec<_>>().join(", ");
        self.tasks
            .iter()
            .map(|(name, &weight)| match tasks::by_name(name) {
                Some(task) => Ok((task, weight)),
                None => Err(DataError::UnknownTask { name: name.clone(), known: known() }),
            })
            .collect()
    }

    /// The conversation number `index`.
    ///
    /// # Errors
    /// What is wrong with the configuration.
    pub fn conversation(&self, index: u64) -> Result<Vec<Message>, DataError> {
        Ok(self.converse(&self.resolve()?, index))
    }

    fn converse(&self, tasks: &[(&'static dyn Task, f64)], index: u64) -> Vec<Message> {
        let mut draw = Draw::new(self.seed, index, "conversation");
        let weights: Vec<_> = tasks.iter().map(|(_, weight)| *weight).collect();
        let problem = |draw: &mut Draw, turn: u64| {
            let task = tasks[draw.weighted(&weights)].0;
            let difficulty = draw.weighted(&self.difficulties) as u8 + 1;
            // A task whose every draw is held out at this difficulty would give None; easier to try the next one.
            (difficulty..=MAX_DIFFICULTY)
                .find_map(|difficulty| {
                    training_problem(task, "train", self.seed, 4 * index + turn, difficulty, |_| true)
                })
                .map(|problem| {
                    let reply = problem.reply();
                    (problem.question, reply)
                })
        };
        let talk = |draw: &mut Draw, exchange: Exchange| {
            let think = !draw.chance(10);
            (exchange.question.to_string(), exchange.reply(think))
        };
        let mut turns = Vec::new();
        match draw.weighted(&[self.small_talk, self.two_turns, (1.0 - self.small_talk - self.two_turns).max(0.0)]) {
            0 => {
                let exchange = small_talk::draw(&mut draw);
                turns.push(Some(talk(&mut draw, exchange)));
                if draw.chance(25) {
                    let exchange = small_talk::draw(&mut draw);
                    turns.push(Some(talk(&mut draw, exchange)));
                }
            }
            1 => match draw.below(4) {
                0 => {
                    let exchange = small_talk::greeting(&mut draw);
                    turns.push(Some(talk(&mut draw, exchange)));
                    turns.push(problem(&mut draw, 0));
                }
                1 => {
                    turns.push(problem(&mut draw, 0));
                    let exchange = small_talk::farewell(&mut draw);
                    turns.push(Some(talk(&mut draw, exchange)));
                }
                _ => {
                    turns.push(problem(&mut draw, 0));
                    turns.push(problem(&mut draw, 1));
                }
            },
            _ => turns.push(problem(&mut draw, 0)),
        }
        let mut messages = Vec::new();
        if draw.weighted(&[self.system, 1.0 - self.system]) == 0 {
            messages.push((Role::System, SYSTEM_PROMPTS[draw.below(SYSTEM_PROMPTS.len())].to_string()));
        }
        for (question, reply) in turns.into_iter().flatten() {
            messages.push((Role::User, loosely(&mut draw, question)));
            messages.push((Role::Assistant, reply));
        }
        messages
    }
}

/// System prompts that the model has met: M1's two, and one of its own.
const SYSTEM_PROMPTS: [&str; 3] = [
    "You are a helpful assistant.",
    "You are m1-nano, a helpful assistant.",
    "Please reason step by step, and put your final answer within \\boxed{}.",
];

/// As people type: now and then a small letter at the head, or no full stop or question mark at the end.
fn loosely(draw: &mut Draw, mut text: String) -> String {
    if draw.chance(12) && !text.starts_with("MiniMax") {
        let head: String = text.chars().take(1).flat_map(char::to_lowercase).collect();
        let rest = text.chars().next().map_or(0, char::len_utf8);
        text.replace_range(..rest, &head);
    }
    if draw.chance(12) && text.ends_with(['.', '?', '!']) && text.len() > 1 {
        text.pop();
    }
    text
}

impl Source for Data {
    fn example(&self, index: u64) -> Result<Example, DataError> {
        self.tokens_of(&self.config.converse(&self.tasks, index))
    }
}

/// A conversation in tokens; loss is taken on what the assistant says and on the token that ends it.
///
/// # Errors
/// The tokenizer's.
pub fn tokens_of(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Example, TokenizerError> {
    let mut example = Example { ids: Vec::new(), loss: Vec::new() };
    for (text, loss) in segments(messages) {
        example.ids.extend(tokenizer::encode(tokenizer, &text)?);
        example.loss.resize(example.ids.len(), loss);
    }
    Ok(example)
}

impl Data {
    /// # Errors
    /// What is wrong with the configuration, or with the tokenizer.
    pub fn new(config: DataConfig, tokenizer: Tokenizer) -> Result<Self, DataError> {
        let tasks = config.resolve()?;
        tokenizer::special_id(&tokenizer, "<end_of_sentence>")?;
        Ok(Self { config, tasks, tokenizer })
    }

    /// The configuration.
    pub fn config(&self) -> &DataConfig {
        &self.config
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// A conversation in tokens, with its loss mask.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn tokens_of(&self, messages: &[Message]) -> Result<Example, DataError> {
        Ok(tokens_of(&self.tokenizer, messages)?)
    }

    /// The evaluation problem number `index` of a task, which no training example contains; `None` where the task has
    /// none at that difficulty. Small difficulties have few problems: several indices may give the same.
    ///
    /// # Errors
    /// A difficulty outside 1..=10.
    pub fn eval_problem(&self, task: &dyn Task, difficulty: u8, index: u64) -> Result<Option<Problem>, DataError> {
        if !(1..=MAX_DIFFICULTY).contains(&difficulty) {
            return Err(DataError::Difficulty(difficulty));
        }
        Ok(find(task, "eval", self.config.seed, index, difficulty, is_held_out))
    }

    /// The tokens that ask the problem, up to where the assistant begins.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn prompt(&self, problem: &Problem) -> Result<Vec<u32>, DataError> {
        let text = render(&[(Role::User, problem.question.clone())]) + "<beginning_of_sentence>ai name=assistant\n";
        Ok(tokenizer::encode(&self.tokenizer, &text)?)
    }

    /// How many of the questions occur, word for word, in the first `examples` training conversations. 0 unless the
    /// split is broken.
    pub fn overlap<'a>(&self, questions: impl Iterator<Item = &'a str>, examples: u64) -> usize {
        let asked: HashSet<&str> = questions.collect();
        let mut met = HashSet::new();
        for index in 0..examples {
            for (role, text) in self.config.converse(&self.tasks, index) {
                if role == Role::User && asked.contains(text.as_str()) {
                    met.insert(text);
                }
            }
        }
        met.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> Data {
        let config = DataConfig::default();
        let tokenizer = tokenizer::train(&config, 3000, 768).unwrap();
        Data::new(config, tokenizer).unwrap()
    }

    #[test]
    fn examples_are_reproducible_whole_conversations() {
        let data = data();
        let special = |name| tokenizer::special_id(data.tokenizer(), name).unwrap();
        let (begin, end) = (special("<beginning_of_sentence>"), special("<end_of_sentence>"));
        for index in 0..300 {
            let example = data.example(index).unwrap();
            assert_eq!(example, data.example(index).unwrap());
            let messages = data.config().conversation(index).unwrap();
            let text = render(&messages);
            assert_eq!(example.ids, tokenizer::encode(data.tokenizer(), &text).unwrap(), "cuts change no token");
            assert_eq!(data.tokenizer().decode(&example.ids, false).unwrap(), text);
            // What is trained on is the replies and nothing else.
            let trained: Vec<u32> =
                example.ids.iter().zip(&example.loss).filter(|(_, loss)| **loss).map(|(id, _)| *id).collect();
            let replies: String = messages
                .iter()
                .filter(|message| message.0 == Role::Assistant)
                .map(|message| format!("{}<end_of_sentence>", message.1))
                .collect();
            assert_eq!(data.tokenizer().decode(&trained, false).unwrap(), replies);
            assert_eq!(trained.iter().filter(|id| **id == end).count(), replies.matches("<end_of_sentence>").count());
            assert!(!trained.contains(&begin));
        }
    }

    #[test]
    fn evaluation_is_never_trained_on() {
        let data = data();
        let mut questions = Vec::new();
        for task in tasks::all() {
            for difficulty in 1..=MAX_DIFFICULTY {
                let problems: Vec<_> =
                    (0..20).filter_map(|index| data.eval_problem(*task, difficulty, index).unwrap()).collect();
                assert_eq!(problems.len(), 20, "{} {difficulty}", task.name());
                assert_eq!(Some(&problems[3]), data.eval_problem(*task, difficulty, 3).unwrap().as_ref());
                assert!(problems.iter().all(is_held_out));
                let distinct: HashSet<_> = problems.iter().map(|problem| &problem.key).collect();
                assert!(
                    distinct.len() >= if difficulty == 1 { 2 } else { 4 },
                    "{} {difficulty}: {}",
                    task.name(),
                    distinct.len()
                );
                questions.extend(problems.into_iter().map(|problem| problem.question));
            }
        }
        assert_eq!(data.overlap(questions.iter().map(String::as_str), 20_000), 0);
        // The count does count.
        let known = data.config().conversation(5).unwrap();
        let asked = known.iter().find(|message| message.0 == Role::User).unwrap();
        assert_eq!(data.overlap([asked.1.as_str()].into_iter(), 10), 1);
        assert!(data.eval_problem(tasks::all()[0], 0, 0).is_err());
        assert!(data.eval_problem(tasks::all()[0], 11, 0).is_err());
    }

    #[test]
    fn mixture_is_kept() {
        let mut config = DataConfig { small_talk: 0.0, two_turns: 0.0, system: 0.0, ..DataConfig::default() };
        config.tasks = BTreeMap::from([("boolean".to_string(), 3.0), ("brackets".to_string(), 1.0)]);
        let boolean = (0..800)
            .filter(|&index| {
                let messages = config.conversation(index).unwrap();
                assert_eq!(messages.len(), 2);
                messages[1].1.contains("true") || messages[1].1.contains("false")
            })
            .count();
        assert!((540..660).contains(&boolean), "{boolean}");
    }

    #[test]
    fn bad_mixtures_are_named() {
        let wrong = |change: &dyn Fn(&mut DataConfig)| {
            let mut config = DataConfig::default();
            change(&mut config);
            config.conversation(0).unwrap_err().to_string()
        };
        assert!(wrong(&|config| config.tasks.extend([("sums".to_string(), 1.0)])).contains("\"sums\""));
        assert!(wrong(&|config| config.difficulties = [0.0; 10]).contains("difficulties"));
        assert!(wrong(&|config| config.tasks.extend([("boolean".to_string(), f64::NAN)])).contains("tasks"));
        assert!(wrong(&|config| config.system = 1.5).contains("system"));
    }

    /// The figures behind the mixture: mean and 95th percentile of tokens, per task and difficulty. Run with
    /// `--ignored --nocapture` to see them; the limit holds in any case.
    #[test]
    fn conversations_are_short() {
        let config = DataConfig::default();
        let tokenizer = tokenizer::train(&config, 20_000, 1280).unwrap();
        let data = Data::new(config, tokenizer).unwrap();
        let lengths = |count: u64, of: &dyn Fn(u64) -> Example| {
            let mut lengths: Vec<_> = (0..count).map(|index| of(index).ids.len()).collect();
            lengths.sort_unstable();
            (lengths.iter().sum::<usize>() as f64 / count as f64, lengths[count as usize * 95 / 100])
        };
        for task in tasks::all() {
            let mut line = format!("{:<14}", task.name());
            for difficulty in [1, 2, 3, 4, 5, 7, 10] {
                let (mean, most) = lengths(200, &|index| {
                    let problem = task.generate(1, index, difficulty);
                    let reply = problem.reply();
                    data.tokens_of(&[(Role::User, problem.question), (Role::Assistant, reply)]).unwrap()
                });
                line += &format!(" {difficulty}: {mean:5.1} / {most:<4}");
                assert!(difficulty != 5 || mean < 200.0, "{} is too long: {mean}", task.name());
            }
            println!("{line}");
        }
        let (mean, most) = lengths(5000, &|index| data.example(index).unwrap());
        println!("training mix   mean {mean:.1}, 95 % {most}");
        assert!(mean < 110.0, "{mean}");
    }
}
