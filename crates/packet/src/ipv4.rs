//! IPv4 (RFC 791).

use std::fmt;
use std::net::Ipv4Addr;

use crate::{Error, bytes, checksum};

/// Where things stand.
mod field {
    pub(super) const VERSION_IHL: usize = 0;
    pub(super) const TOS: usize = 1;
    pub(super) const TOTAL_LEN: usize = 2;
    pub(super) const IDENT: usize = 4;
    pub(super) const FRAGMENT: usize = 6;
    pub(super) const TTL: usize = 8;
    pub(super) const PROTOCOL: usize = 9;
    pub(super) const CHECKSUM: usize = 10;
    pub(super) const SRC: usize = 12;
    pub(super) const DST: usize = 16;
    pub(super) const OPTIONS: usize = 20;
}

/// Bytes of a header without options.
pub const LEN: usize = 20;

/// What an IP packet carries (IANA protocol numbers). Prints as its name, else as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Protocol(pub u8);

impl Protocol {
    /// ICMP.
    pub const ICMP: Protocol = Protocol(1);
    /// TCP.
    pub const TCP: Protocol = Protocol(6);
    /// UDP.
    pub const UDP: Protocol = Protocol(17);
    /// ICMPv6.
    pub const ICMPV6: Protocol = Protocol(58);
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Protocol::ICMP => f.write_str("ICMP"),
            Protocol::TCP => f.write_str("TCP"),
            Protocol::UDP => f.write_str("UDP"),
            Protocol::ICMPV6 => f.write_str("ICMPv6"),
            Protocol(other) => write!(f, "protocol {other}"),
        }
    }
}

/// A packet whose header, options included, is whole.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// Refused: another version, a header length below 20 bytes, a header that is not whole, a total length below the header's.
    /// A payload may be cut off (a capture with a snap length): [`Packet::payload`] then gives what is there.
    pub fn new(packet: &'a [u8]) -> Result<Self, Error> {
        bytes::need(packet, LEN)?;
        let version = packet[field::VERSION_IHL] >> 4;
        if version != 4 {
            return Err(Error::BadVersion { found: version, want: 4 });
        }
        let view = Self(packet);
        let header = view.header_len();
        if header < LEN {
            return Err(Error::BadLength { found: header, least: LEN });
        }
        bytes::need(packet, header)?;
        if view.total_len() < header {
            return Err(Error::BadLength { found: view.total_len(), least: header });
        }
        Ok(view)
    }

    /// Header length in bytes, options included.
    pub fn header_len(&self) -> usize {
        usize::from(self.0[field::VERSION_IHL] & 0x0f) * 4
    }

    /// Length of header and payload in bytes, as the header says.
    pub fn total_len(&self) -> usize {
        bytes::be16(self.0, field::TOTAL_LEN).into()
    }

    /// What follows the header, without a frame's padding.
    pub fn payload(&self) -> &'a [u8] {
        &self.0[self.header_len()..self.total_len().min(self.0.len())]
    }

    /// Compares the header's checksum with its bytes.
    pub fn verify(&self) -> Result<(), Error> {
        verify(&self.0[..self.header_len()], field::CHECKSUM, checksum::Sum::default())
    }
}

/// Compares the checksum that stands at `at` with `message` and a sum that comes before it.
pub(crate) fn verify(message: &[u8], at: usize, before: checksum::Sum) -> Result<(), Error> {
    let found = bytes::be16(message, at);
    let right = before.with(&message[..at]).with(&message[at + 2..]).finish();
    // Zero has two forms in one's complement.
    if found == right || (found | right == 0xffff && (found == 0 || right == 0)) {
        Ok(())
    } else {
        Err(Error::BadChecksum { found, right })
    }
}

/// The header's meaning. The checksum is not part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repr<'a> {
    /// Type of service: DSCP in the upper 6 bits, ECN in the lower 2.
    pub tos: u8,
    /// Header and payload in bytes.
    pub total_len: u16,
    /// Identification, for reassembly.
    pub ident: u16,
    /// The three flag bits, in the upper bits of the fragment field: 4 reserved, 2 do not fragment, 1 more fragments.
    pub flags: u8,
    /// Offset of this fragment in units of 8 bytes.
    pub fragment: u16,
    /// Hops left.
    pub ttl: u8,
    /// What the packet carries.
    pub protocol: Protocol,
    /// Source.
    pub src: Ipv4Addr,
    /// Destination.
    pub dst: Ipv4Addr,
    /// Options with padding: a multiple of 4 bytes, at most 40.
    pub options: &'a [u8],
}

impl<'a> Repr<'a> {
    /// Do not fragment.
    pub const DF: u8 = 2;
    /// More fragments follow.
    pub const MF: u8 = 1;

