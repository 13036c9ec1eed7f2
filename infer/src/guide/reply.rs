//! A whole reply's guide: a thought within its budget, then an answer, free or of a grammar, or free until the model
//! itself begins to call tools.

use super::grammar::{Grammar, ends_thought};
use super::thinking::{Forced, Thinking};
use super::{Guide, GuideError, Next};
use crate::stop::overlap;
use crate::stream::TextStream;
use crate::think::{self, Piece, Start, ThinkSplitter};
use crate::tokenizer::Tokenizer;
use crate::tools;
use std::collections::VecDeque;
use std::sync::Arc;

/// What the answer may be.
#[derive(Debug, Clone, Default)]
pub enum Answer {
    /// Anything.
    #[default]
    Free,
    /// What the grammar says, from the first id on. A thought comes before it unless the prompt holds a closed block;
    /// it is forced open, and no end id is allowed in it.
    Only(Grammar),
    /// Anything until the model opens `<tool_calls>` outside its thought; from there on what the grammar, one of
    /// [`super::Grammars::tool_calls`], says, and then the end.
    Tools(Grammar),
}

/// Guides one reply.
#[derive(Debug, Clone)]
pub struct ReplyGuide {
    text: TextStream<Arc<Tokenizer>>,
    splitter: ThinkSplitter,
    thinking: Thinking,
    used: usize,
    /// Bytes of the thought so far, and whether it ends with a line break.
    thought: (usize, bool),
    forced: Forced,
    /// Ids that come next.
    queue: VecDeque<u32>,
    answer: Answer,
    /// Whether the grammar is what counts now.
    in_grammar: bool,
    /// The last characters of the text, where a tag may have begun.
    recent: String,
    mask: Vec<bool>,
}

impl ReplyGuide {
    /// For a reply whose prompt ends as `thinking` says. The grammar must be fresh and of the same tokenizer.
    pub fn new(tokenizer: &Arc<Tokenizer>, thinking: Thinking, answer: Answer) -> Result<Self, GuideError> {
        let forced = Forced::new(tokenizer)?;
        let constrained = matches!(answer, Answer::Only(_));
        let open = thinking.start == Start::Before && (thinking.open || constrained);
        Ok(Self {
            text: TextStream::new(tokenizer.clone()),
            splitter: ThinkSplitter::new(thinking.start),
            thinking,
            used: 0,
            // A prompt that ends inside ends with the tag and a line break.
            thought: if thinking.start == Start::Inside { (1, true) } else { (0, false) },
            queue: if open { forced.open.iter().copied().collect() } else { VecDeque::new() },
            forced,
            in_grammar: constrained && thinking.start == Start::After,
            answer,
            recent: String::new(),
            mask: Vec::new(),
        })
    }

    /// Whether such a guide ever forbids anything.
    pub fn is_needed(thinking: &Thinking, answer: &Answer) -> bool {
        let opens = thinking.open && thinking.start == Start::Before;
        opens || thinking.budget.is_some() && thinking.start != Start::After || !matches!(answer, Answer::Free)
    }

    /// Takes the text of an id.
    fn read(&mut self, text: &str) -> Result<(), GuideError> {
        self.recent.push_str(text);
        let from = self.recent.len().saturating_sub(tools::CLOSE.len());
        let from = (from..=self.recent.len()).find(|&at| self.recent.is_char_boundary(at)).unwrap_or(0);
        self.recent.drain(..from);
        let before = self.splitter.state();
        let mut said = String::new();
        let mut pieces = self.splitter.push(text);
        let closed = before != Start::After && self.splitter.state() == Start::After;
        if closed {
            pieces.extend(self.splitter.finish()); // line breaks after the tag, held back
        }
        for piece in pieces {
            match piece {
                Piece::Thinking(text) => self.thought = (self.thought.0 + text.len(), text.ends_with('\n')),
                Piece::Answer(text) => said.push_str(&text),
            }
        }
        match &mut self.answer {
            Answer::Only(_) if closed => {
                if !said.trim_start_matches('\n').is_empty() {
                    return Err(GuideError("an id closed the thought and began an answer".into()));
                }
                if self.queue.is_empty() {
                    self.queue.extend(self.forced.breaks(&said));
                }
                self.in_grammar = true;
            }
            Answer::Tools(grammar) if !self.splitter.is_thinking() && self.recent.ends_with(tools::OPEN) => {
                grammar.open_calls()?;
                self.in_grammar = true;
            }
            _ => (),
        }
        Ok(())
    }
}

impl Guide for ReplyGuide {
    fn next(&mut self) -> Result<Next<'_>, GuideError> {
        let inside = self.splitter.is_thinking();
        if self.queue.is_empty() && inside && self.thinking.budget.is_some_and(|budget| self.used >= budget) {
            self.queue.extend(self.forced.close(self.thought.0, self.thought.1));
        }
        if let Some(&id) = self.queue.front() {
            return Ok(Next::Only(id));
        }
        if self.in_grammar {
            return match &mut self.answer {
                Answer::Only(grammar) | Answer::Tools(grammar) => grammar.next(),
                Answer::Free => Ok(Next::Any),
            };
        }
        Ok(match &self.answer {
            Answer::Only(grammar) => match begun(&self.recent, think::CLOSE) {
                None => Next::Among(&grammar.vocabulary.thought),
                Some(missing) => {
                    self.mask.clone_from(&grammar.vocabulary.thought);
                    let past = grammar.vocabulary.past(missing);
                    past.filter(|(_, rest)| !ends_thought(rest)).for_each(|(id, _)| self.mask[id] = false);
                    Next::Among(&self.mask)
                }
            },
            // The tag has to end with an id, so that the grammar can begin with one.
            Answer::Tools(grammar) if !inside => {
                let vocabulary = &grammar.vocabulary;
                let begun = begun(&self.recent, tools::OPEN);
                if begun.is_none() && vocabulary.past_calls.is_empty() {
                    return Ok(Next::Any);
                }
                self.mask.clear();
                self.mask.resize(vocabulary.ends.len(), true);
                vocabulary.past_calls.iter().for_each(|&id| self.mask[id as usize] = false);
                for (id, _) in begun.into_iter().flat_map(|missing| vocabulary.past(missing)) {
                    self.mask[id] = false;
                }
                Next::Among(&self.mask)
            }
            _ => Next::Any,
        })
    }

    fn take(&mut self, id: u32) -> Result<(), GuideError> {
        match self.queue.pop_front() {
            Some(forced) if forced == id => (),
            Some(forced) => return Err(GuideError(format!("id {id} was drawn where only {forced} was allowed"))),
            None => {
                if let (Answer::Only(grammar) | Answer::Tools(grammar), true) = (&mut self.answer, self.in_grammar) {
                    return grammar.take(id);
                }
                self.used += usize::from(self.splitter.is_thinking());
            }
        }
        let text = self.text.push(id);
        self.read(&text)
    }
}

/// What is missing of a tag that `text` may have begun at its end.
fn begun<'a>(text: &str, tag: &'a str) -> Option<&'a str> {
    match overlap(text, tag) {
        0 => None,
        n => Some(&tag[n..]),
    }
}

#[cfg(test)]
mod tests;
