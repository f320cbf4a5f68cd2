//! Frames as they pass a device: an AF_PACKET socket (packet(7)) in the calling thread's namespace.

#![allow(unsafe_code, reason = "binding an AF_PACKET socket and joining promiscuous mode have no safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, RecvFlags, SocketType, recv};
use twill_core::net::LinkName;

/// Hardware type of a device that has no link layer (include/uapi/linux/if_arp.h).
const ARPHRD_NONE: u16 = 0xfffe;

/// Asks for the moment when the frame read last passed (socket(7): SIOCGSTAMPNS, as a `timespec` of the machine's own words).
const SIOCGSTAMPNS: libc::c_int = 0x8907;

/// Frames of one device, both directions.
#[derive(Debug)]
pub struct Capture {
    fd: OwnedFd,
    buf: Vec<u8>,
    frames: bool,
}

impl Capture {
    /// Opens the device `name` of the calling thread's namespace.
    pub fn on(name: LinkName) -> io::Result<Self> {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        Self::open(name_to_index(&socket, name.as_str())?)
    }

    /// Opens device number `index` of the calling thread's namespace.
    pub fn open(index: u32) -> io::Result<Self> {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: socket takes no pointer; the descriptor is checked before it is owned.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol)) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fd is a fresh, open descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sockaddr_ll is plain numbers, for which all-zero is valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the pointer and length describe the live `address`.
        if unsafe { libc::bind(fd.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut len = len;
        // SAFETY: the pointer and length describe the live `address`, which the kernel fills.
        let answer =
            unsafe { libc::getsockname(fd.as_raw_fd(), std::ptr::from_mut(&mut address).cast(), &raw mut len) };
        let frames = answer != 0 || address.sll_hatype != ARPHRD_NONE;
        let capture = Self { fd, buf: vec![0; 65_536], frames };
        // To be asked is what makes the kernel note it: there is none yet.
        let _ = capture.passed_at();
        Ok(capture)
    }

    /// When the frame read last passed the device, by the wall clock: comparable with other devices', however late each was read.
    pub fn passed_at(&self) -> Option<Duration> {
        let mut at = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes one timespec to the pointer, which is to a live one.
        let answer = unsafe { libc::ioctl(self.fd.as_raw_fd(), SIOCGSTAMPNS as _, std::ptr::from_mut(&mut at)) };
        let (seconds, nanoseconds) = (u64::try_from(at.tv_sec).ok()?, u32::try_from(at.tv_nsec).ok()?);
        (answer == 0).then(|| Duration::new(seconds, nanoseconds))
    }

    /// False for a device without frames, such as TUN: bare IP packets pass it.
    pub const fn has_frames(&self) -> bool {
        self.frames
    }

    /// The next frame; `None` when `timeout` has passed without one.
    pub fn next(&mut self, timeout: Duration) -> io::Result<Option<&[u8]>> {
        let limit = Timespec { tv_sec: timeout.as_secs() as _, tv_nsec: timeout.subsec_nanos().into() };
        if poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&limit))? == 0 {
            return Ok(None);
        }
        let (len, _) = recv(self.fd.as_fd(), self.buf.as_mut_slice(), RecvFlags::empty())?;
        Ok(Some(&self.buf[..len]))
    }
}
