//! Tells the model's `<think>…</think>` apart from its answer while the text streams in. A tag may arrive split over
//! several tokens, so the beginning of a tag is held back; no part of a tag ever reaches a piece.
//!
//! A model whose thought was ended for it (by a budget, by the prompt) may still write the `</think>` it had in mind: one
//! that comes before any of the answer belongs to the block's end, with the white space before it.

use crate::stop::overlap;

pub(crate) const OPEN: &str = "<think>";
pub(crate) const CLOSE: &str = "</think>";

/// What switches thinking off when the assistant's turn begins with it: an empty block, already closed.
pub const NO_THINKING: &str = "<think>\n\n</think>\n\n";

/// Where a reply begins, as its prompt leaves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// Outside: the model opens `<think>` itself, if it likes.
    #[default]
    Before,
    /// Inside `<think>`.
    Inside,
    /// After a block that is closed already, as [`NO_THINKING`] is: all is answer.
    After,
}

impl Start {
    /// Where a reply to this prompt begins: judged by a tag at its end.
    pub fn of_prompt(prompt: &str) -> Self {
        match prompt.trim_end() {
            text if text.ends_with(OPEN) => Self::Inside,
            text if text.ends_with(CLOSE) => Self::After,
            _ => Self::Before,
        }
    }
}

/// A piece of a reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Text inside `<think>…</think>`, without the tags.
    Thinking(String),
    /// Everything else.
    Answer(String),
}

/// Splits a streamed reply. Only its first `<think>` opens a block: what comes after the block is the answer, also
/// where the answer speaks of `<think>` itself. A block that is never closed is thinking to its end.
#[derive(Debug, Clone)]
pub struct ThinkSplitter {
    state: Start,
    held: String,
    /// Whether the block has just ended: nothing but white space has come since.
    ending: bool,
}

impl Default for ThinkSplitter {
    fn default() -> Self {
        Self::new(Start::Before)
    }
}

impl ThinkSplitter {
    /// For a reply that begins at `start`.
    pub fn new(start: Start) -> Self {
        Self { state: start, held: String::new(), ending: start == Start::After }
    }

    /// Where the text so far ends.
    pub fn state(&self) -> Start {
        self.state
    }

    /// From here on all is answer; returns what was held back.
    pub fn end_thinking(&mut self) -> Vec<Piece> {
        let pieces = self.finish();
        self.state = Start::After;
        pieces
    }

    /// Whether the text so far ends inside the block.
    pub fn is_thinking(&self) -> bool {
        self.state == Start::Inside
    }

    /// Takes the next text; returns the pieces that are certain, none of them empty.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        let keep = loop {
            let tag = match self.state {
                Start::Before => OPEN,
                Start::Inside => CLOSE,
                Start::After if self.ending => {
                    let begun = self.held.trim_start();
                    if let Some(rest) = begun.strip_prefix(CLOSE) {
                        self.held = rest.to_string();
                        continue;
                    }
                    self.ending = CLOSE.starts_with(begun);
                    break if self.ending { self.held.len() } else { 0 };
                }
                Start::After => break 0,
            };
            let Some(at) = self.held.find(tag) else { break overlap(&self.held, tag) };
            let rest = self.held.split_off(at + tag.len());
            self.held.truncate(at);
            self.flush(&mut pieces, 0);
            self.held = rest;
            self.state = if self.state == Start::Before { Start::Inside } else { Start::After };
            self.ending = self.state == Start::After;
        };
        self.flush(&mut pieces, keep);
        pieces
    }

    /// The text still held back, at the end of the reply.
    pub fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        self.ending = false;
        self.flush(&mut pieces, 0);
        pieces
    }

    /// Moves all but the last `keep` bytes of the held text into `pieces`.
    fn flush(&mut self, pieces: &mut Vec<Piece>, keep: usize) {
        let rest = self.held.split_off(self.held.len() - keep);
        let text = std::mem::replace(&mut self.held, rest);
        if !text.is_empty() {
            pieces.push(if self.state == Start::Inside { Piece::Thinking(text) } else { Piece::Answer(text) });
        }
    }
}

