//! The udp backend on real TUN devices and sockets, looked at from outside with `ip`, `nft`, `tcpdump` and a stock `etcdctl`.

mod bad;
mod strangers;
mod switch;
mod underlay;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::json;
use twill_e2e::capture::Capture;
use twill_e2e::net::{Bed, Host};
use twill_e2e::overlay::{Overlay, Site};
use twill_e2e::{eventually, grants, installed};

/// The program that sends and receives what a test compares.
const WIRE: &str = env!("CARGO_BIN_EXE_wire");

/// A place for nodes of the udp backend, or `None` where this machine grants none (which was said).
fn place() -> Option<(Bed, tempfile::TempDir)> {
    let bed = Bed::new()?;
    if !installed("etcdctl") {
        return None;
    }
    if !grants("udp") {
        return None;
    }
    Some((bed, tempfile::tempdir().unwrap()))
}

/// Two running nodes.
fn running() -> Option<(Overlay, tempfile::TempDir)> {
    let (bed, dir) = place()?;
    Some((Overlay::running(bed, dir.path()), dir))
}

/// Two nodes, each with its flags for the agent.
fn with_flags(flags: [&str; 2]) -> Option<(Overlay, tempfile::TempDir)> {
    let (bed, dir) = place()?;
    let mut net = Overlay::new(bed, dir.path());
    for (number, flags) in [1, 2].into_iter().zip(flags) {
        net.site_mut(number).start(flags);
        net.site(number).attach();
    }
    net.await_both_ways();
    Some((net, dir))
}

/// A child that ends with the test, however that ends.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a program that says on stdout when it is ready.
fn until_ready(mut command: Command, word: &str) -> (Ends, impl Iterator<Item = String>) {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains(word)), "{command:?} says {word}");
    (Ends(child), lines)
}

/// The niceness of the tunnel's threads of a process, by their names.
fn niceness(pid: u32) -> Vec<(String, i32)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let of = |task: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
        // proc_pid_stat(5): field 19, and the state is the third.
        Some((name.to_owned(), rest.split(' ').nth(16)?.parse().ok()?))
    };
    let mut found: Vec<_> = tasks.filter_map(of).filter(|(name, _)| name.starts_with("tunnel")).collect();
    found.sort();
    found
}

#[test]
fn streams_in_bulk_go_before_programs_many_further_and_small_packets_do_not() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP: without root nobody goes before others");
        return;
    }
    let Some((net, _dir)) = running() else { return };
    let nice = |number: u8| niceness(net.site(number).agent_pid().unwrap());
    let are = |carrier, helper| vec![("tunnel".to_owned(), carrier), ("tunnel-helper".to_owned(), helper)];
    let usual = nice(1);
    assert!(usual.iter().all(|(_, nice)| *nice == usual[0].1), "{usual:?}");
    let [ahead, first] = [10, 20].map(|less| (usual[0].1 - less).max(-20));
    let (one, two) = (&net.site(1).container, &net.site(2).container);
    // Small ones, as many as there may be.
    let flood = format!("{WIRE} flood 100.96.1.2:5555 100.96.2.2:5555 {}", "5a".repeat(64));
    let mut words = flood.split(' ');
    let small = Ends(one.command(words.next().unwrap()).args(words).stdin(Stdio::null()).spawn().unwrap());
    eventually("many have passed", || {
        let sent = net.site(1).status()["tunnel"]["sent"]["packets"].as_u64().unwrap();
        if sent > 50_000 { Ok(()) } else { Err(sent) }
    });
    assert_eq!((nice(1), nice(2)), (usual.clone(), usual.clone()));
    drop(small);
    let mut receiver = two.command(WIRE);
    receiver.args(["streams-receive", "100.96.2.2:7000"]);
    let (receiver, _) = until_ready(receiver, "ready");
    let streams = |number: &str| {
        let mut sender = one.command(WIRE);
        sender.args(["streams-send", "100.96.2.2:7000", number]).stdin(Stdio::null()).stderr(Stdio::null());
        Ends(sender.spawn().unwrap())
    };
    let are_at = |wanted: i32| {
        let (sends, receives) = (nice(1), nice(2));
        if sends[0].1 == wanted && receives[1].1 == wanted { Ok(()) } else { Err((sends, receives)) }
    };
    let sender = streams("1");
    eventually("who carries the stream goes ahead", || are_at(ahead));
    drop(sender);
    let sender = streams("64");
    eventually("who carries many goes further ahead", || are_at(first));
    drop((sender, receiver));
    eventually("nobody does when it has ended", || {
        // What wakes a thread lets it look again.
        one.try_run("ping -c 3 -i 0.02 -W 1 100.96.2.2");
        let both = (nice(1), nice(2));
        if both == (are(usual[0].1, usual[1].1), usual.clone()) { Ok(()) } else { Err(both) }
    });
}

