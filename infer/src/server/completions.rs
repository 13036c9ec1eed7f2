//! `/v1/completions`: a text goes on, without the chat template. Prompts are texts or token ids, one or many; all of a
//! request's prompts run side by side.

use super::body;
use super::chat::usage;
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::generation::{Event, Generation, Order, Reason, Usage, Voice};
use super::http::{blocking, id, json, now, record};
use super::logprobs::Lists;
use super::params::{MAX_TOP, Params};
use super::sse::Events;
use super::state::{App, Service, Shared};
use super::stream::{self, Broken};
use super::worker::{Choice, Job};
use crate::batching::Scored;
use crate::reply::Delta;
use crate::stream::TextStream;
use crate::tokenizer::Tokenizer;
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Tokens where `max_tokens` is absent, as OpenAI has it.
const MAX_TOKENS: usize = 16;

/// Answers a request.
pub async fn complete(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let service = app.service()?;
    let record = record(&request);
    let body = body::read(request, app.settings.max_body).await?;
    let (shared, model) = (app.clone(), service.clone());
    let prepared = blocking(move || {
        let request = CompletionRequest::read(Fields::parse(&body)?, &shared, &model)?;
        let permit = shared.admit(request.params.n.saturating_mul(request.prompts.len()))?;
        let orders = request.orders(&model)?;
        Ok((request, orders, permit))
    });
    let (request, orders, permit) = prepared.await?;
    let mut runs = Vec::new();
    for (i, (echo, order)) in orders.into_iter().enumerate() {
        let generation = Generation::begin(&app, &service, &record, order)?;
        runs.push(Run { first: i * request.params.n, n: request.params.n, echo, generation });
    }
    let frame = Arc::new(Frame {
        id: id("cmpl"),
        created: now(),
        model: app.name().to_string(),
        tokenizer: service.assets.tokenizer.clone(),
        logprobs: request.logprobs.is_some(),
        include_usage: request.params.include_usage,
    });
    if request.params.stream {
        let then = Instant::now() + stream::FIRST_WORD;
        let mut begun = Vec::new();
        for run in runs {
            let generation = run.generation.begun(then).await?;
            begun.push(Run { generation, ..run });
        }
        let runs = begun;
        return Ok(stream::respond(record, permit, |events| frame.stream(runs, events)));
    }
    let answer = frame.whole(runs).await;
    drop(permit);
    Ok(json(&answer?))
}

/// A prompt as it was sent.
#[derive(Debug, Clone, PartialEq)]
enum Text {
    Written(String),
    Ids(Vec<u32>),
}

#[derive(Debug, Clone, PartialEq)]
struct CompletionRequest {
    params: Params,
    prompts: Vec<Text>,
    echo: bool,
    logprobs: Option<usize>,
    max_new: usize,
}

impl CompletionRequest {
    fn read(mut fields: Fields, shared: &Shared, service: &Service) -> Result<Self, ApiError> {
        shared.check_model(fields.text("model")?.as_deref())?;
        let assets = &service.assets;
        let params = Params::take(&mut fields, assets.generation.sampling(), assets.engine.config().vocab_size)?;
        let request = Self::take(&mut fields, params)?;
        fields.finish()?;
        Ok(request)
    }

    fn take(fields: &mut Fields, params: Params) -> Result<Self, ApiError> {
        let n = params.n;
        fields.refuse("best_of", "all n answers are given", |v| v.as_u64() == Some(n as u64))?;
        fields.refuse("suffix", "the model does not fill in gaps", |v| v == "")?;
        let prompt = fields.value("prompt").ok_or_else(|| ApiError::field("prompt", "prompt is missing"))?;
        let echo = fields.flag("echo")?.unwrap_or(false);
        let logprobs = fields.whole("logprobs", 0..=MAX_TOP)?;
        let max_new = fields.whole("max_tokens", 0..=usize::MAX)?.unwrap_or(MAX_TOKENS);
        Ok(Self { params, prompts: prompts(&prompt)?, echo, logprobs, max_new })
    }

    /// An order for each prompt, with what an answer begins with.
    fn orders(&self, service: &Service) -> Result<Vec<(Echo, Order)>, ApiError> {
        let tokenizer = &service.assets.tokenizer;
        let order = |text: &Text| {
            let (prompt, written) = match text {
                Text::Ids(ids) => (ids.clone(), tokenizer.decode(ids)),
                Text::Written(text) => {
                    let ids = tokenizer.encode(text, true).map_err(|e| ApiError::field("prompt", e.to_string()))?;
                    (ids, text.clone())
                }
            };
            let choices = (0..self.params.n).map(|i| {
                let sampler = self.params.sampler(&service.sampler, i)?;
                Ok(Choice { sampler, guide: None })
            });
            let echo = Echo {
                text: if self.echo { written } else { String::new() },
                first: prompt.first().copied().filter(|_| self.echo && self.logprobs.is_some()),
            };
            let job = Job {
                turns: vec![prompt.len()],
                prompt,
                choices: choices.collect::<Result<_, ApiError>>()?,
                end_ids: service.end_ids.clone(),
                max_new: Some(self.max_new),
                top_log_probs: self.logprobs.unwrap_or(0),
                score_prompt: echo.first.is_some(),
            };
            let stops = &self.params.stops;
            let voices = (0..self.params.n).map(|_| Voice::plain(tokenizer.clone(), stops)).collect();
            let order = Order { job, voices, stops: !stops.is_empty(), pace: self.params.pace(), param: "prompt" };
            Ok((echo, order))
        };
        self.prompts.iter().map(order).collect()
    }
}

