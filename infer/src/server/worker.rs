//! The engine's thread: it alone touches the model. Jobs come in over a channel, what happens to them goes out over one
//! channel each, as soon as its [`Pace`] says; a job whose receiver is gone is cancelled before the next step. A panic of
//! the engine fails the jobs under way, not the server.

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
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The limits of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerSettings {
    /// Of the batch and the prefix cache.
    pub scheduler: SchedulerSettings,
    /// Jobs that may wait; more are refused.
    pub queue: usize,
}

/// The longest that updates are gathered, but for the step under way.
const GATHERED: Duration = Duration::from_millis(20);

/// How soon a job's listener is told what happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// After every step: a stream shows a token as soon as it is drawn.
    Steps,
    /// Some steps at once, at most [`GATHERED`] apart, for an answer that is sent whole. To wake 16 tasks takes the cores
    /// away from the next step, and with a small model that is as long as the step itself.
    Gathered,
}

/// An update, and when the engine made it.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// When.
    pub at: Instant,
    /// What.
    pub update: Update,
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
    Run(Job, Pace, UnboundedSender<Vec<Told>>),
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
    thread: Arc<JoinHandle<()>>,
}

/// Starts the engine's thread.
///
/// # Errors
/// If no thread can be started.
pub fn spawn(assets: Arc<Assets>, settings: WorkerSettings) -> std::io::Result<EngineHandle> {
    let (commands, jobs) = mpsc::channel();
    let (coming, stats) = (Arc::<AtomicUsize>::default(), Arc::<Mutex<WorkerStats>>::default());
    let (figures, running) = (WorkerStats::default(), HashMap::new());
    let mut worker = Worker { jobs, coming: coming.clone(), stats: stats.clone(), figures, running };
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
        loop {
            // A scheduler that a panic went through is not to be trusted: a new one takes its place.
            let scheduler = Scheduler::new(assets.engine.model(), settings.scheduler);
            let error = match catch_unwind(AssertUnwindSafe(|| worker.run(scheduler))) {
                Ok(Ok(())) => break,
                Ok(Err(error)) => error,
                Err(panic) => {
                    worker.figures.panics += 1;
                    let text = (panic.downcast_ref::<String>().map(String::as_str))
                        .or_else(|| panic.downcast_ref::<&str>().copied());
                    EngineError::Device(format!("the engine panicked: {}", text.unwrap_or("no message")))
                }
            };
            tracing::error!(%error, "the engine failed");
            worker.fail_all(&error);
        }
    })?;
    Ok(EngineHandle { commands, coming, stats, limit: settings.queue.max(1), thread: Arc::new(thread) })
}

impl EngineHandle {
    /// Hands a job over. What happens to it comes out of the receiver; dropping that cancels the job. A job that can't
    /// run is told by [`Update::Failed`].
    ///
    /// # Errors
    /// When too many wait, or the engine has ended.
    pub fn submit(&self, job: Job, pace: Pace) -> Result<UnboundedReceiver<Vec<Told>>, SubmitError> {
        let waiting = self.stats().waiting + self.coming.fetch_add(1, Ordering::SeqCst);
        if waiting >= self.limit {
            self.coming.fetch_sub(1, Ordering::SeqCst);
            return Err(SubmitError::Full { waiting, limit: self.limit });
        }
        let (updates, receiver) = unbounded_channel();
        self.commands.send(Command::Run(job, pace, updates)).map_err(|_| SubmitError::Stopped)?;
        Ok(receiver)
    }

    /// What the engine is doing.
    pub fn stats(&self) -> WorkerStats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the thread is there. It ends when it is told to, or by a fault that nothing caught.
    pub fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Ends the thread after its current step; jobs under way end without a word.
    pub fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }
}

/// A job's listener.
struct Listener {
    updates: UnboundedSender<Vec<Told>>,
    pace: Pace,
    /// What has happened since the listener was told something, oldest first.
    gathered: Vec<Told>,
    prompt: usize,
    choices: usize,
}

impl Listener {
    /// Tells what is due at `now`; `all`: or whatever there is.
    fn tell(&mut self, now: Instant, all: bool) {
        let due = |first: &Told| all || self.pace == Pace::Steps || now - first.at >= GATHERED;
        if self.gathered.first().is_some_and(due) {
            // Whoever went away is noticed before the next step.
            let _ = self.updates.send(std::mem::take(&mut self.gathered));
        }
    }
}

