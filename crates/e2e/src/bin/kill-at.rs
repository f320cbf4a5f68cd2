//! `kill-at N PROGRAM…`: runs a program and kills it, with all its threads, as it enters its N-th system call after exec, whichever it
//! is. The call itself is not carried out. Exits with 137 then, and with the program's own code when it ended before.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// PTRACE_SYSCALL_INFO_ENTRY.
const ENTRY: u8 = 1;
/// As a shell tells it: 128 and SIGKILL.
const KILLED: u8 = 128 + 9;

#[allow(clippy::zombie_processes, reason = "waited for as its tracer")]
fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words[0] == "traced" {
        ptrace::traceme().unwrap();
        panic!("{}: {}", words[1], Command::new(&words[1]).args(&words[2..]).exec());
    }
    let last: usize = words[0].parse().unwrap();
    let own = std::env::current_exe().unwrap();
    let child = Command::new(own).arg("traced").args(&words[1..]).spawn().unwrap();
    ExitCode::from(trace(Pid::from_raw(child.id().try_into().unwrap()), last))
}

/// Follows the program from its exec on; gives its exit code.
fn trace(program: Pid, last: usize) -> u8 {
    assert_eq!(waitpid(program, None), Ok(WaitStatus::Stopped(program, Signal::SIGTRAP)), "it stops at its exec");
    let options = Options::PTRACE_O_EXITKILL | Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
    ptrace::setoptions(program, options).unwrap();
    let mut entered = 0;
    // A thread that is gone by now has nothing to go on with.
    let go_on = |thread: Pid, signal: Option<Signal>| {
        let _ = ptrace::syscall(thread, signal);
    };
    go_on(program, None);
    loop {
        match waitpid(None, Some(WaitPidFlag::__WALL)).unwrap() {
            WaitStatus::PtraceSyscall(thread) => {
                entered += usize::from(ptrace::syscall_info(thread).is_ok_and(|info| info.op == ENTRY));
                if entered == last {
                    kill(program, Signal::SIGKILL).unwrap();
                }
                go_on(thread, None);
            }
            WaitStatus::Exited(thread, code) if thread == program => return u8::try_from(code).unwrap(),
            WaitStatus::Signaled(thread, ..) if thread == program => return KILLED,
            // A new thread begins with a stop that nobody sent.
            WaitStatus::PtraceEvent(thread, ..) | WaitStatus::Stopped(thread, Signal::SIGSTOP) => go_on(thread, None),
            WaitStatus::Stopped(thread, signal) => go_on(thread, Some(signal)),
            _ => {}
        }
    }
}
