//! The MiniMax-M1 architecture: configuration, modules, cache and checkpoints. This crate knows tokens as numbers and
//! nothing of text or sampling.
//!
//! Each file is one idea, named as the checkpoint names it, so that a tensor's name leads to its field.

pub mod batch;
pub mod cache;
pub mod checkpoint;
pub mod config;
pub mod decoder_layer;
pub mod device;
pub mod experts;
pub mod flops;
pub mod layers;
pub mod lightning_attention;
pub mod model;
pub mod softmax_attention;
pub mod trace;
pub mod weight;

pub use batch::Batch;
pub use cache::{BlockName, Cache, CacheError, Snapshot};
pub use config::{AttentionKind, ConfigError, ModelConfig};
pub use model::M1;
pub use trace::Trace;