struct Worker {
    jobs: Receiver<Command>,
    coming: Arc<AtomicUsize>,
    stats: Arc<Mutex<WorkerStats>>,
    figures: WorkerStats,
    running: HashMap<JobId, Listener>,
}

impl Worker {
    /// Runs jobs until it is told to stop.
    ///
    /// # Errors
    /// When the engine can't go on; a panic goes through.
    fn run(&mut self, mut scheduler: Scheduler<'_>) -> Result<(), EngineError> {
        loop {
            self.publish(&scheduler);
            if !self.take_jobs(&mut scheduler) {
                return Ok(());
            }
            let gone: Vec<JobId> = self.running.iter().filter(|r| r.1.updates.is_closed()).map(|r| *r.0).collect();
            for id in gone {
                scheduler.cancel(id);
                self.running.remove(&id);
                self.figures.cancelled += 1;
            }
            let updates = scheduler.step()?;
            self.figures.steps += 1;
            let now = Instant::now();
            updates.into_iter().for_each(|(id, update)| self.take(id, Told { at: now, update }));
            self.running.values_mut().for_each(|listener| listener.tell(now, false));
        }
    }

    /// Takes in the jobs that have come; waits for one where there is nothing to do. False when it is time to end.
    fn take_jobs(&mut self, scheduler: &mut Scheduler<'_>) -> bool {
        loop {
            let idle = scheduler.is_idle() && self.running.is_empty();
            let command =
                if idle { self.jobs.recv().map_err(|_| TryRecvError::Disconnected) } else { self.jobs.try_recv() };
            match command {
                Ok(Command::Run(job, pace, updates)) => {
                    self.coming.fetch_sub(1, Ordering::SeqCst);
                    let (prompt, choices) = (job.prompt.len(), job.choices.len());
                    match scheduler.submit(job) {
                        Ok(id) => {
                            let gathered = Vec::new();
                            self.running.insert(id, Listener { updates, pace, gathered, prompt, choices });
                        }
                        // Nobody to tell is fine.
                        Err(error) => drop(updates.send(vec![failed(&error)])),
                    }
                    self.publish(scheduler);
                }
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn take(&mut self, id: JobId, told: Told) {
        let Some(listener) = self.running.get_mut(&id) else { return };
        match &told.update {
            Update::Read { cached } => {
                self.figures.prompt_tokens += listener.prompt as u64;
                self.figures.cached_tokens += *cached as u64;
            }
            Update::Scored(_) => {}
            Update::Drawn { .. } => self.figures.drawn_tokens += 1,
            Update::Finished { .. } => listener.choices -= 1,
            Update::Failed(_) => listener.choices = 0,
        }
        let now = told.at;
        listener.gathered.push(told);
        if listener.choices == 0 {
            listener.tell(now, true);
            self.running.remove(&id);
        }
    }

    fn fail_all(&mut self, error: &EngineError) {
        for (_, mut listener) in self.running.drain() {
            listener.gathered.push(failed(error));
            listener.tell(Instant::now(), true);
        }
    }

    fn publish(&mut self, scheduler: &Scheduler<'_>) {
        let (active, waiting, bytes) = (scheduler.active(), scheduler.waiting(), scheduler.bytes());
        self.figures = WorkerStats { active, waiting, bytes, cache: scheduler.cache(), ..self.figures };
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = self.figures;
    }
}

fn failed(error: &EngineError) -> Told {
    Told { at: Instant::now(), update: Update::Failed(error.clone()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batching::BatchSettings;
    use crate::engine::{Finish, tests::tiny};
    use crate::generation_config::GenerationConfig;
    use crate::guide::{Guide, GuideError, Next};
    use crate::sampler::{Sampler, SamplingOptions};
    use crate::tokenizer::tests::byte_level;

    fn worker(queue: usize) -> EngineHandle {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = Arc::new(byte_level(dir.path(), &["x", "y"]));
        let (engine, generation) = (tiny(96, 2000), GenerationConfig::default());
        let assets = Assets { engine, tokenizer, generation, end_ids: Vec::new() };
        let scheduler = SchedulerSettings::new(BatchSettings::new(1, 2000), 1 << 20);
        spawn(Arc::new(assets), WorkerSettings { scheduler, queue }).unwrap()
    }

    fn job(max_new: usize, guide: Option<Box<dyn Guide>>) -> Job {
        let sampler = Sampler::new(SamplingOptions { seed: Some(1), ..SamplingOptions::default() }, None).unwrap();
        Job {
            prompt: vec![1, 2, 3],
            turns: Vec::new(),
            choices: vec![Choice { sampler, guide }],
            end_ids: Arc::default(),
            max_new: Some(max_new),
            top_log_probs: 0,
            score_prompt: false,
        }
    }

    fn all(mut updates: UnboundedReceiver<Vec<Told>>) -> Vec<Update> {
        std::iter::from_fn(|| updates.blocking_recv()).flatten().map(|told| told.update).collect()
    }

    fn wait(what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn jobs_run_and_those_nobody_listens_to_end() {
        let engine = worker(8);
        let updates = all(engine.submit(job(5, None), Pace::Steps).unwrap());
        assert_eq!(updates.len(), 7, "{updates:?}");
        assert_eq!(updates[0], Update::Read { cached: 0 });
        assert_eq!(updates[6], Update::Finished { choice: 0, finish: Finish::Length });
        let mut long = engine.submit(job(1900, None), Pace::Steps).unwrap();
        assert!(long.blocking_recv().is_some());
        drop(long);
        wait("the job goes on without a listener", || engine.stats().cancelled == 1 && engine.stats().active == 0);
        assert!(engine.stats().drawn_tokens < 1900);
        let refused = all(engine.submit(Job { prompt: Vec::new(), ..job(1, None) }, Pace::Steps).unwrap());
        assert_eq!(refused, [Update::Failed(EngineError::Empty)]);
        assert!(engine.is_running());
        engine.stop();
        wait("the thread goes on", || !engine.is_running());
        assert_eq!(engine.submit(job(1, None), Pace::Steps).unwrap_err(), SubmitError::Stopped);
    }

    /// An answer that is sent whole is told the same, of the same moments, in few messages.
    #[test]
    fn what_is_gathered_is_told_all_the_same() {
        let engine = worker(8);
        let messages = |pace| {
            let mut updates = engine.submit(job(1500, None), pace).unwrap();
            std::iter::from_fn(|| updates.blocking_recv()).collect::<Vec<_>>()
        };
        let (steps, gathered) = (messages(Pace::Steps), messages(Pace::Gathered));
        let text = |messages: &[Vec<Told>]| messages.concat().into_iter().map(|told| told.update).collect::<Vec<_>>();
        assert_eq!(text(&gathered), text(&steps));
        assert_eq!(steps.len(), 1500, "the first step reads and draws");
        let took = gathered.concat().last().unwrap().at - gathered[0][0].at;
        assert!(gathered.len() as u32 <= 2 + took.as_millis() as u32 / 20, "{} in {took:?}", gathered.len());
        assert!(gathered.concat().is_sorted_by_key(|told| told.at));
        let longest = gathered.iter().map(|some| some.last().unwrap().at - some[0].at).max().unwrap();
        assert!(longest >= GATHERED || gathered.len() == 1, "{longest:?}");
    }

    #[test]
    fn no_more_wait_than_may() {
        let engine = worker(2);
        let first = engine.submit(job(1900, None), Pace::Steps).unwrap();
        wait("the first does not start", || engine.stats().active == 1);
        let waiting: Vec<_> = (0..2).map(|_| engine.submit(job(1, None), Pace::Steps).unwrap()).collect();
        wait("they do not wait", || engine.stats().waiting == 2);
        let more = (0..4).map(|_| engine.submit(job(1, None), Pace::Steps));
        assert!(more.filter(Result::is_err).count() >= 2);
        drop(first);
        assert!(waiting.into_iter().all(|updates| all(updates).len() == 3));
    }

    /// What breaks the engine fails the jobs under way; the next ones run as ever.
    #[test]
    fn a_panic_is_not_the_end() {
        #[derive(Debug)]
        struct Broken(u32);
        impl Guide for Broken {
            fn next(&mut self) -> Result<Next<'_>, GuideError> {
                assert!(self.0 < 3, "broken on purpose");
                Ok(Next::Any)
            }
            fn take(&mut self, _: u32) -> Result<(), GuideError> {
                self.0 += 1;
                Ok(())
            }
        }
        let engine = worker(8);
        let wanted = all(engine.submit(job(9, None), Pace::Steps).unwrap());
        let broken = all(engine.submit(job(9, Some(Box::new(Broken(0)))), Pace::Steps).unwrap());
        let Some(Update::Failed(EngineError::Device(text))) = broken.last() else { panic!("{broken:?}") };
        assert_eq!((text.as_str(), broken.len()), ("the engine panicked: broken on purpose", 5));
        assert_eq!(all(engine.submit(job(9, None), Pace::Steps).unwrap()), wanted);
        wait("the panic is not counted", || engine.stats().panics == 1);
    }
}
