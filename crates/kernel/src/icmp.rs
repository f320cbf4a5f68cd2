//! ICMP errors of our own: the kernel chooses source and route, as it does for the errors that it sends itself.

#![allow(unsafe_code, reason = "the filters of raw ICMP sockets have no safe wrapper")]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto};

/// Where ICMP messages go out.
pub trait Icmp {
    /// Sends a message, whose checksum the kernel fills in for IPv6 only, to a host or container. Never waits.
    fn send(&self, to: IpAddr, message: &[u8]) -> io::Result<()>;
}

/// Raw sockets, which need CAP_NET_RAW. They hear nothing.
#[derive(Debug)]
pub struct IcmpSockets {
    v4: OwnedFd,
    /// Absent where the host has no IPv6.
    v6: Option<OwnedFd>,
}

impl IcmpSockets {
    /// Opens them in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = |family, protocol| rustix::net::socket_with(family, SocketType::RAW, flags, Some(protocol));
        let v4 = socket(AddressFamily::INET, ipproto::ICMP)?;
        // include/uapi/linux/icmp.h: a set bit blocks that type.
        block(&v4, SOL_RAW, ICMP_FILTER, &[u32::MAX])?;
        let v6 = socket(AddressFamily::INET6, ipproto::ICMPV6).ok();
        if let Some(v6) = &v6 {
            block(v6, libc::IPPROTO_ICMPV6, ICMPV6_FILTER, &[u32::MAX; 8])?;
        }
        Ok(Self { v4, v6 })
    }
}

const SOL_RAW: libc::c_int = 255;
const ICMP_FILTER: libc::c_int = 1;
const ICMPV6_FILTER: libc::c_int = 1;

impl Icmp for IcmpSockets {
    fn send(&self, to: IpAddr, message: &[u8]) -> io::Result<()> {
        let fd = match to {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => self.v6.as_ref().ok_or(io::ErrorKind::Unsupported)?,
        };
        sendto(fd, message, SendFlags::DONTWAIT, &SocketAddr::new(to, 0))?;
        Ok(())
    }
}

fn block(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, mask: &[u32]) -> io::Result<()> {
    let len = size_of_val(mask) as libc::socklen_t;
    // SAFETY: the pointer and length describe one live slice, which the kernel only reads.
    let answer = unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, mask.as_ptr().cast(), len) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The twin: keeps what was sent.
#[derive(Debug, Default)]
pub struct MemoryIcmp(Mutex<Vec<(IpAddr, Vec<u8>)>>);

impl MemoryIcmp {
    /// What was sent, oldest first; it is then forgotten.
    pub fn take(&self) -> Vec<(IpAddr, Vec<u8>)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Icmp for MemoryIcmp {
    fn send(&self, to: IpAddr, message: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((to, message.to_vec()));
        Ok(())
    }
}
