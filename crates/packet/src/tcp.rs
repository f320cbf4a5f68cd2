//! TCP (RFC 9293): the header.

use std::fmt;
use std::net::IpAddr;

use crate::{Error, bytes, checksum, ipv4};

/// Where things stand.
mod field {
    pub(super) const SRC_PORT: usize = 0;
    pub(super) const DST_PORT: usize = 2;
    pub(super) const SEQ: usize = 4;
    pub(super) const ACK: usize = 8;
    pub(super) const OFFSET_FLAGS: usize = 12;
    pub(super) const WINDOW: usize = 14;
    pub(super) const CHECKSUM: usize = 16;
    pub(super) const URGENT: usize = 18;
    pub(super) const OPTIONS: usize = 20;
}

/// Bytes of a header without options.
pub const LEN: usize = 20;

/// A segment whose header, options included, is whole.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// Refused: a header that is not whole, or says that it has less than 20 bytes.
    pub fn new(segment: &'a [u8]) -> Result<Self, Error> {
        bytes::need(segment, LEN)?;
        let view = Self(segment);
        if view.header_len() < LEN {
            return Err(Error::BadLength { found: view.header_len(), least: LEN });
        }
        bytes::need(segment, view.header_len()).map(|()| view)
    }

    /// Header length in bytes, options included.
    pub fn header_len(&self) -> usize {
        usize::from(self.0[field::OFFSET_FLAGS] >> 4) * 4
    }

    /// What follows the header.
    pub fn payload(&self) -> &'a [u8] {
        &self.0[self.header_len()..]
    }

    /// Compares the checksum with the whole segment between these two; wrong as well when it is cut off.
    pub fn verify(&self, src: IpAddr, dst: IpAddr) -> Result<(), Error> {
        ipv4::verify(self.0, field::CHECKSUM, checksum::Sum::default().pseudo(src, dst, 6, self.0.len()))
    }
}

/// The header's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repr<'a> {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Number of the first byte carried.
    pub seq: u32,
    /// Number of the next byte expected.
    pub ack: u32,
    /// The twelve bits after the header length; see [`Repr::flag_names`].
    pub flags: u16,
    /// Bytes that the sender will take, before scaling.
    pub window: u16,
    /// Urgent pointer.
    pub urgent: u16,
    /// Options with padding: a multiple of 4 bytes, at most 40.
    pub options: &'a [u8],
}

impl<'a> Repr<'a> {
    const FLAGS: [&'static str; 8] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];

    /// Reads the header.
    pub fn parse(packet: Packet<'a>) -> Self {
        let b = packet.0;
        Self {
            src_port: bytes::be16(b, field::SRC_PORT),
            dst_port: bytes::be16(b, field::DST_PORT),
            seq: bytes::be32(b, field::SEQ),
            ack: bytes::be32(b, field::ACK),
            flags: bytes::be16(b, field::OFFSET_FLAGS) & 0x0fff,
            window: bytes::be16(b, field::WINDOW),
            urgent: bytes::be16(b, field::URGENT),
            options: &b[field::OPTIONS..packet.header_len()],
        }
    }

    /// Names of the flags that are set, lowest bit first.
    pub fn flag_names(&self) -> impl Iterator<Item = &'static str> {
        let flags = self.flags;
        (0..8).filter(move |bit| flags >> bit & 1 == 1).map(|bit| Self::FLAGS[bit])
    }

    /// Bytes that [`Repr::emit`] writes.
    pub const fn header_len(&self) -> usize {
        LEN + self.options.len()
    }

    /// Writes the header to the start of `out`, whose remaining bytes are the payload, and the checksum over both.
    /// Refused: options that are no multiple of 4 or beyond 40 bytes.
    pub fn emit(&self, src: IpAddr, dst: IpAddr, out: &mut [u8]) -> Result<(), Error> {
        let len = self.header_len();
        if !len.is_multiple_of(4) || len > 60 {
            return Err(Error::BadLength { found: len, least: LEN });
        }
        bytes::need(out, len)?;
        bytes::put(out, field::SRC_PORT, &self.src_port.to_be_bytes());
        bytes::put(out, field::DST_PORT, &self.dst_port.to_be_bytes());
        bytes::put(out, field::SEQ, &self.seq.to_be_bytes());
        bytes::put(out, field::ACK, &self.ack.to_be_bytes());
        bytes::put(out, field::OFFSET_FLAGS, &((len as u16 / 4) << 12 | self.flags & 0x0fff).to_be_bytes());
        bytes::put(out, field::WINDOW, &self.window.to_be_bytes());
        bytes::put(out, field::CHECKSUM, &[0, 0]);
        bytes::put(out, field::URGENT, &self.urgent.to_be_bytes());
        bytes::put(out, field::OPTIONS, self.options);
        let sum = checksum::Sum::default().pseudo(src, dst, 6, out.len()).with(out).finish();
        bytes::put(out, field::CHECKSUM, &sum.to_be_bytes());
        Ok(())
    }
}

impl fmt::Display for Repr<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {} > {}  ", self.src_port, self.dst_port)?;
        for name in self.flag_names() {
            write!(f, "{name} ")?;
        }
        write!(f, " seq {}  ack {}  window {}", self.seq, self.ack, self.window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let repr = Repr {
            src_port: 43210,
            dst_port: 80,
            seq: 1,
            ack: 0,
            flags: 0x002,
            window: 64860,
            urgent: 0,
            options: &[2, 4, 5, 0x82],
        };
        let (src, dst) = (IpAddr::from([10, 1, 15, 2]), IpAddr::from([10, 1, 16, 3]));
        let mut out = [0xa5; 25];
        repr.emit(src, dst, &mut out).unwrap();
        assert_eq!(out[..14], [0xa8, 0xca, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2]);
        let packet = Packet::new(&out).unwrap();
        packet.verify(src, dst).unwrap();
        assert_eq!(Repr::parse(packet), repr);
        assert_eq!(packet.payload(), [0xa5]);
        assert_eq!(repr.to_string(), "port 43210 > 80  SYN  seq 1  ack 0  window 64860");
        out[12] = 0x40;
        assert_eq!(Packet::new(&out).unwrap_err(), Error::BadLength { found: 16, least: 20 });
        out[12] = 0x70;
        assert_eq!(Packet::new(&out[..24]).unwrap_err(), Error::Truncated { need: 28, have: 24 });
    }
}
