//! The facts of addressing, made once at the edge: a value of these types is already checked.
//!
//! Every type parses from and prints as the text that `ip` and flannel use, and serialises as that text.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

/// Why a text or number is not the fact that it was taken for. Names the value and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{:?} is not {allowed}", cut(value))]
pub struct BadValue {
    /// The offending text, as it came.
    pub value: String,
    /// What would have been right, as a noun phrase.
    pub allowed: &'static str,
}

impl BadValue {
    /// A refusal of `value`; `allowed` is a noun phrase.
    pub fn new(value: impl fmt::Display, allowed: &'static str) -> Self {
        Self { value: value.to_string(), allowed }
    }
}

/// The text, or the beginning of one that is longer than anybody reads.
pub(crate) fn cut(text: &str) -> String {
    const LONGEST: usize = 200;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], text.len()),
        None => text.to_owned(),
    }
}

/// Serialise and deserialise as the `Display` / `FromStr` text.
macro_rules! text_serde {
    ($($t:ty),+) => {$(
        impl Serialize for $t {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> { s.collect_str(self) }
        }
        impl<'de> Deserialize<'de> for $t {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { fmt::Display::fmt(self, f) }
        }
    )+};
}
text_serde!(Prefix, Inet, LinkName, MacAddr, NodeId);

/// Address bits of the family of `ip`: 32 or 128.
pub const fn family_bits(ip: &IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// True for an address that one host can have and others can send to.
pub fn is_host(ip: IpAddr) -> bool {
    let nobodys = match ip {
        IpAddr::V4(ip) => ip.is_broadcast(),
        // IPv4 in disguise (`::a.b.c.d`, `::ffff:a.b.c.d`), which no wire carries, and the discard-only 100::/64 (RFC 6666).
        IpAddr::V6(ip) => matches!(ip.segments(), [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0x100, 0, 0, 0, ..]),
    };
    !(nobodys || ip.is_unspecified() || ip.is_multicast() || ip.is_loopback())
}

/// The address as a number; IPv4 in the low 32 bits.
pub fn ip_to_bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(a) => u128::from(a.to_bits()),
        IpAddr::V6(a) => a.to_bits(),
    }
}

/// The address of the same family as `like` whose bits are `bits` (IPv4: the low 32).
pub fn ip_from_bits(like: &IpAddr, bits: u128) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from_bits(bits as u32)),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(bits)),
    }
}

/// A network: address and prefix length, host bits zero. Ordered by family, address, length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    addr: IpAddr,
    len: u8,
}

impl Prefix {
    /// The whole IPv4 space, `0.0.0.0/0`.
    pub const DEFAULT_V4: Prefix = Prefix { addr: IpAddr::V4(Ipv4Addr::UNSPECIFIED), len: 0 };
    /// The whole IPv6 space, `::/0`.
    pub const DEFAULT_V6: Prefix = Prefix { addr: IpAddr::V6(Ipv6Addr::UNSPECIFIED), len: 0 };

    /// The network of `addr` with `len` bits; host bits are cleared. Refused: a length beyond the family's.
    pub fn truncate(addr: IpAddr, len: u8) -> Result<Self, BadValue> {
        let bits = family_bits(&addr);
        if len > bits {
            return Err(BadValue::new(format_args!("{addr}/{len}"), "a prefix length of the address's family"));
        }
        Ok(Self { addr: ip_from_bits(&addr, ip_to_bits(addr) & mask(bits, len)), len })
    }

    /// The network, refused when host bits are set.
    pub fn strict(addr: IpAddr, len: u8) -> Result<Self, BadValue> {
        let p = Self::truncate(addr, len)?;
        if p.addr == addr {
            Ok(p)
        } else {
            Err(BadValue::new(format_args!("{addr}/{len}"), "a network without host bits"))
        }
    }

    /// The single address `addr`: /32 or /128.
    pub fn host(addr: IpAddr) -> Self {
        Self { addr, len: family_bits(&addr) }
    }

    /// The network address (first address).
    pub const fn addr(&self) -> IpAddr {
        self.addr
    }

    /// Prefix length in bits.
    #[expect(clippy::len_without_is_empty, reason = "a prefix length, not a count of elements")]
    pub const fn len(&self) -> u8 {
        self.len
    }

    /// Bits of the family: 32 or 128.
    pub const fn bits(&self) -> u8 {
        family_bits(&self.addr)
    }

