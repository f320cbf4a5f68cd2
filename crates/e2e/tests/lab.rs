//! The lab through the built binary: as root, and as a user without any right. Every test has a folder and a name of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;
use twill_e2e::{bin, eventually, installed};

/// Nobody in particular.
const NOBODY: &str = "65534";

/// A user's own place for labs; what was left in it when a test ends fails the test.
struct Lab {
    name: String,
    runtime: tempfile::TempDir,
    program: PathBuf,
    drop_root: bool,
}

impl Lab {
    /// As whoever runs the tests.
    fn new() -> Option<Lab> {
        Lab::make(false)
    }

    /// Without root, also when the tests have it.
    fn without_root() -> Option<Lab> {
        Lab::make(rustix::process::geteuid().is_root())
    }

    fn make(drop_root: bool) -> Option<Lab> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let runtime = tempfile::Builder::new().prefix("twl").tempdir_in("/tmp").unwrap();
        // A name that no other test has: `ip netns` names are the machine's.
        let name = format!("t{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut program = bin("twill");
        if drop_root {
            if !installed("setpriv") {
                return None;
            }
            // Where that user can read it.
            let copy = runtime.path().join("twill-copy");
            std::fs::copy(&program, &copy).unwrap();
            program = copy;
            let chown = Command::new("chown").args(["-R", &format!("{NOBODY}:{NOBODY}")]).arg(runtime.path()).status();
            assert!(chown.unwrap().success());
        }
        let lab = Lab { name, runtime, program, drop_root };
        if !rustix::process::geteuid().is_root() || drop_root {
            let proof = lab.wrapped("unshare").args(["--user", "--map-root-user", "--net", "true"]).output().unwrap();
            if !proof.status.success() {
                println!("SKIP: no root, and no user namespace with a network: {proof:?}");
                return None;
            }
        }
        Some(lab)
    }

    /// A program as this lab's user.
    fn wrapped(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = if self.drop_root {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        command.env("XDG_RUNTIME_DIR", self.runtime.path()).current_dir("/").stdin(Stdio::null());
        command
    }

    /// `twill lab WORDS`; the name is added where the command takes one.
    fn try_run(&self, line: &str) -> Output {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        let place = words.iter().position(|word| *word == "--").unwrap_or(words.len());
        let name = format!("--name={}", self.name);
        if !["list", ""].contains(&words.first().copied().unwrap_or_default()) {
            words.insert(place, &name);
        }
        self.wrapped(&self.program).arg("lab").args(words).output().unwrap()
    }

    fn run(&self, line: &str) -> String {
        let out = self.try_run(line);
        assert!(out.status.success(), "lab {line}: {} {}", text(&out.stdout), text(&out.stderr));
        text(&out.stdout)
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.run(&format!("{line} -o json"))).unwrap()
    }

    fn folder(&self) -> PathBuf {
        self.runtime.path().join("twill")
    }

    /// The supervisor's PID and start: a PID may be used again.
    fn supervisor(&self) -> u64 {
        self.json("status")["pid"].as_u64().unwrap()
    }

    /// Nothing in the folder, nothing for `ip netns`.
    fn assert_gone(&self) {
        let left: Vec<_> = std::fs::read_dir(self.folder()).into_iter().flatten().flatten().map(|e| e.path()).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        let prefix = format!("twill-{}-", self.name);
        let names = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
        let names: Vec<_> = names.map(|e| e.file_name()).filter(|n| n.to_string_lossy().starts_with(&prefix)).collect();
        assert!(names.is_empty(), "left behind: {names:?}");
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.try_run("down");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_scenario_bridge_learns_from_an_arp_request_at_every_port() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        let shown = lab.json("up --scenario bridge --containers 3");
        assert_eq!(shown["nodes"][0]["containers"][1]["address"], "172.17.0.4");
        let sections: Vec<(&str, String)> = shown["shown"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| {
                let lines: Vec<&str> = s["lines"].as_array().unwrap().iter().map(|l| l.as_str().unwrap()).collect();
                (s["title"].as_str().unwrap(), lines.join("\n"))
            })
            .collect();
        let of = |start: &str| &sections.iter().find(|(title, _)| title.starts_with(start)).unwrap().1;
        assert!(!of("CAM table of docker0 before").contains("learned"), "{sections:?}");
        assert_eq!(of("CAM table of docker0 after").matches("learned").count(), 2, "{sections:?}");
        let frames = of("container-3 pings container-1");
        assert!(frames.lines().next().unwrap().ends_with("passes veth3, veth2, veth1"), "{frames}");
        let reply = frames.lines().find(|l| l.contains("is at")).unwrap();
        assert!(reply.ends_with("passes veth3, veth1"), "{frames}");
        for table in ["ARP table of container-1", "ARP table of container-3"] {
            assert!(of(table).contains("172.17.0."), "{sections:?}");
        }
        let bridge = lab.run("exec node1 -- ip -br addr show docker0");
        assert!(bridge.contains("172.17.0.1/16"), "{bridge}");
    }
}

