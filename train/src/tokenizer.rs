//! The vocabulary of m1-nano: a byte-level BPE trained on its own conversations, with M1's special tokens.
//!
//! Byte-level, so any UTF-8 text goes through it and back. Its pieces are what small models need: a digit, a bracket or
//! other sign is always a token of its own, a word takes the one space before it along.

use crate::conversation::render;
use crate::data::{DataConfig, DataError};
use serde_json::json;
use std::path::Path;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

/// M1's chat template, as released in its tokenizer_config.json (MiniMax, Apache-2.0).
pub const CHAT_TEMPLATE: &str = include_str!("../assets/chat_template.jinja");

/// M1's markers, hidden when text is decoded for people.
pub(crate) const SPECIAL: [&str; 4] =
    ["<begin_of_document>", "<end_of_document>", "<beginning_of_sentence>", "<end_of_sentence>"];

/// Tags that are one token each and stay visible.
const TAGS: [&str; 4] = ["<think>", "</think>", "<tool_calls>", "</tool_calls>"];

/// A digit; line ends; a word with its space; any other sign; any other space.
const PIECES: &str = r"\p{N}|\n+| ?\p{L}+|[^\s\p{L}\p{N}]|\s";

/// What can go wrong with a tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The `tokenizers` crate says no.
    #[error("tokenizer: {0}")]
    Tokenizers(#[from] tokenizers::Error),
    /// A special token is not in the vocabulary.
    #[error(
        "tokenizer: the token {0} is missing; train it with `m1-train`, or use a tokenizer with MiniMax-M1's special tokens"
    )]
    Missing(String),
    /// Fewer entries than bytes and special tokens.
    #[error("tokenizer: a vocabulary of {0} is too small; at least 320 (256 bytes and 8 special tokens, rounded up)")]
    TooSmall(usize),
    /// A file cannot be written.
    #[error("{path}: {source}")]
    Write {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Trains a tokenizer of at most `vocabulary` entries on the first `conversations` of the data. The same data gives the
/// same tokenizer to the byte.
///
/// # Errors
/// What is wrong with the configuration, or a vocabulary below 320.
pub fn train(config: &DataConfig, conversations: u64, vocabulary: usize) -> Result<Tokenizer, DataError> {
    if vocabulary < 320 {
        return Err(TokenizerError::TooSmall(vocabulary).into());
    }
    let texts = (0..conversations)
        .map(|index| config.conversation(index).map(|messages| render(&messages)))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(train_on(texts, vocabulary)?)
}

fn train_on(texts: Vec<String>, vocabulary: usize) -> Result<Tokenizer, TokenizerError> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    let split = Split::new(SplitPattern::Regex(PIECES.into()), SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, false, false);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
    tokenizer.with_decoder(Some(bytes));
    // Added before training, the markers would come first; they come last, as M1 has them. But they must not be
    // learned from: the texts are cut at them.
    let mut trainer = TrainerWrapper::from(
        BpeTrainerBuilder::new()
            .vocab_size(vocabulary - SPECIAL.len() - TAGS.len())
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build(),
    );
    let markers: Vec<&str> = SPECIAL.into_iter().chain(TAGS).collect();
    let plain = texts.into_iter().map(|mut text| {
        for marker in &markers {
            text = text.replace(marker, "\n");
        }
        text
    });
    tokenizer.train(&mut trainer, plain)?;
    tokenizer.add_special_tokens(&SPECIAL.map(|text| AddedToken::from(text, true)));
    tokenizer.add_tokens(&TAGS.map(|text| AddedToken::from(text, false)));
    Ok(tokenizer)
}

/// The ids of a text; special tokens in it are recognised, none is added.
///
/// # Errors
/// The `tokenizers` crate's.
pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, TokenizerError> {
    Ok(tokenizer.encode_fast(text, false)?.get_ids().to_vec())
}

/// The id of a special token.
///
/// # Errors
/// The vocabulary lacks it.
pub fn special_id(tokenizer: &Tokenizer, token: &str) -> Result<u32, TokenizerError> {
    tokenizer.token_to_id(token).ok_or_else(|| TokenizerError::Missing(token.to_string()))
}

