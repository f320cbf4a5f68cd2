//! Device → wire: super-packets are cut, and what goes to one host side by side leaves in one call.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use rustix::io::Errno;
use twill_kernel::icmp::Icmp;
use twill_kernel::tun::{HEADER, Tun};
use twill_kernel::udp::{MAX_BYTES, MAX_SEGMENTS, Outgoing, Udp};
use twill_packet::ipv6;
use twill_packet::offload::{Inner, Trouble, Vnet, error_about, fragment, segment};

use crate::counters::{Cause, add};
use crate::load::{Flows, Load};
use crate::peers::Peers;
use crate::{Budget, Lost, Shared, is_gone};

/// Room for the largest packet that a device hands over.
const PACKET: usize = 65_536 + 256;
/// Packets and bytes that are read before they are sent, when more wait to be read; and bytes while many streams pass.
const READS: usize = 64;
const BYTES: [usize; 2] = [128 << 10, 1 << 20];
/// Messages for which there is room from the start: a large super-packet leaves in several.
const MESSAGES: usize = 2 * READS;

/// The pump's own memory.
pub(crate) struct Out {
    packet: Vec<u8>,
    /// Packets as they go on the wire, side by side.
    cut: Vec<u8>,
    batch: Vec<Outgoing>,
    /// For each message of the batch.
    notes: Vec<Note>,
    failed: Vec<(usize, Option<i32>)>,
    peers: Arc<Peers>,
    version: u64,
    answers: Answers,
    /// What was carried so far.
    pub(crate) load: Load,
    pub(crate) flows: Flows,
    /// Many streams pass.
    pub(crate) many: bool,
}

/// What senders are told.
struct Answers {
    left: Budget,
    error: Vec<u8>,
}

impl Answers {
    /// Tells the sender of a packet why it goes no further, where that may be and not too many were told.
    fn tell(
        &mut self,
        shared: &Shared,
        icmp: Option<&impl Icmp>,
        (packet, inner): (&[u8], &Inner),
        trouble: Trouble,
    ) -> bool {
        // What nobody may be told of leaves the budget to others.
        let told = icmp.is_some_and(|icmp| {
            error_about(packet, inner, trouble, &mut self.error)
                && self.left.spend()
                && icmp.send(inner.src, &self.error).is_ok()
        });
        add(&shared.counters.answers, told.into());
        told
    }
}

/// This host has no way to the peer's.
fn is_unreachable(errno: Option<i32>) -> bool {
    [Errno::NETUNREACH, Errno::HOSTUNREACH].iter().any(|unreachable| errno == Some(unreachable.raw_os_error()))
}

/// What a message carries.
#[derive(Clone, Copy)]
struct Note {
    peer: usize,
    super_packets: usize,
}

impl Out {
    pub(crate) fn new() -> Self {
        Self {
            packet: vec![0; PACKET],
            cut: Vec::with_capacity(BYTES[1] + 2 * PACKET),
            batch: Vec::with_capacity(MESSAGES),
            notes: Vec::with_capacity(MESSAGES),
            failed: Vec::with_capacity(MESSAGES),
            peers: Arc::default(),
            version: 0,
            answers: Answers { left: Budget::default(), error: Vec::with_capacity(2048) },
            load: Load::default(),
            flows: Flows::default(),
            many: false,
        }
    }

