use std::net::IpAddr;
use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::ipv4::{self, Protocol};
use crate::{ipv6, tcp, udp};

/// What a packet of the tests is made of.
#[derive(Debug, Clone)]
struct Made {
    v6: bool,
    tcp: bool,
    flow: u8,
    seq: u32,
    ident: u16,
    flags: u16,
    tos: u8,
    dont_fragment: bool,
    options: bool,
    payload: Vec<u8>,
}

fn ends(m: &Made) -> (IpAddr, IpAddr) {
    if m.v6 {
        ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap())
    } else {
        ([10, 1, 15, 2].into(), [10, 1, 20, 3].into())
    }
}

/// The slow twin: one packet by the emitters of this crate, every checksum finished.
fn emit(m: &Made) -> Vec<u8> {
    let (src, dst) = ends(m);
    let options: &[u8] = if m.options { &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2] } else { &[] };
    let port = 40_000 + u16::from(m.flow);
    let header = if m.tcp { tcp::LEN + options.len() } else { udp::LEN };
    let mut message = vec![0; header];
    message.extend_from_slice(&m.payload);
    if m.tcp {
        let repr = tcp::Repr {
            src_port: port,
            dst_port: 80,
            seq: m.seq,
            ack: 7,
            flags: m.flags,
            window: 500,
            urgent: 0,
            options,
        };
        repr.emit(src, dst, &mut message).unwrap();
    } else {
        let repr = udp::Repr { src_port: port, dst_port: 53, len: message.len() as u16 };
        repr.emit(Some((src, dst)), &mut message).unwrap();
    }
    let protocol = if m.tcp { Protocol::TCP } else { Protocol::UDP };
    let mut out = vec![0; if m.v6 { ipv6::LEN } else { ipv4::LEN }];
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ipv4::Repr {
            tos: m.tos,
            total_len: (ipv4::LEN + message.len()) as u16,
            ident: m.ident,
            flags: if m.dont_fragment { 2 } else { 0 },
            fragment: 0,
            ttl: 63,
            protocol,
            src,
            dst,
            options: &[],
        }
        .emit(&mut out)
        .unwrap(),
        (IpAddr::V6(src), IpAddr::V6(dst)) => ipv6::Repr {
            class: m.tos,
            flow: 5,
            payload_len: message.len() as u16,
            next_header: protocol,
            hop_limit: 63,
            src,
            dst,
        }
        .emit(&mut out)
        .unwrap(),
        _ => unreachable!("both of one family"),
    }
    out.extend_from_slice(&message);
    out
}

/// The super-packet that a device would hand over for `m`: its bytes with a partial checksum, and the header in front.
fn super_packet(m: &Made, mss: usize) -> (Vnet, Vec<u8>) {
    let mut packet = emit(m);
    let inner = Inner::check(&packet).unwrap();
    let t = inner.header;
    let offset = if m.tcp { 16 } else { 6 };
    let sum = !checksum::Sum::default().pseudo(inner.src, inner.dst, inner.protocol, packet.len() - t).finish();
    bytes::put(&mut packet, t + offset, &sum.to_be_bytes());
    let headers = packet.len() - m.payload.len();
    let gso = match (m.tcp, m.v6) {
        (true, false) => Gso::Tcp4,
        (true, true) => Gso::Tcp6,
        (false, _) => Gso::Udp,
    };
    let vnet = Vnet {
        needs_csum: true,
        gso,
        hdr_len: headers as u16,
        gso_size: mss as u16,
        csum_start: t as u16,
        csum_offset: offset as u16,
    };
    (vnet, packet)
}

/// The slow twin of [`segment`]: each part made from its meaning.
fn cut(m: &Made, mss: usize) -> Vec<Vec<u8>> {
    let parts: Vec<_> = m.payload.chunks(mss).collect();
    let one = |(i, part): (usize, &&[u8])| {
        let last = i + 1 == parts.len();
        emit(&Made {
            seq: m.seq.wrapping_add((i * mss) as u32),
            ident: m.ident.wrapping_add(i as u16),
            flags: m.flags & !(if last { 0 } else { 0x09 }) & !(if i > 0 { 0x80 } else { 0 }),
            payload: part.to_vec(),
            ..m.clone()
        })
    };
    parts.iter().enumerate().map(one).collect()
}

fn ranges(s: &Segments, start: usize) -> Vec<Range<usize>> {
    (0..s.count)
        .map(|i| {
            let from = start + i * s.size;
            from..from + if i + 1 == s.count { s.last } else { s.size }
        })
        .collect()
}

const ALL: Merge = Merge { tcp4: true, tcp6: true, udp: true };

/// Everything that the coalescer gives for the packets, in order, joined.
fn coalesce(merge: Merge, packets: &[Vec<u8>]) -> Vec<(Vnet, Vec<u8>)> {
    let mut buffer = Vec::new();
    let mut coalescer = Coalescer::new(merge);
    let mut places = Vec::new();
    for packet in packets {
        places.push(buffer.len()..buffer.len() + packet.len());
        buffer.extend_from_slice(packet);
    }
    for place in places {
        let inner = Inner::check(&buffer[place.clone()]).unwrap();
        coalescer.push(&buffer, place, inner);
    }
    coalescer.finish(&mut buffer);
    let joined = |item: &Item| coalescer.pieces(item).flat_map(|p| buffer[p].to_vec()).collect::<Vec<u8>>();
    coalescer.items().iter().map(|item| (item.vnet, joined(item))).collect()
}

