//! Notifications: what the kernel says by itself, and what has to be read because it does not say enough.

use std::io;
use std::net::IpAddr;

use twill_core::host::{Key, Link, LinkKind, Object, Remark, Route, RouteEntry, RouteKey};
use twill_core::net::{LinkName, Prefix};
use twill_core::reconcile::{Op, effect};

use super::dump::{Stale, add_host, is_of_interest};
use super::{Firewall, LinuxKernel};
use crate::netlink::decode::{self, AF_BRIDGE};
use crate::netlink::encode::rtm;
use crate::netlink::socket::Socket;
use crate::netlink::wire::{self, Message, flag};

/// The least key of a route.
const FIRST_ROUTE: RouteKey = RouteKey { table: 0, dst: Prefix::DEFAULT_V4, tos: 0, metric: 0 };

impl LinuxKernel {
    /// Takes in what the kernel has announced.
    pub(super) fn absorb(&mut self) -> io::Result<()> {
        let (told, lost) = self.monitor.as_mut().map_or_else(|| Ok(Default::default()), Socket::collect)?;
        let mut stale = Stale { all: lost, ..Stale::default() };
        if let Firewall::Open(nft) = &mut self.firewall {
            stale.tables = nft.changed()?;
        }
        for message in wire::messages(&told) {
            self.on_notification(&message, &mut stale);
        }
        self.refresh(stale)
    }

    /// Brings the mirror up to date with one message, or says what has to be read.
    fn on_notification(&mut self, message: &Message<'_>, stale: &mut Stale) {
        match message.kind {
            rtm::NEWLINK => self.on_link(message, stale),
            rtm::DELLINK => self.on_link_gone(message, stale),
            rtm::NEWADDR | rtm::DELADDR => self.on_addr(message, stale),
            rtm::NEWROUTE | rtm::DELROUTE => self.on_route(message, stale),
            rtm::NEWNEIGH | rtm::DELNEIGH => self.on_neighbour(message, stale),
            rtm::NEWRULE | rtm::DELRULE => self.on_rule(message),
            rtm::NEWNEXTHOP | rtm::DELNEXTHOP => self.on_nexthop(stale),
            _ => {}
        }
    }

    /// Routes that lead to a nexthop object change and go with it, and IPv4's say nothing. They go after the message: a link is read
    /// first, which waits for whoever holds the kernel's lock.
    fn on_nexthop(&self, stale: &mut Stale) {
        for (_, object) in self.mirror.range(Key::Route(FIRST_ROUTE)..) {
            let Object::Route(route) = object else { continue };
            if route.entries.as_slice().iter().any(|entry| entry.special) {
                stale.links.extend("lo".parse::<LinkName>());
                stale.route_family(route.key.dst.is_v4());
            }
        }
    }

    /// A link message is a doorbell: what hangs on the device goes without a message of its own.
    fn on_link(&mut self, message: &Message<'_>, stale: &mut Stale) {
        // Bridges repeat their ports' messages in their own family.
        if message.payload.first() != Some(&0) {
            return;
        }
        let Some((index, name)) = decode::link_name(message.payload) else { return };
        let renamed = self.names.name(index).is_some_and(|old| old != name);
        self.names.insert(index, name);
        let Some(link) = decode::link(message.payload, &self.names) else { return };
        let Some(was) = self.mirror.link(name).cloned().filter(|_| !renamed) else {
            return self.on_new_link(link, renamed, stale);
        };
        // A bridge moves its own entries from port to port silently, even where the port stays as it was.
        stale.devices.extend(link.master);
        if was == link {
            return;
        }
        let mac = was.mac != link.mac;
        if mac || was.master != link.master {
            stale.devices.extend([was.master, Some(name)].into_iter().flatten());
        }
        self.pending.all |= was.up != link.up || mac;
        // What comes with "up" is told; what goes with "down" and with a MAC is not.
        if (was.up && !link.up) || mac {
            self.doubt_routes(name, None, stale);
            stale.addrs |= !link.up;
            let mut to = link.clone();
            to.up &= was.up;
            effect(&mut self.mirror, &Op::Update { from: link_object(was), to: link_object(to) });
        }
        self.mirror.insert(link_object(link));
        self.pending.dirty.insert(Key::Link(name));
    }

    fn on_new_link(&mut self, link: Link, renamed: bool, stale: &mut Stale) {
        let name = link.name;
        stale.all |= renamed;
        // Entries that a device is born with are told before the device itself.
        stale.devices.extend([Some(name), link.master].into_iter().flatten());
        stale.addrs |= self.interest.covers(name);
        // The other end was told first, when this one had no name yet.
        if let LinkKind::Veth { peer: Some(peer), .. } = &link.kind
            && let Some(mut other) = self.mirror.link(*peer).cloned()
            && let LinkKind::Veth { peer: back @ None, .. } = &mut other.kind
        {
            *back = Some(name);
            self.mirror.insert(link_object(other));
        }
        self.mirror.insert(link_object(link));
        self.pending.dirty.insert(Key::Link(name));
        self.pending.all = true;
    }

    fn on_link_gone(&mut self, message: &Message<'_>, stale: &mut Stale) {
        if message.payload.first() != Some(&0) {
            return;
        }
        let index = wire::u32_at(message.payload, 4).unwrap_or(0);
        let Some(name) = self.names.remove(index) else { return };
        // A name that was given to a new device in the meantime is the new device's.
        if self.names.index(name).is_none()
            && let Some(link) = self.mirror.link(name).cloned()
        {
            stale.devices.extend(link.master);
            self.doubt_routes(name, None, stale);
            effect(&mut self.mirror, &Op::Delete(link_object(link)));
            self.pending.dirty.insert(Key::Link(name));
            self.pending.all = true;
        }
    }

