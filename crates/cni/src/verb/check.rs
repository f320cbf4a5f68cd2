//! CHECK: is the container attached as ADD left it? Every difference is named.

use twill_core::attach::{Attachment, Request};
use twill_core::host::{Link, Object};
use twill_core::reconcile::{Desired, Op};
use twill_kernel::attach as kernel;

use super::{netns, refused};
use crate::conf::Conf;
use crate::env::Target;
use crate::error::{CniError, Code};
use crate::ipam::{Folder, who};
use crate::ports::Ports;
use crate::records::Records;
use crate::result::{Answer, Version};

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
    let mut found = against(prev, &request);
    found.extend(addresses(&record)?);
    if let Some(ports) = Ports::lock_for(&records, &request)? {
        found.extend(ports.differences(&request)?);
    }
    let host = kernel::differences(|have| request.host_side(have)).and_then(|mut plan| {
        plan.steps.extend(kernel::differences(|_| Ok(request.forwarding()))?.steps);
        Ok(plan)
    });
    let wanted = |side: Desired| kernel::differences(move |_| Ok(side.clone()));
    let inside =
        container.visit(|| wanted(request.container_side())).map_err(kernel::Failed::Enter).and_then(|plan| plan);
    for (place, plan) in [("host", host), ("container", inside)] {
        let plan = plan.map_err(|failed| refused(failed, &records))?;
        found.extend(plan.steps.iter().map(|step| format!("{place}: {}", differs(&step.op))));
    }
    finish(found)
}

fn finish(found: Vec<String>) -> Result<String, CniError> {
    if found.is_empty() {
        return Ok(String::new());
    }
    Err(CniError::new(Code::Differs, found.join("; "), "start the container anew: ADD makes all of it"))
}

/// What the runtime says that ADD answered, beside what ADD wrote down.
fn against(prev: &Answer, request: &Request) -> Vec<String> {
    let told = |ip: &std::net::IpAddr| prev.ips.iter().any(|told| told.address.addr == *ip);
    let missing = request.addresses.iter().filter(|inet| !told(&inet.addr));
    missing.map(|inet| format!("prevResult lacks the address {inet}")).collect()
}

/// The address files of what prevResult says, for somebody else's plugin.
fn alone(conf: &Conf, target: &Target, prev: &Answer) -> Result<Vec<String>, CniError> {
    let Some(ipam) = &conf.ipam else { return Ok(Vec::new()) };
    let Some(folder) = Folder::find(&ipam.dir)? else { return Ok(vec![format!("{} is missing", ipam.dir.display())]) };
    let held = folder.held()?;
    let mine = held.iter().filter(|held| {
        held.holder.as_ref().is_some_and(|holder| holder.is(&target.container_id, target.ifname.as_str()))
    });
    let told = prev.ips.iter().any(|ip| mine.clone().any(|held| held.ip == ip.address.addr));
    Ok(if told { Vec::new() } else { vec!["no address of prevResult is held by this container".to_owned()] })
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
    let mut found = Vec::new();
    for ip in addresses.iter().map(|inet| inet.addr) {
        match folder.holder(ip)? {
            Some(holder) if holder.is(container_id, ifname.as_str()) => {}
            Some(holder) => found.push(format!("the address {ip} is held by {}", who(Some(&holder)))),
            None => found.push(format!("the address file of {ip} is missing")),
        }
    }
    Ok(found)
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
    compare("promiscuous mode", flag(is.promisc == Some(true)), wanted.promisc.and_then(flag));
    if found.is_empty() {
        format!("{is} is there, wanted: {wanted}")
    } else {
        format!("{}: {}", wanted.name, found.join(", "))
    }
}
