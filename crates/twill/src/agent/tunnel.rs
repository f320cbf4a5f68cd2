//! The udp backend's tunnel: kept running as the backend tells it, handed over, remembered, and asked for its counters.
//!
//! The reconciler makes the device; this opens it, and the socket, and starts the pumps. It starts them anew when the device was deleted
//! or the backend wants another device, address or port. What it ran last stands in `tunnel.json`: after a restart it runs again at once,
//! before the store has answered.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sd_notify::NotifyState;
use twill_core::backend::{TunnelPeer, TunnelSpec};
use twill_core::host::{HostState, LinkKind};
use twill_core::reconcile::Finding;
use twill_core::state_file::TunnelMemory;
use twill_kernel::tun::{Offloads, TunDevice};
use twill_kernel::udp::UdpSocket;
use twill_kernel::{Waker, files, process};
use twill_tunnel::peers::Peers;
use twill_tunnel::{Gauge, Tunnel};

use super::handover::Handed;

/// First and longest wait for a device or port that somebody else holds: nothing tells when it is free.
const RETRY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// Largest `tunnel.json` that is read.
const MOST_BYTES: u64 = 64 << 20;
/// Names in the service manager's descriptor store.
const KEPT: [&str; 2] = ["twill-tun", "twill-udp"];

/// Where the counters of the running tunnel are to be read, if one runs.
pub(crate) type SharedGauge = Arc<Mutex<Option<Gauge>>>;

/// The tunnel that is wanted, and the one that runs.
pub(crate) struct TunnelHost {
    spec: Option<TunnelSpec>,
    peers: BTreeMap<String, TunnelPeer>,
    /// Peers of an earlier run that no listing has named yet.
    remembered: BTreeSet<String>,
    running: Option<Tunnel>,
    /// Uncut packets only, both ways.
    plain: bool,
    /// The next agent has the descriptors.
    given: bool,
    /// The running tunnel does not know these peers yet; the file does not.
    changed: bool,
    unsaved: bool,
    retry: Duration,
    fault: Option<Finding>,
    gauge: SharedGauge,
    waker: Waker,
    file: PathBuf,
}

impl TunnelHost {
    pub(crate) fn new(waker: Waker, gauge: SharedGauge, state_dir: &Path, plain: bool) -> Self {
        Self {
            spec: None,
            peers: BTreeMap::new(),
            remembered: BTreeSet::new(),
            running: None,
            plain,
            given: false,
            changed: false,
            unsaved: false,
            retry: RETRY.0,
            fault: None,
            gauge,
            waker,
            file: path(state_dir),
        }
    }

    /// What ran last, from the file; and its descriptors, where an earlier agent or the service manager has kept them.
    pub(crate) fn restore(&mut self, handed: Option<Handed>) {
        if let Some(TunnelMemory { spec, peers, .. }) = remembered(&self.file) {
            self.spec = Some(spec);
            self.peers = peers.into_iter().map(|peer| (peer.name.clone(), peer)).collect();
            self.remembered = self.peers.keys().cloned().collect();
        }
        let mut kept = process::kept_descriptors();
        let mut named = |name| kept.iter().position(|(n, _)| n == name).map(|at| kept.swap_remove(at).1);
        let kept = (named(KEPT[0]), named(KEPT[1]));
        let (spec, tun, udp) = match (handed, kept, &self.spec) {
            (Some(Handed { spec, tun, udp }), _, _) => (spec, tun, udp),
            (None, (Some(tun), Some(udp)), Some(spec)) => (spec.clone(), tun, udp),
            // Kept by somebody else, what nobody knows the use of would stand in the way.
            _ => return release(),
        };
        match self.adopt(&spec, tun, udp) {
            Ok(tunnel) => {
                self.spec = Some(spec);
                self.started(tunnel, "the tunnel goes on");
            }
            // The device was deleted meanwhile, or another address is ours: it is opened anew.
            Err(error) => {
                tracing::warn!(%error, "take the tunnel over");
                release();
            }
        }
    }

