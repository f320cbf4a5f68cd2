//! What passed, and what did not. The pumps add without a lock; whoever asks sees each number whole.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use twill_packet::offload::Bad;

/// Why a packet was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Cause {
    /// From the device: no peer stands for its destination.
    NoPeer,
    /// From the device: a super-packet whose headers do not hang together.
    BadOffload,
    /// To the wire: larger than the path takes.
    TooBig,
    /// To the wire: the kernel refused for another reason (no route, a full queue, a firewall).
    SendFailed,
    /// From the wire: its outer source is no peer's address.
    NotAPeer,
    /// From the wire: its inner source is not that peer's.
    WrongSource,
    /// From the wire: larger than there was room.
    Cut,
    /// Either way: fewer bytes than a header.
    Truncated,
    /// Either way: neither IPv4 nor IPv6.
    NotIp,
    /// Either way: lengths that do not fit the bytes.
    BadLength,
    /// Either way: a wrong header checksum.
    BadChecksum,
    /// Either way: TTL 0.
    NoHops,
    /// To the device: it is down, or refuses.
    DeviceRefused,
    /// From the socket: an error instead of a datagram.
    ReceiveFailed,
    /// From the device: its queue was full.
    DeviceFull,
    /// From the wire: the socket's queue was full. Datagrams that the kernel had merged count as one.
    SocketFull,
}

impl Cause {
    /// All, in order.
    pub const ALL: [Cause; 16] = [
        Cause::NoPeer,
        Cause::BadOffload,
        Cause::TooBig,
        Cause::SendFailed,
        Cause::NotAPeer,
        Cause::WrongSource,
        Cause::Cut,
        Cause::Truncated,
        Cause::NotIp,
        Cause::BadLength,
        Cause::BadChecksum,
        Cause::NoHops,
        Cause::DeviceRefused,
        Cause::ReceiveFailed,
        Cause::DeviceFull,
        Cause::SocketFull,
    ];
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Cause::NoPeer => "no-peer",
            Cause::BadOffload => "bad-offload",
            Cause::TooBig => "too-big",
            Cause::SendFailed => "send-failed",
            Cause::NotAPeer => "not-a-peer",
            Cause::WrongSource => "wrong-source",
            Cause::Cut => "cut",
            Cause::Truncated => "truncated",
            Cause::NotIp => "not-ip",
            Cause::BadLength => "bad-length",
            Cause::BadChecksum => "bad-checksum",
            Cause::NoHops => "no-hops",
            Cause::DeviceRefused => "device-refused",
            Cause::ReceiveFailed => "receive-failed",
            Cause::DeviceFull => "device-full",
            Cause::SocketFull => "socket-full",
        })
    }
}

impl From<Bad> for Cause {
    fn from(bad: Bad) -> Self {
        match bad {
            Bad::Truncated => Cause::Truncated,
            Bad::NotIp => Cause::NotIp,
            Bad::Length => Cause::BadLength,
            Bad::Checksum => Cause::BadChecksum,
            Bad::Ttl => Cause::NoHops,
        }
    }
}

/// The counters of a tunnel; they only grow.
#[derive(Debug, Default)]
pub struct Counters {
    /// Calls that cross between this program and the kernel.
    pub(crate) calls: Calls,
    /// ICMP errors that were sent.
    pub(crate) answers: AtomicU64,
    drops: Drops,
    known: Mutex<Known>,
}

/// The peers of now, and what passed to and from those that have gone.
#[derive(Debug, Default)]
struct Known {
    peers: HashMap<String, Arc<PeerCounters>>,
    gone: Gone,
}

/// Dropped packets by cause.
#[derive(Debug, Default)]
pub(crate) struct Drops([AtomicU64; Cause::ALL.len()]);

impl Drops {
    fn add(&self, cause: Cause, packets: usize) {
        add(&self.0[cause as usize], packets);
    }

