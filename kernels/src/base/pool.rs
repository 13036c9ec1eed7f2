//! The one thread pool of the CPU paths.
//!
//! A caller of [`run`] works itself; helpers take chunks beside it. Helpers spin for a moment after a job, because the
//! next operation of a decode step comes within microseconds, and then sleep. Chunks have a thread that takes them first, the
//! same in every job, so that what a chunk reads and writes tends to be in that core's cache already; who has done its own takes
//! those of others. A helper that the system has not scheduled is never waited for: only one that has begun a chunk is. If the
//! pool is busy (a nested call, or another thread's job), the caller runs everything itself, and helpers withdraw while there are
//! as many callers as threads: two trainer threads on two cores get a core each.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a helper looks for the next job before it sleeps. To wake one costs its caller some 15 µs; between two jobs of a
/// decode step up to 200 µs may pass.
const SPIN: Duration = Duration::from_micros(250);
/// More threads than this are never started, whatever [`with_threads`] asks for.
const MOST: usize = 256;

thread_local! {
    static THREADS: Cell<Option<usize>> = const { Cell::new(None) };
    /// Whether this thread is inside [`run`] (as caller or as helper).
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Threads that a job of this thread may use, itself included: the processor's, which `M1_THREADS` lowers, or what
/// [`with_threads`] has set.
pub fn threads() -> usize {
    static DEFAULT: OnceLock<usize> = OnceLock::new();
    THREADS.get().unwrap_or_else(|| {
        *DEFAULT.get_or_init(|| {
            let most = std::thread::available_parallelism().map_or(1, |n| n.get());
            let asked = std::env::var("M1_THREADS").ok().and_then(|n| n.parse::<usize>().ok());
            asked.map_or(most, |n| n.clamp(1, most))
        })
    })
}

/// Runs `f` with `n` threads for the jobs of this thread (at least 1).
pub fn with_threads<R>(n: usize, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<usize>);
    impl Drop for Restore {
        fn drop(&mut self) {
            THREADS.set(self.0);
        }
    }
    let _restore = Restore(THREADS.replace(Some(n.clamp(1, MOST))));
    f()
}

/// Calls `job(i)` once for every `i` in `0..chunks`, in any order, on this thread and on free ones of the pool; returns when
/// all have returned.
///
/// # Panics
/// With the panic of a job; chunks that have not begun by then may be left out.
pub fn run(chunks: usize, job: impl Fn(usize) + Sync) {
    let helpers = threads().min(chunks) - usize::from(chunks > 0);
    if helpers == 0 || INSIDE.get() {
        return (0..chunks).for_each(job);
    }
    let pool = POOL.get_or_init(Pool::new);
    let _caller = pool.enter();
    if pool.callers.load(Ordering::Relaxed) >= threads() || pool.busy.swap(true, Ordering::Acquire) {
        return (0..chunks).for_each(job);
    }
    pool.share(helpers, chunks, &job);
}

type Job<'a> = &'a (dyn Fn(usize) + Sync);

/// Threads take their chunks from one of so many counters: chunk i belongs to counter i modulo their number.
const COUNTERS: usize = 8;

/// Chunks of a counter that have been taken, on a cache line (and its neighbour) of its own.
#[repr(align(128))]
struct Taken(AtomicUsize);

/// What helpers read of the job at hand; written by the caller that owns `busy`, while the gate is shut.
struct Shared {
    job: Option<Job<'static>>,
    chunks: usize,
    /// Callers and helpers together never exceed this.
    threads: usize,
}

struct Helper {
    thread: Thread,
    asleep: &'static AtomicBool,
}

/// `gate`: a count of jobs, a bit that says whether one is open to helpers, and the number of helpers inside.
const INSIDE_ONE: usize = 1;
const INSIDE_MASK: usize = 0xffff;
const OPEN: usize = 0x1_0000;
const JOB_ONE: usize = 0x2_0000;

struct Pool {
    /// A caller owns the pool.
    busy: AtomicBool,
    /// Threads inside [`run`] as callers.
    callers: AtomicUsize,
    gate: AtomicUsize,
    taken: [Taken; COUNTERS],
    shared: UnsafeCell<Shared>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    helpers: Mutex<Vec<Helper>>,
}

