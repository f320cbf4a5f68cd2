//! What rules look at and compare with, and the bytes that the kernel keeps for it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::net::{LinkName, Prefix, ip_from_bits};

/// A value's type: its length and how `nft` prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Type {
    /// IPv4 address, 4 bytes.
    Ipv4,
    /// IPv6 address, 16 bytes.
    Ipv6,
    /// Protocol number of an IP header, 1 byte.
    Proto,
    /// Port, 2 bytes.
    Port,
    /// A number of 4 bytes in the host's order: marks, states.
    Number,
    /// A device's name, 16 bytes.
    Name,
    /// So many bytes.
    Bytes(u8),
}

/// One value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Datum {
    /// An address.
    Ip(IpAddr),
    /// A byte: protocol, family, TCP flags.
    Byte(u8),
    /// A port.
    Port(u16),
    /// A number of 4 bytes.
    Number(u32),
    /// A device.
    Name(LinkName),
    /// Bytes of no known meaning.
    Bytes(Box<[u8]>),
}

/// Which header an offset counts from (NFT_PAYLOAD_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PayloadBase {
    /// Ethernet header.
    Link,
    /// IP header.
    Network,
    /// TCP or UDP header.
    Transport,
}

/// What of a packet is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Field {
    /// `iifname`.
    Iif,
    /// `oifname`.
    Oif,
    /// `meta iif` and `meta oif`: a device's number.
    IifIndex,
    /// See [`Field::IifIndex`].
    OifIndex,
    /// `meta protocol`: what an Ethernet frame says of its content.
    Protocol,
    /// `meta pkttype`: 0 is for this host, 1 broadcast, 2 multicast.
    PacketType,
    /// `meta nfproto`: 2 is IPv4, 10 IPv6.
    NfProto,
    /// `meta l4proto`.
    L4Proto,
    /// `meta mark`.
    Mark,
    /// `ct state`: 1 invalid, 2 established, 4 related, 8 new.
    CtState,
    /// `ct status`: 0x10 and 0x20 are source and destination that were translated.
    CtStatus,
    /// `fib daddr type`: what the routing tables say of the destination (RTN_*); 2 is this host.
    DstType,
    /// Anything else that `fib` tells, by its numbers.
    Fib {
        /// NFT_FIB_RESULT_*: 1 and 2 are the outgoing device's number and name, 3 the address's type.
        result: u8,
        /// NFTA_FIB_F_*: 1 and 2 are source and destination; 32 asks whether there is one.
        flags: u8,
    },
    /// `ip saddr`.
    SrcV4,
    /// `ip daddr`.
    DstV4,
    /// `ip6 saddr`.
    SrcV6,
    /// `ip6 daddr`.
    DstV6,
    /// `th sport`.
    SrcPort,
    /// `th dport`.
    DstPort,
    /// `tcp flags`.
    TcpFlags,
    /// `@th,OFFSET,LENGTH` (there in bits, here in bytes).
    Raw {
        /// Where the offset counts from.
        base: PayloadBase,
        /// Bytes from there.
        offset: u8,
        /// Bytes looked at.
        len: u8,
    },
}

/// A field, and the bits of it that count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// The field.
    pub field: Field,
    /// The bits that count; `None`: all.
    pub mask: Option<Datum>,
}

impl From<Field> for Load {
    fn from(field: Field) -> Self {
        Self { field, mask: None }
    }
}

impl Type {
    /// Its bytes.
    pub const fn len(self) -> usize {
        match self {
            Type::Proto => 1,
            Type::Port => 2,
            Type::Ipv4 | Type::Number => 4,
            Type::Ipv6 | Type::Name => 16,
            Type::Bytes(len) => len as usize,
        }
    }

