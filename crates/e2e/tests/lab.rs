//! The lab through the built binary: as root, and as a user without any right. Every test has a folder and a name of its own.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;
use twill_e2e::{bin, eventually, installed};

/// Nobody in particular.
const NOBODY: &str = "65534";

/// A user's own place for labs; what was left in it when a test ends fails the test.
struct Lab {
    name: String,
    runtime: Rc<tempfile::TempDir>,
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
        let runtime = tempfile::Builder::new().prefix("twl").tempdir_in("/tmp").map(Rc::new).unwrap();
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

    /// The same user and folder, for a lab whose name goes on after this one's.
    fn beside(&self, end: &str) -> Lab {
        let (runtime, program) = (Rc::clone(&self.runtime), self.program.clone());
        Lab { name: format!("{}{end}", self.name), runtime, program, drop_root: self.drop_root }
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

    /// The first packet that passes a device once `line` runs.
    fn capture_during(&self, place: &str, device: &str, line: &str) -> Value {
        let mut command = self.wrapped(&self.program);
        command.args(["lab", "capture", &format!("--name={}", self.name), place, device, "--count=1", "-o", "json"]);
        let mut capture = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(capture.stderr.take().unwrap()).lines();
        assert!(said.any(|line| line.unwrap().contains("listening on")));
        self.run(line);
        serde_json::from_slice(&capture.wait_with_output().unwrap().stdout).unwrap()
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

/// Processes whose command line names this folder or lab.
fn processes(mark: &str) -> Vec<String> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = all.filter_map(|entry| {
        entry.file_name().to_str()?.parse::<u32>().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some(text(&line).replace('\0', " "))
    });
    lines.filter(|line| line.contains(mark)).collect()
}

#[test]
fn the_whole_lab_shows_a_matrix_and_a_path_and_leaves_nothing_behind() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        let out = lab.wrapped(&lab.program).arg("lab").output().unwrap();
        let (said, shown) = (text(&out.stderr), text(&out.stdout));
        assert!(out.status.success(), "{shown}\n{said}");
        assert!(said.contains("2 hosts") && said.contains("2 agents") && said.contains("2 containers"), "{said}");
        assert!(shown.contains("2 of 2 pairs reach each other"), "{shown}");
        assert!(shown.contains("flannel.1") && shown.contains("it arrives"), "{shown}");
        lab.assert_gone();
        eventually("no process is left", || {
            let left = processes(lab.runtime.path().to_str().unwrap());
            if left.is_empty() { Ok(()) } else { Err(left) }
        });
    }
}

#[test]
fn up_and_ping_have_the_documented_json() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        let up = lab.json("up --nodes 3 --containers 2");
        assert_eq!((&up["schema"], &up["name"]), (&1.into(), &lab.name.as_str().into()));
        let nodes = up["nodes"].as_array().unwrap();
        assert_eq!(nodes.len(), 3);
        for node in nodes {
            for field in ["name", "address", "subnet", "netns"] {
                assert!(node[field].is_string(), "{node}");
            }
            for container in node["containers"].as_array().unwrap() {
                for field in ["name", "address", "netns"] {
                    assert!(container[field].is_string(), "{container}");
                }
            }
        }
        let ping = lab.json("ping");
        assert_eq!(
            (&ping["pairs"], &ping["reachable"], &ping["failed"]),
            (&30.into(), &30.into(), &serde_json::json!([]))
        );
        assert!(ping["rtt_us"]["p50"].as_u64() > Some(0) && ping["rtt_us"]["p99"].is_u64());
        let listed = lab.json("list");
        assert_eq!(listed["labs"][0]["name"], lab.name.as_str());
        lab.run("down");
        lab.assert_gone();
    }
}

#[test]
fn the_scenario_vxlan_has_the_tables_of_the_source() {
    let Some(lab) = Lab::new() else { return };
    let shown = lab.run("up --scenario vxlan");
    let line = |needle: &str| shown.lines().any(|l| l.split_whitespace().collect::<Vec<_>>().join(" ") == needle);
    assert!(line("10.1.16.0 10.1.16.0 255.255.255.0 UG 0 0 0 flannel.1"), "{shown}");
    assert!(shown.contains("/coreos.com/network/subnets/10.1.15.0-24"), "{shown}");
    assert!(shown.contains("0 of them broadcast, 0 of them ARP"), "{shown}");
    for layer in ["outer Ethernet", "outer IPv4", "outer UDP", "VXLAN", "inner Ethernet", "inner IPv4"] {
        assert!(shown.contains(layer), "{layer} is missing: {shown}");
    }
    for vni in ["VNI 2: 1 arrived at eth0, 0 came out", "VNI 1: 1 arrived at eth0, 1 came out"] {
        assert!(shown.contains(vni), "{vni}: {shown}");
    }
    let neigh = lab.run("exec node1 -- ip neigh show dev flannel.1");
    assert!(neigh.contains("10.1.16.0 lladdr") && neigh.contains("PERMANENT"), "{neigh}");
    let mac = neigh.split_whitespace().nth(2).unwrap();
    let fdb = lab.run("exec node1 -- bridge fdb show dev flannel.1");
    assert!(fdb.contains(&format!("{mac} dst 10.168.0.3 self permanent")), "{fdb}");
    let routes = lab.run("exec node1 -- ip route");
    assert!(routes.contains("10.1.16.0/24 via 10.1.16.0 dev flannel.1 proto 116 onlink"), "{routes}");
    assert!(routes.contains("default via 10.168.0.1 dev eth0"), "{routes}");
    let up = lab.json("status");
    assert_eq!(up["nodes"][1]["containers"][0]["address"], "10.1.16.3");
    assert_eq!(up["nodes"][0]["containers"][0]["address"], "10.1.15.2");
}

