//! ARP for IPv4 over Ethernet (RFC 826): who has an address, and the answer.

use std::fmt;
use std::net::Ipv4Addr;

use crate::{Error, Mac, bytes};

/// Where things stand.
mod field {
    pub(super) const HARDWARE: usize = 0;
    pub(super) const PROTOCOL: usize = 2;
    pub(super) const HARDWARE_LEN: usize = 4;
    pub(super) const PROTOCOL_LEN: usize = 5;
    pub(super) const OPERATION: usize = 6;
    pub(super) const SENDER_MAC: usize = 8;
    pub(super) const SENDER_IP: usize = 14;
    pub(super) const TARGET_MAC: usize = 18;
    pub(super) const TARGET_IP: usize = 24;
}

/// Bytes of a message for IPv4 over Ethernet.
pub const LEN: usize = 28;

/// A message of the right length; what follows is padding.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a>(&'a [u8]);

impl<'a> Packet<'a> {
    /// Refused: fewer than [`LEN`] bytes.
    pub fn new(message: &'a [u8]) -> Result<Self, Error> {
        bytes::need(message, LEN).map(|()| Self(message))
    }
}

/// What is asked or said. Prints as its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation(pub u16);

impl Operation {
    /// Who has the target address?
    pub const REQUEST: Operation = Operation(1);
    /// The sender has it.
    pub const REPLY: Operation = Operation(2);
}

/// The message's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repr {
    /// Request or reply.
    pub operation: Operation,
    /// Hardware address of who speaks.
    pub sender_mac: Mac,
    /// Protocol address of who speaks.
    pub sender_ip: Ipv4Addr,
    /// Hardware address spoken to; zero in a request.
    pub target_mac: Mac,
    /// The address asked for, or spoken to.
    pub target_ip: Ipv4Addr,
}

impl Repr {
    /// Reads the message. Refused: another hardware or protocol than IPv4 over Ethernet.
    pub fn parse(packet: Packet<'_>) -> Result<Self, Error> {
        let b = packet.0;
        let fixed = |field, found: u32, want| {
            if found == want { Ok(()) } else { Err(Error::BadField { field, found, want }) }
        };
        fixed("hardware type", bytes::be16(b, field::HARDWARE).into(), 1)?;
        fixed("protocol type", bytes::be16(b, field::PROTOCOL).into(), 0x0800)?;
        fixed("hardware length", b[field::HARDWARE_LEN].into(), 6)?;
        fixed("protocol length", b[field::PROTOCOL_LEN].into(), 4)?;
        Ok(Self {
            operation: Operation(bytes::be16(b, field::OPERATION)),
            sender_mac: bytes::mac(b, field::SENDER_MAC),
            sender_ip: bytes::ip4(b, field::SENDER_IP),
            target_mac: bytes::mac(b, field::TARGET_MAC),
            target_ip: bytes::ip4(b, field::TARGET_IP),
        })
    }

    /// Writes the message to the start of `out`.
    pub fn emit(&self, out: &mut [u8]) -> Result<(), Error> {
        bytes::need(out, LEN)?;
        bytes::put(out, field::HARDWARE, &[0, 1]);
        bytes::put(out, field::PROTOCOL, &[8, 0]);
        bytes::put(out, field::HARDWARE_LEN, &[6]);
        bytes::put(out, field::PROTOCOL_LEN, &[4]);
        bytes::put(out, field::OPERATION, &self.operation.0.to_be_bytes());
        bytes::put(out, field::SENDER_MAC, &self.sender_mac.0);
        bytes::put(out, field::SENDER_IP, &self.sender_ip.octets());
        bytes::put(out, field::TARGET_MAC, &self.target_mac.0);
        bytes::put(out, field::TARGET_IP, &self.target_ip.octets());
        Ok(())
    }
}

impl fmt::Display for Repr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.operation {
            Operation::REQUEST => write!(f, "who has {}? tell {}", self.target_ip, self.sender_ip),
            Operation::REPLY => write!(f, "{} is at {}", self.sender_ip, self.sender_mac),
            Operation(n) => write!(f, "operation {n}  {} > {}", self.sender_ip, self.target_ip),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rustfmt::skip]
    const REQUEST: [u8; LEN] = [
        0, 1, 8, 0, 6, 4, 0, 1,
        2, 0, 0, 0, 0, 4, 172, 17, 0, 4,
        0, 0, 0, 0, 0, 0, 172, 17, 0, 3,
    ];

    #[test]
    fn golden() {
        let repr = Repr {
            operation: Operation::REQUEST,
            sender_mac: Mac([2, 0, 0, 0, 0, 4]),
            sender_ip: Ipv4Addr::new(172, 17, 0, 4),
            target_mac: Mac([0; 6]),
            target_ip: Ipv4Addr::new(172, 17, 0, 3),
        };
        assert_eq!(Repr::parse(Packet::new(&REQUEST).unwrap()).unwrap(), repr);
        let mut out = [0xa5; LEN];
        repr.emit(&mut out).unwrap();
        assert_eq!(out, REQUEST);
        assert_eq!(repr.to_string(), "who has 172.17.0.3? tell 172.17.0.4");
        let reply = Repr { operation: Operation::REPLY, ..repr };
        assert_eq!(reply.to_string(), "172.17.0.4 is at 02:00:00:00:00:04");
    }

    #[test]
    fn another_hardware_is_named() {
        let mut bytes = REQUEST;
        bytes[1] = 6;
        let error = Repr::parse(Packet::new(&bytes).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "hardware type is 0x6, not 0x1");
    }
}
