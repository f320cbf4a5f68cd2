//! The embedded store against Debian's etcd, and against a power cut; asked by a stock `etcdctl` only.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use twill_e2e::net::{Bed, Host};
use twill_e2e::{bin, eventually, installed};

/// A server of the test, ended by pid.
struct Server {
    child: Child,
    host: Host,
    /// Lease ids in the order they were granted: each server has its own.
    leases: Vec<i64>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(host: Host, mut command: Command) -> Server {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let server = Server { child, host, leases: Vec::new() };
        eventually("the store answers", || {
            let out = server.ctl(&["get", "x", "-w", "json"], "");
            if out.contains("header") { Ok(()) } else { Err(out) }
        });
        server
    }

    fn ours(bed: &Bed, data: &Path) -> Server {
        let host = bed.host("ours");
        let mut command = host.command(bin("twill"));
        command.args(["store", "serve", "--data"]).arg(data);
        Server::start(host, command)
    }

    fn etcds(bed: &Bed, data: &Path) -> Server {
        let host = bed.host("etcd");
        let mut command = host.command("etcd");
        command.arg("--data-dir").arg(data).env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH);
        Server::start(host, command)
    }

    /// stdout and stderr of an etcdctl.
    fn ctl(&self, words: &[&str], input: &str) -> String {
        let mut command = self.host.command("etcdctl");
        command.env("ETCDCTL_API", "3").args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let out = child.wait_with_output().unwrap();
        // etcdctl's own log lines carry times; the last line is the error.
        let error =
            String::from_utf8_lossy(&out.stderr).lines().filter(|l| l.starts_with("Error:")).collect::<String>();
        format!("{}{error}", String::from_utf8_lossy(&out.stdout))
    }

    /// One step of a sequence; the answer without what every server has of its own.
    fn step(&mut self, step: &Step) -> Vec<Value> {
        let text = match step {
            Step::Ctl(words, input) => {
                let words: Vec<String> = words.iter().map(|w| self.with_lease(w)).collect();
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                self.ctl(&[&words[..], &["-w", "json"]].concat(), input)
            }
            Step::Grant => {
                let text = self.ctl(&["lease", "grant", "3000", "-w", "json"], "");
                let answer: Value = serde_json::from_str(&text).unwrap();
                self.leases.push(answer["ID"].as_i64().unwrap());
                text
            }
        };
        self.normal(&text)
    }

    /// `@N` is this server's N-th lease, in hex as etcdctl takes it.
    fn with_lease(&self, word: &str) -> String {
        match word.split_once('@') {
            Some((before, n)) => {
                format!("{before}{:x}", self.leases.get(n.parse::<usize>().unwrap()).copied().unwrap_or(0x77))
            }
            None => word.to_owned(),
        }
    }

    fn normal(&self, text: &str) -> Vec<Value> {
        let lines = text.lines().map(|line| {
            let mut value = serde_json::from_str(line).unwrap_or_else(|_| Value::from(line));
            self.forget(&mut value);
            value
        });
        lines.collect()
    }

    /// Takes out identities and terms; lease ids become their number in order.
    fn forget(&self, value: &mut Value) {
        match value {
            Value::Object(fields) => {
                for key in ["cluster_id", "member_id", "raft_term"] {
                    fields.remove(key);
                }
                for (key, value) in fields.iter_mut() {
                    let id = value.as_i64().filter(|id| *id > 0 && (key == "lease" || key == "ID" || key == "id"));
                    match id {
                        Some(id) => {
                            *value = Value::from(format!("lease {:?}", self.leases.iter().position(|l| *l == id)))
                        }
                        None => self.forget(value),
                    }
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.forget(item)),
            Value::String(text) => {
                for (n, id) in self.leases.iter().enumerate() {
                    *text = text.replace(&format!("{id:x}"), &format!("lease {n}"));
                }
            }
            _ => {}
        }
    }
}

#[derive(Debug)]
enum Step {
    Ctl(Vec<String>, String),
    Grant,
}

