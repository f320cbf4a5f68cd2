//! Many peers: leases in a store, an agent started cold in a namespace, and the same objects by `ip -batch` and `bridge -batch`.
//!
//! The number of routes is read from `/proc/PID/net/fib_triestat` of a process in the namespace: cheap, and nobody's code but the kernel's.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use twill_e2e::net::{Bed, Host};
use twill_store::{EtcdStore, StoreConfig, Swap};

use crate::report::{Report, median};

/// A child that ends with the measurement.
pub(crate) struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A host with an underlay and a store that serves `peers` leases below 10.0.0.0/8.
pub(crate) struct Rig {
    pub(crate) host: Host,
    _other: Host,
    _bed: Bed,
    dir: tempfile::TempDir,
    _store: Process,
}

impl Rig {
    pub(crate) fn new(twill: &Path, peers: u32) -> Rig {
        let bed = Bed::new().expect("needs root");
        let (host, other) = (bed.host("node"), bed.host("other"));
        bed.wire(&host, "eth0", &other, "eth0");
        host.ip("addr add 192.168.0.2/16 dev eth0");
        let dir = tempfile::tempdir().unwrap();
        let store = host
            .command(twill)
            .args(["store", "serve", "--data"])
            .arg(dir.path().join("store"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let store = Process(store);
        let etcdctl = |words: &[&str]| {
            host.command("etcdctl")
                .env("ETCDCTL_API", "3")
                .args(words)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        };
        let put = |key: &str, value: &str| etcdctl(&["put", key, value]).wait().unwrap().success();
        while !put(
            "/coreos.com/network/config",
            r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#,
        ) {}
        let numbers: Vec<u32> = (1..=peers).collect();
        for chunk in numbers.chunks(100) {
            let mut text = String::from("\n");
            for n in chunk {
                // etcdctl reads a double-quoted word as Go's %q.
                writeln!(text, "put /coreos.com/network/subnets/{}-24 {:?}", subnet(*n), lease(*n, *n)).unwrap();
            }
            let mut child = etcdctl(&["txn"]);
            std::io::Write::write_all(child.stdin.as_mut().unwrap(), format!("{text}\n\n").as_bytes()).unwrap();
            assert!(child.wait().unwrap().success());
        }
        Rig { host, _other: other, _bed: bed, dir, _store: store }
    }

    pub(crate) fn agent(&self, twill: &Path) -> Process {
        let _ = std::fs::remove_dir_all(self.dir.path().join("state"));
        let mut command = self.host.command(twill);
        command.args(["agent", "--iface", "eth0", "--subnet", "10.255.0.0/24"]);
        for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--subnet-file", "subnet.env")] {
            command.arg(flag).arg(self.dir.path().join(name));
        }
        let log = std::fs::File::create(self.dir.path().join("agent.log")).unwrap();
        Process(command.stderr(log).spawn().unwrap())
    }

    /// Prefixes in the namespace's tables.
    fn prefixes(&self) -> u32 {
        let text = std::fs::read_to_string(format!("/proc/{}/net/fib_triestat", self.host.pid())).unwrap();
        text.lines().filter_map(|l| l.trim().strip_prefix("Prefixes:")).map(|n| n.trim().parse::<u32>().unwrap()).sum()
    }

    pub(crate) fn wait_for(&self, prefixes: u32) {
        let end = Instant::now() + Duration::from_secs(120);
        while self.prefixes() < prefixes {
            let log = || std::fs::read_to_string(self.dir.path().join("agent.log")).unwrap_or_default();
            assert!(Instant::now() < end, "only {} of {prefixes} prefixes came: {:.2000}", self.prefixes(), log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Takes away the agent and all that it made; its lease as well.
    pub(crate) fn clear(&self, agent: Process) {
        drop(agent);
        let _ = self.host.try_run("ip link del flannel.1");
        let _ = self.host.try_run("etcdctl del /coreos.com/network/subnets/10.255.0.0-24");
    }
}

fn subnet(n: u32) -> String {
    format!("10.{}.{}.0", n / 256, n % 256)
}

fn mac(n: u32) -> String {
    let [a, b, c, d] = n.to_be_bytes();
    format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

fn host_of(n: u32) -> String {
    format!("192.168.{}.{}", 1 + n / 250 % 250, 1 + n % 250)
}

/// The lease of peer `n` whose MAC is number `m`.
fn lease(n: u32, m: u32) -> String {
    format!(
        r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{}"}}}}"#,
        host_of(n),
        mac(m)
    )
}

/// The same objects by `ip -batch` and `bridge -batch` in a namespace of their own, in milliseconds.
fn by_hand(peers: u32) -> f64 {
    let bed = Bed::new().unwrap();
    let (host, other) = (bed.host("hand"), bed.host("other"));
    bed.wire(&host, "eth0", &other, "eth0");
    host.ip("addr add 192.168.0.2/16 dev eth0");
    host.ip("link add flannel.1 type vxlan id 1 dev eth0 local 192.168.0.2 dstport 8472 nolearning");
    host.ip("addr add 10.255.0.0/32 dev flannel.1");
    host.ip("link set flannel.1 up");
    let dir = tempfile::tempdir().unwrap();
    let (mut ip, mut bridge) = (String::new(), String::new());
    for n in 1..=peers {
        let s = subnet(n);
        writeln!(ip, "neigh replace {s} lladdr {} dev flannel.1 nud permanent", mac(n)).unwrap();
        writeln!(ip, "route replace {s}/24 via {s} dev flannel.1 onlink metric {}", n / 256).unwrap();
        writeln!(bridge, "fdb replace {} dev flannel.1 dst {} self permanent", mac(n), host_of(n)).unwrap();
    }
    let (ip_file, bridge_file) = (dir.path().join("ip"), dir.path().join("bridge"));
    std::fs::write(&ip_file, ip).unwrap();
    std::fs::write(&bridge_file, bridge).unwrap();
    let start = Instant::now();
    assert!(host.command("ip").arg("-batch").arg(&ip_file).status().unwrap().success());
    assert!(host.command("bridge").arg("-batch").arg(&bridge_file).status().unwrap().success());
    start.elapsed().as_secs_f64() * 1e3
}

/// Ten and twenty thousand peers.
pub(crate) fn cold(twill: &Path, report: &mut Report) {
    let mut medians = Vec::new();
    for peers in [10_000, 20_000] {
        let rig = Rig::new(twill, peers);
        let (mut ours, mut hand, mut lost) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..5 {
            hand.push(by_hand(peers));
            let before = rig.prefixes();
            let start = Instant::now();
            let agent = rig.agent(twill);
            rig.wait_for(before + peers);
            ours.push(start.elapsed().as_secs_f64() * 1e3);
            if peers == 10_000 {
                let start = Instant::now();
                rig.host.ip("link del flannel.1");
                rig.wait_for(before + peers);
                lost.push(start.elapsed().as_secs_f64() * 1e3);
            }
            rig.clear(agent);
        }
        report.note(&format!("{peers} peers, by ip -batch and bridge -batch (ms)"), &hand);
        report.note(&format!("{peers} peers, agent cold, exec to last route (ms)"), &ours);
        let ratio: Vec<f64> = ours.iter().zip(&hand).map(|(o, h)| o / h).collect();
        report.at_most(&format!("{peers} peers, cold against by hand (×)"), &ratio, 1.3);
        medians.push(median(&ours));
        if peers == 10_000 {
            report.note("10000 peers, device lost to last route (ms)", &lost);
            let ratio: Vec<f64> = lost.iter().zip(&ours).map(|(l, o)| l / o).collect();
            report.at_most("10000 peers, device lost against cold (×)", &ratio, 1.5);
            let agent = rig.agent(twill);
            rig.wait_for(10_000);
            // What is announced beyond the last route would overrun the monitor.
            std::thread::sleep(Duration::from_secs(2));
            change(&rig, report);
            settled(&agent, report, 10_000, 0.6);
        }
    }
    report.at_most("20000 against 10000 peers, cold (×)", &[medians[1] / medians[0]], 2.2);
}

/// One lease among many changes its MAC: from the store's acknowledgement of the write to the kernel's announcement of the neighbour.
fn change(rig: &Rig, report: &mut Report) {
    let mut monitor = rig
        .host
        .command("ip")
        .args(["-ts", "monitor", "neigh", "dev", "flannel.1"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(monitor.stdout.take().unwrap()).lines();
    let monitor = Process(monitor);
    let (sender, mut seen) = mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(sender.send((now(), line)))));
    // What is written before `ip` listens is never seen.
    std::thread::sleep(Duration::from_secs(1));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let pid = rig.host.pid();
    let samples = std::thread::scope(|scope| {
        let seen = &mut seen;
        let work = scope.spawn(move || {
            // The client's own thread stands in the namespace.
            let path = format!("/proc/{pid}/ns/net");
            let file = std::fs::File::open(path).unwrap();
            twill_e2e::net::enter(&file);
            runtime.block_on(put_changes(seen))
        });
        work.join().unwrap()
    });
    drop(monitor);
    report.p99_at_most("10000 peers, one lease changes, store to kernel, p99 (ms)", &samples, 5.0);
    report.note("the same, median (ms)", &samples);
}

async fn put_changes(seen: &mut mpsc::Receiver<(f64, String)>) -> Vec<f64> {
    let config = StoreConfig {
        endpoints: vec!["http://127.0.0.1:2379".into()],
        prefix: "/coreos.com/network".into(),
        ..StoreConfig::default()
    };
    let store = EtcdStore::new(config).unwrap();
    let mut samples = Vec::new();
    for n in 0..300u32 {
        let (peer, fresh) = (1 + n * 31 % 10_000, 1_000_000 + n);
        let name = format!("{}-24", subnet(peer));
        let lease_now = store.get(&name).await.unwrap().unwrap();
        let swap = store.update(&name, lease(peer, fresh).as_bytes(), lease_now.mod_rev, 0).await.unwrap();
        let acknowledged = now();
        assert!(matches!(swap, Swap::Done { .. }));
        let wanted = mac(fresh);
        let at = loop {
            let (at, line) = seen.recv_timeout(Duration::from_secs(10)).expect("the change reaches the kernel");
            if line.contains(&wanted) {
                break at;
            }
        };
        // The kernel can be faster than the acknowledgement's way to us.
        samples.push((at - acknowledged).max(0.0) * 1e3);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    samples
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// Kilobytes of a process, by the name of their line (proc_pid_status(5)).
pub(crate) fn kb(pid: u32, field: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

/// Memory and idle CPU of an agent that has nothing to do.
fn settled(agent: &Process, report: &mut Report, peers: u32, most: f64) {
    let pid = agent.0.id();
    std::thread::sleep(Duration::from_secs(2));
    let rss = kb(pid, "VmRSS");
    if peers >= 10_000 {
        report.at_most(&format!("{peers} peers, resident memory (MB)"), &[rss / 1024.0], 25.0);
    } else {
        report.note(&format!("{peers} peers, resident memory (MB)"), &[rss / 1024.0]);
    }
    report.note("of it the program's own pages, not shared with its file (MB)", &[kb(pid, "RssAnon") / 1024.0]);
    let busy = || {
        let ns = |t: std::fs::DirEntry| std::fs::read_to_string(t.path().join("schedstat")).unwrap_or_default();
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        tasks.map(|t| ns(t).split_whitespace().next().unwrap_or("0").parse::<f64>().unwrap()).sum::<f64>() / 1e9
    };
    let (start, before) = (Instant::now(), busy());
    // Longer than a minute, so that an audit is part of it.
    std::thread::sleep(Duration::from_secs(62));
    let percent = (busy() - before) / start.elapsed().as_secs_f64() * 100.0;
    report.at_most(&format!("{peers} peers, idle CPU (% of a core)"), &[percent], most);
}

/// A hundred peers.
pub(crate) fn small(twill: &Path, report: &mut Report) {
    let rig = Rig::new(twill, 100);
    let mut samples = Vec::new();
    for n in 0..10 {
        let before = rig.prefixes();
        let start = Instant::now();
        let agent = rig.agent(twill);
        // The device's own address is no prefix of the main table alone: wait for a peer's route.
        rig.wait_for(before + 3);
        samples.push(start.elapsed().as_secs_f64() * 1e3);
        if n < 9 {
            rig.clear(agent);
        } else {
            rig.wait_for(before + 100);
            report.at_most("agent from exec to first route, 100 peers (ms)", &samples, 100.0);
            settled(&agent, report, 100, 0.3);
        }
    }
}
