//! Attaching containers: our plugin, and Debian's bridge with host-local, call by call in turn.
//!
//! Not twice within some minutes on ext4 without a journal, nor where many files have just been deleted: there a new file costs
//! up to a millisecond for that (docs/decisions/0007), and this part ends with deleting 60,000.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType};
use serde_json::{Value, json};
use twill_e2e::cni::{Call, netns, start};
use twill_e2e::net::{Bed, Host};

use crate::report::{Report, median};

/// Where Debian puts the reference plugins.
const REFERENCE: &str = "/usr/lib/cni";
/// Pods that start at once.
const PODS: usize = 110;
/// Calls of each kind.
const CALLS: usize = 40;
/// A device that is deleted has been there for a while: the kernel has done by then what it puts off when one comes up, or goes.
const SETTLED: Duration = Duration::from_millis(50);

/// One of the two, on a host of its own.
struct Side<'a> {
    host: &'a Host,
    program: PathBuf,
    conf: Value,
}

impl Side<'_> {
    /// Starts a call in the host's namespace, with nothing between us and the plugin.
    fn start(&self, verb: &str, id: &str, container: &Host) -> Child {
        let mut command = Command::new(&self.program);
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", REFERENCE);
        start(command.env("CNI_NETNS", netns(container)), self.conf.to_string().as_bytes())
    }

    /// Milliseconds of one call.
    fn time(&self, verb: &str, id: &str, container: &Host) -> f64 {
        let start = Instant::now();
        finish(self.start(verb, id, container));
        start.elapsed().as_secs_f64() * 1e3
    }

    /// Milliseconds until all pods are attached.
    fn at_once(&self, pods: &[Host]) -> f64 {
        let start = Instant::now();
        let calls: Vec<Child> = pods.iter().map(|pod| self.start("ADD", &pod.name, pod)).collect();
        calls.into_iter().for_each(finish);
        let took = start.elapsed().as_secs_f64() * 1e3;
        pods.iter().for_each(|pod| finish(self.start("DEL", &pod.name, pod)));
        took
    }
}

fn finish(child: Child) {
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

/// Moves this thread to a host: what it starts from now on is there.
fn enter(host: &Host) {
    twill_e2e::net::enter(&std::fs::File::open(netns(host)).unwrap());
}

/// Runs all of it.
pub(crate) fn run(plugin: &Path, report: &mut Report) {
    assert!(Path::new(REFERENCE).join("bridge").exists(), "install containernetworking-plugins");
    let home = std::fs::File::open("/proc/self/ns/net").unwrap();
    assert!(home.as_raw_fd() >= 0);
    let dir = tempfile::tempdir().unwrap();
    let bed = Bed::new().unwrap();
    let hosts = [bed.host("ours"), bed.host("theirs")];
    let conf = |name: &str| {
        json!({"cniVersion": "1.0.0", "name": name, "type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "mtu": 1450,
            "hairpinMode": true, "stateDir": dir.path().join("state"),
            "ipam": {"type": "host-local", "dataDir": dir.path().join("networks"), "ranges": [[{"subnet": "10.1.15.0/24"}]]}})
    };
    let ours = Side { host: &hosts[0], program: plugin.to_owned(), conf: conf("ours") };
    let theirs = Side { host: &hosts[1], program: Path::new(REFERENCE).join("bridge"), conf: conf("theirs") };
    one_by_one(&bed, &ours, &theirs, report);
    at_once(&bed, &ours, &theirs, report);
    full(&ours, dir.path(), report);
    twill_e2e::net::enter(&home);
}

fn one_by_one(bed: &Bed, ours: &Side<'_>, theirs: &Side<'_>, report: &mut Report) {
    let container = bed.host("c");
    let (mut add, mut del, mut bare) = ([vec![], vec![]], [vec![], vec![]], vec![]);
    for _ in 0..CALLS {
        for (n, side) in [ours, theirs].into_iter().enumerate() {
            enter(side.host);
            // What the kernel puts off when the device before it goes is not this one's.
            std::thread::sleep(SETTLED);
            add[n].push(side.time("ADD", "c", &container));
            std::thread::sleep(SETTLED);
            del[n].push(side.time("DEL", "c", &container));
        }
        let host = ours.host;
        host.ip(&format!("link add bare0 type veth peer name eth0 netns {}", container.pid()));
        host.ip("link set bare0 up master cni0");
        container.ip("link set eth0 up");
        container.ip("addr add 10.1.15.250/24 dev eth0");
        enter(host);
        std::thread::sleep(SETTLED);
        bare.push(delete("bare0"));
    }
    report.note("CNI ADD by Debian's bridge + host-local (ms)", &add[1]);
    report.note("CNI ADD by Twill (ms)", &add[0]);
    report.at_most("CNI ADD against Debian's (×)", &[median(&add[0]) / median(&add[1])], 0.25);
    report.note("CNI DEL by Debian's bridge + host-local (ms)", &del[1]);
    report.note("a bare RTM_DELLINK of such a pair (ms)", &bare);
    report.at_most("CNI DEL by Twill (ms)", &del[0], median(&bare) + 5.0);
}

/// Milliseconds from RTM_DELLINK to the kernel's acknowledgement.
fn delete(device: &str) -> f64 {
    use rustix::net::netlink::SocketAddrNetlink;
    let socket = rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0)).unwrap();
    let index = rustix::net::netdevice::name_to_index(&socket, device).unwrap();
    // struct nlmsghdr (length, RTM_DELLINK, NLM_F_REQUEST | NLM_F_ACK, number, port), struct ifinfomsg (family and type, index, flags).
    let words = [32, 5 << 16 | 17, 1, 0, 0, index, 0, 0];
    let message: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    let mut answer = [0; 256];
    let start = Instant::now();
    rustix::net::send(&socket, &message, SendFlags::empty()).unwrap();
    rustix::net::recv(&socket, &mut answer, RecvFlags::empty()).unwrap();
    let took = start.elapsed().as_secs_f64() * 1e3;
    assert_eq!(answer[16..20], [0; 4], "the kernel deletes {device}");
    took
}

