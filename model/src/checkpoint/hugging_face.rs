//! Hugging Face's own conversion of the same model (`model_type: minimax`, class `MiniMaxForCausalLM`): other config
//! keys, other tensor names, fused experts in newer versions.
//!
//! Only names are translated; the maths stays M1's. That class rotates the whole head, which is wrong for M1, so its
//! configuration need not say how much to rotate: then the caller must.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::error::CheckpointError;
use crate::config::{ConfigError, MODEL_TYPE, ModelConfig, invalid, take};

/// The `model_type` of such a checkpoint.
pub const HF_MODEL_TYPE: &str = "minimax";

/// Their key for ours, where they differ only in name.
const KEYS: [(&str, &str); 6] = [
    ("full_attn_alpha_factor", "layernorm_full_attention_alpha"),
    ("full_attn_beta_factor", "layernorm_full_attention_beta"),
    ("linear_attn_alpha_factor", "layernorm_linear_attention_alpha"),
    ("linear_attn_beta_factor", "layernorm_linear_attention_beta"),
    ("mlp_alpha_factor", "layernorm_mlp_alpha"),
    ("mlp_beta_factor", "layernorm_mlp_beta"),
];

/// Tensors that the class derives from the configuration and yet saves.
const DERIVED: [&str; 4] = ["slope_rate", "query_decay", "key_decay", "diagonal_decay"];

/// Turns their configuration into M1's. `rotary_dim`, if given, stands above what the file says.
pub fn translate(
    mut keys: Map<String, Value>,
    rotary_dim: Option<usize>,
    path: &Path,
) -> Result<ModelConfig, CheckpointError> {
    let named = |error: ConfigError| ConfigError::File { path: path.into(), error: Box::new(error) };
    rename(&mut keys).map_err(named)?;
    let from_factor = rotary_from_factor(&mut keys).map_err(named)?;
    let from_file = keys.get("rotary_dim").filter(|dim| !dim.is_null()).cloned();
    let Some(dim) = rotary_dim.map(Value::from).or(from_file).or(from_factor) else {
        return Err(CheckpointError::RotaryDim(path.into()));
    };
    keys.insert("rotary_dim".into(), dim);
    Ok(ModelConfig::try_from(keys).map_err(named)?)
}

fn rename(keys: &mut Map<String, Value>) -> Result<(), ConfigError> {
    for (theirs, ours) in KEYS {
        if let Some(value) = keys.shift_remove(theirs) {
            keys.insert(ours.into(), value);
        } else if !keys.contains_key(ours) {
            return Err(ConfigError::Missing(theirs.into()));
        }
    }
    // Early conversions kept M1's own `attn_type_list`.
    if keys.contains_key("layer_types") {
        let types: Vec<String> = take(keys, "layer_types")?;
        let kinds: Result<Vec<u8>, _> = types
            .iter()
            .map(|kind| match kind.as_str() {
                "linear_attention" => Ok(0),
                "full_attention" => Ok(1),
                other => Err(invalid("layer_types", other, "a list of \"linear_attention\" and \"full_attention\"")),
            })
            .collect();
        keys.insert("attn_type_list".into(), json!(kinds?));
    } else if !keys.contains_key("attn_type_list") {
        return Err(ConfigError::Missing("layer_types".into()));
    }
    // Newer versions hold everything about RoPE in one object.
    if let Some(Value::Object(rope)) = keys.get("rope_parameters").cloned() {
        match rope.get("rope_type").or(rope.get("type")) {
            None | Some(Value::Null) => {}
            Some(kind) if kind == "default" => {}
            Some(kind) => return Err(invalid("rope_parameters.rope_type", kind, "\"default\"")),
        }
        if let Some(theta) = rope.get("rope_theta") {
            keys.entry("rope_theta").or_insert_with(|| theta.clone());
        }
    }
    // What that class fixes without a key, or derives: not a default of ours.
    if keys.get("head_dim").is_none_or(Value::is_null) {
        let size = |key: &str| keys.get(key).and_then(Value::as_u64).ok_or_else(|| ConfigError::Missing(key.into()));
        let (hidden, heads) = (size("hidden_size")?, size("num_attention_heads")?);
        if heads == 0 || hidden % heads != 0 {
            let found = format!("absent with hidden_size = {hidden} and num_attention_heads = {heads}");
            return Err(invalid("head_dim", found, "a width, as these do not divide"));
        }
        keys.insert("head_dim".into(), json!(hidden / heads));
    }
    if keys.get("postnorm") == Some(&json!(false)) {
        return Err(invalid("postnorm", false, "true (that class always carries the normed tensor)"));
    }
    for (key, value) in
        [("postnorm", json!(true)), ("shared_intermediate_size", json!(0)), ("tie_word_embeddings", json!(false))]
    {
        keys.entry(key).or_insert(value);
    }
    for (key, value) in [
        ("model_type", json!(MODEL_TYPE)),
        ("architectures", json!(["MiniMaxM1ForCausalLM"])),
        (
            "auto_map",
            json!({
                "AutoConfig": "configuration_minimax_m1.MiniMaxM1Config",
                "AutoModelForCausalLM": "modeling_minimax_m1.MiniMaxM1ForCausalLM",
            }),
        ),
    ] {
        keys.insert(key.into(), value);
    }
    Ok(())
}

