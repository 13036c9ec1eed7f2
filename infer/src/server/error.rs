//! What a client is told when something is wrong: OpenAI's error object, with the status that belongs to it.

use crate::engine::EngineError;
use crate::sampler::SamplerError;
use crate::tools::FieldError;
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// A request that is not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// One line for people.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// OpenAI's `code`, for programs.
    pub code: Option<&'static str>,
    /// Seconds after which it is worth asking again.
    pub retry_after: Option<u32>,
}

const INVALID: &str = "invalid_request_error";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// A field with a wrong value; `message` begins with the field's name.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = Some(param.into());
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, INVALID, message) }
    }

    /// A field that OpenAI's API has and this server does not.
    pub fn unsupported(param: impl Into<String>, why: &str) -> Self {
        let param = param.into();
        let message = format!("{param} is not supported: {why}");
        Self { code: Some("unsupported_parameter"), ..Self::field(param, message) }
    }

    /// A field that nobody knows.
    pub fn unknown(param: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("unknown field: {param} (fields are refused rather than ignored)");
        Self { code: Some("unknown_parameter"), ..Self::field(param, message) }
    }

    /// A body that is no JSON object.
    pub fn json(message: impl Into<String>) -> Self {
        Self { code: Some("invalid_json"), ..Self::new(StatusCode::BAD_REQUEST, INVALID, message) }
    }

    /// A prompt that leaves no room for a reply.
    pub fn context(param: &str, tokens: usize, context: usize) -> Self {
        let message =
            format!("{param} is {tokens} tokens long, and the context holds {context}: there is no room for a reply");
        Self { code: Some("context_length_exceeded"), ..Self::field(param, message) }
    }

    /// No key, or a wrong one.
    pub fn unauthorized() -> Self {
        let message = "an API key is needed: send `Authorization: Bearer KEY` with one of this server's keys";
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, INVALID, message) }
    }

    /// Another model than the one served.
    pub fn model(asked: &str, served: &str) -> Self {
        let message = format!("the model {asked:?} is not here; this server has {served:?}");
        let error = Self::new(StatusCode::NOT_FOUND, INVALID, message);
        Self { param: Some("model".into()), code: Some("model_not_found"), ..error }
    }

    /// No such route.
    pub fn route(method: &str, path: &str) -> Self {
        let message = format!("{method} {path}: no such route; see /v1/chat/completions, /v1/completions, /v1/models");
        Self { code: Some("unknown_url"), ..Self::new(StatusCode::NOT_FOUND, INVALID, message) }
    }

    /// A route that is there for another method.
    pub fn method(method: &str, path: &str) -> Self {
        let message = format!("{method} {path}: this route is not for {method}");
        let error = Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, message);
        Self { code: Some("method_not_allowed"), ..error }
    }

    /// A body beyond the limit.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the body has more than {limit} bytes (--max-body)");
        Self { code: Some("body_too_large"), ..Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, message) }
    }

    /// A body that is not declared as JSON. (A page of another site may send anything else without being asked.)
    pub fn media_type() -> Self {
        let message = "the body must be JSON: send `Content-Type: application/json`";
        Self { code: Some("unsupported_media_type"), ..Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, message) }
    }

    /// The client does not go on with its body.
    pub fn silent_body(seconds: u64) -> Self {
        Self::body_timeout(format!("the body has not come: nothing arrived for {seconds} s"))
    }

    /// The client sends its body too slowly.
    pub fn slow_body(rate: u32) -> Self {
        Self::body_timeout(format!("the body has not come: it comes with less than {rate} bytes a second"))
    }

    fn body_timeout(message: String) -> Self {
        Self { code: Some("body_timeout"), ..Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, message) }
    }

    /// The queue is full.
    pub fn busy(running: usize, limit: usize) -> Self {
        let message = format!("{running} replies are being made or wait, and {limit} is the limit; try again later");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("queue_full"), retry_after: Some(1), ..error }
    }

    /// The server begins or ends.
    pub fn unavailable(why: &str) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", why);
        Self { code: Some("unavailable"), retry_after: Some(5), ..error }
    }

    /// A reply that took too long.
    pub fn timeout(seconds: u64) -> Self {
        let message = format!("the reply was not finished within {seconds} s (--timeout)");
        Self { code: Some("timeout"), ..Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", message) }
    }

    /// Something went wrong here.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// What the engine refuses; `param` is the field that the prompt came from.
    pub fn engine(error: &EngineError, param: &str) -> Self {
        match error {
            EngineError::Empty => Self::field(param, format!("{param} has no tokens, and at least one is needed")),
            EngineError::UnknownId { .. } => Self::field(param, format!("{param}: {error}")),
            EngineError::Memory { .. } => {
                Self { code: Some("memory_exceeded"), ..Self::field(param, format!("{param}: {error}")) }
            }
            EngineError::Context { tokens, context } => Self::context(param, *tokens, *context),
            _ => Self::internal(error.to_string()),
        }
    }

    /// The error object.
    pub fn body(&self) -> Value {
        let Self { kind, message, param, code, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl From<FieldError> for ApiError {
    fn from(error: FieldError) -> Self {
        let message = error.to_string();
        Self::field(error.field, message)
    }
}

impl From<SamplerError> for ApiError {
    fn from(error: SamplerError) -> Self {
        match &error {
            SamplerError::Range { name, .. } => Self::field(*name, error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.body().to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(self); // for the log
        response
    }
}
