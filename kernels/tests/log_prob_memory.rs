//! What log_prob allocates, counted: never anything of the size `[tokens, vocabulary]`, forward or backward.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::{Device, Tensor};
use m1_kernels::base::packed::{Format, Packed};
use m1_kernels::linear::Weight;
use m1_kernels::log_prob::log_prob;

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

#[test]
fn logits_are_never_all_in_memory() {
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
