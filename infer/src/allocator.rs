//! The allocator of the programs: small blocks by [mimalloc](https://github.com/microsoft/mimalloc), large ones by the C
//! library.
//!
//! A step of decoding makes and drops hundreds of small tensors. glibc's `malloc` is slower at that, and takes a lock where
//! two threads decode side by side: with mimalloc, 16 requests to nano at once are 1.19 times as fast, one alone 1.10 times.
//! What is large is better with glibc, once it is told to keep what is freed ([`keep_freed`]): mimalloc gives large blocks
//! back to the system, and a training step of the preset small, which uses all of them again, took 13 % longer with it. On
//! huge pages ([`advise_heap`]) such a step takes 4 % less time, and memory is read at up to 32 GB/s instead of 28.
//!
//! [`keep_freed`]: m1_kernels::base::memory::keep_freed

use std::alloc::{GlobalAlloc, Layout, System};

use m1_kernels::base::memory::advise_heap;
use mimalloc::MiMalloc;

/// Blocks of so many bytes are large. mimalloc keeps free blocks for each thread and size: with 1 MiB here, a training step
/// of nano took 370 MB instead of 285, and nothing was faster.
const LARGE: usize = 64 << 10;

/// A large block, on huge pages where the heap has grown for it.
fn large(block: *mut u8) -> *mut u8 {
    advise_heap();
    block
}

/// For `#[global_allocator]`.
#[derive(Debug, Clone, Copy)]
pub struct Allocator;

// SAFETY: every block is given back to the allocator that it came from, as its size alone decides which that is. Both keep
// the contract of `GlobalAlloc`; what each call demands is demanded of its caller.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { if layout.size() < LARGE { MiMalloc.alloc(layout) } else { large(System.alloc(layout)) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe {
            if layout.size() < LARGE { MiMalloc.alloc_zeroed(layout) } else { large(System.alloc_zeroed(layout)) }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { if layout.size() < LARGE { MiMalloc.dealloc(block, layout) } else { System.dealloc(block, layout) } }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above; the caller has seen that the new size makes a layout, and the copy stays inside both blocks.
        unsafe {
            match (layout.size() < LARGE, size < LARGE) {
                (true, true) => MiMalloc.realloc(block, layout, size),
                (false, false) => large(System.realloc(block, layout, size)),
                _ => {
                    let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
                    if !new.is_null() {
                        std::ptr::copy_nonoverlapping(block, new, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                    new
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of sizes around the border, grown and shrunk over it, keep what is in them and their alignment.
    #[test]
    fn a_block_may_cross_the_border() {
        for align in [1, 64, 4096] {
            for (from, to) in [(10, LARGE - 1), (LARGE - 1, LARGE), (LARGE, 3 * LARGE), (3 * LARGE, LARGE), (LARGE, 7)]
            {
                let layout = |size| Layout::from_size_align(size, align).unwrap();
                // SAFETY: sizes are not zero, and each block is used and freed with its own layout.
                unsafe {
                    let block = Allocator.alloc(layout(from));
                    (0..from).for_each(|i| block.add(i).write(i as u8));
                    let block = Allocator.realloc(block, layout(from), to);
                    assert_eq!(block as usize % align, 0);
                    assert!((0..from.min(to)).all(|i| block.add(i).read() == i as u8), "{from} to {to}");
                    Allocator.dealloc(block, layout(to));
                    let zeros = Allocator.alloc_zeroed(layout(to));
                    assert!((0..to).all(|i| zeros.add(i).read() == 0), "{to}");
                    Allocator.dealloc(zeros, layout(to));
                }
            }
        }
    }
}
