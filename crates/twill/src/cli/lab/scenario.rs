//! What the scenarios show: the tables of the source document, from the kernel, and packets as they pass.

use serde::Serialize;
use twill_core::net::{BadValue, LinkName};
use twill_kernel::netns::Netns;
use twill_lab::frames::{self, Seen};
use twill_lab::layout::{STORE_PORT, UNDERLAY};
use twill_lab::proto::{ContainerInfo, HostInfo};
use twill_lab::{Home, LabError, LabState, Scenario, enter, ping};
use twill_packet::{Header, decode, ethernet, render};

use super::crossings::{self, End};

/// One thing that a scenario shows.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Section {
    /// What it is.
    pub(super) title: String,
    /// As lines.
    pub(super) lines: Vec<String>,
}

/// What a scenario shows; [`enter::user`] comes before.
pub(super) fn show(scenario: Scenario, state: &LabState) -> Result<Vec<Section>, LabError> {
    match scenario {
        Scenario::Bridge => bridge(state),
        Scenario::Vxlan => vxlan(state),
        Scenario::Udp => udp(state),
    }
}

/// Containers on one bridge: ARP by broadcast, then the CAM table.
fn bridge(state: &LabState) -> Result<Vec<Section>, LabError> {
    let node = enter::open(state, "node1")?;
    let containers: Vec<&ContainerInfo> = state.containers().collect();
    // The bridge's own device stands for the host: what is for everybody also goes there.
    let veths = (1..=containers.len()).map(|number| name(&format!("veth{number}")));
    let ports = [name("docker0")].into_iter().chain(veths).collect::<Result<Vec<_>, _>>()?;
    let mut sections = vec![table("CAM table of docker0 before (MAC → port)", &node, &["show", "bridge"])?];
    let (first, last) = ends(&containers)?;
    let from = enter::open(state, &last.name)?;
    let (seen, answer) = frames::during(&node, &ports, || ping::one(&from, first.address))?;
    let title = format!(
        "{} pings {}: who has the address is asked everywhere, the rest goes to one port",
        last.name, first.name
    );
    let lines = told(&seen, &ports).into_iter().chain([answered(first, &answer)]).collect();
    sections.push(Section { title, lines });
    sections.push(table("CAM table of docker0 after", &node, &["show", "bridge"])?);
    for container in [first, last] {
        let netns = enter::open(state, &container.name)?;
        sections.push(table(&format!("ARP table of {}", container.name), &netns, &["show", "arp"])?);
    }
    Ok(sections)
}

/// Hosts joined by VXLAN: route, neighbour, forwarding entry, and a packet taken apart.
fn vxlan(state: &LabState) -> Result<Vec<Section>, LabError> {
    let node = enter::open(state, "node1")?;
    let mut sections = vec![
        table("routes of node1, as `route -n` prints them", &node, &["show", "routes", "--classic"])?,
        table("neighbours of node1: no ARP is sent for PERMANENT entries", &node, &["show", "arp"])?,
        table("forwarding entries of node1: MAC → host", &node, &["show", "fdb"])?,
    ];
    let store = state.store_url()?;
    let underlay = enter::open(state, UNDERLAY)?;
    let keys = ["store", "ls", "/coreos.com/network/subnets", "--store", &store];
    sections.push(table(&format!("the store's keys (port {STORE_PORT} of the underlay)"), &underlay, &keys)?);
    let containers: Vec<&ContainerInfo> = state.containers().collect();
    let (first, last) = ends(&containers)?;
    let from = enter::open(state, &first.name)?;
    let (eth0, flannel) = (name("eth0")?, name("flannel.1")?);
    let (seen, answer) = frames::during(&node, &[eth0, flannel], || ping::one(&from, last.address))?;
    let wrapped = |seen: &&Seen| seen.device == eth0 && frames::wrapped(&seen.bytes).is_some();
    if let Some(packet) = seen.iter().find(wrapped) {
        let lines = render(&decode(&packet.bytes)).lines().map(str::to_owned).collect();
        let title = format!("{} pings {}: the packet on eth0 of node1, layer by layer", first.name, last.name);
        sections.push(Section { title, lines });
        sections.push(whose(state, packet, first, last)?);
    }
    let inside: Vec<&Seen> = seen.iter().filter(|seen| seen.device == flannel).collect();
    let broadcast = inside.iter().filter(|seen| seen.bytes.starts_with(&[0xff; 6])).count();
    let arp = inside.iter().filter(|s| decode(&s.bytes).iter().any(|l| matches!(l.header, Header::Arp(_)))).count();
    let counted = format!("{} frames, {broadcast} of them broadcast, {arp} of them ARP", inside.len());
    let lines = inside.iter().map(|seen| seen.says()).chain([counted, answered(last, &answer)]).collect();
    sections.push(Section { title: "what crossed flannel.1 of node1 meanwhile".into(), lines });
    Ok(sections)
}

