//! The body of a request: only JSON, never more than the limit, and not slower than the slowest line.

use super::error::ApiError;
use axum::body::Bytes;
use axum::extract::Request;
use axum::http::header;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_stream::StreamExt;

/// The longest silence within a body, and the fewest bytes a second on the whole: what comes in trickles would never end.
const PACE: Pace = Pace { silence: Duration::from_secs(30), rate: 1 << 10 };
/// How long the rest of a refused body is read and thrown away, so that the client gets to see the refusal.
const DRAIN: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy)]
struct Pace {
    silence: Duration,
    rate: u32,
}

/// Reads the whole body, of at most `limit` bytes.
pub async fn read(request: Request, limit: usize) -> Result<Vec<u8>, ApiError> {
    read_at(request, limit, PACE).await
}

async fn read_at(request: Request, limit: usize, pace: Pace) -> Result<Vec<u8>, ApiError> {
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
        let Pace { silence, rate } = pace;
        let start = Instant::now();
        loop {
            let slowest = start + silence + Duration::from_secs_f64(body.len() as f64 / f64::from(rate));
            let silent = Instant::now() + silence;
            match timeout_at(slowest.min(silent), stream.next()).await {
                Err(_) if body.is_empty() || silent <= slowest => return Err(ApiError::silent_body(silence.as_secs())),
                Err(_) => return Err(ApiError::slow_body(rate)),
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

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use std::convert::Infallible;
    use tokio::time::sleep;

    /// A body of `pieces` of so many bytes, one after each pause, and no end after them if `open`.
    fn read(pieces: usize, size: usize, pause: u64, open: bool, pace: Pace) -> Result<usize, ApiError> {
        let piece = move |_| async move {
            sleep(Duration::from_millis(pause)).await;
            Ok::<_, Infallible>(Bytes::from(vec![b' '; size]))
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let stream = tokio_stream::iter(0..pieces).then(piece);
            let body =
                if open { Body::from_stream(stream.chain(tokio_stream::pending())) } else { Body::from_stream(stream) };
            let request = Request::builder().header(header::CONTENT_TYPE, "application/json").body(body).unwrap();
            read_at(request, 1 << 20, pace).await.map(|body| body.len())
        })
    }

    #[test]
    fn a_body_may_be_slow_but_neither_silent_nor_a_trickle() {
        let pace = |silence: u64, rate: u32| Pace { silence: Duration::from_millis(silence), rate };
        let code = |result: Result<usize, ApiError>| {
            let error = result.unwrap_err();
            assert_eq!((error.status.as_u16(), error.code), (408, Some("body_timeout")));
            error.message
        };
        assert!(code(read(0, 0, 0, true, pace(50, 1000))).contains("nothing arrived"));
        assert!(code(read(3, 1000, 1, true, pace(100, 1))).contains("nothing arrived"));
        // What came fast before is no leave to be silent.
        assert!(code(read(1, 100_000, 1, true, pace(100, 100))).contains("nothing arrived"));
        assert!(code(read(1000, 1, 5, false, pace(100, 1 << 20))).contains("less than 1048576 bytes a second"));
        assert_eq!(read(20, 1000, 100, false, pace(1500, 1000)), Ok(20_000));
        assert_eq!(read(0, 0, 0, false, pace(400, 1000)), Ok(0));
    }
}