#[test]
fn the_scenario_udp_has_the_tables_of_the_source() {
    // A distribution lets everybody open it; a machine that does not lets nobody but root have a TUN device.
    let mode = std::fs::metadata("/dev/net/tun").map_or(0, |about| about.permissions().mode());
    let everybody = mode & 0o006 == 0o006;
    if !everybody {
        println!("SKIP: no TUN device may be made without root: the mode of /dev/net/tun is {:o}", mode & 0o777);
    }
    let root = rustix::process::geteuid().is_root();
    let labs = [(root || everybody).then(Lab::new), everybody.then(Lab::without_root)];
    for lab in labs.into_iter().flatten().flatten() {
        let shown = lab.run("up --scenario udp");
        let routes = lab.run("exec node1 -- ip route");
        // Beside the source's routes: where packets end while docker0 is away.
        let mut routes: Vec<&str> =
            routes.lines().map(str::trim).filter(|line| !line.starts_with("blackhole")).collect();
        routes.sort_unstable();
        let source = [
            "10.168.0.0/24 dev eth0 proto kernel scope link src 10.168.0.2",
            "100.96.0.0/16 dev flannel0 proto kernel scope link src 100.96.1.0",
            "100.96.1.0/24 dev docker0 proto kernel scope link src 100.96.1.1",
            "default via 10.168.0.1 dev eth0",
        ];
        assert_eq!(routes, source);
        for route in source {
            assert!(shown.contains(route), "{route}: {shown}");
        }
        for number in 1..=3 {
            assert!(shown.contains(&format!("/coreos.com/network/subnets/100.96.{number}.0-24")), "{shown}");
            let words = format!("100.96.{number}.0-24 10.168.0.{}", number + 1);
            let line = |l: &str| l.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
            assert!(shown.lines().any(|l| line(l) == words), "{words}: {shown}");
        }
        // The packet on the wire: the inner IP packet right behind the UDP header.
        let layers = [
            "outer Ethernet",
            "outer IPv4  10.168.0.2 > 10.168.0.3",
            "outer UDP",
            "inner IPv4  100.96.1.2 > 100.96.2.3",
        ];
        for layer in layers {
            assert!(shown.contains(layer), "{layer}: {shown}");
        }
        // In the order in which it passed them, there and back.
        let passed = shown.lines().map(str::trim).filter(|line| line.contains("ICMP echo re"));
        let passed: Vec<_> = passed.filter_map(|line| line.split_whitespace().next()).collect();
        let order = ["docker0", "flannel0", "eth0", "eth0", "flannel0", "docker0"];
        assert!(passed.windows(6).any(|six| six == order), "{shown}");
        // The crossings of both paths, as they were measured: for each packet and each megabyte.
        let row = |what: &str| -> Vec<f64> {
            let line = shown.lines().find_map(|line| line.trim_start().strip_prefix(what));
            line.unwrap_or_else(|| panic!("{what}: {shown}"))
                .split_whitespace()
                .filter_map(|n| n.parse().ok())
                .collect()
        };
        let bulk = (32 << 20) as f64 / 1e6;
        for what in ["kernel → daemon", "daemon → kernel"] {
            let [source, packet, megabyte, vxlan_packet, vxlan_megabyte] = row(what)[..] else { panic!("{shown}") };
            assert!(source == 1.0 && packet > 0.01 && megabyte * bulk > 100.0, "{shown}");
            assert!(vxlan_packet < packet / 10.0 && vxlan_megabyte < megabyte / 10.0, "{shown}");
        }
        let [source, packet, megabyte, vxlan_packet, vxlan] = row("application → kernel")[..] else {
            panic!("{shown}")
        };
        assert!(source == 1.0 && megabyte > 5.0 && vxlan > 5.0, "{shown}");
        // A packet is one on the wire for both: about as many of them are a megabyte.
        let (udp, vxlan) = (megabyte / packet, vxlan / vxlan_packet);
        assert!(udp < 2.0 * vxlan && vxlan < 2.0 * udp, "{udp} and {vxlan} packets in a megabyte: {shown}");
        let links = lab.run("exec node1 -- ip -br link");
        assert!(!links.contains("beside0"), "{links}");
        let status = lab.json("status");
        assert_eq!(status["nodes"][1]["containers"][0]["address"], "100.96.2.3");
        assert_eq!(lab.json("ping")["reachable"], 6);
        // A capture takes the datagram apart, and a device without frames as well.
        for (device, layers) in
            [("eth0", vec!["Ethernet", "IPv4", "UDP", "IPv4", "ICMP"]), ("flannel0", vec!["IPv4", "ICMP"])]
        {
            // The agent's talk with the store passes there as well.
            eventually(&format!("a ping is seen on {device}"), || {
                let seen = lab.capture_during("node1", device, "exec container-1 -- ping -c 3 -W 5 100.96.2.3");
                let names = seen["layers"].as_array().unwrap().iter().map(|l| l["layer"].as_str().unwrap());
                if names.take(layers.len()).eq(layers.iter().copied()) { Ok(()) } else { Err(seen) }
            });
        }
        the_supervisor_keeps_what_an_agent_leaves(&lab);
        assert_eq!(lab.json("ping")["reachable"], 6);
        assert!(lab.run("node add").contains("node4"));
        assert_eq!(lab.json("ping")["reachable"], 12);
        lab.run("down");
        lab.assert_gone();
    }
}

