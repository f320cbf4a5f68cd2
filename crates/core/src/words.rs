//! Kernel numbers in the words that `ip` and `bridge` use, and table lines as these two print them.
//!
//! A person who reads one of our lines finds the same line in `ip route`, `ip neigh` and `bridge fdb`.

use std::borrow::Cow;
use std::fmt::Write as _;

use crate::host::{Extras, Fdb, Neigh, RouteEntry, RouteKey, TABLE_MAIN};

/// The text with its control characters written out, but for those of `kept`: names and values that others chose do not steer a terminal,
/// and begin no line of their own.
pub fn written_out(text: &str, kept: &[char]) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && !kept.contains(&c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// rtm_protocol as iproute2's `rt_protos` has it; a number without a name is printed as a number.
pub fn protocol(number: u8) -> Cow<'static, str> {
    Cow::Borrowed(match number {
        0 => "unspec",
        1 => "redirect",
        2 => "kernel",
        3 => "boot",
        4 => "static",
        8 => "gated",
        9 => "ra",
        10 => "mrt",
        11 => "zebra",
        12 => "bird",
        13 => "dnrouted",
        14 => "xorp",
        15 => "ntk",
        16 => "dhcp",
        18 => "keepalived",
        42 => "babel",
        186 => "bgp",
        187 => "isis",
        188 => "ospf",
        189 => "rip",
        192 => "eigrp",
        other => return Cow::Owned(other.to_string()),
    })
}

/// rtm_scope and ifa_scope as iproute2's `rt_scopes` has them.
pub fn scope(number: u8) -> Cow<'static, str> {
    Cow::Borrowed(match number {
        0 => "global",
        200 => "site",
        253 => "link",
        254 => "host",
        255 => "nowhere",
        other => return Cow::Owned(other.to_string()),
    })
}

/// rtm_type.
pub fn route_kind(number: u8) -> Cow<'static, str> {
    Cow::Borrowed(match number {
        1 => "unicast",
        2 => "local",
        3 => "broadcast",
        4 => "anycast",
        5 => "multicast",
        6 => "blackhole",
        7 => "unreachable",
        8 => "prohibit",
        9 => "throw",
        10 => "nat",
        other => return Cow::Owned(other.to_string()),
    })
}

/// Routing tables that have a name.
pub fn table(number: u32) -> Cow<'static, str> {
    Cow::Borrowed(match number {
        253 => "default",
        254 => "main",
        255 => "local",
        other => return Cow::Owned(other.to_string()),
    })
}

/// The NUD_* state (linux/neighbour.h); the highest bit that says something wins.
pub const fn neigh_state(bits: u16) -> &'static str {
    match bits {
        b if b & 0x80 != 0 => "PERMANENT",
        b if b & 0x40 != 0 => "NOARP",
        b if b & 0x20 != 0 => "FAILED",
        b if b & 0x10 != 0 => "PROBE",
        b if b & 0x08 != 0 => "DELAY",
        b if b & 0x04 != 0 => "STALE",
        b if b & 0x02 != 0 => "REACHABLE",
        b if b & 0x01 != 0 => "INCOMPLETE",
        _ => "NONE",
    }
}

/// A route as `ip route` prints it.
pub fn route_line(key: &RouteKey, entry: &RouteEntry) -> String {
    let mut line = String::new();
    if entry.kind != 1 {
        let _ = write!(line, "{} ", route_kind(entry.kind));
    }
    match key.dst {
        dst if dst.len() == 0 => line.push_str("default"),
        dst if dst.len() == dst.bits() => {
            let _ = write!(line, "{}", dst.addr());
        }
        dst => {
            let _ = write!(line, "{dst}");
        }
    }
    if let Some(via) = entry.via {
        let family = if via.is_ipv4() == key.dst.is_v4() { "" } else { "inet6 " };
        let _ = write!(line, " via {family}{via}");
    }
    if let Some(dev) = entry.dev {
        let _ = write!(line, " dev {dev}");
    }
    if key.table != TABLE_MAIN {
        let _ = write!(line, " table {}", table(key.table));
    }
    if entry.protocol != 3 {
        let _ = write!(line, " proto {}", protocol(entry.protocol));
    }
    if entry.scope != 0 && key.dst.is_v4() {
        let _ = write!(line, " scope {}", scope(entry.scope));
    }
    let Extras { src, mtu, advmss } = entry.extras();
    if let Some(src) = src {
        let _ = write!(line, " src {src}");
    }
    if key.metric != 0 {
        let _ = write!(line, " metric {}", key.metric);
    }
    if entry.onlink {
        line.push_str(" onlink");
    }
    for (word, metric) in [("mtu", mtu), ("advmss", advmss)] {
        let _ = metric.map(|metric| write!(line, " {word} {metric}"));
    }
    line
}

