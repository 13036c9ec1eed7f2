//! The tokenizer of a checkpoint: `tokenizer.json` through the `tokenizers` crate, and what `tokenizer_config.json` adds.
//! Two things are our own: the bytes of each id of a byte-level vocabulary (so that a stream can be cut at characters,
//! not at tokens) and the mask of the ids that exist.

use crate::template::{Template, TemplateError};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tokenizers::DecoderWrapper;

/// Tags that a reader has to see in decoded text, whether or not a tokenizer calls them special.
const VISIBLE: [&str; 4] = ["<think>", "</think>", "<tool_calls>", "</tool_calls>"];

/// Why a tokenizer can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// There is no tokenizer.json.
    #[error(
        "{path}: not found; a tokenizer.json in Hugging Face's form is needed (vocab.json and merges.txt alone are not read)"
    )]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// A file that can't be read.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: std::io::Error,
    },
    /// A file with wrong contents.
    #[error("{path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The text can't be encoded.
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
}

/// Text to ids and back.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, to which special tokens are plain text; made where it is first needed.
    literal: OnceLock<tokenizers::Tokenizer>,
    /// For each id its bytes, where the vocabulary is byte-level; special tokens have none.
    bytes: Option<Vec<Option<Vec<u8>>>>,
    config: Value,
    dir: PathBuf,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where there is one, `tokenizer_config.json` of `dir`.
    pub fn from_dir(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(TokenizerError::Missing { path });
            }
            Err(cause) => return Err(TokenizerError::Io { path, cause }),
        };
        let inner: tokenizers::Tokenizer = text.parse().map_err(|e: tokenizers::Error| TokenizerError::Invalid {
            path,
            reason: format!("not a tokenizer.json: {e}"),
        })?;
        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        Ok(Self { bytes: byte_table(&inner), inner, literal: OnceLock::new(), config, dir: dir.to_path_buf() })
    }

    /// The ids of `text`. Special tokens written in the text become their ids; with `add_special` what the
    /// tokenizer puts around a text (nothing, in M1's) is added.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of `text` if special tokens are written in it, which are then plain text; `None` if there are none.
    /// (Added tokens that are not special, such as M1's `<think>`, are tokens here too.)
    pub fn encode_literal(&self, text: &str) -> Result<Option<Vec<u32>>, TokenizerError> {
        let literal = self.literal.get_or_init(|| {
            let mut literal = self.inner.clone();
            literal.set_encode_special_tokens(true);
            literal
        });
        let encoding = literal.encode_fast(text, false).map_err(|e| TokenizerError::Encode(e.to_string()))?;
        let ids = encoding.get_ids();
        Ok(if ids == self.encode(text, false)? { None } else { Some(ids.to_vec()) })
    }

    /// The special tokens as they are written, without the tags that a reader sees.
    pub fn special_tokens(&self) -> Vec<String> {
        let added = self.inner.get_added_tokens_decoder().into_values();
        let hidden = added.filter(|token| token.special && !VISIBLE.contains(&token.content.as_str()));
        hidden.map(|token| token.content).collect()
    }

    /// The text of `ids`, special tokens left out; invalid UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.bytes {
            Some(_) => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| self.bytes(id)).flatten().copied().collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            None => self.inner.decode(ids, true).unwrap_or_default(),
        }
    }

    /// The bytes of one id: `None` if this vocabulary is not byte-level, empty for special and unknown ids.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        let table = self.bytes.as_ref()?;
        Some(table.get(id as usize).and_then(Option::as_deref).unwrap_or(&[]))
    }

    /// The id of a token as the vocabulary writes it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as the vocabulary writes it; `None` for an id that does not exist.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Which of `vocab` ids exist here. A model's vocabulary is padded: the rest has to be masked.
    pub fn known(&self, vocab: usize) -> Vec<bool> {
        (0..vocab as u32).map(|id| self.inner.id_to_token(id).is_some()).collect()
    }

    /// One more than the largest id.
    pub fn size(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// A token that `tokenizer_config.json` names, as `eos_token` or `bos_token`: a string or an object with `content`.
    pub fn named_token(&self, key: &str) -> Option<&str> {
        let value = self.config.get(key)?;
        value.as_str().or_else(|| value.get("content")?.as_str())
    }

    /// The checkpoint's chat template: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.
    pub fn template(&self) -> Result<Template, TemplateError> {
        Template::from_dir(&self.dir, &self.config)
    }
}

/// The JSON of a file, `None` where there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => {
            return Err(TokenizerError::Io { path: path.to_path_buf(), cause });
        }
    };
    let value: Value = serde_json::from_str(&text)
        .map_err(|e| TokenizerError::Invalid { path: path.to_path_buf(), reason: format!("not JSON: {e}") })?;
    if value.is_object() {
        return Ok(Some(value));
    }
    Err(TokenizerError::Invalid { path: path.to_path_buf(), reason: "a JSON object was expected".into() })
}

