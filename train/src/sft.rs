//! Supervised fine-tuning's examples: a file of conversations, in a new order each epoch.
//!
//! Different here: example `index` is known from the seed and the index alone (epoch and place follow from it), so a
//! resumed run reads on where it stopped, and no order has to be kept.

use std::path::Path;
use std::sync::Mutex;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use crate::conversation::render;
use crate::data::{DataError, Example, Source, tokens_of};
use crate::jsonl::{self, JsonlError, Numbered};
use crate::tasks::{Draw, text_hash};
use crate::tokenizer::TokenizerError;

/// What a fine-tuning run learns from; kept in its checkpoints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftSource {
    /// The directory of the model that it began from.
    pub model: String,
    /// [`Conversations::hash`].
    pub hash: u64,
    /// How many conversations there are.
    pub conversations: u64,
    /// How often each is read; `None` where the steps end the run.
    pub epochs: Option<u64>,
}

/// Why a set of conversations cannot be trained on.
#[derive(Debug, thiserror::Error)]
pub enum SftError {
    /// The file is not as it should be.
    #[error(transparent)]
    Jsonl(#[from] JsonlError),
    /// A conversation could not be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A conversation is too long for the model, or has ids that it lacks.
    #[error("{path}: line {line}: {reason}")]
    Unfit {
        /// The file.
        path: String,
        /// The line, from 1.
        line: usize,
        /// What does not fit.
        reason: String,
    },
}

/// What the model takes.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// `max_position_embeddings`.
    pub tokens: usize,
    /// `vocab_size`.
    pub vocab: usize,
}

/// A file of conversations in tokens.
pub struct Conversations {
    examples: Vec<Example>,
    hash: u64,
    seed: u64,
    epochs: Option<u64>,
    /// The epoch asked for last, and its order.
    order: Mutex<(u64, Vec<usize>)>,
}

impl Conversations {
    /// Reads and encodes a file. `seed` decides the order, `epochs` how often it is read.
    ///
    /// # Errors
    /// The first line that cannot be trained on, with its number.
    pub fn open(
        path: &Path,
        tokenizer: &Tokenizer,
        limits: Limits,
        seed: u64,
        epochs: Option<u64>,
    ) -> Result<Self, SftError> {
        let read = jsonl::read(path)?;
        let rendered: String = read.par_iter().map(|c| render(&c.messages) + "\0").collect();
        let encode = |conversation: &Numbered| -> Result<Example, SftError> {
            let example = tokens_of(tokenizer, &conversation.messages)?;
            match unfit(&example, limits) {
                None => Ok(example),
                Some(reason) => {
                    Err(SftError::Unfit { path: path.display().to_string(), line: conversation.line, reason })
                }
            }
        };
        // In two steps, so that of several bad lines it is always the first that is told.
        let examples: Vec<Result<Example, SftError>> = read.par_iter().map(encode).collect();
        let examples = examples.into_iter().collect::<Result<Vec<_>, _>>()?;
        let order = Mutex::new((u64::MAX, Vec::new()));
        Ok(Self { examples, hash: text_hash(&rendered), seed, epochs, order })
    }

    /// A hash of what is said in all conversations, in their order.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.examples.len() as u64
    }

    /// Whether there are none; never so in a set that was opened.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// The examples in the file's order.
    pub fn into_examples(self) -> Vec<Example> {
        self.examples
    }

    /// The example number `index`, where epochs follow each other.
    fn at(&self, index: u64) -> &Example {
        let (epoch, place) = (index / self.len(), index % self.len());
        let mut order = self.order.lock().unwrap_or_else(|e| e.into_inner());
        if order.0 != epoch {
            let mut new: Vec<usize> = (0..self.examples.len()).collect();
            Draw::new(self.seed, epoch, "sft").shuffle(&mut new);
            *order = (epoch, new);
        }
        &self.examples[order.1[place as usize]]
    }

    /// Tokens of the examples from number `from` to the end of the last epoch; none where the epochs never end.
    pub fn lengths(&self, from: u64) -> impl Iterator<Item = usize> {
        (from..self.limit().unwrap_or(from)).map(|index| self.at(index).ids.len())
    }
}

