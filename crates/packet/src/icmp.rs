//! ICMP (RFC 792): echo, and the errors that a path gives back.

use std::fmt;

use crate::{Error, bytes, checksum, ipv4};

/// Where things stand.
mod field {
    pub(super) const TYPE: usize = 0;
    pub(super) const CODE: usize = 1;
    pub(super) const CHECKSUM: usize = 2;
    pub(super) const REST: usize = 4;
}

/// Bytes of the header.
pub const LEN: usize = 8;

/// A message with a whole header.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// Refused: fewer than [`LEN`] bytes.
    pub fn new(message: &'a [u8]) -> Result<Self, Error> {
        bytes::need(message, LEN).map(|()| Self(message))
    }

    /// Echo: its data. Error: the start of the packet that it is about.
    pub fn payload(&self) -> &'a [u8] {
        &self.0[LEN..]
    }

    /// Compares the checksum with header and payload; wrong as well when the payload is cut off.
    pub fn verify(&self) -> Result<(), Error> {
        ipv4::verify(self.0, field::CHECKSUM, checksum::Sum::default())
    }
}

/// The header's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repr {
    /// Type 8: answer this.
    EchoRequest {
        /// Who asks.
        ident: u16,
        /// Which of the questions.
        seq: u16,
    },
    /// Type 0: the answer.
    EchoReply {
        /// As in the request.
        ident: u16,
        /// As in the request.
        seq: u16,
    },
    /// Type 3: it went no further.
    Unreachable {
        /// 0 net, 1 host, 2 protocol, 3 port, 4 fragmentation needed, 13 prohibited, …
        code: u8,
        /// With code 4: the MTU of the link that it does not fit (RFC 1191).
        mtu: u16,
    },
    /// Type 11: out of hops (code 0) or reassembly took too long (code 1).
    TimeExceeded {
        /// Which of the two.
        code: u8,
    },
    /// Any other.
    Other {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// The last four bytes of the header.
        rest: [u8; 4],
    },
}

impl Repr {
    /// Reads the header.
    pub fn parse(packet: Packet<'_>) -> Self {
        let b = packet.0;
        let (first, second) = (bytes::be16(b, field::REST), bytes::be16(b, field::REST + 2));
        match (b[field::TYPE], b[field::CODE]) {
            (8, 0) => Repr::EchoRequest { ident: first, seq: second },
            (0, 0) => Repr::EchoReply { ident: first, seq: second },
            (3, code) if first == 0 => Repr::Unreachable { code, mtu: second },
            (11, code) if first == 0 && second == 0 => Repr::TimeExceeded { code },
            (kind, code) => Repr::Other { kind, code, rest: bytes::get(b, field::REST) },
        }
    }

    /// Writes the header to the start of `out`, whose remaining bytes are the payload, and the checksum over both.
    pub fn emit(&self, out: &mut [u8]) -> Result<(), Error> {
        bytes::need(out, LEN)?;
        let pair = |a: u16, b: u16| (u32::from(a) << 16 | u32::from(b)).to_be_bytes();
        let (kind, code, rest) = match *self {
            Repr::EchoRequest { ident, seq } => (8, 0, pair(ident, seq)),
            Repr::EchoReply { ident, seq } => (0, 0, pair(ident, seq)),
            Repr::Unreachable { code, mtu } => (3, code, pair(0, mtu)),
            Repr::TimeExceeded { code } => (11, code, [0; 4]),
            Repr::Other { kind, code, rest } => (kind, code, rest),
        };
        bytes::put(out, field::TYPE, &[kind, code, 0, 0]);
        bytes::put(out, field::REST, &rest);
        let sum = checksum::of(out);
        bytes::put(out, field::CHECKSUM, &sum.to_be_bytes());
        Ok(())
    }
}

impl fmt::Display for Repr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Repr::EchoRequest { ident, seq } => write!(f, "echo request  id {ident}  seq {seq}"),
            Repr::EchoReply { ident, seq } => write!(f, "echo reply  id {ident}  seq {seq}"),
            Repr::Unreachable { code, mtu } => match code {
                0 => f.write_str("network unreachable"),
                1 => f.write_str("host unreachable"),
                2 => f.write_str("protocol unreachable"),
                3 => f.write_str("port unreachable"),
                4 => write!(f, "fragmentation needed  mtu {mtu}"),
                9 | 10 | 13 => f.write_str("administratively prohibited"),
                _ => write!(f, "unreachable  code {code}"),
            },
            Repr::TimeExceeded { code: 0 } => f.write_str("time to live exceeded"),
            Repr::TimeExceeded { code } => write!(f, "time exceeded  code {code}"),
            Repr::Other { kind, code, .. } => write!(f, "type {kind}  code {code}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden() {
        let repr = Repr::EchoRequest { ident: 3, seq: 6 };
        let mut out = [0xa5; 12];
        repr.emit(&mut out).unwrap();
        assert_eq!(out, [8, 0, 0xac, 0xab, 0, 3, 0, 6, 0xa5, 0xa5, 0xa5, 0xa5]);
        let packet = Packet::new(&out).unwrap();
        packet.verify().unwrap();
        assert_eq!(Repr::parse(packet), repr);
        assert_eq!(repr.to_string(), "echo request  id 3  seq 6");
    }

    #[test]
    fn every_kind_comes_back() {
        for repr in [
            Repr::EchoReply { ident: 1, seq: 2 },
            Repr::Unreachable { code: 4, mtu: 1450 },
            Repr::TimeExceeded { code: 0 },
            Repr::Other { kind: 5, code: 1, rest: [10, 0, 0, 1] },
        ] {
            let mut out = [0xa5; LEN];
            repr.emit(&mut out).unwrap();
            assert_eq!(Repr::parse(Packet::new(&out).unwrap()), repr);
        }
        assert_eq!(Repr::Unreachable { code: 4, mtu: 1450 }.to_string(), "fragmentation needed  mtu 1450");
    }
}
