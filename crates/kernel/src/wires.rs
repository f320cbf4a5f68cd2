//! Which device is at the other end of a veth pair, namespaces apart.
//!
//! A namespace knows others by small numbers of its own (`ip netns list-id`). A veth names its other end by ifindex and that number;
//! [`Wires::netns_id`] says which number an open namespace has.

use std::os::fd::{AsFd, AsRawFd};

use twill_core::net::LinkName;

use crate::KernelError;
use crate::netlink::decode::{self, ifla};
use crate::netlink::encode::rtm;
use crate::netlink::socket::Socket;
use crate::netlink::wire::{Writer, attr, text, u32_at};
use crate::netns::Netns;

const RTM_GETNSID: u16 = 90;
/// include/uapi/linux/net_namespace.h
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;

/// One end of a veth pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VethEnd {
    /// The device.
    pub link: LinkName,
    /// Its number in this namespace.
    pub index: u32,
    /// The number of the other end, in the namespace where that one is.
    pub peer_index: u32,
    /// This namespace's number for the namespace of the other end; `None`: the same namespace.
    pub peer_netns: Option<i32>,
}

/// How a bridge treats one of its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// BR_STATE_*.
    pub state: u8,
    /// It learns who is behind it.
    pub learning: bool,
    /// It gets frames for those whom nobody knows.
    pub flood: bool,
    /// It takes frames of those alone who were written down.
    pub locked: bool,
}

/// Asks in the namespace of the thread that opened it.
#[derive(Debug)]
pub struct Wires {
    socket: Socket,
}

impl Wires {
    /// Opens a socket.
    pub fn open() -> Result<Self, KernelError> {
        Socket::open(None, 0)
            .map(|socket| Self { socket })
            .map_err(|e| KernelError::new("open a routing netlink socket", e))
    }

    /// Every veth end of this namespace.
    pub fn veths(&mut self) -> Result<Vec<VethEnd>, KernelError> {
        let mut ends = Vec::new();
        let dumped = self.socket.dump(
            rtm::GETLINK,
            |w| w.put(&[0; 16]),
            |m| {
                if m.kind == rtm::NEWLINK {
                    ends.extend(veth(m.payload));
                }
            },
        );
        dumped.map(|_| ends).map_err(|e| KernelError::new("list devices", e))
    }

    /// What a bridge lets pass by a port; `None`: the device is no port of a bridge, or there is none.
    pub fn port(&mut self, port: LinkName) -> Result<Option<Port>, KernelError> {
        let mut state = None;
        let fill = |w: &mut Writer| {
            w.put(&[0; 16]);
            w.text(ifla::IFNAME, port.as_str());
        };
        let asked = self.socket.ask(rtm::GETLINK, fill, |m| state = m.payload.get(16..).and_then(brport));
        match asked {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            asked => asked.map(|()| state).map_err(|e| KernelError::new(&format!("look at {port}"), e)),
        }
    }

    /// This namespace's number for `of`; `None`: it has none yet.
    pub fn netns_id(&mut self, of: &Netns) -> Result<Option<i32>, KernelError> {
        let fd = of.as_fd().as_raw_fd() as u32;
        let mut id = None;
        let asked = self.socket.ask(
            RTM_GETNSID,
            |w| {
                // struct rtgenmsg: a family, padded.
                w.put(&[0; 4]);
                w.attr(NETNSA_FD, &fd.to_ne_bytes());
            },
            |m| id = m.payload.get(4..).and_then(|rest| u32_at(attr(rest, NETNSA_NSID)?, 0)),
        );
        asked.map_err(|e| KernelError::new("ask for the number of a network namespace", e))?;
        Ok(id.map(|id| id as i32).filter(|id| *id >= 0))
    }
}

fn brport(rest: &[u8]) -> Option<Port> {
    let info = attr(rest, ifla::LINKINFO)?;
    attr(info, ifla::INFO_SLAVE_KIND).and_then(text).filter(|kind| *kind == "bridge")?;
    let data = attr(info, ifla::INFO_SLAVE_DATA)?;
    let byte = |kind| attr(data, kind).and_then(|value| value.first().copied());
    Some(Port {
        state: byte(ifla::BRPORT_STATE)?,
        // A kernel that does not know a flag does as if it were not touched.
        learning: byte(ifla::BRPORT_LEARNING) != Some(0),
        flood: byte(ifla::BRPORT_UNICAST_FLOOD) != Some(0),
        locked: byte(ifla::BRPORT_LOCKED).is_some_and(|locked| locked != 0),
    })
}

fn veth(payload: &[u8]) -> Option<VethEnd> {
    let (index, link) = decode::link_name(payload)?;
    let rest = payload.get(16..)?;
    let info = attr(rest, ifla::LINKINFO)?;
    let peer_index = u32_at(attr(rest, ifla::LINK)?, 0)?;
    let peer_netns = attr(rest, ifla::LINK_NETNSID).and_then(|v| u32_at(v, 0)).map(|id| id as i32);
    (attr(info, ifla::INFO_KIND).and_then(text)? == "veth").then_some(VethEnd { link, index, peer_index, peer_netns })
}
