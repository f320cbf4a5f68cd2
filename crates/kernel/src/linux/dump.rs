//! Reading: everything, or just what a notification or a refusal has put in doubt.

use std::collections::BTreeSet;
use std::io;

use rustix::net::netdevice::name_to_index;
use twill_core::firewall::beside;
use twill_core::host::{Fdb, HostState, Key, Link, LinkKind, Object, PROTO_KERNEL, Route, TABLE_LOCAL};
use twill_core::net::LinkName;
use twill_core::reconcile::{Op, effect};

use super::{Depth, Firewall, Interest, LinuxKernel};
use crate::netlink::decode::{self, AF_BRIDGE, AF_INET, AF_INET6};
use crate::netlink::encode::rtm;
use crate::netlink::socket::Socket;
use crate::netlink::wire::{Message, Writer};
use crate::{KernelError, legacy};

const FAMILIES: [u8; 2] = [AF_INET, AF_INET6];

/// What of the mirror is in doubt, and is read anew in one go.
#[derive(Debug, Default)]
pub(super) struct Stale {
    /// Everything.
    pub(super) all: bool,
    /// These links alone.
    pub(super) links: BTreeSet<LinkName>,
    /// All addresses of the links of interest.
    pub(super) addrs: bool,
    /// All rules.
    pub(super) rules: bool,
    /// All nftables tables of interest.
    pub(super) tables: bool,
    /// All routes of these address families.
    pub(super) routes: BTreeSet<u8>,
    /// Neighbours and forwarding entries of these devices.
    pub(super) devices: BTreeSet<LinkName>,
}

impl Stale {
    /// The least that brings `key` up to date. Sysctls are polled instead.
    pub(super) fn add(&mut self, key: &Key) {
        match key {
            Key::Link(_) => self.all = true,
            Key::Addr(..) => self.addrs = true,
            Key::Neigh(link, _) | Key::Fdb(link, _) => {
                self.devices.insert(*link);
            }
            Key::Route(route) => self.route_family(route.dst.is_v4()),
            Key::Rule(_) => self.rules = true,
            Key::Table(_) | Key::Head(_) | Key::Leftover(_) => self.tables = true,
            Key::Sysctl(_) => {}
        }
    }

    pub(super) fn route_family(&mut self, v4: bool) {
        self.routes.insert(if v4 { AF_INET } else { AF_INET6 });
    }
}

impl LinuxKernel {
    /// Reads what is stale, and marks what differed.
    pub(super) fn refresh(&mut self, stale: Stale) -> io::Result<()> {
        if stale.all {
            self.pending.all = true;
            return self.read_all();
        }
        for name in stale.links {
            self.read_link(name)?;
        }
        if stale.addrs {
            self.exchange(Self::dump_addrs, |key| matches!(key, Key::Addr(..)))?;
        }
        if stale.rules {
            self.exchange(Self::dump_rules, |key| matches!(key, Key::Rule(_)))?;
        }
        if stale.tables {
            let of_firewall = |key: &Key| matches!(key, Key::Table(_) | Key::Head(_) | Key::Leftover(_));
            self.exchange(Self::dump_tables, of_firewall)?;
        }
        for family in stale.routes {
            let of_family = |key: &Key| matches!(key, Key::Route(r) if r.dst.is_v4() == (family == AF_INET));
            self.exchange(|kernel, fresh| kernel.dump_routes(fresh, family), of_family)?;
        }
        for device in stale.devices {
            if self.interest.covers(device) {
                let of_device = |key: &Key| matches!(key, Key::Neigh(l, _) | Key::Fdb(l, _) if *l == device);
                self.exchange(|kernel, fresh| kernel.dump_neighbours(fresh, Some(device)), of_device)?;
            }
        }
        Ok(())
    }

    /// Puts what `dump` finds in the place of what the mirror has `within` the same bounds.
    fn exchange(
        &mut self,
        dump: impl Fn(&mut Self, &mut HostState) -> io::Result<bool>,
        within: impl Fn(&Key) -> bool,
    ) -> io::Result<()> {
        let fresh = loop {
            let mut fresh = HostState::new();
            if dump(self, &mut fresh)? {
                break fresh;
            }
        };
        let gone = self.mirror.iter().filter(|(key, _)| within(key) && fresh.get(key).is_none());
        let gone: Vec<Key> = gone.map(|(key, _)| key.clone()).collect();
        gone.iter().for_each(|key| {
            self.mirror.remove(key);
        });
        self.mark(gone);
        for (key, object) in fresh.iter() {
            if self.mirror.get(key) != Some(object) {
                self.mirror.insert(object.clone());
                self.mark([key.clone()]);
            }
        }
        Ok(())
    }

