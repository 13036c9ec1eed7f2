//! Which matrices of a checkpoint are stored in blocks of small integers, and how: the `quantization_config` of a
//! `config.json`.
//!
//! ```json
//! "quantization_config": {
//!   "quant_method": "m1-blocks", "bits": 4, "block_size": 32,
//!   "modules": { "experts": 4, "attention": 4, "embed_tokens": 8, "lm_head": 8 }
//! }
//! ```
//! A block is `block_size` weights of one row that lie side by side; each has a scale of its own (of either sign) and no zero point. Beside
//! `NAME.weight` (`I8 [out, in]`, or `U8 [out, in / 2]` with two weights a byte, the earlier one in the low half, both
//! biased by 8) stands `NAME.weight_scale` (`F16 [out, in / block_size]`). Norms and routers are never quantized.

use m1_kernels::base::packed::Format;
use serde_json::{Map, Value, json};

use super::names::Role;
use crate::config::{ConfigError, ModelConfig, invalid};

/// The key in `config.json`.
pub const KEY: &str = "quantization_config";

const METHOD: &str = "m1-blocks";

/// How many bits a weight takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bits {
    /// 4: -8 to 7.
    Int4,
    /// 8: -127 to 127.
    Int8,
}

impl Bits {
    /// 4 or 8.
    pub fn count(self) -> usize {
        match self {
            Self::Int4 => 4,
            Self::Int8 => 8,
        }
    }
}

impl std::str::FromStr for Bits {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "int8" => Ok(Self::Int8),
            "int4" => Ok(Self::Int4),
            other => Err(format!("`{other}` is not a quantized format: expected int8 or int4")),
        }
    }
}

impl std::fmt::Display for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "int{}", self.count())
    }
}

/// How one matrix is stored: integers of so many bits, a scale for every block along a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Of one weight.
    pub bits: Bits,
    /// Weights of one block.
    pub block: usize,
}

impl Blocks {
    /// The operations' name for it.
    pub fn format(self) -> Format {
        match self.bits {
            Bits::Int8 => Format::Int8 { block: self.block },
            Bits::Int4 => Format::Int4 { block: self.block },
        }
    }

    /// Bytes of the integers of `weights` weights, and of their scales.
    pub fn bytes(self, weights: u128) -> [u128; 2] {
        [weights * self.bits.count() as u128 / 8, weights / self.block as u128 * 2]
    }
}

/// Which kinds of matrix are quantized. See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantization {
    /// Weights of one block, in every matrix: 32 or 64.
    pub block: usize,
    /// All experts of all layers.
    pub experts: Bits,
    /// The attention matrices of all layers.
    pub attention: Option<Bits>,
    /// The embedding.
    pub embed_tokens: Option<Bits>,
    /// The head.
    pub lm_head: Option<Bits>,
}

impl Quantization {
    /// The experts alone or, with `all`, every matrix but the routers. Embedding and head then take 8 bits at least.
    ///
    /// # Errors
    /// If `block` is neither 32 nor 64; says so.
    pub fn new(bits: Bits, block: usize, all: bool) -> Result<Self, String> {
        if !BLOCKS.contains(&block) {
            return Err(format!("blocks of {block} weights: expected 32 or 64"));
        }
        let ends = all.then_some(Bits::Int8);
        Ok(Self { block, experts: bits, attention: all.then_some(bits), embed_tokens: ends, lm_head: ends })
    }

    /// How matrices of this role are stored; `None`: as numbers.
    pub fn of(&self, role: Role) -> Option<Blocks> {
        let bits = match role {
            Role::Expert => Some(self.experts),
            Role::Attention => self.attention,
            Role::Embedding => self.embed_tokens,
            Role::Head => self.lm_head,
            Role::Norm | Role::Router => None,
        };
        bits.map(|bits| Blocks { bits, block: self.block })
    }