/// TUN and socket outlive the agent's restart and its crash in the lab's own descriptor store; what passes is late, and not lost.
fn the_supervisor_keeps_what_an_agent_leaves(lab: &Lab) {
    let kept = || {
        let socket = lab.run("exec node1 -- ss -Hnuae");
        let socket = socket.lines().find(|line| line.contains("10.168.0.2:8285")).map(str::to_owned);
        let inode = socket.and_then(|line| Some(line.split("ino:").nth(1)?.split_whitespace().next()?.to_owned()));
        let link = lab.run("exec node1 -- ip -o link show flannel0");
        (link.split(':').next().unwrap().to_owned(), inode)
    };
    let before = kept();
    assert!(before.1.is_some(), "{before:?}");
    let mut command = lab.wrapped(&lab.program);
    command.args(["lab", "exec", &format!("--name={}", lab.name), "container-1", "--", "ping", "-n", "-i", "0.01"]);
    let mut ping = command.args(["-c", "200", "100.96.2.3"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(ping.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(said.any(|line| line.contains("icmp_seq=")), "packets pass");
    for acts in [&["agent restart node1"][..], &["agent kill node1", "agent start node1"]] {
        acts.iter().for_each(|act| drop(lab.run(act)));
        assert_eq!(kept(), before, "{acts:?}: the same device, the same socket");
    }
    let counted = said.find(|line| line.contains("packets transmitted")).unwrap();
    ping.wait().unwrap();
    let number = |at: usize| counted.split_whitespace().nth(at).unwrap().parse::<u64>().unwrap();
    assert!(number(0) - number(3) <= 5, "of 10 ms each: {counted}");
    // Stopped for good it leaves nothing open, as with a service manager.
    lab.run("agent stop node1");
    assert_eq!(kept().1, None);
    lab.run("agent start node1");
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
        assert_eq!(of("CAM table of docker0 after").matches("learned").count(), 2, "{sections:?}");
        let frames = of("container-3 pings container-1");
        let asked = frames.lines().next().unwrap();
        assert!(asked.starts_with("ARP who has 172.17.0.3? tell 172.17.0.5"), "{frames}");
        assert!(asked.ends_with("to ff:ff:ff:ff:ff:ff  passes veth3, veth2, veth1, docker0"), "{frames}");
        assert!(!of("CAM table of docker0 before").contains("learned"), "{sections:?}");
        let reply = frames.lines().find(|l| l.contains("is at")).unwrap();
        assert!(reply.ends_with("passes veth3, veth1"), "{frames}");
        for pinged in ["ICMP echo request", "ICMP echo reply"] {
            let line = frames.lines().find(|l| l.starts_with(pinged)).unwrap();
            assert!(line.ends_with("passes veth3, veth1"), "{frames}");
        }
        // What the tables say is what the containers' own MACs are, each at its own port.
        let cam = of("CAM table of docker0 after");
        for (own, port, other, address) in [
            ("container-1", "veth1", "container-3", "172.17.0.3"),
            ("container-3", "veth3", "container-1", "172.17.0.5"),
        ] {
            let link = lab.run(&format!("exec {own} -- ip -br link show eth0"));
            let mac = link.split_whitespace().nth(2).unwrap();
            let has =
                |text: &str, words: &[&str]| text.lines().any(|line| words.iter().all(|word| line.contains(word)));
            assert!(has(cam, &[port, mac, "learned"]), "{sections:?}");
            assert!(has(of(&format!("ARP table of {other}")), &[address, mac, "eth0"]), "{sections:?}");
        }
        let bridge = lab.run("exec node1 -- ip -br addr show docker0");
        assert!(bridge.contains("172.17.0.1/16"), "{bridge}");
    }
}

#[test]
fn a_killed_supervisor_takes_everything_along_and_down_removes_the_rest() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        lab.run("up");
        let mut inside = lab.wrapped(&lab.program);
        inside.args(["lab", "exec", &format!("--name={}", lab.name), "container-1", "--", "sleep", "1000"]);
        let mut inside = inside.spawn().unwrap();
        let pid = lab.supervisor();
        let agents = || processes(&format!("{}/twill/lab-{}/", lab.runtime.path().display(), lab.name));
        assert!(agents().len() >= 3, "store and agents: {:?}", agents());
        let killed = Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap();
        assert!(killed.success());
        eventually("store and agents are gone", || if agents().is_empty() { Ok(()) } else { Err(agents()) });
        assert!(!inside.wait().unwrap().success(), "the command in the lab has ended with it");
        assert_eq!(lab.json("list")["labs"][0]["state"], "killed");
        lab.run("down");
        lab.assert_gone();
        assert!(!lab.try_run("down").status.success(), "there is nothing any more");
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
fn a_hosts_agent_is_found_in_exec_without_a_flag() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        lab.run("up");
        let twill = lab.program.file_name().unwrap().to_str().unwrap();
        let json = |words: &str| lab.json(&format!("exec node1 -- {twill} {words}"));
        let status = json("status");
        assert_eq!((&status["state"], &status["subnets"][0]), (&"running".into(), &"10.1.15.0/24".into()), "{status}");
        assert_eq!(json("peers --probe")["peers"][0]["lease"], "10.1.16.0-24");
        assert_eq!(json("leases")["leases"].as_array().unwrap().len(), 2);
        assert_eq!(json("plan")["steps"], serde_json::json!([]), "it plans as the agent does");
        assert_eq!(json("agent --check")["findings"], serde_json::json!([]));
        let held = json("ipam list")["addresses"].take();
        assert_eq!((&held[0]["address"], &held[0]["state"]), (&"10.1.15.2".into(), &"attached".into()), "{held}");
        let keys = lab.run(&format!("exec node2 -- {twill} store ls /coreos.com/network/subnets"));
        assert!(keys.contains("10.1.15.0-24"), "{keys}");
        lab.run(&format!("exec node2 -- {twill} leave --force"));
        assert_eq!(json("leases")["leases"].as_array().unwrap().len(), 1);
        let nobody = lab.try_run(&format!("exec container-1 -- {twill} status"));
        assert!(text(&nobody.stderr).contains("no agent listens"), "{}", text(&nobody.stderr));
    }
}

#[test]
fn a_killed_lab_is_named_with_the_way_out_and_leaves_no_name() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        let other = lab.beside("-b");
        lab.run("up --nodes 3");
        other.run("up --scenario bridge");
        let pid = lab.supervisor();
        assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
        eventually("the supervisor is gone", || {
            if Path::new(&format!("/proc/{pid}/fd/0")).exists() { Err(()) } else { Ok(()) }
        });
        let down = format!("`twill lab down --name {}` removes what is left", lab.name);
        let listed = lab.run("list");
        let line = |name: &str| listed.lines().find(|l| l.split_whitespace().next() == Some(name)).unwrap();
        assert!(line(&lab.name).contains(&down) && line(&other.name).contains("running"), "{listed}");
        for words in ["ping", "explain node1 node2", "status", "node add", "exec node1 -- true", "capture node1 eth0"] {
            let out = lab.try_run(words);
            let said = text(&out.stderr);
            assert_eq!((out.status.code(), said.matches("error: ").count()), (Some(1), 1), "{words}: {said}");
            assert!(said.contains("its supervisor was killed") && said.contains(&down), "{words}: {said}");
        }
        // The next one of this name has fewer places.
        lab.run("up --scenario bridge");
        let prefix = format!("twill-{}-", lab.name);
        let names = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
        let names = names.filter_map(|e| Some(e.file_name().to_str()?.strip_prefix(&prefix)?.to_owned()));
        let mut names: Vec<String> = names.filter(|name| !name.starts_with("b-")).collect();
        names.sort();
        let root = rustix::process::geteuid().is_root() && !lab.drop_root;
        let left = if root { vec!["container-1", "container-2", "node1", "underlay"] } else { vec![] };
        assert_eq!(names, left);
        one_goes_and_the_other_stands(&lab, &other);
    }
}

