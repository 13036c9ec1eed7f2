//! The one thread pool of the CPU paths.
//!
//! A caller of [`run`] works itself; helpers take chunks beside it. Helpers spin for a moment after a job, because the
//! next operation of a decode step comes within microseconds, and then sleep. Chunks lie in shares, one behind the other, with a
//! thread for each, the same in every job: what a chunk reads and writes tends to be in that core's cache already, and what
//! the core fetches ahead of a stream is what it is going to read. Who has done its own share takes the last chunks of
//! others'. A helper that the system has not scheduled is never waited for: only one that has begun a chunk is. If the
//! pool is busy (a nested call, or another thread's job), the caller runs everything itself, and helpers withdraw while there are
//! as many callers as threads: two trainer threads on two cores get a core each.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
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
            let asked = std::env::var_os("M1_THREADS").unwrap_or_default();
            asked_for(&asked.to_string_lossy(), most).unwrap_or_else(|error| {
                eprintln!("{error}");
                most
            })
        })
    })
}

/// What `M1_THREADS` asks for, at most `most`, which is what it is without.
fn asked_for(threads: &str, most: usize) -> Result<usize, String> {
    match (threads, threads.parse()) {
        ("", _) => Ok(most),
        (_, Ok(n)) if n > 0 => Ok(most.min(n)),
        _ => Err(format!("M1_THREADS={threads} is no number of threads from 1 on: all {most} are used")),
    }
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
/// all have returned. See [`deal`] for chunks of different size.
///
/// # Panics
/// With the panic of a job; chunks that have not begun by then may be left out.
pub fn run(chunks: usize, job: impl Fn(usize) + Sync) {
    let threads = threads();
    if threads.min(chunks) <= 1 || chunks > MOST_CHUNKS || INSIDE.get() {
        return (0..chunks).for_each(job);
    }
    let pool = POOL.get_or_init(Pool::new);
    let _inside = Inside::enter();
    if pool.alone.load(Ordering::Relaxed) + 1 < threads && !pool.busy.swap(true, Ordering::Acquire) {
        return pool.share(threads.min(chunks) - 1, chunks, &job);
    }
    let _alone = Alone::enter(&pool.alone);
    (0..chunks).for_each(job);
}

/// Brings chunks that are sorted by their size, the largest first, into an order for [`run`] in which the threads' shares are
/// alike: each begins with large ones, and its last ones, which another thread may take, are small.
pub fn deal<T>(chunks: Vec<T>) -> Vec<T> {
    let shares = threads().min(chunks.len()).max(1);
    let mut hands: Vec<Vec<T>> = (0..shares).map(|_| Vec::with_capacity(chunks.len() / shares + 1)).collect();
    for (i, chunk) in chunks.into_iter().enumerate() {
        hands[i % shares].push(chunk);
    }
    hands.into_iter().flatten().collect()
}

/// The share `i` of so many.
fn share(chunks: usize, shares: usize, i: usize) -> Range<usize> {
    let start = |i: usize| i * (chunks / shares) + i.min(chunks % shares);
    start(i)..start(i + 1)
}

type Job<'a> = &'a (dyn Fn(usize) + Sync);

/// In [`Seat::left`]: its thread works on the job.
const WORKING: u64 = 1 << 63;
/// Chunks that there are bits for in [`Seat::left`].
const MOST_CHUNKS: usize = (1 << 31) - 1;

/// A thread of the pool; seat 0 is the caller's. All that a helper looks for is on one cache line (whose neighbour nobody
/// else uses): to hand over a job is to write one line.
#[repr(align(128))]
struct Seat {
    /// What is left of the thread's share: its first chunk, from bit 32 on the one after its last, and [`WORKING`].
    left: AtomicU64,
    /// Threads that share the job.
    threads: AtomicUsize,
    job: UnsafeCell<Option<Job<'static>>>,
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

// SAFETY: `job` is written by the owner of the pool while the seat's share is empty and its thread does not work, and read by that
// thread once it has taken a chunk (an acquire that follows the owner's release) and until it says that it no longer works
// (a release, for which the owner waits); the rest is `Sync`.
unsafe impl Sync for Seat {}

impl Seat {
    fn new() -> Self {
        Seat {
            left: AtomicU64::new(0),
            threads: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            asleep: AtomicBool::new(false),
            thread: OnceLock::new(),
        }
    }

    /// Takes a chunk from the front of the share, or from its back, and sets `and` with it.
    fn take(&self, front: bool, and: u64) -> Option<usize> {
        let mut left = self.left.load(Ordering::Relaxed);
        loop {
            let (start, end) = (left & MOST_CHUNKS as u64, left >> 32 & MOST_CHUNKS as u64);
            if start >= end {
                return None;
            }
            let (chunk, rest) = if front { (start, left + 1) } else { (end - 1, left - (1 << 32)) };
            match self.left.compare_exchange_weak(left, rest | and, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(chunk as usize),
                Err(now) => left = now,
            }
        }
    }

    fn has_chunks(&self, order: Ordering) -> bool {
        let left = self.left.load(order);
        left & (MOST_CHUNKS as u64) < left >> 32 & MOST_CHUNKS as u64
    }

    fn working(&self) -> bool {
        self.left.load(Ordering::Acquire) & WORKING != 0
    }

    /// Wakes the helper if it sleeps.
    fn wake(&self) {
        if self.asleep.load(Ordering::Relaxed)
            && self.asleep.swap(false, Ordering::Relaxed)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }
}

struct Pool {
    /// A caller owns the pool.
    busy: AtomicBool,
    /// Callers of [`run`] that do all themselves.
    alone: AtomicUsize,
    seats: Box<[Seat]>,
    /// Helpers that have been started; the owner's to change.
    helpers: AtomicUsize,
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

static POOL: OnceLock<Pool> = OnceLock::new();

/// This thread is inside [`run`].
struct Inside;

impl Inside {
    fn enter() -> Self {
        INSIDE.set(true);
        Inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(false);
    }
}

struct Alone<'a>(&'a AtomicUsize);

impl<'a> Alone<'a> {
    fn enter(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Alone(count)
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pool {
    fn new() -> Self {
        Pool {
            busy: AtomicBool::new(false),
            alone: AtomicUsize::new(0),
            seats: (0..MOST).map(|_| Seat::new()).collect(),
            helpers: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
        }
    }

    /// Runs a job with up to `helpers` helpers; the caller owns `busy`.
    fn share(&'static self, helpers: usize, chunks: usize, job: Job<'_>) {
        // SAFETY: the borrow is lengthened only for helpers that work, and this function does not return before none does.
        let job: Job<'static> = unsafe { std::mem::transmute::<Job<'_>, Job<'static>>(job) };
        let threads = self.start(helpers) + 1;
        let seats = &self.seats[..threads];
        for (i, seat) in seats.iter().enumerate() {
            // SAFETY: this thread owns the pool, and the last owner has left each share empty and each helper idle.
            unsafe { *seat.job.get() = Some(job) };
            seat.threads.store(threads, Ordering::Relaxed);
            let Range { start, end } = share(chunks, threads, i);
            seat.left.store(start as u64 | (end as u64) << 32, Ordering::Release);
        }
        seats[1..].iter().for_each(Seat::wake);
        let own = catch_unwind(AssertUnwindSafe(|| {
            if let Some(chunk) = seats[0].take(true, 0) {
                job(chunk);
                // Again, for those that were just falling asleep: by now they have seen their share, or are seen to sleep.
                fence(Ordering::SeqCst);
                seats[1..].iter().for_each(Seat::wake);
            }
            self.work(0, threads, job, || false);
        }));
        if own.is_err() {
            self.drop_rest(threads);
        }
        let mut spins = 0_u32;
        for seat in &seats[1..] {
            while seat.working() {
                spins += 1;
                if spins < 20_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
        let theirs = if self.panicked.swap(false, Ordering::Relaxed) {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
        } else {
            None
        };
        self.busy.store(false, Ordering::Release);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }

    /// Nobody takes another chunk.
    fn drop_rest(&self, threads: usize) {
        for seat in &self.seats[..threads] {
            seat.left.fetch_and(WORKING, Ordering::Relaxed);
        }
    }

    /// Takes chunks, first those of its own share from the front, then others' from the back, until there are none, or until
    /// `leave` says so after one.
    fn work(&self, thread: usize, threads: usize, job: Job<'_>, leave: impl Fn() -> bool) {
        for i in 0..threads {
            while let Some(chunk) = self.seats[(thread + i) % threads].take(i == 0, 0) {
                job(chunk);
                if leave() {
                    return;
                }
            }
        }
    }

    /// Starts helpers until there are as many as `wanted`; the number that this job may have.
    fn start(&'static self, wanted: usize) -> usize {
        let mut helpers = self.helpers.load(Ordering::Relaxed);
        while helpers < wanted {
            let thread = helpers + 1;
            let builder = std::thread::Builder::new().name(format!("m1-kernels-{thread}"));
            let Ok(handle) = builder.spawn(move || self.help(thread)) else { break };
            let _ = self.seats[thread].thread.set(handle.thread().clone());
            helpers += 1;
            self.helpers.store(helpers, Ordering::Relaxed);
        }
        helpers.min(wanted)
    }

    /// The life of a helper.
    fn help(&self, thread: usize) {
        INSIDE.set(true);
        let seat = &self.seats[thread];
        // Callers have come that work alone: they have this core now.
        let crowded = || self.alone.load(Ordering::Relaxed) + thread >= seat.threads.load(Ordering::Relaxed);
        let (mut since, mut spins) = (Instant::now(), 0_u32);
        loop {
            if seat.has_chunks(Ordering::Relaxed)
                && !crowded()
                && let Some(chunk) = seat.take(true, WORKING)
            {
                // SAFETY: this thread works on the job, so its caller waits.
                let (job, threads) = (unsafe { *seat.job.get() }, seat.threads.load(Ordering::Relaxed));
                if let Some(job) = job
                    && let Err(panic) = catch_unwind(AssertUnwindSafe(|| {
                        job(chunk);
                        if !crowded() {
                            self.work(thread, threads, job, crowded);
                        }
                    }))
                {
                    self.drop_rest(threads);
                    self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
                    self.panicked.store(true, Ordering::Relaxed);
                }
                seat.left.fetch_and(!WORKING, Ordering::Release);
                (since, spins) = (Instant::now(), 0);
                continue;
            }
            spins += 1;
            if !spins.is_multiple_of(64) || since.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            // Whoever hands out a share after this store sees it; whoever did before is seen by the load.
            seat.asleep.store(true, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if !seat.has_chunks(Ordering::Relaxed) || crowded() {
                std::thread::park();
            }
            seat.asleep.store(false, Ordering::Relaxed);
            (since, spins) = (Instant::now(), 0);
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
    fn a_number_of_threads_is_asked_for() {
        assert_eq!(["", "1", "3", "99"].map(|n| asked_for(n, 4)), [Ok(4), Ok(1), Ok(3), Ok(4)]);
        for wrong in ["0", "-1", "two", "1.5"] {
            let told = asked_for(wrong, 4).unwrap_err();
            assert!(told.contains(&format!("M1_THREADS={wrong} is no number")), "{told}");
        }
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
    fn shares_are_all_chunks_in_order() {
        for shares in 1..=9 {
            for chunks in [0, 1, 7, 8, 9, 1000] {
                let all: Vec<usize> = (0..shares).flat_map(|i| share(chunks, shares, i)).collect();
                assert!(all.iter().copied().eq(0..chunks), "{chunks} in {shares}");
            }
        }
        with_threads(3, || {
            assert_eq!(deal((0..8).collect()), [0, 3, 6, 1, 4, 7, 2, 5]);
            assert_eq!(share(8, 3, 1), 3..6);
            assert_eq!((deal(vec![5]), deal(Vec::<u8>::new())), (vec![5], vec![]));
        });
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
