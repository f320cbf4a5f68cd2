//! What passes several devices of one namespace while something happens.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use twill_core::net::LinkName;
use twill_kernel::capture::Capture;
use twill_kernel::netns::Netns;
use twill_packet::{Header, Layer, decode, decode_packet, icmp, vxlan};

use crate::error::{Act, LabError};

/// After what happened has ended, and nothing passed for so long, nothing more is waited for.
const QUIET: Duration = Duration::from_millis(500);

/// A frame that passed a device.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Which.
    pub device: LinkName,
    /// When, by the wall clock.
    pub at: Duration,
    /// Its bytes, from the Ethernet header on; of a device without frames, from the IP header on.
    pub bytes: Vec<u8>,
    framed: bool,
}

impl Seen {
    /// What it is, layer by layer.
    pub fn layers(&self) -> Vec<Layer<'_>> {
        if self.framed { decode(&self.bytes) } else { decode_packet(&self.bytes) }
    }

    /// True for an echo reply, also inside a tunnel.
    pub fn is_echo_reply(&self) -> bool {
        self.layers().iter().any(|layer| matches!(layer.header, Header::Icmp(icmp::Repr::EchoReply { .. })))
    }

    /// What it says at last, in one line: the innermost header that is not mere data.
    pub fn says(&self) -> String {
        let layers = self.layers();
        let last = layers.iter().rfind(|layer| !matches!(layer.header, Header::Data(_) | Header::More(_)));
        last.map_or_else(String::new, |layer| format!("{} {}", layer.name(), layer.header.meaning()))
    }
}

/// Does `act` (a ping) while every frame that passes the devices is kept, up to and with the first echo reply on each; in order of time.
pub fn during<T>(netns: &Netns, devices: &[LinkName], act: impl FnOnce() -> T) -> Result<(Vec<Seen>, T), LabError> {
    let opened = netns.run(|| {
        devices
            .iter()
            .map(|&device| Ok((device, Capture::on(device).act(|| format!("capture on {device}"))?)))
            .collect::<Result<Vec<_>, LabError>>()
    });
    let captures = opened.act(|| "enter the network namespace".into())??;
    let over = AtomicBool::new(false);
    let (seen, did) = thread::scope(|scope| {
        let over = &over;
        let threads: Vec<_> =
            captures.into_iter().map(|(device, capture)| scope.spawn(move || keep(device, capture, over))).collect();
        let did = act();
        over.store(true, Ordering::Relaxed);
        let kept: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
        (kept, did)
    });
    let mut all = Vec::new();
    for kept in seen {
        all.extend(kept.map_err(|_| LabError::new("lab-failed", "a thread that captures panicked"))?);
    }
    all.sort_by_key(|seen: &Seen| seen.at);
    Ok((all, did))
}

/// The VNI and the inner frame of a VXLAN packet.
pub fn wrapped(frame: &[u8]) -> Option<(u32, &[u8])> {
    decode(frame).iter().find_map(|layer| match layer.header {
        Header::Vxlan(header) => Some((header.vni, frame.get(layer.offset + vxlan::LEN..)?)),
        _ => None,
    })
}

/// Sends a captured VXLAN packet's datagram once more from a host, with that VNI, to the port that it went to.
pub fn send_again(from: &Netns, frame: &[u8], vni: u32, to: IpAddr) -> Result<(), LabError> {
    let layers = decode(frame);
    let port = layers.iter().find_map(|layer| match layer.header {
        Header::Udp(header) => Some(header.dst_port),
        _ => None,
    });
    let (Some(port), Some((_, inner))) = (port, wrapped(frame)) else {
        return Err(LabError::new("lab-failed", "send a packet again: it is not VXLAN"));
    };
    let mut datagram = vec![0; vxlan::LEN];
    vxlan::Repr { vni, policy: None }.emit(&mut datagram).act(|| "write a VXLAN header".into())?;
    datagram.extend_from_slice(inner);
    let sent = from.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?.send_to(&datagram, (to, port)));
    sent.and_then(|sent| sent).map(drop).act(|| format!("send a packet to {to}"))
}

fn keep(device: LinkName, mut capture: Capture, over: &AtomicBool) -> Vec<Seen> {
    let (mut kept, framed) = (Vec::new(), capture.has_frames());
    loop {
        match capture.next(QUIET) {
            Ok(Some(frame)) => {
                let bytes = frame.to_vec();
                let seen = Seen { device, at: capture.passed_at().unwrap_or_default(), bytes, framed };
                let last = seen.is_echo_reply();
                kept.push(seen);
                if last {
                    return kept;
                }
            }
            Ok(None) if !over.load(Ordering::Relaxed) => {}
            Ok(None) | Err(_) => return kept,
        }
    }
}
