//! ICMPv6 (RFC 4443), and the part of Neighbour Discovery (RFC 4861) that takes ARP's place.

use std::fmt;
use std::net::Ipv6Addr;

use crate::{Error, Mac, bytes, checksum, ipv4};

/// Where things stand.
mod field {
    pub(super) const TYPE: usize = 0;
    pub(super) const CODE: usize = 1;
    pub(super) const CHECKSUM: usize = 2;
    pub(super) const REST: usize = 4;
    pub(super) const TARGET: usize = 8;
    pub(super) const OPTIONS: usize = 24;
}

/// Bytes of the shortest header.
pub const LEN: usize = 8;

/// A message with a whole header.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// Refused: fewer than [`LEN`] bytes.
    pub fn new(message: &'a [u8]) -> Result<Self, Error> {
        bytes::need(message, LEN).map(|()| Self(message))
    }

    /// What follows `repr`'s header.
    pub fn payload(&self, repr: &Repr) -> &'a [u8] {
        &self.0[repr.header_len().min(self.0.len())..]
    }

    /// Compares the checksum with the whole message between these two; wrong as well when it is cut off.
    pub fn verify(&self, src: Ipv6Addr, dst: Ipv6Addr) -> Result<(), Error> {
        let pseudo = checksum::Sum::default().pseudo(src.into(), dst.into(), 58, self.0.len());
        ipv4::verify(self.0, field::CHECKSUM, pseudo)
    }
}

/// The header's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repr {
    /// Type 128.
    EchoRequest {
        /// Who asks.
        ident: u16,
        /// Which of the questions.
        seq: u16,
    },
    /// Type 129.
    EchoReply {
        /// As in the request.
        ident: u16,
        /// As in the request.
        seq: u16,
    },
    /// Type 135: who has `target`?
    Solicitation {
        /// The address asked for.
        target: Ipv6Addr,
        /// Option 1: hardware address of who asks.
        source: Option<Mac>,
    },
    /// Type 136: `target` is at `mac`.
    Advertisement {
        /// 4 router, 2 solicited, 1 override.
        flags: u8,
        /// The address spoken of.
        target: Ipv6Addr,
        /// Option 2: its hardware address.
        mac: Option<Mac>,
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
    /// Reads the header. A solicitation or advertisement without its target is cut off; of its options, the first that stands
    /// directly behind the target is read.
    pub fn parse(packet: Packet<'_>) -> Result<Self, Error> {
        let b = packet.0;
        let (first, second) = (bytes::be16(b, field::REST), bytes::be16(b, field::REST + 2));
        Ok(match (b[field::TYPE], b[field::CODE]) {
            (128, 0) => Repr::EchoRequest { ident: first, seq: second },
            (129, 0) => Repr::EchoReply { ident: first, seq: second },
            (135, 0) => {
                bytes::need(b, field::OPTIONS)?;
                Repr::Solicitation { target: bytes::ip6(b, field::TARGET), source: link_address(b, 1) }
            }
            (136, 0) => {
                bytes::need(b, field::OPTIONS)?;
                Repr::Advertisement {
                    flags: b[field::REST] >> 5,
                    target: bytes::ip6(b, field::TARGET),
                    mac: link_address(b, 2),
                }
            }
            (kind, code) => Repr::Other { kind, code, rest: bytes::get(b, field::REST) },
        })
    }

    /// Bytes that [`Repr::emit`] writes.
    pub const fn header_len(&self) -> usize {
        match self {
            Repr::EchoRequest { .. } | Repr::EchoReply { .. } | Repr::Other { .. } => LEN,
            Repr::Solicitation { source: mac, .. } | Repr::Advertisement { mac, .. } => {
                if mac.is_some() {
                    field::OPTIONS + 8
                } else {
                    field::OPTIONS
                }
            }
        }
    }

    /// Writes the header to the start of `out`, whose remaining bytes are the payload, and the checksum over both.
    pub fn emit(&self, src: Ipv6Addr, dst: Ipv6Addr, out: &mut [u8]) -> Result<(), Error> {
        bytes::need(out, self.header_len())?;
        let pair = |a: u16, b: u16| (u32::from(a) << 16 | u32::from(b)).to_be_bytes();
        let (kind, code, rest) = match *self {
            Repr::EchoRequest { ident, seq } => (128, 0, pair(ident, seq)),
            Repr::EchoReply { ident, seq } => (129, 0, pair(ident, seq)),
            Repr::Solicitation { target, source } => {
                put_target(out, target, 1, source);
                (135, 0, [0; 4])
            }
            Repr::Advertisement { flags, target, mac } => {
                put_target(out, target, 2, mac);
                (136, 0, [flags << 5, 0, 0, 0])
            }
            Repr::Other { kind, code, rest } => (kind, code, rest),
        };
        bytes::put(out, field::TYPE, &[kind, code, 0, 0]);
        bytes::put(out, field::REST, &rest);
        let sum = checksum::Sum::default().pseudo(src.into(), dst.into(), 58, out.len()).with(out).finish();
        bytes::put(out, field::CHECKSUM, &sum.to_be_bytes());
        Ok(())
    }
}

