//! Frames that we write, read by tshark and by ourselves: both name the same layers and fields, and tshark finds every checksum right.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "a test file: it fails and skips aloud")]
#![allow(clippy::disallowed_methods, reason = "the test asks another program what it reads")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;

use twill_packet::decode::Value;
use twill_packet::ethernet::EtherType;
use twill_packet::ipv4::Protocol;
use twill_packet::{Error, Mac, arp, decode, ethernet, icmp, icmpv6, ipv4, ipv6, tcp, udp, vlan, vxlan};

/// What tshark is asked for, and how the same is called in our decoder: (tshark's field, our layer, our field).
const FIELDS: [(&str, &str, &str); 22] = [
    ("eth.src", "Ethernet", "src"),
    ("eth.dst", "Ethernet", "dst"),
    ("vlan.id", "802.1Q", "vlan"),
    ("vlan.priority", "802.1Q", "priority"),
    ("arp.opcode", "ARP", "operation"),
    ("arp.src.proto_ipv4", "ARP", "sender_ip"),
    ("arp.dst.hw_mac", "ARP", "target_mac"),
    ("ip.src", "IPv4", "src"),
    ("ip.dst", "IPv4", "dst"),
    ("ip.ttl", "IPv4", "ttl"),
    ("ip.len", "IPv4", "length"),
    ("ipv6.src", "IPv6", "src"),
    ("ipv6.dst", "IPv6", "dst"),
    ("ipv6.plen", "IPv6", "length"),
    ("udp.srcport", "UDP", "src_port"),
    ("udp.dstport", "UDP", "dst_port"),
    ("udp.length", "UDP", "length"),
    ("tcp.seq_raw", "TCP", "seq"),
    ("tcp.window_size_value", "TCP", "window"),
    ("tcp.dstport", "TCP", "dst_port"),
    ("vxlan.vni", "VXLAN", "vni"),
    ("vxlan.gbp", "VXLAN", "group"),
];
/// Status 1 is good; an empty one: nothing to check.
const CHECKSUMS: [&str; 5] = [
    "ip.checksum.status",
    "udp.checksum.status",
    "tcp.checksum.status",
    "icmp.checksum.status",
    "icmpv6.checksum.status",
];

fn before(len: usize, inner: &[u8], emit: impl FnOnce(&mut [u8]) -> Result<(), Error>) -> Vec<u8> {
    let mut out = vec![0xa5; len];
    out.extend_from_slice(inner);
    emit(&mut out).unwrap();
    out
}

fn ether(ethertype: EtherType, n: u8, inner: &[u8]) -> Vec<u8> {
    let repr = ethernet::Repr { dst: Mac([2, 0, 0, 0, 1, n]), src: Mac([2, 0, 0, 0, 2, n]), ethertype };
    before(ethernet::LEN, inner, |out| repr.emit(out))
}

fn ends(v6: bool, n: u8) -> (IpAddr, IpAddr) {
    if v6 {
        let ip = |host: u16| IpAddr::V6(Ipv6Addr::new(0xfd00, u16::from(n), 0, 0, 0, 0, 0, host));
        (ip(2), ip(3))
    } else {
        (IpAddr::V4(Ipv4Addr::new(10, 1, n, 2)), IpAddr::V4(Ipv4Addr::new(10, 1, n, 3)))
    }
}

/// An Ethernet frame around an IP packet, tagged or not.
fn frame(ends: (IpAddr, IpAddr), protocol: Protocol, n: u8, tag: bool, payload: &[u8]) -> Vec<u8> {
    let (packet, ethertype) = match ends {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let options: &[u8] = if n.is_multiple_of(3) { &[1, 1, 1, 0] } else { &[] };
            let total_len = (ipv4::LEN + options.len() + payload.len()) as u16;
            let repr = ipv4::Repr {
                tos: n,
                total_len,
                ident: 7,
                flags: 2,
                fragment: 0,
                ttl: 64 - n,
                protocol,
                src,
                dst,
                options,
            };
            (before(repr.header_len(), payload, |out| repr.emit(out)), EtherType::IPV4)
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let payload_len = payload.len() as u16;
            let repr =
                ipv6::Repr { class: n, flow: 0x12345, payload_len, next_header: protocol, hop_limit: 64, src, dst };
            (before(ipv6::LEN, payload, |out| repr.emit(out)), EtherType::IPV6)
        }
        _ => panic!("two families"),
    };
    if !tag {
        return ether(ethertype, n, &packet);
    }
    let repr = vlan::Repr { priority: 5, drop_eligible: false, vlan: 100 + u16::from(n), ethertype };
    ether(EtherType::VLAN, n, &before(vlan::LEN, &packet, |out| repr.emit(out)))
}

