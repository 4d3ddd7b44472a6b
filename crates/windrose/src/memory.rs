//! How much memory this process may still take, for sizing the cache, and what it has. Linux only; elsewhere a modest
//! guess.

use std::fs::read_to_string;

/// Assumed where the system does not say.
const FALLBACK_BYTES: u64 = 4 << 30;

/// Bytes available now: what the machine has left, or what the process's cgroup still grants if that is less.
pub(crate) fn available_bytes() -> u64 {
    let machine = read_to_string("/proc/meminfo").ok().and_then(|text| field_bytes(&text, "MemAvailable:"));
    let cgroup =
        cgroup_headroom("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current").or_else(|| {
            let v1 = "/sys/fs/cgroup/memory/memory";
            cgroup_headroom(&format!("{v1}.limit_in_bytes"), &format!("{v1}.usage_in_bytes"))
        });
    machine.unwrap_or(FALLBACK_BYTES).min(cgroup.unwrap_or(u64::MAX))
}

/// Bytes of this process in memory, mapped files included; `None` where the system does not say.
pub(crate) fn resident_bytes() -> Option<u64> {
    field_bytes(&read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// A size in one of the kernel's texts, which are in KiB.
fn field_bytes(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// `None` if there is no such limit ("max") or no such file.
fn cgroup_headroom(limit_file: &str, usage_file: &str) -> Option<u64> {
    let number = |file: &str| read_to_string(file).ok()?.trim().parse::<u64>().ok();
    Some(number(limit_file)?.saturating_sub(number(usage_file)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_kib() {
        let text = "MemTotal: 8 kB\nMemAvailable:   2048 kB\n";
        assert_eq!(field_bytes(text, "MemAvailable:"), Some(2048 * 1024));
        assert_eq!(field_bytes("nothing", "MemAvailable:"), None);
    }

    #[test]
    fn some_memory_is_available() {
        assert!(available_bytes() > 1 << 20);
    }
}
