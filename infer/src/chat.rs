//! A conversation: messages in, streamed replies out. The ids that the model produced stay as they are (a reply is never
//! tokenized again), so that every turn's prompt begins with what the cache already holds.

use crate::assets::Assets;
use crate::batching::scheduler::{Choice, Job, Scheduler, SchedulerSettings, Update};
use crate::batching::{BatchSettings, JobId};
use crate::engine::{EngineError, Finish};
use crate::prompt::{Line, Prompt, PromptError, Prompter};
use crate::sampler::{Sampler, SamplerError, SamplingOptions};
use crate::stream::TextStream;
use crate::template::TemplateError;
use crate::think::NO_THINKING;
use crate::tokenizer::TokenizerError;
use m1_model::Cache;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::time::{Duration, Instant};

/// Bytes for what is kept of conversations that were left, at least.
const CACHE_BYTES: u64 = 1 << 30;

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

/// Where a turn stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The conversation is being read.
    Reading {
        /// Tokens of it that are in the cache.
        read: usize,
        /// All of them.
        total: usize,
    },
    /// The model speaks.
    Replying,
}

/// A conversation on an engine of its own.
pub struct Chat<'a> {
    assets: &'a Assets,
    prompter: Prompter,
    scheduler: Scheduler<'a>,
    /// The settings and the seed. Each reply is drawn by a copy.
    sampler: Sampler,
    /// Replies since the seed was set.
    replies: u64,
    messages: Vec<Message>,
    /// Tokens of the conversation when it was last read.
    tokens: usize,
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
            scheduler: scheduler(assets),
            sampler: assets.sampler(options)?,
            replies: 0,
            messages: Vec::new(),
            tokens: 0,
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

    /// Changes the sampling settings; with another seed as [`Chat::reseed`] does.
    pub fn set_sampling(&mut self, options: SamplingOptions) -> Result<(), ChatError> {
        let seed = self.sampler.seed();
        self.sampler.set_options(options)?;
        if self.sampler.seed() != seed {
            self.replies = 0;
        }
        Ok(())
    }

    /// The next reply is drawn with `seed`, the one after it with `seed + 1`, and so on.
    pub fn reseed(&mut self, seed: u64) {
        self.sampler.reseed(seed);
        self.replies = 0;
    }

    /// Tokens of the conversation, and bytes that are kept of it and of those before it.
    pub fn cache(&self) -> (usize, u64) {
        (self.tokens, self.scheduler.cache().bytes + self.scheduler.bytes())
    }

    /// Says `text` as the user and streams the reply to `show`. `watch` is asked between steps: when it returns false
    /// the reply ends there and what was said of it stays. If the prompt can't be read the conversation stays as it was.
    pub fn say(
        &mut self,
        text: &str,
        watch: &mut dyn FnMut(Progress) -> bool,
        show: &mut dyn FnMut(&str) -> std::io::Result<()>,
    ) -> Result<Turn, ChatError> {
        self.messages.push(Message { role: "user".into(), content: text.into(), ids: None });
        let before = self.messages.len() - 1;
        // Said is said: whatever ended a reply, it stays in the conversation.
        let told = self.reply(watch, show);
        if !matches!(told, Ok(_) | Err(ChatError::Output(_))) {
            self.messages.truncate(before);
        }
        told
    }

    /// The model's turn.
    fn reply(
        &mut self,
        watch: &mut dyn FnMut(Progress) -> bool,
        show: &mut dyn FnMut(&str) -> std::io::Result<()>,
    ) -> Result<Turn, ChatError> {
        let start = Instant::now();
        let (mut content, mut ids) = (String::new(), Vec::new());
        if !self.thinking {
            ids = self.assets.tokenizer.encode(NO_THINKING, false)?;
            content.push_str(NO_THINKING);
        }
        let (given, given_ids) = (content.len(), ids.len());
        let Prompt { ids: prompt, turns } = self.prompt()?;
        let total = prompt.len();
        let job = self.submit(prompt, turns)?;

        let mut stream = TextStream::new(&*self.assets.tokenizer);
        let (mut failed, mut first_token, mut cached) = (None, None, None);
        let finish = 'turn: loop {
            let progress = match cached {
                Some(_) => Progress::Replying,
                None => Progress::Reading { read: self.scheduler.read(job), total },
            };
            if !watch(progress) {
                self.scheduler.cancel(job);
                break Finish::Stopped;
            }
            for update in self.step()? {
                match update {
                    Update::Read { cached: tokens } => cached = Some(tokens),
                    Update::Drawn { token, .. } if self.assets.end_ids.contains(&token.id) => {}
                    Update::Drawn { token, .. } => {
                        if first_token.is_none() {
                            first_token = Some(start.elapsed());
                            watch(Progress::Replying); // before anything is shown
                        }
                        ids.push(token.id);
                        let piece = stream.push(token.id);
                        content.push_str(&piece);
                        failed = if piece.is_empty() { None } else { show(&piece).err() };
                        if failed.is_some() {
                            self.scheduler.cancel(job);
                            break 'turn Finish::Stopped;
                        }
                    }
                    Update::Finished { finish, .. } => break 'turn finish,
                    Update::Failed(error) => return Err(error.into()),
                    Update::Scored(_) => {}
                }
            }
        };
        let cached = cached.ok_or(EngineError::Interrupted)?;
        let rest = stream.finish();
        content.push_str(&rest);
        let made = ids.len() - given_ids;
        self.tokens = total + made;
        self.replies += 1;
        let first_token = first_token.unwrap_or_else(|| start.elapsed());
        let decode = start.elapsed().saturating_sub(first_token);
        let stats = Stats { cached, computed: total - cached, made, first_token, decode };
        let text = content[given..].to_string();
        self.messages.push(Message { role: "assistant".into(), content, ids: Some(ids) });
        if let Some(error) = failed {
            return Err(error.into());
        }
        if !rest.is_empty() {
            show(&rest)?;
        }
        Ok(Turn { text, finish, stats })
    }

    /// Hands the conversation to the engine.
    fn submit(&mut self, prompt: Vec<u32>, turns: Vec<usize>) -> Result<JobId, EngineError> {
        let mut sampler = self.sampler.clone();
        sampler.reseed(self.sampler.seed().wrapping_add(self.replies));
        self.scheduler.submit(Job {
            prompt,
            turns,
            choices: vec![Choice { sampler, guide: None }],
            end_ids: self.assets.end_ids.as_slice().into(),
            max_new: self.max_new,
            top_log_probs: 0,
            score_prompt: false,
        })
    }

    /// Takes the turn on by one step; an engine that fails is not to be trusted, and another takes its place.
    fn step(&mut self) -> Result<Vec<Update>, EngineError> {
        let updates = self.scheduler.step().inspect_err(|_| self.scheduler = scheduler(self.assets))?;
        Ok(updates.into_iter().map(|(_, update)| update).collect())
    }

    /// The conversation up to where the model's turn begins.
    fn prompt(&self) -> Result<Prompt, ChatError> {
        let system = self.system.iter().map(|text| Line::from(json!({"role": "system", "content": text})));
        let said = self.messages.iter().map(|Message { role, content, ids }| Line {
            message: json!({"role": role, "content": content}),
            ids: ids.clone(),
        });
        let lines: Vec<Line> = system.chain(said).collect();
        Ok(self.prompter.build(&self.assets.tokenizer, &lines, &[], self.thinking)?)
    }
}

