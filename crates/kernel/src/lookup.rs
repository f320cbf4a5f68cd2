//! What the kernel itself would decide: RTM_GETROUTE, as `ip route get` asks it.

use std::io;
use std::net::IpAddr;

use twill_core::host::Route;
use twill_core::net::LinkName;

use crate::KernelError;
use crate::netlink::decode::{self, rta};
use crate::netlink::encode::{family, octets, rtm};
use crate::netlink::names::Names;
use crate::netlink::socket::Socket;

/// RTM_F_LOOKUP_TABLE: say the real table; RTM_F_FIB_MATCH: give the matching route itself, not the lookup's result.
const RTM_F_LOOKUP_TABLE: u32 = 0x1000;
const RTM_F_FIB_MATCH: u32 = 0x2000;

/// The question: where does a packet to `dst` go?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Destination.
    pub dst: IpAddr,
    /// Source, where it is known.
    pub src: Option<IpAddr>,
    /// Device that it came in by; `None`: the host sends it itself.
    pub iif: Option<LinkName>,
    /// Device that it must leave by; `None`: any.
    pub oif: Option<LinkName>,
}

/// Asks routing questions in the namespace of the thread that opened it.
#[derive(Debug)]
pub struct Router {
    socket: Socket,
}

impl Router {
    /// Opens a socket.
    pub fn open() -> Result<Self, KernelError> {
        Socket::open(None, 0)
            .map(|socket| Self { socket })
            .map_err(|e| KernelError::new("open a routing netlink socket", e))
    }

    /// The route that the kernel's tables hold for the packet; `None`: there is none ("network is unreachable").
    pub fn matching(&mut self, question: &Question) -> Result<Option<Route>, KernelError> {
        let names = self.names().map_err(|e| KernelError::new("list devices", e))?;
        let iif = question.iif.and_then(|name| names.index(name));
        let oif = question.oif.and_then(|name| names.index(name));
        let bytes = octets(question.dst);
        let mut answer = None;
        let asked = self.socket.ask(
            rtm::GETROUTE,
            |w| {
                let src_len = question.src.map_or(0, |src| (octets(src).len() * 8) as u8);
                w.put(&[family(question.dst), (bytes.len() * 8) as u8, src_len, 0, 0, 0, 0, 0]);
                // IPv6 always says the real table, and refuses to be asked for it (net/ipv6/route.c, inet6_rtm_valid_getroute_req).
                let flags = if question.dst.is_ipv4() { RTM_F_LOOKUP_TABLE | RTM_F_FIB_MATCH } else { RTM_F_FIB_MATCH };
                w.put(&flags.to_ne_bytes());
                w.attr(rta::DST, &bytes);
                if let Some(src) = question.src {
                    w.attr(rta::SRC, &octets(src));
                }
                if let Some(iif) = iif {
                    w.attr(rta::IIF, &iif.to_ne_bytes());
                }
                if let Some(oif) = oif {
                    w.attr(rta::OIF, &oif.to_ne_bytes());
                }
            },
            |message| answer = decode::route(message.payload, &names),
        );
        match asked {
            Ok(()) => Ok(answer),
            // EHOSTUNREACH (unreachable), EINVAL (blackhole) and EACCES (prohibit) are what a route says.
            Err(e) if [libc::ENETUNREACH, libc::ESRCH].contains(&e.raw_os_error().unwrap_or(0)) => Ok(None),
            Err(e) => Err(KernelError::new(&format!("look up the route to {}", question.dst), e)),
        }
    }

    fn names(&mut self) -> io::Result<Names> {
        let mut names = Names::default();
        self.socket.dump(
            rtm::GETLINK,
            |w| w.put(&[0; 16]),
            |m| {
                if let Some((index, name)) = decode::link_name(m.payload) {
                    names.insert(index, name);
                }
            },
        )?;
        Ok(names)
    }
}