/// One kind of transfer between two containers: the receiver finds every byte, in order.
fn transfer(from: &Host, to: &Host, address: &str, kind: &str, size: &[&str]) {
    let mut receiver = to.command(WIRE);
    receiver.arg(format!("{kind}-receive")).arg(address).args(size);
    let (mut receiver, mut said) = until_ready(receiver, "ready");
    let sent = from.command(WIRE).arg(format!("{kind}-send")).arg(address).args(size).output().unwrap();
    assert!(sent.status.success(), "{}: {}", from.name, String::from_utf8_lossy(&sent.stderr));
    assert_eq!(said.next().as_deref(), Some("same"), "{} to {}", from.name, to.name);
    assert!(receiver.0.wait().unwrap().success());
}

/// Everything that a tunnel must carry unharmed, in both directions.
fn carries(one: &Host, two: &Host, stream: &str, datagrams: &str) {
    for (from, to, address) in [(one, two, "100.96.2.2"), (two, one, "100.96.1.2")] {
        transfer(from, to, &format!("{address}:7000"), "stream", &[stream]);
        transfer(from, to, &format!("{address}:7001"), "datagrams", &["1", datagrams]);
        for size in [0, 1, 55, 56, 1443, 1444, 1445, 1472, 1473, 2000, 9000, 65_507] {
            let out = from.try_run(&format!("ping -c 1 -W 5 -s {size} {address}"));
            assert!(out.status.success(), "{size}: {}", String::from_utf8_lossy(&out.stdout));
        }
    }
}

#[test]
fn two_hundred_megabytes_and_datagrams_and_pings_of_every_size_arrive_as_they_were() {
    let Some((net, _dir)) = running() else { return };
    carries(&net.site(1).container, &net.site(2).container, "200000000", "9000");
    let status = net.site(1).status();
    let (sent, received) = (&status["tunnel"]["sent"], &status["tunnel"]["received"]);
    if status["tunnel"]["means"]["tso4"] == true {
        let many = |flow: &serde_json::Value, of: &str| flow["packets"].as_f64().unwrap() / flow[of].as_f64().unwrap();
        assert!(many(sent, "super_packets") > 2.0 && many(sent, "messages") > 2.0, "{sent}");
        assert!(many(received, "super_packets") > 2.0, "{received}");
    } else {
        println!("SKIP: this kernel's TUN gives no super-packets");
    }
}

#[test]
fn offloads_on_one_end_or_none_carry_the_same() {
    for flags in [["--no-tunnel-offloads", ""], ["", "--no-tunnel-offloads"], ["--no-tunnel-offloads"; 2]] {
        let Some((net, _dir)) = with_flags(flags) else { return };
        carries(&net.site(1).container, &net.site(2).container, "20000000", "3000");
        for (number, flags) in [1, 2].into_iter().zip(flags) {
            let site = net.site(number);
            let means = &site.status()["tunnel"]["means"];
            let all = ["tso4", "tso6", "uso", "udp_segment", "udp_gro"];
            let plain = all.iter().all(|name| means[name] == false);
            assert_eq!(plain, !flags.is_empty(), "{means}");
            if plain {
                let shown = site.twill("status").1.unwrap();
                assert!(shown.contains("icmp (without tso4 tso6 uso udp-segment udp-gro)"), "{shown}");
            }
        }
    }
}

/// What flannel does, in ten lines: one packet, one datagram.
const NAIVE: &str = r#"
import fcntl, os, select, socket, struct, sys
tun = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tun, 0x400454ca, struct.pack("16sH", b"flannel0", 0x1001))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
udp.bind((sys.argv[1], 8285))
print("ready", flush=True)
while True:
    for fd in select.select([tun, udp], [], [])[0]:
        if fd == tun: udp.sendto(os.read(tun, 65536), (sys.argv[2], 8285))
        else: os.write(tun, udp.recv(65536))
"#;