// SAFETY: `shared` is written only by the owner of `busy` while no helper is inside and the gate is shut, and read only by
// helpers that have come through the open gate (an acquire that follows the owner's release); the rest is `Sync`.
unsafe impl Sync for Pool {}

static POOL: OnceLock<Pool> = OnceLock::new();

struct Caller<'a>(&'a Pool);

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        self.0.callers.fetch_sub(1, Ordering::Relaxed);
        INSIDE.set(false);
    }
}

impl Pool {
    fn new() -> Self {
        Pool {
            busy: AtomicBool::new(false),
            callers: AtomicUsize::new(0),
            gate: AtomicUsize::new(0),
            taken: std::array::from_fn(|_| Taken(AtomicUsize::new(0))),
            shared: UnsafeCell::new(Shared { job: None, chunks: 0, threads: 1 }),
            panic: Mutex::new(None),
            helpers: Mutex::new(Vec::new()),
        }
    }

    fn enter(&self) -> Caller<'_> {
        self.callers.fetch_add(1, Ordering::Relaxed);
        INSIDE.set(true);
        Caller(self)
    }

    /// Runs a job with up to `helpers` helpers; the caller owns `busy`.
    fn share(&'static self, helpers: usize, chunks: usize, job: Job<'_>) {
        // SAFETY: the borrow is lengthened only for helpers inside the gate, and this function does not return before
        // the gate is shut and all of them have left.
        let job: Job<'static> = unsafe { std::mem::transmute::<Job<'_>, Job<'static>>(job) };
        // SAFETY: this thread owns `busy`, the gate is shut and empty since the last owner left.
        unsafe { *self.shared.get() = Shared { job: Some(job), chunks, threads: helpers + 1 } };
        self.set_taken(0);
        self.gate.fetch_add(JOB_ONE | OPEN, Ordering::SeqCst);
        self.wake(helpers);

        let own = catch_unwind(AssertUnwindSafe(|| self.work(0, helpers + 1, chunks, job, || false)));
        if own.is_err() {
            self.set_taken(chunks);
        }
        self.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0_u32;
        while self.gate.load(Ordering::Acquire) & INSIDE_MASK != 0 {
            spins += 1;
            if spins < 20_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let theirs = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.busy.store(false, Ordering::Release);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }

    fn set_taken(&self, chunks: usize) {
        self.taken.iter().for_each(|taken| taken.0.store(chunks, Ordering::Relaxed));
    }

    /// Takes chunks, first those of its own counter, until there are none, or until `leave` says so after one.
    fn work(&self, thread: usize, threads: usize, chunks: usize, job: Job<'_>, leave: impl Fn() -> bool) {
        let counters = threads.min(COUNTERS);
        for counter in (0..counters).map(|i| (thread + i) % counters) {
            let taken = &self.taken[counter].0;
            // Not written to where there is nothing left: the line may be another's.
            while counter + counters * taken.load(Ordering::Relaxed) < chunks {
                let i = counter + counters * taken.fetch_add(1, Ordering::Relaxed);
                if i >= chunks {
                    break;
                }
                job(i);
                if leave() {
                    return;
                }
            }
        }
    }

    /// Wakes as many sleeping helpers as the job needs beside those awake, starting new ones where there are too few.
    fn wake(&'static self, wanted: usize) {
        let mut helpers = self.helpers.lock().unwrap_or_else(PoisonError::into_inner);
        while helpers.len() < wanted {
            let asleep: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
            let thread = helpers.len() + 1;
            let builder = std::thread::Builder::new().name(format!("m1-kernels-{thread}"));
            let Ok(handle) = builder.spawn(move || self.help(thread, asleep)) else { break };
            helpers.push(Helper { thread: handle.thread().clone(), asleep });
        }
        for helper in helpers.iter().take(wanted) {
            if helper.asleep.swap(false, Ordering::SeqCst) {
                helper.thread.unpark();
            }
        }
    }

    /// The life of a helper.
    fn help(&'static self, thread: usize, asleep: &AtomicBool) {
        INSIDE.set(true);
        let mut done = usize::MAX;
        loop {
            let since = Instant::now();
            let mut spins = 0_u32;
            let mut gate = self.gate.load(Ordering::SeqCst);
            while gate & OPEN == 0 || gate / JOB_ONE == done {
                spins += 1;
                if !spins.is_multiple_of(64) || since.elapsed() < SPIN {
                    std::hint::spin_loop();
                } else {
                    // Whoever opens the gate after this store sees it; whoever did before is seen by the load.
                    asleep.store(true, Ordering::SeqCst);
                    gate = self.gate.load(Ordering::SeqCst);
                    if gate & OPEN == 0 || gate / JOB_ONE == done {
                        std::thread::park();
                    }
                    asleep.store(false, Ordering::SeqCst);
                    break;
                }
                gate = self.gate.load(Ordering::SeqCst);
            }
            if gate & OPEN == 0 || gate / JOB_ONE == done {
                continue;
            }
            if self.gate.compare_exchange(gate, gate + INSIDE_ONE, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            done = gate / JOB_ONE;
            // SAFETY: this helper is inside the open gate of this job, so its caller waits for it to leave.
            let &Shared { job, chunks, threads } = unsafe { &*self.shared.get() };
            if let Some(job) = job
                && (gate & INSIDE_MASK) + 1 < threads
            {
                // Another caller has come: it has this core now.
                let crowded = || {
                    let helpers = self.gate.load(Ordering::Relaxed) & INSIDE_MASK;
                    self.callers.load(Ordering::Relaxed) + helpers > threads
                };
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(thread, threads, chunks, job, crowded)))
                {
                    self.set_taken(chunks);
                    self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
                }
            }
            self.gate.fetch_sub(INSIDE_ONE, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(chunks: usize) -> usize {
        let total = AtomicUsize::new(0);
        run(chunks, |i| {
            total.fetch_add(i + 1, Ordering::Relaxed);
        });
        total.into_inner()
    }

    #[test]
    fn every_chunk_runs_once() {
        for threads in [1, 2, 3, 8, 40] {
            with_threads(threads, || {
                for chunks in [0, 1, 2, 3, 7, 64, 1000] {
                    let counts: Vec<_> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                    run(chunks, |i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(
                        counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                        "{threads} threads, {chunks} chunks"
                    );
                }
            });
        }
    }

    #[test]
    fn helpers_do_take_part() {
        with_threads(2, || {
            // Each chunk waits for the other one: on one thread this would never end. Other tests may own the pool, so try.
            for _ in 0..10_000 {
                let arrived = AtomicUsize::new(0);
                let together = AtomicBool::new(false);
                run(2, |_| {
                    arrived.fetch_add(1, Ordering::SeqCst);
                    let since = Instant::now();
                    while since.elapsed() < Duration::from_millis(5) {
                        if arrived.load(Ordering::SeqCst) == 2 {
                            together.store(since.elapsed() > Duration::ZERO, Ordering::SeqCst);
                            break;
                        }
                        std::thread::yield_now();
                    }
                });
                if together.into_inner() {
                    return;
                }
            }
            panic!("no helper ever came");
        });
    }

    #[test]
    fn nested_and_concurrent_calls_end() {
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    for n in 0..300 {
                        with_threads(1 + n % 5, || {
                            let total = AtomicUsize::new(0);
                            run(5, |_| {
                                total.fetch_add(sum(20), Ordering::Relaxed);
                            });
                            assert_eq!(total.into_inner(), 5 * 210);
                        });
                    }
                });
            }
        });
    }

    #[test]
    fn sleeping_helpers_wake() {
        with_threads(4, || {
            for _ in 0..20 {
                assert_eq!(sum(100), 5050);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        with_threads(4, || {
            for bad in [0, 1, 17, 99] {
                let caught = catch_unwind(|| {
                    run(100, |i| {
                        std::thread::sleep(Duration::from_micros(20));
                        assert!(i != bad, "chunk {bad}");
                    });
                });
                let message = caught.unwrap_err();
                assert_eq!(message.downcast_ref::<String>().map(String::as_str), Some(&*format!("chunk {bad}")));
                assert_eq!(sum(100), 5050);
            }
        });
    }
}
