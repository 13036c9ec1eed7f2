//! What `m1 bench` measures: a checkpoint, or random weights of a configuration.

use crate::assets::{LoadSettings, load_model, random_model};
use crate::cli::common::{HubArgs, WeightArgs};
use crate::hub;
use anyhow::{Context, bail, ensure};
use m1_model::checkpoint::{CONFIG, Directory};
use m1_model::device::OpenDevice;
use m1_model::{AttentionKind, M1, ModelConfig};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Ids of a model with less than all its layers: embedding and head then weigh little beside a layer.
const VOCAB: usize = 1024;

/// Which layers of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layers {
    /// So many, from the first on.
    First(usize),
    /// One of each.
    Kinds(Vec<AttentionKind>),
}

impl FromStr for Layers {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let kind = |name: &str| match name.trim() {
            "lightning" => Ok(AttentionKind::Lightning),
            "softmax" => Ok(AttentionKind::Softmax),
            _ => Err("a number from 1 on is wanted, or lightning and softmax with commas between them"),
        };
        match text.parse() {
            Ok(n) if n > 0 => Ok(Self::First(n)),
            _ => text.split(',').map(kind).collect::<Result<_, _>>().map(Self::Kinds),
        }
    }
}

/// See the module.
pub enum Subject {
    Stored { name: String, directory: PathBuf },
    Random { name: String, config: Box<ModelConfig> },
}

impl Subject {
    /// From the command line. Of a checkpoint nothing is read yet, though it may have been fetched.
    pub fn new(
        model: Option<&Path>,
        hub: &HubArgs,
        random: Option<&Path>,
        layers: Option<&Layers>,
        weights: &WeightArgs,
    ) -> anyhow::Result<Self> {
        let Some(random) = random else {
            let model = model.context("--model or --random is wanted")?;
            return Ok(Self::Stored { name: hub::name(model), directory: hub.directory(model)? });
        };
        let (name, config) = find(random, weights.rotary_dim)?;
        let Some(layers) = layers else {
            return Ok(Self::Random { name: format!("{name}, random"), config: Box::new(config) });
        };
        let kinds = match layers {
            Layers::Kinds(kinds) => kinds.clone(),
            Layers::First(n) => {
                let all = config.num_hidden_layers;
                ensure!(*n <= all, "--layers {n}: {} has {all}", random.display());
                (0..*n).map(|layer| config.kind(layer)).collect()
            }
        };
        let mut config = config.with_layers(&kinds)?;
        config.vocab_size = config.vocab_size.min(VOCAB);
        let of = |kind| (config.layers_of(kind), kind);
        let counts = [of(AttentionKind::Lightning), of(AttentionKind::Softmax)];
        let counts: Vec<String> = counts
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, kind)| format!("{count} {}", format!("{kind:?}").to_lowercase()))
            .collect();
        Ok(Self::Random { name: format!("{name}, random, {}", counts.join(" + ")), config: Box::new(config) })
    }

    /// Weights on their device.
    pub fn load(&self, device: &OpenDevice, settings: &LoadSettings) -> anyhow::Result<M1> {
        Ok(match self {
            Self::Stored { directory, .. } => load_model(directory, device, settings)?,
            Self::Random { config, .. } => random_model(config, device, settings)?,
        })
    }

    /// What the table calls it.
    pub fn name(&self) -> String {
        match self {
            Self::Stored { name, .. } | Self::Random { name, .. } => name.clone(),
        }
    }

    /// Whether its weights say nothing.
    pub fn is_random(&self) -> bool {
        matches!(self, Self::Random { .. })
    }
}

/// The configuration that is meant, and its name: a preset's stands above a file's.
fn find(random: &Path, rotary_dim: Option<usize>) -> anyhow::Result<(String, ModelConfig)> {
    let preset = random.to_str().and_then(|name| Some((name.to_string(), ModelConfig::preset(name)?)));
    if let Some(preset) = preset {
        return Ok(preset);
    }
    let directory = match random.file_name() {
        Some(name) if name == CONFIG => random.parent().map(|p| if p == Path::new("") { Path::new(".") } else { p }),
        _ => None,
    };
    let directory = directory.unwrap_or(random);
    if directory.is_dir() {
        // As a checkpoint's: Hugging Face's own form too, and without a word on how its files are quantized.
        return Ok((hub::name(directory), Directory::open(directory, rotary_dim)?.config().clone()));
    }
    if random.is_file() {
        return Ok((hub::name(random), ModelConfig::from_file(random)?));
    }
    bail!("--random {}: expected nano, small, base, a config.json or a directory with one", random.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_by_number_or_kind() {
        use AttentionKind::{Lightning, Softmax};
        assert_eq!("3".parse(), Ok(Layers::First(3)));
        assert_eq!("lightning".parse(), Ok(Layers::Kinds(vec![Lightning])));
        assert_eq!("lightning, softmax".parse(), Ok(Layers::Kinds(vec![Lightning, Softmax])));
        for wrong in ["", "0", "-1", "linear", "lightning,", "1,2"] {
            assert!(Layers::from_str(wrong).is_err(), "{wrong}");
        }
    }
}