#[test]
fn a_naive_peer_is_understood_and_understands() {
    let Some((bed, dir)) = place().filter(|_| installed("python3")) else { return };
    let mut net = Overlay::new(bed, dir.path());
    let lease = ["put", "/coreos.com/network/subnets/100.96.2.0-24", r#"{"PublicIP":"10.168.0.3","PublicIPv6":null}"#];
    assert!(net.etcdctl(&lease).status.success());
    net.site_mut(1).start("");
    net.site(1).attach();
    let two = net.site(2);
    let mut naive = two.host.command("python3");
    naive.args(["-c", NAIVE, "10.168.0.3", "10.168.0.2"]);
    let (_naive, _lines) = until_ready(naive, "ready");
    for line in ["addr add 100.96.2.0/16 dev flannel0", "link set flannel0 mtu 1472 up"] {
        two.host.ip(line);
    }
    two.host.run("sysctl -qw net.ipv4.ip_forward=1");
    two.attach();
    net.await_both_ways();
    carries(&net.site(1).container, &net.site(2).container, "20000000", "3000");
}

#[test]
fn a_packet_sees_exactly_two_routers() {
    let Some((net, _dir)) = running() else { return };
    let ttl = |ttl: u8| {
        let out = net.site(1).container.try_run(&format!("ping -n -c 1 -W 5 -t {ttl} 100.96.2.2"));
        (out.status.success(), String::from_utf8(out.stdout).unwrap())
    };
    let (reached, said) = ttl(1);
    assert!(!reached && said.contains("From 100.96.1.1 icmp_seq=1 Time to live exceeded"), "{said}");
    let (reached, said) = ttl(2);
    assert!(!reached && said.contains("From 100.96.2.0 icmp_seq=1 Time to live exceeded"), "{said}");
    let (reached, said) = ttl(3);
    assert!(reached && said.contains("ttl=62"), "{said}");
}

/// A bare UDP packet between two inner addresses, with one byte of it changed, as hex.
fn inner(from: [u8; 4], to: [u8; 4], change: impl Fn(&mut Vec<u8>)) -> String {
    let mut packet = vec![0x45, 0, 0, 29, 0, 1, 0, 0, 64, 17, 0, 0];
    packet.extend([from, to].concat());
    packet.extend([0xa5, 0x5a, 0xa5, 0x5a, 0, 9, 0, 0, 0x58]);
    let sum: u32 = packet[..20].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    change(&mut packet);
    packet.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn foreign_spoofed_and_broken_datagrams_are_dropped_and_counted_by_cause() {
    let Some((net, _dir)) = running() else { return };
    let (one, two) = (net.site(1), net.site(2));
    two.host.ip("addr add 10.168.0.99/24 dev eth0");
    let (own, ours) = ([100, 96, 2, 2], [100, 96, 1, 2]);
    let good = inner(own, ours, |_| {});
    let cases = [
        ("10.168.0.99", good.clone(), "not-a-peer"),
        ("10.168.0.3", inner([8, 8, 8, 8], ours, |_| {}), "wrong-source"),
        ("10.168.0.3", inner([100, 96, 1, 7], ours, |_| {}), "wrong-source"),
        ("10.168.0.3", inner(own, ours, |p| p.truncate(19)), "truncated"),
        ("10.168.0.3", "-".into(), "truncated"),
        ("10.168.0.3", inner(own, ours, |p| p[0] = 0x55), "not-ip"),
        ("10.168.0.3", inner(own, ours, |p| p.truncate(28)), "bad-length"),
        ("10.168.0.3", inner(own, ours, |p| p.push(0)), "bad-length"),
        ("10.168.0.3", inner(own, ours, |p| p[8] = 63), "bad-checksum"),
    ];
    let listen = || Capture::start(&one.container, "eth0", &["-nn"], None, "udp port 42330");
    let mut tcpdump = installed("tcpdump").then(listen);
    for (from, payload, cause) in cases {
        let before = one.dropped(cause);
        // A port that is not 8285: behind a NAT it is any.
        two.host.run(&format!("{WIRE} packet {from}:5555 10.168.0.2:8285 {payload}"));
        eventually(&format!("{payload} from {from} is dropped as {cause}"), || {
            let now = one.dropped(cause);
            if now == before + 1 { Ok(()) } else { Err((now, one.status().to_string())) }
        });
    }
    let before = one.status()["tunnel"]["received"]["packets"].as_u64().unwrap();
    two.host.run(&format!("{WIRE} packet 10.168.0.3:5555 10.168.0.2:8285 {good}"));
    eventually("the good one passes", || {
        let now = one.status()["tunnel"]["received"]["packets"].as_u64().unwrap();
        if now > before { Ok(()) } else { Err(now) }
    });
    if let Some(dump) = &mut tcpdump {
        // The good one is the only one that came out.
        let mut said = BufReader::new(dump.output()).lines().map_while(Result::ok);
        let line = said.next().unwrap();
        assert!(line.contains("100.96.2.2.42330 > 100.96.1.2.42330: UDP, length 1"), "{line}");
    }
    let shown = one.twill("status").1.unwrap();
    assert!(
        shown.contains("not-a-peer 1, wrong-source 2, truncated 2, not-ip 1, bad-length 2, bad-checksum 1"),
        "{shown}"
    );
    net.await_both_ways();
}

#[test]
fn what_goes_no_further_is_answered() {
    let Some((net, _dir)) = running() else { return };
    let (one, two) = (net.site(1), net.site(2));
    // Nobody's subnet.
    let out = one.container.try_run("ping -n -c 1 -W 5 100.96.77.7");
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(said.contains("From 100.96.1.1 icmp_seq=1 Destination Net Unreachable"), "{said}");
    assert!(one.dropped("no-peer") >= 1);
    // A path narrower than the device: who forbids cutting is told, others are cut.
    for (site, to) in [(one, 2), (two, 1)] {
        let host = &site.host;
        host.ip(&format!("route replace 10.168.0.{}/32 dev eth0 mtu lock 1300", to + 1));
        let out = site.container.try_run(&format!("ping -n -c 1 -W 5 -M do -s 1400 100.96.{to}.2"));
        let said = String::from_utf8(out.stdout).unwrap();
        assert!(said.contains("Frag needed and DF set (mtu = 1272)"), "{said}");
        let out = site.container.try_run(&format!("ping -n -c 1 -W 5 -M dont -s 1400 100.96.{to}.2"));
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    }
    carries(&one.container, &two.container, "5000000", "1500");
    assert!(one.dropped("too-big") >= 1);
}

#[test]
fn a_device_deleted_or_down_under_load_comes_back() {
    let Some((net, _dir)) = running() else { return };
    let one = net.site(1);
    let mut load = one.container.command("ping");
    load.args(["-q", "-i", "0.002", "-s", "1200", "100.96.2.2"]).stdout(Stdio::null());
    let _load = Ends(load.spawn().unwrap());
    for line in ["link set flannel0 down", "link del flannel0", "link set flannel0 mtu 1000", "addr flush dev flannel0"]
    {
        one.host.ip(line);
        eventually(&format!("after `ip {line}` the device is as before"), || {
            let shown = String::from_utf8(one.host.try_run("ip addr show flannel0").stdout).unwrap();
            let all = ["mtu 1472", "UP", "inet 100.96.1.0/16"].iter().all(|word| shown.contains(word));
            if all { Ok(()) } else { Err((shown, one.log())) }
        });
        net.await_both_ways();
    }
    eventually("all of it is told", || {
        let status = one.status();
        if status["repairs"]["total"].as_u64().unwrap() >= 4 { Ok(()) } else { Err(status.to_string()) }
    });
}

#[test]
fn a_device_renamed_or_moved_away_is_replaced_and_stands_in_nobodys_way() {
    let Some((bed, dir)) = place() else { return };
    let (mut net, elsewhere) = Overlay::running_on(bed, dir.path(), "", |bed, _| bed.host("elsewhere"));
    let replaced = |net: &Overlay, old: &str| {
        let site = net.site(1);
        eventually("one device, by its own name and up", || {
            let links = site.host.json("link show type tun");
            let names: Vec<_> = links.as_array().into_iter().flatten().map(|link| link["ifname"].clone()).collect();
            let up = links[0]["flags"].to_string().contains("LOWER_UP");
            if names == ["flannel0"] && up { Ok(()) } else { Err((old.to_owned(), links.to_string(), site.log())) }
        });
        net.await_both_ways();
    };
    net.site(1).host.ip("link set flannel0 name other0");
    replaced(&net, "other0");
    net.site_mut(1).stop(Signal::TERM);
    net.site_mut(1).start("");
    replaced(&net, "other0");
    net.site(1).host.ip(&format!("link set flannel0 netns {}", elsewhere.pid()));
    replaced(&net, "flannel0 elsewhere");
    assert_eq!(elsewhere.json("link show type tun"), json!([]), "{}", net.site(1).log());
    // While no agent runs, but the service manager has its descriptors.
    net.site_mut(1).stop(Signal::TERM);
    let mut manager = Manager::new(dir.path());
    manager.start(net.site_mut(1));
    net.await_both_ways();
    net.site_mut(1).stop(Signal::TERM);
    net.site(1).host.ip("link set flannel0 name other1");
    manager.start(net.site_mut(1));
    replaced(&net, "other1");
    // Of another kind.
    net.site_mut(1).stop(Signal::TERM);
    manager.kept.clear();
    net.site(1).host.ip("link del flannel0");
    net.site(1).host.ip("tuntap add dev flannel0 mode tun multi_queue");
    net.site_mut(1).start_at_once("");
    eventually("what helps is said", || {
        let status = net.site(1).status().to_string();
        if status.contains("delete the device, which is of another kind") { Ok(()) } else { Err(status) }
    });
    net.site(1).host.ip("link del flannel0");
    replaced(&net, "multi_queue");
}

/// A ping every 10 ms from container 1 to container 2, counted.
struct Beat(Ends);

impl Beat {
    fn start(net: &Overlay) -> Beat {
        let mut ping = net.site(1).container.command("ping");
        ping.args(["-n", "-i", "0.01", "100.96.2.2"]);
        let mut child = ping.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Beat(Ends(child))
    }

    /// How many had no answer.
    fn lost(mut self) -> u64 {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.0.0), Signal::INT).unwrap();
        let mut said = String::new();
        self.0.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        self.0.0.wait().unwrap();
        let line = said.lines().find(|line| line.contains("packets transmitted")).unwrap();
        let number = |at: usize| line.split_whitespace().nth(at).unwrap().parse::<u64>().unwrap();
        assert!(number(0) > 3, "{line}");
        // The last one may still be on its way.
        (number(0) - number(3)).saturating_sub(1)
    }
}

