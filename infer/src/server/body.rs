//! The body of a request: only JSON, never more than the limit, and not slower than a person would wait.

use super::error::ApiError;
use axum::body::Bytes;
use axum::extract::Request;
use axum::http::header;
use std::time::Duration;
use tokio::time::timeout;
use tokio_stream::StreamExt;

/// The longest silence within a body.
const SILENCE: Duration = Duration::from_secs(30);
/// How long the rest of a refused body is read and thrown away, so that the client gets to see the refusal.
const DRAIN: Duration = Duration::from_secs(2);

/// Reads the whole body, of at most `limit` bytes.
pub async fn read(request: Request, limit: usize) -> Result<Vec<u8>, ApiError> {
    let headers = request.headers();
    let media = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let is_json = media.split(';').next().is_some_and(|media| media.trim().eq_ignore_ascii_case("application/json"));
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let mut stream = request.into_body().into_data_stream();
    let mut body = Vec::new();
    let refused = if !is_json {
        ApiError::media_type()
    } else if length.is_some_and(|length| length > limit) {
        ApiError::too_large(limit)
    } else {
        loop {
            match timeout(SILENCE, stream.next()).await {
                Err(_) => return Err(ApiError::slow_body(SILENCE.as_secs())),
                Ok(None) => return Ok(body),
                Ok(Some(Err(e))) => return Err(ApiError::json(format!("the body did not come whole: {e}"))),
                Ok(Some(Ok(bytes))) if body.len() + bytes.len() <= limit => body.extend_from_slice(&bytes),
                Ok(Some(Ok(_))) => break ApiError::too_large(limit),
            }
        }
    };
    drop(body);
    let mut left = limit; // as much again, and no more
    let rest = async {
        while let Some(Ok(bytes)) = stream.next().await {
            match left.checked_sub(Bytes::len(&bytes)) {
                Some(less) => left = less,
                None => break,
            }
        }
    };
    let _ = timeout(DRAIN, rest).await;
    Err(refused)
}