    /// The routes of `link`, and those with source `src`, may have gone silently, or stay in part (a dead hop among several).
    ///
    /// The kernel's own IPv6 link-local and multicast routes are told one by one: the end of a container costs no dump.
    fn doubt_routes(&self, link: LinkName, src: Option<IpAddr>, stale: &mut Stale) {
        for (key, object) in self.mirror.range(Key::Route(FIRST_ROUTE)..) {
            let (Key::Route(route), Object::Route(Route { entries, .. })) = (key, object) else { continue };
            let told = matches!(route.dst.addr(), IpAddr::V6(a) if a.is_unicast_link_local() || a.is_multicast());
            let hit = |entry: &RouteEntry| entry.dev == Some(link) || (src.is_some() && entry.extras().src == src);
            if !told && entries.as_slice().iter().any(hit) {
                stale.route_family(route.dst.is_v4());
            }
        }
    }

    fn on_addr(&mut self, message: &Message<'_>, stale: &mut Stale) {
        let Some(addr) = decode::addr(message.payload, &self.names) else { return };
        let object = Object::Addr(addr.clone());
        let key = object.key();
        if message.kind == rtm::NEWADDR {
            if self.mirror.get(&key) != Some(&object) {
                self.mirror.insert(object);
                self.pending.dirty.insert(key);
            }
        } else if self.mirror.get(&key).is_some() {
            // Connected routes and those with this source go with it, partly without a message.
            self.doubt_routes(addr.link, Some(addr.inet.addr), stale);
            effect(&mut self.mirror, &Op::Delete(object));
            self.pending.dirty.insert(key);
            self.pending.all = true;
        }
    }

    /// Twins make a key's order unknowable from messages: then the tables are read anew.
    fn on_route(&mut self, message: &Message<'_>, stale: &mut Stale) {
        let Some(route) = decode::route(message.payload, &self.names).filter(is_of_interest) else {
            return;
        };
        let (key, v4) = (Key::Route(route.key), route.key.dst.is_v4());
        let have = match self.mirror.get(&key) {
            Some(Object::Route(have)) => have.entries.as_slice(),
            _ => &[],
        };
        let told = route.entries.as_slice();
        let replaces = message.flags & flag::REPLACE != 0;
        if message.kind == rtm::NEWROUTE {
            if have == told {
                return;
            }
            if have.is_empty() || (replaces && have.len() == 1) {
                let usurps = have.first().and_then(|gone| gone.dev).is_some_and(|dev| self.interest.reconciles(dev));
                self.pending.dirty.insert(key);
                self.mirror.insert(Object::Route(if usurps { usurping(route) } else { route }));
                return;
            }
        } else if have == told {
            self.mirror.remove(&key);
            self.pending.dirty.insert(key);
            return;
        } else if !told.iter().any(|entry| have.contains(entry)) {
            return;
        }
        self.pending.dirty.insert(key);
        stale.route_family(v4);
    }

    fn on_neighbour(&mut self, message: &Message<'_>, stale: &mut Stale) {
        let object = if message.payload.first() == Some(&AF_BRIDGE) {
            decode::fdb(message.payload, &self.names).filter(|fdb| self.interest.keeps(fdb)).map(Object::Fdb)
        } else {
            let neigh = decode::neigh(message.payload, &self.names);
            neigh.filter(|neigh| self.interest.covers(neigh.link)).map(Object::Neigh)
        };
        let Some(object) = object else { return };
        let key = object.key();
        if message.kind == rtm::DELNEIGH {
            // Of an entry with several hosts one has gone.
            if matches!(self.mirror.get(&key), Some(Object::Fdb(fdb)) if fdb.dst.as_slice().len() > 1) {
                stale.add(&key);
            }
            if self.mirror.remove(&key).is_some() {
                self.pending.dirty.insert(key);
            }
        } else if self.mirror.get(&key) != Some(&object) {
            match object {
                Object::Fdb(fdb) if !fdb.mac.is_unicast() => {
                    let known = matches!(self.mirror.get(&key), Some(Object::Fdb(have))
                        if fdb.dst.as_slice().iter().all(|dst| have.dst.as_slice().contains(dst)));
                    if known {
                        return;
                    }
                    add_host(&mut self.mirror, fdb);
                }
                object => {
                    self.mirror.insert(object);
                }
            }
            self.pending.dirty.insert(key);
        }
    }

    fn on_rule(&mut self, message: &Message<'_>) {
        let Some(rule) = decode::rule(message.payload) else { return };
        let object = Object::Rule(rule);
        self.pending.dirty.insert(object.key());
        if message.kind == rtm::NEWRULE {
            self.mirror.insert(object)
        } else {
            self.mirror.remove(&object.key())
        };
    }
}

/// The route as one that took the place of another.
fn usurping(route: Route) -> Route {
    let mark = |entry| RouteEntry { usurper: Remark(true), ..entry };
    let entries: Vec<RouteEntry> = Vec::from(route.entries).into_iter().map(mark).collect();
    Route { key: route.key, entries: entries.into() }
}

fn link_object(link: Link) -> Object {
    Object::Link(Box::new(link))
}