#[test]
fn the_way_to_an_address_that_no_place_has_is_explained_as_far_as_it_goes() {
    let Some(lab) = Lab::new() else { return };
    lab.run("up");
    let explained = |from: &str, to: &str| {
        let out = lab.try_run(&format!("explain {from} {to}"));
        assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
        text(&out.stdout)
    };
    let out = explained("container-1", "192.0.2.9");
    assert!(out.contains("default via 10.168.0.1 dev eth0") && out.contains("it stops at underlay"), "{out}");
    assert!(out.contains("container-1 (10.1.15.2) → outside (192.0.2.9)") && !out.contains("outside (192.0.2.9) →"));
    let out = explained("node1", "10.168.0.77");
    assert!(out.contains("on the network of eth0 itself") && out.contains("[nobody-answers]"), "{out}");
    lab.run("exec node1 -- ip route add blackhole 192.0.2.0/24");
    let out = explained("container-1", "192.0.2.9");
    assert!(out.contains("it stops at node1") && out.contains("blackhole 192.0.2.0/24"), "{out}");
    lab.run("exec node1 -- ip route del default");
    let out = explained("node1", "198.51.100.1");
    assert!(out.contains("no route covers 198.51.100.1"), "{out}");
    let json: Value = serde_json::from_slice(&lab.try_run("explain node1 198.51.100.1 -o json").stdout).unwrap();
    assert_eq!((&json["back"], &json["there"]["to"]["place"]), (&Value::Null, &"outside".into()), "{json}");
    assert!(text(&lab.try_run("explain nobody node1").stderr).contains("neither a place"));
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
fn each_entry_altered_while_the_agent_is_held_changes_the_explanation() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        lab.run("up");
        let before = lab.run("explain container-1 container-2");
        assert!(before.contains("10.168.0.3") && before.contains("it arrives"), "{before}");
        assert_eq!(lab.json("agent hold node1")["nodes"][0]["agent"], "held");
        let fdb = lab.run("exec node1 -- bridge fdb show dev flannel.1");
        let mac = fdb.lines().find(|l| l.contains("10.168.0.3")).unwrap().split_whitespace().next().unwrap().to_owned();
        let route = "10.1.16.0/24 via 10.1.16.0 dev flannel.1 proto 116 onlink";
        let refuses = |kind: &str, says: &'static str| {
            let [fault, mend] = ["add", "del"].map(|verb| format!("ip route {verb} {kind} 10.1.16.3"));
            (fault, mend, "node1", "route-refuses", says)
        };
        // What is typed on node1 and where the path then ends, the last one last: it stays for the agent.
        for (fault, mend, place, code, says) in [
            refuses("unreachable", "a route of the type unreachable covers it (errno 113)"),
            refuses("prohibit", "a route of the type prohibit covers it (errno 13)"),
            refuses("blackhole", "a route of the type blackhole covers it (errno 22)"),
            // The default route takes it to the underlay, which is no router.
            (
                format!("ip route del {route}"),
                format!("ip route add {route}"),
                "underlay",
                "forwarding-off",
                "10.1.16.3",
            ),
            (
                "ip neigh del 10.1.16.0 dev flannel.1".to_owned(),
                format!("ip neigh add 10.1.16.0 lladdr {mac} dev flannel.1 nud permanent"),
                "node1",
                "no-neighbour",
                "10.1.16.0",
            ),
            (
                format!("bridge fdb del {mac} dev flannel.1 dst 10.168.0.3 self"),
                format!("bridge fdb add {mac} dev flannel.1 dst 10.168.0.3 self permanent"),
                "node1",
                "no-fdb-entry",
                &mac,
            ),
            (
                format!("bridge fdb replace {mac} dev flannel.1 dst 10.168.0.77 self permanent"),
                String::new(),
                "node1",
                "nobody-answers",
                "10.168.0.77",
            ),
        ] {
            lab.run(&format!("exec node1 -- {fault}"));
            let held = lab.try_run("explain container-1 container-2 -o json");
            assert_eq!(held.status.code(), Some(3), "{fault}: {}", text(&held.stdout));
            let there = serde_json::from_slice::<Value>(&held.stdout).unwrap()["there"]["verdict"].clone();
            assert_eq!((&there["code"], &there["place"]), (&code.into(), &place.into()), "{fault}: {there}");
            let spoken = text(&lab.try_run("explain container-1 container-2").stdout);
            let end = spoken.lines().find(|line| line.contains(&format!("it stops at {place}"))).unwrap();
            assert!(end.contains(says) && end.contains(code), "{fault}: {spoken}");
            if !mend.is_empty() {
                lab.run(&format!("exec node1 -- {mend}"));
                assert!(lab.run("explain container-1 container-2").contains("it arrives"), "{mend}");
            }
        }
        agent_held_detours(&lab, &mac);
        lab.run(&format!("exec node1 -- bridge fdb replace {mac} dev flannel.1 dst 10.168.0.77 self permanent"));
        let failed = lab.try_run("ping -o json");
        assert_eq!(failed.status.code(), Some(3));
        let failed: Value = serde_json::from_slice(&failed.stdout).unwrap();
        assert_eq!((&failed["reachable"], failed["failed"].as_array().unwrap().len()), (&0.into(), 2));
        lab.run("agent start node1");
        eventually("the released agent repairs it", || {
            let shown = lab.run("exec node1 -- bridge fdb show dev flannel.1");
            if shown.contains(&format!("{mac} dst 10.168.0.3 self permanent")) { Ok(()) } else { Err(shown) }
        });
        assert_eq!(lab.json("ping")["reachable"], 2);
    }
}

