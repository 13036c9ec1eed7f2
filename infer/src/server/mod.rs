//! `m1 serve`: many conversations at once on one model, over OpenAI's API.

pub mod worker;