    /// True for IPv4.
    pub const fn is_v4(&self) -> bool {
        self.addr.is_ipv4()
    }

    /// The last address: for IPv4 below /31 the broadcast address.
    pub fn last(&self) -> IpAddr {
        let host = !mask(self.bits(), self.len) & mask(self.bits(), self.bits());
        ip_from_bits(&self.addr, ip_to_bits(self.addr) | host)
    }

    /// True when `ip` lies in this network (same family).
    pub fn contains(&self, ip: IpAddr) -> bool {
        family_bits(&ip) == self.bits() && ip_to_bits(ip) & mask(self.bits(), self.len) == ip_to_bits(self.addr)
    }

    /// True when every address of `other` lies in this network.
    pub fn covers(&self, other: &Prefix) -> bool {
        self.len <= other.len && self.contains(other.addr)
    }

    /// True when the two share an address.
    pub fn overlaps(&self, other: &Prefix) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// The `n`-th address counted from the network address; `None` beyond the end.
    pub fn nth(&self, n: u128) -> Option<IpAddr> {
        let ip = ip_from_bits(&self.addr, ip_to_bits(self.addr).checked_add(n)?);
        (n <= ip_to_bits(self.last()) - ip_to_bits(self.addr)).then_some(ip)
    }

    /// The `n`-th subnet of length `len`; `None` beyond the end or when `len` is shorter than our own.
    pub fn subnet(&self, len: u8, n: u128) -> Option<Prefix> {
        if len < self.len || len > self.bits() {
            return None;
        }
        let step = u32::from(self.bits() - len);
        let offset = if step == 128 {
            if n == 0 { 0 } else { return None }
        } else {
            n.checked_shl(step).filter(|o| o >> step == n)?
        };
        Some(Prefix { addr: self.nth(offset)?, len })
    }

    /// The position of `sub` among the subnets of its length in this network; `None` when it lies outside.
    pub fn index_of(&self, sub: &Prefix) -> Option<u128> {
        if !self.covers(sub) {
            return None;
        }
        let offset = ip_to_bits(sub.addr) - ip_to_bits(self.addr);
        Some(offset.checked_shr(u32::from(self.bits() - sub.len)).unwrap_or(0))
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

impl FromStr for Prefix {
    type Err = BadValue;

    /// `ADDRESS/LEN`; host bits are refused.
    fn from_str(s: &str) -> Result<Self, BadValue> {
        let inet: Inet = s.parse().map_err(|_| BadValue::new(s, "a network like 10.244.0.0/16"))?;
        Prefix::strict(inet.addr, inet.len).map_err(|_| BadValue::new(s, "a network without host bits"))
    }
}

/// An address as an interface carries it: host bits kept. Ordered by family, address, length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Inet {
    /// The address itself.
    pub addr: IpAddr,
    len: u8,
}

impl Inet {
    /// Refused: a length beyond the family's.
    pub fn new(addr: IpAddr, len: u8) -> Result<Self, BadValue> {
        Prefix::truncate(addr, len).map(|_| Self { addr, len })
    }

    /// The address alone: /32 or /128.
    pub fn host(addr: IpAddr) -> Self {
        Self { addr, len: family_bits(&addr) }
    }

    /// Prefix length in bits.
    #[expect(clippy::len_without_is_empty, reason = "a prefix length, not a count of elements")]
    pub const fn len(&self) -> u8 {
        self.len
    }

    /// The network that the address lies in.
    pub fn network(&self) -> Prefix {
        Prefix {
            addr: ip_from_bits(&self.addr, ip_to_bits(self.addr) & mask(family_bits(&self.addr), self.len)),
            len: self.len,
        }
    }
}

impl fmt::Display for Inet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
    }
}

impl FromStr for Inet {
    type Err = BadValue;

    /// `ADDRESS/LEN`, decimal length without sign or leading zero.
    fn from_str(s: &str) -> Result<Self, BadValue> {
        let bad = || BadValue::new(s, "an address with its length like 10.244.1.1/24");
        let (addr, len) = s.split_once('/').ok_or_else(bad)?;
        if len.len() > 1 && len.starts_with('0') || !len.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        Self::new(addr.parse().map_err(|_| bad())?, len.parse().map_err(|_| bad())?).map_err(|_| bad())
    }
}

/// Network mask of `len` ones in a family of `bits` bits.
const fn mask(bits: u8, len: u8) -> u128 {
    let ones = if len == 0 { 0 } else { u128::MAX << (128 - len as u32) };
    ones >> (128 - bits as u32)
}

