//! The filter tables of legacy iptables, which nftables does not show: read, never changed.
//!
//! Layout: include/uapi/linux/netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h, netfilter/x_tables.h.

#![allow(unsafe_code, reason = "two socket options that no safe wrapper knows")]

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::net::{AddressFamily, Protocol, SocketType, ipproto, socket};
use twill_core::firewall::beside::LegacyForward;
use twill_core::net::{Prefix, ip_to_bits};

/// SOL_IP and SOL_IPV6; IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES.
const LEVELS: (libc::c_int, libc::c_int) = (0, 41);
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
/// Bytes of struct ipt_getinfo and of struct ipt_get_entries before its entries.
const INFO: usize = 84;
const ENTRIES: usize = 40;
/// NF_INET_FORWARD.
const FORWARD: usize = 2;
/// A verdict of a standard target: -NF_DROP - 1 and -NF_ACCEPT - 1.
const DROP: i32 = -1;
const ACCEPT: i32 = -2;

/// The forward chains of both families, where their tables exist; none is brought to life by looking.
pub fn forward() -> Vec<LegacyForward> {
    [true, false].into_iter().filter_map(|v4| family(v4).ok().flatten()).collect()
}

fn family(v4: bool) -> io::Result<Option<LegacyForward>> {
    let names = if v4 { "ip_tables_names" } else { "ip6_tables_names" };
    let names = std::fs::read_to_string(format!("/proc/thread-self/net/{names}"))?;
    if !names.lines().any(|name| name == "filter") {
        return Ok(None);
    }
    let (domain, level) = if v4 { (AddressFamily::INET, LEVELS.0) } else { (AddressFamily::INET6, LEVELS.1) };
    let raw: Option<Protocol> = Some(ipproto::RAW);
    let socket = socket(domain, SocketType::RAW, raw)?;
    let mut info = vec![0; INFO];
    info[..6].copy_from_slice(b"filter");
    get(socket.as_fd(), level, GET_INFO, &mut info)?;
    let size = u32_at(&info, 80).unwrap_or(0) as usize;
    let mut entries = vec![0; ENTRIES + size];
    entries[..6].copy_from_slice(b"filter");
    entries[32..36].copy_from_slice(&(size as u32).to_ne_bytes());
    get(socket.as_fd(), level, GET_ENTRIES, &mut entries)?;
    let place = |at: usize| u32_at(&info, at + 4 * FORWARD).unwrap_or(u32::MAX) as usize;
    Ok(Some(parse(v4, &entries[ENTRIES..], place(36), place(56))))
}

/// The forward chain: its entries stand from `first` to `last`, which is its policy.
pub fn parse(v4: bool, entries: &[u8], first: usize, last: usize) -> LegacyForward {
    let mut found = LegacyForward { v4, drops: false, accepts: Vec::new() };
    let mut at = first;
    while let Some(entry) = entries.get(at..).and_then(|bytes| Entry::read(v4, bytes)) {
        if entry.plain {
            let any = |prefix: Prefix| prefix.len() == 0;
            found.drops |= entry.drops && any(entry.src) && any(entry.dst);
            found.accepts.extend(entry.accepts.then_some((entry.src, entry.dst)));
        }
        if at >= last || entry.len == 0 {
            break;
        }
        at += entry.len;
    }
    found
}

/// One rule, as far as it is looked at.
struct Entry {
    len: usize,
    src: Prefix,
    dst: Prefix,
    /// It compares addresses and nothing else.
    plain: bool,
    drops: bool,
    accepts: bool,
}

impl Entry {
    fn read(v4: bool, bytes: &[u8]) -> Option<Self> {
        // struct ipt_entry: ipt_ip of 84 bytes, nfcache, offsets, comefrom, counters. struct ip6t_entry: ip6t_ip6 of 136 bytes, …
        let (width, offsets, header) = if v4 { (4, 88, 112) } else { (16, 140, 168) };
        let address = |n: usize| bytes.get(n * width..(n + 1) * width);
        let prefix = |ip: usize, mask: usize| {
            let len = ip_to_bits(ip_of(address(mask)?)?).count_ones() as u8;
            Prefix::truncate(ip_of(address(ip)?)?, len).ok()
        };
        let (src, dst) = (prefix(0, 2)?, prefix(1, 3)?);
        // Device masks, protocol, flags: all zero when they are not compared.
        let rest = bytes.get(4 * width + 32..offsets - 4)?;
        let (target, len) = (usize::from(u16_at(bytes, offsets)?), usize::from(u16_at(bytes, offsets + 2)?));
        let plain = target == header && rest.iter().all(|byte| *byte == 0);
        let name = bytes.get(target + 2..target + 31)?;
        let name = name.split(|byte| *byte == 0).next()?;
        let verdict = if name.is_empty() { u32_at(bytes, target + 32).map(|verdict| verdict as i32) } else { None };
        let drops = verdict == Some(DROP) || name == b"REJECT";
        Some(Self { len, src, dst, plain, drops, accepts: verdict == Some(ACCEPT) })
    }
}

fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        _ => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// `getsockopt` into a buffer whose beginning is the request.
fn get(fd: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: the descriptor is open for the borrow's life; the pointer and length describe one live buffer that the kernel reads and
    // writes within its length only; `len` is a live socklen_t.
    let code = unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, buffer.as_mut_ptr().cast(), &raw mut len) };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
