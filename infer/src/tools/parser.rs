//! M1's tool calls while they stream: the first `<tool_calls>…</tool_calls>`, one JSON object
//! `{"name": …, "arguments": {…}}` a line. Arguments are given out as they come, so a line that turns bad after its
//! arguments have begun can't be taken back: a [`ToolEvent::Broken`] says so. Every other bad line is skipped whole. Where
//! a limit cut the text off, a call that was well so far is no broken one: it stays as far as it came.
//!
//! The closing tag may stand inside a string of an argument. It ends the block nevertheless, unless that line goes on
//! to be a whole call; until that is known, what comes from the tag on is held back.

use super::json::{At, Json};
use crate::stop::overlap;

/// Opens the block.
pub const OPEN: &str = "<tool_calls>";
/// Closes it.
pub const CLOSE: &str = "</tool_calls>";

/// A piece of a reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolEvent {
    /// Text outside the block.
    Text(String),
    /// A call begins; its arguments follow. Indices count from 0 on.
    Call {
        /// Which call.
        index: usize,
        /// The tool.
        name: String,
    },
    /// More of the arguments' JSON, as the model wrote it.
    Arguments {
        /// Of which call.
        index: usize,
        /// The text.
        fragment: String,
    },
    /// The line of this call is not a whole call after all, though its arguments have begun: a reply that is not
    /// streamed leaves it out.
    Broken {
        /// Which call.
        index: usize,
    },
}

#[derive(Debug, Clone, Default)]
enum State {
    #[default]
    Before,
    Inside(Box<Line>),
    After,
}

/// Takes the tool calls out of a streamed text.
#[derive(Debug, Clone, Default)]
pub struct ToolParser {
    state: State,
    /// Before the block: what may begin its tag.
    held: String,
    calls: usize,
    events: Vec<ToolEvent>,
}

/// A line of the block so far.
#[derive(Debug, Clone)]
struct Line {
    text: String,
    json: Json,
    bad: bool,
    /// Where in `text` the key or the value that is being read begins.
    start: usize,
    /// The key that was read last, if it stands in the outer object.
    key: Option<String>,
    name: Option<String>,
    /// Where the arguments begin, and where they end if they do.
    arguments: Option<(usize, Option<usize>)>,
    /// The call's index once it was given out, and how far `text` was given out.
    given: Option<(usize, usize)>,
    /// Where a closing tag may have begun, of which all characters so far are there.
    tag: Option<usize>,
    /// Where a whole closing tag stands inside a string.
    inner: Option<usize>,
}

impl ToolParser {
    /// Takes the next text; returns the events that are certain.
    pub fn push(&mut self, text: &str) -> Vec<ToolEvent> {
        let mut rest = text;
        if matches!(self.state, State::Before) {
            self.held.push_str(rest);
            let Some(at) = self.held.find(OPEN) else {
                let keep = overlap(&self.held, OPEN);
                let held = self.held.split_off(self.held.len() - keep);
                let text = std::mem::replace(&mut self.held, held);
                self.text(&text);
                return std::mem::take(&mut self.events);
            };
            let before = self.held[..at].to_string();
            self.text(&before);
            // The tag ends inside `text`: what was held before is shorter than the tag.
            rest = &text[text.len() - (self.held.len() - at - OPEN.len())..];
            self.held.clear();
            self.state = State::Inside(Box::new(Line::new()));
        }
        let mut chars = rest.char_indices();
        while let State::Inside(line) = &mut self.state {
            let Some((at, c)) = chars.next() else { break };
            match line.push(c) {
                Step::On => self.give(),
                Step::Next => {
                    self.end_line();
                    self.state = State::Inside(Box::new(Line::new()));
                }
                Step::Closed { after } => {
                    let after = line.text.split_off(after);
                    self.end_line();
                    self.state = State::After;
                    self.text(&after);
                    rest = &rest[at + c.len_utf8()..];
                }
            }
        }
        if let State::After = self.state {
            self.text(rest);
        }
        std::mem::take(&mut self.events)
    }