/// A text, a list of texts, a list of ids, or a list of lists of ids.
fn prompts(value: &Value) -> Result<Vec<Text>, ApiError> {
    let id = |v: &Value| u32::try_from(v.as_u64()?).ok();
    let ids = |v: &Value| v.as_array()?.iter().map(id).collect::<Option<Vec<u32>>>().filter(|ids| !ids.is_empty());
    let one = |v: &Value| v.as_str().map(|text| Text::Written(text.into())).or_else(|| ids(v).map(Text::Ids));
    let read = one(value).map(|one| vec![one]).or_else(|| {
        let list = value.as_array()?;
        list.iter().map(one).collect::<Option<Vec<_>>>().filter(|list| !list.is_empty())
    });
    let expected = "a string, a list of token ids, or a list of such, none empty";
    read.ok_or_else(|| wrong("prompt", value, expected))
}

/// What an answer begins with.
#[derive(Debug, Clone, Default)]
struct Echo {
    /// The prompt, or nothing.
    text: String,
    /// Its first id, if its tokens are told with their log-probabilities.
    first: Option<u32>,
}

/// One prompt's answers under way.
struct Run {
    /// Index of its first choice in the response.
    first: usize,
    n: usize,
    echo: Echo,
    generation: Generation,
}

/// Where the tokens of a choice stand in its text, in characters.
struct Offsets {
    text: TextStream<Arc<Tokenizer>>,
    at: usize,
    lists: Lists,
}

impl Offsets {
    fn new(tokenizer: &Arc<Tokenizer>) -> Self {
        Self { text: TextStream::new(tokenizer.clone()), at: 0, lists: Lists::default() }
    }

    fn push(&mut self, tokenizer: &Tokenizer, event: &Event) {
        if let Some((scored, _)) = &event.scored {
            self.add(tokenizer, scored);
        }
    }

    fn add(&mut self, tokenizer: &Tokenizer, scored: &Scored) {
        self.lists.push(tokenizer, scored, self.at);
        self.at += self.text.push(scored.id).chars().count();
    }

    /// Begins with the prompt.
    fn echo(&mut self, tokenizer: &Tokenizer, first: u32, scores: &[Scored]) {
        self.lists.push_first(tokenizer, first);
        self.at += self.text.push(first).chars().count();
        scores.iter().for_each(|scored| self.add(tokenizer, scored));
    }

    fn take(&mut self) -> Value {
        if self.lists.is_empty() { Value::Null } else { self.lists.take() }
    }
}

/// What all chunks of an answer share.
struct Frame {
    id: String,
    created: u64,
    model: String,
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    include_usage: bool,
}

