//! How much a model may think: its block of thought can be forced open, and is forced shut once a budget of ids is used
//! up. What is forced is written as M1 writes it itself.

use super::GuideError;
use crate::think::{NO_THINKING, Start};
use crate::tokenizer::Tokenizer;

/// Opens the block, as M1 does.
const OPENING: &str = "<think>\n";

/// What a reply may think.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Thinking {
    /// Where the prompt ends.
    pub start: Start,
    /// Whether `<think>` is forced, where the prompt ends outside; if not, the model decides.
    pub open: bool,
    /// The most ids that the model may draw inside the block; then the block is closed, if the model has not done so
    /// itself. With 0 it is closed as soon as it is open.
    pub budget: Option<usize>,
}

/// The ids that are forced.
#[derive(Debug, Clone)]
pub(super) struct Forced {
    pub(super) open: Vec<u32>,
    /// After a thought; after a thought's line; and for no thought at all, after the bare tag and after its line.
    close: [Vec<u32>; 4],
    /// What is missing after `</think>`: two line breaks, or one.
    breaks: [Vec<u32>; 2],
}

impl Forced {
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self, GuideError> {
        let ids = |text: &str| tokenizer.encode(text, false).map_err(|e| GuideError(e.to_string()));
        let nothing = &NO_THINKING[crate::think::OPEN.len()..];
        let close = ["\n</think>\n\n", "</think>\n\n", nothing, &nothing[1..]];
        let [a, b, c, d] = close.map(ids);
        Ok(Self { open: ids(OPENING)?, close: [a?, b?, c?, d?], breaks: [ids("\n\n")?, ids("\n")?] })
    }

    /// Closes a block with so many bytes of thought in it, which may end with a line break.
    pub(super) fn close(&self, thought: usize, ends_line: bool) -> &[u32] {
        &self.close[match (thought, ends_line) {
            (0, _) => 2,
            (1, true) => 3,
            (_, true) => 1,
            _ => 0,
        }]
    }

    /// What is missing where `rest` stands after the closing tag.
    pub(super) fn breaks(&self, rest: &str) -> &[u32] {
        match rest.len() {
            0 => &self.breaks[0],
            1 => &self.breaks[1],
            _ => &[],
        }
    }
}
