//! The fields that chat and completions share: how to sample, when to stop, how to answer.

use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::worker::Pace;
use crate::sampler::{Sampler, SamplingOptions, random_seed};
use serde_json::Value;

/// Stop strings that a request may bring.
const MAX_STOPS: usize = 16;
/// The likeliest ids that a request may ask for at each place (OpenAI's limit).
pub const MAX_TOP: usize = 20;
/// The largest `n` (OpenAI's limit).
pub const MAX_CHOICES: usize = 128;

/// What was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Sampling, without a seed.
    pub options: SamplingOptions,
    /// The first choice's seed; each further one has the next number.
    pub seed: u64,
    /// Answers wanted.
    pub n: usize,
    /// Texts that end an answer.
    pub stops: Vec<String>,
    /// Whether to stream.
    pub stream: bool,
    /// Whether a stream ends with the usage.
    pub include_usage: bool,
}

impl Params {
    /// How soon the client is to see what is new.
    pub fn pace(&self) -> Pace {
        if self.stream { Pace::Steps } else { Pace::Gathered }
    }

    /// Takes the shared fields; what is absent is as in `defaults`. `vocab`: ids of the model.
    pub fn take(fields: &mut Fields, defaults: SamplingOptions, vocab: usize) -> Result<Self, ApiError> {
        let options = SamplingOptions {
            temperature: fields.number("temperature")?.unwrap_or(defaults.temperature),
            top_p: fields.number("top_p")?.unwrap_or(defaults.top_p),
            top_k: top_k(fields)?.unwrap_or(defaults.top_k),
            min_p: fields.number("min_p")?.unwrap_or(defaults.min_p),
            repetition_penalty: fields.number("repetition_penalty")?.unwrap_or(defaults.repetition_penalty),
            presence_penalty: fields.number("presence_penalty")?.unwrap_or(defaults.presence_penalty),
            frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(defaults.frequency_penalty),
            logit_bias: logit_bias(fields, vocab)?,
            seed: None,
        };
        options.validate()?;
        let stream = fields.flag("stream")?.unwrap_or(false);
        let mut include_usage = false;
        if let Some(mut inner) = fields.object("stream_options")? {
            if !stream {
                return Err(ApiError::field("stream_options", "stream_options is only for `\"stream\": true`"));
            }
            include_usage = inner.flag("include_usage")?.unwrap_or(false);
            // Padding against eavesdroppers on lengths; asking for none is fine.
            inner.refuse("include_obfuscation", "chunks are not padded", |v| v == false)?;
            inner.finish()?;
        }
        let seed = fields.take("seed", "a whole number", |v| v.as_i64().map(|n| n as u64).or(v.as_u64()))?;
        let params = Self {
            options,
            seed: seed.unwrap_or_else(random_seed),
            n: fields.whole("n", 1..=MAX_CHOICES)?.unwrap_or(1),
            stops: stops(fields)?,
            stream,
            include_usage,
        };
        harmless(fields)?;
        Ok(params)
    }

    /// The sampler of choice `i`, made from one that knows which ids exist.
    pub fn sampler(&self, base: &Sampler, i: usize) -> Result<Sampler, ApiError> {
        let mut sampler = base.clone();
        sampler.set_options(self.options.clone())?;
        sampler.reseed(self.seed.wrapping_add(i as u64));
        Ok(sampler)
    }
}

/// 0 and -1 keep all, as elsewhere.
fn top_k(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let read = |v: &Value| if v == -1 { Some(0) } else { usize::try_from(v.as_u64()?).ok() };
    fields.take("top_k", "a whole number from 0 (all) on", read)
}

/// `{"id": bias}`.
fn logit_bias(fields: &mut Fields, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(map) = fields.take("logit_bias", "an object of token ids and numbers", |v| v.as_object().cloned())? else {
        return Ok(Vec::new());
    };
    map.iter()
        .map(|(key, value)| {
            let name = || format!("logit_bias.{key}");
            let id = key.parse::<u32>().ok().filter(|&id| (id as usize) < vocab).ok_or_else(|| {
                let last = vocab - 1;
                ApiError::field(name(), format!("logit_bias: {key:?} is not a token id; ids go from 0 to {last}"))
            })?;
            let bias = value.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
            let bias = bias.ok_or_else(|| wrong(&name(), value, "a number between -100 and 100"))?;
            Ok((id, bias as f32))
        })
        .collect()
}

