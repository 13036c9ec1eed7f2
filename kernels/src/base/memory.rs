//! Memory that is freed and soon wanted again, memory on huge pages, and memory that need not be cleared.

#[cfg(all(target_os = "linux", target_env = "gnu"))]
use std::sync::atomic::{AtomicUsize, Ordering};

/// How far the heap's pages have been asked for as huge ones; 0 before [`keep_freed`].
#[cfg(all(target_os = "linux", target_env = "gnu"))]
static ADVISED: AtomicUsize = AtomicUsize::new(0);

/// By how much the heap grows at least: some huge pages.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const GROWTH: i32 = 64 << 20;

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
        libc::mallopt(libc::M_TOP_PAD, GROWTH);
        ADVISED.store(libc::sbrk(0) as usize, Ordering::Relaxed);
    }
}

/// Asks for huge pages where the heap of the C library has grown: for a program's allocator, after each large block and before
/// it is touched. Keys and values, states and activations are then read without a walk through page tables every 4 KiB, which
/// in a virtual machine is two walks.
///
/// Does nothing before [`keep_freed`], and without glibc.
pub fn advise_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        let from = ADVISED.load(Ordering::Relaxed);
        if from == 0 {
            return;
        }
        // SAFETY: says where the heap ends.
        let end = unsafe { libc::sbrk(0) } as usize;
        if end > from && ADVISED.compare_exchange(from, end, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            let page = from & !4095;
            // SAFETY: the advice changes no contents, whoever owns them. It may be refused, which costs only speed.
            unsafe { libc::madvise(page as *mut _, end - page, libc::MADV_HUGEPAGE) };
        }
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

#[cfg(test)]
mod tests {
    /// What the heap has grown by is marked: `hg` among the flags of the mapping.
    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn the_heap_asks_for_huge_pages_where_it_grows() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            eprintln!("skipped: this system has no transparent huge pages");
            return;
        }
        super::keep_freed();
        let grown = 8 << 20;
        // SAFETY: nobody uses what the heap grows by here.
        let middle = unsafe { libc::sbrk(grown) } as usize + grown as usize / 2;
        super::advise_heap();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let inside = |line: &str| {
            let (from, to) = line.split_whitespace().next()?.split_once('-')?;
            let [from, to] = [from, to].map(|end| usize::from_str_radix(end, 16));
            Some((from.ok()?..to.ok()?).contains(&middle))
        };
        let flags =
            maps.lines().skip_while(|line| inside(line) != Some(true)).find(|line| line.starts_with("VmFlags:"));
        assert!(flags.unwrap().split_whitespace().any(|flag| flag == "hg"), "{flags:?}");
    }
}