fn byte_table(inner: &tokenizers::Tokenizer) -> Option<Vec<Option<Vec<u8>>>> {
    let Some(DecoderWrapper::ByteLevel(_)) = inner.get_decoder() else {
        return None;
    };
    let vocab = inner.get_vocab(true);
    let mut table = vec![None; vocab.values().max().map_or(0, |&id| id as usize + 1)];
    let alphabet = alphabet();
    for (token, id) in vocab {
        let bytes: Option<Vec<u8>> =
            token.chars().map(|c| alphabet.iter().position(|&a| a == c).map(|b| b as u8)).collect();
        table[id as usize] = Some(bytes.unwrap_or_else(|| token.into_bytes()));
    }
    for (id, token) in inner.get_added_tokens_decoder() {
        let hidden = token.special && !VISIBLE.contains(&token.content.as_str());
        table[id as usize] = if hidden { None } else { Some(token.content.into_bytes()) };
    }
    Some(table)
}

/// GPT-2's alphabet: the character that stands for each byte. Printable Latin-1 stands for itself, the other 68
/// bytes for the characters from U+0100 on, in order.
fn alphabet() -> [char; 256] {
    let mut next = 0x100u32;
    std::array::from_fn(|b| {
        let byte = b as u8;
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            byte as char
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::stream::TextStream;
    use std::str::FromStr;

    /// A byte-level vocabulary of the 256 bytes and then `added`, all special but the last.
    pub(crate) fn byte_level(dir: &Path, added: &[&str]) -> Tokenizer {
        let vocab: serde_json::Map<String, Value> =
            alphabet().iter().enumerate().map(|(i, c)| (c.to_string(), i.into())).collect();
        let added: Vec<Value> = added
            .iter()
            .enumerate()
            .map(|(i, token)| {
                serde_json::json!({"id": 256 + i, "content": token, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": i + 1 < added.len()})
            })
            .collect();
        let byte_level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let json = serde_json::json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}});
        std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
        Tokenizer::from_dir(dir).unwrap()
    }

    #[test]
    fn bytes_agree_with_the_crates_own_decoder_on_every_id() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = byte_level(dir.path(), &["<end_of_sentence>", "é<think>"]);
        for id in 0..256 {
            assert_eq!(tokenizer.decode(&[id]), tokenizer.inner.decode(&[id], true).unwrap(), "{id}");
            assert_eq!(tokenizer.bytes(id), Some(&[id as u8][..]));
        }
        assert_eq!(tokenizer.bytes(256), Some(&[][..]));
        assert_eq!(tokenizer.bytes(257), Some("é<think>".as_bytes()));
        assert_eq!(tokenizer.bytes(9999), Some(&[][..]));
        assert_eq!(tokenizer.known(260).iter().filter(|k| **k).count(), 258);
        assert_eq!(tokenizer.size(), 258);
    }

    #[test]
    fn any_text_round_trips_and_streams_whole_characters() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = byte_level(dir.path(), &["<end_of_sentence>", "<think>"]);
        let text = "Weather in 上海? 🦀\t\u{0}\r\n <think>é";
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids), text);
        let mut stream = TextStream::new(&tokenizer);
        let parts: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
        assert!(parts.iter().all(|p| !p.contains('\u{fffd}')));
        assert_eq!(parts.concat() + &stream.finish(), text);
        assert_eq!(tokenizer.encode("a<end_of_sentence>", false).unwrap(), [97, 256]);
    }

    #[test]
    fn tags_stay_visible_though_a_tokenizer_calls_them_special() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = byte_level(dir.path(), &["<think>", "<end_of_sentence>", "last"]);
        assert_eq!(tokenizer.decode(&[256, 97, 257]), "<think>a");
    }

    #[test]
    fn a_vocabulary_of_words_streams_too() {
        let dir = tempfile::tempdir().unwrap();
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":{"type":"WordPiece","prefix":"","cleanup":false},
            "model":{"type":"WordLevel","vocab":{"one":0,"two":1,"[UNK]":2},"unk_token":"[UNK]"}}"#;
        std::fs::write(dir.path().join("tokenizer.json"), json).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let ids = tokenizer.encode("one two one", false).unwrap();
        let mut stream = TextStream::new(&tokenizer);
        let text: String = ids.iter().map(|&id| stream.push(id)).collect();
        assert_eq!(text + &stream.finish(), tokenizer.decode(&ids));
        assert_eq!(tokenizer.inner.get_vocab_size(true), 3);
    }

    #[test]
    fn missing_and_broken_files_say_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json: not found"), "{error}");
        std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("not a tokenizer.json"), "{error}");
        assert!(tokenizers::Tokenizer::from_str("{}").is_err());
        byte_level(dir.path(), &["x"]);
        std::fs::write(dir.path().join("tokenizer_config.json"), "[1]").unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json: a JSON object"), "{error}");
    }

    #[test]
    fn tokens_are_named_as_strings_or_objects() {
        let dir = tempfile::tempdir().unwrap();
        let config = r#"{"eos_token":"<end_of_sentence>","bos_token":{"content":"<b>"},"pad_token":null}"#;
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let tokenizer = byte_level(dir.path(), &["<end_of_sentence>", "x"]);
        assert_eq!(tokenizer.named_token("eos_token"), Some("<end_of_sentence>"));
        assert_eq!(tokenizer.named_token("bos_token"), Some("<b>"));
        assert_eq!(tokenizer.named_token("pad_token"), None);
        assert_eq!(tokenizer.id("<end_of_sentence>"), Some(256));
    }
}
