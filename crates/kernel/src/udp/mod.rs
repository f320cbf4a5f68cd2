//! UDP in batches: many datagrams for each call, and many segments for each datagram (udp(7): UDP_SEGMENT, UDP_GRO).

#![allow(unsafe_code, reason = "sendmmsg and recvmmsg with control messages take pointers and have no safe wrapper")]

mod memory;

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

pub use memory::{Datagram, MemoryUdp};

/// Segments in one send (UDP_MAX_SEGMENTS of older kernels).
pub const MAX_SEGMENTS: usize = 64;
/// Bytes in one send over either family.
pub const MAX_BYTES: usize = 65_507;
/// Room that each received message has; [`Udp::recv`] takes buffers of a multiple.
pub const SLOT: usize = 65_536;
/// Messages that go into one call at most.
const BATCH: usize = 32;
/// Bytes asked for a socket's queues (the kernel doubles them), so that a burst finds room while the reader is not running: 64 TCP
/// streams that start at once overflow half of it.
const QUEUE: usize = 16 << 20;
/// How long a send may wait for room in the queue before it counts as failed.
const PATIENCE: Duration = Duration::from_millis(200);

/// Datagrams to one address.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing {
    /// Where to.
    pub to: SocketAddr,
    /// Where in the buffer the first byte stands.
    pub start: usize,
    /// Bytes of all payloads, side by side; at most [`MAX_BYTES`] and [`MAX_SEGMENTS`].
    pub len: usize,
    /// Bytes of each payload but the last, which may be shorter; at least `len` for a single one.
    pub segment: usize,
}

impl Outgoing {
    /// How many datagrams.
    pub fn count(&self) -> usize {
        self.len.div_ceil(self.segment.max(1)).max(1)
    }
}

/// Datagrams from one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incoming {
    /// Where from.
    pub from: SocketAddr,
    /// Where in the buffer the first byte stands.
    pub start: usize,
    /// Bytes of all payloads, side by side.
    pub len: usize,
    /// Bytes of each payload but the last.
    pub segment: usize,
    /// A payload that did not fit and lost its end.
    pub cut: bool,
}

/// A bound socket. Shared between the thread that sends and the one that receives.
pub trait Udp {
    /// Sends everything, in order; `failed` hears which of `batch` did not go (some of its segments may have) and why. One that is longer
    /// than its path takes (`EMSGSIZE`) ends it, so that nothing overtakes what is to be cut: it is the last that `failed` hears of, and
    /// what stands behind it was not sent. Gives the number of calls to the kernel.
    fn send(&self, buffer: &[u8], batch: &[Outgoing], failed: &mut dyn FnMut(usize, io::Error)) -> usize;
    /// As [`Udp::send`], of what the underlay may cut into fragments where its path takes less. Only one thread sends.
    fn send_cuttable(&self, buffer: &[u8], batch: &[Outgoing], failed: &mut dyn FnMut(usize, io::Error)) -> usize;
    /// Adds what is there to `out`, one message for each [`SLOT`] of the buffer at most; `WouldBlock` when there is nothing.
    fn recv(&self, buffer: &mut [u8], out: &mut Vec<Incoming>) -> io::Result<()>;
    /// The largest IP packet that the path to `to` is known to take.
    fn path_mtu(&self, to: IpAddr) -> Option<usize>;
    /// Whether many segments go into one send; falls when a device refuses.
    fn segments(&self) -> bool;
}

/// A socket of the kernel that lets an underlay fragment nothing but what is said to be cuttable: else what is too long fails with
/// `EMSGSIZE`.
#[derive(Debug)]
pub struct UdpSocket {
    fd: OwnedFd,
    segments: AtomicBool,
    merges: bool,
}

impl UdpSocket {
    /// Binds `local` in the calling thread's network namespace.
    pub fn bind(local: SocketAddr) -> io::Result<Self> {
        let family = if local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let fd = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        if local.is_ipv6() {
            sockopt::set_ipv6_v6only(&fd, true)?;
        }
        rustix::net::bind(&fd, &local)?;
        Self::adopt(fd)
    }

