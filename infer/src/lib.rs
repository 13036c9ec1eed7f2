//! Tokens in, tokens out: the engine that knows no text, the text around it (tokenizer, chat template, streaming,
//! thinking), and the command line `m1`.

/// Writes a line to standard error; unlike `eprintln!` it does not panic where nobody reads any more.
macro_rules! note {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}

pub mod allocator;
pub mod assets;
pub mod batching;
pub mod chat;
pub mod cli;
pub mod engine;
pub mod files;
pub mod generation_config;
pub mod guide;
pub mod history;
pub mod hub;
pub mod interrupt;
pub mod memory;
mod parallel;
pub mod progress;
pub mod prompt;
pub mod render;
pub mod repl;
pub mod reply;
pub mod sampler;
pub mod server;
pub mod statistics;
pub mod stop;
pub mod stream;
pub mod template;
pub mod think;
pub mod tokenizer;
pub mod tools;

pub use assets::{Assets, LoadSettings};
pub use batching::{BatchSettings, Batcher};
pub use chat::Chat;
pub use engine::{Engine, Session};
pub use m1_model::device::DeviceChoice;
pub use sampler::{Sampler, SamplingOptions};
pub use tokenizer::Tokenizer;
