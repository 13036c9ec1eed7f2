//! Training of MiniMax-M1 models: tasks with verifiers, conversations made from them, the trainer, evaluation.

pub mod cli;
pub mod conversation;
pub mod curriculum;
pub mod data;
pub mod decode;
pub mod eval;
pub mod eval_loss;
pub mod gradient_checkpointing;
pub mod jsonl;
pub mod loss;
pub mod metrics;
pub mod optimizer;
pub mod parameters;
pub mod plot;
pub mod report;
pub mod reward;
pub mod run;
pub mod schedule;
pub mod sft;
pub mod small_talk;
pub mod supervised;
pub mod tasks;
pub mod tokenizer;
pub mod trainer;
pub mod view;
