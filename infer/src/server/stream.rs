//! Tells a client of generations as they go on: waits for what is new, keeps the connection alive meanwhile, and gives up
//! when the client is gone or the request's time is over, even if the client does not read.

use super::error::ApiError;
use super::generation::{Event, Generation};
use super::record::Record;
use super::sse::{Events, Gone};
use super::state::Permit;
use axum::response::Response;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Silence after which a comment is sent.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long the engine may take to refuse a job before the stream begins.
pub const FIRST_WORD: Duration = Duration::from_millis(500);
/// How long the last word of a broken stream may take.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Why a stream ends before its end.
#[derive(Debug)]
pub enum Broken {
    /// Nobody reads any more.
    Gone,
    /// It may not go on.
    Error(ApiError),
}

impl From<Gone> for Broken {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<ApiError> for Broken {
    fn from(error: ApiError) -> Self {
        Self::Error(error)
    }
}

/// What happens next in `generation`; `None` when it has ended.
pub async fn next(generation: &mut Generation, events: &Events) -> Result<Option<Event>, Broken> {
    loop {
        tokio::select! {
            biased;
            () = events.gone() => return Err(Broken::Gone),
            event = generation.next() => return Ok(event?),
            () = sleep(KEEP_ALIVE) => events.comment().await?,
        }
    }
}

/// Sends `value`, for as long as `generation` may go on.
pub async fn send(generation: &mut Generation, events: &Events, value: &Value) -> Result<(), Broken> {
    tokio::select! {
        biased;
        sent = events.json(value) => Ok(sent?),
        error = generation.limit() => Err(error.into()),
    }
}

/// Runs `tell` beside the response that shows what it writes. Where it breaks with an error, that is the last event.
pub fn respond<F>(record: Arc<Record>, permit: Permit, tell: impl FnOnce(Events) -> F) -> Response
where
    F: Future<Output = Result<(), Broken>> + Send + 'static,
{
    let (events, response) = Events::new();
    record.open(true);
    let told = tell(events.clone());
    tokio::spawn(async move {
        let _permit = permit;
        match told.await {
            Ok(()) => record.open(false),
            Err(Broken::Gone) => (),
            Err(Broken::Error(error)) => {
                record.error(&error.message);
                let _ = timeout(LAST_WORD, events.json(&error.body())).await;
            }
        }
    });
    response
}
