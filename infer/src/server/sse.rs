//! A streamed answer: server-sent events over a short channel. A reader that is slow fills the channel and makes only its
//! own task wait; a reader that goes away closes it.

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::Value;
use std::convert::Infallible;
use tokio::sync::mpsc::{Sender, channel};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// Events that may wait for the reader.
const WAITING: usize = 16;

/// The reader is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gone;

/// Writes events.
#[derive(Debug, Clone)]
pub struct Events(Sender<Bytes>);

impl Events {
    /// The writer, and the response that shows what is written.
    pub fn new() -> (Self, Response) {
        let (sender, receiver) = channel(WAITING);
        let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<_, Infallible>));
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // Proxies of nginx's kind would hold a stream back otherwise.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        (Self(sender), response)
    }

    /// Writes an event of JSON.
    pub async fn json(&self, value: &Value) -> Result<(), Gone> {
        self.write(format!("data: {value}\n\n")).await
    }

    /// Writes the end.
    pub async fn done(&self) -> Result<(), Gone> {
        self.write("data: [DONE]\n\n".into()).await
    }

    /// Writes a comment, which tells everybody on the way that the stream lives.
    pub async fn comment(&self) -> Result<(), Gone> {
        self.write(": still here\n\n".into()).await
    }

    /// Waits until the reader is gone.
    pub async fn gone(&self) {
        self.0.closed().await;
    }

    async fn write(&self, text: String) -> Result<(), Gone> {
        self.0.send(text.into()).await.map_err(|_| Gone)
    }
}
