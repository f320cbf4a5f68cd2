//! A packet that has to pass: what each field of a rule sees of it, wherever it is looked at.

use std::net::IpAddr;

use crate::firewall::datum::{Field, PayloadBase};
use crate::firewall::{Hook, build};
use crate::net::LinkName;

/// IPPROTO_UDP, IPPROTO_ICMP, IPPROTO_ICMPV6.
pub(super) const UDP: u8 = 17;
const ICMP: [u8; 2] = [1, 58];
/// When connection tracking begins, and when a tunnel's datagrams are left out of it (`policy`).
const CONNTRACK: i32 = -200;
const RAW: i32 = -300;
/// NF_CT_STATE_BIT: invalid, established, new, untracked.
const INVALID: u32 = 1;
const ESTABLISHED: u32 = 2;
const NEW: u32 = 8;
const UNTRACKED: u32 = 64;
/// RTN_UNICAST, RTN_LOCAL.
pub(super) const UNICAST: u32 = 1;
pub(super) const LOCAL: u32 = 2;
/// SYN, ACK.
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Where a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    /// From a peer's container to one of ours.
    In,
    /// From a container of ours to a peer's.
    Out,
    /// A tunnel's datagram, to us.
    Heard,
    /// The same, from us.
    Sent,
    /// From a container of ours to beyond the network.
    Leaves,
    /// The answers.
    Returns,
}

impl Way {
    /// The hooks that it passes, in order.
    pub(super) const fn hooks(self) -> &'static [Hook] {
        match self {
            Way::In | Way::Out => &[Hook::Prerouting, Hook::Forward, Hook::Postrouting],
            Way::Heard => &[Hook::Prerouting, Hook::Input],
            Way::Sent => &[Hook::Output, Hook::Postrouting],
            // What is done to it elsewhere may well be meant.
            Way::Leaves | Way::Returns => &[Hook::Forward],
        }
    }
}

/// A packet that has to pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) way: Way,
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    /// The devices that it comes by and goes by.
    pub(super) devices: [Option<LinkName>; 2],
    /// Their numbers.
    pub(super) indexes: [Option<u32>; 2],
    pub(super) proto: u8,
    pub(super) ports: [u16; 2],
    /// The first one of its connection.
    pub(super) new: bool,
}

/// Where it is looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct At {
    pub(super) hook: Hook,
    pub(super) priority: i32,
    /// Somebody may have marked the packet before.
    pub(super) marked: bool,
}

/// What a field holds.
pub(super) enum Value {
    /// These bytes.
    Known(Vec<u8>),
    /// Something.
    Unknown,
    /// Nothing: no comparison holds.
    Absent,
}

impl Packet {
    pub(super) fn v4(&self) -> bool {
        self.src.is_ipv4()
    }

    /// TCP, UDP and ICMP of a family.
    pub(super) fn protocols(v4: bool) -> [u8; 3] {
        [build::TCP, UDP, ICMP[usize::from(!v4)]]
    }

    /// True for a device that is not yet known, or not any more.
    const fn without(hook: Hook, out: bool) -> bool {
        matches!((hook, out), (Hook::Prerouting | Hook::Input | Hook::Ingress, true) | (Hook::Output, false))
    }

    pub(super) fn state(&self, at: At) -> Option<u32> {
        let entrance = matches!(at.hook, Hook::Prerouting | Hook::Output);
        match self.way {
            Way::Heard | Way::Sent if entrance && at.priority == RAW => None,
            Way::Heard | Way::Sent if entrance && at.priority < RAW => Some(INVALID),
            Way::Heard | Way::Sent => Some(UNTRACKED),
            _ if entrance && at.priority < CONNTRACK => Some(INVALID),
            _ if self.new => Some(NEW),
            _ => Some(ESTABLISHED),
        }
    }

