//! Ids in, ids and full-vocabulary log-probabilities out; nothing here knows text. A [`Session`] is one sequence, read and
//! continued in the plainest way; what the scheduler of [`crate::batching`] gives is held to it.

use crate::batching::pieces::piece_end;
use crate::guide::GuideError;
use crate::sampler::{Sampled, Sampler, SamplerError, log_probs};
use burn::tensor::{Device, Tensor};
use m1_model::{Batch, Cache, M1, ModelConfig, Trace};

/// Tokens read in one forward call of a prefill: bounds memory, and how long an interruption waits.
pub(crate) const PREFILL_CHUNK: usize = 512;

/// Why the engine can't go on. The session stays as it was, or holds a part of the prompt.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum EngineError {
    /// Nothing to continue from.
    #[error("the prompt is empty: at least one token is needed")]
    Empty,
    /// An id that the model has no row for.
    #[error("token {position} has id {id}, and the model's vocabulary ends at {}", vocab - 1)]
    UnknownId {
        /// Its place in the prompt, from 0.
        position: usize,
        /// The id.
        id: u32,
        /// Ids of the model.
        vocab: usize,
    },
    /// The prompt leaves no room for one more token.
    #[error("the text has {tokens} tokens and the context holds {context}: no room for a reply")]
    Context {
        /// Tokens of the prompt.
        tokens: usize,
        /// The most the context holds.
        context: usize,
    },
    /// The caller asked to stop during the prefill.
    #[error("stopped while reading the prompt")]
    Interrupted,
    /// A prefix that is no beginning of its prompt.
    #[error("the prefix has {prefix} tokens, and the prompt of {tokens} tokens does not begin with them")]
    Prefix {
        /// Tokens of the prefix.
        prefix: usize,
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// More than the memory for caches holds.
    #[error(
        "a text of up to {tokens} tokens needs {} MiB of cache, and there are {} MiB: a shorter prompt or fewer new tokens \
         would fit",
        needed.div_ceil(1 << 20), memory >> 20
    )]
    Memory {
        /// Tokens that the text may come to.
        tokens: usize,
        /// Bytes that they need.
        needed: u64,
        /// Bytes for all caches.
        memory: u64,
    },
    /// Nothing can be drawn.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// Nothing that may be drawn.
    #[error(transparent)]
    Guide(#[from] GuideError),
    /// The device gave no result.
    #[error("the device returned no logits: {0}")]
    Device(String),
}

/// A loaded model with its limits.
#[derive(Debug)]
pub struct Engine {
    model: M1,
    context: usize,
}

impl Engine {
    /// An engine whose sequences hold at most `context` tokens (`None`: the model's `max_position_embeddings`).
    pub fn new(model: M1, context: Option<usize>) -> Self {
        let limit = model.config().max_position_embeddings;
        Self { context: context.unwrap_or(limit), model }
    }

    /// The model.
    pub fn model(&self) -> &M1 {
        &self.model
    }

    /// Its configuration.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        self.model.device()
    }

    /// The most tokens that a sequence may have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// An empty sequence.
    pub fn session(&self) -> Session<'_> {
        let cache = Cache::new(self.model(), 1);
        Session { engine: self, cache, logits: Vec::new() }
    }
}

/// What a prefill cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Prefill {
    /// Tokens that were there already.
    pub cached: usize,
    /// Tokens that were read.
    pub computed: usize,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended its turn with this id.
    End(u32),
    /// As many tokens as allowed were made.
    Length,
    /// The context is full.
    Context,
    /// The caller wanted no more.
    Stopped,
}

/// One sequence and its cache.
#[derive(Debug)]
pub struct Session<'a> {
    engine: &'a Engine,
    cache: Cache,
    /// Logits after the last token of the cache; empty where they were not asked for.
    logits: Vec<f32>,
}

