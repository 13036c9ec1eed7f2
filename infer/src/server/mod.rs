//! `m1 serve`: many conversations at once on one model, over OpenAI's API. A request goes through [`router`], is read and
//! checked ([`fields`], [`params`], [`chat_request`]), becomes a job of the engine's thread ([`worker`]), and what that
//! thread tells of it becomes the answer ([`generation`], [`chat`], [`completions`]), whole or event by event ([`stream`]).

pub mod body;
pub mod chat;
pub mod chat_request;
pub mod completions;
pub mod error;
pub mod fields;
pub mod generation;
pub mod http;
pub mod listener;
pub mod logprobs;
pub mod metrics;
pub mod params;
pub mod record;
pub mod router;
pub mod sse;
pub mod state;
pub mod stream;
pub mod tokens;
pub mod worker;

use crate::assets::Assets;
use crate::batching::SchedulerSettings;
use crate::guide::Grammars;
use crate::prompt::Prompter;
use anyhow::{Context, anyhow};
use listener::{Patience, Patient, Requests};
use state::{App, Phase, Service, Settings};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use worker::WorkerSettings;

/// Threads that talk to clients; the engine has its own.
const THREADS: usize = 2;
/// Threads that tokenize.
const BLOCKING: usize = 4;
/// How long cancelled connections may take to say so.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Serves until a signal ends it. The port is taken first, so that a wrong one shows at once; then `load` brings the model,
/// while `/health` answers 503.
pub fn run(
    settings: Settings,
    worker: impl FnOnce(&Assets) -> SchedulerSettings + Send + 'static,
    load: impl FnOnce() -> anyhow::Result<Assets> + Send + 'static,
) -> anyhow::Result<()> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(THREADS).max_blocking_threads(BLOCKING).enable_all().build()?;
    let result = runtime.block_on(serve(App::new(settings), worker, load));
    // What still runs (the engine, a loading model) ends with the process.
    runtime.shutdown_background();
    result
}

async fn serve(
    app: App,
    worker: impl FnOnce(&Assets) -> SchedulerSettings + Send + 'static,
    load: impl FnOnce() -> anyhow::Result<Assets> + Send + 'static,
) -> anyhow::Result<()> {
    let settings = &app.settings;
    let wanted = (settings.host, settings.port);
    let listener = TcpListener::bind(wanted).await.with_context(|| {
        let (host, port) = wanted;
        format!("--host {host} --port {port}: cannot listen there")
    })?;
    let address = listener.local_addr()?;
    let mut signals = Signals::new()?;

    let mut phase = app.watch();
    let draining = async move {
        let _ = phase.wait_for(|&phase| phase > Phase::Serving).await;
    };
    let listener = Patient::new(listener, Patience::default());
    let router = router::router(app.clone()).into_make_service_with_connect_info::<Requests>();
    let server = axum::serve(listener, router);
    let mut server = tokio::spawn(server.with_graceful_shutdown(draining).into_future());

    // A thread of its own: a model that is being loaded must not hold up the end.
    let (sender, loaded) = oneshot::channel();
    let queue = settings.parallel.saturating_add(settings.max_queue);
    std::thread::Builder::new().name("load".into()).spawn(move || {
        let _ = sender.send(load().and_then(|assets| service(assets, worker, queue)));
    })?;
    tokio::select! {
        service = loaded => app.ready(service.map_err(|_| anyhow!("the model could not be loaded"))??),
        () = signals.next() => return Ok(()),
    }
    let context = app.loaded().map_or(0, |service| service.assets.engine.context());
    tracing::info!(%address, model = app.name(), parallel = settings.parallel, context, "ready");
    note!("listening on http://{address}");

    signals.next().await;
    app.enter(Phase::Draining);
    let (patience, requests) = (settings.shutdown_timeout, app.metrics.in_flight.get());
    tracing::info!(requests, seconds = patience.as_secs(), "shutting down: no new requests, those under way go on");
    tokio::select! {
        _ = &mut server => return Ok(()),
        () = sleep(patience) => tracing::warn!(requests = app.metrics.in_flight.get(), "time is over: cancelled"),
        () = signals.next() => tracing::warn!(requests = app.metrics.in_flight.get(), "second signal: cancelled"),
    }
    app.enter(Phase::Stopping);
    let _ = timeout(LAST_WORDS, server).await;
    Ok(())
}

/// The model made ready to serve.
fn service(assets: Assets, worker: impl FnOnce(&Assets) -> SchedulerSettings, queue: usize) -> anyhow::Result<Service> {
    let assets = Arc::new(assets);
    let end_ids: Arc<[u32]> = assets.end_ids.clone().into();
    let settings = WorkerSettings { scheduler: worker(&assets), queue };
    Ok(Service {
        prompter: Prompter::new(&assets.tokenizer).map_err(|error| error.to_string()),
        grammars: Grammars::new(&assets.tokenizer, &end_ids).map_err(|error| error.to_string()),
        sampler: assets.sampler(assets.generation.sampling())?,
        created: http::now(),
        engine: worker::spawn(assets.clone(), settings).context("the engine's thread")?,
        assets,
        end_ids,
    })
}

/// SIGINT and SIGTERM, one after another.
struct Signals {
    #[cfg(unix)]
    kinds: [tokio::signal::unix::Signal; 2],
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            Ok(Self { kinds: [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?] })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        {
            let [interrupt, terminate] = &mut self.kinds;
            tokio::select! {
                _ = interrupt.recv() => (),
                _ = terminate.recv() => (),
            }
        }
        #[cfg(not(unix))]
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batching::BatchSettings;
    use crate::engine::tests::tiny;
    use crate::generation_config::GenerationConfig;
    use crate::tokenizer::tests::byte_level;
    use axum::extract::State;
    use std::time::Instant;

    #[test]
    fn a_server_without_its_engine_is_not_well() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = Arc::new(byte_level(dir.path(), &["x", "y"]));
        let (engine, generation) = (tiny(96, 200), GenerationConfig::default());
        let assets = Assets { engine, tokenizer, generation, end_ids: Vec::new() };
        let app = App::new(Settings::default());
        let health = || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(tokens::health(State(app.clone())))
        };
        assert_eq!(health().unwrap_err().message, "the model is being loaded");
        app.ready(service(assets, |_| SchedulerSettings::new(BatchSettings::new(1, 200), 1 << 20), 8).unwrap());
        assert_eq!(health().unwrap().status(), 200);
        app.loaded().unwrap().engine.stop();
        let start = Instant::now();
        let error = loop {
            match health() {
                Ok(_) => assert!(start.elapsed() < Duration::from_secs(60), "still well"),
                Err(error) => break error,
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(error.status, 503);
        assert!(error.message.starts_with("the engine has ended"), "{error}");
    }
}
