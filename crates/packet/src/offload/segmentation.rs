//! One super-packet → packets of at most the device's MTU (the kernel's software GSO: net/ipv4/tcp_offload.c, udp_offload.c).

use super::{Gso, Vnet, complete};
use crate::checksum::{self, Sum};
use crate::{Error, bytes};

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// Packets that stand side by side at the end of a buffer: all `size` bytes long, the last `last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segments {
    /// How many; at least one.
    pub count: usize,
    /// Bytes of each but the last.
    pub size: usize,
    /// Bytes of the last.
    pub last: usize,
}

/// Appends `packet` to `out`, cut as `vnet` says, each part with its lengths, sequence number, identification and checksums finished.
///
/// Refused, with `out` as before: headers that do not hang together with `vnet`. Nothing is allocated while `out` has room.
pub fn segment(vnet: &Vnet, packet: &[u8], out: &mut Vec<u8>) -> Result<Segments, Error> {
    if vnet.gso == Gso::None {
        let start = out.len();
        out.extend_from_slice(packet);
        if vnet.needs_csum && !complete(vnet, &mut out[start..]) {
            out.truncate(start);
            let need = usize::from(vnet.csum_start) + usize::from(vnet.csum_offset) + 2;
            return Err(Error::Truncated { need, have: packet.len() });
        }
        return Ok(Segments { count: 1, size: packet.len(), last: packet.len() });
    }
    let plan = Plan::new(vnet, packet)?;
    let payload = &packet[plan.headers..];
    let parts = payload.chunks(plan.mss);
    let count = parts.len();
    out.reserve(count * plan.headers + payload.len());
    let mut last = 0;
    for (index, part) in parts.enumerate() {
        let start = out.len();
        out.extend_from_slice(&packet[..plan.headers]);
        out.extend_from_slice(part);
        plan.finish(&mut out[start..], index, index + 1 == count);
        last = plan.headers + part.len();
    }
    Ok(Segments { count, size: plan.headers + if count > 1 { plan.mss } else { payload.len() }, last })
}

/// Where the headers of a super-packet stand.
struct Plan {
    v6: bool,
    tcp: bool,
    /// Where the transport header starts.
    transport: usize,
    /// Bytes of all headers.
    headers: usize,
    mss: usize,
    /// The pseudo header without the length.
    pseudo: Sum,
}

impl Plan {
    fn new(vnet: &Vnet, packet: &[u8]) -> Result<Self, Error> {
        bytes::need(packet, crate::ipv4::LEN)?;
        let version = packet[0] >> 4;
        let want = match vnet.gso {
            Gso::Tcp4 => 4,
            Gso::Tcp6 => 6,
            Gso::Udp | Gso::None if version == 4 || version == 6 => version,
            Gso::Udp | Gso::None => return Err(Error::BadVersion { found: version, want: 4 }),
        };
        if version != want {
            return Err(Error::BadVersion { found: version, want });
        }
        let v6 = version == 6;
        let tcp = vnet.gso != Gso::Udp;
        let transport = usize::from(vnet.csum_start);
        let ip = if v6 { crate::ipv6::LEN } else { usize::from(packet[0] & 0x0f) * 4 };
        if ip < crate::ipv4::LEN || transport < ip || (!v6 && transport != ip) {
            return Err(Error::BadLength { found: transport, least: ip.max(crate::ipv4::LEN) });
        }
        if !v6 && bytes::be16(packet, 6) & 0x3fff != 0 {
            return Err(Error::BadField { field: "fragment", found: bytes::be16(packet, 6).into(), want: 0 });
        }
        let (protocol, least) = if tcp { (6, crate::tcp::LEN) } else { (17, crate::udp::LEN) };
        bytes::need(packet, transport + least)?;
        // Behind extension headers the protocol stands elsewhere; there `vnet` is believed.
        let found = if v6 { packet[6] } else { packet[9] };
        if found != protocol && transport == ip {
            return Err(Error::BadField { field: "protocol", found: found.into(), want: protocol.into() });
        }
        let header = if tcp { usize::from(packet[transport + 12] >> 4) * 4 } else { least };
        let headers = transport + header;
        if header < least {
            return Err(Error::BadLength { found: header, least });
        }
        bytes::need(packet, headers + 1)?;
        if vnet.gso_size == 0 {
            return Err(Error::BadLength { found: 0, least: 1 });
        }
        let (addresses, mss) = (if v6 { 8..40 } else { 12..20 }, vnet.gso_size.into());
        // A single part must still fit the length fields.
        if headers + usize::min(mss, packet.len() - headers) - if v6 { crate::ipv6::LEN } else { 0 } > 0xffff {
            return Err(Error::BadLength { found: packet.len(), least: headers });
        }
        let pseudo = Sum::default().with(&packet[addresses]).with(&[0, protocol]);
        Ok(Self { v6, tcp, transport, headers, mss, pseudo })
    }

    /// Writes what differs from part to part.
    fn finish(&self, part: &mut [u8], index: usize, last: bool) {
        let word = |n: usize| (n as u16).to_be_bytes();
        let transport_len = part.len() - self.transport;
        if self.v6 {
            bytes::put(part, 4, &word(part.len() - crate::ipv6::LEN));
        } else {
            let ident = bytes::be16(part, 4).wrapping_add(index as u16);
            bytes::put(part, 2, &word(part.len()));
            bytes::put(part, 4, &ident.to_be_bytes());
            bytes::put(part, 10, &[0, 0]);
            let sum = checksum::of(&part[..self.transport]);
            bytes::put(part, 10, &sum.to_be_bytes());
        }
        let t = self.transport;
        let at = if self.tcp {
            let seq = bytes::be32(part, t + 4).wrapping_add((index * self.mss) as u32);
            bytes::put(part, t + 4, &seq.to_be_bytes());
            if !last {
                part[t + 13] &= !(TCP_FIN | TCP_PSH);
            }
            if index > 0 {
                part[t + 13] &= !TCP_CWR;
            }
            t + 16
        } else {
            bytes::put(part, t + 4, &word(transport_len));
            t + 6
        };
        bytes::put(part, at, &[0, 0]);
        let sum = self.pseudo.with(&word(transport_len)).with(&part[t..]).finish();
        let sum = if sum == 0 && !self.tcp { 0xffff } else { sum };
        bytes::put(part, at, &sum.to_be_bytes());
    }
}