    /// Reads the header.
    pub fn parse(packet: Packet<'a>) -> Self {
        let b = packet.0;
        let fragment = bytes::be16(b, field::FRAGMENT);
        Self {
            tos: b[field::TOS],
            total_len: bytes::be16(b, field::TOTAL_LEN),
            ident: bytes::be16(b, field::IDENT),
            flags: (fragment >> 13) as u8,
            fragment: fragment & 0x1fff,
            ttl: b[field::TTL],
            protocol: Protocol(b[field::PROTOCOL]),
            src: bytes::ip4(b, field::SRC),
            dst: bytes::ip4(b, field::DST),
            options: &b[field::OPTIONS..packet.header_len()],
        }
    }

    /// Bytes that [`Repr::emit`] writes.
    pub const fn header_len(&self) -> usize {
        LEN + self.options.len()
    }

    /// Writes the header with its checksum to the start of `out`. Refused: options that are no multiple of 4 or beyond 40 bytes.
    pub fn emit(&self, out: &mut [u8]) -> Result<(), Error> {
        let len = self.header_len();
        if !len.is_multiple_of(4) || len > 60 {
            return Err(Error::BadLength { found: len, least: LEN });
        }
        bytes::need(out, len)?;
        out[field::VERSION_IHL] = 0x40 | (len / 4) as u8;
        out[field::TOS] = self.tos;
        bytes::put(out, field::TOTAL_LEN, &self.total_len.to_be_bytes());
        bytes::put(out, field::IDENT, &self.ident.to_be_bytes());
        bytes::put(out, field::FRAGMENT, &(u16::from(self.flags) << 13 | self.fragment & 0x1fff).to_be_bytes());
        out[field::TTL] = self.ttl;
        out[field::PROTOCOL] = self.protocol.0;
        bytes::put(out, field::CHECKSUM, &[0, 0]);
        bytes::put(out, field::SRC, &self.src.octets());
        bytes::put(out, field::DST, &self.dst.octets());
        bytes::put(out, field::OPTIONS, self.options);
        let sum = checksum::of(&out[..len]);
        bytes::put(out, field::CHECKSUM, &sum.to_be_bytes());
        Ok(())
    }
}

impl fmt::Display for Repr<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {}  {}  ttl {}  length {}", self.src, self.dst, self.protocol, self.ttl, self.total_len)?;
        if self.tos != 0 {
            write!(f, "  tos {:#04x}", self.tos)?;
        }
        if self.flags & Self::DF != 0 {
            f.write_str("  DF")?;
        }
        if self.fragment != 0 || self.flags & Self::MF != 0 {
            let more = if self.flags & Self::MF != 0 { "+" } else { "" };
            write!(f, "  fragment at {}{more} of packet {}", u32::from(self.fragment) * 8, self.ident)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rustfmt::skip]
    const BYTES: [u8; LEN] = [
        0x45, 0, 0, 84, 0xb2, 0xe6, 0x40, 0, 64, 1, 0x2f, 0x99,
        172, 17, 0, 4, 172, 17, 0, 3,
    ];

    fn repr() -> Repr<'static> {
        Repr {
            tos: 0,
            total_len: 84,
            ident: 45798,
            flags: Repr::DF,
            fragment: 0,
            ttl: 64,
            protocol: Protocol::ICMP,
            src: Ipv4Addr::new(172, 17, 0, 4),
            dst: Ipv4Addr::new(172, 17, 0, 3),
            options: &[],
        }
    }

    #[test]
    fn golden() {
        let packet = Packet::new(&BYTES).unwrap();
        assert_eq!(Repr::parse(packet), repr());
        packet.verify().unwrap();
        let mut out = [0xa5; LEN];
        repr().emit(&mut out).unwrap();
        assert_eq!(out, BYTES);
        assert_eq!(repr().to_string(), "172.17.0.4 > 172.17.0.3  ICMP  ttl 64  length 84  DF");
    }

    #[test]
    fn options_stand_between_header_and_payload() {
        let repr = Repr { options: &[0x94, 4, 0, 0], total_len: 25, ..repr() };
        let mut out = [0xa5; 30];
        repr.emit(&mut out).unwrap();
        let packet = Packet::new(&out).unwrap();
        assert_eq!(Repr::parse(packet), repr);
        assert_eq!(packet.payload(), [0xa5]);
    }

    #[test]
    fn each_refusal_says_why() {
        let with = |at: usize, value| {
            let mut b = BYTES;
            b[at] = value;
            b
        };
        assert_eq!(Packet::new(&BYTES[..19]).unwrap_err(), Error::Truncated { need: 20, have: 19 });
        assert_eq!(Packet::new(&with(0, 0x65)).unwrap_err(), Error::BadVersion { found: 6, want: 4 });
        assert_eq!(Packet::new(&with(0, 0x44)).unwrap_err(), Error::BadLength { found: 16, least: 20 });
        assert_eq!(Packet::new(&with(0, 0x46)).unwrap_err(), Error::Truncated { need: 24, have: 20 });
        assert_eq!(Packet::new(&with(3, 19)).unwrap_err(), Error::BadLength { found: 19, least: 20 });
        let bad = with(8, 63);
        let error = Packet::new(&bad).unwrap().verify().unwrap_err();
        assert_eq!(error, Error::BadChecksum { found: 0x2f99, right: 0x3099 });
    }
}
