//! A job under way: what the engine's thread tells of it becomes what its client sees. Stop strings, time limits and the
//! server's end act here; dropping a [`Generation`] cancels what is left of the job.

use super::error::ApiError;
use super::record::Record;
use super::state::{App, Phase, Service};
use super::worker::{Job, Pace, SubmitError, Told, Update};
use crate::batching::Scored;
use crate::engine::{EngineError, Finish};
use crate::guide::{Guide, GuideError, Next};
use crate::reply::{Delta, Reply};
use crate::stop::StopStrings;
use crate::stream::TextStream;
use crate::tokenizer::Tokenizer;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::watch;
use tokio::time::{Sleep, sleep_until, timeout_at};

/// Makes a choice's ids a text.
#[derive(Debug)]
pub enum Voice {
    /// A chat's reply: thinking, tool calls and the answer apart.
    Chat(Box<Reply>),
    /// A completion: text and nothing else.
    Plain(Box<(TextStream<Arc<Tokenizer>>, StopStrings)>),
}

impl Voice {
    /// For a completion that `stops` end.
    pub fn plain(tokenizer: Arc<Tokenizer>, stops: &[String]) -> Self {
        Self::Plain(Box::new((TextStream::new(tokenizer), StopStrings::new(stops.iter().cloned()))))
    }

    fn push(&mut self, id: u32) -> Vec<Delta> {
        match self {
            Self::Chat(reply) => reply.push(id),
            Self::Plain(voice) => {
                let text = voice.0.push(id);
                content(voice.1.push(&text))
            }
        }
    }

    /// What was held back, at the end; `cut`: a limit is the end.
    fn finish(&mut self, cut: bool) -> Vec<Delta> {
        match self {
            Self::Chat(reply) if cut => reply.cut(),
            Self::Chat(reply) => reply.finish(),
            Self::Plain(voice) => {
                let (rest, stopped) = (voice.0.finish(), voice.1.stopped());
                let text = voice.1.push(&rest);
                content(if stopped { String::new() } else { text + &voice.1.finish() })
            }
        }
    }

    fn stopped(&self) -> bool {
        match self {
            Self::Chat(reply) => reply.stopped(),
            Self::Plain(voice) => voice.1.stopped(),
        }
    }

    fn called_tools(&self) -> bool {
        matches!(self, Self::Chat(reply) if reply.called_tools())
    }

    /// Whether the last id leaves us inside a block of thought.
    fn is_thinking(&self) -> bool {
        matches!(self, Self::Chat(reply) if reply.is_thinking())
    }

    fn reasoning_tokens(&self) -> usize {
        if let Self::Chat(reply) = self { reply.reasoning_tokens() } else { 0 }
    }
}

fn content(text: String) -> Vec<Delta> {
    if text.is_empty() { Vec::new() } else { vec![Delta::Content(text)] }
}

/// Why a choice has ended, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The model ended its turn, or a stop string came.
    Stop,
    /// As many tokens as allowed were made, or the context is full.
    Length,
    /// The model calls tools.
    ToolCalls,
}

impl Reason {
    /// `finish_reason`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// Something new of a choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Index of the choice.
    pub choice: usize,
    /// Text and calls.
    pub deltas: Vec<Delta>,
    /// The id that was drawn, unless it only ends the reply; and whether it is thinking.
    pub scored: Option<(Scored, bool)>,
    /// The choice has ended.
    pub reason: Option<Reason>,
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Of the prompts.
    pub prompt: usize,
    /// Those of them that came from the cache.
    pub cached: usize,
    /// Drawn.
    pub completion: usize,
    /// Drawn inside a block of thought.
    pub reasoning: usize,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.prompt += other.prompt;
        self.cached += other.cached;
        self.completion += other.completion;
        self.reasoning += other.reasoning;
    }
}

/// What a request wants of the engine.
#[derive(Debug)]
pub struct Order {
    /// For the engine.
    pub job: Job,
    /// One for each of the job's choices.
    pub voices: Vec<Voice>,
    /// Whether stop strings may end a choice before the others.
    pub stops: bool,
    /// How soon its client sees what is new.
    pub pace: Pace,
    /// The field that the prompt came from.
    pub param: &'static str,
}

#[derive(Debug)]
struct Answer {
    voice: Voice,
    last: Option<Instant>,
    ended: bool,
    stop: Option<Arc<AtomicBool>>,
}