fn at_once(bed: &Bed, ours: &Side<'_>, theirs: &Side<'_>, report: &mut Report) {
    let pods: Vec<Host> = (0..PODS).map(|n| bed.host(&format!("p{n}"))).collect();
    let mut took = [vec![], vec![]];
    for _ in 0..3 {
        for (n, side) in [ours, theirs].into_iter().enumerate() {
            enter(side.host);
            took[n].push(side.at_once(&pods));
        }
    }
    report.note("110 pods at once by Debian's (ms)", &took[1]);
    report.note("110 pods at once by Twill (ms)", &took[0]);
    report.at_most("110 pods at once against Debian's (×)", &[median(&took[0]) / median(&took[1])], 0.3);
}

/// Addresses alone, none held and 60,000.
fn full(ours: &Side<'_>, dir: &Path, report: &mut Report) {
    let alone = |name: &str| {
        json!({"cniVersion": "1.0.0", "name": name, "type": "other", "ipam": {"type": "host-local", "subnet": "10.8.0.0/15",
            "dataDir": dir.join("networks")}})
    };
    let folder = dir.join("networks/full");
    std::fs::create_dir_all(&folder).unwrap();
    for n in 2..60_002u32 {
        let ip = std::net::Ipv4Addr::from_bits(u32::from_be_bytes([10, 8, 0, 0]) + n);
        std::fs::write(folder.join(ip.to_string()), "somebody\r\neth0").unwrap();
    }
    std::fs::write(folder.join("last_reserved_ip.0"), "10.8.234.97").unwrap();
    let mut samples = [vec![], vec![]];
    for n in 0..CALLS {
        for (which, name) in ["empty", "full"].into_iter().enumerate() {
            let conf = alone(name);
            let id = format!("c{n}");
            let call = Call { verb: "ADD", conf: &conf, id: &id, netns: None, args: "" };
            let begun = Instant::now();
            let mut command = Command::new(&ours.program);
            command.env("CNI_COMMAND", call.verb).env("CNI_CONTAINERID", call.id).env("CNI_IFNAME", "eth0");
            finish(start(command, conf.to_string().as_bytes()));
            samples[which].push(begun.elapsed().as_secs_f64() * 1e3);
        }
    }
    report.note("an address, none held (ms)", &samples[0]);
    report.note("an address, 60,000 held (ms)", &samples[1]);
    report.at_most("an address, 60,000 held against none (×)", &[median(&samples[1]) / median(&samples[0])], 1.25);
}
