//! Any packet that passes the check, and any MTU: what is said about it is whole and quotes it; its fragments are whole, fit, and together
//! are the packet.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_packet::offload::{Inner, Trouble, error_about, fragment};
use twill_packet::{icmp, icmpv6};

fuzz_target!(|input: (u16, bool, &[u8])| {
    let (mtu, too_big, packet) = input;
    let Ok(inner) = Inner::check(packet) else { return };
    let trouble = if too_big { Trouble::TooBig { mtu } } else { Trouble::NoRoute };
    let mut error = vec![0xaa];
    if error_about(packet, &inner, trouble, &mut error) {
        let (header, most) = if inner.src.is_ipv6() { (icmpv6::LEN, 1240) } else { (icmp::LEN, 556) };
        assert!(error.len() <= most && packet.starts_with(&error[header..]));
        if inner.src.is_ipv4() {
            let seen = icmp::Packet::new(&error).expect("an ICMP message");
            seen.verify().expect("with its checksum");
            let want = if too_big {
                icmp::Repr::Unreachable { code: 4, mtu }
            } else {
                icmp::Repr::Unreachable { code: 0, mtu: 0 }
            };
            assert_eq!(icmp::Repr::parse(seen), want);
            // Nobody answers an error with an error: not even this one, sent on as a packet.
            let mut about = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
            let len = (about.len() + error.len()) as u16;
            about[2..4].copy_from_slice(&len.to_be_bytes());
            let sum = twill_packet::checksum::of(&about);
            about[10..12].copy_from_slice(&sum.to_be_bytes());
            about.extend_from_slice(&error);
            let inner = Inner::check(&about).expect("a packet");
            assert!(!error_about(&about, &inner, Trouble::NoRoute, &mut Vec::new()));
        }
    }
    let v4 = inner.src.is_ipv4();
    let (mut out, mut lengths) = (Vec::new(), Vec::new());
    if !v4 || !fragment(packet, &inner, mtu.into(), &mut out, &mut lengths) {
        assert!(out.is_empty() && lengths.is_empty());
        return;
    }
    let (mut at, mut payload) = (0, Vec::new());
    for len in lengths {
        let part = &out[at..at + len];
        let inner = Inner::check(part).expect("a fragment is a packet");
        assert!(len <= usize::from(mtu));
        payload.extend_from_slice(&part[inner.header..]);
        at += len;
    }
    assert_eq!((at, &payload[..]), (out.len(), &packet[inner.header..]));
});
