//! A reply as a client gets it: from ids to pieces of reasoning, of content and of tool calls, while they come. No part
//! of a tag is ever in a piece, and what the pieces add up to does not depend on where the tokens' borders lie.
//!
//! Line breaks between the parts belong to none of them: those around the reasoning, and those of the content beside a
//! block. [`rebuild`] puts them back as M1 writes them.

use crate::sampler::random_seed;
use crate::stop::StopStrings;
use crate::stream::TextStream;
use crate::think::{self, Piece, Start, ThinkSplitter};
use crate::tokenizer::Tokenizer;
use crate::tools::{self, ToolCall, ToolEvent, ToolParser};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// A piece of a reply; none is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// Of what stands in `<think>…</think>`.
    Reasoning(String),
    /// Of the answer.
    Content(String),
    /// A tool call begins.
    ToolCall {
        /// Which call of this reply, from 0 on.
        index: usize,
        /// Its id, made here.
        id: String,
        /// The tool.
        name: String,
    },
    /// More of a call's arguments, JSON as the model wrote it.
    ToolArguments {
        /// Of which call.
        index: usize,
        /// The text.
        fragment: String,
    },
    /// The call is no whole call after all (see [`crate::tools::ToolEvent::Broken`]).
    ToolBroken {
        /// Which call.
        index: usize,
    },
}

/// Makes the ids of tool calls: `call_` and 24 letters and digits.
#[derive(Debug, Clone)]
pub struct CallIds(ChaCha8Rng);

impl CallIds {
    /// Ids that nobody foresees.
    pub fn random() -> Self {
        Self::seeded(random_seed())
    }

    /// The same ids for the same seed.
    pub fn seeded(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    fn draw(&mut self) -> String {
        const LETTERS: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
        let letters = (0..24).map(|_| char::from(LETTERS[self.0.random_range(0..LETTERS.len())]));
        "call_".chars().chain(letters).collect()
    }
}

impl Default for CallIds {
    fn default() -> Self {
        Self::random()
    }
}

/// How to read a reply.
#[derive(Debug, Clone, Default)]
pub struct ReplySettings {
    /// Where the reply begins.
    pub start: Start,
    /// Whether `<tool_calls>` means calls; if not, it is text.
    pub tools: bool,
    /// The content ends before the first of these. They are looked for in the content only.
    pub stops: Vec<String>,
    /// Where the calls' ids come from.
    pub call_ids: CallIds,
}

/// The blocks of a reply, in their order.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
enum Block {
    None,
    Thought,
    Calls,
}

/// Reads one reply.
#[derive(Debug)]
pub struct Reply {
    text: TextStream<Arc<Tokenizer>>,
    think: ThinkSplitter,
    tools: Option<ToolParser>,
    /// The last block that began.
    block: Block,
    call_ids: CallIds,
    called: bool,
    reasoning: Reasoning,
    content: Content,
    deltas: Vec<Delta>,
}

impl Reply {
    /// Before the first id.
    pub fn new(tokenizer: Arc<Tokenizer>, settings: ReplySettings) -> Self {
        let ReplySettings { start, tools, stops, call_ids } = settings;
        Self {
            text: TextStream::new(tokenizer),
            think: ThinkSplitter::new(start),
            tools: tools.then(ToolParser::default),
            block: if start == Start::Before { Block::None } else { Block::Thought },
            call_ids,
            called: false,
            reasoning: Reasoning::default(),
            content: Content {
                stops: StopStrings::new(stops),
                beside_block: start != Start::Before,
                breaks: String::new(),
            },
            deltas: Vec::new(),
        }
    }

    /// Takes an id; returns what is certain now. After a stop string that is nothing any more. An end id has no text.
    pub fn push(&mut self, id: u32) -> Vec<Delta> {
        if self.stopped() {
            return Vec::new();
        }
        let was_inside = self.think.is_thinking();
        let text = self.text.push(id);
        self.take(&text);
        let bytes = self.text.tokenizer().bytes(id).unwrap_or(text.as_bytes());
        match (was_inside, self.think.is_thinking()) {
            (true, inside) => self.reasoning.count(bytes, !inside),
            // What follows the tag in the same id.
            (false, true) => {
                let rest = bytes.iter().rposition(|&b| b == b'>').map_or(bytes, |at| &bytes[at + 1..]);
                self.reasoning.count(rest, false);
            }
            (false, false) => (),
        }
        std::mem::take(&mut self.deltas)
    }

    /// What was held back, at the end of a reply that ended by itself. Call it (or [`Self::cut`]) once.
    pub fn finish(&mut self) -> Vec<Delta> {
        self.end(ToolParser::finish)
    }

    /// The same of a reply that a limit has cut off: a call under way stays as far as it came, as OpenAI has it.
    pub fn cut(&mut self) -> Vec<Delta> {
        self.end(ToolParser::cut)
    }