/// One frame of every kind of payload.
fn plain(v6: bool, n: u8, tag: bool) -> Vec<Vec<u8>> {
    let (src, dst) = ends(v6, n);
    let data = [0x61; 11];
    let udp =
        before(udp::LEN, &data, |out| udp::Repr { src_port: 5000, dst_port: 7, len: 19 }.emit(Some((src, dst)), out));
    let head = tcp::Repr {
        src_port: 43210,
        dst_port: 8080,
        seq: 0x0102_0304,
        ack: 5,
        flags: 0x018,
        window: 501,
        urgent: 0,
        options: &[1, 1, 1, 0],
    };
    let tcp = before(head.header_len(), &data, |out| head.emit(src, dst, out));
    let mut frames =
        vec![frame((src, dst), Protocol::UDP, n, tag, &udp), frame((src, dst), Protocol::TCP, n, tag, &tcp)];
    match (src, dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            let echo = before(icmp::LEN, &data, |out| icmp::Repr::EchoRequest { ident: 3, seq: 6 }.emit(out));
            frames.push(frame((src, dst), Protocol::ICMP, n, tag, &echo));
            let repr = arp::Repr {
                operation: arp::Operation::REPLY,
                sender_mac: Mac([2, 0, 0, 0, 2, n]),
                sender_ip: s,
                target_mac: Mac([2, 0, 0, 0, 1, n]),
                target_ip: d,
            };
            frames.push(ether(EtherType::ARP, n, &before(arp::LEN, &[], |out| repr.emit(out))));
        }
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            let ask = icmpv6::Repr::Solicitation { target: d, source: Some(Mac([2, 0, 0, 0, 2, n])) };
            let ask = before(ask.header_len(), &[], |out| ask.emit(s, d, out));
            frames.push(frame((src, dst), Protocol::ICMPV6, n, tag, &ask));
        }
        _ => panic!("two families"),
    }
    frames
}

/// `inner` as it stands on the underlay.
fn overlay(inner: &[u8], v6: bool, n: u8, port: u16) -> Vec<u8> {
    let policy = n.is_multiple_of(2).then_some(vxlan::Policy { group: 77, dont_learn: false, applied: true });
    let body = before(vxlan::LEN, inner, |out| vxlan::Repr { vni: 0x01_0000 + u32::from(n), policy }.emit(out));
    let len = (udp::LEN + body.len()) as u16;
    let ends = ends(v6, 200 + n);
    let udp = before(udp::LEN, &body, |out| udp::Repr { src_port: 40000, dst_port: port, len }.emit(Some(ends), out));
    frame(ends, Protocol::UDP, n, false, &udp)
}

fn frames() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (n, (v6, tag)) in [(false, false), (false, true), (true, false), (true, true)].into_iter().enumerate() {
        all.extend(plain(v6, n as u8, tag));
    }
    let inner = all.clone();
    for (n, frame) in inner.iter().enumerate() {
        let port = if n % 2 == 0 { vxlan::PORT_LINUX } else { vxlan::PORT_IANA };
        all.push(overlay(frame, n % 3 == 0, (n % 30) as u8, port));
    }
    all
}

/// A pcap file (magic 0xa1b2c3d4, link type 1 = Ethernet).
fn pcap(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65_535, 1] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    for frame in frames {
        for word in [0, 0, frame.len() as u32, frame.len() as u32] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(frame);
    }
    file
}

/// Our values of one field, outermost first, as tshark joins them.
fn ours(frame: &[u8], layer: &str, field: &str) -> String {
    let layers = decode(frame);
    let fields = layers.iter().filter(|l| l.name() == layer).flat_map(|l| l.header.fields());
    let text = fields.filter(|(name, _)| *name == field).map(|(_, value)| match value {
        Value::Number(n) => n.to_string(),
        Value::Text(t) => t,
    });
    text.collect::<Vec<_>>().join(",")
}

#[test]
fn tshark_reads_what_we_write_and_names_what_we_name() {
    let version = Command::new("tshark").arg("--version").output();
    if !version.is_ok_and(|out| out.status.success()) {
        println!("SKIP: tshark is not installed");
        return;
    }
    let frames = frames();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("frames.pcap");
    std::fs::write(&file, pcap(&frames)).unwrap();
    let mut command = Command::new("tshark");
    command.args(["-n", "-r"]).arg(&file).args(["-d", "udp.port==8472,vxlan", "-T", "fields"]);
    command.args(["-E", "separator=|", "-E", "occurrence=a", "-E", "aggregator=,"]);
    for protocol in ["ip", "udp", "tcp"] {
        command.args(["-o", &format!("{protocol}.check_checksum:TRUE")]);
    }
    for name in FIELDS.iter().map(|(name, ..)| *name).chain(CHECKSUMS) {
        command.args(["-e", name]);
    }
    let out = command.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(text.lines().count(), frames.len(), "{text}");
    assert!(text.contains("|65536|"), "tshark names a VNI: {text}");
    for (number, (line, frame)) in text.lines().zip(&frames).enumerate() {
        let cells: Vec<&str> = line.split('|').collect();
        for ((name, layer, field), theirs) in FIELDS.iter().zip(&cells) {
            let ours = ours(frame, layer, field);
            // tshark gives a group of 0 where the extension is not used.
            let theirs = if *field == "group" && ours.is_empty() { theirs.trim_matches('0') } else { theirs };
            assert_eq!(ours, theirs, "frame {number}, {name}\n{}", twill_packet::render(&decode(frame)));
        }
        for (name, status) in CHECKSUMS.iter().zip(&cells[FIELDS.len()..]) {
            assert!(status.split(',').all(|s| s.is_empty() || s == "1"), "frame {number}, {name}: {status}");
        }
    }
}
