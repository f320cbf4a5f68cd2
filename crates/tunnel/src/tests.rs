//! Both directions over in-memory twins: what a network does to datagrams, without a kernel.

use std::net::{IpAddr, SocketAddr};

use twill_core::backend::TunnelPeer;
use twill_kernel::icmp::MemoryIcmp;
use twill_kernel::tun::{HEADER, MemoryTun, Offloads};
use twill_kernel::udp::{Datagram, MemoryUdp};
use twill_packet::offload::{Gso, Inner, Vnet};
use twill_packet::{checksum, icmp};

use super::*;
use crate::counters::{Cause, FlowSnapshot};

/// One end: its twins, its pumps, its counters. It stands at 10.0.0.`n` for 10.1.`n`.0/24 and fd00:`n`::/64.
struct End {
    address: SocketAddr,
    shared: Shared,
    tun: MemoryTun,
    udp: MemoryUdp,
    icmp: MemoryIcmp,
    out: Out,
    into: Into,
}

fn told(n: u8) -> TunnelPeer {
    let subnets = vec![format!("10.1.{n}.0/24").parse().unwrap(), format!("fd00:{n}::/64").parse().unwrap()];
    TunnelPeer { name: format!("10.1.{n}.0-24"), host: format!("10.0.0.{n}").parse().unwrap(), subnets }
}

/// What the pumps of one end share, with nobody who waits for them.
pub(crate) fn shared(local: SocketAddr, counters: Counters, peers: Peers, tun: Offloads) -> Shared {
    Shared {
        spec: TunnelSpec { device: "flannel0".parse().unwrap(), mtu: 1472.try_into().unwrap(), local },
        counters,
        tun,
        merges: true,
        answers: true,
        queues: Queues::default(),
        segments: AtomicBool::new(true),
        peers: Mutex::new(Arc::new(peers)),
        version: AtomicU64::new(1),
        stop: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
        carried: Carried::default(),
        stuck: AtomicBool::new(false),
        stopped: AtomicBool::new(false),
        lost: AtomicBool::new(false),
        on_loss: Box::new(|| {}),
    }
}

impl End {
    fn new(n: u8, peers: &[u8], offloads: Offloads) -> End {
        let address: SocketAddr = format!("10.0.0.{n}:8285").parse().unwrap();
        let counters = Counters::default();
        let peers = Peers::new(peers.iter().map(|n| told(*n)), 8285).counted(&counters);
        let shared = shared(address, counters, peers, offloads);
        End {
            address,
            shared,
            tun: MemoryTun::new(offloads),
            udp: MemoryUdp::new(offloads != Offloads::NONE),
            icmp: MemoryIcmp::default(),
            out: Out::new(),
            into: Into::new(merge(offloads)),
        }
    }

    /// The kernel sends this into the device; what leaves on the wire.
    fn send(&mut self, vnet: Vnet, packet: &[u8]) -> Vec<Datagram> {
        self.tun.feed(&[&vnet.emit()[..], packet].concat());
        while self.out.round(&self.shared, (&self.tun, &self.udp, Some(&self.icmp)), usize::MAX).unwrap() {}
        std::iter::from_fn(|| self.udp.take()).collect()
    }

    /// These arrive; what the kernel gets.
    fn receive(&mut self, from: SocketAddr, datagrams: &[Vec<u8>]) -> Vec<(Vnet, Vec<u8>)> {
        datagrams.iter().for_each(|bytes| self.udp.arrive(from, bytes));
        while self.into.round(&self.shared, &self.tun, &self.udp).unwrap() {}
        let written = std::iter::from_fn(|| self.tun.take());
        written.map(|all| (Vnet::parse(&all).unwrap(), all[HEADER..].to_vec())).collect()
    }

    fn drops(&self) -> Vec<(Cause, u64)> {
        self.counters().drops.iter().map(|drop| (drop.cause, drop.packets)).collect()
    }

