//! The engine's thread: it alone touches the model. Jobs come in over a channel, what happens to them goes out over one
//! channel each; a job whose receiver is gone is cancelled before the next step. A panic of the engine fails the jobs
//! under way, not the server.

pub use crate::batching::scheduler::{Choice, Job, SchedulerSettings, Update};

use crate::assets::Assets;
use crate::batching::prefix_cache::CacheStats;
use crate::batching::scheduler::{JobId, Scheduler};
use crate::engine::EngineError;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The limits of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerSettings {
    /// Of the batch and the prefix cache.
    pub scheduler: SchedulerSettings,
    /// Jobs that may wait; more are refused.
    pub queue: usize,
}

/// Why a job was not taken in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Too many wait.
    #[error("{waiting} requests wait already, and no more than {limit} may: try again later")]
    Full {
        /// Jobs that wait.
        waiting: usize,
        /// The most that may.
        limit: usize,
    },
    /// The engine has ended.
    #[error("the engine is shutting down")]
    Stopped,
}

/// What the engine is doing, as of its last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkerStats {
    /// Answers that are being made.
    pub active: usize,
    /// Jobs that wait.
    pub waiting: usize,
    /// Bytes of the caches of the running sequences.
    pub bytes: u64,
    /// Steps taken.
    pub steps: u64,
    /// Prompt tokens of the jobs whose prompts have been read.
    pub prompt_tokens: u64,
    /// Of these, tokens that came from the cache.
    pub cached_tokens: u64,
    /// Tokens drawn.
    pub drawn_tokens: u64,
    /// Jobs that were dropped because nobody listened any more.
    pub cancelled: u64,
    /// Panics of the engine that were caught.
    pub panics: u64,
    /// The prefix cache.
    pub cache: CacheStats,
}

enum Command {
    Run(Job, UnboundedSender<Update>),
    Stop,
}

/// The way to the engine's thread; clones lead to the same.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    /// Jobs sent that the thread has not taken yet, and those that wait there.
    coming: Arc<AtomicUsize>,
    stats: Arc<Mutex<WorkerStats>>,
    limit: usize,
}

/// Starts the engine's thread.
///
/// # Errors
/// If no thread can be started.
pub fn spawn(assets: Arc<Assets>, settings: WorkerSettings) -> std::io::Result<EngineHandle> {
    let (commands, jobs) = mpsc::channel();
    let handle = EngineHandle { commands, coming: Arc::default(), stats: Arc::default(), limit: settings.queue };
    let (coming, stats) = (handle.coming.clone(), handle.stats.clone());
    std::thread::Builder::new().name("engine".into()).spawn(move || {
        let mut worker = Worker { jobs, coming, stats, figures: WorkerStats::default(), running: HashMap::new() };
        // A scheduler that a panic went through is not to be trusted: a new one takes its place.
        while let End::Panicked = worker.run(Scheduler::new(assets.engine.model(), settings.scheduler)) {}
    })?;
    Ok(handle)
}

impl EngineHandle {
    /// Hands a job over. What happens to it comes out of the receiver; dropping that cancels the job. A job that can't
    /// run is told by [`Update::Failed`].
    ///
    /// # Errors
    /// When too many wait, or the engine has ended.
    pub fn submit(&self, job: Job) -> Result<UnboundedReceiver<Update>, SubmitError> {
        let waiting = self.stats().waiting + self.coming.fetch_add(1, Ordering::SeqCst);
        if waiting > self.limit {
            self.coming.fetch_sub(1, Ordering::SeqCst);
            return Err(SubmitError::Full { waiting, limit: self.limit });
        }
        let (updates, receiver) = unbounded_channel();
        self.commands.send(Command::Run(job, updates)).map_err(|_| SubmitError::Stopped)?;
        Ok(receiver)
    }

    /// What the engine is doing.
    pub fn stats(&self) -> WorkerStats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the thread after its current step; jobs under way end without a word.
    pub fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }
}

