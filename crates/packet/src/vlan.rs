//! The 802.1Q tag: priority, drop eligibility, VLAN number, and the type of what follows.

use std::fmt;

use crate::ethernet::EtherType;
use crate::{Error, bytes};

/// Where things stand, counted from behind the tag's own type.
mod field {
    pub(super) const TCI: usize = 0;
    pub(super) const TYPE: usize = 2;
}

/// Bytes of the tag, without the type that announces it.
pub const LEN: usize = 4;

/// A tag and what follows.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// Refused: fewer than [`LEN`] bytes.
    pub fn new(tag: &'a [u8]) -> Result<Self, Error> {
        bytes::need(tag, LEN).map(|()| Self(tag))
    }

    /// What follows the tag.
    pub fn payload(&self) -> &'a [u8] {
        &self.0[LEN..]
    }
}

/// The tag's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repr {
    /// Priority code point, 0 to 7.
    pub priority: u8,
    /// Drop eligible indicator.
    pub drop_eligible: bool,
    /// VLAN number, 0 to 4095.
    pub vlan: u16,
    /// Type of what follows.
    pub ethertype: EtherType,
}

impl Repr {
    /// Reads the tag.
    pub fn parse(packet: Packet<'_>) -> Self {
        let tci = bytes::be16(packet.0, field::TCI);
        Self {
            priority: (tci >> 13) as u8,
            drop_eligible: tci & 0x1000 != 0,
            vlan: tci & 0x0fff,
            ethertype: EtherType(bytes::be16(packet.0, field::TYPE)),
        }
    }

    /// Writes the tag to the start of `out`; bits beyond a field's width are cut off.
    pub fn emit(&self, out: &mut [u8]) -> Result<(), Error> {
        bytes::need(out, LEN)?;
        let tci = u16::from(self.priority & 7) << 13 | u16::from(self.drop_eligible) << 12 | self.vlan & 0x0fff;
        bytes::put(out, field::TCI, &tci.to_be_bytes());
        bytes::put(out, field::TYPE, &self.ethertype.0.to_be_bytes());
        Ok(())
    }
}

impl fmt::Display for Repr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vlan {}  priority {}  {}", self.vlan, self.priority, self.ethertype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let bytes = [0xb0, 0x64, 0x86, 0xdd];
        let repr = Repr { priority: 5, drop_eligible: true, vlan: 100, ethertype: EtherType::IPV6 };
        assert_eq!(Repr::parse(Packet::new(&bytes).unwrap()), repr);
        let mut out = [0xa5; LEN];
        repr.emit(&mut out).unwrap();
        assert_eq!(out, bytes);
        assert_eq!(repr.to_string(), "vlan 100  priority 5  IPv6");
        assert_eq!(Packet::new(&bytes[..3]).unwrap_err(), Error::Truncated { need: 4, have: 3 });
    }
}
