//! CHECK: is the container attached as ADD left it? Every difference is named.
//!
//! A configuration that was edited since is no difference: CNI 1.1.0 expects what `prevResult` says, and lets a runtime take a failed CHECK
//! for a container that is broken for good. (The reference bridge compares its name and `promiscMode` with the configuration, nothing else.)

use std::net::IpAddr;
use std::path::Path;

use serde_json::Value;
use twill_core::attach::{Attachment, Request, Way};
use twill_core::host::{Link, Object};
use twill_core::net::{Inet, LinkName, Mtu};
use twill_core::reconcile::{Desired, Op};
use twill_kernel::{attach as kernel, files};

use super::add::way;
use super::{netns, refused};
use crate::conf::Conf;
use crate::env::Target;
use crate::error::{CniError, Code};
use crate::ipam::{Folder, who};
use crate::ports::Ports;
use crate::records::Records;
use crate::result::{Answer, Interface, RouteTo, Version};

/// Runs CHECK.
pub fn run(conf: Conf, target: &Target) -> Result<String, CniError> {
    if conf.version < Version::V040 {
        let msg = format!("CHECK came with CNI {}", conf.version.as_str());
        return Err(CniError::new(
            Code::Version,
            msg,
            "there is a CHECK from 0.4.0 on: raise the configuration's cniVersion",
        ));
    }
    let Some(prev) = &conf.prev else {
        return Err(CniError::new(
            Code::Config,
            "CHECK came without prevResult",
            "the runtime has to pass on what ADD answered",
        ));
    };
    if conf.device.is_none() {
        return finish(alone(&conf, target, prev)?);
    }
    let path = target.netns()?;
    let (container, _) = netns(path)?;
    let records = Records::new(conf.attachments());
    let Some(record) = records.get(&target.container_id, target.ifname)? else {
        return finish(vec!["its attachment file is missing".to_owned()]);
    };
    let request = Request { netns: path.into(), ..record.request.clone() };
    let told = Told { prev, request: &request, is_tuned: is_tuned(target) };
    let mut found = told.differences();
    found.extend(addresses(&record)?);
    if let Some(ports) = Ports::lock_for(&records, &request)? {
        found.extend(ports.differences(&request)?);
    }
    let host = kernel::differences(|have| Ok(told.beside(request.host_side(have)?, None))).and_then(|mut plan| {
        plan.steps.extend(kernel::differences(|_| Ok(request.forwarding()))?.steps);
        Ok(plan)
    });
    let side = told.beside(request.container_side(), Some(path));
    let inside = container
        .visit(|| kernel::differences(|_| Ok(side.clone())))
        .map_err(kernel::Failed::Enter)
        .and_then(|plan| plan);
    for (place, plan) in [("host", host), ("container", inside)] {
        let plan = plan.map_err(|failed| refused(failed, &records))?;
        found.extend(plan.steps.iter().map(|step| format!("{place}: {}", differs(&step.op))));
    }
    let port = kernel::hindered_port(request.host_device).map_err(|failed| refused(failed, &records))?;
    found.extend(
        port.iter()
            .map(|(is, wanted)| format!("host: {}: its bridge port is {is}, wanted: {wanted}", request.host_device)),
    );
    finish(found)
}

fn finish(found: Vec<String>) -> Result<String, CniError> {
    if found.is_empty() {
        return Ok(String::new());
    }
    Err(CniError::new(Code::Differs, found.join("; "), "start the container anew: ADD makes all of it"))
}

/// What the runtime says that ADD answered, beside what ADD wrote down.
struct Told<'a> {
    prev: &'a Answer,
    request: &'a Request,
    /// The container's MTU is another plugin's.
    is_tuned: bool,
}

/// Where the reference plugin `tuning` keeps what it has changed of a container's device, for its own DEL.
const TUNING: &str = "/run/cni/tuning";
/// More bytes than such a file has.
const TUNING_LIMIT: u64 = 1 << 12;

/// A chained `tuning` has set the MTU: it says so nowhere else, and its own CHECK compares it.
fn is_tuned(target: &Target) -> bool {
    let path = Path::new(TUNING).join(format!("{}_{}.json", target.container_id, target.ifname));
    let kept = files::read_limited(&path, TUNING_LIMIT).ok().flatten();
    let kept: Option<Value> = kept.and_then(|text| serde_json::from_slice(&text).ok());
    kept.is_some_and(|kept| kept["mtu"].is_u64())
}

/// What a veth has that nobody gave an MTU (ETH_DATA_LEN).
const PLAIN_MTU: i64 = 1500;

