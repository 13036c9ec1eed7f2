//! Memory that is freed and soon wanted again.

/// Tells the C library to keep large blocks that are freed instead of giving them back to the system at once: once at the
/// start of a program, before anything large is allocated. Without glibc it does nothing.
///
/// Every tensor operation allocates its result, and in a forward pass the same sizes come again and again. glibc maps
/// each large block anew, and the system zeroes its pages one fault at a time, at 8 GB/s on a machine whose memory does
/// 30: of a pass over 2048 × 768 values nine tenths of the time. What is kept is bounded by the most that was ever out.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets two numbers of the allocator, under its own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