/// What an entry says for itself alone, the tunnel's MTU, and a route with several next hops.
fn agent_held_detours(lab: &Lab, mac: &str) {
    let explained = || text(&lab.try_run("explain container-1 container-2").stdout);
    for (own, code) in [("port 999", "port-mismatch"), ("vni 77", "vni-mismatch"), ("via lo", "route-refuses")] {
        lab.run(&format!("exec node1 -- bridge fdb replace {mac} dev flannel.1 dst 10.168.0.3 {own} self permanent"));
        let spoken = explained();
        assert!(spoken.contains(code) && spoken.contains(&format!("dst 10.168.0.3 {own} self")), "{own}: {spoken}");
        lab.run(&format!("exec node1 -- bridge fdb del {mac} dev flannel.1"));
    }
    lab.run(&format!("exec node1 -- bridge fdb append {mac} dev flannel.1 dst 10.168.0.3 self permanent"));
    assert!(explained().contains("it arrives") && !explained().contains("MTU"));
    for (device, mtu, usual, says) in [
        ("flannel.1", 1300, 1450, "MTU 1300 of flannel.1: longer packets"),
        ("eth0", 1460, 1500, "the tunnel's 1450 and 50 around it"),
    ] {
        lab.run(&format!("exec node1 -- ip link set {device} mtu {mtu}"));
        assert!(explained().contains(says), "{device}: {}", explained());
        lab.run(&format!("exec node1 -- ip link set {device} mtu {usual}"));
    }
    lab.run("exec node1 -- ip link set flannel.1 protodown on");
    assert!(explained().contains("flannel.1 is held without carrier (protodown) [link-down]"), "{}", explained());
    // The kernel takes its time to put a device without carrier out of use (net/core/link_watch.c).
    eventually("nothing is sent any more", || {
        let code = lab.try_run("ping").status.code();
        if code == Some(3) { Ok(()) } else { Err(code) }
    });
    lab.run("exec node1 -- ip link set flannel.1 protodown off");
    let ours = "nexthop via 10.1.16.0 dev flannel.1 onlink";
    lab.run(&format!("exec node1 -- ip route replace 10.1.16.0/24 {ours} nexthop via 10.168.0.3 dev eth0"));
    let spoken = explained();
    assert!(
        spoken.contains("or by one of 1 more next hops") && spoken.contains("or: 10.1.16.0/24 via 10.168.0.3 dev eth0"),
        "{spoken}"
    );
    lab.run("exec node1 -- ip route replace 10.1.16.0/24 via 10.1.16.0 dev flannel.1 proto 116 onlink");
}

#[test]
fn no_broadcast_and_no_arp_crosses_the_tunnel_while_both_containers_talk() {
    if !installed("tcpdump") {
        return;
    }
    let Some(lab) = Lab::new() else { return };
    lab.run("up --scenario vxlan");
    let mut command = lab.wrapped(&lab.program);
    let name = format!("--name={}", lab.name);
    command.args(["lab", "exec", &name, "node1", "--", "tcpdump", "-nn", "-e", "-l", "-c", "20", "-i", "flannel.1"]);
    // The kernel's own IPv6 group reports enter the device too, and find no host: the last assertion.
    let mut child = command.arg("not ip6").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut lines = String::new();
    while !lines.contains("listening on") {
        if std::io::BufRead::read_line(&mut said, &mut lines).unwrap() == 0 {
            let no_user = lines.contains("Operation not permitted") && !rustix::process::geteuid().is_root();
            let ended = child.wait().unwrap();
            assert!(no_user, "tcpdump has ended: {ended}, {lines}");
            return println!("SKIP: tcpdump cannot become its own user in a user namespace: {}", lines.trim());
        }
    }
    eventually("twenty frames have crossed", || {
        // Both ask for MACs again and again: the question must stay on their own host.
        for container in ["container-1", "container-2"] {
            lab.run(&format!("exec {container} -- ip neigh flush all"));
        }
        lab.run("ping");
        if child.try_wait().unwrap().is_some() { Ok(()) } else { Err("not yet") }
    });
    let shown = text(&child.wait_with_output().unwrap().stdout);
    assert_eq!(shown.matches("ICMP echo").count(), 20, "{shown}");
    assert!(!shown.contains("ARP") && !shown.contains("ff:ff:ff:ff:ff:ff"), "{shown}");
    let fdb = lab.run("exec node1 -- bridge fdb show dev flannel.1");
    assert!(fdb.contains("10.168.0.3") && !fdb.contains("00:00:00:00:00:00"), "no entry for what is for all: {fdb}");
}

#[test]
fn a_host_joins_and_the_others_learn_the_way() {
    let Some(lab) = Lab::new() else { return };
    lab.run("up");
    let out = lab.try_run("node add");
    let said = text(&out.stderr);
    assert!(out.status.success(), "{said}");
    for node in ["node1", "node2"] {
        for what in ["route 10.1.17.0/24", "neigh 10.1.17.0", "fdb "] {
            assert!(said.lines().any(|l| l.starts_with(&format!("{node}: {what}"))), "{node} {what}: {said}");
        }
        // Nobody has sent a packet yet.
        let neigh = lab.run(&format!("exec {node} -- ip neigh show 10.1.17.0 dev flannel.1"));
        assert!(neigh.contains("lladdr") && neigh.contains("PERMANENT"), "{neigh}");
        let fdb = lab.run(&format!("exec {node} -- bridge fdb show dev flannel.1"));
        assert!(fdb.contains("dst 10.168.0.4 self permanent"), "{fdb}");
    }
    let ping = lab.json("ping");
    assert_eq!((&ping["pairs"], &ping["reachable"]), (&6.into(), &6.into()));
    for ends in ["node1 node3", "container-3 node1", "container-2 container-3"] {
        let explained = lab.run(&format!("explain {ends}"));
        assert_eq!(explained.matches("it arrives").count(), 2, "{ends}, there and back: {explained}");
    }
}

