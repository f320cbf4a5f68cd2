//! Bytes of frames, and what they mean. Pure: no socket, no clock, no dependency.
//!
//! ```text
//!  bytes ──Packet::new──▶ view (length checked) ──Repr::parse──▶ meaning ──Display──▶ a line for people
//!    ▲                                                              │
//!    └───────────────────────── Repr::emit ◀────────────────────────┘
//! ```
//! One protocol, one file, always in the same order: `field` (where things stand), `Packet` (the view), `Repr` (the meaning),
//! `Display`, golden bytes. If `Repr::parse` gives a meaning, emitting and parsing it again gives the same meaning.
//! Checksums are computed by `emit` and looked at by `verify`, never by `parse`: a frame captured on its way out of a host
//! often carries a checksum that the hardware was to fill in.
//!
//! - [`ethernet`], [`vlan`], [`arp`]: the link
//! - [`ipv4`], [`ipv6`], [`icmp`], [`icmpv6`], [`udp`], [`tcp`]: the packet
//! - [`vxlan`]: the overlay
//! - [`mod@decode`]: a whole frame, layer by layer, with byte offsets
//! - [`offload`]: super-packets cut and merged
//! - [`checksum`]: the internet checksum

mod bytes;

pub mod arp;
pub mod checksum;
pub mod decode;
pub mod ethernet;
pub mod icmp;
pub mod icmpv6;
pub mod ipv4;
pub mod ipv6;
pub mod offload;
pub mod tcp;
pub mod udp;
pub mod vlan;
pub mod vxlan;

use std::fmt;

pub use decode::{Header, Layer, decode, decode_packet, render};

/// Why bytes are not what they were taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Fewer bytes than the header needs.
    #[error("cut off: {have} bytes where {need} are needed")]
    Truncated {
        /// Bytes that the header (or the length in it) asks for.
        need: usize,
        /// Bytes that are there.
        have: usize,
    },
    /// The version field says another protocol.
    #[error("version is {found}, not {want}")]
    BadVersion {
        /// As found.
        found: u8,
        /// What this protocol has.
        want: u8,
    },
    /// A length field below what the header itself takes.
    #[error("length field says {found}, at least {least} is needed")]
    BadLength {
        /// As found, in bytes.
        found: usize,
        /// The smallest that makes sense, in bytes.
        least: usize,
    },
    /// The checksum does not fit the bytes.
    #[error("checksum is {found:#06x}, the bytes sum up to {right:#06x}")]
    BadChecksum {
        /// As found.
        found: u16,
        /// What the bytes give.
        right: u16,
    },
    /// A fixed field has a value of another kind of message.
    #[error("{field} is {found:#x}, not {want:#x}")]
    BadField {
        /// The field's name.
        field: &'static str,
        /// As found.
        found: u32,
        /// What this format has.
        want: u32,
    },
}

/// A hardware address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// `ff:ff:ff:ff:ff:ff`.
    pub const BROADCAST: Mac = Mac([0xff; 6]);

    /// True for broadcast and multicast: the lowest bit of the first byte.
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 == 1
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
