//! TUN devices: whole IP packets, each behind a virtio-net header (Documentation/networking/tuntap.rst).

#![allow(unsafe_code, reason = "the ioctls of a TUN device take pointers and have no safe wrapper")]

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::netns::Netns;

/// Bytes of the virtio-net header that stands before each packet.
pub const HEADER: usize = 10;
/// Packets that may wait to be read: as many as for an Ethernet device. The kernel's own number overflows while many streams begin, and each
/// loses a whole window (docs/decisions/0014).
const QUEUE: libc::c_int = 1000;
/// drivers/net/tun.c, TUN_READQ_SIZE.
const KERNELS_QUEUE: libc::c_int = 500;

/// What a device hands over uncut and takes uncut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Packets with half-finished checksums, and a header that says so; the others need it.
    pub checksum: bool,
    /// TCP over IPv4.
    pub tcp4: bool,
    /// TCP over IPv6.
    pub tcp6: bool,
    /// UDP over either (Linux 6.2; the kernel knows only both).
    pub udp: bool,
}

impl Offloads {
    /// Everything that this project knows how to use.
    pub const ALL: Offloads = Offloads { checksum: true, tcp4: true, tcp6: true, udp: true };
    /// Plain packets.
    pub const NONE: Offloads = Offloads { checksum: false, tcp4: false, tcp6: false, udp: false };

    /// This, and with each step one kind less.
    fn ladder(self) -> [Offloads; 5] {
        let udp = Offloads { udp: false, ..self };
        let tcp6 = Offloads { tcp6: false, ..udp };
        let tcp4 = Offloads { tcp4: false, ..tcp6 };
        [self, udp, tcp6, tcp4, Offloads::NONE]
    }

    fn flags(self) -> libc::c_ulong {
        let kinds = [
            (self.checksum, libc::TUN_F_CSUM),
            (self.checksum && self.tcp4, libc::TUN_F_TSO4),
            (self.checksum && self.tcp6, libc::TUN_F_TSO6),
            (self.checksum && (self.tcp4 || self.tcp6), libc::TUN_F_TSO_ECN),
            (self.checksum && self.udp, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ];
        kinds.iter().filter(|(on, _)| *on).map(|(_, flag)| libc::c_ulong::from(*flag)).sum()
    }
}

/// The packets of a TUN device. Shared between the thread that reads and the one that writes.
pub trait Tun {
    /// The next packet that the kernel sends into the device; `WouldBlock` when there is none. Bytes of the packet.
    fn read(&self, header: &mut [u8; HEADER], packet: &mut [u8]) -> io::Result<usize>;
    /// Hands one packet to the kernel: `parts` are its virtio-net header and then its bytes, in any number of slices.
    fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()>;
    /// What super-packets it gives and takes.
    fn offloads(&self) -> Offloads;
}

/// A device of the kernel. It disappears with its last descriptor.
#[derive(Debug)]
pub struct TunDevice {
    fd: OwnedFd,
    header: bool,
    offloads: Offloads,
}

impl TunDevice {
    /// Makes the device `name`, or attaches to it where it exists and nobody holds it (else `ResourceBusy`), in the calling
    /// thread's network namespace. `name` may contain `%d`. Of what is `wanted`, takes what the kernel grants.
    pub fn open(name: &str, wanted: Offloads) -> io::Result<Self> {
        let fd = rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
        let mut request = request();
        if name.len() >= libc::IFNAMSIZ {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        match interface(&fd, libc::TUNSETIFF, &mut request) {
            Ok(()) => Self::prepare(fd, true, wanted),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
                interface(&fd, libc::TUNSETIFF, &mut request)?;
                Self::prepare(fd, false, Offloads::NONE)
            }
            Err(e) => Err(e),
        }
    }

    /// Takes over a descriptor that another process opened with [`TunDevice::open`].
    pub fn adopt(fd: OwnedFd, wanted: Offloads) -> io::Result<Self> {
        let mut request = request();
        interface(&fd, libc::TUNGETIFF, &mut request)?;
        // SAFETY: TUNGETIFF has filled the flags, and every bit pattern of the union's integer is valid.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TUN == 0 || flags & libc::IFF_NO_PI == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a TUN device of ours"));
        }
        rustix::io::ioctl_fionbio(&fd, true)?;
        let header = flags & libc::IFF_VNET_HDR != 0;
        Self::prepare(fd, header, if header { wanted } else { Offloads::NONE })
    }

