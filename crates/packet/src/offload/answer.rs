//! What a router does with a packet that goes no further: the ICMP error about it, or its fragments.

use std::net::IpAddr;

use super::Inner;
use crate::{bytes, checksum, icmp, icmpv6, ipv4};

/// Bytes of an ICMP error at most (RFC 1812 section 4.3.2.3), without the IP header that the kernel puts before it.
const MOST_V4: usize = 576 - ipv4::LEN;
/// As above (RFC 4443 section 2.4 c).
const MOST_V6: usize = crate::ipv6::LEAST_MTU - crate::ipv6::LEN;
/// Set on IPv4 options that every fragment carries (RFC 791 section 3.1).
const COPIED: u8 = 0x80;

/// Why a packet goes no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Nobody stands for its destination.
    NoRoute,
    /// It is larger than this, and must not be cut.
    TooBig {
        /// The largest packet that passes.
        mtu: u16,
    },
}

/// Writes the ICMP or ICMPv6 error about a checked packet; for IPv6 without its checksum, which covers addresses that the sender
/// chooses. False: no error may be sent about it (RFC 1122 section 3.2.2, RFC 4443 section 2.4 e).
pub fn error_about(packet: &[u8], inner: &Inner, trouble: Trouble, out: &mut Vec<u8>) -> bool {
    out.clear();
    if !may_answer(packet, inner) {
        return false;
    }
    let v6 = inner.src.is_ipv6();
    let (header, most) = if v6 { (icmpv6::LEN, MOST_V6) } else { (icmp::LEN, MOST_V4) };
    out.resize(header, 0);
    out.extend_from_slice(&packet[..packet.len().min(most - header)]);
    let (kind, code, rest) = match (trouble, v6) {
        (Trouble::NoRoute, false) => (3, 0, 0),
        (Trouble::TooBig { mtu }, false) => (3, 4, mtu.into()),
        (Trouble::NoRoute, true) => (1, 0, 0),
        (Trouble::TooBig { mtu }, true) => (2, 0, u32::from(mtu)),
    };
    bytes::put(out, 0, &[kind, code, 0, 0]);
    bytes::put(out, 4, &u32::to_be_bytes(rest));
    if !v6 {
        let sum = checksum::of(out);
        bytes::put(out, 2, &sum.to_be_bytes());
    }
    true
}

fn may_answer(packet: &[u8], inner: &Inner) -> bool {
    match (inner.src, inner.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let first = bytes::be16(packet, 6) & 0x1fff == 0;
            let about_error = inner.protocol == 1 && !matches!(packet.get(inner.header), Some(0 | 8 | 13..=18));
            let one = |ip: std::net::Ipv4Addr| !ip.is_unspecified() && !ip.is_multicast() && !ip.is_broadcast();
            first && !about_error && one(src) && one(dst) && !src.is_loopback()
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let (protocol, at) = upper(packet, inner);
            let about_error = protocol == 58 && packet.get(at).is_none_or(|kind| *kind < 128);
            !about_error && !src.is_unspecified() && !src.is_multicast() && !src.is_loopback() && !dst.is_multicast()
        }
        _ => false,
    }
}

/// The protocol behind an IPv6 packet's extension headers, and where it starts (RFC 8200 section 4). What a later fragment carries starts
/// in the first one: there it is the fragment header.
fn upper(packet: &[u8], inner: &Inner) -> (u8, usize) {
    let (mut protocol, mut at) = (inner.protocol, inner.header);
    while let Some(&[next, len, high, low, ..]) = packet.get(at..) {
        let bytes = match protocol {
            // Hop-by-hop options, routing, destination options.
            0 | 43 | 60 => 8 + usize::from(len) * 8,
            44 if u16::from_be_bytes([high, low]) & 0xfff8 == 0 => 8,
            _ => break,
        };
        (protocol, at) = (next, at + bytes);
    }
    (protocol, at)
}