/// A network device's name: 1 to 15 bytes, no `/`, no white space, not `.` or `..` (Linux `dev_valid_name`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkName([u8; 15]);

impl LinkName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|&b| b == 0).unwrap_or(15);
        // Only checked UTF-8 text comes in.
        std::str::from_utf8(&self.0[..end]).unwrap_or("?")
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for LinkName {
    type Err = BadValue;

    fn from_str(s: &str) -> Result<Self, BadValue> {
        let bad = s.is_empty()
            || s.len() > 15
            || s == "."
            || s == ".."
            || s.bytes().any(|b| b == b'/' || b == b':' || b == 0 || b.is_ascii_whitespace());
        if bad {
            return Err(BadValue::new(s, "a device name of 1 to 15 bytes without '/', ':' or white space"));
        }
        let mut name = [0; 15];
        name[..s.len()].copy_from_slice(s.as_bytes());
        Ok(Self(name))
    }
}

/// An Ethernet address. Prints and parses as six two-digit lower-case hex bytes joined by `:`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// `ff:ff:ff:ff:ff:ff`.
    pub const BROADCAST: MacAddr = MacAddr([0xff; 6]);
    /// `00:00:00:00:00:00`, in a VXLAN's FDB the default entry.
    pub const ZERO: MacAddr = MacAddr([0; 6]);

    /// The address that these parts always give: the first 6 bytes of SHA-256 of them all, local, unicast.
    pub fn derived<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut digest = Sha256::new();
        parts.into_iter().for_each(|part| digest.update(part));
        let mut mac = [0; 6];
        mac.copy_from_slice(&digest.finalize()[..6]);
        mac[0] = (mac[0] | 0x02) & 0xfe;
        Self(mac)
    }

    /// True for a unicast address other than zero: what a device may carry.
    pub const fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0 && !matches!(self.0, [0, 0, 0, 0, 0, 0])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = BadValue;

    fn from_str(s: &str) -> Result<Self, BadValue> {
        let bad = || BadValue::new(s, "a MAC address like 5e:f8:4f:00:e3:37");
        let mut mac = [0; 6];
        let mut parts = s.split(':');
        for byte in &mut mac {
            let part =
                parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit())).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(mac)) }
    }
}

/// A node's identity: random 128 bits, 32 lower-case hex digits in text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub [u8; 16]);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl FromStr for NodeId {
    type Err = BadValue;

    fn from_str(s: &str) -> Result<Self, BadValue> {
        let bad = || BadValue::new(s, "a node identity of 32 lower-case hex digits");
        if s.len() != 32 || !s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(bad());
        }
        Ok(Self(u128::from_str_radix(s, 16).map_err(|_| bad())?.to_be_bytes()))
    }
}

/// A number with a range, parsed once.
macro_rules! ranged {
    ($(#[$doc:meta])* $name:ident($repr:ty), $min:expr, $max:expr, $allowed:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "i64", into = "i64")]
        pub struct $name($repr);

        impl $name {
            /// The plain number.
            pub const fn get(self) -> $repr { self.0 }
        }
        impl TryFrom<i64> for $name {
            type Error = BadValue;
            fn try_from(v: i64) -> Result<Self, BadValue> {
                if ($min..=$max).contains(&v) { Ok(Self(v as $repr)) } else { Err(BadValue::new(v, $allowed)) }
            }
        }
        impl From<$name> for i64 {
            fn from(v: $name) -> i64 { i64::from(v.0) }
        }
        impl FromStr for $name {
            type Err = BadValue;
            fn from_str(s: &str) -> Result<Self, BadValue> {
                s.parse::<i64>().ok().and_then(|v| Self::try_from(v).ok()).ok_or_else(|| BadValue::new(s, $allowed))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { fmt::Display::fmt(&self.0, f) }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { fmt::Display::fmt(&self.0, f) }
        }
    };
}

ranged!(
    /// VXLAN network identifier, 24 bits (RFC 7348 section 5).
    Vni(u32), 0, 0xff_ffff, "a VNI from 0 to 16777215"
);
ranged!(
    /// Largest IP packet a device sends, in bytes (IP header included). The floor is RFC 791's 68.
    Mtu(u32), 68, 65_535, "an MTU from 68 to 65535"
);
ranged!(
    /// A UDP or TCP port other than 0.
    Port(u16), 1, 65_535, "a port from 1 to 65535"
);
