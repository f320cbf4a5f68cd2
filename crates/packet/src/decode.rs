//! A whole frame, layer by layer.
//!
//! ```text
//!    0  outer Ethernet  02:… > 02:…  IPv4
//!   14    outer IPv4    10.168.0.2 > 10.168.0.3  UDP …
//!   34      outer UDP   port 40000 > 8472 …
//!   42        VXLAN     VNI 1
//!   50          inner Ethernet …
//! ```

use std::fmt::Write as _;
use std::net::IpAddr;

use crate::ethernet::EtherType;
use crate::ipv4::Protocol;
use crate::{Error, arp, ethernet, icmp, icmpv6, ipv4, ipv6, tcp, udp, vlan, vxlan};

/// UDP destination ports that carry VXLAN unless the caller knows better.
pub const VXLAN_PORTS: [u16; 2] = [vxlan::PORT_LINUX, vxlan::PORT_IANA];
/// UDP destination port of flannel's udp backend: the payload is a bare IP packet (pkg/backend/udp/udp_amd64.go).
pub const BARE_PORT: u16 = 8285;

/// One layer of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer<'a> {
    /// Where it starts, in bytes from the start of the frame.
    pub offset: usize,
    /// Tunnels that it lies in: 0 outside, 1 inside a VXLAN or a datagram of the udp backend.
    pub depth: usize,
    /// What it says.
    pub header: Header<'a>,
}

/// What a layer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header<'a> {
    /// Ethernet.
    Ethernet(ethernet::Repr),
    /// 802.1Q tag.
    Vlan(vlan::Repr),
    /// ARP.
    Arp(arp::Repr),
    /// IPv4.
    Ipv4(ipv4::Repr<'a>),
    /// IPv6.
    Ipv6(ipv6::Repr),
    /// ICMP.
    Icmp(icmp::Repr),
    /// ICMPv6.
    Icmpv6(icmpv6::Repr),
    /// UDP.
    Udp(udp::Repr),
    /// TCP.
    Tcp(tcp::Repr<'a>),
    /// VXLAN.
    Vxlan(vxlan::Repr),
    /// Bytes that are not looked into.
    Data(&'a [u8]),
    /// What stands behind the packet in a datagram of the udp backend: the packets of others that the device is still to cut apart.
    More(&'a [u8]),
    /// Bytes that are not what the layer before announced.
    Bad {
        /// What they should have been.
        name: &'static str,
        /// Why they are not.
        error: Error,
    },
}

/// A field's value, for whoever writes JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A number.
    Number(u64),
    /// A text.
    Text(String),
}

/// The layers of an Ethernet frame, outermost first. Never fails: what cannot be read ends the list as [`Header::Bad`].
pub fn decode(frame: &[u8]) -> Vec<Layer<'_>> {
    decode_with(frame, &VXLAN_PORTS)
}

/// The layers of a bare IP packet, as a TUN device has them; offsets count from its first byte.
pub fn decode_packet(packet: &[u8]) -> Vec<Layer<'_>> {
    walk(packet, &VXLAN_PORTS, Next::Bare(packet))
}

/// As [`decode`]; `ports` are the UDP destination ports that carry VXLAN.
pub fn decode_with<'a>(frame: &'a [u8], ports: &[u16]) -> Vec<Layer<'a>> {
    walk(frame, ports, Next::Ethernet(frame))
}

fn walk<'a>(frame: &'a [u8], ports: &[u16], first: Next<'a>) -> Vec<Layer<'a>> {
    let mut walk = Walk { frame, ports, layers: Vec::with_capacity(8), depth: 0, more: &[] };
    let mut next = first;
    while let Some(step) = walk.step(next) {
        next = step;
    }
    if !walk.more.is_empty() {
        let header = Header::More(walk.more);
        walk.layers.push(Layer { offset: walk.offset(walk.more), depth: walk.depth, header });
    }
    walk.layers
}

