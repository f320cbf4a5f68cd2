//! What the agent shows of itself: the answers of the control API, and what `-o json` prints. Fields are only added.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use twill_core::firewall::TableName;
use twill_core::firewall::policy::STRANGERS;
use twill_core::reconcile::{Finding, Repair};
use twill_tunnel::counters::{CallsSnapshot, Cause, Dropped, FlowSnapshot, Snapshot};
use twill_tunnel::{Gauge, Means};

/// The whole state, as `status` shows it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct View {
    /// The node's identity.
    pub(crate) node: String,
    /// `starting`, `waiting`, `running` or `held`.
    pub(crate) state: String,
    /// Own subnets.
    pub(crate) subnets: Vec<String>,
    /// The networks that they lie in.
    pub(crate) networks: Vec<String>,
    /// The backend's type, once the config is read.
    pub(crate) backend: Option<String>,
    /// Tunnel devices.
    pub(crate) devices: Vec<String>,
    /// MTU for containers.
    pub(crate) mtu: Option<u32>,
    /// The underlay, and why it was chosen.
    pub(crate) underlay: Option<UnderlayView>,
    /// The store.
    pub(crate) store: StoreView,
    /// The udp backend's tunnel, while it runs.
    pub(crate) tunnel: Option<TunnelView>,
    /// Peers that are programmed.
    pub(crate) peers: usize,
    /// nftables keeps strangers from the tunnel's socket; shown in `tunnel`.
    #[serde(skip)]
    pub(crate) guarded: bool,
    /// What a person should know.
    pub(crate) findings: Vec<Finding>,
    /// Repairs of drift.
    pub(crate) repairs: Repairs,
}

/// The chosen underlay.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct UnderlayView {
    pub(crate) interface: String,
    pub(crate) addresses: Vec<String>,
    pub(crate) mtu: u32,
    pub(crate) why: String,
}

/// The udp backend's tunnel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TunnelView {
    pub(crate) device: String,
    /// The socket's address and port.
    pub(crate) local: String,
    /// What the kernel grants.
    pub(crate) means: Means,
    /// Who drops datagrams of strangers: `nftables` before the socket's queue, or the tunnel itself: `user-space`.
    pub(crate) strangers: String,
    /// Packets and bytes on the wire, from and to all peers.
    pub(crate) sent: FlowSnapshot,
    pub(crate) received: FlowSnapshot,
    /// Calls between the tunnel and the kernel.
    pub(crate) calls: CallsSnapshot,
    /// ICMP errors sent about packets that went no further.
    pub(crate) icmp_errors: u64,
    /// Packets dropped, by cause; what never occurred is left out.
    pub(crate) drops: Vec<Dropped>,
}

impl TunnelView {
    pub(crate) fn of(gauge: &Gauge, guarded: bool) -> Self {
        let counters = counters(gauge, guarded);
        Self {
            device: gauge.spec().device.to_string(),
            local: gauge.spec().local.to_string(),
            means: gauge.means(),
            strangers: if guarded { "nftables" } else { "user-space" }.into(),
            sent: counters.sent(),
            received: counters.received(),
            calls: counters.calls,
            icmp_errors: counters.icmp_errors,
            drops: counters.drops,
        }
    }
}

/// The tunnel's counters, with the strangers' packets that nftables dropped before the tunnel could count them.
pub(crate) fn counters(gauge: &Gauge, guarded: bool) -> Snapshot {
    let mut counters = gauge.counters();
    if guarded && let Ok(packets) = twill_kernel::nft::counted(&TableName::twill(), STRANGERS) {
        counters.add_drops(Cause::NotAPeer, packets);
    }
    counters
}

/// The store as the agent sees it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct StoreView {
    pub(crate) endpoints: String,
    /// `not-asked`, `connecting` (asked for the first time), `up` or `away`.
    pub(crate) state: String,
    /// Newest revision that was heard of.
    pub(crate) revision: i64,
    /// True when nothing authenticates either side.
    pub(crate) open: bool,
}

/// The journal.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Repairs {
    /// Since the agent's start.
    pub(crate) total: u64,
    /// The last ones, oldest first.
    pub(crate) recent: Vec<Repair>,
}

/// `GET /v1/peers`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Peers {
    pub(crate) peers: Vec<PeerView>,
}

/// One peer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PeerView {
    /// The store key's last part.
    pub(crate) lease: String,
    pub(crate) subnets: Vec<String>,
    /// Its address on the underlay.
    pub(crate) address: Option<IpAddr>,
    /// Its VTEP's address on the overlay.
    pub(crate) vtep: Option<IpAddr>,
    /// Both addresses for each family that it shares with this node, IPv4 first.
    #[serde(default)]
    pub(crate) ways: Vec<WayView>,
    pub(crate) mac: Option<String>,
    pub(crate) node: Option<String>,
    /// Why it is not programmed.
    pub(crate) fault: Option<String>,
    /// With `--probe`: which of the two answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) probe: Option<Probe>,
}

/// How packets of one family travel to a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WayView {
    /// Of the packets inside: `IPv4` or `IPv6`.
    pub(crate) family: String,
    /// The address on the underlay that they are sent to.
    pub(crate) address: Option<IpAddr>,
    /// The VTEP's address on the overlay.
    pub(crate) vtep: IpAddr,
}

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Probe {
    /// Answers in every family.
    pub(crate) underlay: bool,
    /// Answers in every family.
    pub(crate) overlay: bool,
    /// The same for each family.
    #[serde(default)]
    pub(crate) families: Vec<FamilyProbe>,
    pub(crate) verdict: String,
}

/// What a probe found of one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FamilyProbe {
    pub(crate) family: String,
    pub(crate) underlay: bool,
    pub(crate) overlay: bool,
}

/// `plan`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct PlanView {
    pub(crate) steps: Vec<StepView>,
}

/// One step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StepView {
    pub(crate) op: String,
    pub(crate) object: String,
    pub(crate) why: String,
}

impl From<&twill_core::reconcile::Plan> for PlanView {
    fn from(plan: &twill_core::reconcile::Plan) -> Self {
        let step = |s: &twill_core::reconcile::Step| StepView {
            op: s.op.verb().into(),
            object: s.op.object().to_string(),
            why: s.why.words().into(),
        };
        PlanView { steps: plan.steps.iter().map(step).collect() }
    }
}