/// A job under way.
#[derive(Debug)]
pub struct Generation {
    updates: UnboundedReceiver<Vec<Told>>,
    /// Those that have come and were not asked for yet.
    here: VecDeque<Told>,
    answers: Vec<Answer>,
    end_ids: Arc<[u32]>,
    prompt_scores: Vec<Scored>,
    usage: Usage,
    param: &'static str,
    limit: Limit,
    record: Arc<Record>,
}

impl Generation {
    /// Hands a job to the engine.
    pub fn begin(app: &App, service: &Service, record: &Arc<Record>, mut order: Order) -> Result<Self, ApiError> {
        check(service, &order)?;
        let mut stops = vec![None; order.voices.len()];
        // A choice alone is stopped with its job; one of several is made to end its turn.
        if let (true, 2.., Some(&end)) = (order.stops, order.voices.len(), service.end_ids.first()) {
            for (choice, stop) in order.job.choices.iter_mut().zip(&mut stops) {
                let flag = Arc::new(AtomicBool::new(false));
                *stop = Some(flag.clone());
                let guide = choice.guide.take();
                choice.guide = Some(Box::new(Stoppable { guide, stop: flag, end }));
            }
        }
        let answers = order.voices.into_iter().zip(stops);
        let answers = answers.map(|(voice, stop)| Answer { voice, last: None, ended: false, stop });
        let usage = Usage { prompt: order.job.prompt.len(), ..Usage::default() };
        Ok(Self {
            answers: answers.collect(),
            end_ids: order.job.end_ids.clone(),
            prompt_scores: Vec::new(),
            usage,
            param: order.param,
            limit: Limit::new(app, record),
            record: record.clone(),
            here: VecDeque::new(),
            updates: service.engine.submit(order.job, order.pace).map_err(|error| refused(&error))?,
        })
    }

    /// Waits at most until `then` for a first word of the engine: what it refuses at once can be told by the status.
    pub async fn begun(mut self, then: tokio::time::Instant) -> Result<Self, ApiError> {
        if let Ok(come) = timeout_at(then, self.updates.recv()).await {
            self.here.extend(come.ok_or_else(stopped)?);
            if let Some(Told { update: Update::Failed(error), .. }) = self.here.front() {
                return Err(ApiError::engine(error, self.param));
            }
        }
        Ok(self)
    }

