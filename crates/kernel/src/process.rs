//! This process and others: memory, capabilities, who else runs here.

#![allow(
    unsafe_code,
    reason = "mallopt, malloc_trim, prctl, a thread's affinity, NS_GET_USERNS and inherited descriptors have no safe wrapper"
)]

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::thread::JoinHandleExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::{fs, io};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::thread::sched_getcpu;

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

/// Has a thread that has not ended run on another processor than the caller's, where it may. One that has not run yet is there at once.
#[allow(clippy::unnecessary_cast, reason = "std gives a number; in musl's C it is a pointer")]
pub fn move_elsewhere<T>(thread: &JoinHandle<T>) -> io::Result<()> {
    // SAFETY: all zeroes is the empty set.
    let mut others: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let size = size_of_val(&others);
    // SAFETY: the kernel writes at most `size` bytes into the set, which is there for the call.
    if unsafe { libc::sched_getaffinity(0, size, &raw mut others) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: CPU_CLR looks at the size of the set.
    unsafe { libc::CPU_CLR(sched_getcpu(), &mut others) };
    let thread = thread.as_pthread_t() as libc::pthread_t;
    // SAFETY: the thread is not joined while its handle is borrowed; the set is there for the call.
    match unsafe { libc::pthread_setaffinity_np(thread, size, &raw const others) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Bits of the effective capability set (CAP_NET_ADMIN is bit 12, CAP_NET_RAW bit 13).
pub fn effective_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

/// The effective capabilities over our network namespace: none where its owner is a user namespace above ours (`ns_get_owner`).
pub fn network_capabilities() -> u64 {
    let Ok(network) = fs::File::open("/proc/self/ns/net") else { return effective_capabilities() };
    // SAFETY: NS_GET_USERNS takes no argument; the descriptor is open.
    let owner = unsafe { libc::ioctl(network.as_raw_fd(), libc::NS_GET_USERNS) };
    if owner < 0 {
        let above = std::io::Error::last_os_error().raw_os_error() == Some(libc::EPERM);
        return if above { 0 } else { effective_capabilities() };
    }
    // SAFETY: the kernel has just opened it for us.
    drop(unsafe { OwnedFd::from_raw_fd(owner) });
    effective_capabilities()
}

/// The name of a process; `None`: there is none of this number.
pub fn name(pid: u32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).ok().map(|name| name.trim_end().to_owned())
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

/// PIDs of the processes that hold a lock of the file at `path` (proc_locks(5)), as far as our PID namespace shows them.
pub fn lock_holders(path: &Path) -> Vec<u32> {
    let Ok(inode) = fs::metadata(path).map(|is| is.ino().to_string()) else { return Vec::new() };
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    // "1: FLOCK  ADVISORY  WRITE 12010 00:04:4026532963 0 EOF"; who waits has "->" before the word.
    let holder = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ours = words.get(1) == Some(&"FLOCK") && words.get(5)?.rsplit(':').next() == Some(&inode);
        words.get(4)?.parse().ok().filter(|_| ours)
    };
    locks.lines().filter_map(holder).collect()
}

/// True for a process of root or of our own user.
pub fn is_trusted(pid: u32) -> bool {
    let ours = rustix::process::geteuid().as_raw();
    fs::metadata(format!("/proc/{pid}")).is_ok_and(|is| is.uid() == 0 || is.uid() == ours)
}

/// The path of a file of this name that a process has open, as far as we may look.
pub fn open_file_named(pid: u32, name: &str) -> Option<PathBuf> {
    open_files(pid).find(|path| path.file_name().is_some_and(|last| last == name))
}

fn open_files(pid: u32) -> impl Iterator<Item = PathBuf> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.filter_map(|fd| fs::read_link(fd.path()).ok())
}

/// Sockets that listen in our network namespace: address and inode.
pub fn listeners() -> Vec<(SocketAddr, u64)> {
    const LISTEN: &str = "0A";
    sockets("tcp")
        .into_iter()
        .filter(|socket| socket.state == LISTEN)
        .map(|socket| (socket.local, socket.inode))
        .collect()
}

/// Where our network namespace has UDP sockets, those of the kernel's tunnels included.
pub fn udp_sockets() -> Vec<SocketAddr> {
    sockets("udp").into_iter().map(|socket| socket.local).collect()
}

struct Socket {
    local: SocketAddr,
    state: String,
    inode: u64,
}

/// The tables of a protocol, for IPv4 and for IPv6 (proc_pid_net(5)).
fn sockets(protocol: &str) -> Vec<Socket> {
    let tables = ["", "6"].map(|v| fs::read_to_string(format!("/proc/self/net/{protocol}{v}")).unwrap_or_default());
    let row = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (address, port) = words.get(1)?.split_once(':')?;
        let local = SocketAddr::new(address_of(address)?, u16::from_str_radix(port, 16).ok()?);
        Some(Socket { local, state: (*words.get(3)?).to_owned(), inode: words.get(9)?.parse().ok()? })
    };
    tables.iter().flat_map(|table| table.lines()).filter_map(row).collect()
}

/// An address as the kernel prints its words, each in the machine's own order of bytes.
fn address_of(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| Some(u32::from_str_radix(hex.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    match hex.len() {
        8 => Some(IpAddr::from(word(0)?)),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            Some(IpAddr::from(<[u8; 16]>::try_from(words.concat()).ok()?))
        }
        _ => None,
    }
}

/// True when a process has this socket open, as far as we may look.
pub fn has_socket(pid: u32, inode: u64) -> bool {
    let name = format!("socket:[{inode}]");
    open_files(pid).any(|target| target.as_os_str() == name.as_str())
}

/// A handle of a process (pidfd_open(2)), by which its end can be awaited; `None`: it is gone, or not ours to see.
pub fn handle(pid: u32) -> Option<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid.try_into().ok()?)?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

/// Waits until the process of a handle has ended, with all that it had open.
pub fn await_end(handle: &OwnedFd) {
    let mut fds = [PollFd::new(handle, PollFlags::IN)];
    while poll(&mut fds, None) == Err(rustix::io::Errno::INTR) {}
}

/// Descriptors that the service manager has kept for us, with their names (sd_listen_fds_with_names(3)). The first call has them all.
pub fn kept_descriptors() -> Vec<(String, OwnedFd)> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name: &str| std::env::var(name).ok()?.parse::<i32>().ok();
    if number("LISTEN_PID") != i32::try_from(std::process::id()).ok() || TAKEN.swap(true, Ordering::Relaxed) {
        return Vec::new();
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
    let fds = 3..number("LISTEN_FDS").unwrap_or(0).clamp(0, 64) + 3;
    let open = fds.zip(names).filter(|(fd, _)| fs::exists(format!("/proc/self/fd/{fd}")).unwrap_or(false));
    open.map(|(fd, name)| {
        // SAFETY: the manager opened it for this process, as LISTEN_PID says; it is open, and TAKEN makes sure that nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
        (name, fd)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a process to wait for")]
    fn a_process_is_awaited_to_its_end() {
        let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let handle = handle(child.id()).unwrap();
        drop(child.stdin.take());
        await_end(&handle);
        assert!(child.try_wait().unwrap().is_some());
    }

    #[test]
    fn a_socket_that_listens_is_found_with_its_address_and_its_process() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(address) else { continue };
            let address = listener.local_addr().unwrap();
            let inode = listeners().into_iter().find(|(at, _)| *at == address).unwrap().1;
            assert!(has_socket(std::process::id(), inode) && !has_socket(std::process::id(), 1));
        }
    }
}