fn uncut(items: &[(Vnet, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for (vnet, packet) in items {
        let mut bytes = Vec::new();
        let s = segment(vnet, packet, &mut bytes).unwrap();
        out.extend(ranges(&s, 0).into_iter().map(|r| bytes[r].to_vec()));
    }
    out
}

fn made() -> impl Strategy<Value = Made> {
    let flags = prop_oneof![8 => Just(0x10u16), 2 => Just(0x18), 1 => Just(0x11), 1 => Just(0x50), 1 => Just(0x90), 1 => Just(0x02)];
    let knobs = (any::<bool>(), any::<bool>(), 0..3u8, any::<bool>(), any::<bool>(), 0..3u8);
    (knobs, any::<u32>(), any::<u16>(), flags, proptest::collection::vec(any::<u8>(), 1..6_000)).prop_map(
        |((v6, tcp, flow, dont_fragment, options, tos), seq, ident, flags, payload)| Made {
            v6,
            tcp,
            flow,
            seq,
            ident,
            flags,
            tos,
            dont_fragment,
            options,
            payload,
        },
    )
}

#[test]
fn golden_two_datagrams() {
    let m = Made {
        v6: false,
        tcp: false,
        flow: 0,
        seq: 0,
        ident: 0x1234,
        flags: 0,
        tos: 0,
        dont_fragment: true,
        options: false,
        payload: b"abcde".to_vec(),
    };
    let (vnet, packet) = super_packet(&m, 3);
    assert_eq!(vnet.emit(), [1, 5, 28, 0, 3, 0, 20, 0, 6, 0]);
    assert_eq!(Vnet::parse(&vnet.emit()), Some(vnet));
    let mut out = Vec::new();
    let s = segment(&vnet, &packet, &mut out).unwrap();
    assert_eq!(s, Segments { count: 2, size: 31, last: 30 });
    #[rustfmt::skip]
    let want = [
        0x45, 0, 0, 31, 0x12, 0x34, 0x40, 0, 63, 17, 0xf2, 0x93, 10, 1, 15, 2, 10, 1, 20, 3,
        0x9c, 0x40, 0, 53, 0, 11, 0x67, 0xf9, b'a', b'b', b'c',
        0x45, 0, 0, 30, 0x12, 0x35, 0x40, 0, 63, 17, 0xf2, 0x93, 10, 1, 15, 2, 10, 1, 20, 3,
        0x9c, 0x40, 0, 53, 0, 10, 0xc7, 0xf8, b'd', b'e',
    ];
    assert_eq!(out, want, "{out:02x?}");
}

/// A plain IPv4 datagram.
fn datagram(payload: Vec<u8>) -> Made {
    Made {
        v6: false,
        tcp: false,
        flow: 0,
        seq: 0,
        ident: 1,
        flags: 0,
        tos: 0,
        dont_fragment: false,
        options: false,
        payload,
    }
}

#[test]
fn a_fragment_keeps_its_place() {
    let mut m = datagram(vec![1; 400]);
    let mut packets = cut(&m, 100);
    m.payload = vec![2; 100];
    let mut fragment = emit(&m);
    fragment[6] = 0x20;
    bytes::put(&mut fragment, 10, &[0, 0]);
    let sum = checksum::of(&fragment[..20]);
    bytes::put(&mut fragment, 10, &sum.to_be_bytes());
    packets.insert(2, fragment);
    let items = coalesce(ALL, &packets);
    assert_eq!(items.len(), 3);
    assert_eq!(uncut(&items), packets);
}

#[test]
fn a_wrong_checksum_is_passed_on_unmerged() {
    let m = Made {
        v6: true,
        tcp: true,
        flow: 0,
        seq: 1,
        ident: 0,
        flags: 0x10,
        tos: 0,
        dont_fragment: true,
        options: true,
        payload: vec![3; 300],
    };
    let mut packets = cut(&m, 100);
    *packets[1].last_mut().unwrap() ^= 1;
    let items = coalesce(ALL, &packets);
    let plain: Vec<_> = items.iter().map(|(_, packet)| packet.clone()).collect();
    assert_eq!(plain, packets);
}

#[test]
fn refused_and_left_as_it_was() {
    let good = [0x45, 0, 0, 20, 0, 0, 0, 0, 9, 17, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    for (vnet, packet) in [
        (Vnet { gso: Gso::Udp, gso_size: 10, csum_start: 20, ..Vnet::default() }, &good[..]),
        (Vnet { gso: Gso::Tcp6, gso_size: 10, csum_start: 20, ..Vnet::default() }, &good[..]),
        (Vnet { gso: Gso::Tcp4, gso_size: 10, csum_start: 20, ..Vnet::default() }, &good[..3]),
        (Vnet { needs_csum: true, csum_start: 19, csum_offset: 0, ..Vnet::default() }, &good[..]),
    ] {
        let mut out = vec![9];
        assert!(segment(&vnet, packet, &mut out).is_err(), "{vnet:?}");
        assert_eq!(out, [9]);
    }
    assert_eq!(Vnet::parse(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0]), None, "UFO is never asked for");
}

#[test]
fn what_may_not_cross() {
    let m = datagram(vec![1; 40]);
    let good = emit(&m);
    let six = emit(&Made { v6: true, ..m });
    let with = |packet: &[u8], at: usize, byte: u8| {
        let mut packet = packet.to_vec();
        packet[at] = byte;
        Inner::check(&packet)
    };
    assert!(Inner::check(&good).is_ok() && Inner::check(&six).is_ok());
    assert_eq!(Inner::check(&[]), Err(Bad::Truncated));
    assert_eq!(Inner::check(&good[..19]), Err(Bad::Truncated));
    assert_eq!(Inner::check(&six[..39]), Err(Bad::Truncated));
    assert_eq!(Inner::check(&good[..60]), Err(Bad::Length));
    assert_eq!(Inner::check(&six[..60]), Err(Bad::Length));
    assert_eq!(with(&good, 0, 0x44), Err(Bad::Length));
    assert_eq!(with(&good, 0, 0x55), Err(Bad::NotIp));
    assert_eq!(with(&good, 8, 62), Err(Bad::Checksum));
    assert_eq!(with(&six, 7, 0), Err(Bad::Ttl));
    let mut dead = good.clone();
    dead[8] = 0;
    bytes::put(&mut dead, 10, &[0, 0]);
    let sum = checksum::of(&dead[..20]);
    bytes::put(&mut dead, 10, &sum.to_be_bytes());
    assert_eq!(Inner::check(&dead), Err(Bad::Ttl));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn segment_equals_the_slow_twin(m in made(), mss in 1usize..2_000) {
        let mss = mss.max(m.payload.len() / 1_000 + 1);
        let (vnet, packet) = super_packet(&m, mss);
        let mut out = vec![7; 3];
        let s = segment(&vnet, &packet, &mut out).unwrap();
        let got: Vec<_> = ranges(&s, 3).into_iter().map(|r| out[r].to_vec()).collect();
        prop_assert_eq!(got, cut(&m, mss));
    }

    #[test]
    fn coalesce_after_segment_is_identity(mut m in made(), mss in 100usize..2_000) {
        m.flags &= 0x59;
        m.flags |= 0x10;
        let (vnet, packet) = super_packet(&m, mss);
        let items = coalesce(ALL, &cut(&m, mss));
        if m.payload.len() > mss {
            prop_assert_eq!(items, vec![(vnet, packet)]);
        } else {
            prop_assert_eq!(items, vec![(Vnet::default(), emit(&m))]);
        }
    }

    /// Several flows mixed, some packets lost or swapped: nothing is lost or changed, and each flow stays in order.
    #[test]
    fn no_flow_is_reordered(
        all in proptest::collection::vec((made(), 100usize..2_000), 1..5),
        picks in proptest::collection::vec((any::<prop::sample::Index>(), 0..12u8), 1..80),
        merge in (any::<bool>(), any::<bool>(), any::<bool>()),
    ) {
        let mut queues: Vec<_> = all.iter().map(|(m, mss)| cut(m, *mss).into_iter()).collect();
        let mut packets = Vec::new();
        for (pick, fate) in picks {
            let at = pick.index(queues.len());
            if let Some(packet) = queues[at].next() {
                match fate {
                    0 => {}
                    1 => packets.insert(packets.len().saturating_sub(1), packet),
                    2 => { packets.push(packet.clone()); packets.push(packet); }
                    _ => packets.push(packet),
                }
            }
        }
        let merge = Merge { tcp4: merge.0, tcp6: merge.1, udp: merge.2 };
        let items = coalesce(merge, &packets);
        for (vnet, _) in &items {
            let allowed = match vnet.gso {
                Gso::None => true,
                Gso::Tcp4 => merge.tcp4,
                Gso::Tcp6 => merge.tcp6,
                Gso::Udp => merge.udp,
            };
            prop_assert!(allowed);
        }
        let flow = |p: &Vec<u8>| { let i = Inner::check(p).unwrap(); (i.src, i.protocol, p[i.header], p[i.header + 1]) };
        let strip = |p: &Vec<u8>| { let mut p = p.clone(); if p[0] >> 4 == 4 && p[6] & 0x40 != 0 { p[4..6].fill(0); p[10..12].fill(0); } p };
        let after = uncut(&items);
        prop_assert_eq!(after.len(), packets.len());
        let mut flows: Vec<_> = packets.iter().map(flow).collect();
        flows.sort_unstable();
        flows.dedup();
        for one in flows {
            let before: Vec<_> = packets.iter().filter(|p| flow(p) == one).map(strip).collect();
            let after: Vec<_> = after.iter().filter(|p| flow(p) == one).map(strip).collect();
            prop_assert_eq!(before, after);
        }
    }
}
