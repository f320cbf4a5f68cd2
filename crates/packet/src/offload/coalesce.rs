//! Packets of a batch → super-packets, without moving a byte of payload (the kernel's GRO: net/ipv4/tcp_offload.c, udp_offload.c).
//!
//! Items leave in the order in which their first packets came. A packet joins the newest item of its flow or starts one behind all
//! others, so no flow is ever reordered. What has no readable ports (a fragment, options, another protocol) ends every item of its
//! pair of addresses: it may belong to any of those flows.

use std::net::IpAddr;
use std::ops::Range;

use super::{Gso, Inner, Transport, Vnet};
use crate::checksum::Sum;
use crate::{bytes, ipv4};

/// Packets of a batch for which there is room from the start: 32 messages, each of as many datagrams as the kernel merges or cuts.
const ROOM: usize = 32 * 128;
/// Flows that are looked at for a packet to join.
const OPEN: usize = 32;
/// Datagrams that the kernel cuts from one (UDP_MAX_SEGMENTS of older kernels).
const MOST_DATAGRAMS: usize = 64;
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_ACK: u8 = 0x10;
const TCP_ECE: u8 = 0x40;

/// Which super-packets the device takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Merge {
    /// TCP over IPv4.
    pub tcp4: bool,
    /// TCP over IPv6.
    pub tcp6: bool,
    /// UDP over either.
    pub udp: bool,
}

/// One packet or super-packet to write.
#[derive(Debug, Clone, Copy)]
pub struct Item {
    /// What stands in front of it.
    pub vnet: Vnet,
    /// Packets in it.
    pub packets: usize,
    /// Bytes in it.
    pub len: usize,
    first: usize,
    last: usize,
    gso_size: usize,
    inner: Inner,
}

impl Item {
    /// The source address of its packets.
    pub const fn src(&self) -> IpAddr {
        self.inner.src
    }

    /// Only what has a readable transport header is ever merged.
    fn transport(&self) -> Transport {
        self.inner.transport.unwrap_or(Transport::Udp)
    }
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    start: usize,
    end: usize,
    next: usize,
}

/// Merges the packets of one buffer. Holds its memory from batch to batch.
#[derive(Debug, Default)]
pub struct Coalescer {
    merge: Merge,
    items: Vec<Item>,
    pieces: Vec<Piece>,
    /// Items that may still grow, oldest first.
    open: Vec<usize>,
}

impl Coalescer {
    /// Merges what `merge` allows.
    pub fn new(merge: Merge) -> Self {
        let (items, pieces) = (Vec::with_capacity(ROOM), Vec::with_capacity(ROOM));
        Self { merge, items, pieces, open: Vec::with_capacity(OPEN) }
    }

    /// Forgets the batch.
    pub fn clear(&mut self) {
        self.items.clear();
        self.pieces.clear();
        self.open.clear();
    }

    /// Takes the packet at `range` of `buffer`, of which `inner` is what [`Inner::check`] said.
    pub fn push(&mut self, buffer: &[u8], range: Range<usize>, inner: Inner) {
        let packet = &buffer[range.clone()];
        let Some(transport) = inner.transport else {
            self.open.retain(|&i| (self.items[i].inner.src, self.items[i].inner.dst) != (inner.src, inner.dst));
            return self.start(range, inner, 0);
        };
        let flow = self.open.iter().rposition(|&i| {
            same_flow(&self.items[i], &buffer[self.pieces[self.items[i].first].start..], packet, &inner)
        });
        let payload = packet.len() - headers(packet, &inner, transport);
        let mergeable = self.may(transport, packet[0] >> 4) && payload > 0 && plain(packet, &inner, transport);
        if let Some(at) = flow {
            let item = self.open[at];
            if mergeable && self.joins(buffer, item, packet, transport, payload) {
                if self.append(item, range, payload) || ends(packet, &inner, transport) {
                    self.open.remove(at);
                }
                return;
            }
            self.open.remove(at);
        }
        self.start(range, inner, payload);
        if mergeable && !ends(packet, &inner, transport) {
            if self.open.len() == OPEN {
                self.open.remove(0);
            }
            self.open.push(self.items.len() - 1);
        }
    }

    /// Ends the batch: writes the lengths, flags and partial checksums of super-packets into the headers of their first packets.
    pub fn finish(&mut self, buffer: &mut [u8]) {
        self.open.clear();
        for item in &mut self.items {
            if item.packets == 1 {
                continue;
            }
            let (first, last) = (self.pieces[item.first], self.pieces[item.last]);
            let all = headers(&buffer[first.start..first.end], &item.inner, item.transport());
            // The last piece is payload alone; its own header, with the flags, stands right before it.
            let flags = match item.transport() {
                Transport::Tcp => buffer[last.start - all + item.inner.header + 13],
                Transport::Udp => 0,
            };
            seal(item, &mut buffer[first.start..first.end], flags);
        }
    }

