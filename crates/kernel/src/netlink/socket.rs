//! A netlink socket: requests and their answers, dumps, notifications.
//!
//! Only the last message of a batch asks for an acknowledgement: errors always come back, so a batch of a thousand has one answer
//! when all is well, and the receive buffer cannot overflow with acknowledgements.

#![allow(unsafe_code, reason = "socket options that no safe wrapper knows")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, getsockname, recv, send, socket_with,
    sockopt,
};

use libc::{BPF_ABS, BPF_H, BPF_JEQ, BPF_JMP, BPF_LD, BPF_RET, BPF_W};

use super::wire::{self, DONE, ERROR, Message, Writer, flag};

/// SOL_NETLINK and its options (include/uapi/linux/netlink.h).
const SOL_NETLINK: libc::c_int = 270;
const NETLINK_CAP_ACK: libc::c_int = 10;
const NETLINK_EXT_ACK: libc::c_int = 11;
const NETLINK_GET_STRICT_CHK: libc::c_int = 12;
/// Asked for; the kernel grants what rmem_max allows where we lack the capability.
const BUFFER: usize = 8 << 20;
/// As [`BUFFER`], for what we send; wmem_max limits it.
const SEND_BUFFER: usize = 1 << 20;
/// Extended acknowledgement: the kernel's sentence.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// One instruction of the classic packet filter (include/uapi/linux/filter.h).
fn op(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// A bound socket in the namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    port: u32,
    seq: u32,
    /// The last datagram.
    buf: Vec<u8>,
}

/// The kernel's refusal of one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) seq: u32,
    pub(crate) errno: i32,
    pub(crate) text: String,
}

impl Socket {
    /// Opens and binds; without a protocol it is a routing socket. `groups` is the bit mask of notification groups (bit n-1 = group n).
    pub(crate) fn open(protocol: Option<Protocol>, groups: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
        if sockopt::set_socket_recv_buffer_size_force(&fd, BUFFER).is_err() {
            sockopt::set_socket_recv_buffer_size(&fd, BUFFER)?;
        }
        sockopt::set_socket_send_buffer_size(&fd, SEND_BUFFER)?;
        for option in [NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK] {
            set_option(fd.as_fd(), option)?;
        }
        bind(&fd, &SocketAddrNetlink::new(0, groups))?;
        let port = SocketAddrNetlink::try_from(getsockname(&fd)?).map_or(0, |own| own.pid());
        Ok(Self { fd, port, seq: 0, buf: Vec::with_capacity(64 << 10) })
    }

    /// Receive buffer that was really granted, in bytes of kernel memory.
    pub(crate) fn granted(&self) -> usize {
        sockopt::socket_recv_buffer_size(&self.fd).unwrap_or(212_992)
    }

    /// Our address among the namespace's netlink sockets.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Send buffer that was really granted, in bytes of kernel memory: a longer batch is refused whole.
    pub(crate) fn sendable(&self) -> usize {
        sockopt::socket_send_buffer_size(&self.fd).unwrap_or(212_992)
    }

    /// The last sequence number given out: no two requests of a socket share one, so that a late answer cannot be taken for another's.
    pub(crate) fn seq(&mut self) -> &mut u32 {
        &mut self.seq
    }

    /// The next sequence number.
    pub(crate) fn next_seq(&mut self) -> u32 {
        self.seq = self.seq.wrapping_add(1).max(1);
        self.seq
    }

    /// From now on the kernel keeps announcements of neighbours and routes to itself when they answer requests of the socket with
    /// address `port`: who made them knows them from the acknowledgement. A forwarding entry's announcement names nobody, and comes.
    ///
    /// The filter sees the bytes in memory order, and loads them as big-endian numbers (net/core/filter.c).
    pub(crate) fn ignore_echoes_of(&self, port: u32) -> io::Result<()> {
        let load = |code: u32, at: u32| op(BPF_LD | BPF_ABS | code, 0, 0, at);
        let kind = |kind: u16, then, otherwise| {
            op(BPF_JMP | BPF_JEQ, then, otherwise, u16::from_be_bytes(kind.to_ne_bytes()).into())
        };
        let mut program = [
            load(BPF_W, 12),
            op(BPF_JMP | BPF_JEQ, 0, 6, u32::from_be_bytes(port.to_ne_bytes())),
            load(BPF_H, 4),
            kind(libc::RTM_NEWROUTE, 3, 0),
            kind(libc::RTM_DELROUTE, 2, 0),
            kind(libc::RTM_NEWNEIGH, 1, 0),
            kind(libc::RTM_DELNEIGH, 0, 1),
            op(BPF_RET, 0, 0, 0),
            op(BPF_RET, 0, 0, u32::MAX),
        ];
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: the descriptor is open for the call; the pointer and length describe one live sock_fprog, whose filter points to as
        // many live instructions as its len says; the kernel copies them and keeps neither pointer.
        let code = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                std::ptr::from_ref(&program).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        };
        if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Sends a batch whose last message (number `last`) asks for an acknowledgement; gives the refused ones.
    pub(crate) fn batch(&mut self, writer: &Writer, last: u32) -> io::Result<Vec<Refusal>> {
        self.send(&writer.buf)?;
        let mut refused = Vec::new();
        loop {
            let mut done = false;
            self.receive(|message| {
                if message.kind == ERROR {
                    let refusal = refusal(&message);
                    done |= message.seq == last;
                    if refusal.errno != 0 {
                        refused.push(refusal);
                    }
                }
            })?;
            if done {
                return Ok(refused);
            }
        }
    }