#[test]
fn the_next_agent_takes_over_and_at_most_fifty_milliseconds_are_lost() {
    let Some((mut net, _dir)) = running() else { return };
    let index = net.site(1).host.json("link show flannel0")[0]["ifindex"].clone();
    net.site(1).host.ip("link set flannel0 txqueuelen 700");
    let beat = Beat::start(&net);
    for _ in 0..3 {
        let old = net.site_mut(1).take_agent().unwrap();
        let pid = old.pid();
        net.site_mut(1).start_at_once("--takeover");
        assert_eq!(old.wait(), Some(0), "the old one ends by itself: {pid}");
        eventually("the new one runs", || {
            let status = net.site(1).status();
            if status["state"] == "running" && status["tunnel"]["received"]["packets"].as_u64() > Some(10) {
                Ok(())
            } else {
                Err((status.to_string(), net.site(1).log()))
            }
        });
    }
    let lost = beat.lost();
    assert!(lost <= 5, "{lost} of 10 ms each");
    let link = &net.site(1).host.json("link show flannel0")[0];
    assert_eq!((&link["ifindex"], &link["txqlen"]), (&index, &json!(700)), "the same device, as somebody left it");
    assert!(net.site(1).log().contains("the tunnel goes on"), "{}", net.site(1).log());
}