impl Told<'_> {
    /// A device of the answer: of the host, or of the container.
    fn interface(&self, name: LinkName, inside: bool) -> Option<&Interface> {
        let is_inside = |of: &Interface| of.sandbox.as_ref().is_some_and(|sandbox| !sandbox.is_empty());
        self.prev.interfaces.iter().find(|of| of.name == name.as_str() && is_inside(of) == inside)
    }

    /// What the answer and the attachment file do not have in common.
    fn differences(&self) -> Vec<String> {
        let Self { prev, request, .. } = self;
        let mut found = Vec::new();
        let devices = request.bridge.into_iter().chain([request.host_device]).map(|name| (name, false));
        for (name, inside) in devices.chain([(request.ifname, true)]) {
            // Before 0.3 nobody told of devices; whoever tells of any tells of all.
            if !prev.interfaces.is_empty() && self.interface(name, inside).is_none() {
                found.push(format!("prevResult lacks the interface {name}"));
            }
        }
        let own = prev.interfaces.iter().position(|of| self.interface(request.ifname, true) == Some(of));
        for inet in &request.addresses {
            match prev.ips.iter().find(|told| told.address.addr == inet.addr) {
                None => found.push(format!("prevResult lacks the address {inet}")),
                Some(told) if told.address != *inet => {
                    found.push(format!("prevResult has the address {}, wanted: {inet}", told.address));
                }
                Some(told) if told.interface.is_some() && told.interface != own => {
                    found.push(format!("prevResult has the address {inet} on another interface"));
                }
                Some(told) => {
                    let gateway = request.gateways.iter().find(|of| of.addr.is_ipv4() == inet.addr.is_ipv4());
                    if let (Some(told), Some(gateway)) = (told.gateway, gateway)
                        && told != gateway.addr
                    {
                        found.push(format!("prevResult has the gateway {told}, wanted: {}", gateway.addr));
                    }
                }
            }
        }
        for told in prev.ips.iter().filter(|told| told.interface.is_none() || told.interface == own) {
            if !request.addresses.iter().any(|inet| inet.addr == told.address.addr) {
                found.push(format!("prevResult has the address {}, which ADD did not give", told.address));
            }
        }
        found
    }

    /// What ADD made, as the answer tells of it: a plugin behind ours may have changed a MAC or an MTU, or added a route. A bridge may
    /// have its MAC from a port.
    fn beside(&self, mut side: Desired, sandbox: Option<&str>) -> Desired {
        let (name, inside) =
            (if sandbox.is_some() { self.request.ifname } else { self.request.host_device }, sandbox.is_some());
        if let Some(link) = side.host.link(name) {
            let told = self.interface(name, inside);
            let told_mtu = told.and_then(|told| told.mtu).and_then(|mtu| Mtu::try_from(i64::from(mtu)).ok());
            let mut link = link.clone();
            link.mac = told.and_then(|told| told.mac).or(link.mac);
            link.mtu = told_mtu.or(link.mtu).or(Mtu::try_from(PLAIN_MTU).ok()).filter(|_| !(inside && self.is_tuned));
            side.host.insert(Object::Link(Box::new(link)));
        }
        // Without ARP nobody finds anybody. A bridge without an address is asked nothing.
        let bridge = self.request.bridge.filter(|_| !inside);
        let is_asked = bridge.is_none() || !self.request.gateways.is_empty();
        if let Some(link) = side.host.link(bridge.unwrap_or(name)).filter(|_| is_asked) {
            side.host.insert(Object::Link(Box::new(Link { arp: Some(true), ..link.clone() })));
        }
        if inside {
            let known = |route: &RouteTo| {
                self.request
                    .routes
                    .iter()
                    .any(|way| way.dst == route.dst && (route.gw.is_none() || way.via == route.gw))
            };
            let more = self.prev.routes.iter().filter(|route| !known(route));
            let told = |route: &RouteTo| way(route, &[]).unwrap_or_else(|_| Way::new(route.dst, route.gw));
            side.host.extend(more.map(|route| told(route).route(name)));
        }
        side
    }
}

