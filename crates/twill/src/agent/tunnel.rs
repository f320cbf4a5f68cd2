//! The udp backend's tunnel: kept running as the backend tells it, and asked for its counters.
//!
//! The reconciler makes the device; this opens it, and the socket, and starts the pumps. It starts them anew when the device was deleted
//! or the backend wants another device, address or port.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use twill_core::backend::{TunnelPeer, TunnelSpec};
use twill_core::host::{HostState, LinkKind};
use twill_core::reconcile::Finding;
use twill_kernel::Waker;
use twill_kernel::tun::{Offloads, TunDevice};
use twill_kernel::udp::UdpSocket;
use twill_tunnel::peers::Peers;
use twill_tunnel::{Gauge, Tunnel};

/// A port that somebody else holds is asked for this often: nothing tells when it is free.
const RETRY: Duration = Duration::from_millis(250);

/// Where the counters of the running tunnel are to be read, if one runs.
pub(crate) type SharedGauge = Arc<Mutex<Option<Gauge>>>;

/// The tunnel that is wanted, and the one that runs.
pub(crate) struct TunnelHost {
    spec: Option<TunnelSpec>,
    peers: BTreeMap<String, TunnelPeer>,
    running: Option<Tunnel>,
    /// The running tunnel does not know these peers yet.
    changed: bool,
    fault: Option<Finding>,
    gauge: SharedGauge,
    waker: Waker,
}

impl TunnelHost {
    pub(crate) fn new(waker: Waker, gauge: SharedGauge) -> Self {
        let peers = BTreeMap::new();
        Self { spec: None, peers, running: None, changed: false, fault: None, gauge, waker }
    }

    /// What the backend wants; `None`: no tunnel.
    pub(crate) fn set_spec(&mut self, spec: Option<TunnelSpec>) {
        self.spec = spec;
    }

    /// A peer by its lease's name; `None`: it is gone.
    pub(crate) fn set_peer(&mut self, name: &str, peer: Option<TunnelPeer>) {
        self.changed |= match peer {
            Some(peer) if self.peers.get(name) == Some(&peer) => false,
            Some(peer) => {
                self.peers.insert(name.to_owned(), peer);
                true
            }
            None => self.peers.remove(name).is_some(),
        };
    }

    pub(crate) fn clear_peers(&mut self) {
        self.changed |= !self.peers.is_empty();
        self.peers.clear();
    }

    /// How many peers the tunnel reaches.
    pub(crate) fn peer_count(&self) -> usize {
        self.peers.len()
    }

    /// What keeps the tunnel from running.
    pub(crate) fn finding(&self) -> Option<&Finding> {
        self.fault.as_ref()
    }

    /// Brings the running tunnel to what is wanted. When to look again, where only time helps.
    pub(crate) fn bring_up(&mut self, host: &HostState, now: Duration) -> Option<Duration> {
        let keeps = |tunnel: &Tunnel| tunnel.is_alive() && Some(tunnel.spec()) == self.spec.as_ref();
        if self.running.as_ref().is_some_and(|tunnel| !keeps(tunnel)) {
            self.running = None;
            *self.gauge.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        let Some(spec) = &self.spec else {
            self.fault = None;
            return None;
        };
        let peers = || Peers::new(self.peers.values().cloned(), spec.local.port());
        if let Some(tunnel) = &self.running {
            if std::mem::take(&mut self.changed) {
                tunnel.replace_peers(peers());
            }
            return None;
        }
        // The device comes with the reconciler's next round, which ends here again.
        host.link(spec.device).filter(|link| link.kind == LinkKind::Tun)?;
        let waker = self.waker.clone();
        let started = open(spec).and_then(|(tun, udp)| {
            let failed = |e| (format!("start the tunnel: {e}"), "see the message");
            Tunnel::start(spec.clone(), tun, udp, peers(), move || waker.wake()).map_err(failed)
        });
        match started {
            Ok(tunnel) => {
                tracing::info!(device = %spec.device, local = %spec.local, means = %tunnel.gauge().means(), "the tunnel runs");
                *self.gauge.lock().unwrap_or_else(PoisonError::into_inner) = Some(tunnel.gauge());
                (self.running, self.fault, self.changed) = (Some(tunnel), None, false);
                None
            }
            Err((evidence, fix)) => {
                let finding = Finding {
                    code: "tunnel-down".into(),
                    object: format!("tunnel {} on {}", spec.device, spec.local),
                    evidence,
                    fix: fix.into(),
                };
                if self.fault.as_ref() != Some(&finding) {
                    tracing::error!(code = finding.code, fix = finding.fix, "{}", finding.evidence);
                }
                self.fault = Some(finding);
                Some(now + RETRY)
            }
        }
    }
}

/// Device and socket, or what is wrong and what helps.
fn open(spec: &TunnelSpec) -> Result<(TunDevice, UdpSocket), (String, &'static str)> {
    let tun = TunDevice::open(spec.device.as_str(), Offloads::ALL).map_err(|e| {
        (
            format!("open {}: {e}", spec.device),
            "end the program that holds the device; it needs CAP_NET_ADMIN and /dev/net/tun",
        )
    })?;
    let udp = UdpSocket::bind(spec.local).map_err(|e| {
        (
            format!("bind UDP {}: {e}", spec.local),
            "end the program that holds the port (ss -ulpn), or set Backend.Port on every node",
        )
    })?;
    Ok((tun, udp))
}
