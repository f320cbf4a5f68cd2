//! A node with a container behind a bridge, and what a peer sees of it.
//!
//! ```text
//!   container 10.1.15.2 ─ cni0 10.1.15.1 ┬ node ─ eth0 10.168.0.2 ───── eth0 10.168.0.3 ─ other (knows no way to 10.1.0.0/16 but its tunnel)
//!                                        └ flannel.1 ···············    flannel.1 10.1.40.0
//! ```

use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::capture::Capture;
use crate::eventually;
use crate::net::{Bed, Host};
use crate::node::Node;

/// The node and its container.
#[derive(Debug)]
pub struct Site {
    /// The node.
    pub node: Node,
    /// The container's namespace.
    pub container: Host,
}

impl Site {
    /// Both, with the node's files below `dir`.
    pub fn new(bed: Bed, dir: &Path) -> Site {
        let container = bed.host("container");
        Site { node: Node::new(bed, dir), container }
    }

    /// Both hosts have an IPv6 address on the wire as well.
    pub fn speak_ipv6(&self) {
        self.node.host.ip("addr add fd00:168::2/64 dev eth0 nodad");
        self.node.other.ip("addr add fd00:168::3/64 dev eth0 nodad");
    }

    /// The container, on a bridge with the first address of the node's subnet, as a plugin makes it once the subnet is known.
    pub fn plug(&self) {
        let host = &self.node.host;
        host.ip("link add cni0 type bridge");
        host.ip(&format!("link add veth0 type veth peer name eth0 netns {}", self.container.pid()));
        for line in ["addr add 10.1.15.1/24 dev cni0", "link set cni0 up", "link set veth0 master cni0 up"] {
            host.ip(line);
        }
        for line in ["addr add 10.1.15.2/24 dev eth0", "link set eth0 up", "route add default via 10.1.15.1"] {
            self.container.ip(line);
        }
    }

    /// `other` becomes peer 40 with a VTEP of its own: nothing there knows a way to 10.1.0.0/16 but through the tunnel.
    pub fn peer(&self) {
        let lease = r#"{"PublicIP":"10.168.0.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:28"}}"#;
        self.node.put("subnets/10.1.40.0-24", lease);
        let mac = self.node.host.json("link show flannel.1")[0]["address"].as_str().unwrap().to_owned();
        for line in [
            "link add flannel.1 address 02:00:00:00:00:28 mtu 1450 type vxlan id 1 dev eth0 local 10.168.0.3 dstport 8472 nolearning",
            "addr add 10.1.40.0/32 dev flannel.1",
            "link set flannel.1 up",
            "route add 10.1.15.0/24 via 10.1.15.0 dev flannel.1 onlink",
            &format!("neigh add 10.1.15.0 lladdr {mac} dev flannel.1 nud permanent"),
        ] {
            self.node.other.ip(line);
        }
        self.node.other.run(&format!("bridge fdb add {mac} dev flannel.1 dst 10.168.0.2"));
    }

    /// As [`Site::plug`], with IPv6 alone, or beside it.
    pub fn plug6(&self) {
        let host = &self.node.host;
        if !host.try_run("ip link show cni0").status.success() {
            host.ip("link add cni0 type bridge");
            host.ip(&format!("link add veth0 type veth peer name eth0 netns {}", self.container.pid()));
        }
        for line in ["addr add fd00:1:0:f::1/64 dev cni0 nodad", "link set cni0 up", "link set veth0 master cni0 up"] {
            host.ip(line);
        }
        for line in [
            "addr add fd00:1:0:f::2/64 dev eth0 nodad",
            "link set eth0 up",
            "route add default via fd00:1:0:f::1 dev eth0",
        ] {
            self.container.ip(line);
        }
    }