/// `partial_rotary_factor · head_dim`, if the file says it; takes the keys that only that class reads.
fn rotary_from_factor(keys: &mut Map<String, Value>) -> Result<Option<Value>, ConfigError> {
    let rope = keys.shift_remove("rope_parameters").unwrap_or_default();
    let outside = keys.shift_remove("partial_rotary_factor").unwrap_or_default();
    keys.shift_remove("block_size");
    let factor = if rope["partial_rotary_factor"].is_null() { &outside } else { &rope["partial_rotary_factor"] };
    if factor.is_null() {
        return Ok(None);
    }
    let key = "partial_rotary_factor";
    let head_dim = keys.get("head_dim").and_then(Value::as_u64).unwrap_or(0) as f64;
    match factor.as_f64().map(|factor| factor * head_dim) {
        // A third of 96 is not quite 32 in floating point.
        Some(dim) if (dim - dim.round()).abs() < 1e-6 && dim >= 2.0 && dim <= head_dim => {
            Ok(Some(json!(dim.round() as u64)))
        }
        _ => Err(invalid(key, factor, format!("a share of head_dim = {head_dim} that is a whole, even number"))),
    }
}

/// Where one of M1's tensors is in such a checkpoint.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// The name it is stored under.
    pub stored: String,
    /// The shape that is stored there.
    pub shape: Vec<usize>,
    /// Its first element within that tensor.
    pub first: usize,
}

/// Finds tensor `name` of shape `shape` among the names that `has` knows: as M1 names it, or as newer versions do.
///
/// `experts` is the number of experts of a layer.
pub fn locate(name: &str, shape: &[usize], experts: usize, has: impl Fn(&str) -> bool) -> Option<Found> {
    if has(name) {
        return Some(Found { stored: name.into(), shape: shape.into(), first: 0 });
    }
    let (layer, part) = name.split_once(".block_sparse_moe.")?;
    let (stored, shape, first) = match part.strip_prefix("experts.") {
        None => (format!("{layer}.mlp.{part}"), shape.to_vec(), 0),
        Some(expert) => {
            let (expert, part) = expert.split_once('.')?;
            let expert: usize = expert.parse().ok()?;
            let size = shape[0] * shape[1];
            // gate_up_proj [experts, 2 · ffn, hidden] holds w1 above w3, down_proj [experts, hidden, ffn] holds w2.
            match part {
                "w2.weight" => {
                    (format!("{layer}.mlp.experts.down_proj"), vec![experts, shape[0], shape[1]], expert * size)
                }
                _ => (
                    format!("{layer}.mlp.experts.gate_up_proj"),
                    vec![experts, 2 * shape[0], shape[1]],
                    (2 * expert + usize::from(part == "w3.weight")) * size,
                ),
            }
        }
    };
    has(&stored).then_some(Found { stored, shape, first })
}

/// Whether a stored tensor is one that the class derives from the configuration.
pub fn is_derived(name: &str) -> bool {
    name.split_once(".self_attn.").is_some_and(|(_, part)| DERIVED.contains(&part))
}
