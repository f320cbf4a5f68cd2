//! An explanation from live kernel state: alter one entry by hand, and the explanation changes; it stops where a real packet gets
//! no answer, and arrives where one does.
//!
//! ```text
//!  container-1 10.1.15.2          container-2 10.1.16.3
//!        │eth0                          │eth0
//!  node1: docker0 10.1.15.1       node2: docker0 10.1.16.1
//!         flannel.1 10.1.15.0            flannel.1 10.1.16.0
//!         eth0 10.168.0.2                eth0 10.168.0.3
//!           └──p1── underlay: br0 ──p2─────┘
//! ```
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test file: it fails and skips aloud")]
#![allow(clippy::disallowed_methods, reason = "the test builds its network with ip(8), from outside the product")]

use std::path::Path;
use std::process::Command;

use twill_explain::facts::lookup;
use twill_explain::{Code, Explanation, Facts, RouteQuery, Verdict, ends, explain};
use twill_kernel::netns::Netns;
use twill_lab::facts::LiveFacts;

/// Without root: runs this test again in a user namespace of its own, and is true when that has been done (or cannot be).
fn done_as_another_user(test: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        return false;
    }
    let inside = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user"]);
        command
    };
    let proof = inside().args(["unshare", "--net", "true"]).output();
    if !proof.as_ref().is_ok_and(|out| out.status.success()) {
        println!("SKIP: no root, and no user namespace with a network: {proof:?}");
        return true;
    }
    let out = inside().arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]).output().unwrap();
    assert!(out.status.success(), "{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    true
}