    /// What to write, in order.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// Where in the buffer the bytes of an item stand, in order.
    pub fn pieces(&self, item: &Item) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut at = item.first;
        (0..item.packets).map(move |_| {
            let piece = self.pieces[at];
            at = piece.next;
            piece.start..piece.end
        })
    }

    const fn may(&self, transport: Transport, version: u8) -> bool {
        match (transport, version) {
            (Transport::Tcp, 4) => self.merge.tcp4,
            (Transport::Tcp, _) => self.merge.tcp6,
            (Transport::Udp, _) => self.merge.udp,
        }
    }

    fn start(&mut self, range: Range<usize>, inner: Inner, gso_size: usize) {
        let at = self.pieces.len();
        self.items.push(Item {
            vnet: Vnet::default(),
            packets: 1,
            len: range.len(),
            first: at,
            last: at,
            gso_size,
            inner,
        });
        self.pieces.push(Piece { start: range.start, end: range.end, next: at });
    }

    /// True when the item is then full.
    fn append(&mut self, item: usize, range: Range<usize>, payload: usize) -> bool {
        let at = self.pieces.len();
        self.pieces.push(Piece { start: range.end - payload, end: range.end, next: at });
        let item = &mut self.items[item];
        self.pieces[item.last].next = at;
        item.last = at;
        item.packets += 1;
        item.len += payload;
        payload < item.gso_size
    }

    /// True where `packet`, of the same flow, continues the item and differs from its first packet only in what cutting changes.
    fn joins(&self, buffer: &[u8], item: usize, packet: &[u8], transport: Transport, payload: usize) -> bool {
        let item = &self.items[item];
        let piece = self.pieces[item.first];
        let first = &buffer[piece.start..piece.end];
        let v6 = packet[0] >> 4 == 6;
        let limit = 0xffff + if v6 { crate::ipv6::LEN } else { 0 };
        let same = |range: Range<usize>| first[range.clone()] == packet[range];
        let ip = if v6 {
            same(0..4) && same(6..40)
        } else {
            let next = bytes::be16(first, 4).wrapping_add(item.packets as u16);
            same(0..2) && same(6..10) && same(12..20) && (item.inner.dont_fragment || bytes::be16(packet, 4) == next)
        };
        let t = item.inner.header;
        ip && payload <= item.gso_size
            && item.len + payload <= limit
            && match transport {
                Transport::Udp => item.packets < MOST_DATAGRAMS,
                Transport::Tcp => {
                    let header = headers(first, &item.inner, transport);
                    let next = bytes::be32(first, t + 4).wrapping_add((item.len - header) as u32);
                    headers(packet, &item.inner, transport) == header
                        && bytes::be32(packet, t + 4) == next
                        && same(t + 8..t + 13)
                        && (first[t + 13] ^ packet[t + 13]) & !(TCP_PSH | TCP_FIN) == 0
                        && same(t + 14..t + 16)
                        && same(t + 20..header)
                }
            }
    }
}

fn headers(packet: &[u8], inner: &Inner, transport: Transport) -> usize {
    inner.header
        + match transport {
            Transport::Tcp => usize::from(packet[inner.header + 12] >> 4) * 4,
            Transport::Udp => crate::udp::LEN,
        }
}

fn same_flow(item: &Item, first: &[u8], packet: &[u8], inner: &Inner) -> bool {
    let ports = inner.header..inner.header + 4;
    (item.inner.src, item.inner.dst, item.inner.transport) == (inner.src, inner.dst, inner.transport)
        && first[ports.clone()] == packet[ports]
}

/// True for a packet that cutting could have made: ordinary flags, and a checksum that is there and right.
fn plain(packet: &[u8], inner: &Inner, transport: Transport) -> bool {
    let message = &packet[inner.header..];
    let at = match transport {
        Transport::Tcp => {
            let flags = message[13];
            if flags & TCP_ACK == 0
                || flags & !(TCP_ACK | TCP_PSH | TCP_FIN | TCP_ECE) != 0
                || message[18..20] != [0, 0]
            {
                return false;
            }
            16
        }
        Transport::Udp if message[6..8] == [0, 0] => return false,
        Transport::Udp => 6,
    };
    // Reserved bits of TCP and IPv4 are for nobody to guess about.
    let reserved =
        packet[0] >> 4 == 4 && packet[6] & 0x80 != 0 || transport == Transport::Tcp && message[12] & 0x0f != 0;
    let before = Sum::default().pseudo(inner.src, inner.dst, inner.protocol, message.len());
    !reserved && ipv4::verify(message, at, before).is_ok()
}

/// True for a packet behind which nothing joins.
fn ends(packet: &[u8], inner: &Inner, transport: Transport) -> bool {
    transport == Transport::Tcp && packet[inner.header + 13] & (TCP_PSH | TCP_FIN) != 0
}

/// Makes the first packet's headers those of the whole item; `flags` are those of the last TCP segment.
fn seal(item: &mut Item, first: &mut [u8], flags: u8) {
    let transport = item.transport();
    let (t, all) = (item.inner.header, headers(first, &item.inner, transport));
    let word = |n: usize| (n as u16).to_be_bytes();
    let v6 = first[0] >> 4 == 6;
    if v6 {
        bytes::put(first, 4, &word(item.len - crate::ipv6::LEN));
    } else {
        bytes::put(first, 2, &word(item.len));
        bytes::put(first, 10, &[0, 0]);
        let sum = crate::checksum::of(&first[..t]);
        bytes::put(first, 10, &sum.to_be_bytes());
    }
    let message = item.len - t;
    let offset = match transport {
        Transport::Tcp => {
            first[t + 13] = flags;
            16
        }
        Transport::Udp => {
            bytes::put(first, t + 4, &word(message));
            6
        }
    };
    let partial = !Sum::default().pseudo(item.inner.src, item.inner.dst, item.inner.protocol, message).finish();
    bytes::put(first, t + offset, &partial.to_be_bytes());
    item.vnet = Vnet {
        needs_csum: true,
        gso: match (transport, v6) {
            (Transport::Tcp, false) => Gso::Tcp4,
            (Transport::Tcp, true) => Gso::Tcp6,
            (Transport::Udp, _) => Gso::Udp,
        },
        hdr_len: all as u16,
        gso_size: item.gso_size as u16,
        csum_start: t as u16,
        csum_offset: offset as u16,
    };
}
