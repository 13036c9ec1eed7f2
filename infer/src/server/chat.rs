//! `/v1/chat/completions`: a conversation's next message, whole or as a stream of chunks.

use super::chat_request::ChatRequest;
use super::error::ApiError;
use super::fields::Fields;
use super::generation::{Event, Generation, Reason, Usage};
use super::http::{blocking, id, json, now, record};
use super::sse::Events;
use super::state::{App, Service};
use super::stream::{self, Broken};
use super::{body, logprobs};
use crate::reply::{Delta, Parts};
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use tokio::time::Instant;

/// Answers a request.
pub async fn complete(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let service = app.service()?;
    let record = record(&request);
    let body = body::read(request, app.settings.max_body).await?;
    let (shared, model) = (app.clone(), service.clone());
    let prepared = blocking(move || {
        let request = ChatRequest::read(Fields::parse(&body)?, &shared, &model)?;
        let permit = shared.admit(request.params.n)?;
        let (stream, include_usage) = (request.params.stream, request.params.include_usage);
        let logprobs = request.top_logprobs.is_some();
        Ok((request.order(&model)?, permit, stream, include_usage, logprobs))
    });
    let (order, permit, streams, include_usage, logprobs) = prepared.await?;
    let n = order.voices.len();
    let generation = Generation::begin(&app, &service, &record, order)?;
    let frame = Frame { id: id("chatcmpl"), created: now(), model: app.name().to_string(), service, logprobs };
    if streams {
        let generation = generation.begun(Instant::now() + stream::FIRST_WORD).await?;
        let tell = |events| frame.stream(generation, events, n, include_usage);
        return Ok(stream::respond(record, permit, tell));
    }
    let answer = frame.whole(generation, n).await;
    drop(permit);
    Ok(json(&answer?))
}

/// `usage` of a response.
pub fn usage(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    })
}

/// What all chunks of an answer share.
struct Frame {
    id: String,
    created: u64,
    model: String,
    service: Arc<Service>,
    logprobs: bool,
}

/// Log-probabilities that wait for the chunk they go with.
#[derive(Default, Clone)]
struct Scores {
    content: Vec<Value>,
    reasoning: Vec<Value>,
}

impl Scores {
    /// `logprobs` of a choice, and nothing left; `null` if there is nothing.
    fn take(&mut self) -> Value {
        let Self { content, reasoning } = std::mem::take(self);
        if content.is_empty() && reasoning.is_empty() {
            return Value::Null;
        }
        let mut value = json!({"content": content, "refusal": null});
        if !reasoning.is_empty() {
            value["reasoning_content"] = reasoning.into();
        }
        value
    }
}

impl Frame {
    fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("m1-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }

    fn score(&self, scores: &mut Scores, event: &Event) {
        if let (true, Some((scored, thinking))) = (self.logprobs, &event.scored) {
            let list = if *thinking { &mut scores.reasoning } else { &mut scores.content };
            list.push(logprobs::chat(&self.service.assets.tokenizer, scored));
        }
    }

    /// The whole answer.
    async fn whole(&self, mut generation: Generation, n: usize) -> Result<Value, ApiError> {
        let mut choices = vec![(Parts::default(), Scores::default(), None::<Reason>); n];
        while let Some(event) = generation.next().await? {
            let (parts, scores, reason) = &mut choices[event.choice];
            self.score(scores, &event);
            event.deltas.into_iter().for_each(|delta| parts.take(delta));
            *reason = event.reason.or(*reason);
        }
        let choices = choices.into_iter().enumerate().map(|(index, (parts, mut scores, reason))| {
            json!({
                "index": index,
                "message": message(parts),
                "logprobs": scores.take(),
                "finish_reason": reason.map(Reason::name),
            })
        });
        let mut answer = self.object("chat.completion", choices.collect());
        answer["usage"] = usage(generation.usage());
        Ok(answer)
    }

    /// The answer in chunks.
    async fn stream(
        self,
        mut generation: Generation,
        events: Events,
        n: usize,
        include_usage: bool,
    ) -> Result<(), Broken> {
        let mut scores = vec![Scores::default(); n];
        let chunk = |index: usize, delta: Value, logprobs: Value, reason: Option<Reason>| {
            let reason = reason.map(Reason::name);
            let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason});
            let mut chunk = self.object("chat.completion.chunk", vec![choice]);
            if include_usage {
                chunk["usage"] = Value::Null;
            }
            chunk
        };
        for index in 0..n {
            let begin = chunk(index, json!({"role": "assistant", "content": ""}), Value::Null, None);
            stream::send(&mut generation, &events, &begin).await?;
        }
        while let Some(event) = stream::next(&mut generation, &events).await? {
            let (index, reason) = (event.choice, event.reason);
            self.score(&mut scores[index], &event);
            for delta in pieces(event.deltas) {
                let chunk = chunk(index, delta, scores[index].take(), None);
                stream::send(&mut generation, &events, &chunk).await?;
            }
            if reason.is_some() {
                let chunk = chunk(index, json!({}), scores[index].take(), reason);
                stream::send(&mut generation, &events, &chunk).await?;
            }
        }
        if include_usage {
            let mut last = self.object("chat.completion.chunk", Vec::new());
            last["usage"] = usage(generation.usage());
            stream::send(&mut generation, &events, &last).await?;
        }
        Ok(events.done().await?)
    }
}

