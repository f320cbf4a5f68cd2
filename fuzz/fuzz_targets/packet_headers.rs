//! Each header alone: what parses, emits, and parses to the same meaning again, and an emitted checksum verifies.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use libfuzzer_sys::fuzz_target;
use twill_packet::{arp, ethernet, icmp, icmpv6, ipv4, ipv6, tcp, udp, vlan, vxlan};

const A: Ipv4Addr = Ipv4Addr::new(10, 1, 15, 2);
const B: Ipv6Addr = Ipv6Addr::LOCALHOST;

fuzz_target!(|input: (u8, &[u8])| {
    let (which, bytes) = input;
    let mut out = vec![0xa5; bytes.len() + 64];
    match which % 10 {
        0 => {
            let Ok(packet) = ethernet::Packet::new(bytes) else { return };
            let repr = ethernet::Repr::parse(packet);
            repr.emit(&mut out).unwrap();
            assert_eq!(out[..ethernet::LEN], bytes[..ethernet::LEN]);
        }
        1 => {
            let Ok(packet) = vlan::Packet::new(bytes) else { return };
            let repr = vlan::Repr::parse(packet);
            repr.emit(&mut out).unwrap();
            assert_eq!(out[..vlan::LEN], bytes[..vlan::LEN]);
        }
        2 => {
            let Ok(repr) = arp::Packet::new(bytes).and_then(arp::Repr::parse) else { return };
            repr.emit(&mut out).unwrap();
            assert_eq!(out[..arp::LEN], bytes[..arp::LEN]);
        }
        3 => {
            let Ok(packet) = ipv4::Packet::new(bytes) else { return };
            let repr = ipv4::Repr::parse(packet);
            repr.emit(&mut out).unwrap();
            out.resize(out.len().max(repr.total_len.into()), 0);
            let again = ipv4::Packet::new(&out).unwrap();
            again.verify().unwrap();
            assert_eq!(ipv4::Repr::parse(again), repr);
        }
        4 => {
            let Ok(packet) = ipv6::Packet::new(bytes) else { return };
            ipv6::Repr::parse(packet).emit(&mut out).unwrap();
            assert_eq!(out[..ipv6::LEN], bytes[..ipv6::LEN]);
        }
        5 => {
            let Ok(packet) = icmp::Packet::new(bytes) else { return };
            let repr = icmp::Repr::parse(packet);
            repr.emit(&mut out).unwrap();
            let again = icmp::Packet::new(&out).unwrap();
            again.verify().unwrap();
            assert_eq!(icmp::Repr::parse(again), repr);
        }
        6 => {
            let Ok(repr) = icmpv6::Packet::new(bytes).and_then(icmpv6::Repr::parse) else { return };
            repr.emit(B, B, &mut out).unwrap();
            let again = icmpv6::Packet::new(&out).unwrap();
            again.verify(B, B).unwrap();
            assert_eq!(icmpv6::Repr::parse(again).unwrap(), repr);
        }
        7 => {
            let Ok(packet) = udp::Packet::new(bytes) else { return };
            let repr = udp::Repr::parse(packet);
            out.resize(out.len().max(repr.len.into()), 0);
            let ends = (IpAddr::V4(A), IpAddr::V4(A));
            repr.emit(Some(ends), &mut out).unwrap();
            let again = udp::Packet::new(&out).unwrap();
            again.verify(ends.0, ends.1).unwrap();
            assert_eq!(udp::Repr::parse(again), repr);
        }
        8 => {
            let Ok(packet) = tcp::Packet::new(bytes) else { return };
            let repr = tcp::Repr::parse(packet);
            repr.emit(A.into(), A.into(), &mut out).unwrap();
            let again = tcp::Packet::new(&out).unwrap();
            again.verify(A.into(), A.into()).unwrap();
            assert_eq!(tcp::Repr::parse(again), repr);
        }
        _ => {
            let Ok(repr) = vxlan::Packet::new(bytes).and_then(vxlan::Repr::parse) else { return };
            repr.emit(&mut out).unwrap();
            assert_eq!(vxlan::Packet::new(&out).and_then(vxlan::Repr::parse), Ok(repr));
        }
    }
});