    /// The end of the text: an open block is closed, its last line counts if it is a whole call.
    pub fn finish(&mut self) -> Vec<ToolEvent> {
        let held = std::mem::take(&mut self.held);
        self.text(&held);
        if let State::Inside(line) = &mut self.state {
            let after = match line.inner {
                Some(at) if !line.is_call() => Some(line.text.split_off(at + CLOSE.len())),
                _ => None,
            };
            self.end_line();
            self.text(after.as_deref().unwrap_or(""));
        }
        self.state = State::After;
        std::mem::take(&mut self.events)
    }

    /// The same for a text that was cut off: a call under way may have gone on well, and stays as far as it came.
    pub fn cut(&mut self) -> Vec<ToolEvent> {
        if let State::Inside(line) = &mut self.state
            && line.may_go_on()
        {
            // What may be a closing tag inside a string may be text too, and the call would be lost with it.
            (line.tag, line.inner) = (None, None);
            self.give();
            self.state = State::After;
        }
        self.finish()
    }

    /// Something else comes between: what was held back begins no tag.
    pub(crate) fn interrupt(&mut self) -> Vec<ToolEvent> {
        let held = std::mem::take(&mut self.held);
        self.text(&held);
        std::mem::take(&mut self.events)
    }

    /// Whether the text so far ends inside the block.
    pub fn in_block(&self) -> bool {
        matches!(self.state, State::Inside(_))
    }

    fn text(&mut self, text: &str) {
        match self.events.last_mut() {
            _ if text.is_empty() => (),
            Some(ToolEvent::Text(last)) => last.push_str(text),
            _ => self.events.push(ToolEvent::Text(text.to_string())),
        }
    }

    /// Gives out what is certain of the line. Called after every character, so that nothing depends on how the text
    /// came in pieces.
    fn give(&mut self) {
        let State::Inside(line) = &mut self.state else { return };
        let (Some(name), Some((start, end)), false) = (&line.name, line.arguments, line.bad) else { return };
        let (index, from) = line.given.unwrap_or_else(|| {
            self.events.push(ToolEvent::Call { index: self.calls, name: name.clone() });
            self.calls += 1;
            (self.calls - 1, start)
        });
        let certain = line.inner.or(line.tag).unwrap_or(line.text.len());
        let to = end.unwrap_or(certain).min(certain).max(from);
        line.given = Some((index, to));
        let new = &line.text[from..to];
        match self.events.last_mut() {
            _ if new.is_empty() => (),
            Some(ToolEvent::Arguments { index: last, fragment }) if *last == index => fragment.push_str(new),
            _ => self.events.push(ToolEvent::Arguments { index, fragment: new.to_string() }),
        }
    }

    /// The line is over.
    fn end_line(&mut self) {
        let State::Inside(line) = &self.state else { return };
        if let (Some((index, _)), false) = (line.given, line.is_call()) {
            self.events.push(ToolEvent::Broken { index });
        }
    }
}

enum Step {
    /// Goes on.
    On,
    /// The line has ended.
    Next,
    /// The block has ended; what stands in the line from `after` on comes after it.
    Closed { after: usize },
}

impl Line {
    fn new() -> Self {
        Self {
            text: String::new(),
            json: Json::new(),
            bad: false,
            start: 0,
            key: None,
            name: None,
            arguments: None,
            given: None,
            tag: None,
            inner: None,
        }
    }

    /// Whether the line is a whole call.
    fn is_call(&self) -> bool {
        !self.bad && self.json.at() == At::End && self.name.is_some() && matches!(self.arguments, Some((_, Some(_))))
    }

    /// Whether more text could make it a whole call, or it is one.
    fn may_go_on(&self) -> bool {
        !self.bad && (self.json.in_string() || self.tag.is_none())
    }

