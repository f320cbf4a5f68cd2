//! This process and others: memory, capabilities, who else runs here.

#![allow(unsafe_code, reason = "mallopt, malloc_trim and prctl have no safe wrapper")]

use std::fs;
use std::path::PathBuf;

/// From now on all threads share one heap: what a short-lived thread freed is not kept for it.
pub fn one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes no pointer and may be called at any time from any thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives freed memory back to the system; worth it after bulk work.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes no pointer and may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Ends this process when its parent ends.
pub fn die_with_parent() {
    // SAFETY: PR_SET_PDEATHSIG takes a signal number and touches no memory.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
}

/// Bits of the effective capability set (CAP_NET_ADMIN is bit 12, CAP_NET_RAW bit 13).
pub fn effective_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

/// PIDs of other programs named `name` in our network namespace.
pub fn neighbours_named(name: &str) -> Vec<u32> {
    let Ok(ours) = fs::read_link("/proc/self/ns/net") else { return Vec::new() };
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id());
    let same = |pid: &u32| {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let comm = fs::read_to_string(proc.join("comm")).unwrap_or_default();
        comm.trim() == name && fs::read_link(proc.join("ns/net")).is_ok_and(|theirs| theirs == ours)
    };
    pids.filter(same).collect()
}
