//! The walk: one packet, one step at a time, one handler for each kind of step.

use std::net::IpAddr;

use twill_core::host::{Link, LinkKind, Neigh, PROTO_KERNEL, RouteEntry, RouteKey, Vxlan};
use twill_core::net::{LinkName, MacAddr, Mtu};
use twill_core::words;

use crate::facts::{ENETUNREACH, Facts, Far, NoRoute, PlaceFacts, RouteAnswer, RouteQuery};
use crate::path::{Code, End, Explanation, Hop, Verdict, Way, What};
use crate::segment;

/// Steps after which a way is taken for a circle: the TTL that Linux gives a packet.
const MOST_STEPS: usize = 64 * 4;

/// The path from `from` to `to`, and the answer's way back.
pub fn explain<F: Facts + ?Sized>(facts: &F, from: &End, to: &End) -> Explanation {
    let back = facts.place(&to.place).map(|_| way(facts, to, from));
    Explanation { there: way(facts, from, to), back }
}

/// One direction.
fn way<F: Facts + ?Sized>(facts: &F, from: &End, to: &End) -> Way {
    let mut walk = Walk { facts, target: to, hops: Vec::new(), mtu: None };
    let packet = Packet { src: Some(from.address), dst: to.address, oif: None, inner: None };
    let mut step = Step::Send { place: from.place.clone(), packet };
    let mut steps = 0;
    let verdict = loop {
        steps += 1;
        let next = if steps > MOST_STEPS { Err(circle(&step)) } else { walk.step(step) };
        match next {
            Ok(Some(next)) => step = next,
            Ok(None) => break Verdict::Arrives,
            Err(stop) => break *stop,
        }
    };
    Way { from: from.clone(), to: to.clone(), hops: walk.hops, verdict }
}

/// An IP packet.
#[derive(Debug, Clone)]
struct Packet {
    /// `None`: the kernel will choose.
    src: Option<IpAddr>,
    dst: IpAddr,
    /// The device that it must leave by.
    oif: Option<LinkName>,
    /// What a tunnel has put inside.
    inner: Option<Box<Wrapped>>,
}

/// A frame inside VXLAN.
#[derive(Debug, Clone)]
struct Wrapped {
    vxlan: Vxlan,
    /// The tunnel's MTU.
    mtu: Option<Mtu>,
    frame: Frame,
}

/// A packet on a wire.
#[derive(Debug, Clone)]
struct Frame {
    dst: MacAddr,
    packet: Packet,
}

impl Packet {
    fn depth(&self) -> usize {
        self.inner.as_ref().map_or(0, |w| 1 + w.frame.packet.depth())
    }
}

/// What happens next.
enum Step {
    /// A packet starts at a place.
    Send { place: String, packet: Packet },
    /// A frame leaves by a device.
    Transmit { place: String, link: LinkName, frame: Frame },
    /// A frame comes in by a device.
    Receive { place: String, link: LinkName, frame: Frame },
    /// A frame is in a bridge; `from`: the port it came by, `None`: from the host itself.
    Bridge { place: String, bridge: LinkName, from: Option<LinkName>, frame: Frame },
    /// A packet has come in by a device, and the frame around it is gone.
    Input { place: String, link: LinkName, packet: Packet },
}

type Next = Result<Option<Step>, Box<Verdict>>;

fn circle(step: &Step) -> Box<Verdict> {
    let (Step::Send { place, .. }
    | Step::Transmit { place, .. }
    | Step::Receive { place, .. }
    | Step::Bridge { place, .. }
    | Step::Input { place, .. }) = step;
    stop(Code::Loop, place, "the packet has gone round in a circle until its TTL ran out")
}

fn stop(code: Code, place: &str, why: impl Into<String>) -> Box<Verdict> {
    stop_with(code, place, why, None)
}