    /// Takes over a bound socket.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let Ok(local) = SocketAddr::try_from(rustix::net::getsockname(&fd)?) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an IP socket"));
        };
        set_cuttable(&fd, local.is_ipv4(), false)?;
        let merges = set(&fd, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok();
        // Asking for no segmentation succeeds exactly where the kernel knows the option.
        let segments = AtomicBool::new(set(&fd, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok());
        for (force, plain) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
            if set(&fd, libc::SOL_SOCKET, force, QUEUE as libc::c_int).is_err() {
                set(&fd, libc::SOL_SOCKET, plain, QUEUE as libc::c_int)?;
            }
        }
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Send, Some(PATIENCE))?;
        Ok(Self { fd, segments, merges })
    }

    /// The bound address.
    pub fn local(&self) -> io::Result<SocketAddr> {
        let local = rustix::net::getsockname(&self.fd)?.try_into();
        local.map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "not an IP socket"))
    }

    /// Whether many segments come out of one receive.
    pub const fn merges(&self) -> bool {
        self.merges
    }

    /// For comparison and for tests: one datagram for each message, both ways.
    pub fn without_offloads(mut self) -> io::Result<Self> {
        self.segments = AtomicBool::new(false);
        if self.merges {
            set(&self.fd, libc::SOL_UDP, libc::UDP_GRO, 0)?;
            self.merges = false;
        }
        Ok(self)
    }

    /// One call; how many went.
    fn send_some(&self, buffer: &[u8], batch: &[Outgoing]) -> io::Result<usize> {
        let mut room = Room::new();
        let count = room.fill(buffer, batch);
        // SAFETY: the first `count` headers point into `room` and `buffer`, both of which outlive the call; the kernel only reads.
        let sent = unsafe { libc::sendmmsg(self.fd.as_raw_fd(), room.headers.as_mut_ptr(), count as u32, 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
    }

    /// Sends one message segment by segment; `Err` with the first failure. A segment that is too long ends it.
    fn send_apart(&self, buffer: &[u8], message: &Outgoing) -> (usize, io::Result<()>) {
        let (mut calls, mut result, mut sent) = (0, Ok(()), 0);
        loop {
            let mut some = [*message; BATCH];
            let left = message.count() - sent;
            for (number, part) in some.iter_mut().enumerate().take(left) {
                let skip = (sent + number) * message.segment;
                let len = message.segment.min(message.len - skip);
                *part = Outgoing { start: message.start + skip, len, segment: len, ..*message };
            }
            let count = left.min(BATCH);
            let mut at = 0;
            while at < count {
                calls += 1;
                match self.send_some(buffer, &some[at..count]) {
                    Ok(gone) => at += gone,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) if is_too_long(&e) => return (calls, Err(e)),
                    Err(e) => {
                        at += 1;
                        if result.is_ok() {
                            result = Err(e);
                        }
                    }
                }
            }
            sent += count;
            if sent >= message.count() {
                return (calls, result);
            }
        }
    }
}

