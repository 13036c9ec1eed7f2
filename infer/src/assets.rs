//! A checkpoint made ready for text: engine, tokenizer and generation defaults that belong together.

use crate::engine::Engine;
use crate::generation_config::{self, GenerationConfig, GenerationConfigError};
use crate::sampler::{Sampler, SamplerError, SamplingOptions};
use crate::tokenizer::{Tokenizer, TokenizerError};
use m1_model::ModelConfig;
use m1_model::checkpoint::{self, CheckpointError, Quantization, WeightDtype};
use m1_model::device::OpenDevice;
use std::path::Path;
use std::sync::Arc;

/// How to load.
#[derive(Debug, Clone, Default)]
pub struct LoadSettings {
    /// Weights in memory that are not quantized; `None`: as stored.
    pub dtype: Option<WeightDtype>,
    /// Quantize while loading.
    pub quantize: Option<Quantization>,
    /// What keys and values are kept in; `None`: see [`checkpoint::LoadOptions::kv_dtype`].
    pub kv_dtype: Option<WeightDtype>,
    /// `rotary_dim` for a `minimax` checkpoint whose config does not tell.
    pub rotary_dim: Option<usize>,
    /// The most tokens of a sequence; `None`: the model's `max_position_embeddings`.
    pub context: Option<usize>,
}

/// Why a checkpoint can't be used for text.
#[derive(Debug, thiserror::Error)]
pub enum AssetsError {
    /// No such directory.
    #[error("{0}: no such directory (--model takes the directory of a checkpoint, with config.json in it)")]
    NotADirectory(String),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The generation defaults.
    #[error(transparent)]
    Generation(#[from] GenerationConfigError),
    /// Configuration or weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Tokenizer and model are of different models.
    #[error(
        "{dir}: tokenizer.json has ids up to {largest}, and config.json's vocab_size is {vocab}: they do not belong together"
    )]
    Vocabulary {
        /// The checkpoint.
        dir: String,
        /// The tokenizer's largest id.
        largest: usize,
        /// The model's ids.
        vocab: usize,
    },
    /// An end id that the model does not have.
    #[error("{path}: eos_token_id is {id}, and must be an id of the vocabulary, from 0 to {}", vocab - 1)]
    EndId {
        /// The file.
        path: String,
        /// The id.
        id: u32,
        /// The model's ids.
        vocab: usize,
    },
}

/// All that a conversation needs of a checkpoint.
#[derive(Debug)]
pub struct Assets {
    /// The model.
    pub engine: Engine,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its sampling defaults.
    pub generation: GenerationConfig,
    /// The ids that end a turn.
    pub end_ids: Vec<u32>,
}

impl Assets {
    /// Loads the checkpoint in `dir` onto `device`. Text files are read first: a mistake there shows at once.
    pub fn load(dir: &Path, device: &OpenDevice, settings: &LoadSettings) -> Result<Self, AssetsError> {
        if !dir.is_dir() {
            return Err(AssetsError::NotADirectory(dir.display().to_string()));
        }
        let tokenizer = Tokenizer::from_dir(dir)?;
        let generation = GenerationConfig::read(dir)?.unwrap_or_default();
        let engine = Engine::new(load_model(dir, device, settings)?, settings.context);
        let config = engine.config();
        if tokenizer.size() > config.vocab_size {
            return Err(AssetsError::Vocabulary {
                dir: dir.display().to_string(),
                largest: tokenizer.size() - 1,
                vocab: config.vocab_size,
            });
        }
        let (mut file, mut end_ids) = (generation_config::FILE, generation.end_ids(&tokenizer));
        if end_ids.is_empty() {
            (file, end_ids) = ("config.json", config.eos_token_ids());
        }
        let vocab = config.vocab_size;
        if let Some(&id) = end_ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(AssetsError::EndId { path: dir.join(file).display().to_string(), id, vocab });
        }
        Ok(Self { engine, tokenizer: Arc::new(tokenizer), generation, end_ids })
    }

    /// A sampler that knows which ids exist.
    pub fn sampler(&self, options: SamplingOptions) -> Result<Sampler, SamplerError> {
        Sampler::new(options, Some(self.tokenizer.known(self.engine.config().vocab_size)))
    }
}

/// The model alone.
pub fn load_model(dir: &Path, device: &OpenDevice, settings: &LoadSettings) -> Result<m1_model::M1, CheckpointError> {
    checkpoint::load(dir, &device.device, &options(settings))
}

/// A model of random weights, the same ones every time.
pub fn random_model(
    config: &ModelConfig,
    device: &OpenDevice,
    settings: &LoadSettings,
) -> Result<m1_model::M1, CheckpointError> {
    checkpoint::random(config, 1, &device.device, &options(settings))
}

fn options(settings: &LoadSettings) -> checkpoint::LoadOptions {
    let LoadSettings { dtype, quantize, kv_dtype, rotary_dim, .. } = *settings;
    checkpoint::LoadOptions { dtype, quantize, kv_dtype, rotary_dim, progress: true, tensors: false }
}