/// Hosts joined by packets in UDP: one route, the daemon's table, a packet taken apart, and what crossing into the daemon costs.
fn udp(state: &LabState) -> Result<Vec<Section>, LabError> {
    let node = enter::open(state, "node1")?;
    let mut sections = vec![routes(&node)?];
    let (store, underlay) = (state.store_url()?, enter::open(state, UNDERLAY)?);
    let keys = ["store", "ls", "/coreos.com/network/subnets", "--store", &store];
    sections.push(table(&format!("the store's keys (port {STORE_PORT} of the underlay)"), &underlay, &keys)?);
    let values = ["leases", "--store", &store];
    sections.push(table("what their values say: the host that holds the subnet", &underlay, &values)?);
    let folder = Home::open()?.lab(&state.spec.name).node("node1").join("run");
    let run_dir = folder.to_string_lossy();
    let peers = ["peers", "--run-dir", &run_dir];
    sections.push(table("where the daemon of node1 sends each subnet's packets", &node, &peers)?);
    let containers: Vec<&ContainerInfo> = state.containers().collect();
    let (first, second) = match containers[..] {
        [first, second, ..] => (first, second),
        _ => ends(&containers)?,
    };
    let (from, to) = (enter::open(state, &first.name)?, enter::open(state, &second.name)?);
    let (docker, flannel, eth0) = (name("docker0")?, name("flannel0")?, name("eth0")?);
    let (seen, answer) = frames::during(&node, &[docker, flannel, eth0], || ping::one(&from, second.address))?;
    let wrapped = |seen: &&Seen| seen.device == eth0 && seen.layers().iter().any(|layer| layer.depth > 0);
    if let Some(packet) = seen.iter().find(wrapped) {
        let lines = render(&packet.layers()).lines().map(str::to_owned).collect();
        let title = format!("{} pings {}: the packet on eth0 of node1, layer by layer", first.name, second.name);
        sections.push(Section { title, lines });
    }
    let echo = |seen: &&Seen| seen.layers().iter().any(|layer| matches!(layer.header, Header::Icmp(_)));
    let passed = seen.iter().filter(echo).map(|seen| format!("{:<9} {}", seen.device.as_str(), seen.says()));
    let lines = passed.chain([answered(second, &answer)]).collect();
    sections.push(Section { title: "the same, device by device on node1".into(), lines });
    let there = host_of(state, second)?;
    let other = enter::open(state, &there.name)?;
    let here = host_of(state, first)?;
    let near = End { host: &node, address: here.address, container: &from, inner: first.address };
    let far = End { host: &other, address: there.address, container: &to, inner: second.address };
    sections.push(crossings::section(&folder, &near, &far)?);
    Ok(sections)
}

/// The routes of node1 that the source shows, in its words.
fn routes(node: &Netns) -> Result<Section, LabError> {
    let text = enter::output(node, &["show", "routes", "-o", "json"])?;
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| LabError::new("lab-failed", error.to_string()))?;
    let lines = value["routes"].as_array().into_iter().flatten().filter_map(|route| route["line"].as_str());
    let lines = lines.filter(|line| !line.starts_with("fe80:")).map(str::to_owned).collect();
    Ok(Section { title: "routes of node1, as `ip route` prints them".into(), lines })
}