impl Session<'_> {
    /// The ids in the cache.
    pub fn tokens(&self) -> &[u32] {
        self.cache.tokens(0)
    }

    /// Raw logits `[vocab]` of what follows; empty before the first [`Session::read`].
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// log-softmax of [`Session::logits`], over the whole vocabulary.
    pub fn log_probs(&self) -> Vec<f32> {
        log_probs(&self.logits)
    }

    /// Makes the cache hold exactly `ids` and the logits those of what follows. If `ids` begin with what is there, only the
    /// rest is read; if not, all (a lightning state cannot be trimmed). Between chunks `go_on(read, to_read)` may stop it: the cache then holds a beginning of `ids`, to be continued later.
    pub fn read(&mut self, ids: &[u32], go_on: &mut dyn FnMut(usize, usize) -> bool) -> Result<Prefill, EngineError> {
        let (vocab, context) = (self.engine.config().vocab_size, self.engine.context);
        if ids.is_empty() {
            return Err(EngineError::Empty);
        }
        if let Some(position) = ids.iter().position(|&id| id as usize >= vocab) {
            return Err(EngineError::UnknownId { position, id: ids[position], vocab });
        }
        if ids.len() >= context {
            return Err(EngineError::Context { tokens: ids.len(), context });
        }
        // At the very end of `ids` a state is of use only with its logits.
        let here = self.tokens().len();
        if !ids.starts_with(self.tokens()) || here == ids.len() && self.logits.is_empty() {
            self.cache = Cache::new(self.engine.model(), 1);
            self.logits.clear();
        }
        let cached = self.tokens().len();
        let (mut start, computed) = (cached, ids.len() - cached);
        while start < ids.len() {
            if !go_on(start - cached, computed) {
                return Err(EngineError::Interrupted);
            }
            let end = piece_end(start, ids.len(), PREFILL_CHUNK);
            self.forward(&ids[start..end], end == ids.len())?;
            start = end;
        }
        Ok(Prefill { cached, computed })
    }

    /// Draws ids until the model ends its turn, `max_new` are made, the context is full or `on_id` returns false.
    /// An end id is not handed to `on_id`. The last id drawn is left for the next [`Session::read`] to read.
    pub fn generate(
        &mut self,
        sampler: &mut Sampler,
        end_ids: &[u32],
        max_new: Option<usize>,
        on_id: &mut dyn FnMut(Sampled) -> bool,
    ) -> Result<Finish, EngineError> {
        if self.logits.is_empty() {
            return Err(EngineError::Empty);
        }
        let max_new = max_new.unwrap_or(usize::MAX);
        for made in 1.. {
            if made > max_new {
                break;
            }
            if self.tokens().len() >= self.engine.context {
                return Ok(Finish::Context);
            }
            let drawn = sampler.sample(&self.logits, self.cache.tokens(0))?;
            if end_ids.contains(&drawn.id) {
                return Ok(Finish::End(drawn.id));
            }
            if !on_id(drawn) {
                return Ok(Finish::Stopped);
            }
            if made < max_new {
                self.forward(&[drawn.id], true)?;
            }
        }
        Ok(Finish::Length)
    }

    /// Runs `ids` through the model, onto the cache.
    fn forward(&mut self, ids: &[u32], want_logits: bool) -> Result<(), EngineError> {
        let batch = Batch::new(vec![ids.to_vec()]);
        let batch = if want_logits { batch.last() } else { batch.none() };
        let model = &self.engine.model;
        self.logits.clear();
        let hidden = model.forward(&batch, Some(&mut self.cache), &mut Trace::none());
        if want_logits {
            self.logits = to_host(model.logits(hidden))?;
        }
        Ok(())
    }
}