    fn snapshot(&self) -> Vec<Dropped> {
        let all = Cause::ALL.into_iter().zip(&self.0).map(|(cause, count)| Dropped { cause, packets: get(count) });
        all.filter(|drop| drop.packets > 0).collect()
    }
}

/// System calls of the pumps.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    pub(crate) waits: AtomicU64,
    pub(crate) tun_reads: AtomicU64,
    pub(crate) tun_writes: AtomicU64,
    pub(crate) udp_sends: AtomicU64,
    pub(crate) udp_receives: AtomicU64,
}

/// What passed to and from one peer.
#[derive(Debug, Default)]
pub struct PeerCounters {
    pub(crate) out: Flow,
    pub(crate) into: Flow,
    /// What was to go to it, or came from its address, and was dropped.
    drops: Drops,
    /// Milliseconds of Unix time when the last packet came from it.
    pub(crate) seen_ms: AtomicU64,
}

/// One direction.
#[derive(Debug, Default)]
pub(crate) struct Flow {
    /// IP packets as they are on the wire.
    pub(crate) packets: AtomicU64,
    /// Their bytes.
    pub(crate) bytes: AtomicU64,
    /// What the device was handed, or handed over: packets or super-packets.
    pub(crate) super_packets: AtomicU64,
    /// Datagrams or merged datagrams that the socket took or gave.
    pub(crate) messages: AtomicU64,
}

impl Flow {
    pub(crate) fn add(&self, packets: usize, bytes: usize, super_packets: usize, messages: usize) {
        add(&self.packets, packets);
        add(&self.bytes, bytes);
        add(&self.super_packets, super_packets);
        add(&self.messages, messages);
    }

    fn snapshot(&self) -> FlowSnapshot {
        FlowSnapshot {
            packets: get(&self.packets),
            bytes: get(&self.bytes),
            super_packets: get(&self.super_packets),
            messages: get(&self.messages),
        }
    }
}

impl PeerCounters {
    /// All of it at one moment, for the peer with this lease and address.
    pub(crate) fn snapshot(&self, lease: &str, host: IpAddr) -> PeerSnapshot {
        PeerSnapshot {
            lease: lease.to_owned(),
            host,
            sent: self.out.snapshot(),
            received: self.into.snapshot(),
            last_seen_ms: Some(get(&self.seen_ms)).filter(|ms| *ms != 0),
            drops: self.drops.snapshot(),
        }
    }

    /// A packet came from this peer now.
    pub(crate) fn seen_now(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        self.seen_ms.store(now, Ordering::Relaxed);
    }
}

impl Counters {
    /// Counts what is dropped: for all, and for the peer that it would have gone to, or whose address it came from.
    pub(crate) fn drop(&self, cause: Cause, packets: usize, peer: Option<&PeerCounters>) {
        self.drops.add(cause, packets);
        if let Some(peer) = peer {
            peer.drops.add(cause, packets);
        }
    }

