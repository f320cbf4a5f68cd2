//! The networks that are compared: Twill's by its agents, all others by hand on a pair of hosts that has nothing else.
//!
//! ```text
//!   container 100.96.1.2 ─ docker0 ─ flannel0 ─ agent ─ node1 ══ node2 ─ …            Twill, crates/e2e/src/overlay.rs
//!
//!   container 10.{2..5}.1.2 ─ docker0 ─┬─ vxlan1 ─────────────┬─ host1 10.168.0.2 ══ 10.168.0.3 host2 ─ …
//!                                      ├─ (a route) ──────────┤
//!                                      ├─ naive0 ─ a thread ──┤
//!                                      └─ many0 ─── a tunnel ─┘
//! ```

use std::net::Ipv4Addr;

use twill_e2e::net::{Bed, Host};
use twill_e2e::overlay::Overlay;

use super::load::Way;
use super::naive;

/// How a packet goes from one host to the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Net {
    /// Through the agents' tunnel.
    Twill,
    /// The kernel's VXLAN.
    Vxlan,
    /// A route to the other host.
    Routes,
    /// A naive tunnel.
    Naive,
    /// A tunnel of this program's own, with as many peers as wanted.
    Many,
    /// From host to host, without containers.
    Underlay,
}

impl Net {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Net::Twill => "twill udp",
            Net::Vxlan => "kernel VXLAN",
            Net::Routes => "host routes",
            Net::Naive => "naive tunnel",
            Net::Many => "tunnel alone",
            Net::Underlay => "underlay",
        }
    }
}

/// Both pairs of hosts.
pub(crate) struct Nets {
    pub(crate) overlay: Overlay,
    hand: Hand,
    _dir: tempfile::TempDir,
}

impl Nets {
    /// Everything up, and every way walked once.
    pub(crate) fn new() -> Nets {
        let dir = tempfile::tempdir().unwrap();
        // What masquerading costs has nothing to do with how packets are carried, and by hand there is none (docs/decisions/0017).
        let overlay = Overlay::running_with(Bed::new().expect("needs root"), dir.path(), "--ip-masq=false");
        let nets = Nets { overlay, hand: Hand::new(), _dir: dir };
        for net in [Net::Twill, Net::Vxlan, Net::Routes, Net::Naive, Net::Underlay] {
            let way = nets.way(net);
            way.from.run(&format!("ping -n -q -c 1 -W 5 {}", way.address));
        }
        nets
    }

    /// From the first container (or host) to the second.
    pub(crate) fn way(&self, net: Net) -> Way<'_> {
        let [one, two] = &self.hand.containers;
        let (from, to, address) = match net {
            Net::Twill => (&self.overlay.site(1).container, &self.overlay.site(2).container, [100, 96, 2, 2]),
            Net::Vxlan => (one, two, [10, 2, 2, 2]),
            Net::Routes => (one, two, [10, 3, 2, 2]),
            Net::Naive => (one, two, [10, 4, 2, 2]),
            Net::Many => (one, two, [10, 5, 2, 2]),
            Net::Underlay => (&self.hand.hosts[0], &self.hand.hosts[1], [10, 168, 0, 3]),
        };
        Way { from, to, address: Ipv4Addr::from(address) }
    }

    /// A host that has nothing but what stands by hand.
    pub(crate) fn by_hand(&self, number: usize) -> &Host {
        &self.hand.hosts[number]
    }

    /// Makes the underlays' devices as a plain network card is: frames of the MTU go out, and the receiver merges them.
    pub(crate) fn cut_on_the_wire(&self, cut: bool) {
        let gro = if cut { "on" } else { "off" };
        let word = if cut { "off" } else { "on" };
        let ours = [&self.overlay.site(1).host, &self.overlay.site(2).host];
        for host in ours.into_iter().chain(&self.hand.hosts) {
            host.run(&format!(
                "ethtool -K eth0 tso {word} tx-udp-segmentation {word} tx-udp_tnl-segmentation {word} \
                 tx-udp_tnl-csum-segmentation {word} gro {gro}"
            ));
        }
    }
}

/// What stands by hand.
struct Hand {
    containers: [Host; 2],
    hosts: [Host; 2],
    _bed: Bed,
}

impl Hand {
    fn new() -> Hand {
        let bed = Bed::new().unwrap();
        let hosts = [bed.host("host1"), bed.host("host2")];
        let containers = [bed.host("c1"), bed.host("c2")];
        bed.wire(&hosts[0], "eth0", &hosts[1], "eth0");
        for n in 0..2 {
            let (own, peer) = (1 + n, 2 - n);
            let (host, container) = (&hosts[n], &containers[n]);
            host.ip(&format!("addr add 10.168.0.{}/24 dev eth0", 1 + own));
            host.run("sysctl -qw net.ipv4.ip_forward=1");
            bed.wire(container, "eth0", host, "docker0");
            host.ip(&format!("link add vxlan1 address 02:00:00:00:00:{own} mtu 1450 type vxlan id 1 dev eth0 local 10.168.0.{} dstport 8472 nolearning", 1 + own));
            host.ip(&format!("addr add 10.2.{own}.0/32 dev vxlan1"));
            host.ip("link set vxlan1 up");
            host.ip(&format!("neigh add 10.2.{peer}.0 lladdr 02:00:00:00:00:{peer} dev vxlan1 nud permanent"));
            host.run(&format!("bridge fdb add 02:00:00:00:00:{peer} dev vxlan1 dst 10.168.0.{}", 1 + peer));
            let at = |n: usize| format!("10.168.0.{}:9000", 1 + n).parse().unwrap();
            naive::start(host, at(own), at(peer));
            host.ip(&format!("link set {} mtu 1472 up", naive::DEVICE));
            let ways = [
                (2, 1450, format!("via 10.2.{peer}.0 dev vxlan1 onlink")),
                (3, 1500, format!("via 10.168.0.{}", 1 + peer)),
                (4, 1472, format!("dev {}", naive::DEVICE)),
            ];
            for (net, _, way) in &ways {
                host.ip(&format!("route add 10.{net}.{peer}.0/24 {way}"));
            }
            // The route to 10.5 comes with its device.
            for (net, mtu) in ways.iter().map(|(net, mtu, _)| (*net, *mtu)).chain([(5, 1472)]) {
                host.ip(&format!("addr add 10.{net}.{own}.1/24 dev docker0"));
                container.ip(&format!("addr add 10.{net}.{own}.2/24 dev eth0"));
                container.ip(&format!("route add 10.{net}.{peer}.0/24 via 10.{net}.{own}.1 mtu {mtu}"));
            }
        }
        Hand { containers, hosts, _bed: bed }
    }
}
