//! From ids to text as they come, without ever splitting a character: a byte-level token may end in the middle of
//! one, so its bytes wait for the rest. What is certain is given out at once, what is invalid becomes U+FFFD.

use crate::tokenizer::Tokenizer;
use std::ops::Deref;

/// Decodes UTF-8 that arrives in pieces; over a whole stream it gives what `String::from_utf8_lossy` gives.
#[derive(Debug, Clone, Default)]
pub struct Utf8Stream {
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Takes bytes and returns the characters that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut used = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            used += chunk.valid().len();
            let invalid = chunk.invalid();
            let at_end = used + invalid.len() == self.pending.len();
            if at_end && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none()) {
                break; // the beginning of a character: wait for the rest
            }
            if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
                used += invalid.len();
            }
        }
        self.pending.drain(..used);
        text
    }

    /// What is left when the stream ends: U+FFFD for a character that was never completed.
    pub fn finish(&mut self) -> String {
        if self.pending.is_empty() {
            return String::new();
        }
        self.pending.clear();
        char::REPLACEMENT_CHARACTER.to_string()
    }
}

/// Decodes ids one by one, special tokens left out. The tokenizer is borrowed, or shared (`Arc`).
#[derive(Debug, Clone)]
pub struct TextStream<T> {
    tokenizer: T,
    utf8: Utf8Stream,
    // For tokenizers that are not byte-level: the ids since the last text, decoded together.
    ids: Vec<u32>,
    shown: String,
}

impl<T: Deref<Target = Tokenizer>> TextStream<T> {
    /// A stream that begins anew.
    pub fn new(tokenizer: T) -> Self {
        Self { tokenizer, utf8: Utf8Stream::default(), ids: Vec::new(), shown: String::new() }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Takes an id and returns the text that it completes, which may be empty.
    pub fn push(&mut self, id: u32) -> String {
        if let Some(bytes) = self.tokenizer.bytes(id) {
            return self.utf8.push(bytes);
        }
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids);
        match text.strip_prefix(self.shown.as_str()) {
            Some(new) if !new.is_empty() && !new.ends_with(char::REPLACEMENT_CHARACTER) => {
                let new = new.to_string();
                self.shown = text;
                new
            }
            _ => String::new(),
        }
    }

    /// The text still held back, at the end.
    pub fn finish(&mut self) -> String {
        let rest = self.tokenizer.decode(&std::mem::take(&mut self.ids));
        let rest = rest.strip_prefix(std::mem::take(&mut self.shown).as_str()).unwrap_or("").to_string();
        self.utf8.finish() + &rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytewise(bytes: &[u8]) -> (Vec<String>, String) {
        let mut s = Utf8Stream::default();
        let mut parts: Vec<String> = bytes.iter().map(|b| s.push(&[*b])).collect();
        parts.push(s.finish());
        let all = parts.concat();
        (parts, all)
    }

    #[test]
    fn characters_come_whole() {
        let (parts, _) = bytewise("aé上🦀".as_bytes());
        assert_eq!(parts, ["a", "", "é", "", "", "上", "", "", "", "🦀", ""]);
    }

    #[test]
    fn invalid_bytes_match_from_utf8_lossy_and_stall_nothing() {
        let cases: [&[u8]; 6] =
            [b"\xff\xfea", b"\xe4\xb8", b"\xe4\xb8x", b"\xf0\x9f\xa6", b"\x80\x80", b"\xed\xa0\x80z"];
        for bytes in cases {
            assert_eq!(bytewise(bytes).1, String::from_utf8_lossy(bytes), "{bytes:x?}");
            let mut whole = Utf8Stream::default();
            assert_eq!(whole.push(bytes) + &whole.finish(), String::from_utf8_lossy(bytes), "{bytes:x?}");
        }
        let mut s = Utf8Stream::default();
        assert_eq!((s.push(b"\xff"), s.push(b"\xe4\xb8")), ("\u{fffd}".into(), "".into()));
        assert_eq!(s.push(b"ok"), "\u{fffd}ok");
    }
}