    fn counters(&self) -> Snapshot {
        self.shared.counters.snapshot(self.shared.current().snapshots())
    }
}

/// A packet from container `from` to container `to`, its checksums right.
pub(crate) fn packet(from: u8, to: u8, protocol: u8, rest: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 1, from, 2, 10, 1, to, 2];
    let len = (20 + rest.len()) as u16;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    let sum = checksum::of(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend_from_slice(rest);
    packet
}

/// A TCP super-packet of `len` payload bytes whose bytes count up, cut at `mss`.
pub(crate) fn super_packet(from: u8, to: u8, len: usize, mss: u16) -> (Vnet, Vec<u8>) {
    let mut tcp = vec![0; 20 + len];
    tcp[..14].copy_from_slice(&[0x80, 0, 0, 80, 0, 0, 1, 0, 0, 0, 0, 1, 0x50, 0x10]);
    tcp[14..16].copy_from_slice(&[0xff, 0xff]);
    tcp[20..].iter_mut().enumerate().for_each(|(n, byte)| *byte = (n / 7) as u8);
    let packet = packet(from, to, 6, &tcp);
    let inner = Inner::check(&packet).unwrap();
    let pseudo = !checksum::Sum::default().pseudo(inner.src, inner.dst, 6, tcp.len()).finish();
    let mut packet = packet;
    packet[36..38].copy_from_slice(&pseudo.to_be_bytes());
    let vnet = Vnet { needs_csum: true, gso: Gso::Tcp4, hdr_len: 40, gso_size: mss, csum_start: 20, csum_offset: 16 };
    (vnet, packet)
}

fn payloads(datagrams: &[Datagram]) -> Vec<Vec<u8>> {
    datagrams.iter().map(|d| d.bytes.clone()).collect()
}

#[test]
fn a_super_packet_crosses_as_packets_and_arrives_as_it_was() {
    let (mut a, mut b) = (End::new(1, &[2], Offloads::ALL), End::new(2, &[1], Offloads::ALL));
    let (vnet, packet) = super_packet(1, 2, 60_000, 1432);
    let sent = a.send(vnet, &packet);
    assert_eq!(sent.len(), 60_000usize.div_ceil(1432));
    assert!(sent.iter().all(|d| d.address == b.address && Inner::check(&d.bytes).is_ok()));
    let got = b.receive(a.address, &payloads(&sent));
    let bytes: Vec<u8> = got.iter().flat_map(|(_, packet)| packet[40..].to_vec()).collect();
    assert_eq!(bytes, packet[40..], "every byte, in order");
    assert!(got.len() <= 3, "merged, {} pieces", got.len());
    let flow = a.counters().peers[0].sent;
    assert_eq!(flow, FlowSnapshot { packets: 42, bytes: 60_000 + 42 * 40, super_packets: 1, messages: 1 });
    let flow = b.counters().peers[0].received;
    assert_eq!((flow.packets, flow.bytes), (42, 60_000 + 42 * 40));
    assert!(flow.super_packets <= 3 && flow.messages <= 3, "{flow:?}");
    assert!(b.counters().peers[0].last_seen_ms.is_some());
}

#[test]
fn one_call_carries_the_largest_super_packet_in_halves() {
    let mut a = End::new(1, &[2], Offloads::ALL);
    let (vnet, packet) = super_packet(1, 2, 65_495, 1432);
    assert_eq!(a.send(vnet, &packet).len(), 46);
    // 46 packets of 1472 bytes are more than one datagram's 65,507 bytes: 23 and 23, not 44 and 2.
    assert_eq!(a.counters().peers[0].sent.messages, 2);
}