/// Namespaces that exist as long as this does.
struct Net(Vec<(&'static str, Netns)>);

const MACS: [&str; 2] = ["5e:f8:4f:00:e3:01", "5e:f8:4f:00:e3:02"];

impl Net {
    /// The drawing above, healthy.
    fn new() -> Net {
        let names = ["node1", "node2", "container-1", "container-2", "underlay"];
        let net = Net(names.iter().map(|name| (*name, Netns::create().unwrap())).collect());
        net.ip("underlay", "link add br0 type bridge");
        net.ip("underlay", "link set br0 up");
        for n in [1, 2] {
            net.node(n);
        }
        net
    }

    fn node(&self, n: u8) {
        let (name, container) = (format!("node{n}"), format!("container-{n}"));
        let (net, peer, host) = (14 + n, 17 - n, n + 1);
        self.ip(&name, "link set lo up");
        self.pair(&name, "eth0", "underlay", &format!("p{n}"));
        self.ip("underlay", &format!("link set p{n} master br0"));
        self.ip(&name, "link add docker0 type bridge");
        self.ip(&name, "link set docker0 up");
        self.pair(&container, "eth0", &name, "veth1");
        self.ip(&name, "link set veth1 master docker0");
        self.ip(&name, &format!("addr add 10.168.0.{host}/24 dev eth0"));
        self.ip(&name, &format!("addr add 10.1.{net}.1/24 dev docker0"));
        self.ip(&name, &format!("addr add fd00:{net}::1/64 dev docker0 nodad"));
        self.ip(&container, &format!("addr add 10.1.{net}.{host}/24 dev eth0"));
        self.ip(&container, &format!("addr add fd00:{net}::{host}/64 dev eth0 nodad"));
        self.ip(&container, &format!("route add default via 10.1.{net}.1"));
        self.ip(&container, &format!("route add default via fd00:{net}::1"));
        let local = format!("local 10.168.0.{host} dev eth0");
        self.ip(&name, &format!("link add flannel.1 type vxlan id 1 dstport 8472 {local} nolearning"));
        self.ip(&name, &format!("link set flannel.1 address {} up", MACS[usize::from(n - 1)]));
        self.ip(&name, &format!("addr add 10.1.{net}.0/32 dev flannel.1"));
        self.ip(&name, &format!("addr add fd00:{net}::/128 dev flannel.1 nodad"));
        let mac = MACS[usize::from(2 - n)];
        for (via, dst) in [
            (format!("10.1.{peer}.0"), format!("10.1.{peer}.0/24")),
            (format!("fd00:{peer}::"), format!("fd00:{peer}::/64")),
        ] {
            self.ip(&name, &format!("neigh add {via} lladdr {mac} dev flannel.1 nud permanent"));
            self.ip(&name, &format!("route add {dst} via {via} dev flannel.1 onlink proto 116"));
        }
        self.run(&name, &format!("bridge fdb add {mac} dev flannel.1 dst 10.168.0.{}", 5 - host));
        self.sysctl(&name, "net/ipv4/ip_forward", "1");
        self.sysctl(&name, "net/ipv6/conf/all/forwarding", "1");
    }

    fn netns(&self, name: &str) -> &Netns {
        &self.0.iter().find(|(n, _)| *n == name).unwrap().1
    }

    /// A veth pair between two places, both ends up.
    fn pair(&self, a: &str, a_dev: &str, b: &str, b_dev: &str) {
        // The descriptor is the other namespace's handle; `ip` finds it through this process.
        let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(self.netns(b)));
        let path = format!("/proc/{}/fd/{fd}", std::process::id());
        self.ip(a, &format!("link add {a_dev} type veth peer name {b_dev} netns {path}"));
        self.ip(a, &format!("link set {a_dev} up"));
        self.ip(b, &format!("link set {b_dev} up"));
    }

    fn ip(&self, place: &str, words: &str) {
        self.run(place, &format!("ip {words}"));
    }

    fn run(&self, place: &str, line: &str) {
        let mut words = line.split_whitespace();
        let program = words.next().unwrap();
        let out = self.netns(place).run(|| Command::new(program).args(words).output().unwrap()).unwrap();
        assert!(out.status.success(), "{place}: `{line}`: {}", String::from_utf8_lossy(&out.stderr));
    }

    fn sysctl(&self, place: &str, path: &str, value: &str) {
        self.netns(place).run(|| std::fs::write(Path::new("/proc/sys").join(path), value).unwrap()).unwrap();
    }

    fn facts(&self) -> LiveFacts {
        let copy = |(name, netns): &(&str, Netns)| {
            let again = Netns::open(Path::new(&format!(
                "/proc/self/fd/{}",
                std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(netns))
            )));
            ((*name).to_owned(), again.unwrap())
        };
        LiveFacts::read(self.0.iter().map(copy).collect()).unwrap()
    }

    fn explain(&self, a: &str, b: &str, v6: bool) -> Explanation {
        let facts = self.facts();
        let (from, to) = ends(&facts, a, b, v6).unwrap();
        explain(&facts, &from, &to)
    }

    /// One real packet from container-1 to container-2, and its answer.
    fn ping(&self) -> bool {
        let words = ["-c", "1", "-W", "1", "10.1.16.3"];
        self.netns("container-1").run(|| Command::new("ping").args(words).output().unwrap()).unwrap().status.success()
    }

    /// The way there stops for this cause at this place, and a real packet gets no answer.
    fn stops(&self, code: Code, at: &str) {
        let explanation = self.explain("container-1", "container-2", false);
        match &explanation.there.verdict {
            Verdict::Stops { code: found, place, .. } => {
                assert_eq!((*found, place.as_str()), (code, at), "{explanation}")
            }
            Verdict::Arrives => panic!("it arrives\n{explanation}"),
        }
        assert!(!self.ping(), "a real packet is answered\n{explanation}");
    }

    /// Both ways arrive, and a real packet is answered (as soon as ARP has asked again).
    fn arrives(&self) {
        let explanation = self.explain("container-1", "container-2", false);
        assert!(explanation.arrives(), "{explanation}");
        assert!((0..20).any(|_| self.ping()), "no real packet is answered\n{explanation}");
    }
}

/// Where, what is broken and how it is mended, and what the explanation then says.
const ENTRIES: [(&str, &str, &str, Code, &str); 7] = [
    (
        "node1",
        "bridge fdb del 5e:f8:4f:00:e3:02 dev flannel.1",
        "bridge fdb add 5e:f8:4f:00:e3:02 dev flannel.1 dst 10.168.0.3",
        Code::NoFdbEntry,
        "node1",
    ),
    (
        "node1",
        "bridge fdb replace 5e:f8:4f:00:e3:02 dev flannel.1 dst 10.168.0.77",
        "bridge fdb replace 5e:f8:4f:00:e3:02 dev flannel.1 dst 10.168.0.3",
        Code::NobodyAnswers,
        "node1",
    ),
    (
        "node1",
        "ip neigh del 10.1.16.0 dev flannel.1",
        "ip neigh replace 10.1.16.0 lladdr 5e:f8:4f:00:e3:02 dev flannel.1 nud permanent",
        Code::NoNeighbour,
        "node1",
    ),
    (
        "node2",
        "ip link set flannel.1 address 5e:f8:4f:00:e3:99",
        "ip link set flannel.1 address 5e:f8:4f:00:e3:02",
        Code::MacNotOurs,
        "node2",
    ),
    (
        "node1",
        "ip route del 10.1.16.0/24",
        "ip route add 10.1.16.0/24 via 10.1.16.0 dev flannel.1 onlink proto 116",
        Code::NoRoute,
        "node1",
    ),
    ("node1", "ip route add 10.1.16.0/25 dev docker0", "ip route del 10.1.16.0/25", Code::NobodyAnswers, "node1"),
    ("node1", "ip route add blackhole 10.1.16.3", "ip route del 10.1.16.3", Code::RouteRefuses, "node1"),
];

