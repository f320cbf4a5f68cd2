//! Waiting until a started program is ready: it says so (sd_notify(3)), or it has visibly done what is waited for.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often a program that never says that it is ready is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// A socket for NOTIFY_SOCKET.
#[derive(Debug)]
pub(crate) struct Notify {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Notify {
    /// Binds the socket at `path`, anew.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = UnixDatagram::bind(path)?;
        socket.set_read_timeout(Some(LOOK))?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// What NOTIFY_SOCKET is to be.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until `ready` is true, which is told whether READY=1 has come; false when `alive` is no longer, or patience ends.
    pub(crate) fn wait(&self, patience: Duration, alive: impl Fn() -> bool, ready: impl Fn(bool) -> bool) -> bool {
        let end = Instant::now() + patience;
        let mut buf = [0; 4096];
        let mut said = false;
        while Instant::now() < end {
            if ready(said) {
                return true;
            }
            if !alive() {
                return false;
            }
            if let Ok(len) = self.socket.recv(&mut buf) {
                said |= buf[..len].split(|byte| *byte == b'\n').any(|line| line == b"READY=1");
            }
        }
        false
    }
}