impl Udp for UdpSocket {
    fn send(&self, buffer: &[u8], batch: &[Outgoing], failed: &mut dyn FnMut(usize, io::Error)) -> usize {
        let (mut at, mut calls, mut too_long) = (0, 0, false);
        let mut failed = |at: usize, e: io::Error| {
            too_long |= is_too_long(&e);
            failed(at, e);
            too_long
        };
        while at < batch.len() {
            let single = batch[at].len <= batch[at].segment;
            if !single && !self.segments() {
                let (more, result) = self.send_apart(buffer, &batch[at]);
                calls += more;
                if result.is_err_and(|e| failed(at, e)) {
                    break;
                }
                at += 1;
                continue;
            }
            // Without segmentation a run ends where the next message of many segments stands.
            let run = batch[at..].iter().take_while(|m| self.segments() || m.len <= m.segment).count();
            calls += 1;
            match self.send_some(buffer, &batch[at..at + run]) {
                Ok(sent) => at += sent,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A device that cannot finish checksums says EIO for each; a path too narrow for one segment says EINVAL.
                Err(e) if !single && matches!(e.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)) => {
                    if e.raw_os_error() == Some(libc::EIO) {
                        self.segments.store(false, Ordering::Relaxed);
                    }
                    let (more, result) = self.send_apart(buffer, &batch[at]);
                    calls += more;
                    if result.is_err_and(|e| failed(at, e)) {
                        break;
                    }
                    at += 1;
                }
                Err(e) => {
                    if failed(at, e) {
                        break;
                    }
                    at += 1;
                }
            }
        }
        calls
    }

    fn send_cuttable(&self, buffer: &[u8], batch: &[Outgoing], failed: &mut dyn FnMut(usize, io::Error)) -> usize {
        let v4 = batch.iter().all(|message| message.to.is_ipv4());
        // Refused, both are without effect: what is too long fails as ever.
        let _ = set_cuttable(&self.fd, v4, true);
        let calls = self.send(buffer, batch, failed);
        let _ = set_cuttable(&self.fd, v4, false);
        calls
    }

    fn recv(&self, buffer: &mut [u8], out: &mut Vec<Incoming>) -> io::Result<()> {
        let mut room = Room::new();
        let count = room.fill_slots(buffer);
        // The C libraries disagree about this argument's sign.
        let flags = libc::MSG_DONTWAIT as _;
        let headers = room.headers.as_mut_ptr();
        // SAFETY: the first `count` headers point into `room` and into disjoint slots of `buffer`, which are borrowed exclusively.
        let got = unsafe { libc::recvmmsg(self.fd.as_raw_fd(), headers, count as u32, flags, std::ptr::null_mut()) };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        for index in 0..got as usize {
            let header = &room.headers[index];
            let Some(from) = address(&room.names[index]) else { continue };
            let len = header.msg_len as usize;
            let segment = gro_size(&header.msg_hdr).unwrap_or(len).max(1);
            let cut = header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
            out.push(Incoming { from, start: index * SLOT, len, segment, cut });
        }
        Ok(())
    }

    fn path_mtu(&self, to: IpAddr) -> Option<usize> {
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let probe = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
        rustix::net::connect(&probe, &SocketAddr::new(to, 9)).ok()?;
        let (level, option) =
            if to.is_ipv4() { (libc::IPPROTO_IP, libc::IP_MTU) } else { (libc::IPPROTO_IPV6, libc::IPV6_MTU) };
        let mut mtu: libc::c_int = 0;
        let mut len = size_of::<libc::c_int>() as libc::socklen_t;
        let value = std::ptr::from_mut(&mut mtu).cast();
        // SAFETY: value and len describe one live int, and the kernel writes no more than len bytes.
        let answer = unsafe { libc::getsockopt(probe.as_raw_fd(), level, option, value, &raw mut len) };
        (answer == 0).then(|| usize::try_from(mtu).ok()).flatten()
    }

    fn segments(&self) -> bool {
        self.segments.load(Ordering::Relaxed)
    }
}

impl From<UdpSocket> for OwnedFd {
    fn from(socket: UdpSocket) -> OwnedFd {
        socket.fd
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Datagrams that a socket's queue had no room for, since it was made (SO_MEMINFO: net/core/sock.c, `sk_get_meminfo`). What the kernel had
/// merged counts as one.
pub fn queue_drops(socket: impl AsFd) -> io::Result<u64> {
    let mut all = [0u32; libc::SK_MEMINFO_DROPS as usize + 1];
    let mut len = size_of_val(&all) as libc::socklen_t;
    let (fd, value) = (socket.as_fd().as_raw_fd(), all.as_mut_ptr().cast());
    // SAFETY: value and len describe one live array, and the kernel writes no more than len bytes.
    let answer = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_MEMINFO, value, &raw mut len) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(all[libc::SK_MEMINFO_DROPS as usize].into()) }
}

/// Whether the kernel may cut, and routers too over IPv4, what is longer than its path takes.
fn set_cuttable(fd: &OwnedFd, v4: bool, may: bool) -> io::Result<()> {
    let (level, option, [never, always]) = if v4 {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, [libc::IP_PMTUDISC_DO, libc::IP_PMTUDISC_DONT])
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, [libc::IPV6_PMTUDISC_DO, libc::IPV6_PMTUDISC_DONT])
    };
    set(fd, level, option, if may { always } else { never })
}

fn is_too_long(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EMSGSIZE)
}

fn set(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    let pointer = std::ptr::from_ref(&value).cast();
    // SAFETY: pointer and len describe one live int, which the kernel only reads.
    let answer = unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, pointer, len) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Room for one control message of an int, aligned as cmsghdr wants it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

// SAFETY: CMSG_SPACE only computes.
const CONTROL: usize = unsafe { libc::CMSG_SPACE(size_of::<libc::c_int>() as u32) } as usize;

/// What the headers of one sendmmsg or recvmmsg point to.
struct Room {
    headers: [libc::mmsghdr; BATCH],
    vectors: [libc::iovec; BATCH],
    names: [libc::sockaddr_storage; BATCH],
    controls: [Control; BATCH],
}

