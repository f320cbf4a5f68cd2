//! What is ours to change and to remove.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::firewall::TableName;
use crate::firewall::beside::is_flannels;
use crate::host::{Key, Object, PROTO_BOOT, PROTO_KERNEL, Route, RouteEntry};
use crate::net::{LinkName, Prefix};

/// What is ours. Everything else is looked at and left alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// Our devices (the wanted ones and those that the state file remembers), with all addresses, permanent neighbours
    /// and permanent forwarding entries on them.
    pub devices: BTreeSet<LinkName>,
    /// Routes with this protocol number, in any table.
    pub protocol: Option<u8>,
    /// Boot-protocol routes inside these networks on our devices: what flannel left.
    pub networks: Vec<Prefix>,
    /// Own subnets: a boot-protocol blackhole of one of them is what flannel left, which would take the place of the bridge's route.
    pub subnets: Vec<Prefix>,
    /// nftables tables that Twill made (but that of the containers' ports, which follows their attachments), and rules that it put into the chains of others.
    pub firewall: bool,
    /// Tables and chains that flannel left.
    pub flannels_firewall: bool,
}

impl Claim {
    /// True when `object` is ours although nothing may want it. What the kernel makes by itself (connected routes,
    /// link-local addresses, multicast neighbours, learned entries) is never ours.
    pub fn owns(&self, object: &Object) -> bool {
        match object {
            Object::Link(link) => self.devices.contains(&link.name),
            Object::Addr(addr) => self.devices.contains(&addr.link) && !is_kernel_made(addr.inet.addr),
            Object::Neigh(neigh) => self.devices.contains(&neigh.link) && neigh.permanent,
            Object::Fdb(fdb) => self.devices.contains(&fdb.link) && fdb.state & NUD_STATIC != 0,
            Object::Route(route) => route.entries.as_slice().iter().any(|entry| self.owns_entry(route, entry)),
            Object::Table(table) => {
                (self.firewall && table.is_ours() && table.name != TableName::twill_cni())
                    || (self.flannels_firewall && is_flannels(&table.name))
            }
            Object::Head(_) => self.firewall,
            Object::Leftover(left) => {
                self.flannels_firewall
                    && left.comment.is_none()
                    && left.bare.is_none_or(|network| self.networks.contains(&network))
            }
            Object::Sysctl { .. } | Object::Rule(_) => false,
        }
    }

    /// True for a route that we, or the flannel before us, added.
    pub fn owns_entry(&self, route: &Route, entry: &RouteEntry) -> bool {
        if entry.protocol == PROTO_KERNEL {
            return false;
        }
        let on_our_device = entry.dev.is_some_and(|dev| self.devices.contains(&dev));
        let in_network = self.networks.iter().any(|network| network.covers(&route.key.dst));
        let unused = entry.kind == RTN_BLACKHOLE && self.subnets.contains(&route.key.dst);
        self.protocol == Some(entry.protocol)
            || (entry.protocol == PROTO_BOOT && (on_our_device && in_network || unused))
    }

    /// True when the object with `key` could be ours by its key alone; a cheap filter before [`Claim::owns`].
    pub fn may_own(&self, key: &Key) -> bool {
        match key {
            Key::Link(l) | Key::Addr(l, _) | Key::Neigh(l, _) | Key::Fdb(l, _) => self.devices.contains(l),
            Key::Route(_) => true,
            Key::Table(_) | Key::Head(_) | Key::Leftover(_) => self.firewall || self.flannels_firewall,
            Key::Sysctl(_) | Key::Rule(_) => false,
        }
    }
}

/// A route that drops.
const RTN_BLACKHOLE: u8 = 6;

/// NUD_PERMANENT and NUD_NOARP: a forwarding entry that was written, not learned.
const NUD_STATIC: u16 = 0x80 | 0x40;

/// IPv6 link-local addresses come and go with the device.
fn is_kernel_made(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(a) if a.is_unicast_link_local() || a.is_multicast())
}
