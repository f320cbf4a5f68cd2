//! Namespaces and what joins them. Every change goes through `core::plan` and `kernel::apply`.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use twill_core::attach::{self, Request};
use twill_core::host::Key;
use twill_core::net::{Inet, LinkName, Mtu};
use twill_core::reconcile::{Caps, Claim, Desired, Op, Scope, plan};
use twill_kernel::netns::Netns;
use twill_kernel::{Interest, Kernel, LinuxKernel, files, sysctl};

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
        let sysctls = want.host.iter().filter_map(|(key, _)| match key {
            Key::Sysctl(path) => Some(path.clone()),
            _ => None,
        });
        let interest = Interest { sysctls: sysctls.collect(), ..Interest::default() };
        let made = self.netns.run(|| {
            let mut kernel = LinuxKernel::open(interest).act(|| format!("look into {}", self.name))?;
            let plan = plan(want, kernel.mirror(), &Caps::default(), Scope::All);
            let outcome = kernel.apply(&plan);
            for (step, result) in plan.steps.iter().zip(outcome.steps) {
                result.act(|| format!("{}: {} {}", self.name, step.op.verb(), about(&step.op)))?;
            }
            Ok(())
        });
        made.act(|| format!("enter {}", self.name))?
    }
}

fn about(op: &Op) -> String {
    op.object().to_string()
}

/// The bridge between the hosts.
pub(crate) fn underlay(place: &Place, bridge: LinkName, address: Inet) -> Result<(), LabError> {
    let mut host = attach::bridge(bridge, &[address], None);
    host.extend(attach::loopback());
    place.make(&Desired { host, claim: Claim::default() })
}

/// Joins a host to the underlay. It is attached as a container is: a pair, an address, a way out.
pub(crate) fn join_host(
    underlay: &Place,
    bridge: LinkName,
    gateway: Inet,
    host: &Place,
    plan: &NodePlan,
) -> Result<(), LabError> {
    let request = Request {
        container_id: plan.name.clone(),
        ifname: eth0()?,
        netns: host.own_path().into(),
        host_device: plan.name.parse().act(|| format!("name the port of {}", plan.name))?,
        bridge,
        gateways: vec![gateway],
        addresses: vec![plan.address],
        mtu: None,
        forward: false,
    };
    attach(underlay, host, &request)
}

/// Joins a container to its host's bridge, and writes it down below `attachments`.
pub(crate) fn join_container(
    host: &Place,
    container: &Place,
    node: &NodePlan,
    plan: &ContainerPlan,
    mtu: Option<Mtu>,
    attachments: &Path,
) -> Result<(), LabError> {
    let request = Request {
        container_id: plan.name.clone(),
        ifname: eth0()?,
        netns: container.own_path().into(),
        host_device: plan.host_device,
        bridge: node.bridge,
        gateways: vec![node.gateway],
        addresses: vec![plan.address],
        mtu,
        forward: true,
    };
    let mut before = request.container_before();
    // A kernel without IPv6 has no such file.
    before.host.retain(|key, _| !matches!(key, Key::Sysctl(path) if sysctl::read(path).is_err()));
    container.make(&before)?;
    attach(host, container, &request)?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").act(|| "read the boot's id".into())?;
    let inode = fs::metadata(container.own_path()).act(|| format!("look at the namespace of {}", plan.name))?.ino();
    let mut record = request.record(boot.trim(), inode);
    record.netns = container.path(own_pid()?);
    let path = attachments.join(record.file_name());
    let text = record.to_json().act(|| format!("write {}", path.display()))?;
    files::write_atomic(&path, text.as_bytes(), 0o644).act(|| format!("write {}", path.display()))
}

fn attach(host: &Place, guest: &Place, request: &Request) -> Result<(), LabError> {
    host.make(&request.host_side())?;
    guest.make(&request.container_side())
}

fn eth0() -> Result<LinkName, LabError> {
    "eth0".parse().act(|| "name eth0".into())
}

/// This process as /proc numbers it: /proc belongs to the PID namespace outside.
pub(crate) fn own_pid() -> Result<u32, LabError> {
    let name = fs::read_link("/proc/self").act(|| "read /proc/self".into())?;
    name.to_string_lossy().parse().act(|| "read /proc/self".into())
}