    /// The whole namespace, anew; one kind after the other, so that no second mirror stands beside the first.
    pub(super) fn read_all(&mut self) -> io::Result<()> {
        // Notifications up to here are part of what is read now.
        self.monitor.as_mut().map(Socket::collect).transpose()?;
        match self.interest.links.clone() {
            Some(links) => links.into_iter().try_for_each(|name| self.read_link(name))?,
            None => self.exchange(Self::dump_links, |key| matches!(key, Key::Link(_)))?,
        }
        let kept = |interest: &Interest, key: &Key| match key {
            Key::Neigh(link, _) | Key::Fdb(link, _) => interest.covers(*link),
            Key::Sysctl(path) => interest.sysctls.contains(path),
            _ => true,
        };
        self.mirror.retain(|key, _| kept(&self.interest, key));
        let depth = self.interest.depth;
        let routes = if depth == Depth::Links { BTreeSet::new() } else { FAMILIES.into() };
        let rules = depth == Depth::Whole;
        let mut rest = Stale { addrs: true, rules, tables: true, routes, ..Stale::default() };
        match self.interest.devices.clone() {
            Some(devices) => rest.devices = devices,
            None => {
                let of_neighbours = |key: &Key| matches!(key, Key::Neigh(..) | Key::Fdb(..));
                self.exchange(|kernel, fresh| kernel.dump_neighbours(fresh, None), of_neighbours)?;
            }
        }
        self.refresh(rest)?;
        let sysctls = self.poll_sysctls();
        self.mark(sysctls);
        Ok(())
    }

    /// These keys may differ from what was planned with; when everything does, they need not be named.
    fn mark(&mut self, keys: impl IntoIterator<Item = Key>) {
        if !self.pending.all {
            self.pending.dirty.extend(keys);
        }
    }

    fn dump_links(&mut self, fresh: &mut HostState) -> io::Result<bool> {
        let mut found = Vec::new();
        self.names.clear();
        let whole = self.requests.dump(rtm::GETLINK, links, |m| {
            if m.kind == rtm::NEWLINK {
                found.push(m.payload.to_vec());
            }
        })?;
        for (index, name) in found.iter().filter_map(|payload| decode::link_name(payload)) {
            self.names.insert(index, name);
        }
        fresh
            .extend(found.iter().filter_map(|p| decode::link(p, &self.names)).map(|link| Object::Link(Box::new(link))));
        Ok(whole)
    }