    fn end(&mut self, calls: fn(&mut ToolParser) -> Vec<ToolEvent>) -> Vec<Delta> {
        if self.stopped() {
            return Vec::new();
        }
        let rest = self.text.finish();
        self.take(&rest);
        let pieces = self.think.finish();
        self.pieces(pieces);
        if let Some(tools) = &mut self.tools {
            let events = calls(tools);
            self.events(events);
        }
        self.content.end(&mut self.deltas);
        self.reasoning.end();
        std::mem::take(&mut self.deltas)
    }

    /// Whether a stop string has come: the reply is over.
    pub fn stopped(&self) -> bool {
        self.content.stops.stopped()
    }

    /// Whether tools were called.
    pub fn called_tools(&self) -> bool {
        self.called
    }

    /// Whether the reply stands inside a block of thought.
    pub fn is_thinking(&self) -> bool {
        self.think.is_thinking()
    }

    /// Ids of the reasoning so far, without its tags and the line breaks beside them.
    pub fn reasoning_tokens(&self) -> usize {
        self.reasoning.tokens
    }

    fn take(&mut self, text: &str) {
        // Whether `<think>` is a tag depends on whether `<tool_calls>` came before: one tag at a time.
        let mut rest = text;
        while !rest.is_empty() {
            let end = rest.char_indices().skip(1).find(|(_, c)| *c == '<').map_or(rest.len(), |(at, _)| at);
            let pieces = self.think.push(&rest[..end]);
            self.pieces(pieces);
            if self.think.is_thinking() {
                self.begin_block(Block::Thought);
            }
            if self.tools.as_ref().is_some_and(ToolParser::in_block) {
                self.begin_block(Block::Calls);
                if self.think.state() == Start::Before {
                    let held = self.think.end_thinking();
                    self.pieces(held);
                }
            }
            rest = &rest[end..];
        }
    }

    /// Before anything of a block is given out, all of the content before it is.
    fn begin_block(&mut self, block: Block) {
        if self.block >= block {
            return;
        }
        self.block = block;
        if let (Block::Thought, Some(tools)) = (block, &mut self.tools) {
            let events = tools.interrupt();
            self.events(events);
        }
        self.content.block(&mut self.deltas);
    }

    fn pieces(&mut self, pieces: Vec<Piece>) {
        for piece in pieces {
            if self.stopped() {
                return;
            }
            match (piece, &mut self.tools) {
                (Piece::Thinking(text), _) => {
                    self.begin_block(Block::Thought);
                    self.reasoning.push(&text, &mut self.deltas);
                }
                (Piece::Answer(text), None) => self.content.push(&text, &mut self.deltas),
                (Piece::Answer(text), Some(tools)) => {
                    let events = tools.push(&text);
                    self.events(events);
                }
            }
        }
    }

    fn events(&mut self, events: Vec<ToolEvent>) {
        for event in events {
            if self.stopped() {
                return;
            }
            if !matches!(event, ToolEvent::Text(_)) {
                self.begin_block(Block::Calls);
            }
            match event {
                ToolEvent::Text(text) => self.content.push(&text, &mut self.deltas),
                ToolEvent::Call { index, name } => {
                    self.called = true;
                    self.deltas.push(Delta::ToolCall { index, id: self.call_ids.draw(), name });
                }
                ToolEvent::Arguments { index, fragment } => {
                    self.deltas.push(Delta::ToolArguments { index, fragment });
                }
                ToolEvent::Broken { index } => self.deltas.push(Delta::ToolBroken { index }),
            }
        }
    }
}

/// The reasoning so far: line breaks at its beginning are dropped, others wait for what follows them.
#[derive(Debug, Default)]
struct Reasoning {
    begun: bool,
    breaks: String,
    /// Ids that are of the reasoning for certain.
    tokens: usize,
    /// The bytes after them (and those of their last bytes that belong to the same tag): line breaks, and what may be
    /// the closing tag.
    tail: Vec<u8>,
    /// Where in `tail` each further id begins.
    pending: Vec<usize>,
}

impl Reasoning {
    /// Counts an id inside the block, one that closes it included. Bytes are looked at, not text: half a character is
    /// an id of the reasoning too.
    fn count(&mut self, bytes: &[u8], closes: bool) {
        const CLOSE: &[u8] = think::CLOSE.as_bytes();
        if bytes.is_empty() {
            return;
        }
        self.pending.push(self.tail.len());
        self.tail.extend_from_slice(bytes);
        if self.tokens == 0 {
            // Line breaks at the beginning.
            self.drop(self.tail.iter().take_while(|&&b| b == b'\n').count());
            if self.tail.is_empty() {
                self.pending.clear();
            }
        }
        if closes {
            let at = self.tail.windows(CLOSE.len()).position(|window| window == CLOSE);
            self.tail.truncate(at.unwrap_or(0));
            return self.end();
        }
        let possible = |from: &usize| {
            let rest = &self.tail[*from..];
            CLOSE.starts_with(&rest[rest.iter().take_while(|&&b| b == b'\n').count()..])
        };
        let certain = (0..self.tail.len()).find(possible).unwrap_or(self.tail.len());
        self.settle(certain);
        self.drop(certain);
    }

