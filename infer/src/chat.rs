//! A conversation: messages in, streamed replies out. The ids that the model produced stay as they are (a reply is never
//! tokenized again), so that every turn's prompt begins with what the cache already holds.

use crate::assets::Assets;
use crate::engine::{EngineError, Finish, Session};
use crate::prompt::{Line, PromptError, Prompter};
use crate::sampler::{Sampler, SamplerError, SamplingOptions};
use crate::stream::TextStream;
use crate::template::TemplateError;
use crate::think::NO_THINKING;
use crate::tokenizer::TokenizerError;
use serde::{Deserialize, Serialize};
use serde_json::json;
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
    /// The ids of the conversation.
    #[error(transparent)]
    Prompt(#[from] PromptError),
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
        write!(f, "prompt {} tokens ({} cached, {} read", self.cached + self.computed, self.cached, self.computed)?;
        if self.computed > 0 {
            write!(f, " at {:.0} tokens/s", rate(self.computed, self.first_token))?;
        }
        write!(f, "), first token after {:.3} s, reply {} tokens", self.first_token.as_secs_f64(), self.made)?;
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
    prompter: Prompter,
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
            prompter: Prompter::new(&assets.tokenizer)?,
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
            let (tokenizer, vocab) = (&self.assets.tokenizer, self.assets.engine.config().vocab_size);
            let ours = |ids: &Vec<u32>| {
                ids.iter().all(|&id| (id as usize) < vocab) && tokenizer.decode(ids) == message.content
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

    /// Begins the random stream of `seed` anew.
    pub fn reseed(&mut self, seed: u64) {
        self.sampler.reseed(seed);
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
        self.messages.push(Message { role: "user".into(), content: text.into(), ids: None });
        let read = self.prompt().and_then(|ids| Ok(self.session.read(&ids, &mut |_, _| go_on())?));
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
        let mut stream = TextStream::new(&*self.assets.tokenizer);
        let mut failed = None;
        let mut first_token = None;
        let finish = self.session.generate(&mut self.sampler, &self.assets.end_ids, self.max_new, &mut |drawn| {
            first_token.get_or_insert_with(|| start.elapsed());
            ids.push(drawn.id);
            let piece = stream.push(drawn.id);
            reply.push_str(&piece);
            failed = if piece.is_empty() { None } else { show(&piece).err() };
            failed.is_none() && go_on()
        });
        let rest = stream.finish();
        reply.push_str(&rest);
        let made = ids.len() - given_ids;
        let first_token = first_token.unwrap_or_else(|| start.elapsed());
        let decode = start.elapsed().saturating_sub(first_token);
        let stats = Stats { cached: prefill.cached, computed: prefill.computed, made, first_token, decode };
        // Said is said: whatever ended the reply, it stays in the conversation.
        let said = reply[given..].to_string();
        self.messages.push(Message { role: "assistant".into(), content: reply, ids: Some(ids) });
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
        Ok(Turn { text: said, finish, stats })
    }

    /// The ids of the conversation up to where the model's turn begins.
    fn prompt(&self) -> Result<Vec<u32>, ChatError> {
        let system = self.system.iter().map(|text| Line::from(json!({"role": "system", "content": text})));
        let said = self.messages.iter().map(|Message { role, content, ids }| Line {
            message: json!({"role": role, "content": content}),
            ids: ids.clone(),
        });
        let lines: Vec<Line> = system.chain(said).collect();
        Ok(self.prompter.build(&self.assets.tokenizer, &lines, &[], self.thinking)?.ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::tiny;
    use crate::generation_config::GenerationConfig;
    use crate::template::Template;
    use crate::tokenizer::tests::byte_level;

    const TOKENS: [&str; 5] =
        ["<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>", "<think>", "</think>"];

    /// The directory goes with it: the template is read when a chat begins.
    fn assets(template: &str) -> (tempfile::TempDir, Assets) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
        let tokenizer = byte_level(dir.path(), &TOKENS).into();
        let generation = GenerationConfig::default();
        let (engine, end_ids) = (tiny(272, 400), vec![258]);
        (dir, Assets { engine, tokenizer, generation, end_ids })
    }

    fn message(role: &str, content: &str, ids: Option<Vec<u32>>) -> Message {
        Message { role: role.into(), content: content.into(), ids }
    }

    fn chat(assets: &Assets) -> Chat<'_> {
        let options = SamplingOptions { seed: Some(1), ..SamplingOptions::default() };
        Chat::new(assets, options).unwrap()
    }

    #[test]
    fn a_replys_ids_are_never_made_from_its_text() {
        let (_dir, assets) = assets(include_str!("../tests/data/chat_template.jinja"));
        let mut chat = chat(&assets);
        // A hidden token in the middle: the text alone would not bring it back.
        let ids = vec![104, 257, 105];
        let past = [message("user", "q", None), message("assistant", "hi", Some(ids.clone()))];
        chat.set_messages([&past[..], &[message("user", "hi", None)]].concat());
        let prompt = chat.prompt().unwrap();
        let encode = |text: &str| assets.tokenizer.encode(text, false).unwrap();
        let start = "<begin_of_document><beginning_of_sentence>user name=user\nq<end_of_sentence>\n\
            <beginning_of_sentence>ai name=assistant\n";
        let end = "<end_of_sentence>\n<beginning_of_sentence>user name=user\nhi<end_of_sentence>\n\
            <beginning_of_sentence>ai name=assistant\n";
        assert_eq!(prompt, [encode(start), ids, encode(end)].concat());
        // A new system prompt changes what comes before, not the reply.
        chat.system = Some("s".into());
        let prompt = chat.prompt().unwrap();
        assert!(prompt.windows(3).any(|ids| ids == [104, 257, 105]));
        // Ids that say something else are not believed.
        chat.set_messages(vec![message("assistant", "hi", Some(vec![104, 104]))]);
        assert_eq!(chat.messages()[0].ids, None);
        chat.set_messages(vec![message("assistant", "", Some(vec![5000]))]);
        assert_eq!(chat.messages()[0].ids, None);
    }

    #[test]
    fn special_tokens_that_others_write_are_plain_text() {
        let (_dir, assets) = assets(include_str!("../tests/data/chat_template.jinja"));
        let mut chat = chat(&assets);
        chat.system = Some("s<end_of_sentence>".into());
        chat.set_messages(vec![
            message("user", "a<end_of_sentence>b", None),
            message("assistant", "hi", Some(vec![104, 257, 105])),
            message("user", "c", None),
        ]);
        let special = |ids: &[u32]| ids.iter().filter(|&&id| id == 258).count();
        let prompt = chat.prompt().unwrap();
        assert_eq!(special(&prompt), 4, "one after each message");
        assert!(prompt.windows(3).any(|ids| ids == [104, 257, 105]));
        let shown: Vec<u32> = prompt.iter().copied().filter(|&id| id < 256).collect();
        assert!(assets.tokenizer.decode(&shown).contains("a<end_of_sentence>b"));
        // Also where the template alters the replies.
        let source = "{% for m in messages %}{{ m['content'] | replace('hi', 'ho') }}|{% endfor %}";
        chat.prompter = Prompter::with_template(&assets.tokenizer, Template::new(source).unwrap());
        assert_eq!(special(&chat.prompt().unwrap()), 0);
    }

    #[test]
    fn a_template_that_alters_replies_is_obeyed() {
        let (_dir, assets) = assets("{% for m in messages %}{{ m['content'] | replace('i', 'o') }}|{% endfor %}");
        let mut chat = chat(&assets);
        chat.set_messages(vec![message("assistant", "hi", Some(vec![104, 257, 105]))]);
        assert_eq!(chat.prompt().unwrap(), assets.tokenizer.encode("ho|", false).unwrap());
    }

    #[test]
    fn a_turn_is_kept_or_undone_as_a_whole() {
        let (_dir, assets) = assets(include_str!("../tests/data/chat_template.jinja"));
        let mut chat = chat(&assets);
        let stop = chat.say("a", &|| false, &mut |_| Ok(()));
        assert!(matches!(stop, Err(ChatError::Engine(EngineError::Interrupted))));
        assert_eq!(chat.messages(), []);
        let long = "x".repeat(400);
        let error = chat.say(&long, &|| true, &mut |_| Ok(())).unwrap_err();
        assert!(matches!(error, ChatError::Engine(EngineError::Context { context: 400, .. })));
        assert_eq!(chat.messages(), []);
        chat.max_new = Some(30);
        let mut shown = String::new();
        let turn = chat.say("a", &|| true, &mut |text| {
            shown.push_str(text);
            Ok(())
        });
        let turn = turn.unwrap();
        assert_eq!(turn.text, shown);
        assert_eq!(chat.messages().len(), 2);
        assert_eq!(chat.messages()[1].content, shown);
        let ids = chat.messages()[1].ids.clone().unwrap();
        assert_eq!(ids.len(), turn.stats.made);
        // Whoever listens goes away: that is told, and what was said stays.
        let gone = chat.say("b", &|| true, &mut |_| Err(std::io::ErrorKind::BrokenPipe.into()));
        assert!(matches!(gone, Err(ChatError::Output(_))));
        assert_eq!(chat.messages().len(), 4);
    }

    #[test]
    fn a_reply_counts_against_its_own_limit_without_the_block_of_no_thought() {
        let (_dir, assets) = assets(include_str!("../tests/data/chat_template.jinja"));
        let mut chat = chat(&assets);
        (chat.thinking, chat.max_new) = (false, Some(4));
        let turn = chat.say("a", &|| true, &mut |_| Ok(())).unwrap();
        assert!(turn.stats.made <= 4 && !turn.text.contains("<think>"));
        assert_eq!(chat.messages()[1].content, format!("{NO_THINKING}{}", turn.text));
    }
}
