//! Log-probabilities as OpenAI's two routes write them.

use crate::batching::Scored;
use crate::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

/// Chat's form: `{"token", "logprob", "bytes", "top_logprobs"}`.
pub fn chat(tokenizer: &Tokenizer, scored: &Scored) -> Value {
    let mut value = entry(tokenizer, scored.id, scored.log_prob);
    value["top_logprobs"] = known(tokenizer, scored).map(|(id, log_prob)| entry(tokenizer, id, log_prob)).collect();
    value
}

/// The likeliest ids without those that only pad the model's vocabulary.
fn known(tokenizer: &Tokenizer, scored: &Scored) -> impl Iterator<Item = (u32, f32)> {
    scored.top.iter().copied().filter(|&(id, _)| tokenizer.token(id).is_some())
}

fn entry(tokenizer: &Tokenizer, id: u32, log_prob: f32) -> Value {
    let text = shown(tokenizer, id);
    // The bytes also where they are but a part of a character: put together they are the text, in which special tokens
    // have no place.
    let bytes = match tokenizer.bytes(id) {
        Some([]) => Value::Null,
        Some(bytes) => bytes.into(),
        None => text.as_bytes().into(),
    };
    json!({"token": text, "logprob": number(log_prob), "bytes": bytes})
}

/// The completions' form, which grows token by token.
#[derive(Debug, Clone, Default)]
pub struct Lists {
    tokens: Vec<Value>,
    log_probs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<Value>,
}

impl Lists {
    /// Adds a token whose text begins after `offset` characters.
    pub fn push(&mut self, tokenizer: &Tokenizer, scored: &Scored, offset: usize) {
        self.tokens.push(shown(tokenizer, scored.id).into());
        self.log_probs.push(number(scored.log_prob));
        // The drawn one comes in any case, so that it can be compared.
        let all = known(tokenizer, scored).chain([(scored.id, scored.log_prob)]);
        let top = all.map(|(id, log_prob)| (shown(tokenizer, id), number(log_prob)));
        self.top.push(Value::Object(top.collect::<Map<_, _>>()));
        self.offsets.push(offset.into());
    }

    /// Adds a token of which the model says nothing: a text's first.
    pub fn push_first(&mut self, tokenizer: &Tokenizer, id: u32) {
        self.tokens.push(shown(tokenizer, id).into());
        self.log_probs.push(Value::Null);
        self.top.push(Value::Null);
        self.offsets.push(0.into());
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The object, and nothing left.
    pub fn take(&mut self) -> Value {
        let Self { tokens, log_probs, top, offsets } = std::mem::take(self);
        json!({"tokens": tokens, "token_logprobs": log_probs, "top_logprobs": top, "text_offset": offsets})
    }
}

/// A token's text; special tokens by their names, parts of a character with U+FFFD.
pub fn shown(tokenizer: &Tokenizer, id: u32) -> String {
    match tokenizer.bytes(id) {
        Some(bytes) if !bytes.is_empty() => String::from_utf8_lossy(bytes).into_owned(),
        _ => tokenizer.token(id).unwrap_or_default(),
    }
}

/// The shortest decimal that is this f32.
fn number(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::byte_level;

    #[test]
    fn ids_that_do_not_exist_are_not_told() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = byte_level(dir.path(), &["x"]);
        let got = chat(&tokenizer, &Scored { id: 97, log_prob: -1.0, top: vec![(300, -0.5), (97, -1.0)] });
        assert_eq!(got["top_logprobs"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn bytes_put_together_are_the_text_and_special_tokens_have_names() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = byte_level(dir.path(), &["<end_of_sentence>", "x"]);
        let scored = |id| Scored { id, log_prob: -0.1, top: vec![(256, -0.1), (id, -2.5)] };
        let bytes: Vec<Value> = "é".bytes().map(|b| chat(&tokenizer, &scored(b.into()))["bytes"][0].clone()).collect();
        assert_eq!(bytes, "é".bytes().map(Value::from).collect::<Vec<_>>());
        let got = chat(&tokenizer, &scored(97));
        let wanted = json!({"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": [
            {"token": "<end_of_sentence>", "logprob": -0.1, "bytes": null},
            {"token": "a", "logprob": -2.5, "bytes": [97]}]});
        assert_eq!(got, wanted);
        let mut lists = Lists::default();
        lists.push(&tokenizer, &Scored { top: vec![(98, -0.05)], ..scored(97) }, 3);
        assert_eq!(
            lists.take(),
            json!({"tokens": ["a"], "token_logprobs": [-0.1], "top_logprobs": [{"b": -0.05, "a": -0.1}], "text_offset": [3]})
        );
        assert!(lists.is_empty());
    }
}
