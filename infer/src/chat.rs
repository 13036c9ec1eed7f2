//! A conversation: messages in, streamed replies out. The ids that the model produced stay as they are (a reply is never
//! tokenized again), so that every turn's prompt begins with what the cache already holds.

use crate::assets::Assets;
use crate::engine::{EngineError, Finish, Session};
use crate::sampler::{Sampler, SamplerError, SamplingOptions};
use crate::stream::TextStream;
use crate::template::{Template, TemplateError};
use crate::think::NO_THINKING;
use crate::tokenizer::TokenizerError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Why a turn can't be taken. The conversation is as it was before the turn.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The engine: a full context, an interruption.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The sampling settings.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// The reply can't be shown; its reader went away, perhaps.
    #[error("the reply cannot be written")]
    Output(#[from] std::io::Error),
}

/// One message. `ids` are what the model produced, for its own messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
    /// The ids of an assistant's text, as they were sampled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ids: Option<Vec<u32>>,
}

/// What a turn cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Prompt tokens found in the cache.
    pub cached: usize,
    /// Prompt tokens read.
    pub computed: usize,
    /// Tokens made.
    pub made: usize,
    /// From the question to the first token (with the prefill).
    pub first_token: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

impl std::fmt::Display for Stats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rate = |n: usize, time: Duration| n as f64 / time.as_secs_f64().max(1e-9);
        write!(
            f,
            "prompt {} tokens ({} cached, {} read",
            self.cached + self.computed,
            self.cached,
            self.computed
        )?;
        if self.computed > 0 {
            write!(
                f,
                " at {:.0} tokens/s",
                rate(self.computed, self.first_token)
            )?;
        }
        write!(
            f,
            "), first token after {:.3} s, reply {} tokens",
            self.first_token.as_secs_f64(),
            self.made
        )?;
        // The first token comes with the prefill: n tokens are n - 1 steps.
        if self.made > 1 {
            write!(f, " at {:.1} tokens/s", rate(self.made - 1, self.decode))?;
        }
        Ok(())
    }
}

/// A reply that has ended.
#[derive(Debug, Clone)]
pub struct Turn {
    /// The model's text, thinking and tags included.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// What it cost.
    pub stats: Stats,
}

/// A conversation with its cache.
pub struct Chat<'a> {
    assets: &'a Assets,
    template: Template,
    session: Session<'a>,
    sampler: Sampler,
    messages: Vec<Message>,
    /// The system prompt; may be changed between turns (which makes the next turn read everything again).
    pub system: Option<String>,
    /// Whether the model may think; if not, its turn begins with an empty block of thought.
    pub thinking: bool,
    /// The most tokens of one reply; `None`: as the context allows.
    pub max_new: Option<usize>,
}

impl<'a> Chat<'a> {
    /// An empty conversation with the checkpoint's template, sampled as `options` say.
    pub fn new(assets: &'a Assets, options: SamplingOptions) -> Result<Self, ChatError> {
        Ok(Self {
            template: assets.tokenizer.template()?,
            session: assets.engine.session(),
            sampler: assets.sampler(options)?,
            messages: Vec::new(),
            system: None,
            thinking: true,
            max_new: assets.generation.max_new_tokens,
            assets,
        })
    }

    /// What was said, without the system prompt.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Puts another past in the place of this one. Ids that this model does not have are dropped: that text is then
    /// tokenized anew.
    pub fn set_messages(&mut self, mut messages: Vec<Message>) {
        for message in &mut messages {
            let (tokenizer, vocab) = (
                &self.assets.tokenizer,
                self.assets.engine.config().vocab_size,
            );
            let ours = |ids: &Vec<u32>| {
                ids.iter().all(|&id| (id as usize) < vocab)
                    && tokenizer.decode(ids) == message.content
            };
            message.ids = message.ids.take().filter(ours);
        }
        self.messages = messages;
    }

    /// Forgets what was said; the system prompt stays.
    pub fn clear(&mut self) {
        self.messages.clear();
    }

    /// The checkpoint.
    pub fn assets(&self) -> &Assets {
        self.assets
    }

    /// The sampling settings.
    pub fn sampling(&self) -> &SamplingOptions {
        self.sampler.options()
    }

    /// Changes the sampling settings.
    pub fn set_sampling(&mut self, options: SamplingOptions) -> Result<(), ChatError> {
        Ok(self.sampler.set_options(options)?)
    }

    /// Tokens and bytes in the cache.
    pub fn cache(&self) -> (usize, u64) {
        (self.session.tokens().len(), self.session.bytes())
    }

