//! The VXLAN header (RFC 7348 section 5) with its Group Based Policy extension (draft-smith-vxlan-group-policy).
//!
//! ```text
//!  0 1 2 3 4 5 6 7
//! |G|R|R|R|I|R|R|R|  |R|D|R|R|A|R|R|R|  group policy id (16) |   VNI (24)   | reserved (8) |
//! ```

use std::fmt;

use crate::{Error, bytes};

/// Where things stand.
mod field {
    pub(super) const FLAGS: usize = 0;
    pub(super) const POLICY_FLAGS: usize = 1;
    pub(super) const GROUP: usize = 2;
    pub(super) const VNI: usize = 4;
}

/// Bytes of the header.
pub const LEN: usize = 8;
/// The port that IANA gave to VXLAN.
pub const PORT_IANA: u16 = 4789;
/// The port that the Linux kernel and flannel use unless told otherwise.
pub const PORT_LINUX: u16 = 8472;

const VNI_VALID: u8 = 0x08;
const GROUP_PRESENT: u8 = 0x80;
const DONT_LEARN: u8 = 0x40;
const APPLIED: u8 = 0x08;

/// A header and the frame behind it.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// Refused: fewer than [`LEN`] bytes.
    pub fn new(datagram: &'a [u8]) -> Result<Self, Error> {
        bytes::need(datagram, LEN).map(|()| Self(datagram))
    }

    /// The frame inside.
    pub fn payload(&self) -> &'a [u8] {
        &self.0[LEN..]
    }
}

/// The header's meaning. Reserved bits are sent as zero and not looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repr {
    /// Which virtual network, 24 bits.
    pub vni: u32,
    /// The Group Based Policy extension, when its bit is set.
    pub policy: Option<Policy>,
}

/// What the Group Based Policy extension adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// The sender's group.
    pub group: u16,
    /// The receiver must not learn from this frame.
    pub dont_learn: bool,
    /// The policy was already applied.
    pub applied: bool,
}

impl Repr {
    /// Reads the header. Refused: the I bit is not set, so that there is no VNI.
    pub fn parse(packet: Packet<'_>) -> Result<Self, Error> {
        let b = packet.0;
        let flags = b[field::FLAGS];
        if flags & VNI_VALID == 0 {
            return Err(Error::BadField { field: "flags", found: flags.into(), want: VNI_VALID.into() });
        }
        let policy = (flags & GROUP_PRESENT != 0).then(|| Policy {
            group: bytes::be16(b, field::GROUP),
            dont_learn: b[field::POLICY_FLAGS] & DONT_LEARN != 0,
            applied: b[field::POLICY_FLAGS] & APPLIED != 0,
        });
        Ok(Self { vni: bytes::be32(b, field::VNI) >> 8, policy })
    }

    /// Writes the header to the start of `out`; bits of the VNI beyond 24 are cut off.
    pub fn emit(&self, out: &mut [u8]) -> Result<(), Error> {
        bytes::need(out, LEN)?;
        out[..LEN].fill(0);
        out[field::FLAGS] = VNI_VALID;
        if let Some(policy) = self.policy {
            out[field::FLAGS] |= GROUP_PRESENT;
            out[field::POLICY_FLAGS] =
                if policy.dont_learn { DONT_LEARN } else { 0 } | if policy.applied { APPLIED } else { 0 };
            bytes::put(out, field::GROUP, &policy.group.to_be_bytes());
        }
        bytes::put(out, field::VNI, &(self.vni << 8).to_be_bytes());
        Ok(())
    }
}

impl fmt::Display for Repr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VNI {}", self.vni)?;
        if let Some(policy) = self.policy {
            write!(f, "  group {}", policy.group)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        for (repr, bytes, text) in [
            (Repr { vni: 1, policy: None }, [8, 0, 0, 0, 0, 0, 1, 0], "VNI 1"),
            (
                Repr { vni: 0xabcdef, policy: Some(Policy { group: 258, dont_learn: true, applied: true }) },
                [0x88, 0x48, 1, 2, 0xab, 0xcd, 0xef, 0],
                "VNI 11259375  group 258",
            ),
        ] {
            let mut out = [0xa5; LEN];
            repr.emit(&mut out).unwrap();
            assert_eq!(out, bytes);
            assert_eq!(Repr::parse(Packet::new(&bytes).unwrap()).unwrap(), repr);
            assert_eq!(repr.to_string(), text);
        }
    }

    #[test]
    fn without_the_i_bit_there_is_no_vni() {
        let error = Repr::parse(Packet::new(&[0; LEN]).unwrap()).unwrap_err();
        assert_eq!(error, Error::BadField { field: "flags", found: 0, want: 8 });
    }
}
