//! What a sequence may say next, where not everything is allowed: a grammar, a budget of thought. A guide looks at the
//! ids as they are drawn and knows nothing of the model; it runs on the thread that draws.

mod grammar;
mod reply;
mod thinking;

pub use grammar::{Grammar, Grammars, MOST_CALLS};
pub use reply::{Answer, ReplyGuide};
pub use thinking::Thinking;

/// Which ids may be drawn next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next<'a> {
    /// Any that exists.
    Any,
    /// Those whose entry is true; ids beyond the end are not allowed.
    Among(&'a [bool]),
    /// This one and no other.
    Only(u32),
}

/// A guide that can't go on: nothing is allowed, or its grammar refused an id that it had allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GuideError(pub String);

/// Decides, id by id, what may be drawn.
pub trait Guide: std::fmt::Debug + Send {
    /// What may be drawn next. Called once before every draw.
    fn next(&mut self) -> Result<Next<'_>, GuideError>;

    /// Takes the id that was drawn.
    fn take(&mut self, id: u32) -> Result<(), GuideError>;
}