/// Appends the fragments of a checked IPv4 packet to `out`, each at most `mtu` bytes, and their lengths to `lengths`. False, with both
/// as before: it must not be cut, or `mtu` has no room for eight bytes of payload.
pub fn fragment(packet: &[u8], inner: &Inner, mtu: usize, out: &mut Vec<u8>, lengths: &mut Vec<usize>) -> bool {
    let room = mtu.saturating_sub(inner.header) / 8 * 8;
    if inner.dont_fragment || room == 0 {
        return false;
    }
    let later = later_header(&packet[..inner.header]);
    let payload = &packet[inner.header..];
    let (flags, mut offset) = (bytes::be16(packet, 6) & 0xe000, usize::from(bytes::be16(packet, 6) & 0x1fff));
    let count = payload.len().div_ceil(room);
    for (number, part) in payload.chunks(room).enumerate() {
        let (start, last) = (out.len(), number + 1 == count);
        let header = if number == 0 { &packet[..inner.header] } else { &later };
        out.extend_from_slice(header);
        out.extend_from_slice(part);
        let whole = &mut out[start..];
        let more = if last { 0 } else { 0x2000 };
        bytes::put(whole, 2, &(whole.len() as u16).to_be_bytes());
        bytes::put(whole, 6, &(flags | more | offset as u16).to_be_bytes());
        bytes::put(whole, 10, &[0, 0]);
        let sum = checksum::of(&whole[..header.len()]);
        bytes::put(whole, 10, &sum.to_be_bytes());
        lengths.push(whole.len());
        offset += part.len() / 8;
    }
    true
}