/// The `vocab_size` that a model of this tokenizer needs: its entries, rounded up to a multiple of 64.
pub fn vocab_size(tokenizer: &Tokenizer) -> usize {
    tokenizer.get_vocab_size(true).next_multiple_of(64)
}

/// Writes tokenizer.json, tokenizer_config.json and generation_config.json into a directory.
///
/// # Errors
/// A special token is missing, or a file cannot be written.
pub fn save(tokenizer: &Tokenizer, directory: &Path) -> Result<(), TokenizerError> {
    let config = json!({
        "add_prefix_space": false,
        "bos_token": "<beginning_of_sentence>",
        "clean_up_tokenization_spaces": false,
        "eos_token": "<end_of_sentence>",
        "model_max_length": 40_960_000,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<end_of_document>",
        "chat_template": CHAT_TEMPLATE,
    });
    let generation = json!({
        "bos_token_id": special_id(tokenizer, "<beginning_of_sentence>")?,
        "do_sample": true,
        "eos_token_id": special_id(tokenizer, "<end_of_sentence>")?,
        "temperature": 1.0,
        "top_p": 0.95,
    });
    write(&directory.join("tokenizer.json"), &tokenizer.to_string(true)?)?;
    write(&directory.join("tokenizer_config.json"), &format!("{config:#}\n"))?;
    write(&directory.join("generation_config.json"), &format!("{generation:#}\n"))
}

fn write(path: &Path, text: &str) -> Result<(), TokenizerError> {
    m1_infer::files::write(path, text.as_bytes())
        .map_err(|source| TokenizerError::Write { path: path.display().to_string(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Tokenizer {
        train(&DataConfig::default(), 2000, 640).unwrap()
    }

    #[test]
    fn any_text_goes_through_and_back() {
        let tokenizer = small();
        let every_char: String = (0..0x3000).filter_map(char::from_u32).collect();
        let texts = [
            "Hello",
            "  two  spaces\n\n\nand\tlines \r\n",
            "上海 ünï 🙂🏽 e\u{301}",
            "0.5<think>\n</think>",
            &every_char,
            "",
        ];
        for text in texts {
            let ids = encode(&tokenizer, text).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            assert!(ids.iter().all(|&id| (id as usize) < vocab_size(&tokenizer)));
        }
    }

    #[test]
    fn digits_brackets_and_markers_stand_alone() {
        let tokenizer = small();
        let tokens = |text: &str| tokenizer.encode(text, false).unwrap().get_tokens().to_vec();
        assert_eq!(tokens("4711"), ["4", "7", "1", "1"]);
        assert_eq!(tokens("([{}])"), ["(", "[", "{", "}", "]", ")"]);
        assert_eq!(tokens("- r0 r1"), ["-", "Ġr", "0", "Ġr", "1"]);
        assert_eq!(tokens("<think>\n</think>\n\n"), ["<think>", "Ċ", "</think>", "ĊĊ"]);
        assert_eq!(tokens("x<end_of_sentence>\n"), ["x", "<end_of_sentence>", "Ċ"]);
        // Hidden from people, but not the tags.
        let ids = encode(&tokenizer, "<think>hi</think><end_of_sentence>").unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "<think>hi</think>");
    }

    #[test]
    fn training_again_gives_the_same_bytes() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        save(&small(), first.path()).unwrap();
        save(&small(), second.path()).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            let read = |directory: &Path| std::fs::read_to_string(directory.join(name)).unwrap();
            assert_eq!(read(first.path()), read(second.path()));
        }
        let again = Tokenizer::from_file(first.path().join("tokenizer.json")).unwrap();
        let text = "What is 47+58?";
        assert_eq!(encode(&again, text).unwrap(), encode(&small(), text).unwrap());
        let config: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(first.path().join("generation_config.json")).unwrap())
                .unwrap();
        assert_eq!(config["eos_token_id"], special_id(&again, "<end_of_sentence>").unwrap());
        assert_eq!(config["top_p"], 0.95);
    }

    #[test]
    fn small_vocabularies_are_refused() {
        assert!(train(&DataConfig::default(), 10, 100).unwrap_err().to_string().contains("100"));
        let bare = Tokenizer::new(BPE::default());
        assert!(special_id(&bare, "<end_of_sentence>").unwrap_err().to_string().contains("<end_of_sentence>"));
    }
}
