//! Training of MiniMax-M1 models: tasks with verifiers, conversations made from them, the trainer, evaluation.

pub mod cli;
pub mod conversation;
pub mod data;
pub mod eval;
pub mod generate;
pub mod metrics;
pub mod mismatch;
pub mod optimizer;
pub mod parameters;
pub mod plot;
pub mod pretrain;
pub mod rollout;
pub mod run;
pub mod schedule;
pub mod small_talk;
pub mod tasks;
pub mod tokenizer;
pub mod trainer;