impl Room {
    fn new() -> Self {
        let room = MaybeUninit::<Self>::zeroed();
        // SAFETY: every field is plain numbers or pointers, for which all-zero is valid.
        unsafe { room.assume_init() }
    }

    /// Points the headers at the messages. The room must not move before the call.
    fn fill(&mut self, buffer: &[u8], batch: &[Outgoing]) -> usize {
        let count = batch.len().min(BATCH);
        for (index, message) in batch[..count].iter().enumerate() {
            let bytes = &buffer[message.start..message.start + message.len];
            self.vectors[index] = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            let name_len = put_address(&mut self.names[index], message.to);
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = std::ptr::from_mut(&mut self.names[index]).cast();
            header.msg_namelen = name_len;
            header.msg_iov = &raw mut self.vectors[index];
            header.msg_iovlen = 1;
            if message.len > message.segment {
                header.msg_control = std::ptr::from_mut(&mut self.controls[index]).cast();
                header.msg_controllen = CONTROL as _;
                let size = message.segment as u16;
                // SAFETY: msg_control is CONTROL zeroed and aligned bytes: one cmsghdr and its data fit, so CMSG_FIRSTHDR is not null.
                unsafe {
                    let control = libc::CMSG_FIRSTHDR(header);
                    (*control).cmsg_level = libc::SOL_UDP;
                    (*control).cmsg_type = libc::UDP_SEGMENT;
                    (*control).cmsg_len = libc::CMSG_LEN(size_of::<u16>() as u32) as _;
                    libc::CMSG_DATA(control).cast::<u16>().write_unaligned(size);
                }
            }
        }
        count
    }

    /// Points the headers at the slots of the buffer. The room must not move before the call.
    fn fill_slots(&mut self, buffer: &mut [u8]) -> usize {
        let slots = buffer.chunks_exact_mut(SLOT).take(BATCH);
        let mut count = 0;
        for (index, slot) in slots.enumerate() {
            self.vectors[index] = libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() };
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = std::ptr::from_mut(&mut self.names[index]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as _;
            header.msg_iov = &raw mut self.vectors[index];
            header.msg_iovlen = 1;
            header.msg_control = std::ptr::from_mut(&mut self.controls[index]).cast();
            header.msg_controllen = CONTROL as _;
            count = index + 1;
        }
        count
    }
}

/// The segment size that UDP_GRO reports, where several were merged.
fn gro_size(header: &libc::msghdr) -> Option<usize> {
    // SAFETY: the kernel has filled msg_control, which points to CONTROL live bytes, and set msg_controllen to what it used;
    // the CMSG macros stay within, and UDP_GRO's data is one int.
    unsafe {
        let control = libc::CMSG_FIRSTHDR(header);
        if control.is_null() || (*control).cmsg_level != libc::SOL_UDP || (*control).cmsg_type != libc::UDP_GRO {
            return None;
        }
        usize::try_from(libc::CMSG_DATA(control).cast::<libc::c_int>().read_unaligned()).ok()
    }
}

fn put_address(to: &mut libc::sockaddr_storage, address: SocketAddr) -> libc::socklen_t {
    let to = std::ptr::from_mut(to);
    match address {
        SocketAddr::V4(v4) => {
            let name = libc::sockaddr_in {
                sin_family: libc::AF_INET as _,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is larger than, and aligned for, every socket address.
            unsafe { to.cast::<libc::sockaddr_in>().write(name) };
            size_of::<libc::sockaddr_in>() as _
        }
        SocketAddr::V6(v6) => {
            let name = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as _,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: sockaddr_storage is larger than, and aligned for, every socket address.
            unsafe { to.cast::<libc::sockaddr_in6>().write(name) };
            size_of::<libc::sockaddr_in6>() as _
        }
    }
}

/// Reads an address that the kernel wrote.
fn address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let from = std::ptr::from_ref(name);
    match i32::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says sockaddr_in, which is smaller than sockaddr_storage and no more strictly aligned.
            let v4 = unsafe { &*from.cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddr::new(ip.into(), u16::from_be(v4.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says sockaddr_in6, which is smaller than sockaddr_storage and no more strictly aligned.
            let v6 = unsafe { &*from.cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Some(std::net::SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), v6.sin6_flowinfo, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}
