//! ICMP and ICMPv6 echo over ping sockets (net/ipv4/ping.c): no program and, where the sysctl allows, no privilege.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recvfrom, sendto, socket_with,
};

/// Echo request types of ICMP and ICMPv6.
const ECHO: u8 = 8;
const ECHO_V6: u8 = 128;

/// Sends one echo to each target and gives those that answer within `patience`.
pub(crate) fn echo(targets: &[IpAddr], patience: Duration) -> io::Result<BTreeSet<IpAddr>> {
    let mut answered = BTreeSet::new();
    for v4 in [true, false] {
        let of_family: BTreeSet<IpAddr> = targets.iter().copied().filter(|ip| ip.is_ipv4() == v4).collect();
        if !of_family.is_empty() {
            answered.extend(echo_family(&of_family, v4, patience)?);
        }
    }
    Ok(answered)
}

fn echo_family(targets: &BTreeSet<IpAddr>, v4: bool, patience: Duration) -> io::Result<BTreeSet<IpAddr>> {
    let socket = open(v4)?;
    for (n, target) in targets.iter().enumerate() {
        let kind = if v4 { ECHO } else { ECHO_V6 };
        let [high, low] = (n as u16).to_be_bytes();
        // Checksum and identifier are the kernel's to fill in.
        let packet = [kind, 0, 0, 0, 0, 0, high, low, b't', b'w', b'i', b'l', b'l'];
        // A target without a route has its answer: none.
        let _ = sendto(&socket, &packet, SendFlags::empty(), &SocketAddr::new(*target, 0));
    }
    let end = Instant::now() + patience;
    let mut answered = BTreeSet::new();
    while answered.len() < targets.len() {
        let left = end.saturating_duration_since(Instant::now());
        let limit = Timespec { tv_sec: left.as_secs() as _, tv_nsec: left.subsec_nanos().into() };
        if left.is_zero() || poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&limit))? == 0 {
            break;
        }
        let mut buf = [0u8; 256];
        if let Ok((_, _, Some(from))) = recvfrom(&socket, &mut buf[..], RecvFlags::DONTWAIT)
            && let Ok(from) = SocketAddr::try_from(from)
            && targets.contains(&from.ip())
        {
            answered.insert(from.ip());
        }
    }
    Ok(answered)
}

fn open(v4: bool) -> io::Result<OwnedFd> {
    let (family, protocol) =
        if v4 { (AddressFamily::INET, ipproto::ICMP) } else { (AddressFamily::INET6, ipproto::ICMPV6) };
    Ok(socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(protocol))?)
}
