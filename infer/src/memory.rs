//! What the system says of memory, in bytes; `None` where it does not (it is Linux that does).

/// What programs may still take.
pub fn free() -> Option<u64> {
    figure("/proc/meminfo", "MemAvailable:")
}

/// What this process holds.
pub fn held() -> Option<u64> {
    figure("/proc/self/status", "VmRSS:")
}

/// The most that it has held.
pub fn peak() -> Option<u64> {
    figure("/proc/self/status", "VmHWM:")
}

/// A line such as `VmHWM:     1234 kB`.
fn figure(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_holds_some() {
        let (free, held, peak) = (free().unwrap(), held().unwrap(), peak().unwrap());
        assert!(free > 0 && held > 1 << 20 && peak > 1 << 20);
    }

    #[test]
    fn what_is_not_there_is_none() {
        assert_eq!(figure("/proc/self/status", "VmNone:"), None);
        assert_eq!(figure("/proc/none", "VmHWM:"), None);
    }
}
