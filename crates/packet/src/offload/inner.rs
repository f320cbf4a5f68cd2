//! What must hold of an IP packet before it crosses the tunnel.

use std::net::IpAddr;

use crate::{bytes, ipv4};

/// Why a packet is refused; each is counted on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    /// Fewer bytes than a header.
    #[error("cut off")]
    Truncated,
    /// Neither version 4 nor 6.
    #[error("not IP")]
    NotIp,
    /// A length field that does not fit the bytes, or a header length below the least.
    #[error("wrong length")]
    Length,
    /// The header's checksum does not fit.
    #[error("wrong header checksum")]
    Checksum,
    /// No hops left: no sender may send this.
    #[error("TTL 0")]
    Ttl,
}

/// TCP or UDP whose ports can be read: not in a fragment, nor behind options or extension headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A checked IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inner {
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// IP protocol; of IPv6, the first next header.
    pub protocol: u8,
    /// Bytes of the IP header, options included; extension headers of IPv6 are not.
    pub header: usize,
    /// What can be merged, where that is possible at all.
    pub transport: Option<Transport>,
    /// IPv4 with "do not fragment", and every IPv6 packet: a router may not cut it.
    pub dont_fragment: bool,
}

impl Inner {
    /// Checks version, lengths (the bytes are exactly one packet), hops and, of IPv4, the header's checksum.
    pub fn check(packet: &[u8]) -> Result<Self, Bad> {
        match packet.first().map(|b| b >> 4) {
            Some(4) => Self::check_v4(packet),
            Some(6) => Self::check_v6(packet),
            Some(_) => Err(Bad::NotIp),
            None => Err(Bad::Truncated),
        }
    }

    fn check_v4(packet: &[u8]) -> Result<Self, Bad> {
        if packet.len() < ipv4::LEN {
            return Err(Bad::Truncated);
        }
        let header = usize::from(packet[0] & 0x0f) * 4;
        if header < ipv4::LEN || header > packet.len() || usize::from(bytes::be16(packet, 2)) != packet.len() {
            return Err(Bad::Length);
        }
        if ipv4::verify(&packet[..header], 10, crate::checksum::Sum::default()).is_err() {
            return Err(Bad::Checksum);
        }
        if packet[8] == 0 {
            return Err(Bad::Ttl);
        }
        let fragment = bytes::be16(packet, 6);
        let protocol = packet[9];
        let whole = fragment & 0x3fff == 0 && header == ipv4::LEN;
        Ok(Self {
            src: bytes::ip4(packet, 12).into(),
            dst: bytes::ip4(packet, 16).into(),
            protocol,
            header,
            transport: whole.then(|| transport(protocol, &packet[header..])).flatten(),
            dont_fragment: fragment & 0x4000 != 0,
        })
    }

    fn check_v6(packet: &[u8]) -> Result<Self, Bad> {
        const HEADER: usize = crate::ipv6::LEN;
        if packet.len() < HEADER {
            return Err(Bad::Truncated);
        }
        if usize::from(bytes::be16(packet, 4)) != packet.len() - HEADER {
            return Err(Bad::Length);
        }
        if packet[7] == 0 {
            return Err(Bad::Ttl);
        }
        let protocol = packet[6];
        Ok(Self {
            src: bytes::ip6(packet, 8).into(),
            dst: bytes::ip6(packet, 24).into(),
            protocol,
            header: HEADER,
            transport: transport(protocol, &packet[HEADER..]),
            dont_fragment: true,
        })
    }
}

fn transport(protocol: u8, rest: &[u8]) -> Option<Transport> {
    match protocol {
        6 if rest.len() >= 20 => {
            let header = usize::from(rest[12] >> 4) * 4;
            (header >= 20 && header <= rest.len()).then_some(Transport::Tcp)
        }
        17 if rest.len() >= 8 => (usize::from(bytes::be16(rest, 4)) == rest.len()).then_some(Transport::Udp),
        _ => None,
    }
}