/// Why the loop ended.
enum End {
    Stopped,
    Panicked,
}

/// A job's listener.
struct Listener {
    updates: UnboundedSender<Update>,
    prompt: usize,
    choices: usize,
}

struct Worker {
    jobs: Receiver<Command>,
    coming: Arc<AtomicUsize>,
    stats: Arc<Mutex<WorkerStats>>,
    figures: WorkerStats,
    running: HashMap<JobId, Listener>,
}

impl Worker {
    fn run(&mut self, mut scheduler: Scheduler<'_>) -> End {
        loop {
            self.publish(&scheduler);
            if !self.take_jobs(&mut scheduler) {
                return End::Stopped;
            }
            let gone: Vec<JobId> = self.running.iter().filter(|r| r.1.updates.is_closed()).map(|r| *r.0).collect();
            for id in gone {
                scheduler.cancel(id);
                self.running.remove(&id);
                self.figures.cancelled += 1;
            }
            match catch_unwind(AssertUnwindSafe(|| scheduler.step())) {
                Ok(Ok(updates)) => {
                    self.figures.steps += 1;
                    updates.into_iter().for_each(|(id, update)| self.tell(id, update));
                }
                Ok(Err(error)) => {
                    tracing::error!(%error, "the engine failed");
                    self.fail_all(&error);
                    return End::Panicked;
                }
                Err(panic) => {
                    let text = (panic.downcast_ref::<String>().map(String::as_str))
                        .or_else(|| panic.downcast_ref::<&str>().copied())
                        .unwrap_or("no message");
                    tracing::error!(text, "the engine panicked");
                    self.figures.panics += 1;
                    self.fail_all(&EngineError::Device(format!("the engine failed: {text}")));
                    return End::Panicked;
                }
            }
        }
    }

    /// Takes in the jobs that have come; waits for one where there is nothing to do. False when it is time to end.
    fn take_jobs(&mut self, scheduler: &mut Scheduler<'_>) -> bool {
        loop {
            let idle = scheduler.is_idle() && self.running.is_empty();
            let command =
                if idle { self.jobs.recv().map_err(|_| TryRecvError::Disconnected) } else { self.jobs.try_recv() };
            match command {
                Ok(Command::Run(job, updates)) => {
                    let (prompt, choices) = (job.prompt.len(), job.choices.len());
                    match scheduler.submit(job) {
                        Ok(id) => {
                            self.running.insert(id, Listener { updates, prompt, choices });
                        }
                        // Nobody to tell is fine.
                        Err(error) => drop(updates.send(Update::Failed(error))),
                    }
                    self.figures.waiting = scheduler.waiting();
                    self.publish(scheduler);
                    self.coming.fetch_sub(1, Ordering::SeqCst);
                }
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn tell(&mut self, id: JobId, update: Update) {
        let Some(listener) = self.running.get_mut(&id) else { return };
        match &update {
            Update::Read { cached } => {
                self.figures.prompt_tokens += listener.prompt as u64;
                self.figures.cached_tokens += *cached as u64;
            }
            Update::Drawn { .. } => self.figures.drawn_tokens += 1,
            Update::Finished { .. } => listener.choices -= 1,
            Update::Failed(_) => listener.choices = 0,
        }
        let last = listener.choices == 0;
        // Whoever went away is noticed before the next step.
        let _ = listener.updates.send(update);
        if last {
            self.running.remove(&id);
        }
    }

    fn fail_all(&mut self, error: &EngineError) {
        for (_, listener) in self.running.drain() {
            let _ = listener.updates.send(Update::Failed(error.clone()));
        }
    }

    fn publish(&mut self, scheduler: &Scheduler<'_>) {
        let (active, waiting, bytes) = (scheduler.active(), scheduler.waiting(), scheduler.bytes());
        self.figures = WorkerStats { active, waiting, bytes, cache: scheduler.cache(), ..self.figures };
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = self.figures;
    }
}