    /// Says `text` as the user and streams the reply to `show`. `go_on` is asked between steps: when it returns false
    /// the reply ends there and what was said of it stays. If the prompt can't be read the conversation stays as it was.
    pub fn say(
        &mut self,
        text: &str,
        go_on: &dyn Fn() -> bool,
        show: &mut dyn FnMut(&str) -> std::io::Result<()>,
    ) -> Result<Turn, ChatError> {
        let start = Instant::now();
        self.messages.push(Message {
            role: "user".into(),
            content: text.into(),
            ids: None,
        });
        let read = self
            .prompt()
            .and_then(|ids| Ok(self.session.read(&ids, &mut |_, _| go_on())?));
        let prefill = match read {
            Ok(prefill) => prefill,
            Err(error) => {
                self.messages.pop();
                return Err(error);
            }
        };

        let (mut reply, mut ids) = (String::new(), Vec::new());
        if !self.thinking {
            ids = self.assets.tokenizer.encode(NO_THINKING, false)?;
            reply.push_str(NO_THINKING);
        }
        let (given, given_ids) = (reply.len(), ids.len());
        let mut stream = TextStream::new(&self.assets.tokenizer);
        let mut failed = None;
        let mut first_token = None;
        let finish = self.session.generate(
            &mut self.sampler,
            &self.assets.end_ids,
            self.max_new,
            &mut |drawn| {
                first_token.get_or_insert_with(|| start.elapsed());
                ids.push(drawn.id);
                let piece = stream.push(drawn.id);
                reply.push_str(&piece);
                failed = if piece.is_empty() {
                    None
                } else {
                    show(&piece).err()
                };
                failed.is_none() && go_on()
            },
        );
        let rest = stream.finish();
        reply.push_str(&rest);
        let made = ids.len() - given_ids;
        let first_token = first_token.unwrap_or_else(|| start.elapsed());
        let decode = start.elapsed().saturating_sub(first_token);
        let stats = Stats {
            cached: prefill.cached,
            computed: prefill.computed,
            made,
            first_token,
            decode,
        };
        // Said is said: whatever ended the reply, it stays in the conversation.
        let said = reply[given..].to_string();
        self.messages.push(Message {
            role: "assistant".into(),
            content: reply,
            ids: Some(ids),
        });
        let finish = match finish {
            Ok(finish) => finish,
            Err(error) => {
                self.messages.truncate(self.messages.len() - 2);
                return Err(error.into());
            }
        };
        if let Some(error) = failed {
            return Err(error.into());
        }
        if !rest.is_empty() {
            show(&rest)?;
        }
        Ok(Turn {
            text: said,
            finish,
            stats,
        })
    }

    /// The ids of the conversation up to where the model's turn begins.
    fn prompt(&self) -> Result<Vec<u32>, ChatError> {
        let system = self
            .system
            .iter()
            .map(|text| json!({"role": "system", "content": text}));
        let plain = |m: &Message| json!({"role": m.role, "content": m.content});
        let messages: Vec<Value> = system
            .clone()
            .chain(self.messages.iter().map(plain))
            .collect();
        let rendered = self.template.render(&messages, &[], true, false)?;

        // Render again with a marker in place of each reply, to find where the replies' own ids belong. A template that
        // does something to the replies (leaves old thinking out, say) shows in the comparison: then its text counts.
        let marker = |i: usize| format!("\u{e000}reply {i}\u{e001}");
        let replies: Vec<(String, &Message)> = self
            .messages
            .iter()
            .filter(|m| m.ids.is_some())
            .enumerate()
            .map(|(i, m)| (marker(i), m))
            .collect();
        let mut next = 0;
        let marked = self.messages.iter().map(|m| match &m.ids {
            Some(_) => {
                next += 1;
                json!({"role": m.role, "content": marker(next - 1)})
            }
            None => plain(m),
        });
        let marked: Vec<Value> = system.chain(marked).collect();
        let frame = self.template.render(&marked, &[], true, false)?;

        let tokenizer = &self.assets.tokenizer;
        let (mut ids, mut text, mut rest) = (Vec::new(), String::new(), frame.as_str());
        let mut whole = true;
        for (marker, message) in &replies {
            let Some((before, after)) = rest.split_once(marker.as_str()) else {
                whole = false;
                break;
            };
            text += before;
            text += &message.content;
            ids.extend(tokenizer.encode(before, false)?);
            ids.extend(message.ids.iter().flatten());
            rest = after;
        }
        if whole && text + rest == rendered {
            ids.extend(tokenizer.encode(rest, false)?);
        } else {
            ids = tokenizer.encode(&rendered, false)?;
        }
        if !self.thinking {
            ids.extend(tokenizer.encode(NO_THINKING, false)?);
        }
        Ok(ids)
    }
}