#[test]
fn what_waits_behind_fills_a_call_up() {
    let mut a = End::new(1, &[2, 3], Offloads::ALL);
    // 45 packets each, to one peer, to another, and to the first again.
    for to in [2, 2, 3, 2] {
        let (vnet, packet) = super_packet(1, to, 45 * 1432, 1432);
        a.tun.feed(&[&vnet.emit()[..], &packet].concat());
    }
    let (vnet, packet) = super_packet(1, 2, 45 * 1432, 1432);
    let sent = a.send(vnet, &packet);
    let order: Vec<u8> = sent.iter().map(|d| d.bytes[18]).collect();
    assert_eq!(order, [[2; 90].as_slice(), &[3; 45], &[2; 90]].concat());
    let sequence: Vec<&[u8]> = sent.iter().map(|d| &d.bytes[24..28]).collect();
    assert!(sequence.chunks(45).all(|one| one.is_sorted()), "each in order");
    // Of two neighbours the second fills what the first has left; the bytes of a round end it behind each two.
    let sent: Vec<_> = a.counters().peers.iter().map(|peer| (peer.sent.super_packets, peer.sent.messages)).collect();
    assert_eq!(sent, [(4, 7), (1, 2)]);
}

#[test]
fn without_offloads_each_packet_crosses_alone() {
    let (mut a, mut b) = (End::new(1, &[2], Offloads::NONE), End::new(2, &[1], Offloads::NONE));
    for n in 0..100u8 {
        let whole = packet(1, 2, 17, &[0, 1, 0, 2, 0, 9, 0, 0, n]);
        let sent = a.send(Vnet::default(), &whole);
        assert_eq!(b.receive(a.address, &payloads(&sent)), [(Vnet::default(), whole)]);
    }
}

#[test]
fn loss_reordering_and_duplication_leave_every_byte_where_tcp_finds_it() {
    let mut seed = 7u64;
    let mut random = move |n: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % n
    };
    for _ in 0..200 {
        let (mut a, mut b) = (End::new(1, &[2], Offloads::ALL), End::new(2, &[1], Offloads::ALL));
        let (vnet, packet) = super_packet(1, 2, 20_000, 1000);
        let mut wire = payloads(&a.send(vnet, &packet));
        let mut lost = vec![false; wire.len()];
        for at in 0..wire.len() {
            match random(10) {
                0 => lost[at] = true,
                1 => wire.push(wire[at].clone()),
                2 => {
                    let to = random(wire.len() as u64) as usize;
                    // Its place says which part it is, so that only whole datagrams move.
                    wire.swap(at, to);
                    lost.resize(lost.len().max(to + 1), false);
                    lost.swap(at, to);
                }
                _ => {}
            }
        }
        lost.resize(wire.len(), false);
        let arriving: Vec<_> = wire.iter().zip(&lost).filter(|(_, lost)| !**lost).map(|(d, _)| d.clone()).collect();
        // What a receiver's TCP would see: sequence numbers with their bytes, in the order of arrival.
        let bytes = |packet: &[u8]| {
            let seq = u32::from_be_bytes(packet[24..28].try_into().unwrap()) as usize - 256;
            packet[40..].iter().enumerate().map(move |(n, byte)| (seq + n, *byte)).collect::<Vec<_>>()
        };
        let want: Vec<_> = arriving.iter().flat_map(|d| bytes(d)).collect();
        let got: Vec<_> = b.receive(a.address, &arriving).iter().flat_map(|(_, packet)| bytes(packet)).collect();
        assert_eq!(got, want, "nothing lost, invented or reordered by merging");
        assert!(got.iter().all(|(at, byte)| *byte == (at / 7) as u8));
    }
}

