//! `twill show arp|fdb|bridge|routes`: the kernel's tables of one network namespace, in the words of `ip` and `bridge`.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde::Serialize;
use twill_core::host::{Fdb, HostState, Link, LinkKind, Object, RouteEntry, RouteKey, TABLE_MAIN};
use twill_core::net::{LinkName, MacAddr, Prefix};
use twill_core::words;
use twill_kernel::netns::Netns;
use twill_kernel::{Interest, Kernel, LinuxKernel};

use crate::output::{Failure, Output, columns};

/// The kernel's tables, of this network namespace or a named one.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  twill show routes\n  twill show fdb --netns /proc/4711/ns/net -o json")]
pub(crate) struct Show {
    #[command(subcommand)]
    table: Table,
    /// A network namespace: a name that `ip netns` lists, or a path such as /proc/PID/ns/net
    #[arg(long, global = true, value_name = "NAME|PATH")]
    netns: Option<String>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum Table {
    /// Neighbours: which MAC has an address (ARP, and ND for IPv6)
    #[command(after_help = "Example:\n  twill show arp --netns twill-lab-node1")]
    Arp,
    /// Forwarding entries: which host (VXLAN) or port (bridge) has a MAC
    #[command(after_help = "Example:\n  twill show fdb -o json")]
    Fdb,
    /// Bridges: their ports, and the CAM table (MAC → port)
    #[command(after_help = "Example:\n  twill show bridge --netns twill-lab-node1")]
    Bridge,
    /// Routes, local ones left out
    #[command(
        after_help = "Examples:\n  twill show routes\n  twill show routes --classic    as `route -n` prints them"
    )]
    Routes {
        /// IPv4 routes of the main table, as `route -n` prints them
        #[arg(long)]
        classic: bool,
    },
}