#[test]
fn a_host_joins_without_waiting_for_one_that_has_left() {
    let Some(lab) = Lab::new() else { return };
    lab.run("up --nodes 3");
    lab.run("exec node3 -- twill leave --force");
    let state = lab.json("node add");
    let agents: Vec<&Value> = state["nodes"].as_array().unwrap().iter().map(|node| &node["agent"]).collect();
    assert_eq!(agents, ["running", "running", "stopped", "running"]);
    // One that is stopped without having left still holds its lease.
    lab.run("agent stop node2");
    lab.run("node add");
    let ping: Value = serde_json::from_slice(&lab.try_run("ping -o json").stdout).unwrap();
    let failed = ping["failed"].as_array().unwrap();
    let failed = failed.iter().map(|pair| ["from", "to"].map(|end| pair[end].as_str().unwrap()));
    // Nobody has a way to the one that left, and the agent that rests has none to the newest.
    let (left, rests) = ("container-3", ["container-2", "container-5"]);
    let other: Vec<_> =
        failed.filter(|ends| !ends.contains(&left) && !ends.iter().all(|end| rests.contains(end))).collect();
    assert!(other.is_empty(), "{other:?}");
}

#[test]
fn an_agent_is_stopped_killed_and_started_and_the_data_path_stays() {
    let Some(lab) = Lab::new() else { return };
    lab.run("up");
    for (act, state) in
        [("stop", "stopped"), ("start", "running"), ("kill", "stopped"), ("start", "running"), ("restart", "running")]
    {
        assert_eq!(lab.json(&format!("agent {act} node2"))["nodes"][1]["agent"], state, "{act}");
        assert_eq!(lab.json("ping")["reachable"], 2, "after {act}");
    }
}

#[test]
fn capture_decodes_what_passes_layer_by_layer() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        lab.run("up");
        let mut command = lab.wrapped(&lab.program);
        command.args(["lab", "capture", &format!("--name={}", lab.name), "node1", "eth0", "--count=40"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut ready = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stderr.as_mut().unwrap()), &mut ready).unwrap();
        assert!(ready.contains("listening"), "{ready}");
        eventually("enough packets have passed", || {
            lab.run("ping");
            if child.try_wait().unwrap().is_some() { Ok(()) } else { Err("not yet") }
        });
        let shown = text(&child.wait_with_output().unwrap().stdout);
        for layer in ["outer IPv4", "outer UDP", "VXLAN", "inner ICMP"] {
            assert!(shown.contains(layer), "{layer}: {shown}");
        }
    }
}

#[test]
fn the_largest_lab_reaches_everybody() {
    let Some(lab) = Lab::new() else { return };
    lab.run("up --nodes 16 --containers 4");
    let ping = lab.json("ping");
    assert_eq!((&ping["pairs"], &ping["reachable"]), (&4032.into(), &4032.into()), "{ping}");
    let full = lab.try_run("node add -o json");
    assert_eq!(full.status.code(), Some(1));
    let full: Value = serde_json::from_slice(&full.stdout).unwrap();
    assert_eq!(full["error"]["code"], "lab-full");
    assert!(full["error"]["message"].as_str().unwrap().contains("at most 16"), "{full}");
}

