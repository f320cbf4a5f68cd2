//! Reading and writing numbers at a place whose bounds the caller has checked.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::{Error, Mac};

/// Refuses fewer than `need` bytes.
pub(crate) const fn need(bytes: &[u8], need: usize) -> Result<(), Error> {
    if bytes.len() < need { Err(Error::Truncated { need, have: bytes.len() }) } else { Ok(()) }
}

pub(crate) fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(get(bytes, at))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(get(bytes, at))
}

pub(crate) fn mac(bytes: &[u8], at: usize) -> Mac {
    Mac(get(bytes, at))
}

pub(crate) fn ip4(bytes: &[u8], at: usize) -> Ipv4Addr {
    Ipv4Addr::from(get::<4>(bytes, at))
}

pub(crate) fn ip6(bytes: &[u8], at: usize) -> Ipv6Addr {
    Ipv6Addr::from(get::<16>(bytes, at))
}

pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}
