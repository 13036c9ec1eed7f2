//! What reinforcement learning is trained on, and for how long a response: tasks that grow harder as they are solved,
//! and a limit on length that grows as responses do.
//!
//! Different here: everything that was learned about the run so far is a value ([`CurriculumState`], [`WindowState`])
//! which goes into a checkpoint, and the next problem depends on (seed, index, that value) alone. So a resumed run
//! draws what the uninterrupted one would have drawn.

mod filter;
mod problems;
mod window;

pub use filter::PassRates;
pub use problems::{Curriculum, CurriculumSettings, CurriculumState, Level, TaskSettings};
pub use window::{WindowSettings, WindowState};

/// What can be wrong with the `[curriculum]` or `[window]` settings.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CurriculumError {
    /// A task that does not exist.
    #[error("curriculum.tasks: no task is called {name:?}; there are {known}")]
    UnknownTask {
        /// The name given.
        name: String,
        /// All names.
        known: String,
    },
    /// No task, or none with a weight above zero.
    #[error("curriculum.tasks: weights must be finite, 0 or above, and one of them above 0")]
    Weights,
    /// Difficulties out of range or order.
    #[error("curriculum.tasks.{task}: difficulties {min} to {max}, expected 1 <= min <= max <= 10")]
    Difficulties {
        /// The task.
        task: String,
        /// The lowest, as given.
        min: u8,
        /// The highest, as given.
        max: u8,
    },
    /// A setting out of its range.
    #[error("{field} = {value}: must be {expected}")]
    Range {
        /// Section and field.
        field: &'static str,
        /// What was given.
        value: f64,
        /// What would be right.
        expected: &'static str,
    },
    /// Lengths that are no rising row.
    #[error("window.lengths: must be one or more numbers of tokens, each above the one before, from 1")]
    Lengths,
    /// No problem on the training side.
    #[error("task {task}, difficulty {difficulty}: no training problem found at this difficulty or above")]
    NoProblem {
        /// The task.
        task: String,
        /// Where the search began.
        difficulty: u8,
    },
}

/// Refuses a number outside of what is expected.
fn in_range(field: &'static str, value: f64, good: bool, expected: &'static str) -> Result<(), CurriculumError> {
    if good { Ok(()) } else { Err(CurriculumError::Range { field, value, expected }) }
}