#[test]
fn a_stock_etcd_serves_as_the_store() {
    if !installed("etcd") || !installed("etcdctl") {
        return;
    }
    let Some(lab) = Lab::new() else { return };
    lab.run("up --store etcd");
    assert_eq!(lab.json("ping")["reachable"], 2);
    let keys = "env ETCDCTL_API=3 etcdctl --endpoints http://10.168.0.1:2379 get --prefix --keys-only /coreos.com/network/subnets";
    let keys = lab.run(&format!("exec underlay -- {keys}"));
    assert!(keys.contains("/coreos.com/network/subnets/10.1.16.0-24"), "{keys}");
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
fn namespaces_without_rights_are_one_clear_error_with_the_setting() {
    let Some(lab) = Lab::without_root() else { return };
    // A user namespace is granted, and what needs a right in it is not; the setting is Ubuntu's, which this kernel need not have.
    let script = "mount -t tmpfs none /proc/sys/kernel && echo 1 > /proc/sys/kernel/apparmor_restrict_unprivileged_userns \
        && echo 0 > /proc/sys/user/max_net_namespaces && exec setpriv --bounding-set=-sys_admin \"$@\"";
    let out = lab
        .wrapped("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .arg(&lab.program)
        .args(["lab", "-o", "json"])
        .output()
        .unwrap();
    let error: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out:?}"));
    assert_eq!((out.status.code(), &error["error"]["code"]), (Some(1), &"userns-forbidden".into()), "{error}");
    let hint = error["error"]["hint"].as_str().unwrap();
    assert!(hint.contains("sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"), "{error}");
    lab.assert_gone();
}

#[test]
fn what_is_asked_for_wrongly_is_refused_in_words() {
    let Some(lab) = Lab::new() else { return };
    for (line, exit, word) in [
        ("up --backend host-gw", 2, "backend-not-built"),
        ("up --scenario vxlan --backend udp", 2, "bad-lab"),
        ("up --scenario bridge --nodes 1 --containers 2 --store none", 2, ""),
        ("up --scenario bridge --nodes 2", 2, "bad-lab"),
        ("status", 1, "no-such-lab"),
        ("ping", 1, "no-such-lab"),
        ("down", 1, "no-such-lab"),
    ] {
        let out = lab.try_run(&format!("{line} -o json"));
        assert_eq!(out.status.code(), Some(exit), "{line}: {}", text(&out.stderr));
        assert!(text(&out.stdout).contains(word), "{line}: {}", text(&out.stdout));
    }
    for (line, allowed) in [
        ("up --nodes 17", "1..=16"),
        ("up --nodes 0", "1..=16"),
        ("up --containers 0", "1..=4"),
        ("up --containers 5", "1..=4"),
    ] {
        let out = lab.try_run(line);
        assert_eq!(out.status.code(), Some(2), "{line}");
        assert!(text(&out.stderr).contains(allowed), "{line}: {}", text(&out.stderr));
    }
    for name in ["", "..", "../x", "a/b", "/etc", "A", "-x", "a b", "a\nb", "ä", "x*", &"x".repeat(33)] {
        for act in ["up", "status", "down", "ping"] {
            let out = lab.wrapped(&lab.program).args(["lab", act, &format!("--name={name}")]).output().unwrap();
            assert_eq!(out.status.code(), Some(2), "{act} {name:?}");
            assert!(text(&out.stderr).contains("1 to 32 characters"), "{act} {name:?}: {}", text(&out.stderr));
        }
    }
    lab.assert_gone();
}

#[test]
fn a_folder_of_somebody_else_or_open_to_others_is_refused() {
    let Some(lab) = Lab::new() else { return };
    let refused = |why: &str| {
        let out = lab.try_run("up --scenario bridge -o json");
        let error: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!((out.status.code(), &error["error"]["code"]), (Some(1), &"lab-home".into()), "{error}");
        assert!(error["error"]["message"].as_str().unwrap().contains(why), "{error}");
    };
    std::fs::create_dir(lab.folder()).unwrap();
    for mode in ["777", "755", "710"] {
        assert!(Command::new("chmod").arg(mode).arg(lab.folder()).status().unwrap().success());
        refused("others may look into it");
    }
    std::fs::remove_dir(lab.folder()).unwrap();
    let elsewhere = lab.runtime.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, lab.folder()).unwrap();
    refused("somebody else");
    std::fs::remove_file(lab.folder()).unwrap();
    if rustix::process::geteuid().is_root() {
        std::fs::create_dir(lab.folder()).unwrap();
        assert!(Command::new("chown").arg(NOBODY).arg(lab.folder()).status().unwrap().success());
        refused("somebody else");
        std::fs::remove_dir(lab.folder()).unwrap();
    }
    lab.run("up --scenario bridge");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(lab.folder()).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn two_labs_of_one_name_leave_each_other_alone() {
    let (Some(mut lab), Some(mut other)) = (Lab::new(), Lab::new()) else { return };
    other.name = lab.name.clone();
    let root = rustix::process::geteuid().is_root();
    lab.run("up --scenario bridge");
    let names = || -> Vec<PathBuf> {
        let (prefix, all) = (format!("twill-{}-", lab.name), std::fs::read_dir("/run/netns").into_iter().flatten());
        let names = all.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        names.filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect()
    };
    let before = names();
    assert_eq!(before.is_empty(), !root);
    if root {
        // The names for `ip netns` are taken: said at once, and nothing of it is left.
        let out = other.try_run("up --scenario bridge -o json");
        let said: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!((out.status.code(), &said["error"]["code"]), (Some(1), &"lab-exists".into()), "{said}");
        assert!(said["error"]["hint"].as_str().unwrap().contains("--name"), "{said}");
    }
    assert!(!other.try_run("down").status.success(), "there is none");
    if let Some(mut user) = Lab::without_root() {
        user.name = lab.name.clone();
        user.run("up --scenario bridge");
        assert_eq!(user.json("ping")["reachable"], 2);
        user.run("down");
        assert!(user.folder().read_dir().is_err());
    }
    assert_eq!(names(), before, "of the first one alone");
    assert_eq!(lab.json("ping")["reachable"], 2);
    lab.run("down");
    (lab.name, other.name) = (other.name.clone(), lab.name.clone());
    other.run("up --scenario bridge");
    other.run("down");
    lab.assert_gone();
    other.assert_gone();
}

#[test]
fn the_root_of_a_user_namespace_has_labs_as_without_root() {
    let Some(lab) = Lab::without_root() else { return };
    let user = lab.wrapped("id").arg("-u").output().unwrap();
    let user = text(&user.stdout).trim().to_owned();
    let program = lab.program.display();
    let inside = |line: &str| {
        let out = lab.wrapped("unshare").args(["-Urm", "sh", "-c", line]).output().unwrap();
        assert!(out.status.success(), "{line}: {}", text(&out.stderr));
        text(&out.stdout)
    };
    let shown = inside(&format!("{program} lab"));
    assert!(shown.contains("2 of 2 pairs"), "{shown}");
    if !lab.drop_root {
        return println!("SKIP: a folder of somebody else needs root");
    }
    // Where nothing says which folder is its own, it is that of the user outside, not root's.
    let tmp = lab.runtime.path();
    let root = tmp.join("twill-0");
    std::fs::create_dir(&root).unwrap();
    std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o700)).unwrap();
    let own = format!("mount --bind {} /tmp && unset XDG_RUNTIME_DIR && cd /", tmp.display());
    let (name, copy) = (&lab.name, "/tmp/twill-copy");
    inside(&format!(
        "{own} && {copy} lab up --scenario bridge --name {name} && test -d /tmp/twill-{user}/lab-{name}; \
                     result=$?; {copy} lab down --name {name} && exit $result"
    ));
    std::fs::remove_dir(root).unwrap();
}

#[test]
fn every_hint_can_be_typed_as_it_stands() {
    let Some(lab) = Lab::new() else { return };
    let hint = |line: &str| {
        let said = text(&lab.try_run(line).stderr);
        said.lines().find_map(|line| line.strip_prefix("hint: ")).unwrap_or_default().to_owned()
    };
    let name = format!("--name {}", lab.name);
    assert!(hint("status").contains(&format!("`twill lab up {name}`")), "{}", hint("status"));
    lab.run("up --nodes 1");
    lab.run("agent stop node1");
    for (line, typed) in [
        ("explain nobody node1", format!("`twill lab status {name}`")),
        ("capture node1 nothing0", format!("`twill lab exec {name} node1 -- ip link`")),
        ("agent hold node1", format!("`twill lab agent start node1 {name}`")),
        ("up", format!("`twill lab down {name}`")),
    ] {
        let said = hint(line);
        assert!(said.contains(&typed), "{line}: {said}");
        let words = typed.trim_matches('`').strip_prefix("twill lab ").unwrap();
        if !words.starts_with("down") {
            let out = lab.wrapped(&lab.program).arg("lab").args(words.split_whitespace()).output().unwrap();
            assert!(out.status.success(), "{typed}: {}", text(&out.stderr));
        }
    }
}

/// Takes both down, one after the other.
fn one_goes_and_the_other_stands(lab: &Lab, other: &Lab) {
    lab.run("down");
    assert_eq!(other.json("ping")["reachable"], 2, "the other one stands");
    other.run("down");
    lab.assert_gone();
    other.assert_gone();
}

