//! What passes a device of a host, in tcpdump's words.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::net::Host;

/// A capture that runs.
#[derive(Debug)]
pub struct Capture {
    /// Who captures: tcpdump; without root dumpcap, since in a user namespace tcpdump cannot become the user that it wants to be.
    captures: Child,
    /// Then tcpdump prints, outside.
    prints: Option<Child>,
}

impl Capture {
    /// Listens on `device` of `at` for what `filter` lets pass, and gives it back when it listens; `words` say how tcpdump prints.
    /// It ends by itself after `count` packets.
    pub fn start(at: &Host, device: &str, words: &[&str], count: Option<u32>, filter: &str) -> Capture {
        let count: Vec<String> = count.iter().flat_map(|n| ["-c".to_owned(), n.to_string()]).collect();
        let prints = ["-n", "-l"].iter().chain(words);
        let piped = |command: &mut Command| command.stdout(Stdio::piped()).spawn().unwrap();
        let is_root = rustix::process::geteuid().is_root();
        let mut captures = if is_root {
            let mut command = at.command("tcpdump");
            command
                .args(["-i", device, "-Z", "root", "--immediate-mode"])
                .args(prints.clone())
                .args(&count)
                .arg(filter);
            piped(command.stdin(Stdio::null()).stderr(Stdio::piped()))
        } else {
            let mut command = at.command("dumpcap");
            command.args(["-q", "-P", "-i", device, "-w", "-", "-f", filter]).args(&count);
            piped(command.stdin(Stdio::null()).stderr(Stdio::piped()))
        };
        let mut said = BufReader::new(captures.stderr.take().unwrap()).lines().map_while(Result::ok);
        assert!(
            said.any(|line| line.contains("listening on") || line.starts_with("File: ")),
            "somebody listens on {device}"
        );
        let prints = (!is_root).then(|| {
            let from = captures.stdout.take().unwrap();
            piped(Command::new("tcpdump").args(["-r", "-"]).args(prints).stdin(from).stderr(Stdio::null()))
        });
        Capture { captures, prints }
    }

    /// Ends it.
    pub fn stop(&self) {
        let _ = kill_process(Pid::from_child(&self.captures), Signal::TERM);
    }

    /// What was printed, once it has ended.
    pub fn text(mut self) -> String {
        let mut text = String::new();
        self.output().read_to_string(&mut text).unwrap();
        text
    }

    /// What is being printed.
    pub fn output(&mut self) -> impl Read + use<> {
        self.prints.as_mut().unwrap_or(&mut self.captures).stdout.take().unwrap()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        for child in [Some(&mut self.captures), self.prints.as_mut()].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