    fn adopt(&self, spec: &TunnelSpec, tun: OwnedFd, udp: OwnedFd) -> io::Result<Tunnel> {
        let tun = TunDevice::adopt(tun, self.offloads())?;
        let udp = UdpSocket::adopt(udp)?;
        let displaced = !tun.is_here(spec.device.as_str())?;
        if displaced {
            // It would keep the addresses of the one made in its place.
            tun.set_persistent(false)?;
        }
        if displaced || udp.local()? != spec.local {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "these descriptors are another tunnel's"));
        }
        self.start(spec, tun, udp)
    }

    /// What the backend wants; `None`: no tunnel.
    pub(crate) fn set_spec(&mut self, spec: Option<TunnelSpec>) {
        self.unsaved |= self.spec != spec;
        self.spec = spec;
    }

    /// A peer by its lease's name; `None`: it is gone.
    pub(crate) fn set_peer(&mut self, name: &str, peer: Option<TunnelPeer>) {
        self.remembered.remove(name);
        let changed = match peer {
            Some(peer) if self.peers.get(name) == Some(&peer) => false,
            Some(peer) => {
                self.peers.insert(name.to_owned(), peer);
                true
            }
            None => self.peers.remove(name).is_some(),
        };
        self.note(changed);
    }

    /// The listing is whole: what only an earlier run knew is gone.
    pub(crate) fn forget_remembered(&mut self) {
        for name in std::mem::take(&mut self.remembered) {
            self.peers.remove(&name);
            self.note(true);
        }
    }

    /// No tunnel and no peer.
    pub(crate) fn clear(&mut self) {
        self.set_spec(None);
        self.peers.clear();
        self.note(true);
    }

    fn note(&mut self, changed: bool) {
        self.changed |= changed;
        self.unsaved |= changed;
    }

    /// How many peers the tunnel reaches.
    pub(crate) fn peer_count(&self) -> usize {
        self.peers.len()
    }

    /// The peers' addresses on the underlay.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = IpAddr> {
        self.peers.values().map(|peer| peer.host)
    }

    /// What keeps the tunnel from running.
    pub(crate) fn finding(&self) -> Option<&Finding> {
        self.fault.as_ref()
    }

    /// Stops the pumps for the next agent, which gets everything.
    pub(crate) fn hand_over(&mut self) -> Option<Handed> {
        self.save();
        self.given = true;
        self.show(None);
        let spec = self.spec.clone()?;
        let (tun, udp) = self.running.take()?.stop()?;
        Some(Handed { spec, tun: tun.into(), udp: udp.into() })
    }

    /// The next agent went away: the tunnel goes on with what it did not take. Opened anew, both would be busy where the service manager
    /// keeps them.
    pub(crate) fn take_back(&mut self, handed: Option<Handed>) {
        self.given = false;
        let Some(Handed { spec, tun, udp }) = handed else { return };
        match self.adopt(&spec, tun, udp) {
            Ok(tunnel) => self.started(tunnel, "the tunnel goes on"),
            Err(error) => {
                tracing::warn!(%error, "take the tunnel back");
                release();
            }
        }
    }

    /// Writes what changed.
    pub(crate) fn save(&mut self) {
        if self.given || !std::mem::take(&mut self.unsaved) {
            return;
        }
        let saved = match &self.spec {
            None => match std::fs::remove_file(&self.file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
            Some(spec) => {
                let memory = TunnelMemory::new(spec.clone(), self.peers.values().cloned().collect());
                let bytes = memory.to_json().map_err(io::Error::other);
                bytes.and_then(|bytes| files::write_atomic(&self.file, &bytes, 0o600))
            }
        };
        if let Err(error) = saved {
            tracing::warn!(%error, "write {}", self.file.display());
        }
    }

    /// Brings the running tunnel to what is wanted. When to look again, where only time helps.
    pub(crate) fn bring_up(&mut self, host: &HostState, now: Duration) -> Option<Duration> {
        let spec = self.spec.as_ref();
        let keeps = |tunnel: &mut Tunnel| tunnel.is_alive() && Some(tunnel.spec()) == spec && !tunnel.is_displaced();
        if let Some(tunnel) = self.running.take_if(|tunnel| !keeps(tunnel)) {
            self.show(None);
            release();
            end(tunnel);
        }
        let Some(spec) = self.spec.clone().filter(|_| !self.given) else {
            self.fault = None;
            return None;
        };
        if let Some(tunnel) = &self.running {
            if std::mem::take(&mut self.changed) {
                tunnel.replace_peers(self.table(&spec));
            }
            return None;
        }
        // The device comes with the reconciler's next round, which ends here again.
        host.link(spec.device).filter(|link| link.kind == LinkKind::Tun)?;
        match self.open(&spec) {
            Ok(tunnel) => {
                self.started(tunnel, "the tunnel runs");
                None
            }
            Err((evidence, fix)) => {
                let object = format!("tunnel {} on {}", spec.device, spec.local);
                let finding = Finding { code: "tunnel-down".into(), object, evidence, fix: fix.into() };
                if self.fault.as_ref() != Some(&finding) {
                    tracing::error!(code = finding.code, fix = finding.fix, "{}", finding.evidence);
                }
                self.fault = Some(finding);
                self.retry = (self.retry * 2).min(RETRY.1);
                Some(now + self.retry)
            }
        }
    }

    /// Device and socket with pumps between them, or what is wrong and what helps.
    fn open(&self, spec: &TunnelSpec) -> Result<Tunnel, (String, &'static str)> {
        let tun = TunDevice::open(spec.device.as_str(), self.offloads()).map_err(|e| {
            let fix = match e.kind() {
                // A TAP device, or one of several queues: no link of ours, though its kind is called tun as well.
                io::ErrorKind::InvalidInput => "delete the device, which is of another kind: it is made anew",
                _ => "end the program that holds the device; it needs CAP_NET_ADMIN and /dev/net/tun",
            };
            (format!("open {}: {e}", spec.device), fix)
        })?;
        let udp = UdpSocket::bind(spec.local).map_err(|e| {
            let fix = "end the program that holds the port (ss -ulpn), or set Backend.Port on every node";
            (format!("bind UDP {}: {e}", spec.local), fix)
        })?;
        self.start(spec, tun, udp).map_err(|e| (format!("start the tunnel: {e}"), "see the message"))
    }

    fn start(&self, spec: &TunnelSpec, tun: TunDevice, udp: UdpSocket) -> io::Result<Tunnel> {
        let udp = if self.plain { udp.without_offloads()? } else { udp };
        let waker = self.waker.clone();
        Tunnel::start(spec.clone(), tun, udp, self.table(spec), move || waker.wake())
    }

    fn started(&mut self, tunnel: Tunnel, how: &str) {
        let gauge = tunnel.gauge();
        tracing::info!(device = %gauge.spec().device, local = %gauge.spec().local, means = %gauge.means(), "{how}");
        keep(&tunnel);
        self.show(Some(gauge));
        (self.running, self.fault, self.changed, self.retry) = (Some(tunnel), None, false, RETRY.0);
    }

    fn table(&self, spec: &TunnelSpec) -> Peers {
        Peers::new(self.peers.values().cloned(), spec.local.port())
    }

    fn offloads(&self) -> Offloads {
        if self.plain { Offloads::NONE } else { Offloads::ALL }
    }

    fn show(&self, gauge: Option<Gauge>) {
        *self.gauge.lock().unwrap_or_else(PoisonError::into_inner) = gauge;
    }
}

