//! Small things that the routes share.

use super::error::ApiError;
use super::record::Record;
use crate::sampler::random_seed;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::Value;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// A response of JSON.
pub fn json(value: &Value) -> Response {
    content("application/json", value.to_string())
}

/// A response of some other kind.
pub fn content(media: &'static str, text: impl Into<Body>) -> Response {
    let mut response = Response::new(text.into());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    response
}

/// A new name for an answer.
pub fn id(kind: &str) -> String {
    format!("{kind}-{:016x}", random_seed())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// The record that the outermost layer has begun.
///
/// # Panics
/// Without that layer, which every route has.
pub fn record(request: &Request) -> Arc<Record> {
    request.extensions().get::<Arc<Record>>().expect("every request has a record").clone()
}

/// Runs `work` (a long text may take a second to tokenize) where it holds up nobody.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::internal(format!("the request could not be worked on: {error}"))),
    }
}
