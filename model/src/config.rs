//! The model's configuration: MiniMax-M1's own `config.json`, key for key.
//!
//! Every key that the maths depends on is required, whatever MiniMax's configuration class would default it to: a
//! config that lacks one is refused by name. Keys that only other programs read are kept and written back.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::checkpoint::Quantization;

/// What is wrong with a configuration; each message names the key and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{}: cannot read the configuration: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A file's content is refused.
    #[error("{}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        error: Box<ConfigError>,
    },
    /// Not JSON, or not a JSON object.
    #[error("not a JSON object: {0}")]
    Json(String),
    /// A required key is absent.
    #[error("config key `{0}` is missing")]
    Missing(String),
    /// A key's value is of the wrong type, out of range, or asks for something that this model is not.
    #[error("config key `{key}` is {found}: expected {expected}")]
    Invalid {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What would be right.
        expected: String,
    },
}

/// The two kinds of attention layer, in the numbers of `attn_type_list`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionKind {
    /// `0`: lightning attention, a recurrent state.
    Lightning,
    /// `1`: softmax attention with grouped heads and RoPE, a key/value cache.
    Softmax,
}

/// The configuration of a MiniMax-M1 model; fields are named as in `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
pub struct ModelConfig {
    /// `minimax_m1` (what this crate writes).
    pub model_type: String,
    /// One entry a layer: 0 lightning, 1 softmax.
    pub attn_type_list: Vec<u8>,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads; also the heads of lightning attention.
    pub num_attention_heads: usize,
    /// Key/value heads of softmax attention.
    pub num_key_value_heads: usize,
    /// Width of a head; `num_attention_heads · head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Inner width of one expert.
    pub intermediate_size: usize,
    /// Experts of a layer.
    pub num_local_experts: usize,
    /// Experts that each token visits.
    pub num_experts_per_tok: usize,
    /// Epsilon of every RMS norm but lightning attention's own (which is 1e-6).
    pub rms_norm_eps: f64,
    /// RoPE base.
    pub rope_theta: f64,
    /// How many of a head's dimensions RoPE turns; the rest pass.
    pub rotary_dim: usize,
    /// The longest position that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the residual is the normed input (true for M1).
    pub postnorm: bool,
    /// Weight of the residual at softmax attention.
    pub layernorm_full_attention_alpha: f64,
    /// Weight of softmax attention's output.
    pub layernorm_full_attention_beta: f64,
    /// Weight of the residual at lightning attention.
    pub layernorm_linear_attention_alpha: f64,
    /// Weight of lightning attention's output.
    pub layernorm_linear_attention_beta: f64,
    /// Weight of the residual at the experts.
    pub layernorm_mlp_alpha: f64,
    /// Weight of the experts' output.
    pub layernorm_mlp_beta: f64,
    /// Weight of the router's auxiliary loss in training.
    pub router_aux_loss_coef: f64,
    /// Kept for MiniMax's own code; fresh weights here are scaled by the width of what they read ([`crate::layers`]).
    pub initializer_range: f64,
    /// Always `silu`.
    pub hidden_act: String,
    /// Always false: embedding and head are two tensors.
    pub tie_word_embeddings: bool,
    /// Always 0: M1 has no shared expert.
    pub shared_intermediate_size: usize,
    /// Every other key of the file, in its order; written back as it was.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl ModelConfig {
    /// Reads and validates a `config.json`.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let text =
            std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.to_path_buf(), error })?;
        Self::from_json(&text).map_err(|error| ConfigError::File { path: path.to_path_buf(), error: Box::new(error) })
    }

    /// Parses and validates the text of a `config.json` (`model_type` `minimax_m1`).
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let map: Map<String, Value> = serde_json::from_str(text).map_err(|e| ConfigError::Json(e.to_string()))?;
        Self::try_from(map)
    }

    /// The text of a `config.json` that MiniMax's own code reads.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers, strings and lists always serialize") + "\n"
    }

    /// The sizes `nano` (3.9 M parameters), `small` (229 M) and `base` (950 M); none for any other name.
    pub fn preset(name: &str) -> Option<Self> {
        let (hidden, layers, heads, head_dim, kv_heads, experts, ffn, vocab) = match name {
            "nano" => (128, 8, 4, 32, 2, 4, 256, 512),
            "small" => (512, 16, 8, 64, 2, 8, 1024, 8192),
            "base" => (1024, 16, 16, 64, 4, 8, 2048, 32000),
            _ => return None,
        };
        let alpha = (2.0 * layers as f64).powf(0.25);
        let extra = json!({
            "architectures": ["MiniMaxM1ForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_minimax_m1.MiniMaxM1Config",
                "AutoModelForCausalLM": "modeling_minimax_m1.MiniMaxM1ForCausalLM",
            },
            "bos_token_id": vocab - 2,
            "eos_token_id": vocab - 1,
            "attention_dropout": 0.0,
            "output_router_logits": false,
            "router_jitter_noise": 0.0,
            "shared_moe_mode": "sigmoid",
            "sliding_window": null,
            "use_cache": true,
        });
        let Value::Object(extra) = extra else { unreachable!("the literal above is an object") };
        Some(Self {
            model_type: MODEL_TYPE.into(),
            attn_type_list: (0..layers).map(|i| u8::from(i % 8 == 7)).collect(),
            vocab_size: vocab,
            hidden_size: hidden,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            intermediate_size: ffn,
            num_local_experts: experts,
            num_experts_per_tok: 2,
            rms_norm_eps: 1e-5,
            rope_theta: 1e7,
            rotary_dim: head_dim / 2,
            max_position_embeddings: 65536,
            postnorm: true,
            layernorm_full_attention_alpha: alpha,
            layernorm_full_attention_beta: 1.0,
            layernorm_linear_attention_alpha: alpha,
            layernorm_linear_attention_beta: 1.0,
            layernorm_mlp_alpha: alpha,
            layernorm_mlp_beta: 1.0,
            router_aux_loss_coef: 0.001,
            initializer_range: 0.02,
            hidden_act: "silu".into(),
            tie_word_embeddings: false,
            shared_intermediate_size: 0,
            extra,
        })
    }

    /// The same model with other layers: one of each of these kinds, in this order.
    ///
    /// # Errors
    /// As [`ModelConfig::validate`]: for no layers at all, or too many.
    pub fn with_layers(&self, kinds: &[AttentionKind]) -> Result<Self, ConfigError> {
        let number = |kind: &AttentionKind| u8::from(*kind == AttentionKind::Softmax);
        let attn_type_list = kinds.iter().map(number).collect();
        let config = Self { num_hidden_layers: kinds.len(), attn_type_list, ..self.clone() };
        config.validate()?;
        Ok(config)
    }

    /// The kind of attention in layer `layer` (below `num_hidden_layers`).
    pub fn kind(&self, layer: usize) -> AttentionKind {
        match self.attn_type_list[layer] {
            0 => AttentionKind::Lightning,
            _ => AttentionKind::Softmax,
        }
    }

    /// How many layers are of this kind.
    pub fn layers_of(&self, kind: AttentionKind) -> usize {
        (0..self.num_hidden_layers).filter(|&layer| self.kind(layer) == kind).count()
    }

    /// Width of all query heads together, `num_attention_heads · head_dim`.
    pub fn inner_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key heads together, `num_key_value_heads · head_dim`.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// The ids that end a text, from `eos_token_id` (an id, a list, or null as in the released M1: then none).
    pub fn eos_token_ids(&self) -> Vec<u32> {
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.extra.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
            Some(value) => id(value).into_iter().collect(),
            None => Vec::new(),
        }
    }

    /// Refuses what is absurd, and what this model does not compute rather than computing something else.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.model_type != MODEL_TYPE {
            return Err(invalid("model_type", &self.model_type, format!("\"{MODEL_TYPE}\"")));
        }
        for (key, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("num_local_experts", self.num_local_experts),
            ("num_experts_per_tok", self.num_experts_per_tok),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if size == 0 || size > MAX_SIZE {
                return Err(invalid(key, size, format!("1 to {MAX_SIZE}")));
            }
        }
        let layers = self.num_hidden_layers;
        if self.attn_type_list.len() != layers {
            let found = format!("a list of {}", self.attn_type_list.len());
            return Err(invalid(
                "attn_type_list",
                found,
                format!("one entry for each of num_hidden_layers = {layers}"),
            ));
        }
        if let Some((layer, kind)) = self.attn_type_list.iter().enumerate().find(|(_, kind)| **kind > 1) {
            let found = format!("{kind} at layer {layer}");
            return Err(invalid("attn_type_list", found, "0 (lightning) or 1 (softmax)"));
        }
        let heads = self.num_attention_heads;
        if !heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads = {heads}");
            return Err(invalid("num_key_value_heads", self.num_key_value_heads, expected));
        }
        if self.num_experts_per_tok > self.num_local_experts {
            let expected = format!("at most num_local_experts = {}", self.num_local_experts);
            return Err(invalid("num_experts_per_tok", self.num_experts_per_tok, expected));
        }
        if self.rotary_dim == 0 || self.rotary_dim % 2 == 1 || self.rotary_dim > self.head_dim {
            let expected = format!("an even number from 2 to head_dim = {}", self.head_dim);
            return Err(invalid("rotary_dim", self.rotary_dim, expected));
        }
        for (key, number) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            // In f32 too: that is what they are computed in.
            if !((number as f32) > 0.0 && (number as f32).is_finite()) {
                return Err(invalid(key, format!("{number:?}"), "a finite number above 0"));
            }
        }
        for (key, number) in [
            ("layernorm_full_attention_alpha", self.layernorm_full_attention_alpha),
            ("layernorm_full_attention_beta", self.layernorm_full_attention_beta),
            ("layernorm_linear_attention_alpha", self.layernorm_linear_attention_alpha),
            ("layernorm_linear_attention_beta", self.layernorm_linear_attention_beta),
            ("layernorm_mlp_alpha", self.layernorm_mlp_alpha),
            ("layernorm_mlp_beta", self.layernorm_mlp_beta),
        ] {
            if !(number as f32).is_finite() {
                return Err(invalid(key, format!("{number:?}"), "a finite number"));
            }
        }
        for (key, number) in
            [("router_aux_loss_coef", self.router_aux_loss_coef), ("initializer_range", self.initializer_range)]
        {
            if !(number >= 0.0 && (number as f32).is_finite()) {
                return Err(invalid(key, format!("{number:?}"), "a finite number, 0 or more"));
            }
        }
        self.validate_variant()?;
        self.validate_total()
    }

    /// Refuses switches of related models that change the maths.
    fn validate_variant(&self) -> Result<(), ConfigError> {
        if self.hidden_act != "silu" {
            return Err(invalid("hidden_act", &self.hidden_act, "\"silu\""));
        }
        if self.tie_word_embeddings {
            return Err(invalid("tie_word_embeddings", true, "false (embedding and head are two tensors)"));
        }
        if self.shared_intermediate_size != 0 {
            return Err(invalid("shared_intermediate_size", self.shared_intermediate_size, "0 (no shared expert)"));
        }
        for key in ["attention_bias", "qkv_bias", "mlp_bias", "use_bias", "bias", "use_qk_norm"] {
            expect_unset(&self.extra, key, |v| matches!(v, Value::Bool(false)), "false (M1 has none)")?;
        }
        for key in ["attention_dropout", "router_jitter_noise"] {
            expect_unset(&self.extra, key, |v| v.as_f64() == Some(0.0), "0 (not computed here)")?;
        }
        for key in ["sliding_window", "rope_scaling"] {
            expect_unset(&self.extra, key, |_| false, "null (not computed here)")?;
        }
        if let Some(value) = self.extra.get("quantization_config").filter(|value| !value.is_null()) {
            Quantization::from_json(value, self)?;
        }
        let is_id = |v: &Value| v.as_u64().is_some_and(|id| u32::try_from(id).is_ok());
        for key in ["bos_token_id", "eos_token_id"] {
            let fits = |v: &Value| is_id(v) || v.as_array().is_some_and(|ids| ids.iter().all(is_id));
            expect_unset(&self.extra, key, fits, "null, a token id or a list of token ids")?;
        }
        Ok(())
    }

    /// Refuses sizes whose products no machine could index.
    fn validate_total(&self) -> Result<(), ConfigError> {
        if self.num_hidden_layers * self.num_local_experts > MAX_EXPERTS {
            let expected = format!("at most {MAX_EXPERTS} experts in all layers together");
            return Err(invalid("num_local_experts", self.num_local_experts, expected));
        }
        let wide = |n: usize| n as u128;
        let hidden = wide(self.hidden_size);
        let inner = wide(self.num_attention_heads) * wide(self.head_dim);
        let experts = wide(self.num_local_experts) * (3 * wide(self.intermediate_size) + 1) * hidden;
        let state = inner * wide(self.head_dim);
        let layer = 5 * inner * hidden + experts + state;
        let total = 2 * wide(self.vocab_size) * hidden + wide(self.num_hidden_layers) * layer;
        if total > 1 << 50 {
            let key = if 2 * wide(self.vocab_size) * hidden > 1 << 49 {
                "vocab_size"
            } else if wide(self.num_hidden_layers) * experts > 1 << 48 {
                "intermediate_size"
            } else {
                "head_dim"
            };
            return Err(ConfigError::Invalid {
                key: key.into(),
                found: format!("too large with hidden_size = {hidden} and the other sizes ({total} parameters)"),
                expected: "at most 2^50 parameters in all".into(),
            });
        }
        Ok(())
    }
}

