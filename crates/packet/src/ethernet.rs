//! Ethernet II (IEEE 802.3): destination, source, type.

use std::fmt;

use crate::{Error, Mac, bytes};

/// Where things stand.
mod field {
    pub(super) const DST: usize = 0;
    pub(super) const SRC: usize = 6;
    pub(super) const TYPE: usize = 12;
}

/// Bytes of the header.
pub const LEN: usize = 14;

/// What a frame or a tag carries. Prints as its name, else as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EtherType(pub u16);

impl EtherType {
    /// IPv4.
    pub const IPV4: EtherType = EtherType(0x0800);
    /// ARP.
    pub const ARP: EtherType = EtherType(0x0806);
    /// An 802.1Q tag.
    pub const VLAN: EtherType = EtherType(0x8100);
    /// An 802.1ad (outer) tag.
    pub const QINQ: EtherType = EtherType(0x88a8);
    /// IPv6.
    pub const IPV6: EtherType = EtherType(0x86dd);
}

impl fmt::Display for EtherType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            EtherType::IPV4 => f.write_str("IPv4"),
            EtherType::ARP => f.write_str("ARP"),
            EtherType::VLAN => f.write_str("802.1Q"),
            EtherType::QINQ => f.write_str("802.1ad"),
            EtherType::IPV6 => f.write_str("IPv6"),
            EtherType(other) => write!(f, "{other:#06x}"),
        }
    }
}

/// A frame with a whole header.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// Refused: fewer than [`LEN`] bytes.
    pub fn new(frame: &'a [u8]) -> Result<Self, Error> {
        bytes::need(frame, LEN).map(|()| Self(frame))
    }

    /// Destination.
    pub fn dst(&self) -> Mac {
        bytes::mac(self.0, field::DST)
    }

    /// Source.
    pub fn src(&self) -> Mac {
        bytes::mac(self.0, field::SRC)
    }

    /// Type of the payload.
    pub fn ethertype(&self) -> EtherType {
        EtherType(bytes::be16(self.0, field::TYPE))
    }

    /// What follows the header.
    pub fn payload(&self) -> &'a [u8] {
        &self.0[LEN..]
    }
}

/// The header's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repr {
    /// Destination.
    pub dst: Mac,
    /// Source.
    pub src: Mac,
    /// Type of the payload.
    pub ethertype: EtherType,
}

impl Repr {
    /// Reads the header.
    pub fn parse(packet: Packet<'_>) -> Self {
        Self { dst: packet.dst(), src: packet.src(), ethertype: packet.ethertype() }
    }

    /// Writes the header to the start of `out`.
    pub fn emit(&self, out: &mut [u8]) -> Result<(), Error> {
        bytes::need(out, LEN)?;
        bytes::put(out, field::DST, &self.dst.0);
        bytes::put(out, field::SRC, &self.src.0);
        bytes::put(out, field::TYPE, &self.ethertype.0.to_be_bytes());
        Ok(())
    }
}

impl fmt::Display for Repr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {}  {}", self.src, self.dst, self.ethertype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; LEN] = [0x5e, 0xf8, 0x4f, 0, 0xe3, 0x37, 2, 0, 0, 0, 0, 1, 0x08, 0x00];

    #[test]
    fn golden() {
        let repr = Repr {
            dst: Mac([0x5e, 0xf8, 0x4f, 0, 0xe3, 0x37]),
            src: Mac([2, 0, 0, 0, 0, 1]),
            ethertype: EtherType::IPV4,
        };
        assert_eq!(Repr::parse(Packet::new(&BYTES).unwrap()), repr);
        let mut out = [0xa5; LEN];
        repr.emit(&mut out).unwrap();
        assert_eq!(out, BYTES);
        assert_eq!(repr.to_string(), "02:00:00:00:00:01 > 5e:f8:4f:00:e3:37  IPv4");
    }

    #[test]
    fn a_short_frame_says_how_short() {
        assert_eq!(Packet::new(&BYTES[..13]).unwrap_err(), Error::Truncated { need: 14, have: 13 });
    }
}