#[test]
fn the_service_manager_keeps_device_and_socket_through_a_restart() {
    let Some((mut net, dir)) = running() else { return };
    net.site_mut(1).stop(Signal::TERM);
    let mut manager = Manager::new(dir.path());
    manager.start(net.site_mut(1));
    net.await_both_ways();
    let beat = Beat::start(&net);
    for _ in 0..2 {
        assert_eq!(net.site_mut(1).stop(Signal::TERM), Some(0));
        manager.start(net.site_mut(1));
        eventually("the new one runs", || {
            let status = net.site(1).status();
            if status["state"] == "running" { Ok(()) } else { Err((status.to_string(), net.site(1).log())) }
        });
    }
    let lost = beat.lost();
    assert!(lost <= 5, "{lost} of 10 ms each: {}", net.site(1).log());
    assert_eq!(net.site(1).log().matches("the tunnel goes on").count(), 2, "{}", net.site(1).log());
}

#[test]
fn a_takeover_that_fails_leaves_the_running_agent_its_tunnel() {
    let Some((mut net, dir)) = running() else { return };
    net.site_mut(1).stop(Signal::TERM);
    let mut manager = Manager::new(dir.path());
    manager.start(net.site_mut(1));
    net.await_both_ways();
    // The next agent asks, and goes away before it has said that it has the descriptors.
    for times in 1..=2 {
        drop(std::os::unix::net::UnixStream::connect(net.site(1).file("run/handover.sock")).unwrap());
        eventually("the running one has seen it", || {
            let log = net.site(1).log();
            if log.matches("the tunnel goes on").count() >= times { Ok(()) } else { Err(log) }
        });
        net.await_both_ways();
    }
    assert_eq!(net.site(1).status()["findings"], json!([]));
    // Nor does one that cannot run with what it is told.
    let pid = net.site(1).agent_pid();
    for (flags, word) in [
        ("--ca /nonexistent.pem", "nonexistent"),
        ("--password-file /nonexistent --user x", "nonexistent"),
        ("--serve-store 10.168.0.2:2380", "add --insecure"),
        ("--serve-store 192.0.2.7:2380 --insecure", "192.0.2.7"),
    ] {
        let out = net.site(1).agent_command(&format!("--takeover {flags}")).output().unwrap();
        assert!(!out.status.success(), "{flags}: {out:?}");
        assert!(String::from_utf8_lossy(&out.stderr).contains(word), "{flags}: {out:?}");
        net.await_both_ways();
    }
    assert_eq!(net.site(1).agent_pid(), pid);
    assert_eq!(net.site(1).log().matches("the tunnel goes on").count(), 2, "{}", net.site(1).log());
}

