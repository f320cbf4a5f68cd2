//! The processes of a lab. The supervisor is PID 1 of its namespace: it reaps everybody, its own children and orphans.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions, kill_process, wait, waitid};
use twill_kernel::netns::Netns;

use crate::error::LabError;

/// All children, and how each of them ended.
#[derive(Debug, Default)]
pub(crate) struct Children {
    all: Mutex<BTreeMap<u32, Life>>,
    changed: Condvar,
    closed: AtomicBool,
}

/// This program, to be started again.
#[expect(
    clippy::disallowed_methods,
    reason = "a lab starts real processes of this very program: supervisor, store, agents"
)]
pub(crate) fn own_program() -> Result<Command, LabError> {
    // /proc/self/exe stays right when the file is replaced under a running lab.
    let path = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
    let mut command = Command::new(path);
    // What this machine's own daemon is told is not for the lab.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"TWILL_")) {
        command.env_remove(name);
    }
    Ok(command)
}

/// How a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Alive,
    Succeeded,
    Failed,
}

impl Children {
    /// Starts the reaper, which lasts as long as the process.
    pub(crate) fn new() -> Arc<Self> {
        let children = Arc::new(Self::default());
        let reaper = Arc::clone(&children);
        thread::spawn(move || reaper.reap());
        children
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Life>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a program in a namespace; what it says goes to `log`. It has `given` as its stdin and stdout, where there is something to
    /// give. Gives its PID.
    pub(crate) fn spawn(
        &self,
        netns: &Netns,
        command: &mut Command,
        log: &Path,
        given: Option<[OwnedFd; 2]>,
    ) -> io::Result<u32> {
        let log: File = OpenOptions::new().create(true).append(true).open(log)?;
        // The program has this lock as long as it lives: LabDir::silent.
        flock(&log, FlockOperation::LockShared)?;
        match given {
            Some([stdin, stdout]) => command.stdin(stdin).stdout(stdout).stderr(log),
            None => command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log),
        };
        // Held until the PID is known, so that the reaper cannot come first.
        let mut all = self.lock();
        if self.is_closed() {
            return Err(io::Error::other("the lab is ending"));
        }
        let child = netns.run(|| command.spawn())??;
        all.insert(child.id(), Life::Alive);
        self.changed.notify_all();
        Ok(child.id())
    }

    fn life(&self, pid: u32) -> Option<Life> {
        self.lock().get(&pid).copied()
    }

    /// True while the process has not ended.
    pub(crate) fn is_alive(&self, pid: u32) -> bool {
        self.life(pid) == Some(Life::Alive)
    }

    /// True when the process has ended with exit code 0.
    pub(crate) fn succeeded(&self, pid: u32) -> bool {
        self.life(pid) == Some(Life::Succeeded)
    }

    /// Sends a signal, when the process has not ended.
    pub(crate) fn signal(&self, pid: u32, signal: Signal) -> io::Result<()> {
        let all = self.lock();
        match Pid::from_raw(pid as i32) {
            Some(target) if all.get(&pid) == Some(&Life::Alive) => Ok(kill_process(target, signal)?),
            _ => Ok(()),
        }
    }

    /// Waits until the process has ended; false when it has not within `patience`.
    pub(crate) fn wait(&self, pid: u32, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut all = self.lock();
        while all.get(&pid) == Some(&Life::Alive) {
            let Some(left) = end.checked_duration_since(Instant::now()) else { return false };
            (all, _) = self.changed.wait_timeout(all, left).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// True when the lab is ending: no child is started any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Ends all children at once, and waits for them; no other is started.
    pub(crate) fn end_all(&self, patience: Duration) {
        let all = self.lock();
        self.closed.store(true, Ordering::Relaxed);
        drop(all);
        let pids: Vec<u32> =
            self.lock().iter().filter(|(_, life)| **life == Life::Alive).map(|(pid, _)| *pid).collect();
        for pid in &pids {
            let _ = self.signal(*pid, Signal::KILL);
        }
        for pid in pids {
            self.wait(pid, patience);
        }
    }

    fn reap(&self) {
        loop {
            // Looked at first, taken under the lock: until then the PID is not given to anybody else.
            let seen = waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
            let mut all = self.lock();
            match seen {
                Ok(_) => {
                    if let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
                        let life = if status.exit_status() == Some(0) { Life::Succeeded } else { Life::Failed };
                        all.insert(pid.as_raw_nonzero().get() as u32, life);
                        self.changed.notify_all();
                    }
                }
                Err(Errno::CHILD) => {
                    // Nobody there: wait until somebody is.
                    while !all.values().any(|life| *life == Life::Alive) {
                        all = self.changed.wait(all).unwrap_or_else(PoisonError::into_inner);
                    }
                }
                Err(_) => {}
            }
        }
    }
}