    /// As [`Site::peer`], with IPv6 alone.
    pub fn peer6(&self) {
        let lease = r#"{"PublicIP":null,"PublicIPv6":"fd00:168::3","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:28"}}"#;
        self.node.put("subnets/0.0.0.0-0&fd00:1:0:28::-64", lease);
        let mac = self.node.host.json("link show flannel-v6.1")[0]["address"].as_str().unwrap().to_owned();
        for line in [
            "link add flannel-v6.1 address 02:00:00:00:06:28 mtu 1430 type vxlan id 1 dev eth0 local fd00:168::3 dstport 8472 nolearning",
            "addr add fd00:1:0:28::/128 dev flannel-v6.1 nodad",
            "link set flannel-v6.1 up",
            "route add fd00:1:0:f::/64 via fd00:1:0:f:: dev flannel-v6.1 onlink",
            &format!("neigh add fd00:1:0:f:: lladdr {mac} dev flannel-v6.1 nud permanent"),
        ] {
            self.node.other.ip(line);
        }
        self.node.other.run(&format!("bridge fdb add {mac} dev flannel-v6.1 dst fd00:168::2"));
    }

    /// The container's attachment, as a plugin leaves it to the agent.
    pub fn attached(&self, addresses: &[&str]) {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let attachment = json!({
            "format": "twill-attachment", "version": 1, "containerID": "box", "ifname": "eth0", "bootId": boot.trim(),
            "netns": "/proc/1/ns/net", "netnsInode": 1, "bridge": "cni0", "hostDevice": "veth0",
            "addresses": addresses, "gateways": [],
        });
        std::fs::create_dir_all(self.node.file("state/attachments")).unwrap();
        std::fs::write(self.node.file("state/attachments/box:eth0.json"), attachment.to_string()).unwrap();
    }

    /// What the first packet that arrives at `device` of `other` looks like, while the container pings `to`.
    pub fn arrives(&self, device: &str, to: &str) -> String {
        arrives(&self.container, to, &self.node.other, device, || self.node.host.run("nft list ruleset"))
    }
}

/// What the first echo request that arrives at `device` of `at` looks like, while `from` pings `to` and is answered.
pub fn arrives(from: &Host, to: &str, at: &Host, device: &str, what_else: impl Fn() -> String) -> String {
    eventually(&format!("{to} answers {} and is seen on {device} of {}", from.name, at.name), || {
        let capture = Capture::start(at, device, &[], Some(1), "inbound and (icmp[0] == 8 or icmp6[0] == 128)");
        let ping = from.try_run(&format!("ping -c 5 -i 0.2 -W 1 {to}"));
        capture.stop();
        let text = capture.text();
        // A tcpdump that is ended prints an empty line.
        if ping.status.success() && !text.trim().is_empty() { Ok(text) } else { Err((text, what_else())) }
    })
}

/// The segment size that the first SYN announces which arrives at a device.
pub fn announced(from: &Host, to: &str, at: &Host, device: &str) -> String {
    eventually("a SYN arrives", || {
        let syn = "inbound and (tcp[tcpflags] == tcp-syn or (ip6[6] == 6 and ip6[53] == 2))";
        let capture = Capture::start(at, device, &[], Some(1), syn);
        // Nobody listens: the SYN is what counts. Sent again and again, since tcpdump may be late.
        let line =
            format!("for n in 1 2 3 4 5 6 7 8; do timeout 1 sh -c 'busybox nc {to} 80 </dev/null'; sleep 0.1; done");
        from.command("sh").args(["-c", &line]).stdin(Stdio::null()).output().unwrap();
        capture.stop();
        let seen = capture.text();
        let size = seen.split("mss ").nth(1).and_then(|rest| rest.split([',', ']']).next()).map(str::to_owned);
        size.ok_or(seen)
    })
}

/// The ruleset as `nft` shows it, without handles and counters: what a person would compare.
pub fn ruleset(host: &Host) -> Vec<Value> {
    fn bare(value: &mut Value) {
        match value {
            Value::Object(map) => {
                map.remove("handle");
                map.remove("packets");
                map.remove("bytes");
                map.values_mut().for_each(bare);
            }
            Value::Array(list) => list.iter_mut().for_each(bare),
            _ => {}
        }
    }
    let mut all: Value = serde_json::from_str(&host.run("nft -j list ruleset")).unwrap();
    let list = all["nftables"].as_array_mut().unwrap();
    list.retain(|object| object.get("metainfo").is_none());
    list.iter_mut().for_each(bare);
    list.clone()
}