    /// What the routing tables say of an address.
    pub(super) fn kind(&self, source: bool) -> u32 {
        let local = matches!((self.way, source), (Way::Heard, false) | (Way::Sent, true));
        if local { LOCAL } else { UNICAST }
    }

    pub(super) fn value(&self, field: Field, at: At) -> Value {
        let name = |out| {
            let device = self.devices[usize::from(out)].filter(|_| !Self::without(at.hook, out));
            let mut bytes = device.map_or_else(Vec::new, |name| name.as_str().as_bytes().to_vec());
            bytes.resize(16, 0);
            Value::Known(bytes)
        };
        let number = |number: u32| Value::Known(number.to_ne_bytes().to_vec());
        let index = |out| match self.indexes[usize::from(out)] {
            _ if Self::without(at.hook, out) => number(0),
            index => index.map_or(Value::Unknown, number),
        };
        match field {
            Field::Iif => name(false),
            Field::Oif => name(true),
            Field::IifIndex => index(false),
            Field::OifIndex => index(true),
            Field::Protocol => Value::Known(if self.v4() { vec![0x08, 0x00] } else { vec![0x86, 0xdd] }),
            Field::PacketType => Value::Known(vec![0]),
            Field::NfProto => Value::Known(vec![if self.v4() { 2 } else { 10 }]),
            Field::L4Proto => Value::Known(vec![self.proto]),
            Field::Mark if !at.marked => number(0),
            Field::CtState => self.state(at).map_or(Value::Unknown, number),
            Field::CtStatus => match self.state(at) {
                Some(NEW | ESTABLISHED) => number(0),
                Some(_) => Value::Absent,
                None => Value::Unknown,
            },
            Field::DstType => number(self.kind(false)),
            // There is a way to every one of them, and back.
            Field::Fib { flags, .. } if flags & 32 != 0 => Value::Known(vec![1]),
            Field::Fib { result: 3, flags } => number(self.kind(flags & 1 != 0)),
            Field::Fib { .. } | Field::Mark => Value::Unknown,
            _ => self.read(field),
        }
    }

    /// What stands in its headers.
    fn read(&self, field: Field) -> Value {
        let Some((base, offset, len)) = field.payload() else { return Value::Unknown };
        let header = match base {
            PayloadBase::Link => Vec::new(),
            PayloadBase::Network => self.network(),
            PayloadBase::Transport => self.transport(),
        };
        let (from, to) = (usize::from(offset), usize::from(offset) + usize::from(len));
        header.get(from..to).map_or(Value::Unknown, |bytes| Value::Known(bytes.to_vec()))
    }

    /// Its IP header (RFC 791, RFC 8200): no options, no fragment.
    fn network(&self) -> Vec<u8> {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let begin = [0x45, 0, 0, 84, 0, 1, 0x40, 0, 63, self.proto, 0, 0];
                [&begin[..], &src.octets(), &dst.octets()].concat()
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let begin = [0x60, 0, 0, 0, 0, 64, self.proto, 63];
                [&begin[..], &src.octets(), &dst.octets()].concat()
            }
            _ => Vec::new(),
        }
    }

    /// The beginning of what is behind it (RFC 9293, RFC 768, RFC 792, RFC 4443).
    fn transport(&self) -> Vec<u8> {
        if ICMP.contains(&self.proto) {
            return vec![self.icmp(), 0];
        }
        let [from, to] = self.ports.map(u16::to_be_bytes);
        let ports = [from, to].concat();
        if self.proto != build::TCP {
            return ports;
        }
        let flags = [0x50, self.tcp_flags()];
        [&ports[..], &[0; 8], &flags].concat()
    }

    /// An echo request, or its reply.
    pub(super) fn icmp(&self) -> u8 {
        match (self.v4(), self.new) {
            (true, true) => 8,
            (true, false) => 0,
            (false, true) => 128,
            (false, false) => 129,
        }
    }

    pub(super) fn tcp_flags(&self) -> u8 {
        if self.new { SYN } else { ACK }
    }
}