/// What comes next, and its bytes.
#[derive(Clone, Copy)]
enum Next<'a> {
    Ethernet(&'a [u8]),
    Typed(EtherType, &'a [u8]),
    Protocol(Protocol, &'a [u8]),
    Vxlan(&'a [u8]),
    /// An IP packet without a frame around it.
    Bare(&'a [u8]),
    Data(&'a [u8]),
}

struct Walk<'a, 'p> {
    frame: &'a [u8],
    ports: &'p [u16],
    layers: Vec<Layer<'a>>,
    depth: usize,
    more: &'a [u8],
}

impl<'a> Next<'a> {
    /// What the bytes should be, and the bytes.
    const fn parts(self) -> (&'static str, &'a [u8]) {
        match self {
            Next::Ethernet(b) => ("Ethernet", b),
            Next::Typed(EtherType::ARP, b) => ("ARP", b),
            Next::Typed(EtherType::IPV4, b) => ("IPv4", b),
            Next::Typed(EtherType::IPV6, b) => ("IPv6", b),
            Next::Typed(EtherType::VLAN | EtherType::QINQ, b) => ("802.1Q", b),
            Next::Protocol(Protocol::ICMP, b) => ("ICMP", b),
            Next::Protocol(Protocol::ICMPV6, b) => ("ICMPv6", b),
            Next::Protocol(Protocol::UDP, b) => ("UDP", b),
            Next::Protocol(Protocol::TCP, b) => ("TCP", b),
            Next::Vxlan(b) => ("VXLAN", b),
            Next::Bare(b) => ("IP", b),
            Next::Typed(_, b) | Next::Protocol(_, b) | Next::Data(b) => ("data", b),
        }
    }
}

type Read<'a> = Result<(Header<'a>, Option<Next<'a>>), Error>;

impl<'a> Walk<'a, '_> {
    /// Notes one layer, and gives what follows it.
    fn step(&mut self, next: Next<'a>) -> Option<Next<'a>> {
        let (name, bytes) = next.parts();
        let offset = self.offset(bytes);
        let (header, follows) = self.read(next).unwrap_or_else(|error| (Header::Bad { name, error }, None));
        if header == Header::Data(&[]) {
            return None;
        }
        self.layers.push(Layer { offset, depth: self.depth, header });
        let inside = matches!((header, follows), (Header::Vxlan(_), _) | (Header::Udp(_), Some(Next::Bare(_))));
        self.depth += usize::from(inside);
        if let (Header::Udp(_), Some(Next::Bare(payload)), []) = (header, follows, self.more)
            && let Some((one, more)) = bare_len(payload).and_then(|len| payload.split_at_checked(len))
        {
            self.more = more;
            return Some(Next::Bare(one));
        }
        follows
    }

    /// Every slice of the walk lies in the frame and reaches at most to its end.
    fn offset(&self, bytes: &[u8]) -> usize {
        bytes.as_ptr() as usize - self.frame.as_ptr() as usize
    }

    /// The header at the start of these bytes, and what follows it.
    fn read(&self, next: Next<'a>) -> Read<'a> {
        match next {
            Next::Ethernet(b) => {
                let packet = ethernet::Packet::new(b)?;
                let repr = ethernet::Repr::parse(packet);
                Ok((Header::Ethernet(repr), Some(Next::Typed(repr.ethertype, packet.payload()))))
            }
            Next::Typed(ethertype, b) => self.read_typed(ethertype, b),
            Next::Protocol(protocol, b) => self.read_protocol(protocol, b),
            Next::Vxlan(b) => {
                let packet = vxlan::Packet::new(b)?;
                Ok((Header::Vxlan(vxlan::Repr::parse(packet)?), Some(Next::Ethernet(packet.payload()))))
            }
            Next::Bare(b) => match b.first().map(|first| first >> 4) {
                Some(4) => self.read_typed(EtherType::IPV4, b),
                Some(6) => self.read_typed(EtherType::IPV6, b),
                _ => Ok((Header::Data(b), None)),
            },
            Next::Data(b) => Ok((Header::Data(b), None)),
        }
    }

    fn read_typed(&self, ethertype: EtherType, b: &'a [u8]) -> Read<'a> {
        Ok(match ethertype {
            EtherType::VLAN | EtherType::QINQ => {
                let packet = vlan::Packet::new(b)?;
                let repr = vlan::Repr::parse(packet);
                (Header::Vlan(repr), Some(Next::Typed(repr.ethertype, packet.payload())))
            }
            EtherType::ARP => (Header::Arp(arp::Repr::parse(arp::Packet::new(b)?)?), None),
            EtherType::IPV4 => {
                let packet = ipv4::Packet::new(b)?;
                let repr = ipv4::Repr::parse(packet);
                // Only the first fragment carries the next header.
                let first = repr.fragment == 0;
                let payload = packet.payload();
                let next = if first { Next::Protocol(repr.protocol, payload) } else { Next::Data(payload) };
                (Header::Ipv4(repr), Some(next))
            }
            EtherType::IPV6 => {
                let packet = ipv6::Packet::new(b)?;
                let repr = ipv6::Repr::parse(packet);
                (Header::Ipv6(repr), Some(Next::Protocol(repr.next_header, packet.payload())))
            }
            _ => (Header::Data(b), None),
        })
    }

    fn read_protocol(&self, protocol: Protocol, b: &'a [u8]) -> Read<'a> {
        Ok(match protocol {
            Protocol::ICMP => {
                let packet = icmp::Packet::new(b)?;
                (Header::Icmp(icmp::Repr::parse(packet)), Some(Next::Data(packet.payload())))
            }
            Protocol::ICMPV6 => {
                let packet = icmpv6::Packet::new(b)?;
                let repr = icmpv6::Repr::parse(packet)?;
                (Header::Icmpv6(repr), Some(Next::Data(packet.payload(&repr))))
            }
            Protocol::UDP => {
                let packet = udp::Packet::new(b)?;
                let repr = udp::Repr::parse(packet);
                let payload = packet.payload();
                let next = match repr.dst_port {
                    port if self.ports.contains(&port) => Next::Vxlan(payload),
                    BARE_PORT => Next::Bare(payload),
                    _ => Next::Data(payload),
                };
                (Header::Udp(repr), Some(next))
            }
            Protocol::TCP => {
                let packet = tcp::Packet::new(b)?;
                (Header::Tcp(tcp::Repr::parse(packet)), Some(Next::Data(packet.payload())))
            }
            _ => (Header::Data(b), None),
        })
    }
}

/// Bytes of the IP packet that starts here, as its header says.
fn bare_len(bytes: &[u8]) -> Option<usize> {
    let word = |at: usize| Some(usize::from(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?])));
    match bytes.first()? >> 4 {
        4 => word(2).filter(|&len| len >= ipv4::LEN),
        6 => word(4).map(|len| ipv6::LEN + len),
        _ => None,
    }
}

/// One line for each layer: byte offset, name (`outer`, `inner` where there is a tunnel), meaning; each layer a step further in.
pub fn render(layers: &[Layer<'_>]) -> String {
    let tunnel = layers.iter().any(|l| l.depth > 0 || matches!(l.header, Header::Vxlan(_)));
    let mut text = String::new();
    for (step, layer) in layers.iter().enumerate() {
        let side = match layer.header {
            Header::Vxlan(_) | Header::Data(_) | Header::More(_) => "",
            _ if !tunnel => "",
            _ if layer.depth == 0 => "outer ",
            _ => "inner ",
        };
        let _ = writeln!(
            text,
            "{:5}  {:indent$}{side}{}  {}",
            layer.offset,
            "",
            layer.name(),
            layer.header.meaning(),
            indent = step * 2
        );
    }
    text
}

impl Layer<'_> {
    /// The protocol's name.
    pub const fn name(&self) -> &'static str {
        match self.header {
            Header::Ethernet(_) => "Ethernet",
            Header::Vlan(_) => "802.1Q",
            Header::Arp(_) => "ARP",
            Header::Ipv4(_) => "IPv4",
            Header::Ipv6(_) => "IPv6",
            Header::Icmp(_) => "ICMP",
            Header::Icmpv6(_) => "ICMPv6",
            Header::Udp(_) => "UDP",
            Header::Tcp(_) => "TCP",
            Header::Vxlan(_) => "VXLAN",
            Header::Data(_) => "data",
            Header::More(_) => "more",
            Header::Bad { name, .. } => name,
        }
    }
}

impl Header<'_> {
    /// The header's fields in one line.
    pub fn meaning(&self) -> String {
        match self {
            Header::Ethernet(r) => r.to_string(),
            Header::Vlan(r) => r.to_string(),
            Header::Arp(r) => r.to_string(),
            Header::Ipv4(r) => r.to_string(),
            Header::Ipv6(r) => r.to_string(),
            Header::Icmp(r) => r.to_string(),
            Header::Icmpv6(r) => r.to_string(),
            Header::Udp(r) => r.to_string(),
            Header::Tcp(r) => r.to_string(),
            Header::Vxlan(r) => r.to_string(),
            Header::Data(b) => format!("{} bytes", b.len()),
            Header::More(b) => format!("{} bytes of packets that leave in datagrams of their own", b.len()),
            Header::Bad { error, .. } => format!("not readable: {error}"),
        }
    }

    /// The fields that a program asks for, by name; addresses as text.
    pub fn fields(&self) -> Vec<(&'static str, Value)> {
        let number = |n: u64| Value::Number(n);
        let text = |t: &dyn std::fmt::Display| Value::Text(t.to_string());
        match self {
            Header::Ethernet(r) => vec![("src", text(&r.src)), ("dst", text(&r.dst)), ("type", text(&r.ethertype))],
            Header::Vlan(r) => vec![
                ("vlan", number(r.vlan.into())),
                ("priority", number(r.priority.into())),
                ("type", text(&r.ethertype)),
            ],
            Header::Arp(r) => vec![
                ("operation", number(r.operation.0.into())),
                ("sender_mac", text(&r.sender_mac)),
                ("sender_ip", text(&r.sender_ip)),
                ("target_mac", text(&r.target_mac)),
                ("target_ip", text(&r.target_ip)),
            ],
            Header::Ipv4(r) => ip_fields(r.src.into(), r.dst.into(), r.protocol, r.ttl, r.total_len),
            Header::Ipv6(r) => ip_fields(r.src.into(), r.dst.into(), r.next_header, r.hop_limit, r.payload_len),
            Header::Icmp(r) => vec![("message", text(r))],
            Header::Icmpv6(r) => vec![("message", text(r))],
            Header::Udp(r) => vec![
                ("src_port", number(r.src_port.into())),
                ("dst_port", number(r.dst_port.into())),
                ("length", number(r.len.into())),
            ],
            Header::Tcp(r) => vec![
                ("src_port", number(r.src_port.into())),
                ("dst_port", number(r.dst_port.into())),
                ("seq", number(r.seq.into())),
                ("ack", number(r.ack.into())),
                ("flags", Value::Text(r.flag_names().collect::<Vec<_>>().join(","))),
                ("window", number(r.window.into())),
            ],
            Header::Vxlan(r) => {
                let mut fields = vec![("vni", number(r.vni.into()))];
                fields.extend(r.policy.map(|p| ("group", number(p.group.into()))));
                fields
            }
            Header::Data(b) | Header::More(b) => vec![("length", number(b.len() as u64))],
            Header::Bad { error, .. } => vec![("error", text(error))],
        }
    }
}

fn ip_fields(src: IpAddr, dst: IpAddr, protocol: Protocol, ttl: u8, len: u16) -> Vec<(&'static str, Value)> {
    vec![
        ("src", Value::Text(src.to_string())),
        ("dst", Value::Text(dst.to_string())),
        ("protocol", Value::Text(protocol.to_string())),
        ("ttl", Value::Number(ttl.into())),
        ("length", Value::Number(len.into())),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mac;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    /// Puts a header's bytes before `inner`.
    fn before(len: usize, inner: &[u8], emit: impl FnOnce(&mut [u8]) -> Result<(), Error>) -> Vec<u8> {
        let mut out = vec![0xa5; len];
        out.extend_from_slice(inner);
        emit(&mut out).unwrap();
        out
    }

    fn ip(src: [u8; 4], dst: [u8; 4], protocol: Protocol, inner: &[u8]) -> Vec<u8> {
        let repr = ipv4::Repr {
            tos: 0,
            total_len: (ipv4::LEN + inner.len()) as u16,
            ident: 1,
            flags: 0,
            fragment: 0,
            ttl: 64,
            protocol,
            src: Ipv4Addr::from(src),
            dst: Ipv4Addr::from(dst),
            options: &[],
        };
        before(ipv4::LEN, inner, |out| repr.emit(out))
    }

    fn ether(src: u8, dst: u8, inner: &[u8]) -> Vec<u8> {
        let repr = ethernet::Repr {
            dst: Mac([2, 0, 0, 0, 0, dst]),
            src: Mac([2, 0, 0, 0, 0, src]),
            ethertype: EtherType::IPV4,
        };
        before(ethernet::LEN, inner, |out| repr.emit(out))
    }

    /// A ping from container-1 to container-2 of the vxlan scenario, as it stands on the underlay.
    fn overlay_ping() -> Vec<u8> {
        let echo = before(icmp::LEN, &[7; 56], |out| icmp::Repr::EchoRequest { ident: 3, seq: 6 }.emit(out));
        let inner = ether(15, 16, &ip([10, 1, 15, 2], [10, 1, 16, 3], Protocol::ICMP, &echo));
        let vxlan = before(vxlan::LEN, &inner, |out| vxlan::Repr { vni: 1, policy: None }.emit(out));
        let len = (udp::LEN + vxlan.len()) as u16;
        let udp = before(udp::LEN, &vxlan, |out| udp::Repr { src_port: 40000, dst_port: 8472, len }.emit(None, out));
        ether(2, 3, &ip([10, 168, 0, 2], [10, 168, 0, 3], Protocol::UDP, &udp))
    }

    #[test]
    fn a_captured_overlay_packet_is_named_layer_by_layer() {
        let frame = overlay_ping();
        let text = render(&decode(&frame));
        let want = "    0  outer Ethernet  02:00:00:00:00:02 > 02:00:00:00:00:03  IPv4
   14    outer IPv4  10.168.0.2 > 10.168.0.3  UDP  ttl 64  length 134
   34      outer UDP  port 40000 > 8472  length 114
   42        VXLAN  VNI 1
   50          inner Ethernet  02:00:00:00:00:0f > 02:00:00:00:00:10  IPv4
   64            inner IPv4  10.1.15.2 > 10.1.16.3  ICMP  ttl 64  length 84
   84              inner ICMP  echo request  id 3  seq 6
   92                data  56 bytes
";
        assert_eq!(text, want);
    }

    #[test]
    fn a_cut_frame_is_named_up_to_the_cut() {
        let frame = overlay_ping();
        let layers = decode(&frame[..60]);
        assert_eq!(layers.len(), 5);
        assert_eq!(layers[4].offset, 50);
        assert_eq!(layers[4].header.meaning(), "not readable: cut off: 10 bytes where 14 are needed");
    }

    #[test]
    fn a_datagram_that_is_still_to_be_cut_says_how_much_is_behind_its_first_packet() {
        let one = ip([10, 1, 15, 2], [10, 1, 16, 3], Protocol::UDP, &[0, 7, 0, 9, 0, 9, 0, 0, 1]);
        let frame = |payload: &[u8]| {
            let len = (udp::LEN + payload.len()) as u16;
            let repr = udp::Repr { src_port: 8285, dst_port: BARE_PORT, len };
            let udp = before(udp::LEN, payload, |out| repr.emit(None, out));
            ether(2, 3, &ip([10, 168, 0, 2], [10, 168, 0, 3], Protocol::UDP, &udp))
        };
        let text = render(&decode(&frame(&one.repeat(3))));
        let want = "   71              more  58 bytes of packets that leave in datagrams of their own\n";
        assert!(text.ends_with(want) && text.lines().count() == 7, "{text}");
        assert_eq!(decode(&frame(&one)).len(), 6);
    }

    #[test]
    fn another_port_is_a_tunnel_only_when_told() {
        let mut frame = overlay_ping();
        frame[36..38].copy_from_slice(&9999u16.to_be_bytes());
        assert!(!decode(&frame).iter().any(|l| l.name() == "VXLAN"));
        assert!(decode_with(&frame, &[9999]).iter().any(|l| l.name() == "VXLAN"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn any_bytes_decode_to_layers_in_order(mut frame in proptest::collection::vec(any::<u8>(), 0..200), at in 0usize..60, cut in 0usize..150) {
            // Half the cases start as a real packet with a wrong byte, so that the inner layers are reached.
            if frame.len() % 2 == 0 {
                let noise = frame.first().copied().unwrap_or(0);
                frame = overlay_ping();
                frame[at] ^= noise;
                frame.truncate(cut);
            }
            let layers = decode(&frame);
            prop_assert!(!layers.is_empty());
            let behind = |w: &[Layer<'_>]| w[0].offset < w[1].offset || matches!(w[1].header, Header::More(_));
            prop_assert!(layers.windows(2).all(|w| behind(w) && w[0].depth <= w[1].depth));
            prop_assert_eq!(render(&layers).lines().count(), layers.len());
        }
    }
}
