//! ICMP and ICMPv6 echo over ping sockets (net/ipv4/ping.c), which need no privilege where the sysctl allows them; else over raw ones.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recvfrom, sendto, socket_with,
};

use twill_packet::checksum;

/// Echo request and reply of ICMP and ICMPv6.
const ECHO: [u8; 2] = [8, 0];
const ECHO_V6: [u8; 2] = [128, 129];
/// What each request carries behind its header.
const MARK: &[u8; 5] = b"twill";

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
    let (socket, raw) = open(v4)?;
    let [request, reply] = if v4 { ECHO } else { ECHO_V6 };
    let [id_high, id_low] = (std::process::id() as u16).to_be_bytes();
    for (n, target) in targets.iter().enumerate() {
        let [high, low] = (n as u16).to_be_bytes();
        let mut packet = [request, 0, 0, 0, id_high, id_low, high, low, 0, 0, 0, 0, 0];
        packet[8..].copy_from_slice(MARK);
        // The checksum is the kernel's to fill in, but for raw IPv4.
        if raw && v4 {
            let sum = checksum::of(&packet);
            packet[2..4].copy_from_slice(&sum.to_be_bytes());
        }
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
        if let Ok((_, len, Some(from))) = recvfrom(&socket, &mut buf[..], RecvFlags::DONTWAIT)
            && let Ok(from) = SocketAddr::try_from(from)
            && targets.contains(&from.ip())
            && (!raw || is_reply(&buf[..len.min(buf.len())], v4, [reply, id_high, id_low]))
        {
            answered.insert(from.ip());
        }
    }
    Ok(answered)
}

/// A socket, and whether it is a raw one.
fn open(v4: bool) -> io::Result<(OwnedFd, bool)> {
    let (family, protocol) =
        if v4 { (AddressFamily::INET, ipproto::ICMP) } else { (AddressFamily::INET6, ipproto::ICMPV6) };
    let socket = |kind| socket_with(family, kind, SocketFlags::CLOEXEC, Some(protocol));
    match socket(SocketType::DGRAM) {
        Ok(ping) => Ok((ping, false)),
        // A fresh network namespace allows ping sockets to nobody, root included.
        Err(refused) => socket(SocketType::RAW).map(|raw| (raw, true)).map_err(|_| refused.into()),
    }
}

/// True for the reply to one of our requests; a raw socket hears everything, with the IPv4 header.
fn is_reply(packet: &[u8], v4: bool, [kind, id_high, id_low]: [u8; 3]) -> bool {
    let header = if v4 { packet.first().map_or(0, |first| usize::from(first & 0xf) * 4) } else { 0 };
    match packet.get(header..) {
        Some([k, 0, _, _, high, low, _, _, mark @ ..]) => (*k, *high, *low) == (kind, id_high, id_low) && mark == MARK,
        _ => false,
    }
}
