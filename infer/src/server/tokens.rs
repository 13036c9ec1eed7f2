//! The small routes: `/tokenize`, `/detokenize`, `/v1/models`, `/health`, `/metrics` and the page.

use super::chat_request::ChatRequest;
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::http::{blocking, content, json};
use super::state::{App, Phase, Service, Shared};
use super::{body, logprobs, metrics};
use crate::sampler::random_seed;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::{Value, json};

const PAGE: &str = include_str!("page.html");

/// The ids of `content` (or `prompt`), or of a conversation under the chat template (`messages` and what goes with them).
pub async fn tokenize(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let service = app.service()?;
    let body = body::read(request, app.settings.max_body).await?;
    let shared = app.clone();
    let ids = blocking(move || ids(Fields::parse(&body)?, &shared, &service));
    let (ids, context) = ids.await?;
    Ok(json(&json!({"count": ids.len(), "max_model_len": context, "tokens": ids})))
}

fn ids(mut fields: Fields, shared: &Shared, service: &Service) -> Result<(Vec<u32>, usize), ApiError> {
    let assets = &service.assets;
    let context = assets.engine.context();
    let (text, prompt) = (fields.text("content")?, fields.text("prompt")?);
    let (text, field) = match (text, prompt) {
        (Some(_), Some(_)) => return Err(ApiError::field("prompt", "content and prompt are the same: give one")),
        (Some(text), None) => (text, "content"),
        (None, Some(text)) => (text, "prompt"),
        (None, None) => return Ok((ChatRequest::read(fields, shared, service)?.prompt(service)?.ids, context)),
    };
    shared.check_model(fields.text("model")?.as_deref())?;
    let special = fields.flag("add_special")?;
    let special = special.or(fields.flag("add_special_tokens")?).unwrap_or(false);
    fields.finish()?;
    let ids = assets.tokenizer.encode(&text, special);
    Ok((ids.map_err(|error| ApiError::field(field, error.to_string()))?, context))
}

/// The text of `tokens`, special tokens by their names.
pub async fn detokenize(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let service = app.service()?;
    let body = body::read(request, app.settings.max_body).await?;
    let shared = app.clone();
    let text = blocking(move || text(Fields::parse(&body)?, &shared, &service)).await?;
    Ok(json(&json!({"content": text, "prompt": text})))
}

fn text(mut fields: Fields, shared: &Shared, service: &Service) -> Result<String, ApiError> {
    shared.check_model(fields.text("model")?.as_deref())?;
    let tokens = fields.list("tokens")?.ok_or_else(|| ApiError::field("tokens", "tokens is missing: a list of ids"))?;
    fields.finish()?;
    let tokenizer = &service.assets.tokenizer;
    let mut bytes = Vec::new();
    let mut rest = Vec::new();
    for (i, value) in tokens.iter().enumerate() {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| tokenizer.token(id).is_some());
        let id = id.ok_or_else(|| wrong(&format!("tokens[{i}]"), value, "the id of a token"))?;
        match tokenizer.bytes(id) {
            Some([]) => bytes.extend(logprobs::shown(tokenizer, id).into_bytes()),
            Some(own) => bytes.extend(own),
            None => rest.push(id), // not byte-level: only all together are a text
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned() + &tokenizer.decode(&rest))
}

/// All names of the model.
pub async fn models(State(app): State<App>) -> Result<Response, ApiError> {
    let service = app.service()?;
    let list: Vec<Value> = app.settings.names.iter().map(|name| model(&service, name)).collect();
    Ok(json(&json!({"object": "list", "data": list})))
}

/// One of them.
pub async fn one_model(State(app): State<App>, Path(name): Path<String>) -> Result<Response, ApiError> {
    let service = app.service()?;
    app.check_model(Some(&name))?;
    Ok(json(&model(&service, &name)))
}

fn model(service: &Service, name: &str) -> Value {
    let context = service.assets.engine.context();
    json!({"id": name, "object": "model", "created": service.created, "owned_by": "m1", "max_model_len": context})
}

/// Whether requests are taken.
pub async fn health(State(app): State<App>) -> Result<Response, ApiError> {
    app.service()?;
    Ok(json(&json!({"status": "ok"})))
}

/// The counters.
pub async fn counters(State(app): State<App>) -> Result<Response, ApiError> {
    let stats = app.loaded().filter(|_| app.phase() < Phase::Stopping).map(|service| service.engine.stats());
    let text = app.metrics.encode(stats.as_ref());
    let text = text.map_err(|_| ApiError::internal("the metrics could not be written"))?;
    Ok(content(metrics::CONTENT_TYPE, text))
}

/// The chat page. Only its own script and style run, those that bear a number which is new each time, and no other site
/// may show it in a frame, where it could be made to act for whoever is asked to click.
pub async fn page() -> Response {
    let nonce = format!("{:016x}{:016x}", random_seed(), random_seed());
    let mut page = PAGE.to_string();
    for tag in ["style", "script"] {
        page = page.replacen(&format!("<{tag}>"), &format!("<{tag} nonce=\"{nonce}\">"), 1);
    }
    let policy = format!(
        "default-src 'none'; connect-src 'self'; img-src data:; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let mut response = content("text/html; charset=utf-8", page);
    let headers = response.headers_mut();
    if let Ok(policy) = HeaderValue::try_from(policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}
