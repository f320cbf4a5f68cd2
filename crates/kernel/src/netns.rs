//! Network namespaces: unnamed, held by a descriptor or a process, entered by a thread of their own.

#![allow(unsafe_code, reason = "unshare and setns change the calling thread, which rustix marks unsafe")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// An open network namespace.
#[derive(Debug)]
pub struct Netns(File);

impl Netns {
    /// Opens a path such as /proc/PID/ns/net or /run/netns/NAME. What is no namespace is not waited for, a pipe for instance.
    pub fn open(path: &Path) -> io::Result<Self> {
        File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map(Self)
    }

    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The namespace of the process's first thread: its name is found sooner than that of [`Netns::current`].
    pub fn of_first_thread() -> io::Result<Self> {
        Self::open(Path::new("/proc/self/ns/net"))
    }

    /// Makes a new, empty namespace; the caller stays where it is.
    pub fn create() -> io::Result<Self> {
        let made = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare_network()?;
                Self::current()
            });
            thread.join()
        });
        made.map_err(|_| io::Error::other("the thread that makes a namespace panicked"))?
    }

    /// The number that it has for as long as it lives.
    pub fn inode(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.ino())
    }

    /// Moves the calling thread into the namespace.
    pub fn enter(&self) -> io::Result<()> {
        Ok(move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// Runs `act` in the namespace on the calling thread, and brings the thread back.
    pub fn visit<T>(&self, act: impl FnOnce() -> T) -> io::Result<T> {
        self.visit_from(&Self::current()?, act)
    }

    /// The same, for a thread that is in `home`.
    pub fn visit_from<T>(&self, home: &Netns, act: impl FnOnce() -> T) -> io::Result<T> {
        self.enter()?;
        let done = act();
        home.enter()?;
        Ok(done)
    }

    /// Runs `act` in the namespace, on a thread of its own, so that the caller stays where it is.
    pub fn run<T: Send>(&self, act: impl FnOnce() -> T + Send) -> io::Result<T> {
        let ended = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter()?;
                Ok(act())
            });
            thread.join()
        });
        ended.map_err(|_| io::Error::other("the thread in the namespace panicked"))?
    }
}

impl From<OwnedFd> for Netns {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

/// The same namespace, however it was opened (namespaces(7)).
impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        let number = |namespace: &Self| namespace.0.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
        number(self).is_some_and(|own| number(other) == Some(own))
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Moves the calling thread into a new network namespace.
pub fn unshare_network() -> io::Result<()> {
    // SAFETY: CLONE_NEWNET changes the network namespace of the calling thread alone; no memory or descriptor is shared or unshared.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// Moves the process into new user and PID namespaces, before it has any second thread; children are in the new PID namespace.
///
/// Where `map` is given, inner user and group 0 are this outer user and group.
pub fn unshare_process(user: Option<(u32, u32)>) -> io::Result<()> {
    let flags = if user.is_some() { UnshareFlags::NEWUSER | UnshareFlags::NEWPID } else { UnshareFlags::NEWPID };
    // SAFETY: the kernel refuses CLONE_NEWUSER to a process with threads; NEWPID concerns later children alone.
    unsafe { unshare_unsafe(flags) }?;
    if let Some((uid, gid)) = user {
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
        std::fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    }
    Ok(())
}

/// Enters the user namespace of a process; the caller must have no second thread.
pub fn enter_user(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    Ok(move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::User))?)
}

/// Enters the PID namespace of a process: children from now on are in it, the caller itself is not.
pub fn enter_pid(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    Ok(move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::ProcessID))?)
}