/// Words separated by blanks, and what goes to stdin.
fn ctl(words: &str, input: &str) -> Step {
    Step::Ctl(words.split_whitespace().map(str::to_owned).collect(), input.to_owned())
}

/// An etcdctl that watches from before the sequence on; its events as they were told.
struct Watching(Child, std::sync::mpsc::Receiver<String>);

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.0), Signal::KILL);
        let _ = self.0.wait();
    }
}

impl Watching {
    fn start(server: &Server, words: &str) -> Watching {
        let mut command = server.host.command("etcdctl");
        command.arg("watch").args(words.split_whitespace()).args(["-w", "json"]).env("ETCDCTL_API", "3");
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (sender, lines) = std::sync::mpsc::channel();
        let out = std::io::BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || std::io::BufRead::lines(out).map_while(Result::ok).try_for_each(|l| sender.send(l)));
        Watching(child, lines)
    }

    /// All events up to that of the key `/k-last`.
    fn events(&self, server: &Server) -> Vec<Value> {
        let mut events = Vec::new();
        let last = |e: &Value| e["kv"]["key"] == "L2stbGFzdA==";
        while !events.last().is_some_and(last) {
            let line = self.1.recv_timeout(twill_e2e::PATIENCE).unwrap();
            let answers = server.normal(&line);
            events.extend(answers.iter().flat_map(|a| a["Events"].as_array().cloned().unwrap_or_default()));
        }
        events
    }
}

/// A repeatable stream of numbers.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Something that a client may do, over few keys so that it meets itself.
fn any_step(dice: &mut Dice, revision: i64) -> Step {
    let (key, other) = (format!("/k{}", dice.below(4)), format!("/k{}", dice.below(4)));
    let value = format!("v{}", dice.below(3));
    let rev = 1 + dice.below(revision as u64 + 2) as i64;
    match dice.below(28) {
        0..=3 => ctl(&format!("put {key} {value} --prev-kv"), ""),
        4 => ctl(&format!("put {key} {value} --lease=@{}", dice.below(3)), ""),
        5 => ctl(&format!("put {key} --ignore-value"), ""),
        6 => ctl(&format!("del {key} --prev-kv"), ""),
        7 => ctl(&format!("del {key} {other} --prev-kv"), ""),
        8 => ctl("get /k --prefix", ""),
        9 => ctl(&format!("get /k --prefix --rev={rev}"), ""),
        10 => ctl(&format!("get /k --prefix --sort-by=MODIFY --order=DESCEND --limit={}", dice.below(3)), ""),
        11 => ctl("get / --prefix --keys-only --count-only", ""),
        12 => Step::Grant,
        16 => ctl(&format!("get {key} --from-key --limit=2"), ""),
        17 => ctl(&format!("get {key} {other} --sort-by=VERSION --order=ASCEND"), ""),
        18 => ctl(&format!("get /k --prefix --sort-by=CREATE --order=DESCEND --rev={rev}"), ""),
        19 => ctl("get /k --prefix --sort-by=VALUE --keys-only", ""),
        20 => ctl(&format!("del {key} --from-key --prev-kv"), ""),
        21 => ctl(&format!("put {key} {value} --ignore-lease"), ""),
        22 => ctl(&format!("lease timetolive @{} --keys", dice.below(3)), ""),
        23 => ctl(&format!("lease keep-alive --once @{}", dice.below(3)), ""),
        13 => ctl(&format!("lease revoke @{}", dice.below(3)), ""),
        14 => ctl(
            "txn",
            &format!("mod(\"{key}\") > \"{rev}\"\n\nput {key} {value}\nget /k --prefix\n\ndel {other}\nget {key}\n\n"),
        ),
        // What is refused leaves nothing behind, and what is not taken is not asked whether it could be done.
        24 => ctl("txn", &format!("\nput {key} {value}\nput {other} --ignore-value\n\n\n")),
        25 => ctl(
            "txn",
            &format!(
                "ver(\"{key}\") > \"0\"\n\nput {key} {value}\n\nput {key} x --lease=77\nget {key} --rev=99999\n\n"
            ),
        ),
        26 => ctl("txn", &format!("\ndel {key} --from-key --prev-kv\nput {key} {value}\nget /k --prefix\n\n\n")),
        27 => ctl("txn", &format!("\nput {key} {value}\nget {other} --rev={}\n\n\n", revision + 1)),
        _ => ctl(
            "txn",
            &format!(
                "val(\"{key}\") = \"{value}\"\nver(\"{other}\") < \"3\"\n\nput {key} {value}\nput {key} twice\n\nput {other} no\n\n"
            ),
        ),
    }
}

