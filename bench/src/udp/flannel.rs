//! The real flannel with its udp backend, on a pair of hosts of its own, where it is built (`scripts/install-test-needs`).

use std::net::Ipv4Addr;
use std::path::Path;

use twill_e2e::flannel::flanneld;
use twill_e2e::net::{Bed, Host};
use twill_e2e::node::{Daemon, spawn};
use twill_e2e::{bin, eventually};

use super::load::{self, Way};
use super::nets::{Net, Nets};
use super::{of, ratios};
use crate::report::Report;

const STORE: &str = "http://10.168.0.2:2379";

/// TCP, 64-byte UDP and RTT of both, in turn.
pub(crate) fn run(nets: &Nets, number: usize, report: &mut Report) {
    let tools = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tools"));
    if !tools.join("flanneld").is_file() {
        return println!("SKIP: {} has no flanneld", tools.display());
    }
    let theirs = Flannel::new(tools);
    let (mut tcp, mut udp, mut rtt) = ([vec![], vec![]], [vec![], vec![]], [vec![], vec![]]);
    for _ in 0..number {
        for (n, way) in [nets.way(Net::Twill), theirs.way()].into_iter().enumerate() {
            tcp[n].push(load::clean(|| load::tcp(way, 1)));
            udp[n].push(load::clean(|| load::udp(way, None)));
            rtt[n].push(load::clean(|| load::ping(way)).0);
        }
    }
    let name = "flannel v0.27.4 udp";
    let gbits = tcp.each_ref().map(|samples| of(samples, |s| s.gbits));
    report.note(&format!("TCP, {name} (Gbit/s)"), &gbits[1]);
    report.note("TCP, twill udp against flannel's (×)", &ratios(&gbits[0], &gbits[1]));
    let cpu = tcp.each_ref().map(|samples| of(samples, |s| s.cpu));
    report.note("TCP, processors' time for a megabyte, twill udp against flannel's (×)", &ratios(&cpu[0], &cpu[1]));
    let received = udp.each_ref().map(|samples| of(samples, |s| s.received));
    report.note("64-byte UDP received, twill udp against flannel's (×)", &ratios(&received[0], &received[1]));
    report.note(&format!("RTT, {name} (ms)"), &rtt[1]);
}

struct Flannel {
    containers: [Host; 2],
    to: Ipv4Addr,
    _daemons: [Daemon; 3],
    _hosts: [Host; 2],
    _dir: tempfile::TempDir,
    _bed: Bed,
}

impl Flannel {
    fn new(tools: &Path) -> Flannel {
        let bed = Bed::new().unwrap();
        let (hosts, containers) = ([bed.host("host1"), bed.host("host2")], [bed.host("c1"), bed.host("c2")]);
        let dir = tempfile::tempdir().unwrap();
        bed.wire(&hosts[0], "eth0", &hosts[1], "eth0");
        for (n, host) in hosts.iter().enumerate() {
            host.ip(&format!("addr add 10.168.0.{}/24 dev eth0", 2 + n));
        }
        let mut store = hosts[0].command(bin("twill"));
        store
            .args(["store", "serve", "--listen", "10.168.0.2:2379", "--insecure", "--data"])
            .arg(dir.path().join("store"));
        store.args(["--network", "100.97.0.0/16", "--backend", "udp"]);
        let store = spawn(store, &dir.path().join("store.log"));
        eventually("the store answers", || {
            let out = hosts[0].command(bin("twill")).args(["store", "ls", "--store", STORE]).output().unwrap();
            if out.status.success() { Ok(()) } else { Err(out) }
        });
        let mut to = Ipv4Addr::UNSPECIFIED;
        let daemons = [0, 1].map(|n| {
            let (host, container, files) = (&hosts[n], &containers[n], dir.path().join(&hosts[n].name));
            std::fs::create_dir(&files).unwrap();
            let daemon = flanneld(tools.join("flanneld"), host, STORE, &files, "");
            let env = std::fs::read_to_string(files.join("subnet.env")).unwrap();
            let gateway =
                env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")?.strip_suffix("/24")).unwrap();
            let gateway: Ipv4Addr = gateway.parse().unwrap();
            to = Ipv4Addr::from(u32::from(gateway) + 1);
            host.run("sysctl -qw net.ipv4.ip_forward=1");
            bed.wire(container, "eth0", host, "docker0");
            host.ip(&format!("addr add {gateway}/24 dev docker0"));
            container.ip(&format!("addr add {to}/24 dev eth0"));
            container.ip(&format!("route add default via {gateway} mtu 1472"));
            daemon
        });
        let [one, two] = daemons;
        let net = Flannel { containers, to, _daemons: [one, two, store], _hosts: hosts, _dir: dir, _bed: bed };
        let way = net.way();
        eventually("flannel's tunnel carries packets", || {
            let out = way.from.try_run(&format!("ping -n -q -c 1 -W 1 {}", way.address));
            if out.status.success() { Ok(()) } else { Err(out) }
        });
        net
    }

    fn way(&self) -> Way<'_> {
        Way { from: &self.containers[0], to: &self.containers[1], address: self.to }
    }
}
