//! The plan: what differs, in an order that can be applied.
//!
//! 1. devices, since everything stands on them: create, change in place, or re-create
//! 2. what is missing or differs, in key order (make before break)
//! 3. what is ours and not wanted, in reverse key order

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use crate::host::{Few, HostState, Key, Link, LinkKind, Object, PROTO_KERNEL, Route, RouteEntry};
use crate::net::LinkName;

use super::{Desired, Op, Plan, Scope, Step, StepId, Why, effect};

/// The steps that bring what is ours in `have` to `want`, looking at `scope` only.
///
/// When a device is touched, its dependants are looked at whether or not `scope` names them, since the kernel drops some of them
/// without a word.
pub fn plan(want: &Desired, have: &HostState, scope: Scope<'_>) -> Plan {
    let mut draft = Draft { steps: Vec::new(), links: BTreeMap::new(), table: None };
    links(&mut draft, want, have, scope);
    let mut after = Cow::Borrowed(have);
    let mut scope = scope;
    if !draft.steps.is_empty() {
        let after = after.to_mut();
        draft.steps.iter().for_each(|step| effect(after, &step.op));
        scope = Scope::All;
    }
    match scope {
        Scope::All => {
            want.host.iter().for_each(|(key, object)| draft.make(want, have, &after, key, object));
            let unwanted = after.iter().filter(|(key, _)| want.claim.may_own(key) && want.host.get(key).is_none());
            let unwanted: Vec<&Object> = unwanted.map(|(_, object)| object).collect();
            unwanted.into_iter().rev().for_each(|object| draft.prune(want, &after, object));
        }
        Scope::Keys(keys) => {
            for (key, object) in keys.iter().filter_map(|key| Some((key, want.host.get(key)?))) {
                draft.make(want, have, &after, key, object);
            }
            let unwanted = keys.iter().rev().filter(|key| want.host.get(key).is_none());
            unwanted.filter_map(|key| after.get(key)).for_each(|object| draft.prune(want, &after, object));
        }
    }
    Plan { steps: draft.steps }
}

/// A plan in the making.
struct Draft {
    steps: Vec<Step>,
    /// The step that makes or changes a device: what stands on it waits for it.
    links: BTreeMap<LinkName, StepId>,
    /// The step that makes our table: what it takes the place of waits for it.
    table: Option<StepId>,
}

impl Draft {
    fn push(&mut self, op: Op, why: Why) {
        let object = op.object();
        let link = match object {
            Object::Link(link) => link.master,
            Object::Route(route) => route.entries.first().and_then(|entry| entry.dev),
            Object::Sysctl { path, .. } => sysctl_link(path),
            other => other.key().link(),
        };
        let makes = matches!((&op, object), (Op::Create(_) | Op::Update { .. }, Object::Table(_)));
        let replaced = matches!((&op, object), (Op::Delete(_), Object::Table(_) | Object::Leftover(_)));
        let table = self.table.filter(|_| replaced);
        let needs = link.and_then(|link| self.links.get(&link)).copied().into_iter().chain(table).collect();
        if makes {
            self.table = Some(self.steps.len() as StepId);
        }
        self.steps.push(Step { op, needs, why });
    }

    /// Step 2: one wanted object that is not a device. `before` is what was there, `after` what the device steps leave.
    fn make(&mut self, want: &Desired, before: &HostState, after: &HostState, key: &Key, object: &Object) {
        if matches!(object, Object::Link(_)) {
            return;
        }
        let Some(found) = after.get(key) else {
            let why = if before.get(key).is_some() { Why::Cascade } else { Why::Missing };
            return self.push(Op::Create(object.clone()), why);
        };
        match (object, found) {
            (Object::Route(wanted), Object::Route(found)) => self.make_route(want, wanted, found),
            // Somebody else's table of this name is a finding, not ours to replace.
            (Object::Table(ours), Object::Table(found)) if !found.is_ours() && !found.is_as_made(ours) => {}
            _ if object.satisfied_by(found) => {}
            _ => self.push(Op::Update { from: found.clone(), to: object.clone() }, Why::Differs),
        }
    }

    /// The wanted entry must be there, and no other of ours beside it. Foreign twins stay: they are a finding, not ours to remove.
    fn make_route(&mut self, want: &Desired, wanted: &Route, found: &Route) {
        let entries = found.entries.as_slice();
        let is_wanted = |entry: &RouteEntry| wanted.entries.first() == Some(entry);
        // A wanted route that goes through our device is ours under any protocol number: somebody has altered it.
        let on_our_device = |entry: &RouteEntry| entry.dev.is_some_and(|dev| want.claim.devices.contains(&dev));
        let is_ours = |entry: &RouteEntry| {
            want.claim.owns_entry(found, entry)
                || (on_our_device(entry) && entry.protocol != PROTO_KERNEL)
                || entry.usurper.0
        };
        let present = entries.iter().position(is_wanted);
        if present.is_some() && entries.iter().filter(|entry| is_ours(entry)).all(is_wanted) {
            return;
        }
        let stays = |entry: &&RouteEntry| !is_wanted(entry) && !is_ours(entry);
        let mut stay: Vec<_> = entries.iter().filter(stays).cloned().collect();
        // Where the kernel puts it: in the place of the first one, or behind all.
        let place = match present {
            Some(at) => entries[..at].iter().filter(stays).count(),
            None if entries.first().is_some_and(is_ours) => 0,
            None => stay.len(),
        };
        stay.splice(place..place, wanted.entries.as_slice().iter().cloned());
        let to = Object::Route(Route { key: wanted.key, entries: Few::from(stay) });
        if entries.iter().any(is_ours) {
            self.push(Op::Update { from: Object::Route(found.clone()), to }, Why::Differs);
        } else {
            self.push(Op::Create(Object::Route(wanted.clone())), Why::Missing);
        }
    }