#[test]
fn random_sequences_are_answered_as_debians_etcd_does() {
    if !installed("etcd") || !installed("etcdctl") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut ours = Server::ours(&bed, &dir.path().join("ours"));
    let mut etcds = Server::etcds(&bed, &dir.path().join("etcd"));
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut revision = 1;
    // From revision 1 on, so that it does not matter when the watcher has arrived.
    let live =
        ["--prefix /k --prev-kv --rev=1", "/k /k2 --rev=1"].map(|w| [&ours, &etcds].map(|s| Watching::start(s, w)));
    for n in 0..220 {
        let step = match n {
            90 => ctl(&format!("compaction {}", revision / 2), ""),
            91 => ctl(&format!("get /k0 --rev={}", revision / 2 - 1), ""),
            92 => ctl(&format!("compaction {}", revision / 3), ""),
            _ => any_step(&mut dice, revision),
        };
        let (got, want) = (ours.step(&step), etcds.step(&step));
        assert_eq!(got, want, "step {n}: {step:?}; left is ours");
        revision = want.iter().find_map(|v| v["header"]["revision"].as_i64()).unwrap_or(revision);
    }
    let last = ctl("put /k-last x", "");
    assert_eq!(ours.step(&last), etcds.step(&last));
    revision += 1;
    for [us, them] in &live {
        let want = them.events(&etcds);
        assert!(want.len() > 20, "{want:?}");
        assert_eq!(us.events(&ours), want, "told while it happened; left is ours");
    }
    drop(live);
    for words in ["lease list", "compaction 999999", "get /k0 --rev=1", "get /k0 --rev=999999", "lease revoke 77"] {
        let step = ctl(words, "");
        let (mut got, mut want) = (ours.step(&step), etcds.step(&step));
        // Which id is the smaller one is each server's own affair.
        for answer in got.iter_mut().chain(&mut want) {
            if let Some(leases) = answer.get_mut("leases").and_then(Value::as_array_mut) {
                leases.sort_by_key(ToString::to_string);
            }
        }
        assert_eq!(got, want, "{words}; left is ours");
    }
    for size in [1 << 20, (3 << 19) + 1000, 3 << 20] {
        let step = ctl("put /large", &"x".repeat(size));
        assert_eq!(ours.step(&step), etcds.step(&step), "a value of {size} bytes; left is ours");
    }
    // A watch from before the compaction is refused with the revision that it may begin at.
    let refused = |server: &Server| {
        let out = server
            .host
            .command("timeout")
            .args(["5", "etcdctl", "watch", "/k0", "--rev=1"])
            .env("ETCDCTL_API", "3")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (
            out.status.code(),
            String::from_utf8_lossy(&out.stderr)
                .lines()
                .filter(|l| l.contains("compact"))
                .map(str::to_owned)
                .collect::<Vec<_>>(),
        )
    };
    let want = refused(&etcds);
    assert!(!want.1.is_empty(), "{want:?}");
    assert_eq!(refused(&ours), want);
    // The whole history since the compaction, with revisions and order, and the same once more with what was before.
    for words in ["watch --prefix /k --prev-kv", "watch --prefix /k0", "watch /k1 /k3"] {
        let watch = |server: &Server| {
            let from = format!("--rev={}", revision / 2 + 1);
            let words: Vec<&str> = words.split_whitespace().chain([from.as_str(), "-w", "json"]).collect();
            let mut command = server.host.command("timeout");
            command.args(["1", "etcdctl"]).args(&words).env("ETCDCTL_API", "3").stdin(Stdio::null());
            let out = command.output().unwrap();
            let answers = server.normal(&String::from_utf8_lossy(&out.stdout));
            // How many events go into one answer is the server's own affair.
            answers.into_iter().flat_map(|a| a["Events"].as_array().cloned().unwrap_or_default()).collect::<Vec<_>>()
        };
        let want = watch(&etcds);
        assert!(!want.is_empty());
        assert_eq!(watch(&ours), want, "{words}; left is ours");
    }
}