/// The `model_type` of MiniMax's own checkpoints.
pub const MODEL_TYPE: &str = "minimax_m1";

/// No size of a real model comes near; keeps every product of two in range.
const MAX_SIZE: usize = 1 << 31;

/// Each expert has names of its own, so their number is what makes lists of tensors long. M1 has 2,560.
const MAX_EXPERTS: usize = 1 << 20;

impl TryFrom<Map<String, Value>> for ModelConfig {
    type Error = ConfigError;

    fn try_from(mut keys: Map<String, Value>) -> Result<Self, ConfigError> {
        // The type first: of another model's config, the keys that it lacks are not the news.
        let model_type: String = take(&mut keys, "model_type")?;
        if model_type != MODEL_TYPE {
            return Err(invalid("model_type", model_type, format!("\"{MODEL_TYPE}\"")));
        }
        let k = &mut keys;
        let config = Self {
            model_type,
            attn_type_list: take(k, "attn_type_list")?,
            vocab_size: take(k, "vocab_size")?,
            hidden_size: take(k, "hidden_size")?,
            num_hidden_layers: take(k, "num_hidden_layers")?,
            num_attention_heads: take(k, "num_attention_heads")?,
            num_key_value_heads: take(k, "num_key_value_heads")?,
            head_dim: take(k, "head_dim")?,
            intermediate_size: take(k, "intermediate_size")?,
            num_local_experts: take(k, "num_local_experts")?,
            num_experts_per_tok: take(k, "num_experts_per_tok")?,
            rms_norm_eps: take(k, "rms_norm_eps")?,
            rope_theta: take(k, "rope_theta")?,
            rotary_dim: take(k, "rotary_dim")?,
            max_position_embeddings: take(k, "max_position_embeddings")?,
            postnorm: take(k, "postnorm")?,
            layernorm_full_attention_alpha: take(k, "layernorm_full_attention_alpha")?,
            layernorm_full_attention_beta: take(k, "layernorm_full_attention_beta")?,
            layernorm_linear_attention_alpha: take(k, "layernorm_linear_attention_alpha")?,
            layernorm_linear_attention_beta: take(k, "layernorm_linear_attention_beta")?,
            layernorm_mlp_alpha: take(k, "layernorm_mlp_alpha")?,
            layernorm_mlp_beta: take(k, "layernorm_mlp_beta")?,
            router_aux_loss_coef: take(k, "router_aux_loss_coef")?,
            initializer_range: take(k, "initializer_range")?,
            hidden_act: take(k, "hidden_act")?,
            tie_word_embeddings: take(k, "tie_word_embeddings")?,
            shared_intermediate_size: take(k, "shared_intermediate_size")?,
            extra: keys,
        };
        config.validate()?;
        Ok(config)
    }
}