#[test]
fn a_stale_lab_does_not_hinder_a_new_one_and_a_living_one_does() {
    let Some(lab) = Lab::new() else { return };
    lab.run("up --scenario bridge");
    let refused = lab.try_run("up --scenario bridge -o json");
    let error: Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert_eq!(error["error"]["code"], "lab-exists");
    let pid = lab.supervisor();
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
    eventually("the supervisor is gone", || {
        if Path::new(&format!("/proc/{pid}/fd/0")).exists() { Err(()) } else { Ok(()) }
    });
    lab.run("up --scenario bridge");
    assert_eq!(lab.json("ping")["reachable"], 2);
}

#[test]
fn exec_enters_the_place_and_gives_its_exit_code() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        lab.run("up --scenario bridge");
        let shown = lab.run("exec container-2 -- ip -br addr show eth0");
        assert!(shown.contains("172.17.0.4/16"), "{shown}");
        assert_eq!(lab.try_run("exec node1 -- false").status.code(), Some(1));
        assert_eq!(lab.try_run("exec node1 -- no-such-program").status.code(), Some(127));
        let nowhere = lab.try_run("exec node7 -- true");
        assert_eq!(nowhere.status.code(), Some(1));
        assert!(text(&nowhere.stderr).contains("node1"), "{}", text(&nowhere.stderr));
    }
}

#[test]
fn root_sees_the_namespaces_with_ip_netns() {
    if !rustix::process::geteuid().is_root() {
        return println!("SKIP: names for `ip netns` need root");
    }
    let Some(lab) = Lab::new() else { return };
    lab.run("up --scenario bridge");
    for (place, address) in
        [("node1", "10.168.0.2/24"), ("container-1", "172.17.0.3/16"), ("underlay", "10.168.0.1/24")]
    {
        let name = format!("twill-{}-{place}", lab.name);
        let out = Command::new("ip").args(["netns", "exec", &name, "ip", "-br", "addr"]).output().unwrap();
        assert!(text(&out.stdout).contains(address), "{name}: {}", text(&out.stdout));
        assert!(std::fs::symlink_metadata(format!("/run/netns/{name}")).unwrap().is_symlink(), "never a bind mount");
    }
}

#[test]
fn forbidden_user_namespaces_are_one_clear_error() {
    let Some(lab) = Lab::without_root() else { return };
    // A user namespace in which no further one may be made, and no right is left to do without.
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-sys_admin \"$@\"";
    let out = lab
        .wrapped("unshare")
        .args(["--user", "--map-root-user", "sh", "-c", script, "sh"])
        .arg(&lab.program)
        .args(["lab", "-o", "json"])
        .output()
        .unwrap();
    let error: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out:?}"));
    assert_eq!(error["error"]["code"], "userns-forbidden", "{error}");
    assert!(error["error"]["hint"].as_str().unwrap().contains("user.max_user_namespaces"), "{error}");
    lab.assert_gone();
}

#[test]
fn what_is_asked_for_wrongly_is_refused_in_words() {
    let Some(lab) = Lab::new() else { return };
    for (line, exit, word) in [
        ("up --backend udp", 2, "backend-not-built"),
        ("up --nodes 17", 2, ""),
        ("up --containers 0", 2, ""),
        ("up --scenario bridge --nodes 2", 2, "bad-lab"),
        ("status", 1, "no-such-lab"),
        ("ping", 1, "no-such-lab"),
        ("down", 1, "no-such-lab"),
    ] {
        let out = lab.try_run(&format!("{line} -o json"));
        assert_eq!(out.status.code(), Some(exit), "{line}: {}", text(&out.stderr));
        assert!(text(&out.stdout).contains(word), "{line}: {}", text(&out.stdout));
    }
    lab.assert_gone();
}
