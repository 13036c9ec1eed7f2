//! How a streamed reply looks. On a terminal the thinking is dimmed and its tags are left out; elsewhere (a pipe, a file,
//! NO_COLOR) the model's text comes as it is, tags included, so that a program can tell the parts apart.

use crate::think::{Piece, ThinkSplitter};
use std::borrow::Cow;
use std::io::{IsTerminal, Result, Write};

/// What to do with thinking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// The text as it is.
    Plain,
    /// Thinking dimmed by ANSI codes, tags left out.
    Dim,
    /// The answer only.
    AnswerOnly,
}

impl Look {
    /// The look that suits standard output.
    pub fn for_stdout(hide_thinking: bool) -> Self {
        match (hide_thinking, colours()) {
            (true, _) => Self::AnswerOnly,
            (false, true) => Self::Dim,
            (false, false) => Self::Plain,
        }
    }
}

/// Whether standard output is a terminal that wants ANSI codes (<https://no-color.org>).
pub fn colours() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|v| !v.is_empty());
    std::io::stdout().is_terminal() && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// Writes one reply.
#[derive(Debug)]
pub struct Renderer<W: Write> {
    out: W,
    look: Look,
    splitter: ThinkSplitter,
    thought: bool,
    /// Nothing of the current part has been shown.
    fresh: bool,
    /// Line ends that wait for text to follow them.
    held: usize,
    terminal: bool,
}

/// `text` without the control characters that a terminal would obey: only line ends and tabs stay.
pub fn printable(text: &str) -> Cow<'_, str> {
    let obeyed = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if text.contains(obeyed) { text.replace(obeyed, "\u{fffd}").into() } else { text.into() }
}

impl<W: Write> Renderer<W> {
    /// For one reply, written to `out`; none of its control characters reaches a `terminal`.
    pub fn new(out: W, look: Look, terminal: bool) -> Self {
        Self { out, look, terminal, splitter: ThinkSplitter::default(), thought: false, fresh: true, held: 0 }
    }

    /// Takes the next text of the reply.
    pub fn push(&mut self, text: &str) -> Result<()> {
        let text = if self.terminal { printable(text) } else { text.into() };
        if self.look == Look::Plain {
            self.out.write_all(text.as_bytes())?;
        } else {
            for piece in self.splitter.push(&text) {
                self.piece(piece)?;
            }
        }
        self.out.flush()
    }

    /// Ends the reply with a line end.
    pub fn finish(mut self) -> Result<()> {
        for piece in self.splitter.finish() {
            self.piece(piece)?;
        }
        self.out.write_all(b"\n")?;
        self.out.flush()
    }

    fn piece(&mut self, piece: Piece) -> Result<()> {
        let (text, thinking) = match &piece {
            Piece::Thinking(_) if self.look == Look::AnswerOnly => return Ok(()),
            Piece::Thinking(text) => (text.as_str(), true),
            Piece::Answer(text) => (text.as_str(), false),
        };
        if thinking != self.thought {
            // The parts are set apart by one blank line, whatever the model wrote between them.
            self.thought = thinking;
            self.held = if self.fresh { 0 } else { 2 };
            self.fresh = true;
        }
        let text = if self.fresh { text.trim_start_matches('\n') } else { text };
        let body = text.trim_end_matches('\n');
        if !body.is_empty() {
            let (on, off) = if thinking { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
            write!(self.out, "{}{on}{body}{off}", "\n".repeat(std::mem::take(&mut self.held)))?;
            self.fresh = false;
        }
        if !self.fresh {
            self.held += text.len() - body.len();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(look: Look, reply: &str, terminal: bool) -> Vec<String> {
        (1..=reply.len())
            .map(|size| {
                let mut out = Vec::new();
                let mut renderer = Renderer::new(&mut out, look, terminal);
                let mut rest = reply;
                while !rest.is_empty() {
                    let (piece, after) = rest.split_at(size.min(rest.len()));
                    renderer.push(piece).unwrap();
                    rest = after;
                }
                renderer.finish().unwrap();
                // Where the pieces were cut does not show.
                String::from_utf8(out).unwrap().replace("\x1b[0m\x1b[2m", "").replace("\x1b[0m\n\x1b[2m", "\n")
            })
            .collect()
    }

    fn always(look: Look, reply: &str, wanted: &str) {
        for got in shown(look, reply, look == Look::Dim) {
            assert_eq!(got, wanted);
        }
    }

    #[test]
    fn thinking_is_dimmed_hidden_or_left_as_it_is() {
        let reply = "<think>\na\nb\n</think>\n\n\nc\n\nd\n";
        always(Look::Dim, reply, "\x1b[2ma\nb\x1b[0m\n\nc\n\nd\n");
        always(Look::AnswerOnly, reply, "c\n\nd\n");
        always(Look::Plain, reply, "<think>\na\nb\n</think>\n\n\nc\n\nd\n\n");
    }

    #[test]
    fn replies_without_thought_or_without_answer() {
        always(Look::Dim, "<think>\n\n</think>\n\nyes", "yes\n");
        always(Look::Dim, "yes", "yes\n");
        always(Look::Dim, "<think>\nend", "\x1b[2mend\x1b[0m\n");
        always(Look::AnswerOnly, "<think>\nend", "\n");
        always(Look::Dim, "a\tb\x1b[2Jc\r", "a\tb\u{fffd}[2Jc\u{fffd}\n");
        always(Look::AnswerOnly, "b\x1b[2Jc", "b\x1b[2Jc\n");
        for look in [Look::Plain, Look::Dim, Look::AnswerOnly] {
            let got = shown(look, "b\x1b[2Jc\r\td", true);
            assert!(got.iter().all(|got| got == "b\u{fffd}[2Jc\u{fffd}\td\n"), "{look:?} {got:?}");
        }
        assert_eq!(printable("\u{9b}\u{7f}é\n"), "\u{fffd}\u{fffd}é\n");
        always(Look::Dim, "Hm <think>x</think>", "Hm \n\n\x1b[2mx\x1b[0m\n");
    }
}
