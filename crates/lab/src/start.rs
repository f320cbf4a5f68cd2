//! Making and ending a lab, and the processes that become its supervisor.
//!
//! ```text
//! client ──▶ `lab supervise`         unshares the PID (and user) namespace, starts the next one, and ends
//!              └─▶ `lab supervise --inner`      PID 1 there: the supervisor
//! ```
//! The client holds the supervisor's stdin: when it closes without the word `STAY`, the lab ends, whatever became of the client.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use twill_kernel::{netns, process};

use crate::children::own_program;
use crate::error::{Act, LabError};
use crate::home::{CLIENTS_HOME, Home, LabDir, may_name};
use crate::layout::{LabName, Spec};
use crate::proto::{LabState, Request, STAY, Word, connect, listen, say};
use crate::supervisor;

/// How long a supervisor may take to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bits of the capability set.
const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// A lab that ends with this value, unless it is told to stay.
#[derive(Debug)]
pub struct Started {
    /// The lab.
    pub state: LabState,
    launcher: Child,
    stdin: Option<ChildStdin>,
    dir: LabDir,
}

impl Started {
    /// Lets the lab outlive this process.
    pub fn stay(mut self) -> Result<LabState, LabError> {
        if let Some(mut stdin) = self.stdin.take() {
            writeln!(stdin, "{STAY}").act(|| "tell the lab to stay".into())?;
        }
        Ok(self.state.clone())
    }

    /// Ends the lab, and removes every trace.
    pub fn end(self) -> Result<(), LabError> {
        down(&self.dir).map(|_| ())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // The launcher has long ended; the supervisor is nobody's child here.
        let _ = self.launcher.wait();
    }
}

/// Makes a lab. What a killed one of the same name has left is removed before. `heard` gets each line of progress.
pub fn up(home: &Home, spec: &Spec, heard: impl FnMut(&str)) -> Result<Started, LabError> {
    let dir = home.lab(&spec.name);
    if connect(&dir).is_ok() {
        return Err(LabError::new("lab-exists", format!("lab {} is there already", spec.name))
            .hint(format!("`twill lab down --name {0}` ends it, another --name makes another one", spec.name)));
    }
    dir.bury()?;
    dir.create()?;
    let made = supervised(&dir, spec, heard);
    if made.is_err() {
        dir.bury()?;
    }
    made
}

fn supervised(dir: &LabDir, spec: &Spec, heard: impl FnMut(&str)) -> Result<Started, LabError> {
    let log = dir.path().join("supervisor.log");
    let log = File::create(&log).act(|| format!("make {}", log.display()))?;
    let text = serde_json::to_string(spec).act(|| "write the lab's plan".into())?;
    let mut launcher = own_program()?
        .args(["lab", "supervise", &text])
        .env(CLIENTS_HOME, dir.home())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .act(|| "start the lab's supervisor".into())?;
    let (stdin, stdout) = (launcher.stdin.take(), launcher.stdout.take());
    let answer = match stdout {
        Some(stdout) => listen(stdout, heard),
        None => Err(LabError::new("lab-failed", "the lab's supervisor has no output")),
    };
    match answer {
        Ok(state) => Ok(Started { state, launcher, stdin, dir: dir.clone() }),
        Err(mut error) => {
            drop(stdin);
            let _ = launcher.wait();
            let said = fs::read_to_string(dir.path().join("supervisor.log")).unwrap_or_default();
            if let Some(last) = said.lines().last() {
                error.message += &format!(" ({last})");
            }
            Err(error)
        }
    }
}

/// The launcher: goes into the namespaces, starts the supervisor there, and ends. `text` is a [`Spec`] as JSON.
/// The process must not have a second thread.
pub fn launch(text: &str) -> Result<(), LabError> {
    tell(launch_quietly(text))
}

fn launch_quietly(text: &str) -> Result<(), LabError> {
    let have = process::effective_capabilities();
    let needed = CAP_NET_ADMIN | CAP_SYS_ADMIN;
    let enough = may_name() && have & needed == needed;
    let me = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    netns::unshare_process((!enough).then_some(me)).map_err(|error| forbidden(&error))?;
    let mut inner = own_program()?;
    inner.args(["lab", "supervise", "--inner", text]);
    if !enough {
        inner.arg("--user-namespace");
    }
    inner.spawn().act(|| "start the lab's supervisor".into())?;
    Ok(())
}