impl Source for Conversations {
    fn example(&self, index: u64) -> Result<Example, DataError> {
        Ok(self.at(index).clone())
    }

    fn limit(&self) -> Option<u64> {
        self.epochs.map(|epochs| epochs.saturating_mul(self.len()))
    }
}

fn unfit(example: &Example, limits: Limits) -> Option<String> {
    if example.ids.len() > limits.tokens {
        let (found, most) = (example.ids.len(), limits.tokens);
        return Some(format!("{found} tokens, but the model's max_position_embeddings is {most}; make it shorter"));
    }
    let id = example.ids.iter().find(|&&id| id as usize >= limits.vocab)?;
    Some(format!(
        "token id {id} is not below the model's vocab_size {}; the tokenizer is another model's",
        limits.vocab
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Role;
    use crate::data::DataConfig;
    use crate::tokenizer;

    const LIMITS: Limits = Limits { tokens: 100, vocab: 400 };

    fn open(texts: &[&str], seed: u64, epochs: Option<u64>, limits: Limits) -> Result<Conversations, SftError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("set.jsonl");
        let line =
            |text: &&str| jsonl::line(&[(Role::User, "Say.".into()), (Role::Assistant, text.to_string())]).unwrap();
        std::fs::write(&path, texts.iter().map(line).collect::<String>()).unwrap();
        Conversations::open(&path, &tokenizer(), limits, seed, epochs)
    }

    fn tokenizer() -> Tokenizer {
        static MADE: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
        MADE.get_or_init(|| tokenizer::train(&DataConfig::default(), 500, 400).unwrap()).clone()
    }

    #[test]
    fn each_epoch_reads_everything_once_in_an_order_of_its_own() {
        let texts: Vec<String> = (0..20).map(|i| format!("number {i}")).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let set = open(&texts, 1, Some(3), LIMITS).unwrap();
        assert_eq!(set.limit(), Some(60));
        let read: Vec<Vec<u32>> = (0..60).map(|index| set.example(index).unwrap().ids).collect();
        let sorted = |ids: &[Vec<u32>]| {
            let mut ids = ids.to_vec();
            ids.sort();
            ids
        };
        assert_eq!(sorted(&read[..20]), sorted(&read[20..40]));
        assert_eq!(sorted(&read[..20]), sorted(&read[40..]));
        assert!(read[..20] != read[20..40] && read[20..40] != read[40..]);
        // Whatever was asked before.
        assert_eq!(set.example(41).unwrap().ids, read[41]);
        assert_eq!(set.example(3).unwrap().ids, read[3]);
        let other = open(&texts, 2, Some(3), LIMITS).unwrap();
        assert_ne!(other.example(0).unwrap().ids.as_slice(), read[0].as_slice());
        assert_eq!(set.lengths(58).collect::<Vec<_>>(), [read[58].len(), read[59].len()]);
        assert_eq!(set.hash(), other.hash());
        assert_ne!(set.hash(), open(&texts[1..], 1, None, LIMITS).unwrap().hash());
    }

    #[test]
    fn only_the_assistants_tokens_count() {
        let set = open(&["<think>\nHm\n</think>\n\nYes."], 1, None, LIMITS).unwrap();
        let example = set.example(0).unwrap();
        let learned: Vec<u32> =
            example.ids.iter().zip(&example.loss).filter(|(_, loss)| **loss).map(|(id, _)| *id).collect();
        let text = tokenizer().decode(&learned, false).unwrap();
        assert_eq!(text, "<think>\nHm\n</think>\n\nYes.<end_of_sentence>");
    }

    #[test]
    fn what_the_model_cannot_take_is_named_by_line() {
        let long = "long ".repeat(200);
        let told = open(&["a", &long], 1, None, LIMITS).err().unwrap().to_string();
        assert!(told.contains("set.jsonl: line 2: ") && told.contains("max_position_embeddings is 100"), "{told}");
        let told = open(&["a"], 1, None, Limits { vocab: 50, ..LIMITS }).err().unwrap().to_string();
        assert!(told.contains("line 1: token id") && told.contains("vocab_size 50"), "{told}");
    }
}
