//! Flags that several commands share.

use crate::assets::{Assets, LoadSettings};
use crate::hub::{self, HubError, Need};
use crate::sampler::SamplingOptions;
use m1_model::checkpoint::{Bits, Quantization, WeightDtype};
use m1_model::device::{DeviceChoice, OpenDevice};
use std::path::{Path, PathBuf};

/// Reads a number of a flag that takes no fractions and nothing below 0.
pub fn whole<T: std::str::FromStr>(text: &str) -> Result<T, &'static str> {
    text.parse().map_err(|_| "a whole number from 0 on is wanted")
}

/// Weights that share a scale, unless said otherwise.
pub const DEFAULT_BLOCK: usize = 32;

/// Reads a number of weights that share a scale.
pub fn block(text: &str) -> Result<usize, &'static str> {
    text.parse().ok().filter(|block| [32, 64].contains(block)).ok_or("32 or 64 is wanted")
}

/// Which model, where.
#[derive(Debug, Clone, clap::Args)]
pub struct ModelArgs {
    /// Checkpoint in Hugging Face form: its directory, or an id of the hub, owner/name[@revision]
    #[arg(long, short, value_name = "DIR|ID")]
    pub model: PathBuf,
    /// Whether the hub may be asked.
    #[command(flatten)]
    pub hub: HubArgs,
    /// Where, and in which form.
    #[command(flatten)]
    pub weights: WeightArgs,
}

/// Whether the hub may be asked.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct HubArgs {
    /// Take a Hugging Face id from the cache, and fetch nothing (also HF_HUB_OFFLINE=1)
    #[arg(long)]
    pub offline: bool,
}

impl HubArgs {
    /// The directory that `--model` names, with all that running it takes.
    pub fn directory(&self, model: &Path) -> Result<PathBuf, HubError> {
        hub::directory(model, Need::Weights, self.offline)
    }
}

/// Where a model runs, and what its weights are held in.
#[derive(Debug, Clone, clap::Args)]
pub struct WeightArgs {
    /// Where to run: auto (CUDA, then a GPU through wgpu, then the CPU), cuda[:N], wgpu[:N] or cpu
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Weights in memory that are not quantized: f32 or bf16 [default: as stored]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<WeightDtype>,
    /// Quantize the experts while loading, as `m1 quantize` would have written them: int8 or int4
    #[arg(long, value_name = "FORMAT")]
    pub quantize: Option<Bits>,
    /// With --quantize: attention, embedding and head too
    #[arg(long, requires = "quantize")]
    pub quantize_all: bool,
    /// With --quantize: weights that share a scale, 32 or 64 [default: 32]
    #[arg(long, value_name = "N", requires = "quantize", value_parser = block)]
    pub quantize_block: Option<usize>,
    /// Keys and values in memory: f32 or bf16 [default: f32 on the CPU, elsewhere as the weights]
    #[arg(long, value_name = "DTYPE")]
    pub kv_cache_dtype: Option<WeightDtype>,
    /// Rotated dimensions of a head, for a `minimax` checkpoint whose config does not tell
    #[arg(long, value_name = "N")]
    pub rotary_dim: Option<usize>,
}

impl WeightArgs {
    /// Finds the device and says which it is.
    pub fn open_device(&self) -> anyhow::Result<OpenDevice> {
        let device = self.device.open()?;
        note!("device: {}", device.name);
        Ok(device)
    }

    /// How to load, with the context limited to `context` tokens.
    pub fn settings(&self, context: Option<usize>) -> LoadSettings {
        let block = self.quantize_block.unwrap_or(DEFAULT_BLOCK);
        // `block` has refused what this would.
        let quantize = self.quantize.and_then(|bits| Quantization::new(bits, block, self.quantize_all).ok());
        LoadSettings {
            dtype: self.dtype,
            quantize,
            kv_dtype: self.kv_cache_dtype,
            rotary_dim: self.rotary_dim,
            context,
        }
    }
}

impl ModelArgs {
    /// Where the model is on this machine; fetched first, if it is the hub's and not in the cache.
    pub fn directory(&self) -> Result<PathBuf, HubError> {
        self.hub.directory(&self.model)
    }

    /// Loads model and tokenizer.
    pub fn load(&self, context: Option<usize>) -> anyhow::Result<Assets> {
        let dir = self.directory()?;
        let assets = Assets::load(&dir, &self.weights.open_device()?, &self.weights.settings(context))?;
        let dir = self.model.display();
        if assets.end_ids.is_empty() {
            note!("warning: {dir}: no eos_token_id and no eos_token says which id ends a turn: only limits end a text");
        }
        let trained = assets.engine.config().max_position_embeddings;
        if let Some(n) = context.filter(|&n| n > trained) {
            note!("warning: --context {n} is above the max_position_embeddings of {dir}, {trained}");
        }
        Ok(assets)
    }
}

/// How to sample; what is not given comes from generation_config.json.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SamplingArgs {
    /// Randomness; 0 takes the likeliest token [default: generation_config.json, else 1.0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Keep the likeliest tokens that make up this share [default: generation_config.json, else 0.95]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Keep the N likeliest tokens; 0 keeps all
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole::<usize>)]
    pub top_k: Option<usize>,
    /// Keep tokens at least X times as likely as the likeliest
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Above 1, tokens that came before become less likely
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// The same seed gives the same text
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = whole::<u64>)]
    pub seed: Option<u64>,
}

impl SamplingArgs {
    /// These settings over `defaults`, checked.
    pub fn over(&self, defaults: SamplingOptions) -> anyhow::Result<SamplingOptions> {
        let options = SamplingOptions {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            seed: self.seed.or(defaults.seed),
            ..defaults
        };
        options.validate()?;
        Ok(options)
    }

    /// Finds a setting outside its range before a model is loaded.
    pub fn check(&self) -> anyhow::Result<()> {
        self.over(SamplingOptions::default()).map(drop)
    }
}