/// An assistant's message.
fn message(parts: Parts) -> Value {
    let mut message = Map::new();
    message.insert("role".into(), "assistant".into());
    let silent = parts.content.is_empty() && !parts.calls.is_empty();
    message.insert("content".into(), if silent { Value::Null } else { parts.content.into() });
    if let Some(reasoning) = parts.reasoning {
        message.insert("reasoning_content".into(), reasoning.into());
    }
    message.insert("refusal".into(), Value::Null);
    if !parts.calls.is_empty() {
        let call = |call: crate::tools::ToolCall| {
            let function = json!({"name": call.name, "arguments": call.arguments});
            json!({"id": call.id, "type": "function", "function": function})
        };
        message.insert("tool_calls".into(), parts.calls.into_iter().map(call).collect());
    }
    Value::Object(message)
}

/// `delta` objects for what came: the texts together, each piece of a call alone (some clients look at the first only).
fn pieces(deltas: Vec<Delta>) -> Vec<Value> {
    let (mut texts, mut calls) = (Map::new(), Vec::new());
    let mut text = |key: &str, piece: String| match texts.get_mut(key) {
        Some(Value::String(text)) => text.push_str(&piece),
        _ => drop(texts.insert(key.into(), piece.into())),
    };
    for delta in deltas {
        match delta {
            Delta::Reasoning(piece) => text("reasoning_content", piece),
            Delta::Content(piece) => text("content", piece),
            Delta::ToolCall { index, id, name } => {
                let function = json!({"name": name, "arguments": ""});
                calls.push(json!({"index": index, "id": id, "type": "function", "function": function}));
            }
            Delta::ToolArguments { index, fragment } => {
                calls.push(json!({"index": index, "function": {"arguments": fragment}}));
            }
            // What has been sent cannot be taken back.
            Delta::ToolBroken { .. } => (),
        }
    }
    let texts = (!texts.is_empty()).then_some(Value::Object(texts));
    texts.into_iter().chain(calls.into_iter().map(|call| json!({"tool_calls": [call]}))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_nothing_where_it_only_calls() {
        let mut parts = Parts::default();
        parts.take(Delta::Reasoning("hm".into()));
        parts.take(Delta::ToolCall { index: 0, id: "call_1".into(), name: "f".into() });
        parts.take(Delta::ToolArguments { index: 0, fragment: "{}".into() });
        let wanted = json!({"role": "assistant", "content": null, "reasoning_content": "hm", "refusal": null,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]});
        assert_eq!(message(parts), wanted);
        assert_eq!(message(Parts::default()), json!({"role": "assistant", "content": "", "refusal": null}));
    }

    #[test]
    fn texts_go_together_and_calls_alone() {
        let got = pieces(vec![
            Delta::Reasoning("a".into()),
            Delta::Content("b".into()),
            Delta::Content("c".into()),
            Delta::ToolCall { index: 0, id: "i".into(), name: "f".into() },
            Delta::ToolArguments { index: 0, fragment: "{".into() },
        ]);
        let wanted = [
            json!({"reasoning_content": "a", "content": "bc"}),
            json!({"tool_calls": [{"index": 0, "id": "i", "type": "function", "function": {"name": "f", "arguments": ""}}]}),
            json!({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}),
        ];
        assert_eq!(got, wanted);
        assert!(pieces(vec![Delta::ToolBroken { index: 0 }]).is_empty());
    }
}
