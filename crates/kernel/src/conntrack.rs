//! Connection tracking over netlink: connections that a new rule must not leave as they are.
//!
//! Numbers: include/uapi/linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h.

use std::io;

use rustix::net::netlink;

use crate::netlink::socket::Socket;
use crate::netlink::wire::{Writer, attr, flag};

/// NFNL_SUBSYS_CTNETLINK with IPCTNL_MSG_CT_GET and IPCTNL_MSG_CT_DELETE.
const GET: u16 = (1 << 8) | 1;
const DELETE: u16 = (1 << 8) | 2;
/// CTA_TUPLE_ORIG, CTA_TUPLE_PROTO, CTA_PROTO_NUM, CTA_PROTO_DST_PORT.
const ORIGINAL: u16 = 1;
const PROTO: u16 = 2;
const PROTO_NUM: u16 = 1;
const PROTO_DST_PORT: u16 = 3;
/// CTA_FILTER, CTA_FILTER_ORIG_FLAGS, and the two parts of a tuple that count.
const FILTER: u16 = 25;
const FILTER_FLAGS: u16 = 1;
const BY_PROTO_AND_PORT: u32 = (1 << 3) | (1 << 5);
/// IPPROTO_UDP.
const UDP: u8 = 17;
/// AF_INET, AF_INET6.
const FAMILIES: [u8; 2] = [2, 10];

/// Forgets every UDP connection that was begun to this port, in the calling thread's namespace: its next packet meets the rules as they
/// are now. Addresses are translated for a connection's first packet alone, and a client that goes on asking never lets it end.
pub fn forget_udp(port: u16) -> io::Result<()> {
    let mut socket = Socket::open(Some(netlink::NETFILTER), 0)?;
    for family in FAMILIES {
        let header = [family, 0, 0, 0];
        let mut found = Vec::new();
        let fill = |w: &mut Writer| {
            w.put(&header);
            w.nest(ORIGINAL, |w| {
                w.nest(PROTO, |w| {
                    w.attr(PROTO_NUM, &[UDP]);
                    w.attr(PROTO_DST_PORT, &port.to_be_bytes());
                });
            });
            w.nest(FILTER, |w| w.attr(FILTER_FLAGS, &BY_PROTO_AND_PORT.to_ne_bytes()));
        };
        socket.dump(GET, fill, |message| {
            let tuple = message.payload.get(header.len()..).and_then(|body| attr(body, ORIGINAL));
            found.extend(tuple.filter(|tuple| is_to(tuple, port)).map(<[u8]>::to_vec));
        })?;
        let mut writer = Writer::default();
        for tuple in &found {
            let seq = socket.next_seq();
            writer.begin(DELETE, flag::REQUEST, seq);
            writer.put(&header);
            writer.nest(ORIGINAL, |w| w.put(tuple));
            writer.end();
        }
        if !found.is_empty() {
            let last = writer.ask_ack();
            // One that ended meanwhile is refused: it is gone.
            socket.batch(&writer, last)?;
        }
    }
    Ok(())
}

fn is_to(tuple: &[u8], port: u16) -> bool {
    let Some(proto) = attr(tuple, PROTO) else { return false };
    attr(proto, PROTO_NUM) == Some(&[UDP]) && attr(proto, PROTO_DST_PORT) == Some(&port.to_be_bytes())
}
