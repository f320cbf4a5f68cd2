//! Rules in few words.

use std::net::IpAddr;

use crate::net::{LinkName, Prefix};

use super::{Cmp, Datum, Expr, Field, Load, Rule};

/// IPPROTO_TCP.
pub const TCP: u8 = 6;

/// Which address of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The sender's.
    Source,
    /// The receiver's.
    Destination,
}

/// The field of an address.
pub const fn address(end: End, v4: bool) -> Field {
    match (end, v4) {
        (End::Source, true) => Field::SrcV4,
        (End::Source, false) => Field::SrcV6,
        (End::Destination, true) => Field::DstV4,
        (End::Destination, false) => Field::DstV6,
    }
}

/// `FIELD OP VALUE`.
pub fn compare(field: Field, op: Cmp, value: Datum) -> Expr {
    Expr::Match { load: field.into(), op, value }
}

/// `FIELD VALUE`.
pub fn is(field: Field, value: Datum) -> Expr {
    compare(field, Cmp::Eq, value)
}

/// `FIELD & MASK OP VALUE`.
pub fn masked(field: Field, mask: Datum, op: Cmp, value: Datum) -> Expr {
    Expr::Match { load: Load { field, mask: Some(mask) }, op, value }
}

/// The packet is of this family: what an address comparison in an `inet` table stands behind.
pub fn family(v4: bool) -> Expr {
    // NFPROTO_IPV4, NFPROTO_IPV6.
    is(Field::NfProto, Datum::Byte(if v4 { 2 } else { 10 }))
}

/// The address lies in the network, or (`inside` false) outside of it. The family is to be compared before.
pub fn within(end: End, net: &Prefix, inside: bool) -> Expr {
    let field = address(end, net.is_v4());
    let op = if inside { Cmp::Eq } else { Cmp::Ne };
    let mask = (net.len() < net.bits()).then(|| Datum::mask_of(net));
    Expr::Match { load: Load { field, mask }, op, value: Datum::Ip(net.addr()) }
}

/// `iifname DEVICE`.
pub fn from_device(device: LinkName) -> Expr {
    is(Field::Iif, Datum::Name(device))
}

/// `oifname DEVICE`.
pub fn to_device(device: LinkName) -> Expr {
    is(Field::Oif, Datum::Name(device))
}

/// `meta mark & BITS == BITS`.
pub fn marked(bits: u32) -> Expr {
    masked(Field::Mark, Datum::Number(bits), Cmp::Eq, Datum::Number(bits))
}

/// Every address of the family that groups are reached by.
pub fn multicast(v4: bool) -> Prefix {
    let first: IpAddr = if v4 { [224, 0, 0, 0].into() } else { [0xff00, 0, 0, 0, 0, 0, 0, 0].into() };
    Prefix::truncate(first, if v4 { 4 } else { 8 }).unwrap_or(Prefix::DEFAULT_V4)
}

impl Rule {
    /// A rule without a comment.
    pub fn new(exprs: impl IntoIterator<Item = Expr>) -> Self {
        Self { exprs: exprs.into_iter().collect(), comment: None, handle: None }
    }

    /// The rule with a comment.
    #[must_use]
    pub fn comment(mut self, text: &str) -> Self {
        self.comment = Some(text.into());
        self
    }
}