#[test]
fn two_labs_stand_side_by_side() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        let other = lab.beside("-b");
        lab.run("up");
        other.run("up");
        assert_eq!(lab.json("list")["labs"].as_array().unwrap().len(), 2);
        assert_eq!(lab.json("ping")["reachable"], 2);
        assert_eq!(other.json("ping")["reachable"], 2);
        one_goes_and_the_other_stands(&lab, &other);
    }
}

#[test]
fn a_supervisor_killed_at_any_moment_of_up_leaves_nothing() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        let mark = format!("{}\"", lab.name);
        let supervisors = || {
            let all = std::fs::read_dir("/proc").unwrap().flatten();
            let ours = all.filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse::<u32>().ok()?;
                let line = text(&std::fs::read(entry.path().join("cmdline")).ok()?);
                (line.contains("supervise") && line.contains(&mark)).then_some(pid)
            });
            ours.collect::<Vec<u32>>()
        };
        let agents = || processes(&format!("{}/twill/lab-{}/", lab.runtime.path().display(), lab.name));
        // From its first instant to when the store and all agents run.
        for moment in 0..=5 {
            let mut command = lab.wrapped(&lab.program);
            command.args(["lab", "up", "--nodes=4", "--containers=2", &format!("--name={}", lab.name)]);
            let client = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            eventually("it has come so far", || {
                if supervisors().is_empty() || agents().len() < moment { Err(agents()) } else { Ok(()) }
            });
            for pid in supervisors() {
                let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).output();
            }
            let out = client.wait_with_output().unwrap();
            let _ = lab.try_run("down");
            if !out.status.success() {
                assert!(text(&out.stderr).contains("error: "), "{}", text(&out.stderr));
            }
            eventually("no process is left", || {
                let mut left = agents();
                left.extend(supervisors().iter().map(u32::to_string));
                if left.is_empty() { Ok(()) } else { Err(left) }
            });
            lab.assert_gone();
        }
    }
}

#[test]
fn a_lab_whose_client_is_killed_ends_and_leaves_nothing() {
    for lab in [Lab::new(), Lab::without_root()].into_iter().flatten() {
        let mut command = lab.wrapped(&lab.program);
        command.args(["lab", "up", "--nodes=16", "--containers=4", &format!("--name={}", lab.name)]);
        let mut client = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(client.stderr.take().unwrap()), &mut first).unwrap();
        assert!(first.contains("16 hosts"), "{first}");
        client.kill().unwrap();
        client.wait().unwrap();
        eventually("no process and no folder is left", || {
            let left = processes(&format!("{}/twill/lab-{}/", lab.runtime.path().display(), lab.name));
            if left.is_empty() && !lab.folder().exists() { Ok(()) } else { Err(left) }
        });
        lab.assert_gone();
    }
}

/// A runtime on a lab's node, with the node's folders: it never gives away what a container of the lab has.
#[test]
fn a_runtime_on_a_node_gets_no_address_of_the_labs_containers() {
    let Some(lab) = Lab::new() else { return };
    lab.run("up --nodes 2 --containers 3");
    let address = |place: &str| {
        let shown: Value =
            serde_json::from_str(&lab.run(&format!("exec {place} -- ip -j -4 addr show dev eth0"))).unwrap();
        shown[0]["addr_info"][0]["local"].as_str().unwrap().to_owned()
    };
    let own: Vec<String> = (1..=3).map(|n| address(&format!("container-{n}"))).collect();
    let (net, _) = own[0].rsplit_once('.').unwrap();
    let node = lab.folder().join(format!("lab-{}", lab.name)).join("node1");
    let conf = node.join("conf");
    let call = |verb: &str, id: &str| {
        // The container's namespace is entered and left again: a descriptor holds it.
        let line = "exec 8</proc/self/ns/net; exec unshare --net sh -c 'exec 9</proc/self/ns/net; exec nsenter --net=/proc/self/fd/8 \
            env CNI_COMMAND=\"$0\" CNI_CONTAINERID=\"$1\" CNI_IFNAME=eth0 CNI_NETNS=/proc/self/fd/9 \"$2\" < \"$3\"' \"$@\"";
        let mut command = lab.wrapped(&lab.program);
        command.args(["lab", "exec", &format!("--name={}", lab.name), "node1", "--", "sh", "-c", line, "sh", verb, id]);
        let out = command.arg(bin("twill-cni")).arg(&conf).output().unwrap();
        (out.status.success(), text(&out.stdout), text(&out.stderr))
    };
    let mut wanted = serde_json::json!({"cniVersion": "1.1.0", "name": "twill", "type": "twill-cni",
        "stateDir": node.join("state"), "ipam": {"type": "host-local", "dataDir": node.join("networks"),
        "ranges": [[{"subnet": format!("{net}.0/24"), "rangeEnd": format!("{net}.9")}]]}});
    std::fs::write(&conf, wanted.to_string()).unwrap();
    let add = |n: usize| {
        let (done, said, err) = call("ADD", &format!("runtimes-{n}"));
        let said: Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said} {err}"));
        if !done {
            return Err(said["msg"].as_str().unwrap().to_owned());
        }
        Ok(said["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned())
    };
    let given: Vec<String> = (0..5).map(|n| add(n).unwrap()).collect();
    let free: Vec<String> = (2..=9).map(|host| format!("{net}.{host}")).filter(|ip| !own.contains(ip)).collect();
    assert_eq!(given, free);
    // The runtime's own containers have ended: theirs are given again, and nobody else's.
    let again = eventually("the kernel has taken their devices away", || add(5));
    assert!(free.contains(&again), "{again}");
    // What the runtime does not name is freed, the lab's is not.
    wanted["cni.dev/valid-attachments"] = serde_json::json!([]);
    std::fs::write(&conf, wanted.to_string()).unwrap();
    let (done, said, err) = call("GC", "runtimes");
    assert!(done, "{said} {err}");
    let names =
        std::fs::read_dir(node.join("networks/twill")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut held: Vec<String> = names.filter(|name| name.parse::<std::net::IpAddr>().is_ok()).collect();
    held.sort();
    assert_eq!(held, own);
    assert_eq!(lab.json("ping")["reachable"], 30);
}