    /// What happens next; `None` when all choices have ended. May be dropped while it waits and called again.
    pub async fn next(&mut self) -> Result<Option<Event>, ApiError> {
        while self.answers.iter().any(|answer| !answer.ended) {
            let Some(told) = self.here.pop_front() else {
                let come = tokio::select! {
                    biased;
                    error = self.limit.reached() => return Err(error),
                    come = self.updates.recv() => come.ok_or_else(stopped)?,
                };
                self.here.extend(come);
                continue;
            };
            if let Some(event) = self.take(told)? {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// Waits until the job may not go on.
    pub async fn limit(&mut self) -> ApiError {
        self.limit.reached().await
    }

    /// The prompt's tokens from the second on, where the job asks for them: all are here before the first event.
    pub fn prompt_scores(&self) -> &[Scored] {
        &self.prompt_scores
    }

    /// Tokens so far.
    pub fn usage(&self) -> Usage {
        let reasoning = self.answers.iter().map(|answer| answer.voice.reasoning_tokens()).sum();
        Usage { reasoning, ..self.usage }
    }

    fn take(&mut self, told: Told) -> Result<Option<Event>, ApiError> {
        match told.update {
            Update::Read { cached } => {
                self.usage.cached = cached;
                self.record.read(self.usage.prompt, cached);
                Ok(None)
            }
            Update::Scored(tokens) => {
                self.prompt_scores.extend(tokens);
                Ok(None)
            }
            Update::Drawn { choice, token, top } => {
                let Some(answer) = self.answers.get_mut(choice).filter(|answer| !answer.ended) else { return Ok(None) };
                self.record.drawn(answer.last, told.at);
                answer.last = Some(told.at);
                self.usage.completion += 1;
                if self.end_ids.contains(&token.id) {
                    return Ok(None); // that it has finished comes next
                }
                let (inside, thought) = (answer.voice.is_thinking(), answer.voice.reasoning_tokens());
                let mut deltas = answer.voice.push(token.id);
                // A line break is counted when it is clear that thinking goes on, but it is here that it was drawn.
                let thinking = inside && answer.voice.is_thinking() || answer.voice.reasoning_tokens() > thought;
                let scored = Some((Scored::new(&token, top), thinking));
                let mut reason = None;
                if answer.voice.stopped() {
                    deltas.extend(answer.voice.finish(false));
                    answer.ended = true;
                    reason = Some(Reason::Stop);
                    if let Some(stop) = &answer.stop {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
                Ok(Some(Event { choice, deltas, scored, reason }))
            }
            Update::Finished { choice, finish } => {
                let Some(answer) = self.answers.get_mut(choice).filter(|answer| !answer.ended) else { return Ok(None) };
                answer.ended = true;
                let reason = match finish {
                    Finish::Length | Finish::Context => Reason::Length,
                    Finish::End(_) | Finish::Stopped if answer.voice.called_tools() => Reason::ToolCalls,
                    Finish::End(_) | Finish::Stopped => Reason::Stop,
                };
                let deltas = answer.voice.finish(reason == Reason::Length);
                Ok(Some(Event { choice, deltas, scored: None, reason: Some(reason) }))
            }
            Update::Failed(error) => Err(ApiError::engine(&error, self.param)),
        }
    }
}

/// What can be said of an order without the engine.
fn check(service: &Service, order: &Order) -> Result<(), ApiError> {
    let (engine, prompt) = (&service.assets.engine, &order.job.prompt);
    let (vocab, context) = (engine.config().vocab_size, engine.context());
    let unknown = prompt.iter().position(|&id| id as usize >= vocab);
    let error = match unknown {
        Some(position) => EngineError::UnknownId { position, id: prompt[position], vocab },
        None if prompt.is_empty() => EngineError::Empty,
        None if prompt.len() >= context => EngineError::Context { tokens: prompt.len(), context },
        None => return Ok(()),
    };
    Err(ApiError::engine(&error, order.param))
}

fn stopped() -> ApiError {
    ApiError::internal("the engine has stopped")
}

fn refused(error: &SubmitError) -> ApiError {
    match error {
        SubmitError::Full { waiting, limit } => ApiError::busy(*waiting, *limit),
        SubmitError::Stopped => ApiError::unavailable("the engine is shutting down"),
    }
}

/// When a job may not go on: its time is over, or the server's.
#[derive(Debug)]
pub struct Limit {
    phase: watch::Receiver<Phase>,
    sleep: Option<(Pin<Box<Sleep>>, u64)>,
}

impl Limit {
    /// The limits of a request that came when `record` says.
    pub fn new(app: &App, record: &Record) -> Self {
        let sleep = |limit: std::time::Duration| {
            let end = tokio::time::Instant::from_std(record.start() + limit);
            (Box::pin(sleep_until(end)), limit.as_secs())
        };
        Self { phase: app.watch(), sleep: app.settings.timeout.map(sleep) }
    }

    /// Waits for either.
    pub async fn reached(&mut self) -> ApiError {
        let Self { phase, sleep } = self;
        let over = async {
            match sleep {
                Some((sleep, seconds)) => {
                    sleep.await;
                    *seconds
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            stopping = phase.wait_for(|&phase| phase == Phase::Stopping) => {
                drop(stopping);
                ApiError::unavailable("the server is shutting down")
            }
            seconds = over => ApiError::timeout(seconds),
        }
    }
}

/// Ends a choice when it is told to.
#[derive(Debug)]
struct Stoppable {
    guide: Option<Box<dyn Guide>>,
    stop: Arc<AtomicBool>,
    end: u32,
}

impl Guide for Stoppable {
    fn next(&mut self) -> Result<Next<'_>, GuideError> {
        match &mut self.guide {
            _ if self.stop.load(Ordering::Relaxed) => Ok(Next::Only(self.end)),
            Some(guide) => guide.next(),
            None => Ok(Next::Any),
        }
    }

    fn take(&mut self, id: u32) -> Result<(), GuideError> {
        match &mut self.guide {
            Some(guide) if !self.stop.load(Ordering::Relaxed) => guide.take(id),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::settings;
    use super::*;
    use crate::sampler::Sampled;
    use crate::tokenizer::tests::byte_level;
    use axum::http::Method;
    use std::time::Duration;
    use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

    fn told(update: Update) -> Told {
        Told { at: Instant::now(), update }
    }

    fn drawn(choice: usize, id: u32) -> Told {
        told(Update::Drawn { choice, token: Sampled { id, log_prob: -1.0, draw_log_prob: -1.0 }, top: Vec::new() })
    }

    /// Two choices that `ab` stops, under way.
    fn generation(app: &App) -> (Generation, UnboundedSender<Vec<Told>>, Vec<Arc<AtomicBool>>) {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = Arc::new(byte_level(dir.path(), &["<end_of_sentence>", "x"]));
        let (sender, updates) = unbounded_channel();
        let answer = |flag: &Arc<AtomicBool>| {
            let voice = Voice::plain(tokenizer.clone(), &["ab".to_string()]);
            Answer { voice, last: None, ended: false, stop: Some(flag.clone()) }
        };
        let flags: Vec<_> = (0..2).map(|_| Arc::new(AtomicBool::new(false))).collect();
        let record = Record::new(app.metrics.clone(), Method::POST, "/v1/completions");
        let generation = Generation {
            updates,
            here: VecDeque::new(),
            answers: flags.iter().map(answer).collect(),
            end_ids: vec![256].into(),
            prompt_scores: Vec::new(),
            usage: Usage { prompt: 3, ..Usage::default() },
            param: "prompt",
            limit: Limit::new(app, &record),
            record,
        };
        (generation, sender, flags)
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
    }

    #[test]
    fn a_stop_string_ends_its_choice_and_no_other() {
        let app = App::new(settings());
        run(async {
            let (mut generation, sender, flags) = generation(&app);
            let ids = [(0, 99), (0, 97), (1, 97), (0, 98), (0, 120), (1, 99)];
            let mut all = vec![told(Update::Read { cached: 2 })];
            all.extend(ids.iter().map(|&(choice, id)| drawn(choice, id)));
            for choice in 0..2 {
                all.push(drawn(choice, 256));
                all.push(told(Update::Finished { choice, finish: Finish::End(256) }));
            }
            // However many come at once.
            all.chunks(3).for_each(|some| sender.send(some.to_vec()).unwrap());
            let (mut texts, mut reasons) = ([String::new(), String::new()], [None; 2]);
            while let Some(event) = generation.next().await.unwrap() {
                assert_eq!(reasons[event.choice], None, "nothing comes after the end");
                for delta in event.deltas {
                    let Delta::Content(text) = delta else { panic!() };
                    texts[event.choice].push_str(&text);
                }
                reasons[event.choice] = event.reason;
            }
            assert_eq!(texts, ["c", "ac"]);
            assert_eq!(reasons, [Some(Reason::Stop); 2]);
            assert!(flags[0].load(Ordering::Relaxed) && !flags[1].load(Ordering::Relaxed));
            // What was drawn after the stop string is nobody's; the id that ends the turn counts.
            assert_eq!(generation.usage(), Usage { prompt: 3, cached: 2, completion: 6, reasoning: 0 });
        });
    }

    #[test]
    fn whatever_ends_a_job_is_told() {
        let mut limited = settings();
        limited.timeout = Some(Duration::from_millis(30));
        let app = App::new(limited);
        run(async {
            let (mut late, sender, _) = generation(&app);
            assert_eq!(late.next().await.unwrap_err().code, Some("timeout"));
            drop(sender);
            let app = App::new(settings());
            let (mut failed, sender, _) = generation(&app);
            sender.send(vec![told(Update::Failed(EngineError::Context { tokens: 9, context: 8 }))]).unwrap();
            assert_eq!(failed.next().await.unwrap_err().code, Some("context_length_exceeded"));
            let (mut left, sender, _) = generation(&app);
            drop(sender);
            assert_eq!(left.next().await.unwrap_err().status, 500);
            let (full, sender, _) = generation(&app);
            sender.send(vec![told(Update::Finished { choice: 1, finish: Finish::Context })]).unwrap();
            let then = tokio::time::Instant::now() + Duration::from_secs(9);
            let mut full = full.begun(then).await.unwrap();
            let event = full.next().await.unwrap().unwrap();
            assert_eq!((event.choice, event.reason), (1, Some(Reason::Length)), "what came first is not lost");
            app.enter(Phase::Stopping);
            assert_eq!(full.next().await.unwrap_err().code, Some("unavailable"));
        });
    }

    #[test]
    fn a_stopped_choice_says_its_end_and_nothing_else() {
        let stop = Arc::new(AtomicBool::new(false));
        let mut guide = Stoppable { guide: None, stop: stop.clone(), end: 7 };
        assert_eq!(guide.next(), Ok(Next::Any));
        stop.store(true, Ordering::Relaxed);
        assert_eq!(guide.next(), Ok(Next::Only(7)));
        assert_eq!(guide.take(7), Ok(()));
    }
}