/// The header of every fragment but the first: only the options that are to be copied.
fn later_header(header: &[u8]) -> Vec<u8> {
    let mut later = header[..ipv4::LEN].to_vec();
    let mut at = ipv4::LEN;
    while at < header.len() {
        let len = match header[at] {
            0 => break,
            1 => 1,
            _ => header.get(at + 1).map_or(1, |len| usize::from(*len)),
        };
        if len == 0 || at + len > header.len() {
            break;
        }
        if header[at] & COPIED != 0 {
            later.extend_from_slice(&header[at..at + len]);
        }
        at += len;
    }
    later.resize(later.len().next_multiple_of(4), 0);
    later[0] = 0x40 | (later.len() / 4) as u8;
    later
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A UDP packet of 10.0.0.1 → 10.0.0.2 without DF.
    fn packet(payload: &[u8], options: &[u8], protocol: u8, fragment: u16) -> Vec<u8> {
        let header = 20 + options.len();
        let mut out = vec![0; header];
        out[0] = 0x40 | (header / 4) as u8;
        bytes::put(&mut out, 2, &((header + payload.len()) as u16).to_be_bytes());
        bytes::put(&mut out, 6, &fragment.to_be_bytes());
        out[8] = 64;
        out[9] = protocol;
        bytes::put(&mut out, 12, &[10, 0, 0, 1, 10, 0, 0, 2]);
        bytes::put(&mut out, 20, options);
        let sum = checksum::of(&out);
        bytes::put(&mut out, 10, &sum.to_be_bytes());
        out.extend_from_slice(payload);
        out
    }

    #[test]
    fn errors_quote_the_packet_and_are_never_about_errors_or_later_fragments() {
        let long = packet(&[0x5a; 1400], &[], 17, 0x4000);
        let inner = Inner::check(&long).unwrap();
        let mut out = Vec::new();
        assert!(error_about(&long, &inner, Trouble::TooBig { mtu: 1300 }, &mut out));
        assert_eq!(out.len(), 556);
        let seen = icmp::Packet::new(&out).unwrap();
        seen.verify().unwrap();
        assert_eq!(icmp::Repr::parse(seen), icmp::Repr::Unreachable { code: 4, mtu: 1300 });
        assert_eq!(seen.payload(), &long[..548]);
        assert!(error_about(&long, &inner, Trouble::NoRoute, &mut out));
        assert_eq!(icmp::Repr::parse(icmp::Packet::new(&out).unwrap()), icmp::Repr::Unreachable { code: 0, mtu: 0 });
        let about = |bytes: &[u8]| {
            let inner = Inner::check(bytes).unwrap();
            error_about(bytes, &inner, Trouble::NoRoute, &mut Vec::new())
        };
        assert!(about(&packet(&[8, 0, 0, 0, 0, 0, 0, 0], &[], 1, 0)), "an echo request is answered");
        assert!(!about(&packet(&[3, 0, 0, 0, 0, 0, 0, 0], &[], 1, 0)), "an error is not");
        assert!(!about(&packet(&[0; 64], &[], 17, 185)), "nor a later fragment");
    }

    #[test]
    fn icmpv6_says_the_mtu_in_four_bytes() {
        let mut packet = vec![0; 40 + 1400];
        packet[0] = 0x60;
        bytes::put(&mut packet, 4, &1400u16.to_be_bytes());
        (packet[6], packet[7], packet[8], packet[24]) = (17, 64, 0xfd, 0xfd);
        let inner = Inner::check(&packet).unwrap();
        let mut out = Vec::new();
        assert!(error_about(&packet, &inner, Trouble::TooBig { mtu: 1280 }, &mut out));
        assert_eq!((out.len(), &out[..8]), (1240, &[2, 0, 0, 0, 0, 0, 5, 0][..]));
    }

    #[test]
    fn no_error_is_about_an_icmpv6_error_behind_extension_headers() {
        let about = |first: u8, rest: &[u8]| {
            let mut packet = vec![0; 40];
            packet[0] = 0x60;
            bytes::put(&mut packet, 4, &(rest.len() as u16).to_be_bytes());
            (packet[6], packet[7], packet[8], packet[24]) = (first, 64, 0xfd, 0xfd);
            packet.extend_from_slice(rest);
            let inner = Inner::check(&packet).unwrap();
            error_about(&packet, &inner, Trouble::NoRoute, &mut Vec::new())
        };
        let options = [58, 0, 1, 4, 0, 0, 0, 0];
        let (error, echo) = ([1, 0, 0, 0, 0, 0, 0, 0], [128, 0, 0, 0, 0, 0, 0, 0]);
        for first in [0, 43, 60] {
            assert!(!about(first, &[options, error].concat()) && about(first, &[options, echo].concat()));
        }
        let (whole, later) = ([58, 0, 0, 1, 0, 0, 0, 7], [58, 0, 0, 9, 0, 0, 0, 7]);
        assert!(!about(44, &[whole, error].concat()) && about(44, &[whole, echo].concat()));
        assert!(about(44, &[later, error].concat()), "what a later fragment is part of nobody knows");
        assert!(!about(60, &[[60, 0, 1, 4, 0, 0, 0, 0], options, error].concat()));
        assert!(!about(60, &options), "cut off");
    }

    proptest! {
        #[test]
        fn fragments_put_together_are_the_packet(
            payload in proptest::collection::vec(any::<u8>(), 1..3000),
            mtu in 68usize..1500,
            options in prop::sample::select(vec![vec![], vec![0x94, 4, 0, 0], vec![1, 1, 7, 3, 4, 0, 0, 0]]),
        ) {
            let whole = packet(&payload, &options, 17, 0);
            let inner = Inner::check(&whole).unwrap();
            let (mut out, mut lengths) = (Vec::new(), Vec::new());
            prop_assert!(fragment(&whole, &inner, mtu, &mut out, &mut lengths));
            prop_assert_eq!(lengths.iter().sum::<usize>(), out.len());
            let (mut at, mut back) = (0, vec![0; payload.len()]);
            for (number, len) in lengths.iter().enumerate() {
                let part = &out[at..at + len];
                prop_assert!(*len <= mtu);
                let inner = Inner::check(part).unwrap();
                let field = bytes::be16(part, 6);
                prop_assert_eq!(field & 0x2000 != 0, number + 1 < lengths.len());
                let offset = usize::from(field & 0x1fff) * 8;
                back[offset..offset + len - inner.header].copy_from_slice(&part[inner.header..]);
                at += len;
            }
            prop_assert_eq!(back, payload);
        }
    }
}