/// The part of a service manager that keeps descriptors (sd_notify(3) FDSTORE, sd_listen_fds(3)).
struct Manager {
    socket: std::os::unix::net::UnixDatagram,
    path: std::path::PathBuf,
    kept: std::collections::BTreeMap<String, std::os::fd::OwnedFd>,
}

impl Manager {
    fn new(dir: &Path) -> Manager {
        let path = dir.join("notify.sock");
        let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(twill_e2e::PATIENCE)).unwrap();
        Manager { socket, path, kept: std::collections::BTreeMap::new() }
    }

    /// Starts the agent with what is kept, and hears it until it is ready and has given both.
    fn start(&mut self, site: &mut Site) {
        let agent = site.agent_command("");
        let mut shell = site.host.command("sh");
        let take = "exec 3<&0 4>&1 0</dev/null 1>/dev/null; LISTEN_PID=$$ exec \"$@\"";
        shell.args(["-c", if self.kept.is_empty() { "exec \"$@\"" } else { take }, "sh"]);
        shell.args(words(&agent)).env("NOTIFY_SOCKET", &self.path);
        let (tun, udp) = (self.kept.remove("twill-tun"), self.kept.remove("twill-udp"));
        if let (Some(tun), Some(udp)) = (tun, udp) {
            shell.env("LISTEN_FDS", "2").env("LISTEN_FDNAMES", "twill-tun:twill-udp");
            self.kept.insert("twill-tun".into(), tun.try_clone().unwrap());
            self.kept.insert("twill-udp".into(), udp.try_clone().unwrap());
            site.start_command(shell.stdin(Stdio::from(tun)).stdout(Stdio::from(udp)));
        } else {
            site.start_command(shell.stdin(Stdio::null()).stdout(Stdio::null()));
        }
        // It holds what it handed on.
        drop(shell);
        let (mut ready, mut stored) = (false, 0);
        while !ready || stored < 2 {
            let (text, fd) = self.hear();
            ready |= text.lines().any(|line| line == "READY=1");
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or_default();
            if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
                self.kept.remove(name);
            }
            if let (true, Some(fd)) = (text.lines().any(|line| line == "FDSTORE=1"), fd) {
                self.kept.insert(name.to_owned(), fd);
                stored += 1;
            }
        }
    }

    fn hear(&self) -> (String, Option<std::os::fd::OwnedFd>) {
        use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
        let mut bytes = [0; 4096];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [std::io::IoSliceMut::new(&mut bytes)];
        let got =
            recvmsg(&self.socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC).expect("the agent says something");
        let mut fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => rights.collect::<Vec<_>>(),
            _ => Vec::new(),
        });
        let fd = fds.next();
        drop(fds);
        (String::from_utf8_lossy(&bytes[..got.bytes]).into_owned(), fd)
    }
}

/// The agent's own words, without what moves it into its namespaces.
fn words(command: &Command) -> Vec<std::ffi::OsString> {
    let mut all = command.get_args().skip_while(|word| *word != "--").skip(1).map(ToOwned::to_owned);
    let words: Vec<_> = all.by_ref().collect();
    assert!(!words.is_empty(), "{command:?}");
    words
}