    /// Gives each of these peers the counters of its name. Of all others only what passed stays.
    pub(crate) fn keep<'a>(&self, peers: impl Iterator<Item = (&'a str, &'a mut Arc<PeerCounters>)>) {
        let mut known = self.known();
        let mut old = std::mem::take(&mut known.peers);
        for (name, counters) in peers {
            if let Some(before) = old.remove(name) {
                *counters = before;
            }
            known.peers.insert(name.to_owned(), Arc::clone(counters));
        }
        let gone = &mut known.gone;
        for peer in old.into_values() {
            gone.sent = [gone.sent, peer.out.snapshot()].into_iter().sum();
            gone.received = [gone.received, peer.into.snapshot()].into_iter().sum();
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn snapshot(&self, peers: Vec<PeerSnapshot>) -> Snapshot {
        Snapshot {
            calls: CallsSnapshot {
                waits: get(&self.calls.waits),
                tun_reads: get(&self.calls.tun_reads),
                tun_writes: get(&self.calls.tun_writes),
                udp_sends: get(&self.calls.udp_sends),
                udp_receives: get(&self.calls.udp_receives),
            },
            icmp_errors: get(&self.answers),
            drops: self.drops.snapshot(),
            peers,
            gone: self.known().gone,
        }
    }
}

pub(crate) fn add(counter: &AtomicU64, number: usize) {
    counter.fetch_add(number as u64, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// All counters at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Calls into the kernel.
    pub calls: CallsSnapshot,
    /// ICMP errors that were sent about packets that went no further.
    pub icmp_errors: u64,
    /// What was dropped; causes that never occurred are left out.
    pub drops: Vec<Dropped>,
    /// For each peer.
    pub peers: Vec<PeerSnapshot>,
    /// For all peers that have gone since the tunnel's start.
    #[serde(default)]
    pub gone: Gone,
}

/// What passed to and from peers that have gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    /// To them.
    pub sent: FlowSnapshot,
    /// From them.
    pub received: FlowSnapshot,
}

impl Snapshot {
    /// What was sent to all peers, those that have gone included.
    pub fn sent(&self) -> FlowSnapshot {
        self.peers.iter().map(|peer| peer.sent).chain([self.gone.sent]).sum()
    }

    /// What was received from all peers, those that have gone included.
    pub fn received(&self) -> FlowSnapshot {
        self.peers.iter().map(|peer| peer.received).chain([self.gone.received]).sum()
    }

    /// Both together.
    pub fn carried(&self) -> FlowSnapshot {
        [self.sent(), self.received()].into_iter().sum()
    }

    /// Adds what somebody else dropped for this cause.
    pub fn add_drops(&mut self, cause: Cause, packets: u64) {
        match self.drops.iter_mut().find(|drop| drop.cause == cause) {
            Some(drop) => drop.packets += packets,
            None if packets == 0 => {}
            None => {
                self.drops.push(Dropped { cause, packets });
                self.drops.sort_by_key(|drop| drop.cause);
            }
        }
    }
}

/// Calls into the kernel by kind: each crosses between user and kernel space once, whatever it carries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallsSnapshot {
    /// Waits for either descriptor.
    pub waits: u64,
    /// Reads of the device, those that found nothing included.
    pub tun_reads: u64,
    /// Writes to the device.
    pub tun_writes: u64,
    /// Sends on the socket.
    pub udp_sends: u64,
    /// Receives on the socket, those that found nothing included.
    pub udp_receives: u64,
}

impl CallsSnapshot {
    /// All of them.
    pub const fn total(&self) -> u64 {
        self.waits + self.tun_reads + self.tun_writes + self.udp_sends + self.udp_receives
    }
}

/// Packets dropped for one cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// The cause.
    pub cause: Cause,
    /// How many.
    pub packets: u64,
}

/// One peer's counters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerSnapshot {
    /// Its lease's name.
    pub lease: String,
    /// Its address on the underlay.
    pub host: IpAddr,
    /// To it.
    pub sent: FlowSnapshot,
    /// From it.
    pub received: FlowSnapshot,
    /// Unix time in milliseconds of the last packet from it; `None`: never.
    pub last_seen_ms: Option<u64>,
    /// What was to go to it, or came from its address, and was dropped. Of several peers behind one address the first has them.
    pub drops: Vec<Dropped>,
}

/// One direction of one peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowSnapshot {
    /// IP packets as they are on the wire.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets or super-packets that crossed the device.
    pub super_packets: u64,
    /// Datagrams or runs of datagrams that crossed the socket.
    pub messages: u64,
}

impl std::iter::Sum for FlowSnapshot {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |a, b| Self {
            packets: a.packets + b.packets,
            bytes: a.bytes + b.bytes,
            super_packets: a.super_packets + b.super_packets,
            messages: a.messages + b.messages,
        })
    }
}