/// The address files of what prevResult says, for somebody else's plugin: what ADD wrote down, else one address of each range.
fn alone(conf: &Conf, target: &Target, prev: &Answer) -> Result<Vec<String>, CniError> {
    let Some(ipam) = &conf.ipam else { return Ok(Vec::new()) };
    let record = Records::new(conf.attachments()).get(&target.container_id, target.ifname)?;
    let is_own = |record: &Attachment| record.network.as_ref().is_some_and(|network| network.name == conf.name);
    if let Some(record) = record.filter(|record| record.alone.is_some() && is_own(record)) {
        let is_told = |inet: &&Inet| prev.ips.iter().any(|ip| ip.address.addr == inet.addr);
        let untold = record.request.addresses.iter().filter(|inet| !is_told(inet));
        let mut found: Vec<String> = untold.map(|inet| format!("prevResult lacks the address {inet}")).collect();
        found.extend(addresses(&record)?);
        return Ok(found);
    }
    let Some(folder) = Folder::find(&ipam.dir)? else { return Ok(vec![format!("{} is missing", ipam.dir.display())]) };
    let mut found = Vec::new();
    for set in &ipam.sets {
        let told: Vec<_> = prev.ips.iter().map(|ip| ip.address.addr).filter(|ip| set.find(*ip).is_some()).collect();
        if told.is_empty() {
            found.push(format!("prevResult lacks an address of {set}"));
        }
        for ip in told {
            found.extend(held(&folder, ip, &target.container_id, target.ifname.as_str())?);
        }
    }
    Ok(found)
}

/// What is wrong with an address file.
fn held(folder: &Folder, ip: IpAddr, container_id: &str, ifname: &str) -> Result<Option<String>, CniError> {
    Ok(match folder.holder(ip)? {
        Some(holder) if holder.is(container_id, ifname) => None,
        Some(holder) => Some(format!("the address {ip} is held by {}", who(Some(&holder)))),
        None => Some(format!("the address file of {ip} is missing")),
    })
}

/// The address files of an attachment.
fn addresses(record: &Attachment) -> Result<Vec<String>, CniError> {
    let Some(network) = record.network.as_ref().filter(|network| !network.dir.is_empty()) else {
        return Ok(Vec::new());
    };
    let Some(folder) = Folder::find(network.dir.as_ref().as_ref())? else {
        return Ok(vec![format!("{} is missing", network.dir)]);
    };
    let Request { container_id, ifname, addresses, .. } = &record.request;
    let found = addresses.iter().map(|inet| held(&folder, inet.addr, container_id, ifname.as_str()));
    found.filter_map(Result::transpose).collect()
}

/// A step that would be needed, as what is wrong.
fn differs(op: &Op) -> String {
    match op {
        Op::Create(object) => format!("{object} is missing"),
        Op::Delete(object) => format!("{object} is too much"),
        Op::Update { from: Object::Link(from), to: Object::Link(to) }
        | Op::Recreate { from: Object::Link(from), to: Object::Link(to) } => link(from, to),
        Op::Update { from: Object::Sysctl { path, value }, to } => format!("{path} is {value}, wanted: {to}"),
        Op::Update { from, to } | Op::Recreate { from, to } => format!("{from} is there, wanted: {to}"),
    }
}

fn link(is: &Link, wanted: &Link) -> String {
    let text = |value: &dyn std::fmt::Display| value.to_string();
    let mut found = Vec::new();
    let mut compare = |what: &str, is: Option<String>, wanted: Option<String>| {
        if let Some(wanted) = wanted
            && is.as_ref() != Some(&wanted)
        {
            found.push(format!("{what} is {}, wanted: {wanted}", is.as_deref().unwrap_or("none")));
        }
    };
    compare("MAC", is.mac.map(|mac| text(&mac)), wanted.mac.map(|mac| text(&mac)));
    compare("MTU", is.mtu.map(|mtu| text(&mtu)), wanted.mtu.map(|mtu| text(&mtu)));
    let state = |link: &Link| Some(if link.up { "up" } else { "down" }.to_owned());
    compare("state", state(is), state(wanted));
    compare("bridge", is.master.map(|name| text(&name)), wanted.master.map(|name| text(&name)));
    let flag = |on: bool| Some(if on { "on" } else { "off" }.to_owned());
    let port = is.port.unwrap_or_default();
    compare("hairpin", flag(port.hairpin), wanted.port.and_then(|port| flag(port.hairpin)));
    compare("isolation", flag(port.isolated), wanted.port.and_then(|port| flag(port.isolated)));
    compare("ARP", flag(is.arp != Some(false)), wanted.arp.and_then(flag));
    compare("promiscuous mode", flag(is.promisc == Some(true)), wanted.promisc.and_then(flag));
    if found.is_empty() {
        format!("{is} is there, wanted: {wanted}")
    } else {
        format!("{}: {}", wanted.name, found.join(", "))
    }
}