/// A neighbour as `ip neigh` prints it.
pub fn neigh_line(neigh: &Neigh) -> String {
    let mut line = format!("{} dev {}", neigh.ip, neigh.link);
    if let Some(mac) = neigh.mac {
        let _ = write!(line, " lladdr {mac}");
    }
    match neigh {
        Neigh { permanent: true, .. } => line.push_str(" PERMANENT"),
        Neigh { state: 0, .. } => {}
        Neigh { state, .. } => {
            let _ = write!(line, " {}", neigh_state(*state));
        }
    }
    line
}

/// A forwarding entry as `bridge fdb` prints it; one line for each host of a VXLAN's entry.
pub fn fdb_line(fdb: &Fdb) -> String {
    let permanent = match fdb {
        Fdb { permanent: true, .. } => " permanent",
        // NUD_NOARP.
        Fdb { state, .. } if state & 0x40 != 0 => " static",
        Fdb { .. } => "",
    };
    match fdb.port {
        Some(port) => format!("{} dev {port} master {}{permanent}", fdb.mac, fdb.link),
        None => {
            let detour = fdb.detour.as_deref().copied().unwrap_or_default();
            let words = [
                detour.port.map(|port| format!(" port {port}")),
                detour.vni.map(|vni| format!(" vni {vni}")),
                detour.via.map(|via| format!(" via {via}")),
                detour.group.map(|group| format!(" nhid {group}")),
            ];
            let own: String = words.into_iter().flatten().collect();
            let line = |dst: &str| format!("{} dev {}{dst}{own} self{permanent}", fdb.mac, fdb.link);
            let lines: Vec<String> = fdb.dst.as_slice().iter().map(|dst| line(&format!(" dst {dst}"))).collect();
            if lines.is_empty() { line("") } else { lines.join("\n") }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Few, Remark};

    fn entry(via: Option<&str>, dev: &str) -> RouteEntry {
        RouteEntry {
            via: via.map(|v| v.parse().unwrap()),
            dev: Some(dev.parse().unwrap()),
            onlink: false,
            protocol: 3,
            kind: 1,
            scope: 0,
            extras: None,
            special: false,
            usurper: Remark::default(),
        }
    }

    fn key(dst: &str) -> RouteKey {
        RouteKey { table: TABLE_MAIN, dst: dst.parse().unwrap(), tos: 0, metric: 0 }
    }

    #[test]
    fn control_characters_are_written_out() {
        assert_eq!(written_out("a\n\u{1b}[2J\u{85}é\t", &['\t']), "a\\n\\u{1b}[2J\\u{85}é\t");
    }

    #[test]
    fn lines_read_as_in_ip_and_bridge() {
        let mut overlay = entry(Some("10.1.16.0"), "flannel.1");
        overlay.onlink = true;
        overlay.protocol = 116;
        let mut connected = entry(None, "docker0");
        connected.protocol = 2;
        connected.scope = 253;
        connected.extras = Extras { src: "10.1.15.1".parse().ok(), ..Extras::default() }.boxed();
        let mut bounded = entry(Some("10.168.0.1"), "eth0");
        bounded.extras = Extras { mtu: Some(1400), advmss: Some(1360), ..Extras::default() }.boxed();
        assert_eq!(route_line(&key("0.0.0.0/0"), &bounded), "default via 10.168.0.1 dev eth0 mtu 1400 advmss 1360");
        assert_eq!(
            route_line(&key("0.0.0.0/0"), &entry(Some("10.168.0.1"), "eth0")),
            "default via 10.168.0.1 dev eth0"
        );
        assert_eq!(
            route_line(&key("10.1.16.0/24"), &overlay),
            "10.1.16.0/24 via 10.1.16.0 dev flannel.1 proto 116 onlink"
        );
        assert_eq!(
            route_line(&key("10.1.15.0/24"), &connected),
            "10.1.15.0/24 dev docker0 proto kernel scope link src 10.1.15.1"
        );
        let mac = "5e:f8:4f:00:e3:37".parse().unwrap();
        let link = "flannel.1".parse().unwrap();
        let ip = "10.1.16.0".parse().unwrap();
        assert_eq!(
            neigh_line(&Neigh { link, ip, mac: Some(mac), permanent: true, special: false, state: 0x80 }),
            "10.1.16.0 dev flannel.1 lladdr 5e:f8:4f:00:e3:37 PERMANENT"
        );
        let dst = Few::One("10.168.0.3".parse().unwrap());
        assert_eq!(
            fdb_line(&Fdb { link, mac, dst, port: None, permanent: true, special: false, detour: None, state: 0x80 }),
            "5e:f8:4f:00:e3:37 dev flannel.1 dst 10.168.0.3 self permanent"
        );
    }
}