#[test]
fn what_was_acknowledged_survives_a_kill() {
    if !installed("etcdctl") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut lease = String::new();
    let mut revision = Value::Null;
    for round in 0..3 {
        let server = Server::ours(&bed, dir.path());
        if round > 0 {
            let all: Value = serde_json::from_str(&server.ctl(&["get", "/", "--prefix", "-w", "json"], "")).unwrap();
            assert_eq!(all["header"]["revision"], revision, "revisions go on");
            assert_eq!(all["count"], round * 20 + 1, "every acknowledged put is there");
            let left = server.ctl(&["lease", "timetolive", &lease, "--keys"], "");
            assert!(left.contains("granted with TTL(600s)") && left.contains("/held"), "{left}");
        } else {
            let granted = server.ctl(&["lease", "grant", "600"], "");
            lease = granted.split_whitespace().nth(1).unwrap().to_owned();
            server.ctl(&["put", "/held", "x", &format!("--lease={lease}")], "");
        }
        for n in 0..20 {
            assert!(server.ctl(&["put", &format!("/{round}/{n}"), "x"], "").contains("OK"));
        }
        let last: Value = serde_json::from_str(&server.ctl(&["get", "/held", "-w", "json"], "")).unwrap();
        revision = last["header"]["revision"].clone();
        // Dropping kills with SIGKILL.
    }
}

#[test]
fn a_kill_under_the_writes_of_many_loses_nothing_that_was_acknowledged() {
    if !installed("etcdctl") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let acknowledged: Mutex<Vec<String>> = Mutex::default();
    for round in 0..4 {
        let server = Server::ours(&bed, dir.path());
        let all = server.ctl(&["get", "/", "--prefix", "--keys-only"], "");
        let there: BTreeSet<&str> = all.lines().collect();
        let before = {
            let acknowledged = acknowledged.lock().unwrap();
            let lost: Vec<&String> = acknowledged.iter().filter(|key| !there.contains(key.as_str())).collect();
            assert!(lost.is_empty(), "round {round}: of {} acknowledged puts are gone: {lost:?}", acknowledged.len());
            acknowledged.len()
        };
        let write = |writer: usize| {
            let put = |n: usize| {
                let key = format!("/{round}/{writer}/{n}");
                let words = ["put", &key, "x", "--command-timeout=1s", "--dial-timeout=1s"];
                server.ctl(&words, "").contains("OK").then_some(key)
            };
            (0..).map_while(put).for_each(|key| acknowledged.lock().unwrap().push(key));
        };
        std::thread::scope(|scope| {
            (0..6).for_each(|writer| {
                drop(scope.spawn({
                    let write = &write;
                    move || write(writer)
                }))
            });
            eventually("some puts are acknowledged", || {
                let count = acknowledged.lock().unwrap().len() - before;
                if count >= 20 + 7 * round { Ok(()) } else { Err(count) }
            });
            let _ = kill_process(Pid::from_child(&server.child), Signal::KILL);
        });
    }
}