fn stop_with(code: Code, place: &str, why: impl Into<String>, line: Option<String>) -> Box<Verdict> {
    let evidence = line.into_iter().collect();
    Box::new(Verdict::Stops { code, place: place.to_owned(), why: why.into(), evidence })
}

struct Walk<'f, F: ?Sized> {
    facts: &'f F,
    target: &'f End,
    hops: Vec<Hop>,
    /// How long a packet the sender's own device lets out.
    mtu: Option<(LinkName, Mtu)>,
}

impl<'f, F: Facts + ?Sized> Walk<'f, F> {
    fn step(&mut self, step: Step) -> Next {
        match step {
            Step::Send { place, packet } => self.send(&place, packet),
            Step::Transmit { place, link, frame } => self.transmit(&place, link, frame),
            Step::Receive { place, link, frame } => self.receive(&place, link, frame),
            Step::Bridge { place, bridge, from, frame } => self.bridge(&place, bridge, from, frame),
            Step::Input { place, link, packet } => self.input(&place, link, packet),
        }
    }

    fn here(&self, place: &str) -> Result<&'f PlaceFacts, Box<Verdict>> {
        self.facts.place(place).ok_or_else(|| stop(Code::LeavesTheFacts, place, format!("nothing is known of {place}")))
    }

    fn hop(&mut self, place: &str, what: What, link: Option<LinkName>, depth: usize, says: String) {
        self.hops.push(Hop { place: place.to_owned(), what, link, depth, says, evidence: Vec::new() });
    }

    /// Puts table lines under the last hop.
    fn evidence(&mut self, lines: impl IntoIterator<Item = String>) {
        if let Some(hop) = self.hops.last_mut() {
            hop.evidence.extend(lines);
        }
    }

    /// A packet starts here.
    fn send(&mut self, place: &str, mut packet: Packet) -> Next {
        let here = self.here(place)?;
        let answer = self.route(place, &packet, None)?;
        packet.src = packet.src.or(answer.src);
        if answer.kind == 2 {
            let link = answer.dev.ok_or_else(|| stop(Code::LinkMissing, place, "the local route names no device"))?;
            return Ok(Some(Step::Input { place: place.to_owned(), link, packet }));
        }
        self.leave(here, place, &answer, packet, "")
    }

    /// Asks the kernel, and turns a refusal into the end of the way.
    fn route(&self, place: &str, packet: &Packet, iif: Option<LinkName>) -> Result<RouteAnswer, Box<Verdict>> {
        let query = RouteQuery { dst: packet.dst, src: packet.src, iif, oif: packet.oif };
        self.facts.route(place, &query).map_err(|refusal| match refusal {
            NoRoute::Refused { errno: ENETUNREACH, .. } => {
                stop(Code::NoRoute, place, format!("no route covers {}{}", packet.dst, self.devices_down(place)))
            }
            NoRoute::Refused { errno, text } => match (self.refusing_line(place, packet.dst), iif) {
                (None, Some(iif)) if self.comes_back_elsewhere(place, packet, iif) => {
                    let why = format!(
                        "the packet came by {iif}, and the way back to its source leaves by another device: rp_filter drops it"
                    );
                    stop(Code::ReversePath, place, why)
                }
                (line, _) => {
                    let why = format!("the routing table refuses {}: {text} (errno {errno})", packet.dst);
                    stop_with(Code::RouteRefuses, place, why, line)
                }
            },
            NoRoute::NotAsked(why) => {
                stop(Code::LeavesTheFacts, place, format!("the kernel of {place} could not be asked: {why}"))
            }
        })
    }

    /// A device that is down takes its routes with it: says which are.
    fn devices_down(&self, place: &str) -> String {
        let links = self.facts.place(place).into_iter().flat_map(PlaceFacts::links);
        let down = links.filter(|l| !l.up && l.name.as_str() != "lo").map(|l| l.name.to_string());
        let down = down.collect::<Vec<_>>().join(", ");
        if down.is_empty() { down } else { format!(" (a device that is down has no routes: {down})") }
    }

    /// True when a packet to `packet`'s source would not leave by `iif`. Asked when the kernel refuses an incoming packet: newer
    /// kernels answer EINVAL for every cause.
    fn comes_back_elsewhere(&self, place: &str, packet: &Packet, iif: LinkName) -> bool {
        let Some(dst) = packet.src else { return false };
        match self.facts.route(place, &RouteQuery { dst, src: None, iif: None, oif: None }) {
            Ok(answer) => answer.dev != Some(iif),
            Err(_) => true,
        }
    }

    /// The blackhole (or its like) that covers `dst`.
    fn refusing_line(&self, place: &str, dst: IpAddr) -> Option<String> {
        let here = self.facts.place(place)?;
        let covering = here.routes().filter(|r| r.key.dst.contains(dst)).max_by_key(|r| r.key.dst.len())?;
        covering.entries.first().filter(|e| e.kind > 5).map(|e| words::route_line(&covering.key, e))
    }

    /// A packet leaves by a route: the route's hop, then the neighbour's.
    fn leave(&mut self, here: &PlaceFacts, place: &str, answer: &RouteAnswer, packet: Packet, verb: &str) -> Next {
        let link = answer.dev.ok_or_else(|| stop(Code::LinkMissing, place, "the route names no device"))?;
        let depth = packet.depth();
        let next = answer.via.unwrap_or(packet.dst);
        let way = match answer.via {
            Some(via) => format!("{verb}{} is reached through {via} on {link}", packet.dst),
            None => format!("{verb}{} is on the network of {link} itself", packet.dst),
        };
        let way = match answer.others {
            0 => way,
            n => format!("{way}, or by one of {n} more next hops, as a hash of the packet chooses"),
        };
        let line = here.line_of(packet.dst, answer);
        let shadowed = line.and_then(|(_, entry)| shadowed(here, packet.dst, entry));
        self.hop(place, What::Route, Some(link), depth, way);
        self.evidence(line.map(|(key, entry)| words::route_line(&key, entry)));
        self.evidence(shadowed.map(|other| format!("hides: {other}")));
        if answer.others > 0 {
            self.evidence(line.into_iter().flat_map(|(key, entry)| other_hops(here, &key, entry)));
        }
        let device = here
            .link(link)
            .ok_or_else(|| stop(Code::LinkMissing, place, format!("the route names {link}, which does not exist")))?;
        if let Some(why) = sends_nothing(device) {
            return Err(stop(Code::LinkDown, place, format!("{link} {why}")));
        }
        if matches!(device.kind, LinkKind::Tun) {
            let why = format!(
                "the packet is handed to the program that reads {link}; the kernel does not know what comes next"
            );
            return Err(stop(Code::UserSpace, place, why));
        }
        let short = self.too_short(device, &packet);
        self.evidence(short);
        let dst = self.neighbour(here, place, link, next, depth)?;
        Ok(Some(Step::Transmit { place: place.to_owned(), link, frame: Frame { dst, packet } }))
    }

    /// What does not fit through `device`, of what the sender's own device or the tunnel lets out.
    fn too_short(&mut self, device: &Link, packet: &Packet) -> Option<String> {
        let mtu = device.mtu?;
        match &packet.inner {
            Some(wrapped) => {
                let (inner, outer) = (wrapped.mtu?.get(), if packet.dst.is_ipv4() { 50 } else { 70 });
                (inner + outer > mtu.get()).then(|| {
                    format!(
                        "MTU {mtu} of {}: the tunnel's {inner} and {outer} around it do not fit, long packets are cut or lost",
                        device.name
                    )
                })
            }
            None => {
                let (first, most) = *self.mtu.get_or_insert((device.name, mtu));
                (mtu < most).then(|| {
                    format!("MTU {mtu} of {}: longer packets, up to the {most} of {first}, do not pass", device.name)
                })
            }
        }
    }

    /// The MAC of the next hop: from the table, or by asking.
    fn neighbour(
        &mut self,
        here: &PlaceFacts,
        place: &str,
        link: LinkName,
        next: IpAddr,
        depth: usize,
    ) -> Result<MacAddr, Box<Verdict>> {
        let ask = if next.is_ipv4() { "ARP" } else { "ND" };
        let entry = here.neigh(link, next);
        if let Some(mac) = entry.and_then(usable) {
            let sure = entry.is_some_and(|n| n.permanent);
            let note =
                if sure { format!("the entry is permanent, no {ask} is sent") } else { format!("learned by {ask}") };
            self.hop(place, What::Neighbour, Some(link), depth, format!("{next} has MAC {mac}; {note}"));
            self.evidence(entry.map(words::neigh_line));
            return Ok(mac);
        }
        let line = entry.map(words::neigh_line);
        match segment::who_has(self.facts, place, link, next) {
            Some((far, mac)) => {
                let says = format!(
                    "the MAC of {next} is not known yet: {ask} asks, {} of {} answers {mac}",
                    far.link, far.place
                );
                self.hop(place, What::Neighbour, Some(link), depth, says);
                self.evidence(line);
                Ok(mac)
            }
            None if matches!(here.link(link).map(|l| &l.kind), Some(LinkKind::Vxlan(_))) => {
                let why = format!(
                    "no neighbour entry for {next} on {link}: {ask} would have to ask by broadcast, and {link} has no host to send broadcasts to"
                );
                Err(stop_with(Code::NoNeighbour, place, why, line))
            }
            None => {
                let silence = segment::why_silent(self.facts, place, link, next);
                let why = format!("{ask} asks on {link} who has {next}, and nobody answers ({silence})");
                Err(stop_with(Code::NobodyAnswers, place, why, line))
            }
        }
    }

    /// A frame leaves by a device.
    fn transmit(&mut self, place: &str, link: LinkName, frame: Frame) -> Next {
        let here = self.here(place)?;
        let device = here.link(link).ok_or_else(|| stop(Code::LinkMissing, place, format!("{link} does not exist")))?;
        if let Some(why) = sends_nothing(device) {
            return Err(stop(Code::LinkDown, place, format!("{link} {why}")));
        }
        match &device.kind {
            LinkKind::Bridge => Ok(Some(Step::Bridge { place: place.to_owned(), bridge: link, from: None, frame })),
            LinkKind::Vxlan(vxlan) => self.wrap(here, place, link, vxlan, frame),
            LinkKind::Veth { .. } => match here.peers.get(&link) {
                Some(far) => self.wire(place, link, far.clone(), frame),
                None => {
                    let why = format!("the other end of {link} is in a namespace that cannot be seen from here");
                    Err(stop(Code::LeavesTheFacts, place, why))
                }
            },
            LinkKind::Tun => {
                Err(stop(Code::UserSpace, place, format!("the frame is handed to the program that reads {link}")))
            }
            LinkKind::Other { .. } => match segment::who_is(self.facts, place, link, frame.dst) {
                Some(far) => self.wire(place, link, far, frame),
                None => {
                    let why =
                        format!("the frame leaves by {link} to MAC {}, of which nothing is known here", frame.dst);
                    Err(stop(Code::LeavesTheFacts, place, why))
                }
            },
        }
    }

    /// From one device to the one at the other end.
    fn wire(&mut self, place: &str, link: LinkName, far: Far, frame: Frame) -> Next {
        let there = self.here(&far.place)?;
        let device = there.link(far.link);
        let port = device.and_then(|d| there.bridge_of(d));
        let role = port.map_or(String::new(), |bridge| format!(", a port of {bridge}"));
        let says = format!("out of {link}, in at {} of {}{role}", far.link, far.place);
        self.hop(place, What::Wire, Some(link), frame.packet.depth(), says);
        Ok(Some(Step::Receive { place: far.place, link: far.link, frame }))
    }

    /// A VXLAN looks for the host that has the frame's MAC, and wraps the frame into UDP to it.
    fn wrap(&mut self, here: &PlaceFacts, place: &str, link: LinkName, vxlan: &Vxlan, frame: Frame) -> Next {
        let found = here.fdb(link, frame.dst).or_else(|| here.fdb(link, MacAddr::ZERO));
        let Some((entry, host)) = found.and_then(|e| Some((e, *e.dst.first()?))) else {
            let (why, line) = match found {
                Some(entry) => (
                    format!(
                        "the FDB entry for {} on {link} names no host, and what it names is not known here",
                        frame.dst
                    ),
                    Some(words::fdb_line(entry)),
                ),
                None => (format!("no FDB entry for {} on {link}: the frame has nowhere to go", frame.dst), None),
            };
            return Err(stop_with(Code::NoFdbEntry, place, why, line));
        };
        let detour = entry.detour.as_deref().copied().unwrap_or_default();
        let mut vxlan = vxlan.clone();
        (vxlan.port, vxlan.vni) = (detour.port.unwrap_or(vxlan.port), detour.vni.unwrap_or(vxlan.vni));
        let by = detour.via.map_or(String::new(), |via| format!(", and must leave by {via}"));
        let says = format!(
            "MAC {} is behind host {host}: the frame is wrapped into UDP port {} with VNI {}{by}",
            frame.dst, vxlan.port, vxlan.vni
        );
        self.hop(place, What::Fdb, Some(link), frame.packet.depth(), says);
        self.evidence(words::fdb_line(entry).lines().map(str::to_owned));
        let (src, mtu) = (vxlan.local, here.link(link).and_then(|device| device.mtu));
        let inner = Some(Box::new(Wrapped { vxlan, mtu, frame }));
        let packet = Packet { src, dst: host, oif: detour.via, inner };
        Ok(Some(Step::Send { place: place.to_owned(), packet }))
    }

    /// A frame comes in by a device: into its bridge, or up if the MAC is the device's own.
    fn receive(&mut self, place: &str, link: LinkName, frame: Frame) -> Next {
        let here = self.here(place)?;
        let device = here.link(link).ok_or_else(|| stop(Code::LinkMissing, place, format!("{link} does not exist")))?;
        if !device.up {
            return Err(stop(Code::LinkDown, place, format!("{link} is down")));
        }
        if let Some(bridge) = here.bridge_of(device) {
            return Ok(Some(Step::Bridge { place: place.to_owned(), bridge, from: Some(link), frame }));
        }
        match device.mac {
            Some(mac) if mac != frame.dst && frame.dst != MacAddr::BROADCAST => {
                Err(self.not_ours(place, device, mac, frame.dst))
            }
            _ => Ok(Some(Step::Input { place: place.to_owned(), link, packet: frame.packet })),
        }
    }

    fn not_ours(&self, place: &str, link: &Link, mac: MacAddr, dst: MacAddr) -> Box<Verdict> {
        let tunnel = matches!(link.kind, LinkKind::Vxlan(_));
        let cause = match segment::owner_of_mac(self.facts, dst) {
            Some(far) if tunnel => {
                format!("it belongs to {} of {}: the sender's FDB entry names the wrong host", far.link, far.place)
            }
            Some(far) => format!("it belongs to {} of {}", far.link, far.place),
            None => "nobody has it: the sender's neighbour entry is stale".to_owned(),
        };
        let why =
            format!("the frame is for MAC {dst}, {} has {mac}: it is dropped without a word ({cause})", link.name);
        stop(Code::MacNotOurs, place, why)
    }

    /// A frame is in a bridge.
    fn bridge(&mut self, place: &str, bridge: LinkName, from: Option<LinkName>, frame: Frame) -> Next {
        let here = self.here(place)?;
        let device =
            here.link(bridge).ok_or_else(|| stop(Code::LinkMissing, place, format!("{bridge} does not exist")))?;
        if !device.up {
            return Err(stop(Code::LinkDown, place, format!("the bridge {bridge} is down")));
        }
        let depth = frame.packet.depth();
        let own = device.mac == Some(frame.dst) || here.ports(bridge).any(|p| p.mac == Some(frame.dst));
        if from.is_some() && own {
            let says = format!("MAC {} is {bridge}'s own: the frame goes up to the host", frame.dst);
            self.hop(place, What::Bridge, Some(bridge), depth, says);
            return Ok(Some(Step::Input { place: place.to_owned(), link: bridge, packet: frame.packet }));
        }
        let known = here.fdb(bridge, frame.dst).and_then(|e| Some((e, e.port?)));
        let port = match known {
            Some((entry, port)) => {
                let says = format!("the CAM table of {bridge} maps MAC {} to port {port}", frame.dst);
                self.hop(place, What::Bridge, Some(bridge), depth, says);
                self.evidence(words::fdb_line(entry).lines().map(str::to_owned));
                port
            }
            None => {
                let mut ports = here.ports(bridge).map(|p| p.name).filter(|p| Some(*p) != from);
                let leads = ports.find(|p| segment::who_is(self.facts, place, *p, frame.dst).is_some());
                let port = leads.ok_or_else(|| {
                    let why = format!(
                        "MAC {} is not in the CAM table of {bridge}, and no port leads to it: the sender's neighbour entry is stale",
                        frame.dst
                    );
                    stop(Code::MacUnknown, place, why)
                })?;
                let says = format!(
                    "MAC {} is not in the CAM table of {bridge} yet: the frame is flooded to every port, and {port} leads to it",
                    frame.dst
                );
                self.hop(place, What::Bridge, Some(bridge), depth, says);
                port
            }
        };
        Ok(Some(Step::Transmit { place: place.to_owned(), link: port, frame }))
    }

    /// A packet has come in: ours to unwrap, ours to keep, or to forward.
    fn input(&mut self, place: &str, link: LinkName, packet: Packet) -> Next {
        let here = self.here(place)?;
        if here.owns(packet.dst) {
            // Looked up for the refusals that a kernel has even for its own address (rp_filter).
            self.route(place, &packet, Some(link).filter(|_| !packet.src.is_some_and(|s| here.owns(s))))?;
            return match packet.inner {
                Some(wrapped) => self.unwrap(here, place, packet.dst.is_ipv4(), *wrapped),
                None => self.arrive(place, link, packet.dst),
            };
        }
        let (sysctl, value) = here.forwarding(link, packet.dst);
        if value == Some(false) {
            let why = format!("{} is not an address of {place}, and {place} does not forward", packet.dst);
            return Err(stop_with(Code::ForwardingOff, place, why, Some(format!("{sysctl} = 0"))));
        }
        let answer = self.route(place, &packet, Some(link))?;
        self.leave(here, place, &answer, packet, "forwarded: ")
    }

    fn arrive(&mut self, place: &str, link: LinkName, dst: IpAddr) -> Next {
        if place != self.target.place {
            let why = format!("{dst} is an address of {place}, where it should be one of {}", self.target.place);
            return Err(stop(Code::WrongPlace, place, why));
        }
        self.hop(place, What::Arrival, Some(link), 0, format!("{dst} is an address of {place}"));
        Ok(None)
    }

    /// A UDP datagram with a frame inside: some VXLAN here must have its family, its port and its VNI. The kernel has one socket for each
    /// family and port, and looks for the VNI among the devices of that socket (drivers/net/vxlan/vxlan_core.c, vxlan_find_sock).
    fn unwrap(&mut self, here: &PlaceFacts, place: &str, v4: bool, wrapped: Wrapped) -> Next {
        let Wrapped { vxlan: sent, frame, .. } = wrapped;
        let family = |v4: bool| if v4 { "IPv4" } else { "IPv6" };
        let mine = || here.links().filter_map(|l| if let LinkKind::Vxlan(v) = &l.kind { Some((l, v)) } else { None });
        let listed = || {
            let one = |(l, v): (&Link, &Vxlan)| {
                let other = if v.is_v4() == v4 { String::new() } else { format!(" over {}", family(v.is_v4())) };
                format!("{} has port {} and VNI {}{other}", l.name, v.port, v.vni)
            };
            let all = mine().map(one).collect::<Vec<_>>();
            if all.is_empty() { format!("{place} has no VXLAN device") } else { all.join(", ") }
        };
        let hears = |v: &Vxlan| (v.port, v.is_v4()) == (sent.port, v4);
        // A VXLAN opens its socket when it comes up (drivers/net/vxlan/vxlan_core.c, vxlan_open).
        if !mine().any(|(l, v)| hears(v) && l.up) {
            let down = mine().find(|(l, v)| hears(v) && !l.up).map(|(l, _)| l.name);
            if let Some(link) = down {
                return Err(stop(Code::LinkDown, place, format!("{link} is down")));
            }
            let why = format!("nothing listens on UDP port {} of {} ({})", sent.port, family(v4), listed());
            return Err(stop(Code::PortMismatch, place, why));
        }
        let found = mine().find(|(l, v)| hears(v) && v.vni == sent.vni && l.up);
        let Some((device, _)) = found else {
            let why = format!("the packet carries VNI {}, which nothing here has ({})", sent.vni, listed());
            return Err(stop(Code::VniMismatch, place, why));
        };
        let says = format!("UDP port {} and VNI {} are {}'s: the frame is unwrapped", sent.port, sent.vni, device.name);
        self.hop(place, What::Unwrap, Some(device.name), frame.packet.depth(), says);
        Ok(Some(Step::Receive { place: place.to_owned(), link: device.name, frame }))
    }
}