    /// The ids that begin before `at` in the tail are of the reasoning.
    fn settle(&mut self, at: usize) {
        let before = self.pending.len();
        self.pending.retain(|&start| start >= at);
        self.tokens += before - self.pending.len();
    }

    /// Drops the first `n` bytes of the tail.
    fn drop(&mut self, n: usize) {
        self.tail.drain(..n);
        self.pending.iter_mut().for_each(|start| *start = start.saturating_sub(n));
    }

    /// The block ends, with the tail's end; line breaks before that are not of the reasoning.
    fn end(&mut self) {
        let breaks = self.tail.iter().rev().take_while(|&&b| b == b'\n').count();
        self.settle(self.tail.len() - breaks);
        self.pending.clear();
    }

    fn push(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        let text = if self.begun { text } else { text.trim_start_matches('\n') };
        self.begun |= !text.is_empty();
        let text = without_breaks(&mut self.breaks, text);
        match deltas.last_mut() {
            _ if text.is_empty() => (),
            Some(Delta::Reasoning(last)) => last.push_str(&text),
            _ => deltas.push(Delta::Reasoning(text)),
        }
    }
}

/// The content so far: line breaks beside a block are dropped.
#[derive(Debug)]
struct Content {
    stops: StopStrings,
    /// Whether nothing has come since the last block.
    beside_block: bool,
    breaks: String,
}

impl Content {
    fn push(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        let text = if self.beside_block { text.trim_start_matches('\n') } else { text };
        if text.is_empty() {
            return;
        }
        self.beside_block = false;
        let text = self.stops.push(text);
        self.show(&text, deltas);
        if self.stops.stopped() {
            self.end(deltas);
        }
    }

    /// A block begins here.
    fn block(&mut self, deltas: &mut Vec<Delta>) {
        let held = self.stops.finish();
        self.show(&held, deltas);
        self.breaks.clear();
        self.beside_block = true;
    }

    /// The reply ends here.
    fn end(&mut self, deltas: &mut Vec<Delta>) {
        let held = self.stops.finish();
        self.show(&held, deltas);
        let breaks = std::mem::take(&mut self.breaks);
        add(breaks, deltas);
    }

    fn show(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        let text = without_breaks(&mut self.breaks, text);
        add(text, deltas);
    }
}

fn add(content: String, deltas: &mut Vec<Delta>) {
    match deltas.last_mut() {
        _ if content.is_empty() => (),
        Some(Delta::Content(last)) => last.push_str(&content),
        _ => deltas.push(Delta::Content(content)),
    }
}

/// `breaks` and `text` together, without the line breaks at the end, which become `breaks`.
fn without_breaks(breaks: &mut String, text: &str) -> String {
    let body = text.trim_end_matches('\n');
    let shown = if body.is_empty() { String::new() } else { std::mem::take(breaks) + body };
    breaks.push_str(&text[body.len()..]);
    shown
}

/// A reply put together from its pieces, for a response that is not streamed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parts {
    /// The reasoning, if there was any.
    pub reasoning: Option<String>,
    /// The content; empty if there was none.
    pub content: String,
    /// The calls, none of them broken; the last one may be cut off.
    pub calls: Vec<ToolCall>,
    indices: Vec<usize>,
}

impl Parts {
    /// Adds a piece.
    pub fn take(&mut self, delta: Delta) {
        match delta {
            Delta::Reasoning(text) => self.reasoning.get_or_insert_default().push_str(&text),
            Delta::Content(text) => self.content.push_str(&text),
            Delta::ToolCall { index, id, name } => {
                self.calls.push(ToolCall { id, name, arguments: String::new() });
                self.indices.push(index);
            }
            Delta::ToolArguments { index, fragment } => {
                if let Some(at) = self.indices.iter().position(|&i| i == index) {
                    self.calls[at].arguments.push_str(&fragment);
                }
            }
            Delta::ToolBroken { index } => {
                if let Some(at) = self.indices.iter().position(|&i| i == index) {
                    self.calls.remove(at);
                    self.indices.remove(at);
                }
            }
        }
    }
}

/// M1's text for a message of its own: `<think>\n…\n</think>\n\n`, the content, the calls. An empty reasoning is an
/// empty block, [`crate::think::NO_THINKING`].
pub fn rebuild(reasoning: Option<&str>, content: &str, calls: &[ToolCall]) -> String {
    let mut text = reasoning.map_or(String::new(), |text| format!("<think>\n{text}\n</think>\n\n"));
    text += content;
    if !(content.is_empty() || content.ends_with('\n') || calls.is_empty()) {
        text.push('\n');
    }
    text + &tools::render(calls)
}

#[cfg(test)]
mod tests;