    /// One link as it is now.
    pub(super) fn read_link(&mut self, name: LinkName) -> io::Result<()> {
        let fill = |w: &mut Writer| {
            links(w);
            w.text(decode::ifla::IFNAME, name.as_str());
        };
        let mut found = Vec::new();
        match self.requests.ask(rtm::GETLINK, fill, |m| found = m.payload.to_vec()) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                let gone = self.mirror.link(name).cloned();
                return gone.map_or(Ok(()), |gone| self.take_as_asked(&Op::Delete(Object::Link(Box::new(gone)))));
            }
            answered => answered?,
        }
        self.names.extend(decode::link_name(&found));
        self.mirror.extend(decode::link(&found, &self.names).map(|link| Object::Link(Box::new(link))));
        Ok(())
    }

    /// A link was made, changed or deleted. To read it at once would cost the kernel a wait: the other end of a pair is not up yet, and
    /// who asks for a link without a carrier has its queues stopped first (net/core/rtnetlink.c `rtnl_getlink`).
    pub(super) fn take_as_asked(&mut self, op: &Op) -> io::Result<()> {
        effect(&mut self.mirror, op);
        let Some(name) = op.object().key().link() else { return Ok(()) };
        match (op, self.names.index(name)) {
            (Op::Delete(_), Some(index)) => drop(self.names.remove(index)),
            (Op::Create(_) | Op::Recreate { .. }, _) => {
                self.names.insert(name_to_index(&self.requests, name.as_str())?, name)
            }
            _ => {}
        }
        Ok(())
    }

    /// A link was made here from another namespace, as the other end of a pair.
    pub(crate) fn take_as_made(&mut self, link: Link) -> Result<(), KernelError> {
        let name = link.name;
        let made = Op::Create(Object::Link(Box::new(link)));
        self.take_as_asked(&made).map_err(|error| KernelError::new(&format!("find {name}"), error))
    }

    fn dump_addrs(&mut self, fresh: &mut HostState) -> io::Result<bool> {
        let names = &self.names;
        let indexes: Vec<u32> = match &self.interest.links {
            Some(links) => links.iter().filter_map(|name| names.index(*name)).collect(),
            None => vec![0],
        };
        let mut whole = true;
        for index in indexes {
            let fill = |w: &mut Writer| {
                w.put(&[0; 4]);
                w.put(&index.to_ne_bytes());
            };
            let mut add = |m: Message<'_>| fresh.extend(decode::addr(m.payload, names).map(Object::Addr));
            whole &= self.requests.dump(rtm::GETADDR, fill, &mut add)?;
        }
        Ok(whole)
    }

    /// The routes of one address family.
    fn dump_routes(&mut self, fresh: &mut HostState, family: u8) -> io::Result<bool> {
        let names = &self.names;
        let fill = |w: &mut Writer| w.put(&[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        self.requests.dump(rtm::GETROUTE, fill, |m| {
            if let Some(route) = decode::route(m.payload, names).filter(is_of_interest) {
                add_twins(fresh, route);
            }
        })
    }

    fn dump_rules(&mut self, fresh: &mut HostState) -> io::Result<bool> {
        let mut whole = true;
        for family in FAMILIES {
            let fill = |w: &mut Writer| w.put(&[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            whole &=
                self.requests.dump(rtm::GETRULE, fill, |m| fresh.extend(decode::rule(m.payload).map(Object::Rule)))?;
        }
        Ok(whole)
    }

    /// A kernel that cannot be asked has no tables, and says so once it is to make one.
    fn dump_tables(&mut self, fresh: &mut HostState) -> io::Result<bool> {
        let Firewall::Open(nft) = &mut self.firewall else { return Ok(true) };
        match nft.tables() {
            Ok(tables) => {
                for table in tables {
                    fresh.extend(beside::found_in(&table));
                    fresh.insert(Object::Table(Box::new(table)));
                }
                let (tables, left) = legacy::read();
                self.legacy = tables;
                fresh.extend(left.into_iter().map(|left| Object::Leftover(Box::new(left))));
            }
            Err(error) => self.firewall = Firewall::Lacking(error),
        }
        Ok(true)
    }

    /// Neighbours and forwarding entries, of one device or of all. A bridge's stand under its ports.
    fn dump_neighbours(&mut self, fresh: &mut HostState, device: Option<LinkName>) -> io::Result<bool> {
        let index = match device.map(|name| self.names.index(name)) {
            None => 0,
            Some(Some(index)) => index,
            Some(None) => return Ok(true),
        };
        let bridge = device.and_then(|name| self.mirror.link(name)).map(|link| &link.kind);
        let bridge = matches!(bridge, Some(LinkKind::Bridge));
        let (names, interest) = (&self.names, &self.interest);
        let neigh = |w: &mut Writer| {
            w.put(&[0; 12]);
            if index != 0 {
                w.attr(decode::nda::IFINDEX, &index.to_ne_bytes());
            }
        };
        let whole = self
            .requests
            .dump(rtm::GETNEIGH, neigh, |m| fresh.extend(decode::neigh(m.payload, names).map(Object::Neigh)))?;
        let fdb = |w: &mut Writer| {
            w.put(&[AF_BRIDGE, 0, 0, 0]);
            w.put(&(if bridge { 0 } else { index }).to_ne_bytes());
            w.put(&[0; 4]);
            if bridge {
                w.attr(decode::nda::MASTER, &index.to_ne_bytes());
            }
        };
        let whole_fdb = self.requests.dump(rtm::GETNEIGH, fdb, |m| {
            let entry = decode::fdb(m.payload, names);
            let entry = entry.filter(|entry| interest.keeps(entry) && device.is_none_or(|name| name == entry.link));
            if let Some(entry) = entry {
                add_host(fresh, entry);
            }
        })?;
        Ok(whole & whole_fdb)
    }
}

/// Of table `local` only what somebody added: it stands before all other tables. The kernel's own come and go with addresses.
pub(super) fn is_of_interest(route: &Route) -> bool {
    route.key.table != TABLE_LOCAL || route.entries.first().is_some_and(|entry| entry.protocol != PROTO_KERNEL)
}

/// Appends a route's entries to those of its key.
pub(super) fn add_twins(state: &mut HostState, route: Route) {
    let key = Key::Route(route.key);
    let Some(Object::Route(have)) = state.remove(&key) else {
        state.insert(Object::Route(route));
        return;
    };
    let mut entries: Vec<_> = have.entries.into();
    entries.extend(Vec::from(route.entries));
    state.insert(Object::Route(Route { key: route.key, entries: entries.into() }));
}

/// Takes a route's entries out of those of its key.
pub(super) fn remove_entries(state: &mut HostState, gone: &Route) {
    let Some(Object::Route(have)) = state.remove(&Key::Route(gone.key)) else { return };
    let mut entries: Vec<_> = have.entries.into();
    entries.retain(|entry| !gone.entries.as_slice().contains(entry));
    if !entries.is_empty() {
        state.insert(Object::Route(Route { key: gone.key, entries: entries.into() }));
    }
}

/// Adds a forwarding entry, or one more host to an entry that is told once for each host.
pub(super) fn add_host(state: &mut HostState, mut fdb: Fdb) {
    if let Some(Object::Fdb(have)) = state.remove(&Key::Fdb(fdb.link, fdb.mac))
        && have.port == fdb.port
    {
        let mut hosts: Vec<_> = have.dst.into();
        hosts.extend(Vec::from(fdb.dst).into_iter().filter(|dst| !hosts.contains(dst)).collect::<Vec<_>>());
        fdb.dst = hosts.into();
    }
    state.insert(Object::Fdb(fdb));
}

/// Asks for links without their counters, which nobody reads here and the kernel adds up over all processors.
fn links(w: &mut Writer) {
    // struct ifinfomsg; RTEXT_FILTER_SKIP_STATS (include/uapi/linux/rtnetlink.h).
    w.put(&[0; 16]);
    w.attr(decode::ifla::EXT_MASK, &8u32.to_ne_bytes());
}