    /// Reads at most `most` packets and sends them. True: there may be more.
    pub(crate) fn round(
        &mut self,
        shared: &Shared,
        (tun, udp, icmp): (&impl Tun, &impl Udp, Option<&impl Icmp>),
        most: usize,
    ) -> Result<bool, Lost> {
        if let Some((version, peers)) = shared.newer(self.version) {
            (self.version, self.peers) = (version, peers);
        }
        self.batch.clear();
        self.notes.clear();
        self.cut.clear();
        let (mut more, mut reads) = (true, 0);
        for _ in 0..most.min(READS) {
            let mut header = [0; HEADER];
            add(&shared.counters.calls.tun_reads, 1);
            match tun.read(&mut header, &mut self.packet) {
                Ok(len) => {
                    reads += 1;
                    if let Err(cause) = self.take(shared, &header, len, icmp) {
                        shared.counters.drop(cause, 1, None);
                    }
                }
                Err(error) if is_gone(&error) => return Err(Lost),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Nothing there.
                Err(_) => {
                    more = false;
                    break;
                }
            }
            if self.cut.len() >= BYTES[usize::from(self.many)] {
                break;
            }
        }
        if !self.batch.is_empty() {
            self.send(shared, udp, icmp);
        }
        self.load += Load::of(reads, self.cut.len());
        Ok(more)
    }

    /// Cuts one packet or super-packet and puts it into the batch.
    fn take(
        &mut self,
        shared: &Shared,
        header: &[u8; HEADER],
        len: usize,
        icmp: Option<&impl Icmp>,
    ) -> Result<(), Cause> {
        let vnet = Vnet::parse(header).ok_or(Cause::BadOffload)?;
        let start = self.cut.len();
        let segments = segment(&vnet, &self.packet[..len], &mut self.cut).map_err(|_| Cause::BadOffload)?;
        let first = start..self.cut.len().min(start + segments.size);
        let found = Inner::check(&self.cut[first.clone()]).map_err(Cause::from).and_then(|inner| {
            let peer = self.peers.position(inner.dst);
            self.flows.saw(&self.cut[first.clone()], &inner);
            peer.ok_or_else(|| {
                self.answers.tell(shared, icmp, (&self.cut[first.clone()], &inner), Trouble::NoRoute);
                Cause::NoPeer
            })
        });
        match found {
            Ok(peer) => {
                self.append(peer, start, segments.size);
                Ok(())
            }
            Err(cause) => {
                self.cut.truncate(start);
                Err(cause)
            }
        }
    }

    /// What stands from `start` on goes to a peer: as much as fits behind what goes there already, where one call can carry both.
    fn append(&mut self, peer: usize, start: usize, size: usize) {
        let (mut at, end) = (start, self.cut.len());
        let to = self.peers.at(peer).to;
        if let (Some(last), Some(note)) = (self.batch.last_mut(), self.notes.last_mut()) {
            let whole = last.len % last.segment == 0;
            let single = end - start <= size;
            let like = size == last.segment || (single && size < last.segment);
            if note.peer == peer && whole && like {
                let room = MAX_SEGMENTS.min(MAX_BYTES / last.segment).saturating_sub(last.count());
                at = end.min(start + room * size);
                last.len += at - start;
                note.super_packets += usize::from(at > start);
            }
        }
        // What is too much for one call goes in equal parts: a small rest would cost as much as a large one.
        let run = MAX_SEGMENTS.min(MAX_BYTES / size).max(1);
        let count = (end - at).div_ceil(size);
        let run = count.div_ceil(count.div_ceil(run).max(1));
        while at < end {
            let part = (run * size).min(end - at);
            self.batch.push(Outgoing { to, start: at, len: part, segment: size });
            self.notes.push(Note { peer, super_packets: usize::from(at == start) });
            at += part;
        }
    }

