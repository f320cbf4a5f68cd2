//! Namespaces and what joins them: the CNI plugin's way, `kernel::attach`, addresses held as it holds them.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use twill_cni::ipam::Folder;
use twill_cni::records::Records;
use twill_core::attach::{Request, Way, bridge as bridge_with, loopback};
use twill_core::ipam::{Holder, Range, RangeSet};
use twill_core::net::{Inet, LinkName, Mtu};
use twill_core::reconcile::{Claim, Desired};
use twill_kernel::attach::{self, Before};
use twill_kernel::files;
use twill_kernel::netns::Netns;

use crate::error::{Act, LabError};
use crate::layout::{ContainerPlan, NodePlan};

/// A place: a namespace that lives as long as its descriptor here.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) name: String,
    pub(crate) netns: Netns,
}

impl Place {
    /// A new, empty namespace.
    pub(crate) fn create(name: &str) -> Result<Self, LabError> {
        let netns = Netns::create().act(|| format!("make the network namespace of {name}"))?;
        Ok(Self { name: name.to_owned(), netns })
    }

    /// The namespace as a path for this process.
    fn own_path(&self) -> String {
        format!("/proc/self/fd/{}", self.netns.as_fd().as_raw_fd())
    }

    /// The namespace as a path for others; `pid` is this process as /proc numbers it.
    pub(crate) fn path(&self, pid: u32) -> String {
        format!("/proc/{pid}/fd/{}", self.netns.as_fd().as_raw_fd())
    }

    /// Brings the namespace to what is wanted.
    pub(crate) fn make(&self, want: &Desired) -> Result<(), LabError> {
        let made = self.netns.run(|| attach::make(want));
        made.act(|| format!("enter {}", self.name))?.act(|| self.name.clone())
    }
}

/// The bridge between the hosts.
pub(crate) fn underlay(place: &Place, bridge: LinkName, addresses: &[Inet]) -> Result<(), LabError> {
    let mut host = bridge_with(bridge, addresses, None);
    host.extend(loopback());
    place.make(&Desired { host, claim: Claim::default() })
}

/// Joins a host to the underlay. It is attached as a container is: a pair, an address, a way out.
pub(crate) fn join_host(
    underlay: &Place,
    bridge: LinkName,
    gateways: &[Inet],
    host: &Place,
    plan: &NodePlan,
) -> Result<(), LabError> {
    let addresses = [plan.address].into_iter().chain(plan.second.map(|second| second.address)).collect();
    let request = Request {
        host_device: plan.name.parse().act(|| format!("name the port of {}", plan.name))?,
        bridge: Some(bridge),
        gateways: gateways.to_vec(),
        routes: gateways.iter().map(|gateway| Way::out(gateway.addr)).collect(),
        ..Request::alone(&plan.name, eth0()?, &host.own_path(), addresses)
    };
    attach(underlay, host, &request)
}

/// Joins a container to its host's bridge, as the CNI plugin does: written down, its addresses taken, then the device. `folder` is the
/// node's; a lab outlives no crash of the machine, so that no disk is waited for.
pub(crate) fn join_container(
    host: &Place,
    container: &Place,
    node: &NodePlan,
    plan: &ContainerPlan,
    mtu: Option<Mtu>,
    folder: &Path,
) -> Result<(), LabError> {
    let gateways: Vec<Inet> = [node.gateway].into_iter().chain(node.second.map(|second| second.gateway)).collect();
    let addresses = [plan.address].into_iter().chain(plan.second).collect();
    let request = Request {
        host_device: plan.host_device,
        bridge: Some(node.bridge),
        routes: gateways.iter().map(|gateway| Way::out(gateway.addr)).collect(),
        gateways,
        mtu,
        forward: true,
        ..Request::alone(&plan.name, eth0()?, &container.own_path(), addresses)
    };
    let boot = files::boot_id().act(|| "read the boot's id".into())?;
    let inode = fs::metadata(container.own_path()).act(|| format!("look at the namespace of {}", plan.name))?.ino();
    let mut record = request.record(&boot, inode);
    record.request.netns = container.path(own_pid()?).into();
    let act = || format!("write down {}", plan.name);
    // Locked until the device stands.
    let _written = Records::new(folder.join("state/attachments")).put(&record).act(act)?;
    hold(&request, folder)?;
    attach(host, container, &request)
}

/// The network of the containers, as `twill cni install` names it.
const NETWORK: &str = "twill";

/// Takes a container's addresses, so that a runtime on the same node gives them to nobody.
fn hold(request: &Request, folder: &Path) -> Result<(), LabError> {
    let act = || format!("hold the addresses of {}", request.container_id);
    let range = |(own, gateway): (&Inet, &Inet)| {
        RangeSet::new(vec![Range::new(own.network(), None, None, Some(gateway.addr))?])
    };
    let sets: Vec<RangeSet> =
        request.addresses.iter().zip(&request.gateways).map(range).collect::<Result<_, _>>().act(act)?;
    let asked: Vec<_> = request.addresses.iter().map(|inet| inet.addr).collect();
    let network = Folder::open(&folder.join("networks").join(NETWORK)).act(act)?;
    let choice = network.choose(&sets, &asked).act(act)?;
    let holder = Holder { container_id: request.container_id.clone(), ifname: Some(request.ifname.to_string()) };
    network.take(&choice, &holder).map(drop).act(act)
}

fn attach(host: &Place, guest: &Place, request: &Request) -> Result<(), LabError> {
    let attached = host.netns.run(|| {
        let before = Before::look(&host.netns, &guest.netns, request.bridge, request.host_device)?;
        attach::attach(before, request, &|_| true)
    });
    attached
        .act(|| format!("enter {}", host.name))?
        .map(|_| ())
        .act(|| format!("attach {} to {}", guest.name, host.name))
}

fn eth0() -> Result<LinkName, LabError> {
    "eth0".parse().act(|| "name eth0".into())
}

/// This process as /proc numbers it: /proc belongs to the PID namespace outside.
pub(crate) fn own_pid() -> Result<u32, LabError> {
    let name = fs::read_link("/proc/self").act(|| "read /proc/self".into())?;
    name.to_string_lossy().parse().act(|| "read /proc/self".into())
}
