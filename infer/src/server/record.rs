//! What becomes of a request: one line of the log and its counts when it has ended, however it ends. The last holder of a
//! [`Record`] writes it, so that a client that goes away in mid-stream is told of too.

use super::metrics::Metrics;
use crate::sampler::random_seed;
use axum::http::{Method, StatusCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Status of a request whose client went away (nginx's 499).
const GONE: u16 = 499;

/// Routes by name; anything else is one of many mistakes.
const ROUTES: [&str; 9] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/health",
    "/metrics",
    "/",
    "/v1/models/{id}",
];

/// One request.
#[derive(Debug)]
pub struct Record {
    metrics: Arc<Metrics>,
    id: String,
    method: Method,
    route: &'static str,
    start: Instant,
    told: Mutex<Told>,
}

#[derive(Debug, Clone, Default)]
struct Told {
    status: Option<u16>,
    prompt: Option<usize>,
    cached: usize,
    made: usize,
    first: Option<Duration>,
    error: Option<String>,
    /// A stream has begun and not come to its end.
    open: bool,
}

impl Record {
    /// A request has come.
    pub fn new(metrics: Arc<Metrics>, method: Method, path: &str) -> Arc<Self> {
        metrics.in_flight.inc();
        let id = format!("{:012x}", random_seed() >> 16);
        let (route, start) = (route(path), Instant::now());
        Arc::new(Self { metrics, id, method, route, start, told: Mutex::default() })
    }

    /// Its name in the log and in the `x-request-id` of the answer.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// When it came.
    pub fn start(&self) -> Instant {
        self.start
    }

    /// The counters.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The status of the answer.
    pub fn status(&self, status: StatusCode) {
        self.tell(|told| told.status = Some(status.as_u16()));
    }

    /// The prompt has been read.
    pub fn read(&self, prompt: usize, cached: usize) {
        self.metrics.prompts.inc();
        self.metrics.prompt_tokens.inc_by(prompt as u64);
        self.metrics.cached_tokens.inc_by(cached as u64);
        self.metrics.cache_hits.inc_by(u64::from(cached > 0));
        self.tell(|told| (told.prompt, told.cached) = (Some(prompt), cached));
    }

    /// A token was drawn for a choice; its last one came at `last`.
    pub fn drawn(&self, last: Option<Instant>, now: Instant) {
        self.metrics.generated_tokens.inc();
        if let Some(last) = last {
            self.metrics.between_tokens.observe((now - last).as_secs_f64());
        }
        let since = now - self.start;
        self.tell(|told| {
            told.made += 1;
            if told.first.is_none() {
                told.first = Some(since);
                self.metrics.first_token.observe(since.as_secs_f64());
            }
        });
    }

    /// A stream begins (true) or has been written to its end (false).
    pub fn open(&self, open: bool) {
        self.tell(|told| told.open = open);
    }

    /// What went wrong, also after the status was sent.
    pub fn error(&self, message: &str) {
        self.tell(|told| told.error = Some(message.to_string()));
    }

    fn tell(&self, f: impl FnOnce(&mut Told)) {
        f(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let took = self.start.elapsed();
        let status = if told.open && told.error.is_none() { GONE } else { told.status.unwrap_or(GONE) };
        self.metrics.in_flight.dec();
        self.metrics.ended(self.route, status, took.as_secs_f64());
        let ms = |time: Duration| (time.as_secs_f64() * 1e4).round() / 1e1;
        let (id, method, route, ms_all) = (&self.id, &self.method, self.route, ms(took));
        let error = told.error.as_deref();
        let first = told.first.map(ms);
        match told.prompt {
            Some(prompt) => tracing::info!(
                id, %method, route, status, prompt, cached = told.cached, completion = told.made, ms_first = first,
                ms = ms_all, error, "request"
            ),
            // Somebody who only looks whether we are there would fill the log.
            None if matches!(route, "/health" | "/metrics") && status == 200 => {
                tracing::debug!(id, %method, route, status, ms = ms_all, "request");
            }
            None => tracing::info!(id, %method, route, status, ms = ms_all, error, "request"),
        }
    }
}

/// The route of a path, as a name of which there are only a few.
fn route(path: &str) -> &'static str {
    let known = ROUTES.iter().find(|&&route| route == path);
    let model = || path.strip_prefix("/v1/models/").map(|_| "/v1/models/{id}");
    known.copied().or_else(model).unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_counted_once_however_it_ends() {
        let metrics = Arc::new(Metrics::new());
        let ended = |path: &str, f: &dyn Fn(&Record)| {
            let record = Record::new(metrics.clone(), Method::GET, path);
            f(&record);
            drop(record.clone());
            assert_eq!(metrics.in_flight.get(), 1);
        };
        ended("/health", &|r| r.status(StatusCode::OK));
        ended("/v1/models/a/b", &|r| r.status(StatusCode::NOT_FOUND));
        ended("/v1/completions", &|_| ()); // the client left before the answer
        ended("/v1/chat/completions", &|r| {
            r.status(StatusCode::OK);
            r.open(true); // and here in mid-stream
        });
        ended("/v1/chat/completions", &|r| {
            r.status(StatusCode::OK);
            r.open(true);
            r.read(10, 4);
            let now = Instant::now();
            r.drawn(None, now);
            r.drawn(Some(now), now);
            r.open(false);
        });
        ended("/<random>", &|r| r.status(StatusCode::NOT_FOUND));
        assert_eq!(metrics.in_flight.get(), 0);
        let text = metrics.encode(None).unwrap();
        for wanted in [
            "m1_requests_total{route=\"/health\",status=\"200\"} 1",
            "m1_requests_total{route=\"/v1/models/{id}\",status=\"404\"} 1",
            "m1_requests_total{route=\"/v1/completions\",status=\"499\"} 1",
            "m1_requests_total{route=\"/v1/chat/completions\",status=\"499\"} 1",
            "m1_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1",
            "m1_requests_total{route=\"other\",status=\"404\"} 1",
            "m1_prompt_tokens_total 10",
            "m1_cached_tokens_total 4",
            "m1_cache_hits_total 1",
            "m1_time_to_first_token_seconds_count 1",
            "m1_time_between_tokens_seconds_count 1",
        ] {
            assert!(text.contains(wanted), "{wanted}\n{text}");
        }
    }
}