    fn send(&mut self, shared: &Shared, udp: &impl Udp, icmp: Option<&impl Icmp>) {
        self.failed.clear();
        let too_long = Some(Errno::MSGSIZE.raw_os_error());
        let mut from = 0;
        while from < self.batch.len() {
            let failed = &mut self.failed;
            let mut note = |n: usize, error: io::Error| failed.push((from + n, error.raw_os_error()));
            let calls = udp.send(&self.cut, &self.batch[from..], &mut note);
            add(&shared.counters.calls.udp_sends, calls);
            // It goes in parts before what stands behind it: nothing overtakes anything.
            match self.failed.last() {
                Some(&(number, errno)) if number >= from && errno == too_long => {
                    self.too_big(shared, number, (udp, icmp));
                    from = number + 1;
                }
                _ => break,
            }
        }
        for (number, (message, note)) in self.batch.iter().zip(&self.notes).enumerate() {
            let counters = &self.peers.at(note.peer).counters;
            match self.failed.iter().find(|(n, _)| *n == number) {
                None => counters.out.add(message.count(), message.len, note.super_packets, 1),
                Some((_, errno)) if *errno == too_long => {}
                Some((_, errno)) => {
                    shared.counters.drop(Cause::SendFailed, message.count(), Some(counters));
                    let first = &self.cut[message.start..message.start + message.segment.min(message.len)];
                    if is_unreachable(*errno)
                        && let Ok(inner) = Inner::check(first)
                    {
                        self.answers.tell(shared, icmp, (first, &inner), Trouble::NoRoute);
                    }
                }
            }
        }
        shared.set_segments(udp.segments());
    }

    /// The path takes less than the device: what may be cut is cut, and of the rest the sender is told.
    fn too_big(&mut self, shared: &Shared, number: usize, (udp, icmp): (&impl Udp, Option<&impl Icmp>)) {
        let (message, note) = (self.batch[number], self.notes[number]);
        let counters = &self.peers.at(note.peer).counters;
        let outer = if message.to.is_ipv4() { 28 } else { 48 };
        let mtu = udp.path_mtu(message.to.ip()).map_or(0, |mtu| mtu.saturating_sub(outer));
        let (mut parts, mut lengths, mut told) = (Vec::new(), Vec::new(), None);
        for at in (0..message.len).step_by(message.segment.max(1)) {
            let end = message.len.min(at + message.segment);
            let packet = &self.cut[message.start + at..message.start + end];
            let Ok(inner) = Inner::check(packet) else { continue };
            let passes = if inner.src.is_ipv6() { mtu.max(ipv6::LEAST_MTU) } else { mtu };
            // The last one of a run may be short enough.
            if packet.len() <= passes {
                parts.extend_from_slice(packet);
                lengths.push(packet.len());
                continue;
            }
            if fragment(packet, &inner, mtu, &mut parts, &mut lengths) {
                continue;
            }
            shared.counters.drop(Cause::TooBig, 1, Some(counters));
            let trouble = Trouble::TooBig { mtu: passes.min(usize::from(u16::MAX)) as u16 };
            // Once for each pair of ends in a run: a sender keeps a path's MTU by destination.
            if told != Some((inner.src, inner.dst))
                && mtu > 0
                && self.answers.tell(shared, icmp, (packet, &inner), trouble)
            {
                told = Some((inner.src, inner.dst));
            }
        }
        let (mut start, mut batch) = (0, Vec::with_capacity(lengths.len()));
        for &len in &lengths {
            batch.push(Outgoing { to: message.to, start, len, segment: len });
            start += len;
        }
        let (mut lost, mut lost_bytes) = (0, 0);
        let mut failed = |n: usize, error: io::Error| {
            // The path has become narrower still: behind that one nothing went.
            let stops = error.raw_os_error() == Some(Errno::MSGSIZE.raw_os_error());
            let these = if stops { &lengths[n..] } else { &lengths[n..=n] };
            lost += these.len();
            lost_bytes += these.iter().sum::<usize>();
        };
        // What IPv6 asks of each link, a narrower path carries in fragments of the outer packet (RFC 8200 section 5).
        let calls = if lengths.iter().any(|&len| len > mtu) {
            udp.send_cuttable(&parts, &batch, &mut failed)
        } else {
            udp.send(&parts, &batch, &mut failed)
        };
        add(&shared.counters.calls.udp_sends, calls);
        shared.counters.drop(Cause::SendFailed, lost, Some(counters));
        let sent = batch.len() - lost;
        counters.out.add(sent, start - lost_bytes, if sent > 0 { note.super_packets } else { 0 }, sent);
    }
}