/// The supervisor: makes the lab, and serves it until it ends. The process must not have a second thread.
pub fn supervise(text: &str, user_namespace: bool) -> Result<(), LabError> {
    tell(supervise_quietly(text, user_namespace))
}

fn supervise_quietly(text: &str, user_namespace: bool) -> Result<(), LabError> {
    let spec: Spec = serde_json::from_str(text).act(|| "read the lab's plan".into())?;
    // A signal to the client's terminal is not for the lab.
    let _ = rustix::process::setsid();
    netns::unshare_network().map_err(|error| forbidden(&error))?;
    let dir = Home::of_client()?.lab(&spec.name);
    supervisor::run(dir, spec, user_namespace)
}

/// Tells the client, who listens on stdout, what went wrong.
fn tell(result: Result<(), LabError>) -> Result<(), LabError> {
    if let Err(error) = &result {
        let _ = say(&mut io::stdout(), &Word::Failed(error.clone()));
    }
    result
}

/// The system does not let us make namespaces: which setting it is.
fn forbidden(error: &io::Error) -> LabError {
    let setting = |path: &str| fs::read_to_string(format!("/proc/sys/{path}")).unwrap_or_default().trim().to_owned();
    let hint = if setting("user/max_user_namespaces") == "0" {
        "as root: sysctl -w user.max_user_namespaces=15000".to_owned()
    } else if setting("kernel/unprivileged_userns_clone") == "0" {
        "as root: sysctl -w kernel.unprivileged_userns_clone=1".to_owned()
    } else if setting("kernel/apparmor_restrict_unprivileged_userns") == "1" {
        "as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0".to_owned()
    } else if error.raw_os_error() == Some(libc::ENOSPC) {
        "a limit below /proc/sys/user is reached (as root: sysctl -a --pattern '^user.max_')".to_owned()
    } else {
        "a seccomp filter or a container without CAP_SYS_ADMIN is in the way: run it as root on the host".to_owned()
    };
    LabError::new("userns-forbidden", format!("this system does not let you make namespaces: {error}")).hint(hint)
}

/// Ends a lab and removes every trace, also when its supervisor was killed. False when there was nothing.
pub fn down(dir: &LabDir) -> Result<bool, LabError> {
    let supervisor = connect(dir).ok();
    if let Some(mut stream) = supervisor {
        let peer = socket_peercred(&stream).act(|| "ask who the lab's supervisor is".into())?;
        let handle = pidfd_open(peer.pid, PidfdFlags::empty());
        let asked = say(&mut stream, &Request::Down).act(|| "ask the lab to end".into());
        let answer = asked.and_then(|()| listen(stream, |_| ()));
        if let Ok(handle) = handle {
            let ended = ends(&handle, if answer.is_ok() { PATIENCE } else { Duration::ZERO })?;
            if !ended {
                let _ = pidfd_send_signal(&handle, Signal::KILL);
                ends(&handle, PATIENCE)?;
            }
        }
        dir.bury()?;
        return Ok(true);
    }
    dir.bury()
}

/// Waits until a process has ended.
fn ends(handle: &OwnedFd, patience: Duration) -> Result<bool, LabError> {
    let limit = Timespec { tv_sec: patience.as_secs() as _, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&limit));
    Ok(ready.act(|| "wait for the lab's supervisor to end".into())? > 0)
}

/// A lab that `list` shows.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its name.
    pub name: LabName,
    /// `None`: its supervisor was killed, and `down` removes what is left.
    pub state: Option<LabState>,
}

/// All labs of this user.
pub fn list(home: &Home) -> Result<Vec<Listed>, LabError> {
    let names = home.labs()?;
    let listed = names.into_iter().map(|name| {
        let state = crate::proto::ask(&home.lab(&name), &Request::Status, |_| ()).ok();
        Listed { name, state }
    });
    Ok(listed.collect())
}
