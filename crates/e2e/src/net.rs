//! Unnamed network namespaces for tests: hosts that a test made, and that die with it.
//!
//! ```text
//!   Bed ── (without root: one user namespace around all)
//!    ├─ Host "node1"  = a process that sleeps in its own network namespace; its PID is the handle
//!    ├─ Host "node2"
//!    └─ wire(node1 eth0, node2 eth0) = a veth pair
//! ```

use std::io::Write;
use std::process::{Child, Command, Output, Stdio};

/// What all hosts of a test stand in.
#[derive(Debug)]
pub struct Bed {
    /// Without root: the process that holds the user namespace.
    user: Option<Held>,
}

/// One host: a network namespace with `lo` up.
#[derive(Debug)]
pub struct Host {
    /// The name it has in messages.
    pub name: String,
    held: Held,
    user: Option<u32>,
}

/// A process that sleeps in namespaces until it is dropped.
#[derive(Debug)]
struct Held(Child);

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Bed {
    /// A place for hosts: as root directly, else in a user namespace. Where the system grants none, says `SKIP` and gives `None`.
    pub fn new() -> Option<Bed> {
        if rustix::process::geteuid().is_root() {
            return Some(Bed { user: None });
        }
        let proof = Command::new("unshare")
            .args(["--user", "--map-root-user", "--net", "ip", "link", "set", "lo", "up"])
            .output();
        if !proof.as_ref().is_ok_and(|out| out.status.success()) {
            println!("SKIP: no root, and no user namespace with a network: {proof:?}");
            return None;
        }
        Some(Bed { user: Some(hold(Command::new("unshare").args(["--user", "--map-root-user"]))) })
    }

    /// A new host.
    pub fn host(&self, name: &str) -> Host {
        let user = self.user.as_ref().map(|held| held.0.id());
        let held = hold(inside(user, None, "unshare").arg("--net"));
        let host = Host { name: name.to_owned(), held, user };
        host.ip("link set lo up");
        host
    }

    /// Joins two hosts by a veth pair, both ends up.
    pub fn wire(&self, a: &Host, a_dev: &str, b: &Host, b_dev: &str) {
        a.ip(&format!("link add {a_dev} type veth peer name {b_dev} netns {}", b.pid()));
        a.ip(&format!("link set {a_dev} up"));
        b.ip(&format!("link set {b_dev} up"));
    }
}

impl Host {
    /// The process that holds the namespace: `/proc/PID/ns/net` is the host's network.
    pub fn pid(&self) -> u32 {
        self.held.0.id()
    }

    /// A command that will run on this host.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        inside(self.user, Some(self.pid()), program)
    }

    /// Runs `ip WORDS` and fails the test when it fails; gives its stdout.
    pub fn ip(&self, words: &str) -> String {
        self.run(&format!("ip {words}"))
    }

    /// Runs a line of words without quoting, and fails the test when it fails; gives its stdout.
    pub fn run(&self, line: &str) -> String {
        let out = self.try_run(line);
        assert!(out.status.success(), "{}: `{line}` failed: {}", self.name, String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    /// Runs a line of words with `text` as its standard input, and fails the test when it fails.
    pub fn feed(&self, line: &str, text: &str) {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().unwrap());
        let mut child = command.args(words).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{}: `{line}` failed: {text}", self.name);
    }

    /// Runs a line of words without quoting.
    pub fn try_run(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        self.command(words.next().unwrap()).args(words).stdin(Stdio::null()).output().unwrap()
    }

    /// `ip -j WORDS` (or `bridge -j` when the line starts with that word) as JSON; nothing printed is an empty list.
    pub fn json(&self, line: &str) -> serde_json::Value {
        let line = if let Some(rest) = line.strip_prefix("bridge ") {
            format!("bridge -j {rest}")
        } else {
            format!("ip -j {line}")
        };
        let text = self.run(&line);
        if text.trim().is_empty() { serde_json::json!([]) } else { serde_json::from_str(&text).unwrap() }
    }
}

/// Moves the calling thread into a network namespace (root only).
pub fn enter(namespace: &std::fs::File) {
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
    use std::os::fd::AsFd;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
}

/// Starts `command … sleep infinity` and waits until the sleeper stands in its namespaces.
fn hold(command: &mut Command) -> Held {
    use std::io::Read;
    let mut child = command
        .args(["sh", "-c", "echo; exec sleep infinity"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start a namespace holder");
    let mut ready = [0];
    child.stdout.take().unwrap().read_exact(&mut ready).expect("the namespace holder says that it is there");
    Held(child)
}

/// A command in the user namespace of one process and the network namespace of another.
fn inside(user: Option<u32>, net: Option<u32>, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let (None, None) = (user, net) else {
        let mut command = Command::new("nsenter");
        if let Some(pid) = user {
            command.arg("--preserve-credentials").arg(format!("--user=/proc/{pid}/ns/user"));
            // The lock of iptables-legacy is root's, and for the host's own tables.
            command.env("XTABLES_LOCKFILE", "/dev/null");
        }
        if let Some(pid) = net {
            command.arg(format!("--net=/proc/{pid}/ns/net"));
        }
        command.arg("--").arg(program);
        return command;
    };
    Command::new(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_hosts_reach_each_other_and_nothing_else() {
        let Some(bed) = Bed::new() else { return };
        let (a, b) = (bed.host("a"), bed.host("b"));
        bed.wire(&a, "eth0", &b, "eth0");
        a.ip("addr add 10.9.0.1/24 dev eth0");
        b.ip("addr add 10.9.0.2/24 dev eth0");
        crate::eventually("a reaches b", || {
            let out = a.try_run("ping -c 1 -W 1 10.9.0.2");
            if out.status.success() { Ok(()) } else { Err(out) }
        });
        let names: Vec<_> =
            a.json("link").as_array().unwrap().iter().map(|l| l["ifname"].as_str().unwrap().to_owned()).collect();
        assert_eq!(names, ["lo", "eth0"]);
    }
}
