//! `/metrics` in Prometheus' text form. Times are seconds; the engine's own gauges are read when somebody asks.

use super::worker::WorkerStats;
use prometheus_client::encoding::{EncodeLabelSet, prometheus_text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::sync::atomic::Ordering;

/// `Content-Type` of what [`Metrics::encode`] gives.
pub const CONTENT_TYPE: &str = prometheus_text::CONTENT_TYPE;

/// From a token on a fast machine to a long prompt on a slow one.
const LATENCY: [f64; 15] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
/// From a health check to a long train of thought.
const DURATION: [f64; 13] = [0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0];

/// A request by where it went and how it ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    route: &'static str,
    status: u16,
}

/// All counters.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<Ended, Counter>,
    durations: Family<Route, Histogram, fn() -> Histogram>,
    /// Requests being answered.
    pub in_flight: Gauge,
    /// Tokens of prompts.
    pub prompt_tokens: Counter,
    /// Those of them that came from the cache.
    pub cached_tokens: Counter,
    /// Prompts with tokens from the cache.
    pub cache_hits: Counter,
    /// Prompts read.
    pub prompts: Counter,
    /// Tokens drawn.
    pub generated_tokens: Counter,
    /// From the request's arrival to its first token, seconds.
    pub first_token: Histogram,
    /// Between two tokens of a choice, seconds.
    pub between_tokens: Histogram,
    queue: Gauge,
    batch: Gauge,
    sequence_bytes: Gauge,
    cache_bytes: Gauge,
    cache_entries: Gauge,
    evictions: Counter,
    cancelled: Counter,
    panics: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    route: &'static str,
}

impl Metrics {
    /// All at nothing.
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("m1"),
            requests: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(DURATION)),
            in_flight: Gauge::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            cache_hits: Counter::default(),
            prompts: Counter::default(),
            generated_tokens: Counter::default(),
            first_token: Histogram::new(LATENCY),
            between_tokens: Histogram::new(LATENCY),
            queue: Gauge::default(),
            batch: Gauge::default(),
            sequence_bytes: Gauge::default(),
            cache_bytes: Gauge::default(),
            cache_entries: Gauge::default(),
            evictions: Counter::default(),
            cancelled: Counter::default(),
            panics: Counter::default(),
        };
        let registry = &mut metrics.registry;
        registry.register("requests", "Requests that have ended, by route and status", metrics.requests.clone());
        registry.register("request_duration_seconds", "From a request to its end", metrics.durations.clone());
        registry.register("requests_in_flight", "Requests being answered", metrics.in_flight.clone());
        registry.register("queue_size", "Replies that wait for a row of the batch", metrics.queue.clone());
        registry.register("batch_size", "Replies that are being made", metrics.batch.clone());
        registry.register("prompts", "Prompts that were read", metrics.prompts.clone());
        registry.register("prompt_tokens", "Tokens of prompts", metrics.prompt_tokens.clone());
        registry.register("cached_tokens", "Tokens of prompts that came from the cache", metrics.cached_tokens.clone());
        registry.register("generated_tokens", "Tokens drawn", metrics.generated_tokens.clone());
        registry.register("cache_hits", "Prompts with tokens from the cache", metrics.cache_hits.clone());
        registry.register("cache_bytes", "Bytes held by the prefix cache", metrics.cache_bytes.clone());
        registry.register("cache_entries", "Beginnings held by the prefix cache", metrics.cache_entries.clone());
        registry.register("cache_evictions", "Beginnings dropped for room", metrics.evictions.clone());
        registry.register("sequence_bytes", "Bytes of the caches of running replies", metrics.sequence_bytes.clone());
        registry.register("jobs_cancelled", "Jobs dropped because nobody listened", metrics.cancelled.clone());
        registry.register("engine_panics", "Panics of the engine that were caught", metrics.panics.clone());
        let help = "From a request to its first token";
        registry.register("time_to_first_token_seconds", help, metrics.first_token.clone());
        let help = "Between two tokens of a reply";
        registry.register("time_between_tokens_seconds", help, metrics.between_tokens.clone());
        metrics
    }

    /// Counts a request that has ended.
    pub fn ended(&self, route: &'static str, status: u16, seconds: f64) {
        self.requests.get_or_create(&Ended { route, status }).inc();
        self.durations.get_or_create(&Route { route }).observe(seconds);
    }

    /// The text, with the engine's state as `stats` tells it.
    pub fn encode(&self, stats: Option<&WorkerStats>) -> Result<String, std::fmt::Error> {
        if let Some(stats) = stats {
            let set = |gauge: &Gauge, value: u64| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
            set(&self.queue, stats.waiting as u64);
            set(&self.batch, stats.active as u64);
            set(&self.sequence_bytes, stats.bytes);
            set(&self.cache_bytes, stats.cache.bytes);
            set(&self.cache_entries, stats.cache.entries as u64);
            self.evictions.inner().store(stats.cache.evictions, Ordering::Relaxed);
            self.cancelled.inner().store(stats.cancelled, Ordering::Relaxed);
            self.panics.inner().store(stats.panics, Ordering::Relaxed);
        }
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batching::prefix_cache::CacheStats;

    #[test]
    fn the_text_is_prometheus_own() {
        let metrics = Metrics::new();
        metrics.ended("/health", 200, 0.002);
        metrics.generated_tokens.inc_by(7);
        metrics.first_token.observe(0.3);
        let cache = CacheStats { bytes: 1 << 20, evictions: 4, ..CacheStats::default() };
        let stats = WorkerStats { active: 3, waiting: 2, cache, ..WorkerStats::default() };
        let text = metrics.encode(Some(&stats)).unwrap();
        for wanted in [
            "# TYPE m1_requests_total counter",
            "m1_requests_total{route=\"/health\",status=\"200\"} 1",
            "m1_generated_tokens_total 7",
            "m1_batch_size 3",
            "m1_queue_size 2",
            "m1_cache_bytes 1048576",
            "m1_cache_evictions_total 4",
            "m1_time_to_first_token_seconds_bucket{le=\"0.5\"} 1",
            "m1_time_to_first_token_seconds_bucket{le=\"0.25\"} 0",
            "m1_request_duration_seconds_count{route=\"/health\"} 1",
        ] {
            assert!(text.contains(wanted), "{wanted}\n{text}");
        }
    }
}