impl Frame {
    fn object(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("m1-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }

    async fn whole(self: &Arc<Self>, runs: Vec<Run>) -> Result<Value, ApiError> {
        // Dropped with the request, which ends the tasks and with them the jobs.
        let mut tasks = JoinSet::new();
        for run in runs {
            let frame = self.clone();
            tasks.spawn(async move { frame.gather(run).await });
        }
        let (mut choices, mut total) = (Vec::new(), Usage::default());
        while let Some(done) = tasks.join_next().await {
            let (some, usage) = done.map_err(|error| ApiError::internal(error.to_string()))??;
            choices.extend(some);
            total += usage;
        }
        choices.sort_by_key(|choice| choice["index"].as_u64());
        let mut answer = self.object(choices);
        answer["usage"] = usage(total);
        Ok(answer)
    }

    async fn gather(&self, mut run: Run) -> Result<(Vec<Value>, Usage), ApiError> {
        let begin = || (run.echo.text.clone(), Offsets::new(&self.tokenizer), None::<Reason>);
        let mut choices: Vec<_> = (0..run.n).map(|_| begin()).collect();
        while let Some(event) = run.generation.next().await? {
            if let Some(first) = run.echo.first.take() {
                let scores = run.generation.prompt_scores();
                choices.iter_mut().for_each(|choice| choice.1.echo(&self.tokenizer, first, scores));
            }
            let (text, offsets, reason) = &mut choices[event.choice];
            offsets.push(&self.tokenizer, &event);
            text.push_str(&said(&event.deltas));
            *reason = event.reason.or(*reason);
        }
        let choices = choices.into_iter().enumerate().map(|(i, (text, mut offsets, reason))| {
            let logprobs = if self.logprobs { offsets.take() } else { Value::Null };
            let reason = reason.map(Reason::name);
            json!({"index": run.first + i, "text": text, "logprobs": logprobs, "finish_reason": reason})
        });
        Ok((choices.collect(), run.generation.usage()))
    }

    async fn stream(self: Arc<Self>, runs: Vec<Run>, events: Events) -> Result<(), Broken> {
        let mut tasks = JoinSet::new();
        for run in runs {
            let (frame, events) = (self.clone(), events.clone());
            tasks.spawn(async move { frame.tell(run, &events).await });
        }
        let mut total = Usage::default();
        while let Some(done) = tasks.join_next().await {
            total += done.map_err(|error| ApiError::internal(error.to_string()))??;
        }
        if self.include_usage {
            let mut last = self.object(Vec::new());
            last["usage"] = usage(total);
            events.json(&last).await?;
        }
        Ok(events.done().await?)
    }

    async fn tell(&self, mut run: Run, events: &Events) -> Result<Usage, Broken> {
        let chunk = |index: usize, text: &str, logprobs: Value, reason: Option<Reason>| {
            let reason = reason.map(Reason::name);
            let index = run.first + index;
            let choice = json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason});
            let mut chunk = self.object(vec![choice]);
            if self.include_usage {
                chunk["usage"] = Value::Null;
            }
            chunk
        };
        let mut offsets: Vec<Offsets> = (0..run.n).map(|_| Offsets::new(&self.tokenizer)).collect();
        // An echo with scores waits until the prompt has been read.
        let mut event = match run.echo.first {
            Some(_) => stream::next(&mut run.generation, events).await?,
            None => None,
        };
        if let Some(first) = run.echo.first {
            let scores = run.generation.prompt_scores();
            offsets.iter_mut().for_each(|offsets| offsets.echo(&self.tokenizer, first, scores));
        }
        if !run.echo.text.is_empty() {
            for (index, offsets) in offsets.iter_mut().enumerate() {
                let begin = chunk(index, &run.echo.text, offsets.take(), None);
                stream::send(&mut run.generation, events, &begin).await?;
            }
        }
        loop {
            let next = match event.take() {
                Some(event) => Some(event),
                None => stream::next(&mut run.generation, events).await?,
            };
            let Some(event) = next else { break };
            let text = said(&event.deltas);
            let offsets = &mut offsets[event.choice];
            if self.logprobs {
                offsets.push(&self.tokenizer, &event);
            }
            if !text.is_empty() || event.reason.is_some() {
                let chunk = chunk(event.choice, &text, offsets.take(), event.reason);
                stream::send(&mut run.generation, events, &chunk).await?;
            }
        }
        Ok(run.generation.usage())
    }
}

/// The text of a completion's deltas, which are nothing else.
fn said(deltas: &[Delta]) -> String {
    deltas
        .iter()
        .filter_map(|delta| if let Delta::Content(text) = delta { Some(text.as_str()) } else { None })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::SamplingOptions;

    fn take(text: &str) -> Result<CompletionRequest, ApiError> {
        let mut fields = Fields::parse(text.as_bytes())?;
        let params = Params::take(&mut fields, SamplingOptions::default(), 320)?;
        let request = CompletionRequest::take(&mut fields, params)?;
        fields.finish()?;
        Ok(request)
    }

    #[test]
    fn prompts_come_in_four_forms() {
        let prompts = |text: &str| take(text).map(|r| r.prompts);
        let written = |text: &str| Text::Written(text.into());
        assert_eq!(prompts(r#"{"prompt": "a"}"#), Ok(vec![written("a")]));
        assert_eq!(prompts(r#"{"prompt": ["a", "b"]}"#), Ok(vec![written("a"), written("b")]));
        assert_eq!(prompts(r#"{"prompt": [1, 2]}"#), Ok(vec![Text::Ids(vec![1, 2])]));
        assert_eq!(prompts(r#"{"prompt": [[1], [2, 3]]}"#), Ok(vec![Text::Ids(vec![1]), Text::Ids(vec![2, 3])]));
        for wrong in ["[]", "[[]]", "7", "[1.5]", "[-1]", r#"["a", 1]"#, "{}"] {
            let error = prompts(&format!("{{\"prompt\": {wrong}}}")).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("prompt"), "{wrong}");
        }
        assert_eq!(prompts("{}").unwrap_err().message, "prompt is missing");
    }

    #[test]
    fn defaults_and_what_is_not_here() {
        let got = take(r#"{"prompt": "a", "best_of": 1, "logprobs": 0, "suffix": ""}"#).unwrap();
        assert_eq!((got.max_new, got.echo, got.logprobs), (16, false, Some(0)));
        assert_eq!(take(r#"{"prompt": "a", "max_tokens": 0, "echo": true}"#).unwrap().max_new, 0);
        for (text, param) in [
            (r#"{"prompt": "a", "best_of": 2}"#, "best_of"),
            (r#"{"prompt": "a", "suffix": "b"}"#, "suffix"),
            (r#"{"prompt": "a", "logprobs": true}"#, "logprobs"),
            (r#"{"prompt": "a", "messages": []}"#, "messages"),
        ] {
            assert_eq!(take(text).unwrap_err().param.as_deref(), Some(param), "{text}");
        }
    }
}