    /// A width of this model, by its key, that blocks of this size do not divide.
    pub fn undivided(&self, config: &ModelConfig) -> Option<(&'static str, usize)> {
        let mut widths = vec![("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)];
        if self.attention.is_some() {
            widths.push(("num_attention_heads · head_dim", config.inner_size()));
        }
        widths.into_iter().find(|(_, width)| !width.is_multiple_of(self.block))
    }

    /// The value of `quantization_config`.
    pub fn to_json(&self) -> Value {
        let mut modules = Map::new();
        let all = [Some(self.experts), self.attention, self.embed_tokens, self.lm_head];
        for (key, bits) in MODULES.into_iter().zip(all) {
            if let Some(bits) = bits {
                modules.insert(key.into(), bits.count().into());
            }
        }
        json!({
            "quant_method": METHOD, "bits": self.experts.count(), "block_size": self.block, "modules": modules,
        })
    }

    /// Reads the value of `quantization_config` and holds it against the model's sizes.
    pub fn from_json(value: &Value, config: &ModelConfig) -> Result<Self, ConfigError> {
        let wrong = |key: &str, found: &Value, expected: &str| {
            let key = if key.is_empty() { KEY.to_string() } else { format!("{KEY}.{key}") };
            let found: String = found.to_string().chars().take(60).collect();
            invalid(&key, found, expected)
        };
        let keys = value.as_object().ok_or_else(|| wrong("", value, "null or what `m1 quantize` writes"))?;
        let get = |key: &str| keys.get(key).unwrap_or(&Value::Null);
        if get("quant_method") != METHOD {
            let expected = "null, or \"m1-blocks\" with the rest of what `m1 quantize` writes";
            return Err(wrong("quant_method", get("quant_method"), expected));
        }
        if let Some(key) = keys.keys().find(|key| !KEYS.contains(&key.as_str())) {
            return Err(wrong(key, get(key), "no such key"));
        }
        let bits = |key: &str, value: &Value| match value.as_u64() {
            Some(4) => Ok(Bits::Int4),
            Some(8) => Ok(Bits::Int8),
            _ => Err(wrong(key, value, "4 or 8")),
        };
        let block = match get("block_size").as_u64().map(|block| block as usize) {
            Some(block) if BLOCKS.contains(&block) => block,
            _ => return Err(wrong("block_size", get("block_size"), "32 or 64")),
        };
        let modules = get("modules").as_object().ok_or_else(|| wrong("modules", get("modules"), "an object"))?;
        if let Some(key) = modules.keys().find(|key| !MODULES.contains(&key.as_str())) {
            return Err(wrong(&format!("modules.{key}"), &modules[key], "experts, attention, embed_tokens or lm_head"));
        }
        let part = |key: &str| modules.get(key).map(|value| bits(&format!("modules.{key}"), value)).transpose();
        let Some(experts) = part("experts")? else {
            return Err(wrong("modules.experts", &Value::Null, "4 or 8"));
        };
        if bits("bits", get("bits"))? != experts {
            return Err(wrong("bits", get("bits"), &format!("the experts' {}", experts.count())));
        }
        let [attention, embed_tokens, lm_head] = [part("attention")?, part("embed_tokens")?, part("lm_head")?];
        let found = Self { block, experts, attention, embed_tokens, lm_head };
        match found.undivided(config) {
            None => Ok(found),
            Some((key, width)) => Err(wrong("block_size", get("block_size"), &format!("a divisor of {key} = {width}"))),
        }
    }
}

const BLOCKS: [usize; 2] = [32, 64];
const KEYS: [&str; 4] = ["quant_method", "bits", "block_size", "modules"];
const MODULES: [&str; 4] = ["experts", "attention", "embed_tokens", "lm_head"];

/// The name of a quantized matrix's scales.
pub fn scales_of(name: &str) -> String {
    format!("{name}_scale")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nano() -> ModelConfig {
        ModelConfig::preset("nano").unwrap()
    }

    #[test]
    fn comes_back_from_json() {
        for bits in [Bits::Int4, Bits::Int8] {
            for (block, all) in [(32, false), (64, true)] {
                let made = Quantization::new(bits, block, all).unwrap();
                assert_eq!(Quantization::from_json(&made.to_json(), &nano()).unwrap(), made);
                assert_eq!(made.of(Role::Expert), Some(Blocks { bits, block }));
                assert_eq!(made.of(Role::Head), all.then_some(Blocks { bits: Bits::Int8, block }));
                assert_eq!((made.of(Role::Norm), made.of(Role::Router)), (None, None));
            }
        }
        assert!(Quantization::new(Bits::Int8, 48, false).unwrap_err().contains("expected 32 or 64"));
    }

    #[test]
    fn what_loading_would_not_honour_is_refused_by_name() {
        let sound = Quantization::new(Bits::Int4, 32, true).unwrap().to_json();
        for (pointer, value, expected) in [
            (
                "/quant_method",
                json!("awq"),
                "quantization_config.quant_method` is \"awq\": expected null, or \"m1-blocks\"",
            ),
            ("/bits", json!(8), "quantization_config.bits` is 8: expected the experts' 4"),
            ("/bits", json!(3), "expected 4 or 8"),
            ("/block_size", json!(128), "quantization_config.block_size` is 128: expected 32 or 64"),
            ("/modules", json!(["experts"]), "expected an object"),
            ("/modules/experts", json!("int4"), "quantization_config.modules.experts` is \"int4\": expected 4 or 8"),
            ("/modules/lm_head", json!(2), "expected 4 or 8"),
        ] {
            let mut value_of = sound.clone();
            *value_of.pointer_mut(pointer).unwrap() = value;
            let said = Quantization::from_json(&value_of, &nano()).unwrap_err().to_string();
            assert!(said.contains(expected) && !said.contains('\n'), "{said}");
        }
        let mut extra = sound.clone();
        extra["zero_point"] = json!(true);
        assert!(Quantization::from_json(&extra, &nano()).unwrap_err().to_string().contains("zero_point"));
        extra = sound.clone();
        extra["modules"]["norms"] = json!(8);
        assert!(Quantization::from_json(&extra, &nano()).unwrap_err().to_string().contains("modules.norms"));
        extra = sound;
        extra["modules"].as_object_mut().unwrap().remove("experts");
        assert!(Quantization::from_json(&extra, &nano()).unwrap_err().to_string().contains("modules.experts` is null"));
    }

    #[test]
    fn blocks_must_divide_every_width() {
        let mut config = nano();
        config.intermediate_size = 96;
        let of = |block| Quantization::new(Bits::Int8, block, false).unwrap();
        assert_eq!(of(32).undivided(&config), None);
        assert_eq!(of(64).undivided(&config), Some(("intermediate_size", 96)));
        let said = Quantization::from_json(&of(64).to_json(), &config).unwrap_err().to_string();
        assert!(said.contains("block_size` is 64: expected a divisor of intermediate_size = 96"), "{said}");
    }
}
