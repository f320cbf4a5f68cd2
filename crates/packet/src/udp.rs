//! UDP (RFC 768).

use std::fmt;
use std::net::IpAddr;

use crate::{Error, bytes, checksum, ipv4};

/// Where things stand.
mod field {
    pub(super) const SRC_PORT: usize = 0;
    pub(super) const DST_PORT: usize = 2;
    pub(super) const LEN: usize = 4;
    pub(super) const CHECKSUM: usize = 6;
}

/// Bytes of the header.
pub const LEN: usize = 8;

/// A datagram with a whole header.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// Refused: fewer than [`LEN`] bytes, a length field below that. A payload may be cut off.
    pub fn new(datagram: &'a [u8]) -> Result<Self, Error> {
        bytes::need(datagram, LEN)?;
        let len = usize::from(bytes::be16(datagram, field::LEN));
        if len < LEN { Err(Error::BadLength { found: len, least: LEN }) } else { Ok(Self(datagram)) }
    }

    fn end(&self) -> usize {
        usize::from(bytes::be16(self.0, field::LEN)).min(self.0.len())
    }

    /// What follows the header, as far as the length field says and bytes are there.
    pub fn payload(&self) -> &'a [u8] {
        &self.0[LEN..self.end()]
    }

    /// Compares the checksum with the whole datagram between these two. Zero over IPv4 means that there is none, and is right;
    /// VXLAN uses zero over IPv6 too (RFC 7348 section 5, RFC 6935).
    pub fn verify(&self, src: IpAddr, dst: IpAddr) -> Result<(), Error> {
        let whole = &self.0[..self.end()];
        if bytes::be16(whole, field::CHECKSUM) == 0 {
            return Ok(());
        }
        ipv4::verify(whole, field::CHECKSUM, checksum::Sum::default().pseudo(src, dst, 17, whole.len()))
    }
}

/// The header's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repr {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Header and payload in bytes.
    pub len: u16,
}

impl Repr {
    /// Reads the header.
    pub fn parse(packet: Packet<'_>) -> Self {
        Self {
            src_port: bytes::be16(packet.0, field::SRC_PORT),
            dst_port: bytes::be16(packet.0, field::DST_PORT),
            len: bytes::be16(packet.0, field::LEN),
        }
    }

    /// Writes the header to the start of `out`, where the payload already stands. `Some((src, dst))`: with the checksum over
    /// both; `None`: without one.
    pub fn emit(&self, ends: Option<(IpAddr, IpAddr)>, out: &mut [u8]) -> Result<(), Error> {
        bytes::need(out, LEN)?;
        if usize::from(self.len) < LEN {
            return Err(Error::BadLength { found: self.len.into(), least: LEN });
        }
        bytes::put(out, field::SRC_PORT, &self.src_port.to_be_bytes());
        bytes::put(out, field::DST_PORT, &self.dst_port.to_be_bytes());
        bytes::put(out, field::LEN, &self.len.to_be_bytes());
        bytes::put(out, field::CHECKSUM, &[0, 0]);
        if let Some((src, dst)) = ends {
            bytes::need(out, self.len.into())?;
            let whole = &out[..self.len.into()];
            let sum = checksum::Sum::default().pseudo(src, dst, 17, whole.len()).with(whole).finish();
            // Zero would mean "none": its other form is sent (RFC 768).
            bytes::put(out, field::CHECKSUM, &(if sum == 0 { 0xffff } else { sum }).to_be_bytes());
        }
        Ok(())
    }
}

impl fmt::Display for Repr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {} > {}  length {}", self.src_port, self.dst_port, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let repr = Repr { src_port: 40000, dst_port: 8472, len: 10 };
        let ends = (IpAddr::from([10, 168, 0, 2]), IpAddr::from([10, 168, 0, 3]));
        let mut out = [0xa5; 10];
        repr.emit(None, &mut out).unwrap();
        assert_eq!(out, [0x9c, 0x40, 0x21, 0x18, 0, 10, 0, 0, 0xa5, 0xa5]);
        repr.emit(Some(ends), &mut out).unwrap();
        let packet = Packet::new(&out).unwrap();
        packet.verify(ends.0, ends.1).unwrap();
        assert_eq!(packet.payload(), [0xa5, 0xa5]);
        assert_eq!(Repr::parse(packet), repr);
        assert_eq!(repr.to_string(), "port 40000 > 8472  length 10");
        out[9] ^= 1;
        assert!(matches!(Packet::new(&out).unwrap().verify(ends.0, ends.1), Err(Error::BadChecksum { .. })));
        out[5] = 7;
        assert_eq!(Packet::new(&out).unwrap_err(), Error::BadLength { found: 7, least: 8 });
    }
}