/// One text or a list of them, none empty.
fn stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let expected = format!("a string or a list of at most {MAX_STOPS} strings, none empty");
    let text = |v: &Value| v.as_str().filter(|text| !text.is_empty()).map(str::to_string);
    let read = |v: &Value| match v {
        Value::Array(list) if list.len() <= MAX_STOPS => list.iter().map(text).collect(),
        one => Some(vec![text(one)?]),
    };
    Ok(fields.take("stop", &expected, read)?.unwrap_or_default())
}

/// Fields that OpenAI's clients send and that change no output here. They are looked at, so that a mistake shows.
fn harmless(fields: &mut Fields) -> Result<(), ApiError> {
    fields.text("user")?;
    fields.text("safety_identifier")?;
    fields.text("prompt_cache_key")?; // every prompt is looked up in the cache
    fields.take("prompt_cache_retention", "a string", |v| v.as_str().map(drop))?;
    fields.take("metadata", "an object", |v| v.as_object().map(drop))?;
    fields.refuse("store", "nothing is stored here", |v| v == false)?;
    let tiers = ["auto", "default"];
    fields.refuse("service_tier", "there is one tier, \"default\"", |v| v.as_str().is_some_and(|v| tiers.contains(&v)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(text: &str) -> Result<Params, ApiError> {
        let mut fields = Fields::parse(text.as_bytes())?;
        let params = Params::take(&mut fields, SamplingOptions::default(), 1000)?;
        fields.finish()?;
        Ok(params)
    }

    #[test]
    fn every_field_is_taken() {
        let got = take(
            r#"{"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 1,
                "frequency_penalty": -1, "logit_bias": {"7": -100, "3": 2.5}, "seed": 4, "n": 3, "stop": ["a", "b"],
                "stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false}, "user": "u",
                "store": false, "service_tier": "auto", "metadata": {"a": "b"}}"#,
        );
        let options = SamplingOptions {
            temperature: 0.0,
            top_p: 0.5,
            top_k: 7,
            min_p: 0.1,
            repetition_penalty: 1.1,
            presence_penalty: 1.0,
            frequency_penalty: -1.0,
            logit_bias: vec![(7, -100.0), (3, 2.5)],
            seed: None,
        };
        let stops = vec!["a".to_string(), "b".to_string()];
        assert_eq!(got, Ok(Params { options, seed: 4, n: 3, stops, stream: true, include_usage: true }));
        let bare = take(r#"{"stop": "x", "top_k": -1, "seed": -1}"#).unwrap();
        assert_eq!((bare.stops, bare.n, bare.seed), (vec!["x".to_string()], 1, u64::MAX));
        assert_eq!(bare.options, SamplingOptions::default());
        assert_ne!(take("{}").unwrap().seed, take("{}").unwrap().seed);
    }

    #[test]
    fn mistakes_name_the_field() {
        for (text, param, wanted) in [
            (r#"{"temperature": -1}"#, "temperature", "between 0 (greedy) and 100"),
            (r#"{"top_p": 0}"#, "top_p", "above 0"),
            (r#"{"presence_penalty": 3}"#, "presence_penalty", "between -2 and 2"),
            (r#"{"logit_bias": {"x": 1}}"#, "logit_bias.x", "not a token id"),
            (r#"{"logit_bias": {"1000": 1}}"#, "logit_bias.1000", "from 0 to 999"),
            (r#"{"logit_bias": {"1": 101}}"#, "logit_bias.1", "between -100 and 100"),
            (r#"{"n": 0}"#, "n", "from 1 to 128"),
            (r#"{"stop": ""}"#, "stop", "none empty"),
            (r#"{"stop": [1]}"#, "stop", "a string or a list"),
            (r#"{"seed": 1.5}"#, "seed", "a whole number"),
            (r#"{"stream_options": {}}"#, "stream_options", "only for"),
            (r#"{"stream": true, "stream_options": {"x": 1}}"#, "stream_options.x", "unknown field"),
            (r#"{"store": true}"#, "store", "nothing is stored"),
            (r#"{"temprature": 1}"#, "temprature", "unknown field"),
            (r#"{"user": 7}"#, "user", "must be a string"),
        ] {
            let error = take(text).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{text}");
            assert_eq!(error.status, 400);
            assert!(error.message.contains(wanted), "{text}: {}", error.message);
        }
    }
}
