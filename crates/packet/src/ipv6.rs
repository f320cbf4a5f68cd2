//! IPv6 (RFC 8200): the fixed header.

use std::fmt;
use std::net::Ipv6Addr;

use crate::ipv4::Protocol;
use crate::{Error, bytes};

/// Where things stand.
mod field {
    pub(super) const VERSION_CLASS_FLOW: usize = 0;
    pub(super) const PAYLOAD_LEN: usize = 4;
    pub(super) const NEXT_HEADER: usize = 6;
    pub(super) const HOP_LIMIT: usize = 7;
    pub(super) const SRC: usize = 8;
    pub(super) const DST: usize = 24;
}

/// Bytes of the fixed header.
pub const LEN: usize = 40;

/// Every link carries packets of so many bytes (RFC 8200 section 5).
pub const LEAST_MTU: usize = 1280;

/// A packet with a whole fixed header.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// Refused: fewer than [`LEN`] bytes, another version.
    pub fn new(packet: &'a [u8]) -> Result<Self, Error> {
        bytes::need(packet, LEN)?;
        let version = packet[field::VERSION_CLASS_FLOW] >> 4;
        if version != 6 { Err(Error::BadVersion { found: version, want: 6 }) } else { Ok(Self(packet)) }
    }

    /// What follows the fixed header, extension headers included, without a frame's padding; what is there of it.
    pub fn payload(&self) -> &'a [u8] {
        let end = LEN + usize::from(bytes::be16(self.0, field::PAYLOAD_LEN));
        &self.0[LEN..end.min(self.0.len())]
    }
}

/// The header's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repr {
    /// Traffic class: DSCP and ECN.
    pub class: u8,
    /// Flow label, 20 bits.
    pub flow: u32,
    /// Bytes after the fixed header.
    pub payload_len: u16,
    /// What follows.
    pub next_header: Protocol,
    /// Hops left.
    pub hop_limit: u8,
    /// Source.
    pub src: Ipv6Addr,
    /// Destination.
    pub dst: Ipv6Addr,
}

impl Repr {
    /// Reads the header.
    pub fn parse(packet: Packet<'_>) -> Self {
        let b = packet.0;
        let first = bytes::be32(b, field::VERSION_CLASS_FLOW);
        Self {
            class: (first >> 20) as u8,
            flow: first & 0x000f_ffff,
            payload_len: bytes::be16(b, field::PAYLOAD_LEN),
            next_header: Protocol(b[field::NEXT_HEADER]),
            hop_limit: b[field::HOP_LIMIT],
            src: bytes::ip6(b, field::SRC),
            dst: bytes::ip6(b, field::DST),
        }
    }

    /// Writes the header to the start of `out`; bits of the flow label beyond 20 are cut off.
    pub fn emit(&self, out: &mut [u8]) -> Result<(), Error> {
        bytes::need(out, LEN)?;
        let first = 6 << 28 | u32::from(self.class) << 20 | self.flow & 0x000f_ffff;
        bytes::put(out, field::VERSION_CLASS_FLOW, &first.to_be_bytes());
        bytes::put(out, field::PAYLOAD_LEN, &self.payload_len.to_be_bytes());
        out[field::NEXT_HEADER] = self.next_header.0;
        out[field::HOP_LIMIT] = self.hop_limit;
        bytes::put(out, field::SRC, &self.src.octets());
        bytes::put(out, field::DST, &self.dst.octets());
        Ok(())
    }
}

impl fmt::Display for Repr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { src, dst, next_header, hop_limit, payload_len, .. } = self;
        write!(f, "{src} > {dst}  {next_header}  hop limit {hop_limit}  payload {payload_len}")?;
        if self.class != 0 {
            write!(f, "  class {:#04x}", self.class)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let mut bytes = [0u8; LEN];
        bytes[..8].copy_from_slice(&[0x60, 0x0b, 0x5f, 0x1e, 0, 64, 58, 64]);
        bytes[8..24].copy_from_slice(&"fd00:15::2".parse::<Ipv6Addr>().unwrap().octets());
        bytes[24..].copy_from_slice(&"fd00:16::3".parse::<Ipv6Addr>().unwrap().octets());
        let repr = Repr {
            class: 0,
            flow: 0xb5f1e,
            payload_len: 64,
            next_header: Protocol::ICMPV6,
            hop_limit: 64,
            src: "fd00:15::2".parse().unwrap(),
            dst: "fd00:16::3".parse().unwrap(),
        };
        assert_eq!(Repr::parse(Packet::new(&bytes).unwrap()), repr);
        let mut out = [0xa5; LEN];
        repr.emit(&mut out).unwrap();
        assert_eq!(out, bytes);
        assert_eq!(repr.to_string(), "fd00:15::2 > fd00:16::3  ICMPv6  hop limit 64  payload 64");
        bytes[0] = 0x45;
        assert_eq!(Packet::new(&bytes).unwrap_err(), Error::BadVersion { found: 4, want: 6 });
    }
}