#[test]
fn killed_and_started_again_the_tunnel_needs_no_store() {
    let Some((mut net, _dir)) = running() else { return };
    // The peers are on disk once all is quiet.
    eventually("the tunnel is remembered", || {
        let text = std::fs::read_to_string(net.site(1).file("state/tunnel.json")).unwrap_or_default();
        if text.contains("100.96.2.0-24") { Ok(()) } else { Err(text) }
    });
    net.kill_store();
    net.await_both_ways();
    net.site_mut(1).stop(Signal::KILL);
    net.site_mut(1).start_at_once("");
    net.await_both_ways();
    let log = net.site(1).log();
    assert!(!log.contains("panicked"), "{log}");
    // With the store back, a peer that left meanwhile is forgotten.
    net.site_mut(2).stop(Signal::KILL);
    net.start_store();
    assert!(net.etcdctl(&["del", "/coreos.com/network/subnets/100.96.2.0-24"]).status.success());
    eventually("the peer is withdrawn", || {
        let status = net.site(1).status();
        if status["peers"] == 0 { Ok(()) } else { Err((status.to_string(), net.site(1).log())) }
    });
}

#[test]
fn a_listing_that_lacks_everybody_takes_no_peer_from_the_tunnel() {
    let Some((mut net, dir)) = running() else { return };
    eventually("the tunnel is remembered", || {
        let text = std::fs::read_to_string(net.site(1).file("state/tunnel.json")).unwrap_or_default();
        if text.contains("100.96.2.0-24") { Ok(()) } else { Err(text) }
    });
    net.kill_store();
    for number in [1, 2] {
        net.site_mut(number).stop(Signal::KILL);
    }
    // Another store under the same address: other cluster, nothing in it.
    std::fs::rename(dir.path().join("store"), dir.path().join("store.lost")).unwrap();
    net.start_store();
    assert!(net.etcdctl(&["put", "/coreos.com/network/config", twill_e2e::overlay::CONFIG]).status.success());
    net.site_mut(1).start("");
    let await_peers = |count: u64| {
        eventually(&format!("the tunnel reaches {count} peers"), || {
            let status = net.site(1).status();
            let strange = status["findings"].to_string().contains("strange-listing");
            let right = status["state"] == "running" && status["peers"] == count && strange == (count > 0);
            if right { Ok(()) } else { Err((status.to_string(), net.site(1).log())) }
        });
    };
    await_peers(1);
    assert!(std::fs::read_to_string(net.site(1).file("state/tunnel.json")).unwrap().contains("100.96.2.0-24"));
    net.site(1).twill("resync --accept").1.unwrap();
    await_peers(0);
}