    fn push(&mut self, c: char) -> Step {
        if c == '\n' {
            self.bad |= self.tag.is_some() && !self.json.in_string(); // half a tag
            return match self.inner {
                // The string never ends, so the tag in it was the block's.
                Some(at) if !self.is_call() => {
                    self.text.push(c);
                    self.close_at(at)
                }
                _ => Step::Next,
            };
        }
        if self.bad && self.tag.is_none() {
            self.text.clear();
        }
        let here = self.text.len();
        self.text.push(c);
        let in_string = !self.bad && self.json.in_string();
        if c == '<' {
            self.bad |= self.tag.is_some() && !in_string; // what was to be a tag is none
            self.tag = Some(here);
        }
        if let Some(at) = self.tag {
            let is_tag = CLOSE.starts_with(&self.text[at..]);
            let whole = is_tag && self.text.len() - at == CLOSE.len();
            match in_string {
                false if whole => return self.close_at(self.inner.unwrap_or(at)),
                false if is_tag => return Step::On, // no part of the object
                false => self.bad = true,
                true if whole => _ = self.inner.get_or_insert(at),
                true => (),
            }
            if whole || !is_tag {
                self.tag = None;
            }
        }
        if self.bad {
            return self.inner.map_or(Step::On, |at| self.close_at(at));
        }
        // An object that is over must not lack anything.
        self.bad = self.read(c, here).is_none() || self.json.at() == At::End && !self.is_call();
        match self.inner {
            Some(at) if self.bad => return self.close_at(at),
            _ if self.json.at() == At::End => self.inner = None, // a whole call: the tag was text
            _ => (),
        }
        Step::On
    }

    /// The block ends with the closing tag at `at`: what follows it is moved behind the line.
    fn close_at(&mut self, at: usize) -> Step {
        (self.tag, self.inner) = (None, None);
        // The tag itself is dropped.
        self.text.replace_range(at..at + CLOSE.len(), "");
        Step::Closed { after: at }
    }

    /// Reads a character of the object; `None` where it is no call any more.
    fn read(&mut self, c: char, here: usize) -> Option<()> {
        let (before, depth) = (self.json.at(), self.json.depth());
        self.json.push(c).ok()?;
        let (after, now) = (self.json.at(), self.json.depth());
        if depth == 0 && before == At::Value && !c.is_whitespace() && c != '{' {
            return None; // the line must be an object
        }
        let through = here + c.len_utf8();
        match (before, after) {
            (At::FirstKey | At::Key, At::String { key: true, .. }) if now == 1 => self.start = here,
            (At::String { key: true, .. }, At::Colon) if now == 1 => {
                self.key = Some(serde_json::from_str(&self.text[self.start..through]).ok()?);
            }
            (At::Value, _) if depth == 1 && !c.is_whitespace() => {
                self.start = here;
                match self.key.as_deref() {
                    // Each once, and a name is a string, arguments are an object.
                    Some("name") if c != '"' || self.name.is_some() => return None,
                    Some("arguments") if c != '{' || self.arguments.is_some() => return None,
                    Some("arguments") => self.arguments = Some((here, None)),
                    _ => (),
                }
            }
            (At::String { key: false, .. }, At::After) if now == 1 && self.key.as_deref() == Some("name") => {
                let name: String = serde_json::from_str(&self.text[self.start..through]).ok()?;
                if name.is_empty() {
                    return None;
                }
                self.name = Some(name);
            }
            (_, At::After) if depth == 2 && now == 1 && self.key.as_deref() == Some("arguments") => {
                self.arguments = self.arguments.map(|(start, _)| (start, Some(through)));
            }
            _ => (),
        }
        Some(())
    }
}

/// The whole-text form: the text outside the block, and name and arguments of each line that is a whole call.
pub fn parse(text: &str) -> (String, Vec<(String, String)>) {
    let mut parser = ToolParser::default();
    let (mut outside, mut calls) = (String::new(), Vec::new());
    for event in parser.push(text).into_iter().chain(parser.finish()) {
        match event {
            ToolEvent::Text(text) => outside.push_str(&text),
            ToolEvent::Call { name, .. } => calls.push(Some((name, String::new()))),
            ToolEvent::Arguments { index, fragment } => {
                if let Some(Some((_, arguments))) = calls.get_mut(index) {
                    arguments.push_str(&fragment);
                }
            }
            ToolEvent::Broken { index } => calls[index] = None,
        }
    }
    (outside, calls.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests;
