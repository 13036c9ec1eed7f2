//! `generation_config.json`: sampling defaults and the ids that end a turn, in Hugging Face's form. M1's own
//! checkpoint has none (and its config.json has no end id): then the model card's settings hold, and the end is
//! the `eos_token` of `tokenizer_config.json`.

use crate::sampler::{SamplerError, SamplingOptions};
use crate::tokenizer::{Tokenizer, TokenizerError, read_json};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Name of the file in a checkpoint's directory.
pub const FILE: &str = "generation_config.json";

/// The contents of `generation_config.json`; keys that are not ours are kept and written back.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// `do_sample`: false asks for greedy decoding.
    pub do_sample: Option<bool>,
    /// `temperature`.
    pub temperature: Option<f32>,
    /// `top_k`.
    pub top_k: Option<usize>,
    /// `top_p`.
    pub top_p: Option<f32>,
    /// `min_p`.
    pub min_p: Option<f32>,
    /// `repetition_penalty`.
    pub repetition_penalty: Option<f32>,
    /// `max_new_tokens`.
    pub max_new_tokens: Option<usize>,
    /// `eos_token_id`: one id or a list.
    pub eos_token_id: Vec<u32>,
    /// All other keys.
    pub extra: Map<String, Value>,
}

/// Why the file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum GenerationConfigError {
    /// The file can't be read or is no JSON object.
    #[error(transparent)]
    File(#[from] TokenizerError),
    /// A key with a wrong value.
    #[error("{path}: {key} is {value}, and must be {expected}")]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value, as JSON.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A setting outside its range.
    #[error("{path}: {cause}")]
    Range {
        /// The file.
        path: PathBuf,
        /// The setting and its range.
        cause: SamplerError,
    },
    /// The file can't be written.
    #[error("{path}: {cause}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: std::io::Error,
    },
}

impl GenerationConfig {
    /// Reads the file of the checkpoint in `dir`; `None` where there is none.
    pub fn read(dir: &Path) -> Result<Option<Self>, GenerationConfigError> {
        let path = dir.join(FILE);
        let Some(Value::Object(mut map)) = read_json(&path)? else {
            return Ok(None);
        };
        type Test = fn(&Value) -> bool;
        let mut take = |key, expected, ok: Test| match map.shift_remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) if ok(&value) => Ok(Some(value)),
            Some(value) => {
                let (path, value) = (path.clone(), value.to_string());
                Err(GenerationConfigError::Key { path, key, value, expected })
            }
        };
        let mut float = |key| -> Result<Option<f32>, GenerationConfigError> {
            let value = take(key, "a number", Value::is_number)?;
            Ok(value.and_then(|v| v.as_f64()).map(|v| v as f32))
        };
        let (temperature, top_p) = (float("temperature")?, float("top_p")?);
        let (min_p, repetition_penalty) = (float("min_p")?, float("repetition_penalty")?);
        let mut count = |key| -> Result<Option<usize>, GenerationConfigError> {
            let value = take(key, "a whole number", Value::is_u64)?;
            Ok(value.and_then(|v| v.as_u64()).map(|v| v as usize))
        };
        let (top_k, max_new_tokens) = (count("top_k")?, count("max_new_tokens")?);
        let do_sample = take("do_sample", "true or false", Value::is_boolean)?;
        let expected = "a token id or a list of them";
        let eos_token_id = take("eos_token_id", expected, |v| ids(v).is_some())?;
        let config = Self {
            do_sample: do_sample.and_then(|v| v.as_bool()),
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            max_new_tokens,
            eos_token_id: eos_token_id.as_ref().and_then(ids).unwrap_or_default(),
            extra: map,
        };
        config.sampling().validate().map_err(|cause| GenerationConfigError::Range { path, cause })?;
        Ok(Some(config))
    }

    /// Writes the file into `dir`, under a temporary name first.
    pub fn write(&self, dir: &Path) -> Result<(), GenerationConfigError> {
        let path = dir.join(FILE);
        let text = format!("{:#}\n", self.to_json());
        crate::files::write(&path, text.as_bytes()).map_err(|cause| GenerationConfigError::Write { path, cause })
    }

    fn to_json(&self) -> Value {
        // f32 -> shortest decimal -> f64, so that 0.95 is written as 0.95.
        let float = |v: f32| json!(v.to_string().parse::<f64>().unwrap_or(f64::from(v)));
        let eos = match self.eos_token_id.as_slice() {
            [] => None,
            [id] => Some(json!(id)),
            ids => Some(json!(ids)),
        };
        let known = [
            ("do_sample", self.do_sample.map(Value::from)),
            ("temperature", self.temperature.map(float)),
            ("top_k", self.top_k.map(Value::from)),
            ("top_p", self.top_p.map(float)),
            ("min_p", self.min_p.map(float)),
            ("repetition_penalty", self.repetition_penalty.map(float)),
            ("max_new_tokens", self.max_new_tokens.map(Value::from)),
            ("eos_token_id", eos),
        ];
        let mut map: Map<String, Value> =
            known.into_iter().filter_map(|(key, value)| Some((key.to_string(), value?))).collect();
        map.extend(self.extra.clone());
        Value::Object(map)
    }

    /// The sampling settings that follow: M1's own (temperature 1.0, top_p 0.95) where the file is silent.
    pub fn sampling(&self) -> SamplingOptions {
        let default = SamplingOptions::default();
        SamplingOptions {
            temperature: if self.do_sample == Some(false) {
                0.0
            } else {
                self.temperature.unwrap_or(default.temperature)
            },
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(default.repetition_penalty),
            ..default
        }
    }

    /// The ids that end a turn: `eos_token_id`, else the id of the tokenizer's `eos_token`, else none.
    pub fn end_ids(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        if self.eos_token_id.is_empty() {
            tokenizer.named_token("eos_token").and_then(|token| tokenizer.id(token)).into_iter().collect()
        } else {
            self.eos_token_id.clone()
        }
    }
}