/// The link-layer address in option `kind`, when that option stands first.
fn link_address(b: &[u8], kind: u8) -> Option<Mac> {
    let option = b.get(field::OPTIONS..field::OPTIONS + 8)?;
    (option[..2] == [kind, 1]).then(|| bytes::mac(option, 2))
}

fn put_target(out: &mut [u8], target: Ipv6Addr, kind: u8, mac: Option<Mac>) {
    bytes::put(out, field::TARGET, &target.octets());
    if let Some(mac) = mac {
        bytes::put(out, field::OPTIONS, &[kind, 1]);
        bytes::put(out, field::OPTIONS + 2, &mac.0);
    }
}

impl fmt::Display for Repr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Repr::EchoRequest { ident, seq } => write!(f, "echo request  id {ident}  seq {seq}"),
            Repr::EchoReply { ident, seq } => write!(f, "echo reply  id {ident}  seq {seq}"),
            Repr::Solicitation { target, source: Some(mac) } => write!(f, "who has {target}? tell {mac}"),
            Repr::Solicitation { target, source: None } => write!(f, "who has {target}?"),
            Repr::Advertisement { target, mac: Some(mac), .. } => write!(f, "{target} is at {mac}"),
            Repr::Advertisement { target, mac: None, .. } => write!(f, "{target} is here"),
            Repr::Other { kind: 1, code, .. } => write!(f, "unreachable  code {code}"),
            Repr::Other { kind: 2, rest, .. } => write!(f, "packet too big  mtu {}", u32::from_be_bytes(rest)),
            Repr::Other { kind: 3, .. } => f.write_str("hop limit exceeded"),
            Repr::Other { kind: 133, .. } => f.write_str("router solicitation"),
            Repr::Other { kind: 134, .. } => f.write_str("router advertisement"),
            Repr::Other { kind: 143, .. } => f.write_str("multicast listener report"),
            Repr::Other { kind, code, .. } => write!(f, "type {kind}  code {code}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_solicitation() {
        let (src, dst) = ("fd00::1".parse().unwrap(), "ff02::1:ff00:2".parse().unwrap());
        let repr = Repr::Solicitation { target: "fd00::2".parse().unwrap(), source: Some(Mac([2, 0, 0, 0, 0, 1])) };
        let mut out = [0xa5; 32];
        repr.emit(src, dst, &mut out).unwrap();
        assert_eq!(out[..8], [135, 0, out[2], out[3], 0, 0, 0, 0]);
        assert_eq!(out[24..], [1, 1, 2, 0, 0, 0, 0, 1]);
        let packet = Packet::new(&out).unwrap();
        packet.verify(src, dst).unwrap();
        assert_eq!(Repr::parse(packet).unwrap(), repr);
        assert_eq!(repr.to_string(), "who has fd00::2? tell 02:00:00:00:00:01");
        let cut = Packet::new(&out[..20]).unwrap();
        assert_eq!(Repr::parse(cut).unwrap_err(), Error::Truncated { need: 24, have: 20 });
    }

    #[test]
    fn every_kind_comes_back() {
        for repr in [
            Repr::EchoRequest { ident: 1, seq: 2 },
            Repr::EchoReply { ident: 1, seq: 2 },
            Repr::Advertisement { flags: 3, target: "fd00::2".parse().unwrap(), mac: Some(Mac([2; 6])) },
            Repr::Advertisement { flags: 3, target: "fd00::2".parse().unwrap(), mac: None },
            Repr::Other { kind: 2, code: 0, rest: [0, 0, 5, 0xdc] },
        ] {
            let mut out = vec![0xa5; repr.header_len()];
            repr.emit(Ipv6Addr::LOCALHOST, Ipv6Addr::LOCALHOST, &mut out).unwrap();
            assert_eq!(Repr::parse(Packet::new(&out).unwrap()).unwrap(), repr);
        }
    }
}