#[test]
fn corruption_is_dropped_by_cause_or_handed_on_for_the_receiver_to_see_and_never_merged() {
    let (mut a, mut b) = (End::new(1, &[2], Offloads::ALL), End::new(2, &[1], Offloads::ALL));
    let (vnet, packet) = super_packet(1, 2, 5000, 1000);
    let wire = payloads(&a.send(vnet, &packet));
    for byte in 0..1040 {
        let mut bad = wire.clone();
        bad[2][byte] ^= 0x10;
        let got = b.receive(a.address, &bad);
        let whole: Vec<_> = got.iter().filter(|(vnet, _)| vnet.gso != Gso::None).collect();
        // The bad one is in no super-packet: all merged bytes are good ones.
        for (_, merged) in &whole {
            let seq = u32::from_be_bytes(merged[24..28].try_into().unwrap()) as usize - 256;
            assert!(merged[40..].iter().enumerate().all(|(n, byte)| *byte == ((seq + n) / 7) as u8), "byte {byte}");
        }
        let bytes: usize = got.iter().map(|(_, p)| p.len() - 40).sum();
        assert!(bytes == 4000 || bytes == 5000, "byte {byte}: {bytes}");
    }
    let causes: Vec<Cause> = b.drops().into_iter().map(|(cause, _)| cause).collect();
    assert_eq!(causes, [Cause::NotIp, Cause::BadLength, Cause::BadChecksum]);
}

#[test]
fn only_a_peer_with_an_inner_source_of_its_own_is_let_in() {
    let mut b = End::new(2, &[1, 3], Offloads::ALL);
    let good = packet(1, 2, 17, &[0, 1, 0, 2, 0, 8, 0, 0]);
    let at = |n: u8, port: u16| SocketAddr::new(format!("10.0.0.{n}").parse().unwrap(), port);
    assert_eq!(b.receive(at(1, 8285), std::slice::from_ref(&good)).len(), 1);
    assert_eq!(b.receive(at(1, 40_000), std::slice::from_ref(&good)).len(), 1, "behind a NAT the port is any");
    assert_eq!(b.receive(at(9, 8285), std::slice::from_ref(&good)).len(), 0, "no peer");
    assert_eq!(b.receive(at(3, 8285), std::slice::from_ref(&good)).len(), 0, "another peer's inner source");
    let mut v6_mapped = b.receive("[::ffff:10.0.0.1]:8285".parse().unwrap(), std::slice::from_ref(&good));
    assert!(v6_mapped.pop().is_some());
    assert_eq!(b.drops(), [(Cause::NotAPeer, 1), (Cause::WrongSource, 1)]);
}

#[test]
fn two_nodes_behind_one_address_are_told_apart_by_their_subnets() {
    let mut b = End::new(2, &[], Offloads::ALL);
    let mut both = [told(1), told(3)];
    both[1].host = both[0].host;
    *b.shared.peers.lock().unwrap() = Arc::new(Peers::new(both, 8285));
    b.shared.version.fetch_add(1, Ordering::Release);
    let from = "10.0.0.1:4444".parse().unwrap();
    for n in [1, 3] {
        assert_eq!(b.receive(from, &[packet(n, 2, 17, &[0; 8])]).len(), 1, "{n}");
    }
}

#[test]
fn every_malformed_datagram_is_counted_and_goes_nowhere() {
    let mut b = End::new(2, &[1], Offloads::ALL);
    let good = packet(1, 2, 17, &[0, 1, 0, 2, 0, 8, 0, 0]);
    let change = |at: usize, to: u8| {
        let mut bad = good.clone();
        bad[at] = to;
        bad
    };
    let mut no_hops = change(8, 0);
    no_hops[10..12].copy_from_slice(&[0, 0]);
    let sum = checksum::of(&no_hops[..20]);
    no_hops[10..12].copy_from_slice(&sum.to_be_bytes());
    let cases = [
        (vec![], Cause::Truncated),
        (good[..19].to_vec(), Cause::Truncated),
        (change(0, 0x55), Cause::NotIp),
        (change(0, 0x44), Cause::BadLength),
        (good[..27].to_vec(), Cause::BadLength),
        ([good.clone(), vec![0]].concat(), Cause::BadLength),
        (change(15, 7), Cause::BadChecksum),
        (no_hops, Cause::NoHops),
    ];
    for (bad, cause) in cases {
        let before = b.drops().iter().find(|(c, _)| *c == cause).map_or(0, |(_, n)| *n);
        // Others of the same receive go on.
        assert_eq!(b.receive("10.0.0.1:8285".parse().unwrap(), &[bad.clone(), good.clone()]).len(), 1, "{bad:02x?}");
        assert!(b.drops().contains(&(cause, before + 1)), "{cause}: {:?}", b.drops());
    }
}