/// Takes a required key out of `keys`, keeping the others' order.
pub(crate) fn take<T: DeserializeOwned>(keys: &mut Map<String, Value>, key: &str) -> Result<T, ConfigError> {
    let value = keys.shift_remove(key).ok_or_else(|| ConfigError::Missing(key.into()))?;
    let shown = short(&value);
    serde_json::from_value(value).map_err(|error| {
        // serde says "invalid type: string "x", expected usize"; the last part is the news.
        let said = error.to_string();
        let expected = said.rsplit_once("expected ").map_or(said.as_str(), |(_, expected)| expected);
        let expected = match expected {
            "usize" => "a whole number, 0 or more",
            "f64" => "a number",
            "u8" => "a list of 0 (lightning) and 1 (softmax)",
            "a boolean" => "true or false",
            other => other,
        };
        invalid(key, shown, expected)
    })
}

fn expect_unset(
    keys: &Map<String, Value>,
    key: &str,
    harmless: impl Fn(&Value) -> bool,
    expected: &str,
) -> Result<(), ConfigError> {
    match keys.get(key) {
        None | Some(Value::Null) => Ok(()),
        Some(value) if harmless(value) => Ok(()),
        Some(value) => Err(invalid(key, short(value), expected)),
    }
}

pub(crate) fn invalid(key: &str, found: impl ToString, expected: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { key: key.into(), found: found.to_string(), expected: expected.into() }
}