/// Splits a whole reply into (thinking, answer); the answer without the blank lines that follow the block.
pub fn split(reply: &str) -> (String, String) {
    let mut splitter = ThinkSplitter::default();
    let (mut thinking, mut answer) = (String::new(), String::new());
    for piece in splitter.push(reply).into_iter().chain(splitter.finish()) {
        match piece {
            Piece::Thinking(text) => thinking.push_str(&text),
            Piece::Answer(text) => answer.push_str(&text),
        }
    }
    (thinking, answer.trim_start_matches('\n').to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(mut splitter: ThinkSplitter, parts: &[&str]) -> (String, String) {
        let (mut thinking, mut answer) = (String::new(), String::new());
        let mut take = |pieces: Vec<Piece>| {
            for piece in pieces {
                match piece {
                    Piece::Thinking(t) => thinking.push_str(&t),
                    Piece::Answer(t) => answer.push_str(&t),
                }
            }
        };
        parts.iter().for_each(|p| take(splitter.push(p)));
        take(splitter.finish());
        (thinking, answer)
    }

    #[test]
    fn every_split_in_three_gives_the_same_parts() {
        let text = "Hm <think>\na < b </thin\n</think>\n\n1 < 2, <think> is a tag</think>";
        for at in 0..=text.len() {
            for then in at..=text.len() {
                let got = joined(ThinkSplitter::default(), &[&text[..at], &text[at..then], &text[then..]]);
                assert_eq!(got, ("\na < b </thin\n".into(), "Hm \n\n1 < 2, <think> is a tag</think>".into()));
            }
        }
    }

    #[test]
    fn a_tag_that_closes_a_closed_block_is_no_answer() {
        let text = "<think>a</think>\n\n</think> \u{a0}</think>\n</thin\n</think>b";
        for at in 0..=text.len() {
            for then in at..=text.len() {
                let cut = |from: usize, to: usize| text.get(from..to);
                let (Some(a), Some(b), Some(c)) = (cut(0, at), cut(at, then), cut(then, text.len())) else { continue };
                let got = joined(ThinkSplitter::default(), &[a, b, c]);
                assert_eq!(got, ("a".into(), "\n</thin\n</think>b".into()), "{at} {then}");
            }
        }
        // Also of a block that the prompt closed; not where no block was, nor after the first word of the answer.
        let after = || ThinkSplitter::new(Start::After);
        assert_eq!(joined(after(), &["\n", "</th", "ink>", " 7"]), ("".into(), " 7".into()));
        assert_eq!(joined(after(), &["7\n</think>"]), ("".into(), "7\n</think>".into()));
        assert_eq!(joined(after(), &[" \n", "</think"]), ("".into(), " \n</think".into()));
        assert_eq!(joined(ThinkSplitter::default(), &["</think>7"]), ("".into(), "</think>7".into()));
        let mut ended = ThinkSplitter::default();
        ended.end_thinking();
        assert_eq!(joined(ended, &["</think>7"]), ("".into(), "</think>7".into()));
        // White space waits, words do not.
        let mut s = after();
        assert_eq!(
            (s.push(" "), s.push("a"), s.push(" ")),
            (vec![], vec![Piece::Answer(" a".into())], vec![Piece::Answer(" ".into())])
        );
    }

    #[test]
    fn text_that_cannot_be_a_tag_is_not_held_back() {
        let mut s = ThinkSplitter::default();
        assert_eq!(s.push("<thi"), vec![]);
        assert_eq!(s.push("s>"), vec![Piece::Answer("<this>".into())]);
        assert_eq!(s.push("<think>a<"), vec![Piece::Thinking("a".into())]);
        assert!(s.is_thinking());
        assert_eq!(s.push("b"), vec![Piece::Thinking("<b".into())]);
    }

    #[test]
    fn unfinished_and_preset_blocks() {
        assert_eq!(joined(ThinkSplitter::default(), &["<think>on and on</th"]), ("on and on</th".into(), "".into()));
        assert_eq!(joined(ThinkSplitter::new(Start::Inside), &["so</think>yes"]), ("so".into(), "yes".into()));
        assert_eq!(joined(ThinkSplitter::new(Start::After), &["<think>"]), ("".into(), "<think>".into()));
        assert_eq!(split("<think>\nx\n</think>\n\n42"), ("\nx\n".into(), "42".into()));
        assert_eq!(split(&format!("{NO_THINKING}7")), ("\n\n".into(), "7".into()));
    }

    #[test]
    fn a_prompt_tells_where_its_reply_begins() {
        let ai = "<beginning_of_sentence>ai name=assistant\n";
        assert_eq!(Start::of_prompt(ai), Start::Before);
        assert_eq!(Start::of_prompt(&format!("{ai}<think>\n")), Start::Inside);
        assert_eq!(Start::of_prompt(&format!("{ai}{NO_THINKING}")), Start::After);
    }
}
