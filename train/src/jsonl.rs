//! Conversations as JSON lines, in the form that OpenAI's fine-tuning files have:
//! `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`.
//!
//! Different here: a line that would be trained on otherwise than it reads is refused, by file and line: a marker of
//! the chat template inside of a text, a role or a field that the template has no place for, nothing from the
//! assistant.

use std::io::{self, BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::conversation::{Message, Role};
use crate::tokenizer::SPECIAL;

/// Why a file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum JsonlError {
    /// The file could not be opened or read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// A line is no conversation.
    #[error("{path}: line {line}: {reason}")]
    Line {
        /// The file.
        path: String,
        /// Its line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// No line at all.
    #[error("{path}: holds no conversation; expected lines of {{\"messages\": [{{\"role\": …, \"content\": …}}, …]}}")]
    Empty {
        /// The file.
        path: String,
    },
}

/// A line. Fields beside `messages` (an id, a source) are for others.
#[derive(Serialize, Deserialize)]
struct Line {
    messages: Vec<LineMessage>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LineMessage {
    role: Role,
    content: String,
}

/// A conversation and the line (from 1) that it stands in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbered {
    /// Line of the file.
    pub line: usize,
    /// What is said.
    pub messages: Vec<Message>,
}

/// The conversations of a file; blank lines are skipped.
///
/// # Errors
/// A file that cannot be read, its first line that is no conversation, or that it holds none.
pub fn read(path: &Path) -> Result<Vec<Numbered>, JsonlError> {
    let name = || path.display().to_string();
    let failed = |source| JsonlError::Io { path: name(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut all = Vec::new();
    for (number, text) in BufReader::new(file).split(b'\n').enumerate() {
        let (line, text) = (number + 1, text.map_err(failed)?);
        if text.trim_ascii().is_empty() {
            continue;
        }
        let messages = parse(&text).map_err(|reason| JsonlError::Line { path: name(), line, reason })?;
        all.push(Numbered { line, messages });
    }
    if all.is_empty() { Err(JsonlError::Empty { path: name() }) } else { Ok(all) }
}

/// One line's conversation, or what is wrong with it.
fn parse(text: &[u8]) -> Result<Vec<Message>, String> {
    if !text.trim_ascii_start().starts_with(b"{") {
        return Err("expected a JSON object {\"messages\": [...]}".into());
    }
    // The place in the file is told by its line; serde's own "line 1" would mislead.
    let line: Line =
        serde_json::from_slice(text).map_err(|e| e.to_string().replace(" at line 1 column ", " at column "))?;
    let mut assistant = false;
    for (i, LineMessage { role, content }) in line.messages.iter().enumerate() {
        if *role == Role::System && i > 0 {
            return Err(format!("messages[{i}]: a system message can only be the first"));
        }
        if let Some(marker) = SPECIAL.iter().find(|marker| content.contains(**marker)) {
            return Err(format!("messages[{i}].content: holds {marker}, a marker of the chat template; take it out"));
        }
        if *role == Role::Assistant {
            if content.trim().is_empty() {
                return Err(format!("messages[{i}].content: the assistant says nothing, so nothing can be learned"));
            }
            assistant = true;
        }
    }
    if !assistant {
        return Err("no message of role assistant, so nothing can be learned".into());
    }
    Ok(line.messages.into_iter().map(|m| (m.role, m.content)).collect())
}

/// A conversation as one line, line end included.
pub fn line(messages: &[Message]) -> serde_json::Result<String> {
    let of = |(role, content): &Message| LineMessage { role: *role, content: content.clone() };
    Ok(serde_json::to_string(&Line { messages: messages.iter().map(of).collect() })? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("set.jsonl");
        std::fs::write(&path, text).unwrap();
        read(&path).unwrap_err().to_string()
    }

    const GOOD: &str = r#"{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hey"}]}"#;

    #[test]
    fn what_is_written_is_read() {
        let messages: Vec<Message> =
            [(Role::System, "Be \"good\".\n"), (Role::User, "1+1?"), (Role::Assistant, "2 🙂")]
                .map(|(role, text)| (role, text.to_string()))
                .to_vec();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("set.jsonl");
        // With blank lines, a Windows line end, a field for others, and no end of the last line.
        let other = GOOD.replace("{\"messages", "{\"id\": 7, \"messages");
        std::fs::write(&path, format!("\n{}{other}\r\n \n{GOOD}", line(&messages).unwrap())).unwrap();
        let hey = vec![(Role::User, "Hi".to_string()), (Role::Assistant, "Hey".to_string())];
        let expected = [(2, messages), (3, hey.clone()), (5, hey)].map(|(line, messages)| Numbered { line, messages });
        assert_eq!(read(&path).unwrap(), expected);
        assert_eq!(line(&expected[1].messages).unwrap(), format!("{GOOD}\n"));
    }

    #[test]
    fn a_bad_line_is_named_with_its_reason() {
        for (bad, says) in [
            ("{\"messages\":[", "EOF"),
            ("[[]]", "expected a JSON object {\"messages\""),
            ("{\"conversations\":[]}", "missing field `messages`"),
            (r#"{"messages":[]}"#, "no message of role assistant"),
            (r#"{"messages":[{"role":"user","content":"Hi"}]}"#, "no message of role assistant"),
            (r#"{"messages":[{"role":"tool","content":"x"}]}"#, "unknown variant `tool`"),
            (r#"{"messages":[{"role":"user","content":["x"]}]}"#, "expected a string"),
            (r#"{"messages":[{"role":"user"}]}"#, "missing field `content`"),
            (r#"{"messages":[{"role":"user","content":"x","tool_calls":[]}]}"#, "unknown field `tool_calls`"),
            (
                r#"{"messages":[{"role":"user","content":"x"},{"role":"system","content":"x"}]}"#,
                "messages[1]: a system",
            ),
            (
                r#"{"messages":[{"role":"assistant","content":" \n"}]}"#,
                "messages[0].content: the assistant says nothing",
            ),
            (
                r#"{"messages":[{"role":"user","content":"a<end_of_sentence>b"},{"role":"assistant","content":"x"}]}"#,
                "messages[0].content: holds <end_of_sentence>",
            ),
        ] {
            let told = told(&format!("{GOOD}\n\n{bad}\n"));
            assert!(told.contains("set.jsonl: line 3: ") && told.contains(says), "{told}");
            assert!(!told.contains('\n') && !told.contains("line 1"), "{told}");
        }
        assert!(told(" \n\n").contains("holds no conversation"));
        assert!(read(Path::new("/no/such/file")).unwrap_err().to_string().starts_with("/no/such/file: "));
    }
}