#[test]
fn what_the_pumps_count_is_what_strace_counts() {
    let Some((bed, dir)) = place().filter(|_| installed("strace")) else { return };
    let mut net = Overlay::new(bed, dir.path());
    net.site_mut(2).start("");
    net.site(2).attach();
    let report = dir.path().join("strace.txt");
    let agent = net.site(1).agent_command("");
    let mut traced = net.site(1).host.command("strace");
    traced.args(["-f", "-c", "-e", "trace=readv,writev,sendmmsg,recvmmsg", "-o"]).arg(&report);
    traced.args(words(&agent)).stdin(Stdio::null()).stdout(Stdio::null());
    net.site_mut(1).start_command(&mut traced);
    eventually("the agent has its subnet", || std::fs::read_to_string(net.site(1).file("subnet.env")));
    net.site(1).attach();
    net.await_both_ways();
    transfer(&net.site(1).container, &net.site(2).container, "100.96.2.2:7000", "stream", &["5000000"]);
    // Nothing passes any more.
    let calls = eventually("the counters rest", || {
        let (one, two) = (net.site(1).status(), net.site(1).status());
        let calls = |status: &serde_json::Value| status["tunnel"]["calls"].clone();
        if calls(&one) == calls(&two) { Ok(calls(&two)) } else { Err(format!("{one}\n{two}")) }
    });
    // strace reports when its child, the agent, has ended.
    let strace = net.site(1).agent_pid().unwrap();
    let children = std::fs::read_to_string(format!("/proc/{strace}/task/{strace}/children")).unwrap();
    let agent = rustix::process::Pid::from_raw(children.trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(agent, Signal::TERM).unwrap();
    net.site_mut(1).take_agent().unwrap().wait();
    let text = std::fs::read_to_string(&report).unwrap();
    let counted = |name: &str| {
        let line = text.lines().find(|line| line.split_whitespace().last() == Some(name));
        line.and_then(|line| line.split_whitespace().nth(3)).map_or(0, |number| number.parse::<i64>().unwrap())
    };
    let told = |name: &str| calls[name].as_i64().unwrap();
    // The control socket and the log write now and then with writev as well; a packet may pass while the agent ends.
    for (call, told, more) in [
        ("readv", told("tun_reads"), 20),
        ("writev", told("tun_writes"), 60),
        ("sendmmsg", told("udp_sends"), 20),
        ("recvmmsg", told("udp_receives"), 20),
    ] {
        let counted = counted(call);
        assert!(counted >= told && counted <= told + more, "{call}: strace {counted}, the pumps {told}\n{text}");
    }
}

#[test]
fn top_shows_peers_with_their_counters() {
    let Some((net, _dir)) = running() else { return };
    transfer(&net.site(1).container, &net.site(2).container, "100.96.2.2:7000", "stream", &["5000000"]);
    let (code, out) = net.site(1).twill("top --count 1 -o json");
    let top: serde_json::Value = serde_json::from_str(&out.unwrap()).unwrap();
    assert_eq!((code, &top["schema"]), (Some(0), &json!(1)));
    let peer = &top["peers"][0];
    assert_eq!((&peer["lease"], &peer["host"]), (&json!("100.96.2.0-24"), &json!("10.168.0.3")));
    assert!(peer["sent"]["bytes"].as_u64().unwrap() > 5_000_000, "{peer}");
    assert!(peer["last_seen_ms"].as_u64().is_some(), "{peer}");
    let shown = net.site(1).twill("top --count 2").1.unwrap();
    for word in ["SUBNET", "100.96.2.0-24", "SEG/CALL", "GRO", "OUT BIT/s", "dropped", "crossings", "for each megabyte"]
    {
        assert!(shown.contains(word), "{word} in {shown}");
    }
}

#[test]
fn containers_on_two_hosts_reach_each_other_by_bare_packets_in_udp_8285() {
    let Some((mut net, _dir)) = running() else { return };
    // The kernel's objects: one address with the network's length, whose route the kernel makes.
    let host = &net.site(1).host;
    let link = &host.json("-d link show flannel0")[0];
    assert_eq!((&link["linkinfo"]["info_kind"], &link["mtu"]), (&json!("tun"), &json!(1472)));
    assert_eq!(link["txqlen"], 1000, "{link}");
    let route = host.run("ip route show dev flannel0");
    assert_eq!(route.trim(), "100.96.0.0/16 proto kernel scope link src 100.96.1.0");
    // The lease is flannel's: no type, no data; our identity comes last.
    let lease = net.lease(1);
    assert!(lease.starts_with(r#"{"PublicIP":"10.168.0.2","PublicIPv6":null,"Twill":{"node":""#), "{lease}");
    let env = std::fs::read_to_string(net.site(1).file("subnet.env")).unwrap();
    assert_eq!(
        env,
        "FLANNEL_NETWORK=100.96.0.0/16\nFLANNEL_SUBNET=100.96.1.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
    );
    // On the wire: the inner packet is the payload.
    if installed("tcpdump") {
        let dump = Capture::start(host, "eth0", &["-x", "-nn"], Some(2), "udp port 8285");
        net.site(1).container.run("ping -c 1 -W 5 -s 1000 100.96.2.2");
        let text = dump.text();
        assert!(text.contains("10.168.0.2.8285 > 10.168.0.3.8285: UDP, length 1028"), "{text}");
        // IPv4 header of the payload, at byte 28: version 4, 1028 bytes, TTL 63 (one router so far), ICMP, both containers.
        let hex: String =
            text.lines().skip(1).take(4).flat_map(|l| l.split(':').nth(1)).flat_map(|l| l.split_whitespace()).collect();
        let inner = &hex[56..96];
        assert!(
            inner.starts_with("45000404") && &inner[16..20] == "3f01" && inner.ends_with("6460010264600202"),
            "{inner}"
        );
    }
    let status = eventually("status shows the peer", || {
        let status = net.site(1).status();
        if status["peers"] == 1 { Ok(status) } else { Err(status) }
    });
    assert_eq!(status["backend"], "udp");
    assert_eq!(status["tunnel"]["local"], "10.168.0.2:8285");
    assert!(status["tunnel"]["sent"]["packets"].as_u64().unwrap() >= 3, "{status}");
    // `clean` leaves no TUN, so that flanneld gets flannel0.
    assert_eq!(net.site_mut(1).stop(Signal::TERM), Some(0));
    let (code, out) = net.site(1).twill("clean");
    assert_eq!(code, Some(0), "{out:?}");
    let links = net.site(1).host.json("link show");
    assert!(links.as_array().unwrap().iter().all(|link| link["ifname"] != "flannel0"), "{links}");
    assert!(net.site(1).host.run("ip route show").contains("10.168.0.0/24"));
}