#[test]
fn what_no_peer_stands_for_is_answered_and_the_answers_are_bounded() {
    let mut a = End::new(1, &[2], Offloads::ALL);
    let lost = packet(1, 9, 17, &[0, 1, 0, 2, 0, 8, 0, 0]);
    assert!(a.send(Vnet::default(), &lost).is_empty());
    let told = a.icmp.take();
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].0, IpAddr::from([10, 1, 1, 2]));
    let seen = icmp::Packet::new(&told[0].1).unwrap();
    assert_eq!(icmp::Repr::parse(seen), icmp::Repr::Unreachable { code: 0, mtu: 0 });
    for _ in 0..1000 {
        a.send(Vnet::default(), &lost);
    }
    assert_eq!(a.drops(), [(Cause::NoPeer, 1001)]);
    assert!(a.icmp.take().len() < 1000);
}

#[test]
fn what_nobody_may_be_told_of_keeps_no_other_from_an_answer() {
    let mut a = End::new(1, &[2], Offloads::ALL);
    // ICMP errors: no error may be sent about them.
    let error = packet(1, 9, 1, &[3, 1, 0xfc, 0xfe, 0, 0, 0, 0]);
    for _ in 0..1000 {
        a.send(Vnet::default(), &error);
    }
    assert!(a.icmp.take().is_empty());
    a.send(Vnet::default(), &packet(1, 9, 17, &[0, 1, 0, 2, 0, 8, 0, 0]));
    assert_eq!(a.icmp.take().len(), 1);
}