    fn prepare(fd: OwnedFd, header: bool, wanted: Offloads) -> io::Result<Self> {
        if header {
            let size = HEADER as libc::c_int;
            // SAFETY: the kernel reads one int from the pointer, which is to a live one.
            check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, std::ptr::from_ref(&size)) })?;
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory.
        let grants = |o: &Offloads| unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, o.flags()) } == 0;
        let offloads = wanted.ladder().into_iter().find(grants).unwrap_or(Offloads::NONE);
        let device = Self { fd, header, offloads };
        // A shorter queue loses more under load, and is no reason to carry nothing.
        let _ = device.lengthen_queue();
        Ok(device)
    }

    /// For a device in the calling thread's namespace. What whoever runs the host has set stays.
    fn lengthen_queue(&self) -> io::Result<()> {
        let mut request = request();
        interface(&self.fd, libc::TUNGETIFF, &mut request)?;
        let any = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        interface(&any, libc::SIOCGIFTXQLEN, &mut request)?;
        // SAFETY: SIOCGIFTXQLEN has filled this integer.
        if unsafe { request.ifr_ifru.ifru_metric } == KERNELS_QUEUE {
            request.ifr_ifru.ifru_metric = QUEUE;
            interface(&any, libc::SIOCSIFTXQLEN, &mut request)?;
        }
        Ok(())
    }

    /// The device's name now.
    pub fn name(&self) -> io::Result<String> {
        let mut request = request();
        interface(&self.fd, libc::TUNGETIFF, &mut request)?;
        let name = request.ifr_name.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
        String::from_utf8(name).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }

    /// Whether it still has this name, in the calling thread's network namespace: whoever may rename it or move it elsewhere.
    pub fn is_here(&self, name: &str) -> io::Result<bool> {
        Ok(self.name()? == name
            && self.namespace()?.is_none_or(|there| Netns::current().is_ok_and(|here| here == there)))
    }

    /// The namespace that the device is in; `None` where the kernel does not tell (before Linux 5.8).
    fn namespace(&self) -> io::Result<Option<Netns>> {
        // SAFETY: TUNGETDEVNETNS takes no argument and touches no memory.
        let answer = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNGETDEVNETNS) };
        match check(answer) {
            // SAFETY: the kernel has just opened this descriptor for us, and nobody else knows it.
            Ok(()) => Ok(Some(Netns::from(unsafe { OwnedFd::from_raw_fd(answer) }))),
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) || error.raw_os_error() == Some(libc::EINVAL) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the device outlives its last descriptor.
    pub fn set_persistent(&self, on: bool) -> io::Result<()> {
        // SAFETY: TUNSETPERSIST takes its argument by value and touches no memory.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETPERSIST, libc::c_ulong::from(on)) })
    }
}

impl Tun for TunDevice {
    fn read(&self, header: &mut [u8; HEADER], packet: &mut [u8]) -> io::Result<usize> {
        if self.header {
            let got = rustix::io::readv(&self.fd, &mut [IoSliceMut::new(header), IoSliceMut::new(packet)])?;
            return got.checked_sub(HEADER).ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        *header = [0; HEADER];
        Ok(rustix::io::read(&self.fd, packet)?)
    }

    fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let parts = if self.header { parts } else { parts.get(1..).unwrap_or_default() };
        rustix::io::writev(&self.fd, parts)?;
        Ok(())
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }
}

impl From<TunDevice> for OwnedFd {
    fn from(device: TunDevice) -> OwnedFd {
        device.fd
    }
}

impl AsFd for TunDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Packets for a device of the calling thread's namespace that its queue had no room for, or nobody was there to read, since it was made
/// (proc_pid_net(5): dev). `None`: there is no such device.
pub fn queue_drops(name: &str) -> Option<u64> {
    /// Eight numbers of what it received stand first, then bytes, packets and errors of what it sent.
    const DROPPED: usize = 8 + 3;
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").ok()?;
    device_counters(&text, name)?.get(DROPPED).copied()
}

/// The numbers of a device in `/proc/PID/net/dev`: eight of what it received, eight of what it sent (proc_pid_net(5)).
pub fn device_counters(text: &str, name: &str) -> Option<Vec<u64>> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.split_whitespace().map_while(|word| word.parse().ok()).collect())
}

fn request() -> libc::ifreq {
    // SAFETY: ifreq is plain numbers and pointers that are only read where a request says so; all-zero is valid.
    unsafe { std::mem::zeroed() }
}

fn interface(fd: &OwnedFd, act: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: these requests read and write one ifreq, which the exclusive reference keeps alive.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), act, std::ptr::from_mut(request)) })
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The twin: a device without a kernel behind it.
#[derive(Debug, Default)]
pub struct MemoryTun {
    offloads: Offloads,
    state: Mutex<MemoryState>,
}

#[derive(Debug, Default)]
struct MemoryState {
    to_read: VecDeque<Vec<u8>>,
    written: VecDeque<Vec<u8>>,
    broken: Option<i32>,
}

impl MemoryTun {
    /// A device with these offloads.
    pub fn new(offloads: Offloads) -> Self {
        Self { offloads, ..Self::default() }
    }

    /// The kernel sends a packet into the device: virtio-net header and bytes.
    pub fn feed(&self, packet: &[u8]) {
        self.state().to_read.push_back(packet.to_vec());
    }

    /// What was written, oldest first: virtio-net header and bytes.
    pub fn take(&self) -> Option<Vec<u8>> {
        self.state().written.pop_front()
    }

    /// From now on each call fails with this error number; `None` mends it.
    pub fn fail(&self, errno: Option<i32>) {
        self.state().broken = errno;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, MemoryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tun for MemoryTun {
    fn read(&self, header: &mut [u8; HEADER], packet: &mut [u8]) -> io::Result<usize> {
        let mut state = self.state();
        if let Some(errno) = state.broken {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let next = state.to_read.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let (head, rest) = next.split_at_checked(HEADER).ok_or(io::ErrorKind::UnexpectedEof)?;
        header.copy_from_slice(head);
        let len = rest.len().min(packet.len());
        packet[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let mut state = self.state();
        match state.broken {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => {
                state.written.push_back(parts.iter().flat_map(|part| part.iter().copied()).collect());
                Ok(())
            }
        }
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }
}