/// A tensor's values, as f32, on the host.
pub(crate) fn to_host(tensor: Tensor<2>) -> Result<Vec<f32>, EngineError> {
    tensor.into_data().convert::<f32>().try_into_vec::<f32>().map_err(|e| EngineError::Device(format!("{e:?}")))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sampler::SamplingOptions;

    /// Three layers with random weights, always the same.
    pub(crate) fn tiny(vocab_size: usize, context: usize) -> Engine {
        let device = Device::flex();
        device.seed(3);
        let config = ModelConfig {
            vocab_size,
            hidden_size: 32,
            num_hidden_layers: 3,
            attn_type_list: vec![0, 1, 0],
            num_local_experts: 2,
            ..ModelConfig::preset("nano").unwrap()
        };
        Engine::new(M1::new(&config, &device), Some(context))
    }

    fn prompt(n: u32, salt: u32) -> Vec<u32> {
        (0..n).map(|i| (i * 17 + salt * 5 + i * i % 7) % 96).collect()
    }

    fn close(a: &[f32], b: &[f32]) {
        assert_eq!(a.len(), b.len());
        let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-4, "logits differ by {worst}");
    }

    fn fresh(engine: &Engine, ids: &[u32]) -> Vec<f32> {
        let mut session = engine.session();
        session.read(ids, &mut |_, _| true).unwrap();
        session.logits().to_vec()
    }

    #[test]
    fn only_what_is_new_is_read_and_the_logits_are_those_of_a_fresh_run() {
        let engine = tiny(96, 4000);
        let mut session = engine.session();
        let mut go = |_: usize, _: usize| true;
        let (a, b) = (prompt(40, 1), prompt(30, 2));
        assert_eq!(session.read(&a, &mut go), Ok(Prefill { cached: 0, computed: 40 }));
        let ab = [a.clone(), b.clone()].concat();
        assert_eq!(session.read(&ab, &mut go), Ok(Prefill { cached: 40, computed: 30 }));
        close(session.logits(), &fresh(&engine, &ab));
        // The same again: nothing to do, same logits.
        assert_eq!(session.read(&ab, &mut go), Ok(Prefill { cached: 70, computed: 0 }));
        close(session.logits(), &fresh(&engine, &ab));
        // Another continuation of `a`, `a` itself: a state cannot be trimmed, so everything is read again.
        let ac = [a.clone(), prompt(9, 3)].concat();
        assert_eq!(session.read(&ac, &mut go), Ok(Prefill { cached: 0, computed: 49 }));
        close(session.logits(), &fresh(&engine, &ac));
        assert_eq!(session.read(&a, &mut go), Ok(Prefill { cached: 0, computed: 40 }));
        close(session.logits(), &fresh(&engine, &a));
    }

    #[test]
    fn a_reply_stays_in_the_cache() {
        let engine = tiny(96, 4000);
        let mut session = engine.session();
        let mut text = prompt(20, 4);
        session.read(&text, &mut |_, _| true).unwrap();
        let greedy = SamplingOptions { temperature: 0.0, ..SamplingOptions::default() };
        let mut sampler = Sampler::new(greedy, None).unwrap();
        let mut reply = Vec::new();
        let finish = session.generate(&mut sampler, &[], Some(12), &mut |s| {
            reply.push(s.id);
            true
        });
        assert_eq!((finish, reply.len()), (Ok(Finish::Length), 12));
        text.extend(&reply);
        text.extend(prompt(5, 5));
        // 20 of the prompt and 11 of the reply are there; the reply's last id was never read.
        assert_eq!(session.read(&text, &mut |_, _| true), Ok(Prefill { cached: 31, computed: 6 }));
        close(session.logits(), &fresh(&engine, &text));
    }

    #[test]
    fn an_interrupted_prefill_is_continued() {
        let engine = tiny(96, 4000);
        let mut session = engine.session();
        let ids = prompt(1200, 6);
        let mut calls = 0;
        let stopped = session.read(&ids, &mut |_, _| {
            calls += 1;
            calls < 3
        });
        assert_eq!(stopped, Err(EngineError::Interrupted));
        assert_eq!(session.read(&ids, &mut |_, _| true), Ok(Prefill { cached: 1024, computed: 176 }));
        close(session.logits(), &fresh(&engine, &ids));
    }

    #[test]
    fn ends_limits_and_mistakes() {
        let engine = tiny(96, 24);
        let mut session = engine.session();
        let mut go = |_: usize, _: usize| true;
        let mut sampler = Sampler::new(SamplingOptions { seed: Some(1), ..SamplingOptions::default() }, None).unwrap();
        assert_eq!(session.read(&[], &mut go), Err(EngineError::Empty));
        assert_eq!(session.generate(&mut sampler, &[], None, &mut |_| true), Err(EngineError::Empty));
        assert_eq!(session.read(&[1, 96], &mut go), Err(EngineError::UnknownId { position: 1, id: 96, vocab: 96 }));
        assert_eq!(session.read(&prompt(24, 1), &mut go), Err(EngineError::Context { tokens: 24, context: 24 }));
        session.read(&prompt(20, 1), &mut go).unwrap();
        let sum: f32 = session.log_probs().iter().map(|l| l.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-4);
        let mut made = 0;
        let all: Vec<u32> = (0..96).collect();
        assert!(matches!(session.generate(&mut sampler, &all, None, &mut |_| true), Ok(Finish::End(_))));
        let finish = session.generate(&mut sampler, &[], None, &mut |_| {
            made += 1;
            true
        });
        assert_eq!((finish, made), (Ok(Finish::Context), 4));
        session.read(&prompt(10, 1), &mut go).unwrap();
        assert_eq!(session.generate(&mut sampler, &[], Some(5), &mut |_| false), Ok(Finish::Stopped));
        assert_eq!(session.generate(&mut sampler, &[], Some(0), &mut |_| true), Ok(Finish::Length));
    }
}
