//! What is allocated, counted, forward and backward: by log_prob never anything of the size `[tokens, vocabulary]`, by an attention
//! never anything of the size `[tokens, tokens]`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Device, Tensor};
use m1_kernels::base::packed::{Format, Packed};
use m1_kernels::lightning_attention::lightning_attention;
use m1_kernels::linear::Weight;
use m1_kernels::log_prob::log_prob;
use m1_kernels::softmax_attention::{KeyValues, softmax_attention};

/// The system's allocator, with a count of the bytes that are out and of the most that ever were.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that `f` has out at once, beyond those that were out before.
fn peak(f: impl FnOnce()) -> usize {
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    f();
    MOST.load(Ordering::Relaxed) - before
}

/// Held by the test that counts: all threads of the process are counted together.
static COUNTS: Mutex<()> = Mutex::new(());

#[test]
fn logits_are_never_all_in_memory() {
    let _counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    let device = Device::flex().autodiff();
    let (n, vocab, dim) = (1500, 30_000, 4);
    let all_logits = n * vocab * 4;
    let hidden = Tensor::<2>::full([n, dim], 0.1, &device).require_grad();
    let head = Tensor::<2>::full([vocab, dim], 0.2, &device).require_grad();
    let packed = Packed::pack(Format::Bf16, 1, vocab, dim, &|_, _, row| row.fill(0.2)).expect("packs");
    let targets = vec![17; n];
    for head in [Weight::Tensor(head), Weight::Packed(packed)] {
        // Once, so that threads and their scratch memory are there.
        let _ = log_prob(hidden.clone().narrow(0, 0, 1), &head, &targets[..1], 1.0);

        let mut out = None;
        let forward = peak(|| out = Some(log_prob(hidden.clone(), &head, &targets, 1.0)));
        let (log_p, entropy) = out.expect("a result");
        let backward = peak(|| {
            let _ = (log_p + entropy).sum().backward();
        });
        eprintln!("all logits {all_logits} bytes, forward {forward}, backward {backward}");
        for bytes in [forward, backward] {
            assert!(bytes < 12 << 20, "{bytes} bytes, all logits are {all_logits}");
        }
    }
}

#[test]
fn scores_are_never_all_in_memory() {
    let _counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    let device = Device::flex().autodiff();
    let (tokens, heads, dim) = (8192, 2, 16);
    let all_scores = tokens * tokens * 4;
    let draw = |shape: [usize; 4]| Tensor::<4>::full(shape, 0.1, &device).require_grad();
    let softmax = |tokens: usize| {
        let [q, k, v] = [heads, 1, 1].map(|heads| draw([1, heads, tokens, dim]));
        softmax_attention(q, &[KeyValues { keys: k, values: v }], 0)
    };
    let lightning = |tokens: usize| {
        let (qkv, state) = (draw([1, heads, tokens, 3 * dim]), draw([1, heads, dim, dim]));
        let (o, after) = lightning_attention(qkv, &[0.5, 0.01], Some(state), None, None, true);
        Tensor::cat(vec![o, after.expect("wanted")], 2)
    };
    let both: [(&str, &dyn Fn(usize) -> Tensor<4>); 2] = [("softmax", &softmax), ("lightning", &lightning)];
    for (name, run) in both {
        // Once, so that threads and their scratch memory are there.
        let _ = run(100).sum().backward();

        let mut out = None;
        let forward = peak(|| out = Some(run(tokens)));
        let out = out.expect("a result");
        let backward = peak(|| {
            let _ = out.sum().backward();
        });
        eprintln!("{name}: all scores {all_scores} bytes a head, forward {forward}, backward {backward}");
        for bytes in [forward, backward] {
            assert!(bytes < 24 << 20, "{name}: {bytes} bytes, all scores are {all_scores} a head");
        }
    }
}