#[test]
fn a_lease_that_ends_takes_its_keys_along_and_keepalive_keeps_them() {
    if !installed("etcdctl") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = Server::ours(&bed, dir.path());
    let granted = server.ctl(&["lease", "grant", "2"], "");
    let id = granted.split_whitespace().nth(1).unwrap().to_owned();
    server.ctl(&["put", "/short", "x", &format!("--lease={id}")], "");
    assert!(server.ctl(&["lease", "keep-alive", "--once", &id], "").contains("keepalived with TTL(2)"));
    eventually("the key goes with its lease", || {
        let left = server.ctl(&["get", "/short"], "");
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
    assert!(server.ctl(&["lease", "timetolive", &id], "").contains("already expired"));
}

#[test]
fn another_address_needs_insecure_and_ls_prints_the_sources_lines() {
    let Some(bed) = Bed::new() else { return };
    let host = bed.host("store");
    let out = host.command(bin("twill")).args(["store", "serve", "--listen", "0.0.0.0:2379", "-h"]).output().unwrap();
    assert!(out.status.success(), "--help works");
    let dir = tempfile::tempdir().unwrap();
    let mut command = host.command(bin("twill"));
    let out = command.args(["store", "serve", "--listen", "0.0.0.0:2379", "--data"]).arg(dir.path()).output().unwrap();
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && error.contains("error: ") && error.contains("--insecure"), "{error}");
    if !installed("etcdctl") {
        return;
    }
    let server = Server::ours(&bed, dir.path());
    for n in 1..=3 {
        server.ctl(&["put", &format!("/coreos.com/network/subnets/100.96.{n}.0-24"), "{}"], "");
    }
    let out = server.host.command(bin("twill")).args(["store", "ls", "/coreos.com/network/subnets"]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&out.stdout),
        "/coreos.com/network/subnets/100.96.1.0-24\n/coreos.com/network/subnets/100.96.2.0-24\n/coreos.com/network/subnets/100.96.3.0-24\n"
    );
}

#[test]
fn no_put_is_acknowledged_before_it_is_synced_and_no_answer_waits_for_an_acknowledgement() {
    if !installed("etcdctl") || !installed("strace") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let host = bed.host("ours");
    let trace = dir.path().join("trace");
    let mut command = host.command("strace");
    command.args([
        "-f",
        "-qq",
        "-s",
        "300",
        "-e",
        "trace=fdatasync,fsync,setsockopt,read,readv,recvfrom,write,writev,sendto,sendmsg",
        "-o",
    ]);
    // What is traced dies with its tracer.
    command
        .arg(&trace)
        .args(["setpriv", "--pdeathsig", "KILL"])
        .arg(bin("twill"))
        .args(["store", "serve", "--data"])
        .arg(dir.path().join("data"));
    let server = Server::start(host, command);
    for n in 0..5 {
        assert!(server.ctl(&["put", "/key", &format!("unmistakable-{n}")], "").contains("OK"));
    }
    let calls = std::fs::read_to_string(&trace).unwrap();
    let calls: Vec<&str> = calls.lines().collect();
    for n in 0..5 {
        // The request comes in; the first larger frames that go out on that connection are the answer.
        let asked = calls.iter().position(|c| c.contains(&format!("unmistakable-{n}")) && is_in(c)).unwrap();
        let fd = calls[asked].split(['(', ',']).nth(1).unwrap();
        // Else the frames after an answer's first ones wait for the client's delayed acknowledgement.
        let at_once = format!("setsockopt({}, SOL_TCP, TCP_NODELAY, [1], 4) = 0", fd.trim());
        assert!(calls[..asked].iter().any(|c| c.ends_with(&at_once)), "{at_once}: {:#?}", &calls[..asked]);
        let answers = |c: &&str| is_out(c) && c.split(['(', ',']).nth(1) == Some(fd) && result(c) > 40;
        let answered = asked + calls[asked..].iter().position(answers).unwrap();
        let synced = |c: &&str| {
            (c.contains("fdatasync(") || c.contains("fsync(") || c.contains("sync resumed")) && c.ends_with("= 0")
        };
        assert!(calls[asked..answered].iter().any(synced), "{:#?}", &calls[asked..=answered]);
    }
}

