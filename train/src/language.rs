//! A model's text side: how problems are asked, how responses are read and how they end.

use std::path::Path;

use m1_infer::generation_config::GenerationConfig;
use m1_infer::tokenizer::Tokenizer;

use crate::data::{Data, DataConfig, DataError};

/// The model's text side, and what may be drawn.
pub struct Language {
    /// Asks problems.
    pub data: Data,
    /// Reads responses.
    pub tokenizer: Tokenizer,
    /// Ids that end a response.
    pub end_ids: Vec<u32>,
}

/// Why a model's text side could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LanguageError {
    /// tokenizer.json and what goes with it.
    #[error(transparent)]
    Tokenizer(#[from] m1_infer::tokenizer::TokenizerError),
    /// generation_config.json.
    #[error(transparent)]
    Generation(#[from] m1_infer::generation_config::GenerationConfigError),
    /// The tokenizer as training reads it.
    #[error("{path}: {reason}")]
    Vocabulary {
        /// The file.
        path: String,
        /// What the tokenizers crate said.
        reason: String,
    },
    /// Nothing says how a response ends.
    #[error("{path}: no end-of-turn id in generation_config.json or tokenizer_config.json")]
    NoEnd {
        /// The directory.
        path: String,
    },
    /// The vocabulary lacks what a conversation is made of.
    #[error(transparent)]
    Data(#[from] DataError),
}

impl Language {
    /// That of a model directory in Hugging Face form.
    ///
    /// # Errors
    /// What is missing or wrong in it.
    pub fn open(model: &Path) -> Result<Self, LanguageError> {
        let tokenizer = Tokenizer::from_dir(model)?;
        let end_ids = GenerationConfig::read(model)?.unwrap_or_default().end_ids(&tokenizer);
        if end_ids.is_empty() {
            return Err(LanguageError::NoEnd { path: model.display().to_string() });
        }
        let path = model.join("tokenizer.json");
        let vocabulary = tokenizers::Tokenizer::from_file(&path)
            .map_err(|e| LanguageError::Vocabulary { path: path.display().to_string(), reason: e.to_string() })?;
        Ok(Self { data: Data::new(DataConfig::default(), vocabulary)?, tokenizer, end_ids })
    }
}