/// Ends a tunnel. A renamed device still has the addresses that the one made in its place has: it goes too.
fn end(tunnel: Tunnel) {
    if tunnel.is_displaced() {
        let device = tunnel.spec().device;
        match tunnel.remove() {
            Ok(()) => tracing::warn!(%device, "the device was renamed or moved: it is removed, and made anew"),
            Err(error) => tracing::warn!(%device, %error, "remove the device that was renamed or moved"),
        }
    }
}

/// Where the tunnel is remembered.
pub(crate) fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("tunnel.json")
}

/// The tunnel that ran last; a file that cannot be read is none.
pub(crate) fn remembered(path: &Path) -> Option<TunnelMemory> {
    let bytes = files::read_limited(path, MOST_BYTES).ok()??;
    TunnelMemory::parse(&bytes).inspect_err(|error| tracing::warn!(file = %path.display(), %error, "left aside")).ok()
}

/// Gives the descriptors to the service manager, which has them for the next run; where there is none, or it keeps none, nothing happens.
fn keep(tunnel: &Tunnel) {
    let Some((tun, udp)) = tunnel.descriptors() else { return };
    release();
    for (name, fd) in KEPT.into_iter().zip([tun, udp]) {
        let _ = sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name)], &[fd]);
    }
}

fn release() {
    for name in KEPT {
        let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
    }
}