/// What a call returned.
fn result(call: &str) -> i64 {
    call.rsplit("= ").next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn is_in(call: &str) -> bool {
    ["read", "recvfrom"].iter().any(|name| call.contains(name))
}

fn is_out(call: &str) -> bool {
    ["write", "send"].iter().any(|name| call.contains(name))
}

#[test]
fn a_store_whose_disk_was_full_serves_again_and_has_all_that_it_acknowledged() {
    if !installed("etcdctl") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (disk, room) = (dir.path().join("disk"), dir.path().join("room"));
    std::fs::create_dir(&disk).unwrap();
    let host = bed.host("store");
    let mut command = host.command("unshare");
    // Its mounts are nobody else's: a child of the shell that becomes the store makes room again.
    let serve = "mount -t tmpfs -o size=6m none \"$1\" && head -c 2M /dev/zero > \"$1/filler\" || exit
        (while kill -0 $$ && [ ! -e \"$2\" ]; do sleep 0.1; done; rm \"$1/filler\") &
        exec \"$0\" store serve --data \"$1/store\"";
    command.args(["--mount", "sh", "-c", serve]).arg(bin("twill")).args([&disk, &room]);
    let server = Server::start(host, command);
    let watching = Watching::start(&server, "--prefix /k --rev=1");
    let value = "x".repeat(200_000);
    let put = |n: usize| server.ctl(&["put", &format!("/k{n}"), "--command-timeout=2s"], &value);
    let full = (0..60).find(|n| put(*n) != "OK\n").expect("4 MiB hold no 12 MB");
    assert!(full > 2, "{full} fitted");
    std::fs::write(room, "").unwrap();
    eventually("the store takes writes again", || {
        let said = server.ctl(&["put", "/k-last", "x", "--command-timeout=2s"], "");
        if said == "OK\n" { Ok(()) } else { Err(said) }
    });
    let keys = server.ctl(&["get", "/k", "--prefix", "--keys-only"], "");
    (0..full).for_each(|n| assert!(keys.lines().any(|key| key == format!("/k{n}")), "/k{n} was acknowledged: {keys}"));
    let told = watching.events(&server);
    assert!(told.len() > full, "a watcher from before is told on: {} events", told.len());
}

#[test]
fn a_store_that_is_stopped_ends_although_clients_watch() {
    if !installed("etcdctl") {
        return;
    }
    let Some(bed) = Bed::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::ours(&bed, dir.path());
    let watching = Watching::start(&server, "--prefix /k --rev=1");
    assert_eq!(server.ctl(&["put", "/k-last", "x"], ""), "OK\n");
    watching.events(&server);
    kill_process(Pid::from_child(&server.child), Signal::TERM).unwrap();
    let ended = eventually("the store ends", || server.child.try_wait().unwrap().ok_or("it still runs"));
    assert!(ended.success(), "{ended}");
}

#[test]
fn data_that_cannot_be_opened_is_told_from_data_that_another_store_holds() {
    let Some(bed) = Bed::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("store.redb");
    std::fs::write(&file, "no database").unwrap();
    let host = bed.host("store");
    let serve = || {
        let mut command = host.command(bin("twill"));
        command.args(["store", "serve", "--listen", "127.0.0.1:2380", "--data"]).arg(dir.path());
        String::from_utf8(command.output().unwrap().stderr).unwrap()
    };
    let broken = serve();
    assert!(broken.contains("error: open the store's data") && broken.contains("broken"), "{broken}");
    assert_eq!(std::fs::read(&file).unwrap(), b"no database", "and it is left as it is");
    if !installed("etcdctl") {
        return;
    }
    std::fs::remove_file(&file).unwrap();
    let first = bed.host("first");
    let mut command = first.command(bin("twill"));
    command.args(["store", "serve", "--data"]).arg(dir.path());
    let _first = Server::start(first, command);
    let held = serve();
    assert!(held.contains("another store runs on") && !held.contains("broken"), "{held}");
}