/// One id, or a list of them.
fn ids(value: &Value) -> Option<Vec<u32>> {
    let id = |v: &Value| u32::try_from(v.as_u64()?).ok();
    match value {
        Value::Array(list) => list.iter().map(id).collect(),
        one => Some(vec![id(one)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<GenerationConfig>, GenerationConfigError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), text).unwrap();
        GenerationConfig::read(dir.path())
    }

    #[test]
    fn written_and_read_again_it_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(GenerationConfig::read(dir.path()).unwrap(), None);
        let config = GenerationConfig {
            do_sample: Some(true),
            temperature: Some(1.0),
            top_p: Some(0.95),
            max_new_tokens: Some(80),
            eos_token_id: vec![3, 7],
            extra: json!({"transformers_version": "4.45.2"}).as_object().unwrap().clone(),
            ..GenerationConfig::default()
        };
        config.write(dir.path()).unwrap();
        assert_eq!(GenerationConfig::read(dir.path()).unwrap(), Some(config));
        let text = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
        assert!(text.contains("\"top_p\": 0.95,"), "{text}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn end_ids_are_one_or_several_and_fall_back_to_the_tokenizer() {
        assert_eq!(read(r#"{"eos_token_id": 5}"#).unwrap().unwrap().eos_token_id, [5]);
        assert_eq!(read(r#"{"eos_token_id": [5, 6]}"#).unwrap().unwrap().eos_token_id, [5, 6]);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": "<end_of_sentence>"}"#).unwrap();
        let tokenizer = crate::tokenizer::tests::byte_level(dir.path(), &["<end_of_sentence>", "x"]);
        assert_eq!(GenerationConfig::default().end_ids(&tokenizer), [256]);
    }

    #[test]
    fn silence_means_m1s_own_settings_and_do_sample_false_means_greedy() {
        assert_eq!(GenerationConfig::default().sampling(), SamplingOptions::default());
        let greedy = read(r#"{"do_sample": false, "temperature": 0.7, "top_k": 20}"#).unwrap().unwrap().sampling();
        assert_eq!((greedy.temperature, greedy.top_k), (0.0, 20));
    }

    #[test]
    fn wrong_values_name_file_and_key() {
        for (text, wanted) in [
            (r#"{"temperature": "hot"}"#, "temperature is \"hot\", and must be a number"),
            (r#"{"eos_token_id": [1, -2]}"#, "eos_token_id is [1,-2], and must be a token id"),
            (r#"{"top_p": 2}"#, "top_p is 2, and must be above 0"),
            ("[]", "a JSON object was expected"),
            ("{", "not JSON"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(FILE) && error.contains(wanted), "{error}");
        }
    }
}