    /// Step 3: one object that nothing wants.
    fn prune(&mut self, want: &Desired, after: &HostState, object: &Object) {
        if !want.claim.owns(object) {
            return;
        }
        // What stands on a device that goes, goes with it.
        let stands_on = object.key().link().filter(|_| !matches!(object, Object::Link(_)));
        if let Some(link) = stands_on
            && (after.link(link).is_none() || goes(want, link))
        {
            return;
        }
        let object = match object {
            Object::Route(route) => {
                let ours = route.entries.as_slice().iter().filter(|e| want.claim.owns_entry(route, e));
                let ours: Vec<_> = ours.filter(|e| e.dev.is_none_or(|dev| !goes(want, dev))).cloned().collect();
                if ours.is_empty() {
                    return;
                }
                Object::Route(Route { key: route.key, entries: Few::from(ours) })
            }
            other => other.clone(),
        };
        self.push(Op::Delete(object), Why::NotWanted);
    }
}

/// True when this plan's claim removes the device.
fn goes(want: &Desired, link: LinkName) -> bool {
    want.claim.devices.contains(&link) && want.host.link(link).is_none()
}

/// Step 1: devices, each before its ports.
fn links(draft: &mut Draft, want: &Desired, have: &HostState, scope: Scope<'_>) {
    let mut ports = Vec::new();
    let wanted: Vec<&Link> = match scope {
        Scope::All => want.host.range(..Key::Sysctl("".into())).filter_map(|(_, o)| as_link(o)).collect(),
        Scope::Keys(keys) => {
            let names: BTreeSet<LinkName> = keys.iter().filter_map(Key::link).collect();
            names.into_iter().filter_map(|name| want.host.link(name)).collect()
        }
    };
    for link in wanted {
        if link.master.is_some() {
            ports.push(link);
        } else {
            make_link(draft, link, have);
        }
    }
    ports.into_iter().for_each(|link| make_link(draft, link, have));
}

fn make_link(draft: &mut Draft, link: &Link, have: &HostState) {
    let to = Object::Link(Box::new(link.clone()));
    let (op, why) = match have.link(link.name) {
        None => match namesake(link, have) {
            Some(found) => (Op::Recreate { from: Object::Link(Box::new(found.clone())), to }, Why::Renamed),
            None => (Op::Create(to), Why::Missing),
        },
        Some(found) if to.satisfied_by(&Object::Link(Box::new(found.clone()))) => return,
        Some(found) => {
            let from = Object::Link(Box::new(found.clone()));
            if changes_in_place(link, found) {
                (Op::Update { from, to }, Why::Differs)
            } else {
                (Op::Recreate { from, to }, Why::CannotChangeInPlace)
            }
        }
    };
    draft.push(op, why);
    draft.links.insert(link.name, draft.steps.len() as StepId - 1);
}

/// The wanted tunnel under another name: the kernel has room for one device with this VNI and port, and the MAC is ours.
fn namesake<'a>(want: &Link, have: &'a HostState) -> Option<&'a Link> {
    let twins = same_tunnel(want, have);
    twins.into_iter().find(|twin| want.mac.is_some() && twin.mac == want.mac)
}

/// Other devices that take the VNI and port of a wanted tunnel (drivers/net/vxlan/vxlan_core.c `vxlan_vni_in_use`).
pub(super) fn same_tunnel<'a>(want: &Link, have: &'a HostState) -> Vec<&'a Link> {
    let LinkKind::Vxlan(wanted) = &want.kind else { return Vec::new() };
    let same = |link: &&Link| {
        matches!(&link.kind, LinkKind::Vxlan(found) if link.name != want.name
        && (found.vni, found.port, found.is_v4()) == (wanted.vni, wanted.port, wanted.is_v4()))
    };
    have.range(..Key::Sysctl("".into())).filter_map(|(_, object)| as_link(object)).filter(same).collect()
}

fn as_link(object: &Object) -> Option<&Link> {
    match object {
        Object::Link(link) => Some(link),
        _ => None,
    }
}

/// VNI, port, GBP, flags and limit cannot change on a living VXLAN (`vxlan_nl2conf` answers EOPNOTSUPP), nor can the kind of a device.
fn changes_in_place(want: &Link, have: &Link) -> bool {
    match (&want.kind, &have.kind) {
        (LinkKind::Vxlan(w), LinkKind::Vxlan(h)) => {
            (w.vni, w.port, w.gbp, w.special, w.room.limit) == (h.vni, h.port, h.gbp, h.special, h.room.limit)
        }
        (LinkKind::Veth { .. }, LinkKind::Veth { .. }) => true,
        (w, h) => w == h,
    }
}

/// The device that a per-device sysctl belongs to: `net/ipv4/conf/DEVICE/…`.
fn sysctl_link(path: &str) -> Option<LinkName> {
    let mut parts = path.split('/');
    let conf = parts.nth(2)?;
    let device = parts.next()?;
    if conf != "conf" && conf != "neigh" || device == "all" || device == "default" { None } else { device.parse().ok() }
}