/// Why nothing leaves by a device. What is held without carrier still receives.
fn sends_nothing(device: &Link) -> Option<&'static str> {
    match (device.up, device.protodown) {
        (false, _) => Some("is down"),
        (true, Some(true)) => Some("is held without carrier (protodown)"),
        (true, _) => None,
    }
}

/// The tunnel's route to `dst` that `chosen`, which leads elsewhere, hides: by a longer prefix, a lower metric, an earlier place among
/// its twins, or a table that a rule asks first.
fn shadowed(here: &PlaceFacts, dst: IpAddr, chosen: &RouteEntry) -> Option<String> {
    let tunnel = |e: &RouteEntry| {
        let device = e.dev.and_then(|dev| here.link(dev));
        e.protocol != PROTO_KERNEL && device.is_some_and(|l| matches!(l.kind, LinkKind::Vxlan(_) | LinkKind::Tun))
    };
    if tunnel(chosen) {
        return None;
    }
    let covering = here.routes().filter(|r| r.key.dst.contains(dst) && r.key.dst.len() > 0);
    let entries = covering.flat_map(|r| r.entries.as_slice().iter().map(|e| (r.key, e)));
    entries.filter(|(_, e)| tunnel(e)).max_by_key(|(k, _)| k.dst.len()).map(|(k, e)| words::route_line(&k, e))
}

/// The other next hops of a route.
fn other_hops(here: &PlaceFacts, key: &RouteKey, chosen: &RouteEntry) -> Vec<String> {
    let routes = here.routes().filter(|route| route.key == *key);
    let entries = routes.flat_map(|route| route.entries.as_slice()).filter(|entry| *entry != chosen);
    entries.map(|entry| format!("or: {}", words::route_line(key, entry))).collect()
}

/// The MAC of an entry that the kernel would use (NUD_VALID: everything but NONE, INCOMPLETE and FAILED).
fn usable(entry: &Neigh) -> Option<MacAddr> {
    let dead = !entry.permanent && (entry.state & 0x21 != 0 || entry.state == 0);
    entry.mac.filter(|_| !dead)
}
