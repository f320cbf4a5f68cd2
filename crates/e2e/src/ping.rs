//! A ping that goes on while things happen: whether packets pass, and which were lost.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::Signal;

use crate::eventually;
use crate::net::Host;
use crate::node::Daemon;

/// A ping through the overlay, five hundred in a second.
#[derive(Debug)]
pub struct Ping {
    daemon: Daemon,
    log: PathBuf,
}

impl Ping {
    /// Starts it on `host`, from one of its addresses, and sees packets pass; what it prints goes to `log`.
    pub fn start(host: &Host, from: &str, to: &str, log: &Path) -> Ping {
        let mut command = host.command("ping");
        command.args(["-n", "-i", "0.002", "-I", from, to]).stdin(Stdio::null()).stdout(File::create(log).unwrap());
        let ping = Ping { daemon: Daemon::of(command.spawn().unwrap()), log: log.to_owned() };
        ping.more("before anything happens");
        ping
    }

    /// Waits for a hundred more answers.
    pub fn more(&self, what: &str) {
        let had = answered(&self.log).len();
        eventually(&format!("packets pass {what}"), || {
            let now = answered(&self.log).len();
            if now >= had + 100 { Ok(()) } else { Err((had, now)) }
        });
    }

    /// Ends it: every packet from the first answered one to the last was answered.
    pub fn end(self, what: &str) {
        self.more("at the end");
        self.daemon.end(Signal::INT);
        let answered = answered(&self.log);
        let (first, last) = (*answered.first().unwrap(), *answered.last().unwrap());
        let lost: Vec<u64> = (first..=last).filter(|seq| !answered.contains(seq)).collect();
        assert_eq!(lost, Vec::<u64>::new(), "of {last} packets, {what}");
    }
}

/// Sequence numbers that were answered.
fn answered(log: &Path) -> BTreeSet<u64> {
    let log = std::fs::read_to_string(log).unwrap();
    log.lines().filter_map(|line| line.split("icmp_seq=").nth(1)?.split(' ').next()?.parse().ok()).collect()
}