/// An engine for one conversation at a time. What it keeps of one is never too large for it to keep.
fn scheduler(assets: &Assets) -> Scheduler<'_> {
    let (engine, context) = (&assets.engine, assets.engine.context());
    let whole = Cache::new(engine.model(), 0).row_bytes(engine.config(), context);
    let settings = SchedulerSettings::new(BatchSettings::new(1, context), whole.max(CACHE_BYTES));
    Scheduler::new(engine.model(), settings)
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
        let prompt = chat.prompt().unwrap().ids;
        let encode = |text: &str| assets.tokenizer.encode(text, false).unwrap();
        let start = "<begin_of_document><beginning_of_sentence>user name=user\nq<end_of_sentence>\n\
            <beginning_of_sentence>ai name=assistant\n";
        let end = "<end_of_sentence>\n<beginning_of_sentence>user name=user\nhi<end_of_sentence>\n\
            <beginning_of_sentence>ai name=assistant\n";
        assert_eq!(prompt, [encode(start), ids, encode(end)].concat());
        // A new system prompt changes what comes before, not the reply.
        chat.system = Some("s".into());
        let prompt = chat.prompt().unwrap().ids;
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
        let prompt = chat.prompt().unwrap().ids;
        assert_eq!(special(&prompt), 4, "one after each message");
        assert!(prompt.windows(3).any(|ids| ids == [104, 257, 105]));
        let shown: Vec<u32> = prompt.iter().copied().filter(|&id| id < 256).collect();
        assert!(assets.tokenizer.decode(&shown).contains("a<end_of_sentence>b"));
        // Also where the template alters the replies.
        let source = "{% for m in messages %}{{ m['content'] | replace('hi', 'ho') }}|{% endfor %}";
        chat.prompter = Prompter::with_template(&assets.tokenizer, Template::new(source).unwrap());
        assert_eq!(special(&chat.prompt().unwrap().ids), 0);
    }

    #[test]
    fn a_template_that_alters_replies_is_obeyed() {
        let (_dir, assets) = assets("{% for m in messages %}{{ m['content'] | replace('i', 'o') }}|{% endfor %}");
        let mut chat = chat(&assets);
        chat.set_messages(vec![message("assistant", "hi", Some(vec![104, 257, 105]))]);
        assert_eq!(chat.prompt().unwrap().ids, assets.tokenizer.encode("ho|", false).unwrap());
    }

    #[test]
    fn a_turn_is_kept_or_undone_as_a_whole() {
        let (_dir, assets) = assets(include_str!("../tests/data/chat_template.jinja"));
        let mut chat = chat(&assets);
        let stop = chat.say("a", &mut |_| false, &mut |_| Ok(()));
        assert!(matches!(stop, Err(ChatError::Engine(EngineError::Interrupted))));
        assert_eq!(chat.messages(), []);
        let long = "x".repeat(400);
        let error = chat.say(&long, &mut |_| true, &mut |_| Ok(())).unwrap_err();
        assert!(matches!(error, ChatError::Engine(EngineError::Context { context: 400, .. })));
        assert_eq!(chat.messages(), []);
        chat.max_new = Some(30);
        let mut shown = String::new();
        let turn = chat.say("a", &mut |_| true, &mut |text| {
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
        let gone = chat.say("b", &mut |_| true, &mut |_| Err(std::io::ErrorKind::BrokenPipe.into()));
        assert!(matches!(gone, Err(ChatError::Output(_))));
        assert_eq!(chat.messages().len(), 4);
    }

    #[test]
    fn a_reply_counts_against_its_own_limit_without_the_block_of_no_thought() {
        let (_dir, assets) = assets(include_str!("../tests/data/chat_template.jinja"));
        let mut chat = chat(&assets);
        (chat.thinking, chat.max_new) = (false, Some(4));
        let turn = chat.say("a", &mut |_| true, &mut |_| Ok(())).unwrap();
        assert!(turn.stats.made <= 4 && !turn.text.contains("<think>"));
        assert_eq!(chat.messages()[1].content, format!("{NO_THINKING}{}", turn.text));
    }

    /// Says it, and returns the ids of the reply.
    fn say(chat: &mut Chat, text: &str) -> (Vec<u32>, Stats) {
        let turn = chat.say(text, &mut |_| true, &mut |_| Ok(())).unwrap();
        (chat.messages().last().unwrap().ids.clone().unwrap(), turn.stats)
    }

    #[test]
    fn a_turn_reads_only_what_is_new() {
        let (_dir, assets) = assets(include_str!("../tests/data/chat_template.jinja"));
        let mut chat = chat(&assets);
        chat.max_new = Some(20);
        let (first, stats) = say(&mut chat, "a question of some length, so that there is something to be kept");
        assert_eq!(stats.cached, 0);
        let said = stats.computed + first.len();
        let (_, stats) = say(&mut chat, "and another");
        // The last id drawn was not read by then.
        assert!(stats.cached >= said - 1, "{stats:?} after {said} tokens");
        assert_eq!(chat.cache().0, stats.cached + stats.computed + stats.made);
        // A reply that was cut short is kept as far as it came.
        let mut steps = 0;
        let mut watch = |progress| {
            steps += usize::from(progress == Progress::Replying);
            steps < 5
        };
        let cut = chat.say("more", &mut watch, &mut |_| Ok(())).unwrap();
        assert_eq!(cut.finish, Finish::Stopped);
        let said = cut.stats.cached + cut.stats.computed + cut.stats.made;
        let (_, stats) = say(&mut chat, "on");
        assert!(stats.cached >= said - 1, "{stats:?} after {said} tokens");
    }

    #[test]
    fn replies_depend_on_the_seed_and_on_their_place() {
        let (_dir, assets) = assets(include_str!("../tests/data/chat_template.jinja"));
        let talk = |chat: &mut Chat| ["a", "b", "a"].map(|text| say(chat, text).0);
        let mut chat = chat(&assets);
        chat.max_new = Some(9);
        let first = talk(&mut chat);
        assert_ne!(first[0], first[2], "each reply has a stream of its own");
        chat.clear();
        chat.reseed(1);
        assert_eq!(talk(&mut chat), first);
        chat.clear();
        assert_ne!(talk(&mut chat), first);
        // Other settings with the same seed let the stream be.
        chat.clear();
        chat.reseed(1);
        let same = chat.sampling().clone();
        say(&mut chat, "a");
        chat.set_sampling(same.clone()).unwrap();
        assert_eq!(say(&mut chat, "b").0, first[1]);
        chat.clear();
        chat.set_sampling(SamplingOptions { seed: Some(2), ..same.clone() }).unwrap();
        chat.set_sampling(same).unwrap();
        assert_eq!(talk(&mut chat), first);
    }
}
