//! Zeroed memory for weights and scratch: aligned to cache lines, on huge pages where it is large.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use super::memory::settle;

/// From this size on, a buffer is aligned to huge pages and asks the system for them.
const HUGE: usize = 2 << 20;

/// Plain bytes, zero at first, aligned to 64 bytes; viewed as 32-bit words.
#[derive(Debug)]
pub(crate) struct Buffer {
    start: NonNull<u8>,
    bytes: usize,
    layout: Layout,
}

// SAFETY: the buffer owns its memory and hands out references by the usual rules.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `bytes` of zeros, or nothing if there is not so much memory.
    pub(crate) fn try_zeroed(bytes: usize) -> Option<Self> {
        let layout = Self::layout(bytes)?;
        // SAFETY: the layout's size is at least 64.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        #[cfg(target_os = "linux")]
        if bytes >= HUGE {
            // SAFETY: the range is this allocation; the advice changes no contents. It may be refused, which costs only speed.
            unsafe { libc::madvise(start.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE) };
        }
        // After the advice, and not by the allocator: it is the first touch that decides about a page's size.
        // SAFETY: the allocation is that large.
        unsafe { start.as_ptr().write_bytes(0, layout.size()) };
        Some(Buffer { start, bytes, layout })
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
        // SAFETY: the layout's size is at least 64.
        let Some(start) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
        // SAFETY: the allocation is this buffer's own.
        unsafe { settle(start.as_ptr()) };
        let mut buffer = Buffer { start, bytes, layout };
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

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
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
            let mut buffer = Buffer::zeroed(bytes);
            assert_eq!(buffer.bytes().as_ptr() as usize % 64, 0);
            assert_eq!((buffer.len(), buffer.words().len()), (bytes, bytes / 4));
            assert!(buffer.bytes().iter().all(|&b| b == 0));
            buffer.bytes_mut().fill(7);
            assert!(buffer.words_mut().iter().all(|w| w.to_bits() == 0x0707_0707));
        }
        assert!(Buffer::try_zeroed(usize::MAX).is_none());
    }
}