    /// True for a type of no bytes.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The value that the kernel's bytes are.
    pub fn read(self, bytes: &[u8]) -> Option<Datum> {
        Some(match self {
            Type::Ipv4 => Datum::Ip(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
            Type::Ipv6 => Datum::Ip(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
            Type::Proto => Datum::Byte(<[u8; 1]>::try_from(bytes).ok()?[0]),
            Type::Port => Datum::Port(u16::from_be_bytes(bytes.try_into().ok()?)),
            Type::Number => Datum::Number(u32::from_ne_bytes(bytes.try_into().ok()?)),
            Type::Name => {
                let text = bytes.split(|b| *b == 0).next()?;
                let exact = bytes[text.len()..].iter().all(|b| *b == 0) && bytes.len() == 16;
                let name = std::str::from_utf8(text).ok().filter(|_| exact).and_then(|text| text.parse().ok());
                name.map_or_else(|| Datum::Bytes(bytes.into()), Datum::Name)
            }
            Type::Bytes(_) => Datum::Bytes(bytes.into()),
        })
    }
}

impl Datum {
    /// The kernel's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Datum::Ip(IpAddr::V4(ip)) => ip.octets().to_vec(),
            Datum::Ip(IpAddr::V6(ip)) => ip.octets().to_vec(),
            Datum::Byte(byte) => vec![*byte],
            Datum::Port(port) => port.to_be_bytes().to_vec(),
            Datum::Number(number) => number.to_ne_bytes().to_vec(),
            Datum::Name(name) => {
                let mut bytes = name.as_str().as_bytes().to_vec();
                bytes.resize(16, 0);
                bytes
            }
            Datum::Bytes(bytes) => bytes.to_vec(),
        }
    }

    /// The network mask of a network's family and length.
    pub fn mask_of(net: &Prefix) -> Datum {
        let ones = if net.len() == 0 { 0 } else { u128::MAX << (128 - u32::from(net.len())) };
        Datum::Ip(ip_from_bits(&net.addr(), ones >> (128 - u32::from(net.bits()))))
    }
}

impl Field {
    /// What its value is.
    pub const fn kind(self) -> Type {
        match self {
            Field::Iif | Field::Oif => Type::Name,
            Field::Fib { flags, .. } if flags & 32 != 0 => Type::Proto,
            Field::Fib { result: 2, .. } => Type::Name,
            Field::Fib { .. } => Type::Number,
            Field::NfProto | Field::L4Proto | Field::TcpFlags | Field::PacketType => Type::Proto,
            Field::Mark | Field::CtState | Field::CtStatus | Field::DstType => Type::Number,
            Field::IifIndex | Field::OifIndex => Type::Number,
            Field::SrcV4 | Field::DstV4 => Type::Ipv4,
            Field::SrcV6 | Field::DstV6 => Type::Ipv6,
            Field::SrcPort | Field::DstPort | Field::Protocol => Type::Port,
            Field::Raw { len, .. } => Type::Bytes(len),
        }
    }

    /// Where in the packet it stands, for what is read from there: header, offset and length in bytes.
    pub const fn payload(self) -> Option<(PayloadBase, u8, u8)> {
        Some(match self {
            // RFC 791, RFC 8200, RFC 768 and 9293.
            Field::SrcV4 => (PayloadBase::Network, 12, 4),
            Field::DstV4 => (PayloadBase::Network, 16, 4),
            Field::SrcV6 => (PayloadBase::Network, 8, 16),
            Field::DstV6 => (PayloadBase::Network, 24, 16),
            Field::SrcPort => (PayloadBase::Transport, 0, 2),
            Field::DstPort => (PayloadBase::Transport, 2, 2),
            Field::TcpFlags => (PayloadBase::Transport, 13, 1),
            Field::Raw { base, offset, len } => (base, offset, len),
            _ => return None,
        })
    }

    /// The field that stands there.
    pub fn from_payload(base: PayloadBase, offset: u8, len: u8) -> Field {
        const KNOWN: [Field; 7] =
            [Field::SrcV4, Field::DstV4, Field::SrcV6, Field::DstV6, Field::SrcPort, Field::DstPort, Field::TcpFlags];
        let there = KNOWN.into_iter().find(|field| field.payload() == Some((base, offset, len)));
        there.unwrap_or(Field::Raw { base, offset, len })
    }

    /// The address whose first bytes stand there: as `nft` looks at a network whose length is a number of bytes.
    pub fn address_begun(self, v4: bool) -> Option<Field> {
        let both = if v4 { [Field::SrcV4, Field::DstV4] } else { [Field::SrcV6, Field::DstV6] };
        let (base, offset, len) = self.payload()?;
        both.into_iter().find(|field| field.payload().is_some_and(|(b, o, l)| (b, o) == (base, offset) && len < l))
    }
}