    /// Sends a transaction whose message number `last` asks for an acknowledgement; gives the first refusal, after which the kernel has
    /// changed nothing. The kernel answers all of it before `send` returns (net/netlink/af_netlink.c `netlink_unicast_kernel`), and names
    /// the opening bracket when it is the commit that fails.
    pub(crate) fn transact(&mut self, writer: &Writer, last: u32) -> io::Result<Option<Refusal>> {
        self.send(&writer.buf)?;
        let (answers, lost) = self.collect()?;
        let answers = wire::messages(&answers).filter(|m| m.kind == ERROR).map(|m| refusal(&m));
        let (mut acknowledged, mut refused) = (false, None);
        for answer in answers {
            acknowledged |= answer.seq == last;
            if answer.errno != 0 && refused.is_none() {
                refused = Some(answer);
            }
        }
        if refused.is_none() && (lost || !acknowledged) {
            return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
        }
        Ok(refused)
    }

    /// Sends one request without a dump, gives its first answer to `on`.
    pub(crate) fn ask(
        &mut self,
        kind: u16,
        fill: impl FnOnce(&mut Writer),
        mut on: impl FnMut(Message<'_>),
    ) -> io::Result<()> {
        let seq = self.next_seq();
        let mut writer = Writer::default();
        writer.begin(kind, flag::REQUEST, seq);
        fill(&mut writer);
        writer.end();
        self.send(&writer.buf)?;
        let mut error = None;
        let mut answered = false;
        while !answered {
            self.receive(|message| {
                if message.seq != seq {
                    return;
                }
                answered = true;
                if message.kind == ERROR { error = Some(refusal(&message)) } else { on(message) }
            })?;
        }
        error.filter(|e| e.errno != 0).map_or(Ok(()), |e| Err(io::Error::from_raw_os_error(e.errno)))
    }

    /// Dumps: gives every message to `on`; `Ok(false)` when the kernel says that the dump was interrupted by a change.
    pub(crate) fn dump(
        &mut self,
        kind: u16,
        fill: impl FnOnce(&mut Writer),
        mut on: impl FnMut(Message<'_>),
    ) -> io::Result<bool> {
        let seq = self.next_seq();
        let mut writer = Writer::default();
        writer.begin(kind, flag::REQUEST | flag::DUMP, seq);
        fill(&mut writer);
        writer.end();
        self.send(&writer.buf)?;
        let (mut done, mut whole, mut error) = (false, true, None);
        while !done {
            self.receive(|message| {
                if message.seq != seq {
                    return;
                }
                whole &= message.flags & flag::DUMP_INTR == 0;
                match message.kind {
                    DONE => {
                        done = true;
                        error = wire::u32_at(message.payload, 0).map(|code| -(code as i32)).filter(|code| *code > 0);
                    }
                    ERROR => {
                        done = true;
                        error = Some(refusal(&message).errno).filter(|code| *code != 0);
                    }
                    _ => on(message),
                }
            })?;
        }
        error.map_or(Ok(whole), |code| Err(io::Error::from_raw_os_error(code)))
    }

    /// Notifications that are there now, and whether some were lost before (the kernel's ENOBUFS).
    pub(crate) fn collect(&mut self) -> io::Result<(Vec<u8>, bool)> {
        let (mut told, mut lost) = (Vec::new(), false);
        loop {
            self.buf.clear();
            match recv(&self.fd, spare_capacity(&mut self.buf), RecvFlags::DONTWAIT) {
                Ok(_) => told.extend_from_slice(&self.buf),
                Err(rustix::io::Errno::AGAIN) => return Ok((told, lost)),
                Err(rustix::io::Errno::NOBUFS) => lost = true,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            match send(&self.fd, bytes, SendFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// One datagram, waiting for it.
    fn receive(&mut self, on: impl FnMut(Message<'_>)) -> io::Result<()> {
        loop {
            self.buf.clear();
            match recv(&self.fd, spare_capacity(&mut self.buf), RecvFlags::empty()) {
                Ok(_) => {
                    wire::messages(&self.buf).for_each(on);
                    return Ok(());
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Errno and sentence of an acknowledgement (struct nlmsgerr, then attributes when the payload is capped).
fn refusal(message: &Message<'_>) -> Refusal {
    let errno = wire::u32_at(message.payload, 0).map_or(libc::EPROTO, |code| -(code as i32));
    // The request's header of 16 bytes follows the error; its payload too, unless it is capped.
    let repeated =
        if message.flags & flag::CAPPED != 0 { 16 } else { wire::u32_at(message.payload, 4).unwrap_or(16) as usize };
    let tlvs = message.payload.get(4 + repeated.next_multiple_of(4)..).filter(|_| message.flags & flag::ACK_TLVS != 0);
    let said = tlvs.and_then(|bytes| wire::attr(bytes, NLMSGERR_ATTR_MSG)).and_then(wire::text);
    let plain = || io::Error::from_raw_os_error(errno).to_string();
    let text = said.map_or_else(plain, |said| format!("{said} ({})", plain()));
    Refusal { seq: message.seq, errno, text }
}

fn set_option(fd: BorrowedFd<'_>, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open for the borrow's life; the pointer and length describe one live c_int, which is what each of
    // these options takes.
    let code = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            SOL_NETLINK,
            option,
            std::ptr::from_ref(&on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