/// A value for an error message: one line, never long.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M1: &str = include_str!("../tests/data/config.json");

    /// What is said of M1's config with `key` set to `value` (or removed).
    fn refusal(key: &str, value: Option<Value>) -> String {
        let mut map: Map<String, Value> = serde_json::from_str(M1).unwrap();
        match value {
            Some(value) => map.insert(key.into(), value),
            None => map.remove(key),
        };
        ModelConfig::try_from(map).expect_err(key).to_string()
    }

    #[test]
    fn reads_the_released_config_and_writes_every_key_back() {
        let config = ModelConfig::from_json(M1).unwrap();
        assert_eq!((config.num_hidden_layers, config.hidden_size, config.inner_size()), (80, 6144, 8192));
        assert_eq!((config.layers_of(AttentionKind::Lightning), config.layers_of(AttentionKind::Softmax)), (70, 10));
        assert_eq!((config.kind(6), config.kind(7)), (AttentionKind::Lightning, AttentionKind::Softmax));
        assert_eq!(config.layernorm_mlp_alpha, 3.5565588200778455);
        assert!(config.eos_token_ids().is_empty());

        let written: Map<String, Value> = serde_json::from_str(&config.to_json()).unwrap();
        let released: Map<String, Value> = serde_json::from_str(M1).unwrap();
        assert_eq!(written.len(), released.len());
        for (key, value) in &released {
            // 10000000 comes back as 10000000.0
            let same = written[key] == *value || written[key].as_f64().is_some_and(|n| Some(n) == value.as_f64());
            assert!(same, "{key}: {value} became {}", written[key]);
        }
        assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn presets_are_valid_and_come_back() {
        for name in ["nano", "small", "base"] {
            let config = ModelConfig::preset(name).unwrap();
            assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config, "{name}");
            assert_eq!(config.eos_token_ids(), [config.vocab_size as u32 - 1]);
        }
        assert!(ModelConfig::preset("huge").is_none());
    }

    #[test]
    fn every_key_of_the_maths_is_required() {
        let ModelConfig { extra, .. } = ModelConfig::from_json(M1).unwrap();
        let all: Map<String, Value> = serde_json::from_str(M1).unwrap();
        let required: Vec<_> = all.keys().filter(|key| !extra.contains_key(*key)).collect();
        assert_eq!(required.len(), 27);
        for key in required {
            assert_eq!(refusal(key, None), format!("config key `{key}` is missing"));
        }
    }

    #[test]
    fn absurd_values_are_refused_by_name() {
        for (key, value, expected) in [
            ("model_type", json!("llama"), "\"minimax_m1\""),
            ("num_attention_heads", json!(0), "1 to"),
            ("num_attention_heads", json!(-64), "a whole number"),
            ("num_attention_heads", json!(64.5), "a whole number"),
            ("hidden_size", json!("6144"), "a whole number"),
            ("hidden_size", json!(null), "a whole number"),
            ("hidden_size", json!(1u64 << 40), "1 to"),
            ("head_dim", json!(0), "1 to"),
            ("vocab_size", json!(0), "1 to"),
            ("max_position_embeddings", json!(0), "1 to"),
            ("num_hidden_layers", json!(79), "attn_type_list` is a list of 80: expected one entry for each"),
            ("attn_type_list", json!([0, 1]), "one entry for each of num_hidden_layers = 80"),
            ("attn_type_list", json!(vec![2; 80]), "0 (lightning) or 1 (softmax)"),
            ("attn_type_list", json!(vec![-1; 80]), "0 (lightning) and 1 (softmax)"),
            ("num_key_value_heads", json!(7), "a divisor of num_attention_heads = 64"),
            ("num_local_experts", json!(20_000), "at most 1048576 experts in all layers"),
            ("num_experts_per_tok", json!(0), "1 to"),
            ("num_experts_per_tok", json!(33), "at most num_local_experts = 32"),
            ("rotary_dim", json!(0), "an even number from 2 to head_dim = 128"),
            ("rotary_dim", json!(63), "an even number"),
            ("rotary_dim", json!(130), "an even number"),
            ("rms_norm_eps", json!(0.0), "above 0"),
            ("rms_norm_eps", json!(1e-60), "above 0"),
            ("rope_theta", json!(-1), "above 0"),
            ("rope_theta", json!(1e300), "a finite number"),
            ("layernorm_mlp_alpha", json!(1e300), "a finite number"),
            ("router_aux_loss_coef", json!(-0.1), "0 or more"),
            ("postnorm", json!(1), "true or false"),
            ("hidden_act", json!("gelu"), "\"silu\""),
            ("tie_word_embeddings", json!(true), "false"),
            ("shared_intermediate_size", json!(1024), "0"),
            ("attention_bias", json!(true), "false"),
            ("sliding_window", json!(4096), "null"),
            ("rope_scaling", json!({"type": "yarn"}), "null"),
            ("attention_dropout", json!(0.1), "0"),
            ("eos_token_id", json!(-1), "token id"),
            ("eos_token_id", json!([1, "x"]), "token id"),
            ("router_jitter_noise", json!(0.1), "0"),
        ] {
            let said = refusal(key, Some(value));
            let at = if key == "num_hidden_layers" { "attn_type_list" } else { key };
            assert!(said.starts_with(&format!("config key `{at}` is ")) && said.contains(expected), "{said}");
            assert!(!said.contains('\n') && said.len() < 200, "{said}");
        }
    }

    #[test]
    fn sizes_whose_product_overflows_are_refused() {
        for keys in
            [["vocab_size", "hidden_size"], ["hidden_size", "intermediate_size"], ["num_attention_heads", "head_dim"]]
        {
            let mut map: Map<String, Value> = serde_json::from_str(M1).unwrap();
            for key in keys {
                map.insert(key.into(), json!(1u64 << 31));
            }
            let said = ModelConfig::try_from(map).unwrap_err().to_string();
            assert!(said.contains("too large"), "{said}");
        }
    }

    #[test]
    fn no_text_panics() {
        for text in ["", "[]", "null", "{", "{\"model_type\": 3}", "\u{0}", "{\"model_type\": \"minimax_m1\"}"] {
            assert!(ModelConfig::from_json(text).is_err(), "{text}");
        }
        for cut in 0..M1.trim_end().len() {
            assert!(ModelConfig::from_json(&M1[..cut]).is_err());
        }
        let missing = ModelConfig::from_file("no/such/config.json").unwrap_err().to_string();
        assert!(missing.starts_with("no/such/config.json: cannot read"), "{missing}");
    }
}
