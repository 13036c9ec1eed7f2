//! Memory that is freed and soon wanted again, and memory that need not be cleared.

/// Tells the C library to keep large blocks that are freed instead of giving them back to the system at once: once at the
/// start of a program, before anything large is allocated. Without glibc it does nothing.
///
/// Every tensor operation allocates its result, and in a forward pass the same sizes come again and again. glibc maps
/// each large block anew, and the system zeroes its pages one fault at a time, at 8 GB/s on a machine whose memory does
/// 30: of a pass over 2048 × 768 values nine tenths of the time. What is kept is bounded by the most that was ever out.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets numbers of the allocator, under its own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        // The other threads' own arenas give memory back whatever this says. Small blocks, for whose lock the threads would
        // queue, are another allocator's in the programs.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// `len` floats of any value, for results of which every element is going to be written: clearing them first would be a
/// second pass over memory, and on one thread. Under test they are NaN, so that one which is not written is seen.
pub(crate) fn arbitrary(len: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    // SAFETY: the memory is the vector's own.
    unsafe { settle(values.as_mut_ptr()) };
    // SAFETY: so many fit, and they are initialised, if with what nobody knows.
    unsafe { values.set_len(len) };
    if cfg!(test) {
        values.fill(f32::NAN);
    }
    values
}

/// Makes what lies in freshly allocated memory values like any others: to the compiler the empty instruction may have
/// written them.
///
/// # Safety
/// `start` is the beginning of an allocation that the caller owns.
pub(crate) unsafe fn settle<T>(start: *mut T) {
    // SAFETY: no instruction at all.
    unsafe { std::arch::asm!("/* {0} */", in(reg) start, options(nostack, preserves_flags)) };
}
