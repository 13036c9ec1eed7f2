//! Zeroed memory for weights and scratch: aligned to cache lines, on huge pages where it is large.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::memory::settle;
use super::pool;

/// A huge page. From this size on, a buffer is aligned to them and asks the system for them.
const HUGE: usize = 2 << 20;
/// Memory that smaller buffers share, see [`Buffer::try_shelved`].
const SHELF: usize = 16 * HUGE;

/// Plain bytes, zero at first, aligned to 64 bytes; viewed as 32-bit words.
#[derive(Debug)]
pub(crate) struct Buffer {
    start: NonNull<u8>,
    bytes: usize,
    /// What `start` points into: the buffer's own, or its place on a shelf.
    _own: Option<Block>,
    _shelf: Option<Arc<Block>>,
}

// SAFETY: the bytes are the buffer's alone, and it hands out references by the usual rules.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

/// One allocation.
#[derive(Debug)]
struct Block {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a block hands out nothing but its address.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    fn new(layout: Layout) -> Option<Self> {
        // SAFETY: whoever makes a layout here makes it of 64 bytes at least.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        #[cfg(target_os = "linux")]
        if layout.align() >= HUGE {
            // SAFETY: the range is this allocation; the advice changes no contents. It may be refused, which costs only speed.
            unsafe { libc::madvise(start.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE) };
        }
        Some(Block { start, layout })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// The shelf that is being filled, and how far it is. It lives as long as something lies on it.
static SHELVES: Mutex<(Weak<Block>, usize)> = Mutex::new((Weak::new(), 0));

impl Buffer {
    /// `bytes` of zeros, or nothing if there is not so much memory.
    pub(crate) fn try_zeroed(bytes: usize) -> Option<Self> {
        let block = Block::new(Self::layout(bytes)?)?;
        Some(Buffer { start: block.start, bytes, _own: Some(block), _shelf: None }.cleared())
    }

    /// [`Buffer::try_zeroed`] for what stays as long as its neighbours, such as the weights of a model: buffers that are smaller
    /// than a huge page share some.
    pub(crate) fn try_shelved(bytes: usize) -> Option<Self> {
        if bytes >= HUGE {
            return Self::try_zeroed(bytes);
        }
        let size = Self::layout(bytes)?.size();
        let mut shelf = SHELVES.lock().unwrap_or_else(PoisonError::into_inner);
        let (block, from) = match shelf.0.upgrade() {
            Some(block) if shelf.1 + size <= SHELF => (block, shelf.1),
            _ => (Arc::new(Block::new(Layout::from_size_align(SHELF, HUGE).ok()?)?), 0),
        };
        *shelf = (Arc::downgrade(&block), from + size);
        drop(shelf);
        // SAFETY: the shelf goes on for `size` bytes from there on.
        let start = unsafe { block.start.add(from) };
        Some(Buffer { start, bytes, _own: None, _shelf: Some(block) }.cleared())
    }

    /// Here and not by the allocator: it is the first touch, after the advice, that decides about a page's size. By all threads,
    /// as the system clears each page at the first touch too, and a virtual machine's host may have to find it first.
    fn cleared(self) -> Self {
        let start = SendPtr(self.start.as_ptr());
        pool::run(self.bytes.div_ceil(HUGE), |i| {
            // SAFETY: the buffer has so many bytes, and each job clears a piece of its own.
            unsafe { start.get().add(i * HUGE).write_bytes(0, HUGE.min(self.bytes - i * HUGE)) }
        });
        self
    }

    /// `bytes` of zeros.
    pub(crate) fn zeroed(bytes: usize) -> Self {
        Self::try_zeroed(bytes).unwrap_or_else(|| handle_alloc_error(Layout::new::<u8>()))
    }

    /// `words` 32-bit words of any value, for those who write them all. Under test they are NaN.
    pub(crate) fn words_arbitrary(words: usize) -> Self {
        let bytes = words * 4;
        let layout = Layout::from_size_align(bytes.max(64).next_multiple_of(64), 64);
        let Ok(layout) = layout else { handle_alloc_error(Layout::new::<u8>()) };
        let Some(block) = Block::new(layout) else { handle_alloc_error(layout) };
        // SAFETY: the allocation is this buffer's own.
        unsafe { settle(block.start.as_ptr()) };
        let mut buffer = Buffer { start: block.start, bytes, _own: Some(block), _shelf: None };
        if cfg!(test) {
            buffer.words_mut().fill(f32::NAN);
        }
        buffer
    }

    /// `words` 32-bit zeros.
    pub(crate) fn words_zeroed(words: usize) -> Self {
        Self::zeroed(words * 4)
    }

    fn layout(bytes: usize) -> Option<Layout> {
        let size = bytes.max(64).checked_next_multiple_of(64)?;
        Layout::from_size_align(size, if bytes >= HUGE { HUGE } else { 64 }).ok()
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the allocation has that many initialised bytes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    /// As words; any bits are an `f32`.
    pub(crate) fn words(&self) -> &[f32] {
        // SAFETY: aligned to 64, initialised, and every bit pattern is a valid f32.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.bytes / 4) }
    }

    pub(crate) fn words_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `words`, and `self` is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.bytes / 4) }
    }
}

/// A pointer that jobs on the pool write disjoint parts through.
#[derive(Clone, Copy)]
pub(crate) struct SendPtr<T>(pub(crate) *mut T);

// SAFETY: whoever uses the pointer says why its accesses do not overlap.
unsafe impl<T> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SendPtr<T> {}

impl<T> SendPtr<T> {
    /// The pointer; a method, so that closures capture the wrapper and not the bare field.
    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_and_aligned() {
        for bytes in [0, 1, 63, 64, 4096, HUGE - 1, HUGE, 3 * HUGE + 5] {
            for make in [Buffer::try_zeroed, Buffer::try_shelved] {
                let mut buffer = make(bytes).unwrap();
                assert_eq!(buffer.bytes().as_ptr() as usize % 64, 0);
                assert_eq!((buffer.len(), buffer.words().len()), (bytes, bytes / 4));
                assert!(buffer.bytes().iter().all(|&b| b == 0));
                buffer.bytes_mut().fill(7);
                assert!(buffer.words_mut().iter().all(|w| w.to_bits() == 0x0707_0707));
            }
        }
        assert!(Buffer::try_zeroed(usize::MAX).is_none() && Buffer::try_shelved(usize::MAX).is_none());
    }

    /// Buffers of two shelves and more keep what is in them, whatever their neighbours do, on any thread.
    #[test]
    fn neighbours_on_a_shelf_are_apart() {
        let fill = |seed: usize| {
            let make = |i: usize| {
                let mut buffer = Buffer::try_shelved((i * 7919 + seed) % (HUGE - 1)).unwrap();
                assert!(buffer.bytes().iter().all(|&b| b == 0));
                buffer.bytes_mut().fill((i + seed) as u8);
                buffer
            };
            let mut buffers: Vec<(usize, Buffer)> = (0..60).map(|i| (i, make(i * 37))).collect();
            buffers.retain(|(i, _)| i % 3 > 0);
            buffers.extend((60..80).map(|i| (i, make(i * 37))));
            for (i, buffer) in buffers {
                assert!(buffer.bytes().iter().all(|&b| b == (i * 37 + seed) as u8), "{i}");
            }
        };
        std::thread::scope(|scope| (0..2).for_each(|seed| drop(scope.spawn(move || fill(seed)))));
    }
}
