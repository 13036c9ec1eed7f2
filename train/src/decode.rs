//! Many replies at once: a batch of prompts decoded together, each row leaving the batch when it ends.
//!
//! Different here: a row draws from a generator of its own, so its reply does not depend on which prompts share its batch.

use m1_infer::sampler::{Sampler, SamplerError, SamplingOptions};
use m1_model::batch::Batch;
use m1_model::cache::Cache;
use m1_model::model::M1;
use m1_model::trace::Trace;

/// How replies are drawn and ended.
#[derive(Debug, Clone)]
pub struct DecodeOptions {
    /// Sampling; its seed is replaced by each prompt's own.
    pub sampling: SamplingOptions,
    /// Ids that may be drawn; `None` allows all.
    pub allowed: Option<Vec<bool>>,
    /// Ids that end a reply.
    pub end_ids: Vec<u32>,
    /// A reply is cut after so many tokens.
    pub max_new_tokens: usize,
}

/// A prompt and the seed of its draws.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Token ids, at least one.
    pub ids: Vec<u32>,
    /// Seed of this reply.
    pub seed: u64,
}

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Token ids, without the one that ended it.
    pub ids: Vec<u32>,
    /// Whether the model ended it, rather than `max_new_tokens`.
    pub ended: bool,
}

struct Row {
    prompt: usize,
    sampler: Sampler,
    reply: Vec<u32>,
}

/// Replies to all prompts, in their order, decoded as one batch.
pub fn decode(model: &M1, prompts: &[Prompt], options: &DecodeOptions) -> Result<Vec<Reply>, SamplerError> {
    let mut replies: Vec<Option<Reply>> = vec![None; prompts.len()];
    let mut rows = Vec::with_capacity(prompts.len());
    for (prompt, p) in prompts.iter().enumerate() {
        let sampling = SamplingOptions { seed: Some(p.seed), ..options.sampling.clone() };
        let sampler = Sampler::new(sampling, options.allowed.clone())?;
        let reply = Vec::new();
        rows.push(Row { prompt, sampler, reply });
    }
    let mut cache = Cache::new(model.config(), rows.len(), &model.device());
    let mut next: Vec<Vec<u32>> = prompts.iter().map(|p| p.ids.clone()).collect();
    while !rows.is_empty() {
        let batch = Batch::new(std::mem::take(&mut next)).last();
        let hidden = model.forward(&batch, Some(&mut cache), &mut Trace::none());
        let logits: Vec<f32> = model.logits(hidden).into_data().iter::<f32>().collect();
        let vocab = model.config().vocab_size;
        let mut kept = Vec::with_capacity(rows.len());
        let mut going = Vec::with_capacity(rows.len());
        for (i, (mut row, logits)) in rows.into_iter().zip(logits.chunks_exact(vocab)).enumerate() {
            let id = row.sampler.sample(logits, &row.reply)?.id;
            let ended = options.end_ids.contains(&id);
            if !ended {
                row.reply.push(id);
            }
            if ended || row.reply.len() >= options.max_new_tokens {
                replies[row.prompt] = Some(Reply { ids: row.reply, ended });
            } else {
                kept.push(i);
                next.push(vec![id]);
                going.push(row);
            }
        }
        if kept.len() < cache.rows() {
            cache.select(&kept);
        }
        rows = going;
    }
    Ok(replies.into_iter().flatten().collect())
}