impl Show {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let state = read(self.netns.as_deref())?;
        match self.table {
            Table::Arp => {
                let shown = Neighbours { neighbours: neighbours(&state) };
                self.output.print(&shown, || shown.text())?;
            }
            Table::Fdb => {
                let shown = Entries { entries: state.iter().filter_map(|(_, o)| entry(o)).collect() };
                self.output.print(&shown, || shown.text())?;
            }
            Table::Bridge => {
                let shown = Bridges { bridges: bridges(&state) };
                self.output.print(&shown, || shown.text())?;
            }
            Table::Routes { classic } => {
                let shown = Routes { routes: routes(&state) };
                self.output.print(&shown, || if classic { shown.classic() } else { shown.text() })?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Everything in the namespace, read once.
fn read(netns: Option<&str>) -> anyhow::Result<HostState> {
    let look = || LinuxKernel::open(Interest::default()).map(|kernel| kernel.mirror().clone());
    let Some(word) = netns else { return Ok(look()?) };
    let path = if word.contains('/') { PathBuf::from(word) } else { Path::new("/run/netns").join(word) };
    let missing = |e: std::io::Error| {
        Failure::new("netns-not-usable", format!("enter the network namespace {}: {e}", path.display())).hint(
            "name one that `ip netns list` shows, or a path such as /proc/PID/ns/net; both need the right to enter it",
        )
    };
    let netns = Netns::open(&path).map_err(missing)?;
    Ok(netns.run(look).map_err(missing)??)
}

/// `-o json` of `show arp`.
#[derive(Debug, Serialize)]
struct Neighbours {
    neighbours: Vec<Neighbour>,
}

#[derive(Debug, Serialize)]
struct Neighbour {
    address: IpAddr,
    link: LinkName,
    mac: Option<MacAddr>,
    state: &'static str,
}

fn neighbours(state: &HostState) -> Vec<Neighbour> {
    let neighbours = state.iter().filter_map(|(_, o)| if let Object::Neigh(n) = o { Some(n) } else { None });
    // The kernel's own entries for multicast and loopback (NOARP) are no neighbours; `ip neigh` hides them too.
    let shown = neighbours.filter(|n| n.state & 0x40 == 0 && (n.state != 0 || n.permanent));
    shown.map(|n| Neighbour { address: n.ip, link: n.link, mac: n.mac, state: words::neigh_state(n.state) }).collect()
}

impl Neighbours {
    fn text(&self) -> String {
        let row = |n: &Neighbour| {
            let mac = n.mac.map_or("?".to_owned(), |m| m.to_string());
            [n.address.to_string(), mac, n.link.to_string(), n.state.to_owned()]
        };
        table(&["ADDRESS", "MAC", "DEVICE", "STATE"], self.neighbours.iter().map(row).collect(), "no neighbours")
    }
}

/// `-o json` of `show fdb`.
#[derive(Debug, Serialize)]
struct Entries {
    entries: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Entry {
    mac: MacAddr,
    /// The VXLAN or bridge.
    link: LinkName,
    /// VXLAN: the hosts that get the frame.
    hosts: Vec<IpAddr>,
    /// Bridge: the port.
    port: Option<LinkName>,
    /// `permanent`, `static` (an entry that does not age) or `learned`.
    how: &'static str,
}

/// How an entry came: NUD_PERMANENT, NUD_NOARP (`bridge fdb add … static`), or from a frame that was seen.
fn how(fdb: &Fdb) -> &'static str {
    match fdb {
        Fdb { permanent: true, .. } => "permanent",
        Fdb { state, .. } if state & 0x40 != 0 => "static",
        Fdb { .. } => "learned",
    }
}

fn entry(object: &Object) -> Option<Entry> {
    let Object::Fdb(fdb) = object else { return None };
    let hosts = fdb.dst.as_slice().to_vec();
    // A device's own list of multicast addresses has neither host nor port.
    let forwards = fdb.port.is_some() || !hosts.is_empty();
    forwards.then_some(Entry { mac: fdb.mac, link: fdb.link, hosts, port: fdb.port, how: how(fdb) })
}

impl Entries {
    fn text(&self) -> String {
        let row = |e: &Entry| {
            let hosts = e.hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            let to = e.port.map_or_else(|| format!("host {hosts}"), |p| format!("port {p}"));
            [e.mac.to_string(), e.link.to_string(), to, e.how.to_owned()]
        };
        table(&["MAC", "DEVICE", "TO", "HOW"], self.entries.iter().map(row).collect(), "no forwarding entries")
    }
}

/// `-o json` of `show bridge`.
#[derive(Debug, Serialize)]
struct Bridges {
    bridges: Vec<Bridge>,
}

#[derive(Debug, Serialize)]
struct Bridge {
    name: LinkName,
    mac: Option<MacAddr>,
    up: bool,
    ports: Vec<BridgePort>,
    cam: Vec<CamEntry>,
}

#[derive(Debug, Serialize)]
struct BridgePort {
    name: LinkName,
    mac: Option<MacAddr>,
    up: bool,
    carrier: bool,
}

#[derive(Debug, Serialize)]
struct CamEntry {
    mac: MacAddr,
    port: LinkName,
    /// The MAC is the port's or the bridge's own: the frame goes up to this host.
    own: bool,
    /// As in `show fdb`.
    how: &'static str,
}

fn bridges(state: &HostState) -> Vec<Bridge> {
    let links: Vec<&Link> =
        state.iter().filter_map(|(_, o)| if let Object::Link(l) = o { Some(&**l) } else { None }).collect();
    let one = |bridge: &&Link| {
        let ports: Vec<&&Link> = links.iter().filter(|l| l.master == Some(bridge.name)).collect();
        let own = |mac| bridge.mac == Some(mac) || ports.iter().any(|p| p.mac == Some(mac));
        let cam = state.iter().filter_map(|(_, o)| match o {
            Object::Fdb(fdb) if fdb.link == bridge.name => {
                Some(CamEntry { mac: fdb.mac, port: fdb.port?, own: own(fdb.mac), how: how(fdb) })
            }
            _ => None,
        });
        let port = |l: &&&Link| BridgePort { name: l.name, mac: l.mac, up: l.up, carrier: l.carrier };
        Bridge {
            name: bridge.name,
            mac: bridge.mac,
            up: bridge.up,
            cam: cam.collect(),
            ports: ports.iter().map(port).collect(),
        }
    };
    links.iter().filter(|l| matches!(l.kind, LinkKind::Bridge)).map(one).collect()
}

impl Bridges {
    fn text(&self) -> String {
        let up = |up: bool| if up { "up" } else { "down" };
        let mut rows = Vec::new();
        for bridge in &self.bridges {
            let mac = bridge.mac.map_or("?".to_owned(), |m| m.to_string());
            rows.push([bridge.name.to_string(), "bridge".to_owned(), mac, up(bridge.up).to_owned()]);
            for port in &bridge.ports {
                let mac = port.mac.map_or("?".to_owned(), |m| m.to_string());
                let state = if port.up && !port.carrier { "up, no carrier" } else { up(port.up) };
                rows.push([format!("  {}", port.name), "port".to_owned(), mac, state.to_owned()]);
            }
            // What was learned first: it is what a person looks for.
            let mut cam: Vec<&CamEntry> = bridge.cam.iter().collect();
            cam.sort_by_key(|e| (e.own, e.port));
            for e in cam {
                let how = if e.own { "this host's own" } else { e.how };
                rows.push([format!("  {}", e.port), "cam".to_owned(), e.mac.to_string(), how.to_owned()]);
            }
        }
        table(&["BRIDGE / PORT", "WHAT", "MAC", "STATE"], rows, "no bridges")
    }
}

/// `-o json` of `show routes`.
#[derive(Debug, Serialize)]
struct Routes {
    routes: Vec<RouteRow>,
}

#[derive(Debug, Serialize)]
struct RouteRow {
    destination: Prefix,
    via: Option<IpAddr>,
    link: Option<LinkName>,
    kind: String,
    protocol: String,
    protocol_number: u8,
    scope: String,
    source: Option<IpAddr>,
    table: String,
    metric: u32,
    tos: u8,
    onlink: bool,
    /// The route as `ip route` prints it.
    line: String,
}

fn routes(state: &HostState) -> Vec<RouteRow> {
    let all = state.iter().filter_map(|(_, o)| if let Object::Route(r) = o { Some(r) } else { None });
    all.flat_map(|r| r.entries.as_slice().iter().map(|e| route_row(&r.key, e))).collect()
}

fn route_row(key: &RouteKey, entry: &RouteEntry) -> RouteRow {
    let protocol = match entry.protocol {
        twill_core::host::PROTO_TWILL => format!("twill({})", entry.protocol),
        number => words::protocol(number).into_owned(),
    };
    RouteRow {
        destination: key.dst,
        via: entry.via,
        link: entry.dev,
        kind: words::route_kind(entry.kind).into_owned(),
        protocol,
        protocol_number: entry.protocol,
        scope: words::scope(entry.scope).into_owned(),
        source: entry.extras().src,
        table: words::table(key.table).into_owned(),
        metric: key.metric,
        tos: key.tos,
        onlink: entry.onlink,
        line: words::route_line(key, entry),
    }
}

impl Routes {
    fn text(&self) -> String {
        let several = self.routes.iter().any(|r| r.table != "main");
        let mut header = vec!["DESTINATION", "VIA", "DEVICE", "PROTOCOL", "SCOPE", "SOURCE", "METRIC", ""];
        if several {
            header.push("TABLE");
        }
        let dash = |o: Option<String>| o.unwrap_or_else(|| "-".to_owned());
        let row = |r: &RouteRow| {
            let destination = if r.destination.len() == 0 {
                if r.destination.is_v4() { "default".to_owned() } else { "default (IPv6)".to_owned() }
            } else {
                r.destination.to_string()
            };
            let note = match (r.onlink, r.kind.as_str()) {
                (true, _) => "onlink".to_owned(),
                (false, "unicast") => String::new(),
                (false, kind) => kind.to_owned(),
            };
            let mut cells = vec![
                destination,
                dash(r.via.map(|v| v.to_string())),
                dash(r.link.map(|l| l.to_string())),
                r.protocol.clone(),
                r.scope.clone(),
                dash(r.source.map(|s| s.to_string())),
                r.metric.to_string(),
                note,
            ];
            if several {
                cells.push(r.table.clone());
            }
            cells
        };
        table(&header, self.routes.iter().map(row).collect(), "no routes")
    }

    /// As `route -n`: IPv4, main table. Flags: U usable, G gateway, H host, ! refused.
    fn classic(&self) -> String {
        let main = words::table(TABLE_MAIN);
        let row = |r: &RouteRow| {
            let mask = u32::MAX.checked_shl(32 - u32::from(r.destination.len())).unwrap_or(0);
            let mut flags = "U".to_owned();
            let refused = matches!(r.kind.as_str(), "unreachable" | "prohibit");
            flags.push_str(if r.via.is_some() { "G" } else { "" });
            flags.push_str(if r.destination.len() == 32 { "H" } else { "" });
            if refused {
                flags = flags.replace('U', "!");
            }
            let gateway = match r.via {
                Some(via) => via.to_string(),
                None if refused => "-".to_owned(),
                None => "0.0.0.0".to_owned(),
            };
            [
                r.destination.addr().to_string(),
                gateway,
                std::net::Ipv4Addr::from_bits(mask).to_string(),
                flags,
                // net-tools keeps it in an int.
                r.metric.cast_signed().to_string(),
                if refused { "-" } else { "0" }.to_owned(),
                "0".to_owned(),
                r.link.map_or(if refused { "-" } else { "*" }.to_owned(), |l| l.to_string()),
            ]
        };
        let shown = self.routes.iter().filter(|r| r.destination.is_v4() && r.table == main);
        let header = ["Destination", "Gateway", "Genmask", "Flags", "Metric", "Ref", "Use", "Iface"];
        columns(&header, shown.map(row))
    }
}

/// Columns, or a word where there is nothing.
fn table<R: IntoIterator<Item = String>>(header: &[&str], rows: Vec<R>, nothing: &str) -> String {
    if rows.is_empty() { nothing.to_owned() } else { columns(header, rows) }
}