/// The same datagram once more from node1, with a foreign VNI and with its own: what comes out of the other host's flannel.1.
fn whose(state: &LabState, packet: &Seen, first: &ContainerInfo, last: &ContainerInfo) -> Result<Section, LabError> {
    let host = host_of(state, last)?;
    let (sender, receiver, answerer) =
        (enter::open(state, "node1")?, enter::open(state, &host.name)?, enter::open(state, &last.name)?);
    let (eth0, flannel) = (name("eth0")?, name("flannel.1")?);
    let own = frames::wrapped(&packet.bytes).map_or(0, |(vni, _)| vni);
    let mut lines = Vec::new();
    for vni in [own + 1, own] {
        let (seen, sent) = frames::during(&receiver, &[eth0, flannel], || {
            let sent = frames::send_again(&sender, &packet.bytes, vni, host.address);
            // Its answer tells that the frame before has been dealt with.
            let _ = ping::one(&answerer, first.address);
            sent
        })?;
        sent?;
        let inner = frames::wrapped(&packet.bytes).map(|(_, inner)| inner);
        let came = seen.iter().filter(|s| s.device == eth0 && frames::wrapped(&s.bytes) == inner.map(|i| (vni, i)));
        let out = seen.iter().filter(|s| s.device == flannel && Some(&s.bytes[..]) == inner);
        lines.push(format!("VNI {vni}: {} arrived at eth0, {} came out of flannel.1", came.count(), out.count()));
    }
    let title = format!("the VNI tells flannel.1 of {} whether a frame is its own: that packet sent again", host.name);
    Ok(Section { title, lines })
}

/// Each frame once, in the order in which the pinging container's port saw them, with the ports that it passed. What the host's end
/// of the cable says for itself in IPv6 (group reports) is no part of it.
fn told(seen: &[Seen], ports: &[LinkName]) -> Vec<String> {
    let ipv6 = |frame: &Seen| {
        ethernet::Packet::new(&frame.bytes).is_ok_and(|packet| packet.ethertype() == ethernet::EtherType::IPV6)
    };
    let whole = seen.iter().filter(|seen| Some(&seen.device) == ports.last() && !ipv6(seen));
    let line = |frame: &Seen| {
        let passed =
            ports.iter().rev().filter(|port| seen.iter().any(|s| s.device == **port && s.bytes == frame.bytes));
        let passed: Vec<&str> = passed.map(|port| port.as_str()).collect();
        let to = ethernet::Packet::new(&frame.bytes).map_or_else(|_| String::new(), |frame| frame.dst().to_string());
        format!("{:<40}  to {to:<17}  passes {}", frame.says(), passed.join(", "))
    };
    whole.map(line).collect()
}

fn answered(to: &ContainerInfo, answer: &Result<std::time::Duration, String>) -> String {
    match answer {
        Ok(rtt) => format!("{} answered within {} µs", to.name, rtt.as_micros()),
        Err(error) => format!("{} did not answer: {error}", to.name),
    }
}

fn host_of<'a>(state: &'a LabState, container: &ContainerInfo) -> Result<&'a HostInfo, LabError> {
    let host = state.hosts.iter().rfind(|host| host.containers.iter().any(|c| c.name == container.name));
    host.ok_or_else(|| LabError::new("lab-failed", format!("find the host of {}", container.name)))
}

fn ends<'a>(containers: &[&'a ContainerInfo]) -> Result<(&'a ContainerInfo, &'a ContainerInfo), LabError> {
    match containers {
        [first, .., last] => Ok((first, last)),
        _ => Err(LabError::new("no-such-place", "the scenario needs two containers")
            .hint("leave --nodes and --containers away")),
    }
}

fn name(text: &str) -> Result<LinkName, LabError> {
    text.parse().map_err(|error: BadValue| LabError::new("lab-failed", error.to_string()))
}

/// What this program prints of a place.
fn table(title: &str, netns: &Netns, words: &[&str]) -> Result<Section, LabError> {
    let out = enter::output(netns, words)?;
    Ok(Section { title: title.to_owned(), lines: out.lines().map(str::to_owned).collect() })
}