#[test]
fn each_entry_altered_by_hand_changes_the_explanation() {
    if done_as_another_user("each_entry_altered_by_hand_changes_the_explanation") {
        return;
    }
    let net = Net::new();
    net.arrives();
    let v6 = net.explain("container-1", "container-2", true);
    assert!(v6.arrives() && v6.there.from.address.is_ipv6(), "{v6}");
    for (a, b) in [("node1", "node2"), ("node1", "container-2"), ("container-2", "node1")] {
        assert!(net.explain(a, b, false).arrives(), "{a} → {b}");
    }
    for (place, fault, fix, code, at) in ENTRIES {
        net.run(place, fault);
        net.stops(code, at);
        net.run(place, fix);
        // A changed MAC dropped the neighbours of node2's tunnel: the way back needs its own again.
        net.run("node2", "ip neigh replace 10.1.15.0 lladdr 5e:f8:4f:00:e3:01 dev flannel.1 nud permanent");
        net.arrives();
    }
    for (hide, show) in [
        ("route prepend 10.1.16.0/24 dev docker0", "route del 10.1.16.0/24 dev docker0"),
        ("route add 10.1.16.0/24 dev docker0 table 77", "route flush table 77"),
    ] {
        net.ip("node1", "rule add to 10.1.16.0/24 lookup 77 priority 99");
        net.ip("node1", hide);
        let explanation = net.explain("container-1", "container-2", false).to_string();
        assert!(
            explanation.contains("hides: 10.1.16.0/24 via 10.1.16.0 dev flannel.1 proto 116 onlink"),
            "{explanation}"
        );
        net.stops(Code::NobodyAnswers, "node1");
        net.ip("node1", show);
        net.ip("node1", "rule del priority 99");
        net.arrives();
    }
    net.sysctl("node2", "net/ipv4/ip_forward", "0");
    net.stops(Code::ForwardingOff, "node2");
    net.sysctl("node2", "net/ipv4/ip_forward", "1");
    // The kernel's own refusal: the way back to 10.1.15.2 no longer leaves by the tunnel.
    net.sysctl("node2", "net/ipv4/conf/all/rp_filter", "1");
    net.ip("node2", "route replace 10.1.15.0/24 via 10.168.0.2 dev eth0 proto 116");
    net.stops(Code::ReversePath, "node2");
}

/// The twin's lookup is what the kernel answers, where there are no policy rules.
#[test]
fn the_twin_looks_routes_up_as_the_kernel_does() {
    if done_as_another_user("the_twin_looks_routes_up_as_the_kernel_does") {
        return;
    }
    let net = Net::new();
    net.ip("node1", "route add 10.1.16.0/25 dev docker0 metric 9");
    net.ip("node1", "route add 10.1.16.0/25 dev eth0 metric 3");
    net.ip("node1", "route add blackhole 10.9.0.0/16");
    let facts = net.facts();
    for place in facts.places() {
        for dst in [
            "10.1.15.1",
            "10.1.15.2",
            "10.1.16.3",
            "10.1.16.200",
            "10.168.0.3",
            "8.8.8.8",
            "10.9.1.1",
            "fd00:16::3",
            "fd00:99::1",
        ] {
            let query = RouteQuery { dst: dst.parse().unwrap(), src: None, iif: None, oif: None };
            let (kernel, twin) = (facts.route(place, &query), lookup(facts.place(place).unwrap(), &query));
            let way = |a: &Result<twill_explain::RouteAnswer, _>| {
                a.as_ref().ok().map(|a| (a.kind, a.via, a.dev.filter(|_| a.kind == 1)))
            };
            assert_eq!(way(&kernel), way(&twin), "{place} → {dst}: {kernel:?} {twin:?}");
        }
    }
}
