//! The service manager's part (sd_notify(3)): started programs say that they are ready, and hand over descriptors that are kept for
//! their next run.
//!
//! A descriptor that is kept stays open: a TUN device goes on to queue, and so does a socket.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

/// How often a program that never says that it is ready is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// Longest message, and most descriptors in one.
const MESSAGE: usize = 4096;
const DESCRIPTORS: usize = 8;
/// The first descriptor that a program finds open (SD_LISTEN_FDS_START).
const FIRST: i32 = 3;

/// A socket for NOTIFY_SOCKET, read by a thread for as long as this process lives.
#[derive(Debug)]
pub(crate) struct Notify {
    path: PathBuf,
    heard: Arc<Heard>,
}

#[derive(Debug, Default)]
struct Heard {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: bool,
    kept: BTreeMap<String, OwnedFd>,
}

impl Heard {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notify {
    /// Binds the socket at `path`, anew.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = UnixDatagram::bind(path)?;
        let heard = Arc::<Heard>::default();
        let hearer = Arc::clone(&heard);
        thread::Builder::new().name("notify".into()).spawn(move || {
            while let Ok((text, fd)) = hear(&socket) {
                hearer.lock().take(&text, fd);
                hearer.changed.notify_all();
            }
        })?;
        Ok(Self { path: path.to_owned(), heard })
    }

    /// What NOTIFY_SOCKET is to be.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A program is about to be started: what the one before has said of itself does not count.
    pub(crate) fn begin(&self) {
        self.heard.lock().ready = false;
    }

    /// Waits until `ready` is true, which is told whether READY=1 has come; false when `alive` is no longer, or patience ends.
    pub(crate) fn wait(&self, patience: Duration, alive: impl Fn() -> bool, ready: impl Fn(bool) -> bool) -> bool {
        let end = Instant::now() + patience;
        let mut state = self.heard.lock();
        while Instant::now() < end {
            if ready(state.ready) {
                return true;
            }
            if !alive() {
                return false;
            }
            (state, _) = self.heard.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner);
        }
        false
    }

    /// What is kept, by name; it stays kept.
    pub(crate) fn kept(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        let state = self.heard.lock();
        state.kept.iter().map(|(name, fd)| Ok((name.clone(), fd.try_clone()?))).collect()
    }

    /// Closes what is kept: the program was stopped for good.
    pub(crate) fn forget(&self) {
        self.heard.lock().kept.clear();
    }
}

impl State {
    /// One message: `NAME=VALUE` lines, and the descriptor that came with it.
    fn take(&mut self, text: &str, fd: Option<OwnedFd>) {
        let says = |word: &str| text.lines().any(|line| line == word);
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
        self.ready |= says("READY=1");
        if says("FDSTOREREMOVE=1") {
            self.kept.remove(name);
        }
        if let Some(fd) = fd.filter(|_| says("FDSTORE=1")) {
            self.kept.insert(name.to_owned(), fd);
        }
    }
}

/// The next message, with its first descriptor.
fn hear(socket: &UnixDatagram) -> io::Result<(String, Option<OwnedFd>)> {
    let mut bytes = [0; MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let got = loop {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(got) => {
                let rights = control.drain().filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                    _ => None,
                });
                // Those behind the first are closed here.
                let mut all: Vec<OwnedFd> = rights.flatten().collect();
                all.truncate(1);
                break (got.bytes, got.flags.contains(ReturnFlags::TRUNC), all.pop());
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let (len, cut, fd) = got;
    // Half a message says nothing.
    let text = if cut { String::new() } else { String::from_utf8_lossy(&bytes[..len]).into_owned() };
    Ok((text, fd))
}

/// Becomes a program that finds two kept descriptors, which this process has as its stdin and stdout, as sd_listen_fds(3) tells. Only
/// comes back when that fails. The process must have no other descriptor open than those and stderr.
#[expect(clippy::disallowed_methods, reason = "the lab's own program becomes the agent")]
pub fn become_with_kept(names: &str, words: &[OsString]) -> io::Error {
    let Some((program, rest)) = words.split_first() else { return io::ErrorKind::InvalidInput.into() };
    let kept = (|| {
        let kept =
            [fcntl_dupfd_cloexec(io::stdin().as_fd(), FIRST)?, fcntl_dupfd_cloexec(io::stdout().as_fd(), FIRST)?];
        for (fd, number) in kept.iter().zip(FIRST..) {
            if fd.as_raw_fd() != number {
                return Err(io::Error::other(format!("descriptor {number} is taken")));
            }
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok((kept, io::stderr().as_fd().try_clone_to_owned()?))
    })();
    match kept {
        Ok((_kept, log)) => Command::new(program)
            .args(rest)
            .env("LISTEN_FDS", "2")
            .env("LISTEN_FDNAMES", names)
            .env("LISTEN_PID", std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(log)
            .exec(),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_remembered_until_it_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let notify = Notify::bind(&dir.path().join("socket")).unwrap();
        let fd = || Some(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        let names = || notify.kept().unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        let mut state = notify.heard.lock();
        state.take("FDSTORE=1\nFDNAME=a", fd());
        state.take("FDSTORE=1\nFDNAME=b", fd());
        // Without a descriptor, and of another kind.
        state.take("FDSTORE=1\nFDNAME=c", None);
        state.take("STATUS=FDSTORE=1\nFDNAME=d", fd());
        drop(state);
        assert_eq!(names(), ["a", "b"]);
        notify.heard.lock().take("FDSTOREREMOVE=1\nFDNAME=a", None);
        assert_eq!(names(), ["b"]);
        let socket = UnixDatagram::unbound().unwrap();
        socket.send_to(b"STATUS=x\nREADY=1", notify.path()).unwrap();
        assert!(notify.wait(Duration::from_secs(20), || true, |said| said));
        notify.begin();
        notify.forget();
        assert!(names().is_empty() && !notify.heard.lock().ready);
    }
}