#[test]
fn each_sender_in_a_run_is_told_of_the_narrow_path() {
    let mut a = End::new(1, &[2], Offloads::ALL);
    a.udp.set_path_mtu(Some(1228));
    for from in [2, 2, 3, 3] {
        let mut packet = packet(1, 2, 17, &[7; 1400]);
        packet[15] = from;
        packet[10..12].copy_from_slice(&[0, 0]);
        let sum = checksum::of(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        a.tun.feed(&[&Vnet::default().emit()[..], &packet].concat());
    }
    while a.out.round(&a.shared, (&a.tun, &a.udp, Some(&a.icmp)), usize::MAX).unwrap() {}
    assert_eq!(a.drops(), [(Cause::TooBig, 4)]);
    let told: Vec<IpAddr> = a.icmp.take().into_iter().map(|(to, _)| to).collect();
    assert_eq!(told, [2, 3].map(|n| IpAddr::from([10, 1, 1, n])));
}

#[test]
fn a_narrow_path_is_told_to_who_forbids_cutting_and_others_are_cut() {
    let (mut a, mut b) = (End::new(1, &[2], Offloads::ALL), End::new(2, &[1], Offloads::NONE));
    a.udp.set_path_mtu(Some(1228));
    let (vnet, whole) = super_packet(1, 2, 10_000, 1432);
    assert!(a.send(vnet, &whole).is_empty());
    let told = a.icmp.take();
    let seen = icmp::Packet::new(&told[0].1).unwrap();
    assert_eq!((told.len(), icmp::Repr::parse(seen)), (1, icmp::Repr::Unreachable { code: 4, mtu: 1200 }));
    assert_eq!(a.drops(), [(Cause::TooBig, 7)]);
    let mut may_be_cut = packet(1, 2, 17, &[7; 1400]);
    may_be_cut[6] = 0;
    may_be_cut[10..12].copy_from_slice(&[0, 0]);
    let sum = checksum::of(&may_be_cut[..20]);
    may_be_cut[10..12].copy_from_slice(&sum.to_be_bytes());
    let sent = a.send(Vnet::default(), &may_be_cut);
    assert!(sent.len() == 2 && sent.iter().all(|d| d.bytes.len() <= 1200));
    assert_eq!(b.receive(a.address, &payloads(&sent)).len(), 2);
    // Counted as they are on the wire.
    let flow = FlowSnapshot { packets: 2, bytes: 1420 + 20, super_packets: 1, messages: 2 };
    assert_eq!(a.counters().peers[0].sent, flow);
}

#[test]
fn what_every_ipv6_link_carries_a_narrower_path_carries_in_fragments() {
    let mut a = End::new(1, &[2], Offloads::ALL);
    a.udp.set_path_mtu(Some(1228));
    let packet = |len: usize| {
        let mut packet = vec![0; len];
        (packet[0], packet[6], packet[7]) = (0x60, 17, 64);
        packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        for (at, ip) in [(8, "fd00:1::2"), (24, "fd00:2::2")] {
            packet[at..at + 16].copy_from_slice(&ip.parse::<std::net::Ipv6Addr>().unwrap().octets());
        }
        packet
    };
    let sent = a.send(Vnet::default(), &packet(1280));
    assert_eq!(payloads(&sent), [packet(1280)]);
    assert!(a.drops().is_empty() && a.icmp.take().is_empty());
    // Larger ones are not, and the sender is not told what it would not believe (RFC 8201 section 4).
    assert!(a.send(Vnet::default(), &packet(1281)).is_empty());
    assert_eq!((a.drops(), &a.icmp.take()[0].1[..8]), (vec![(Cause::TooBig, 1)], &[2, 0, 0, 0, 0, 0, 5, 0][..]));
}

#[test]
fn what_is_cut_for_a_narrow_path_is_not_overtaken() {
    let mut a = End::new(1, &[2], Offloads::ALL);
    a.udp.set_path_mtu(Some(1228));
    let plain = |len: usize| {
        let mut packet = packet(1, 2, 17, &vec![len as u8; len]);
        packet[6] = 0;
        packet[10..12].copy_from_slice(&[0, 0]);
        let sum = checksum::of(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet
    };
    let lens = [100, 1400, 1400, 60, 1300, 1180, 1190, 10];
    for len in lens {
        a.tun.feed(&[&Vnet::default().emit()[..], &plain(len)].concat());
    }
    while a.out.round(&a.shared, (&a.tun, &a.udp, Some(&a.icmp)), usize::MAX).unwrap() {}
    let sent: Vec<_> = std::iter::from_fn(|| a.udp.take()).map(|datagram| datagram.bytes).collect();
    let order: Vec<u8> = sent.iter().map(|bytes| bytes[20]).collect();
    let want: Vec<u8> = lens.iter().flat_map(|len| vec![*len as u8; if *len > 1180 { 2 } else { 1 }]).collect();
    assert_eq!(order, want);
    assert!(sent.iter().all(|bytes| bytes.len() <= 1200) && a.drops().is_empty());
}

#[test]
fn errors_of_device_and_socket_are_counted_and_pass() {
    let (mut a, mut b) = (End::new(1, &[2], Offloads::ALL), End::new(2, &[1], Offloads::ALL));
    let good = packet(1, 2, 17, &[0, 1, 0, 2, 0, 8, 0, 0]);
    for errno in [Errno::NOBUFS, Errno::PERM, Errno::NETUNREACH, Errno::HOSTUNREACH, Errno::CONNREFUSED, Errno::AGAIN] {
        a.udp.fail(Some(errno.raw_os_error()));
        assert!(a.send(Vnet::default(), &good).is_empty());
        a.udp.fail(None);
        assert_eq!(a.send(Vnet::default(), &good).len(), 1);
    }
    assert_eq!(a.drops(), [(Cause::SendFailed, 6)]);
    // Where this host has no way to the peer's, the sender need not wait to learn it.
    let told = a.icmp.take();
    assert_eq!(told.len(), 2);
    for (to, message) in told {
        let seen = icmp::Packet::new(&message).unwrap();
        assert_eq!(to, IpAddr::from([10, 1, 1, 2]));
        assert_eq!(icmp::Repr::parse(seen), icmp::Repr::Unreachable { code: 0, mtu: 0 });
    }
    // The device is down, and comes up again.
    b.tun.fail(Some(Errno::IO.raw_os_error()));
    assert!(b.receive(a.address, std::slice::from_ref(&good)).is_empty());
    b.tun.fail(None);
    assert_eq!(b.receive(a.address, std::slice::from_ref(&good)).len(), 1);
    b.udp.fail(Some(Errno::CONNREFUSED.raw_os_error()));
    assert!(b.receive(a.address, &[]).is_empty());
    b.udp.fail(None);
    assert_eq!(b.drops(), [(Cause::DeviceRefused, 1), (Cause::ReceiveFailed, 1)]);
    // The device is gone.
    b.tun.fail(Some(Errno::BADFD.raw_os_error()));
    b.udp.arrive(a.address, &good);
    assert_eq!(b.into.round(&b.shared, &b.tun, &b.udp), Err(Lost));
    a.tun.fail(Some(Errno::BADFD.raw_os_error()));
    assert_eq!(a.out.round(&a.shared, (&a.tun, &a.udp, Some(&a.icmp)), 1), Err(Lost));
}

#[test]
fn a_super_packet_of_nonsense_is_dropped() {
    let mut a = End::new(1, &[2], Offloads::ALL);
    let (vnet, whole) = super_packet(1, 2, 5000, 1000);
    for bad in [
        Vnet { gso_size: 0, ..vnet },
        Vnet { csum_start: 9999, ..vnet },
        Vnet { gso: Gso::Tcp6, ..vnet },
        Vnet { csum_start: 8, ..vnet },
    ] {
        assert!(a.send(bad, &whole).is_empty(), "{bad:?}");
    }
    a.tun.feed(&[&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0][..], &whole].concat());
    assert_eq!(a.out.round(&a.shared, (&a.tun, &a.udp, Some(&a.icmp)), 1), Ok(true));
    assert_eq!(a.drops(), [(Cause::BadOffload, 5)]);
}

#[test]
fn replaced_peers_keep_their_counters_and_are_seen_at_once() {
    let mut a = End::new(1, &[2], Offloads::ALL);
    let good = packet(1, 2, 17, &[0, 1, 0, 2, 0, 8, 0, 0]);
    a.send(Vnet::default(), &good);
    let mut moved = told(2);
    moved.host = "10.0.0.77".parse().unwrap();
    *a.shared.peers.lock().unwrap() = Arc::new(Peers::new([moved, told(3)], 8285).counted(&a.shared.counters));
    a.shared.version.fetch_add(1, Ordering::Release);
    let sent = a.send(Vnet::default(), &good);
    assert_eq!(sent[0].address, "10.0.0.77:8285".parse().unwrap());
    assert_eq!(a.counters().peers[0].sent.packets, 2);
    // One that goes leaves what passed.
    let before = a.counters().sent();
    for peers in [vec![told(3)], vec![told(2), told(3)]] {
        *a.shared.peers.lock().unwrap() = Arc::new(Peers::new(peers, 8285).counted(&a.shared.counters));
        assert_eq!((a.counters().sent(), a.counters().gone.sent.packets), (before, 2));
    }
}

#[test]
fn no_more_senders_are_told_at_once_than_a_burst_however_long_nobody_was() {
    let mut budget = Budget::default();
    for _ in 0..2 {
        let start = Instant::now();
        let told = (0..1000).filter(|_| budget.spend()).count();
        // And one for each millisecond that this took.
        assert!((50..=51 + start.elapsed().as_millis() as usize).contains(&told), "{told}");
        budget.until -= Duration::from_secs(2);
    }
}
