//! Super-packets: what a device with a virtio-net header hands over and takes, and the MTU-sized packets that the wire carries.
//!
//! ```text
//!  TUN ──(Vnet, up to 64 KiB)──▶ segment ──▶ packets side by side in one buffer, checksums finished ──▶ UDP_SEGMENT
//!  TUN ◀──(Vnet, slices)──────── Coalescer ◀── checked packets (Inner) in one receive buffer ◀───────── UDP_GRO
//! ```
//! Merging what [`segment`] cut gives the super-packet back, byte for byte.

mod answer;
mod coalesce;
mod inner;
mod segmentation;

pub use answer::{Trouble, error_about, fragment};
pub use coalesce::{Coalescer, Item, Merge};
pub use inner::{Bad, Inner, Transport};
pub use segmentation::{Segments, segment};

use crate::{bytes, checksum};

/// `struct virtio_net_hdr` (virtio 1.2 section 5.1.6), as a TUN device has it: ten bytes in the host's byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Vnet {
    /// The transport checksum holds the pseudo header's sum only: sum from `csum_start` on, write to `csum_start + csum_offset`.
    pub needs_csum: bool,
    /// What to cut, if anything.
    pub gso: Gso,
    /// Bytes of all headers; a hint.
    pub hdr_len: u16,
    /// Payload bytes of each segment but the last.
    pub gso_size: u16,
    /// Where the transport header starts.
    pub csum_start: u16,
    /// Where in it the checksum stands.
    pub csum_offset: u16,
}

/// How a super-packet is cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Gso {
    /// Not at all.
    #[default]
    None,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over either, a datagram for each segment.
    Udp,
}

impl Vnet {
    /// Bytes in front of each packet.
    pub const LEN: usize = 10;
    const NEEDS_CSUM: u8 = 1;
    const ECN: u8 = 0x80;

    /// Reads the header. `None`: cut off, or a kind of cutting that was never asked for.
    pub fn parse(header: &[u8]) -> Option<Self> {
        let header: [u8; Self::LEN] = header.get(..Self::LEN)?.try_into().ok()?;
        let word = |at| u16::from_ne_bytes(bytes::get(&header, at));
        let gso = match header[1] & !Self::ECN {
            0 => Gso::None,
            1 => Gso::Tcp4,
            4 => Gso::Tcp6,
            5 => Gso::Udp,
            _ => return None,
        };
        Some(Self {
            needs_csum: header[0] & Self::NEEDS_CSUM != 0,
            gso,
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        })
    }

    /// The header's bytes.
    pub fn emit(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[0] = if self.needs_csum { Self::NEEDS_CSUM } else { 0 };
        out[1] = match self.gso {
            Gso::None => 0,
            Gso::Tcp4 => 1,
            Gso::Tcp6 => 4,
            Gso::Udp => 5,
        };
        for (at, word) in [(2, self.hdr_len), (4, self.gso_size), (6, self.csum_start), (8, self.csum_offset)] {
            bytes::put(&mut out, at, &word.to_ne_bytes());
        }
        out
    }
}

/// Finishes a checksum of which only the pseudo header's part is there. False: the place lies outside the packet.
///
/// A UDP checksum that comes out as zero is sent as all ones (RFC 768).
pub fn complete(vnet: &Vnet, packet: &mut [u8]) -> bool {
    let start = usize::from(vnet.csum_start);
    let at = start + usize::from(vnet.csum_offset);
    if at + 2 > packet.len() {
        return false;
    }
    let sum = checksum::of(&packet[start..]);
    let sum = if sum == 0 && vnet.csum_offset == 6 { 0xffff } else { sum };
    bytes::put(packet, at, &sum.to_be_bytes());
    true
}

#[cfg(test)]
mod tests;
