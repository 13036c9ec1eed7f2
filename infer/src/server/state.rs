//! What all requests share: settings, the model once it is loaded, the limit of the queue, and whether the server ends.

use super::error::ApiError;
use super::metrics::Metrics;
use super::worker::EngineHandle;
use crate::assets::Assets;
use crate::guide::Grammars;
use crate::prompt::Prompter;
use crate::sampler::Sampler;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::watch;

/// How to serve.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Address to listen on.
    pub host: IpAddr,
    /// Port; 0 takes a free one.
    pub port: u16,
    /// The model's names: the first is told to clients, all are accepted.
    pub names: Vec<String>,
    /// Keys of which every request must bring one; none: no key is asked for.
    pub api_keys: Vec<String>,
    /// Origins whose pages may use the API; `*` is any.
    pub cors: Vec<String>,
    /// The most bytes of a body.
    pub max_body: usize,
    /// Rows of the batch.
    pub parallel: usize,
    /// The most replies that wait for a row.
    pub max_queue: usize,
    /// The longest that a request may take; `None`: no limit.
    pub timeout: Option<Duration>,
    /// How long replies may go on after the first signal to end.
    pub shutdown_timeout: Duration,
}

impl Default for Settings {
    /// `m1 serve` without flags: port 8000 of this machine alone, no key, eight replies at once.
    fn default() -> Self {
        Self {
            host: Ipv4Addr::LOCALHOST.into(),
            port: 8000,
            names: vec!["m1".into()],
            api_keys: Vec::new(),
            cors: Vec::new(),
            max_body: 16 << 20,
            parallel: 8,
            max_queue: 256,
            timeout: Some(Duration::from_secs(3600)),
            shutdown_timeout: Duration::from_secs(30),
        }
    }
}

/// How far the server's life has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It takes requests (once the model is loaded).
    Serving,
    /// It takes no more, and finishes those it has.
    Draining,
    /// It cancels those that are left.
    Stopping,
}

/// The model and what belongs to it.
#[derive(Debug)]
pub struct Service {
    /// Model, tokenizer, defaults.
    pub assets: Arc<Assets>,
    /// The engine's thread.
    pub engine: EngineHandle,
    /// Makes prompts; or why there are none (no chat template).
    pub prompter: Result<Prompter, String>,
    /// Makes grammars; or why there are none.
    pub grammars: Result<Grammars, String>,
    /// Ids that end a reply.
    pub end_ids: Arc<[u32]>,
    /// A sampler that knows which ids exist.
    pub sampler: Sampler,
    /// Seconds since 1970 when the model was ready.
    pub created: u64,
}

/// All of it; cheap to clone.
#[derive(Debug, Clone)]
pub struct App(Arc<Shared>);

/// What [`App`] points to.
#[derive(Debug)]
pub struct Shared {
    /// How to serve.
    pub settings: Settings,
    /// The counters.
    pub metrics: Arc<Metrics>,
    service: OnceLock<Arc<Service>>,
    phase: watch::Sender<Phase>,
    replies: Arc<AtomicUsize>,
}

impl std::ops::Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl App {
    /// Without a model so far.
    pub fn new(settings: Settings) -> Self {
        Self(Arc::new(Shared {
            settings,
            metrics: Arc::new(Metrics::new()),
            service: OnceLock::new(),
            phase: watch::Sender::new(Phase::Serving),
            replies: Arc::default(),
        }))
    }
}

impl Shared {
    /// The model is loaded.
    pub fn ready(&self, service: Service) {
        let _ = self.service.set(Arc::new(service));
    }

    /// The model, if requests are taken.
    pub fn service(&self) -> Result<Arc<Service>, ApiError> {
        if self.phase() > Phase::Serving {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        let service = self.service.get().ok_or_else(|| ApiError::unavailable("the model is being loaded"))?;
        if !service.engine.is_running() {
            return Err(ApiError::unavailable("the engine has ended: the server must be started again"));
        }
        Ok(service.clone())
    }

    /// The model, whatever the phase.
    pub fn loaded(&self) -> Option<&Service> {
        self.service.get().map(Arc::as_ref)
    }

    /// How far the server's life has come.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Goes on to `phase`; there is no way back.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let later = phase > *now;
            *now = phase.max(*now);
            later
        });
    }

    /// Follows the phase.
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Checks the name of the model that a request asks for.
    pub fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        let names = &self.settings.names;
        match asked {
            Some(asked) if !names.iter().any(|name| name == asked) => Err(ApiError::model(asked, self.name())),
            _ => Ok(()),
        }
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        self.settings.names.first().map_or("m1", String::as_str)
    }

    /// Room for `n` replies, until the permit is dropped.
    pub fn admit(&self, n: usize) -> Result<Permit, ApiError> {
        let limit = self.settings.parallel.saturating_add(self.settings.max_queue);
        if n > limit {
            let message = format!("n is {n}, and this server makes at most {limit} replies at once");
            return Err(ApiError::field("n", message));
        }
        let running = self.replies.fetch_add(n, Ordering::Relaxed);
        let permit = Permit { replies: self.replies.clone(), n };
        if running + n > limit { Err(ApiError::busy(running, limit)) } else { Ok(permit) }
    }
}

/// Room for some replies.
#[derive(Debug)]
pub struct Permit {
    replies: Arc<AtomicUsize>,
    n: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.replies.fetch_sub(self.n, Ordering::Relaxed);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn settings() -> Settings {
        let names = vec!["tiny".into(), "other-name".into()];
        Settings { names, parallel: 2, max_queue: 1, timeout: None, ..Settings::default() }
    }

    #[test]
    fn room_is_for_the_batch_and_the_queue_and_comes_back() {
        let app = App::new(settings());
        assert_eq!(app.admit(4).unwrap_err().param.as_deref(), Some("n"));
        let two = app.admit(2).unwrap();
        let one = app.admit(1).unwrap();
        let error = app.admit(1).unwrap_err();
        assert_eq!((error.status.as_u16(), error.retry_after), (429, Some(1)));
        drop(one);
        assert!(app.admit(2).is_err());
        drop(two);
        assert!(app.admit(3).is_ok());
    }

    #[test]
    fn phases_only_go_on_and_models_have_names() {
        let app = App::new(settings());
        assert_eq!(app.service().unwrap_err().message, "the model is being loaded");
        app.enter(Phase::Stopping);
        app.enter(Phase::Draining);
        assert_eq!(app.phase(), Phase::Stopping);
        assert_eq!(app.service().unwrap_err().message, "the server is shutting down");
        assert_eq!(app.check_model(None), Ok(()));
        assert_eq!(app.check_model(Some("other-name")), Ok(()));
        let error = app.check_model(Some("gpt-4")).unwrap_err();
        assert_eq!((error.status.as_u16(), error.code), (404, Some("model_not_found")));
    }
}
