//! A real network namespace: its mirror, kept by notifications, and the one way to change it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use twill_core::host::{Fdb, HostState, Key, Object, Route, TABLE_LOCAL};
use twill_core::net::LinkName;
use twill_core::reconcile::{Changes, Op, Outcome, Plan, Scope, StepError, effect};

use crate::netlink::decode::{self, AF_BRIDGE};
use crate::netlink::encode::{Encoder, rtm};
use crate::netlink::names::Names;
use crate::netlink::socket::{Refusal, Socket};
use crate::netlink::wire::{self, Message, Writer, flag};
use crate::{Kernel, KernelError, sysctl};

/// RTNLGRP_LINK 1, NEIGH 3, IPV4_IFADDR 5, IPV4_ROUTE 7, IPV4_RULE 8, IPV6_IFADDR 9, IPV6_ROUTE 11, IPV6_RULE 19.
const GROUPS: u32 = (1 << 0) | (1 << 2) | (1 << 4) | (1 << 6) | (1 << 7) | (1 << 8) | (1 << 10) | (1 << 18);
/// Kernel memory that a small message takes in a receive buffer, rounded up.
const TRUESIZE: usize = 2048;

/// What of a namespace is worth a place in the mirror, beside links, addresses, routes and rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interest {
    /// Devices whose neighbours and forwarding entries are kept; `None`: every device.
    pub devices: Option<BTreeSet<LinkName>>,
    /// Sysctls that are kept, as paths below /proc/sys.
    pub sysctls: BTreeSet<Box<str>>,
}

impl Interest {
    fn covers(&self, device: LinkName) -> bool {
        self.devices.as_ref().is_none_or(|devices| devices.contains(&device))
    }
}

/// The network namespace of the thread that opened it.
#[derive(Debug)]
pub struct LinuxKernel {
    requests: Socket,
    monitor: Socket,
    waker: Arc<OwnedFd>,
    names: Names,
    mirror: HostState,
    interest: Interest,
    pending: Changes,
}

/// Wakes a [`LinuxKernel`] that waits in `changes`, from any thread.
#[derive(Debug, Clone)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Ends the wait.
    pub fn wake(&self) {
        // A full counter wakes as well.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

impl LinuxKernel {
    /// Opens the calling thread's namespace and reads all of it.
    pub fn open(interest: Interest) -> Result<Self, KernelError> {
        let socket = |groups| Socket::open(groups).map_err(|e| KernelError::new("open a routing netlink socket", e));
        let waker = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| KernelError::new("open an eventfd", e.into()))?;
        let mut kernel = Self {
            requests: socket(0)?,
            monitor: socket(GROUPS)?,
            waker: Arc::new(waker),
            names: Names::default(),
            mirror: HostState::new(),
            interest,
            pending: Changes { all: true, ..Changes::default() },
        };
        kernel.read(Scope::All)?;
        Ok(kernel)
    }

    /// A handle that ends a wait.
    pub fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.waker))
    }

    /// What is kept.
    pub fn interest(&self) -> &Interest {
        &self.interest
    }

    /// Changes what is kept, and reads what is new.
    pub fn set_interest(&mut self, interest: Interest) -> Result<(), KernelError> {
        if self.interest == interest {
            return Ok(());
        }
        self.interest = interest;
        self.read(Scope::All)
    }

    /// Reads the sysctls of interest; gives the keys of those that differ from the mirror.
    pub fn poll_sysctls(&mut self) -> BTreeSet<Key> {
        let mut dirty = BTreeSet::new();
        for path in &self.interest.sysctls {
            let key = Key::Sysctl(path.clone());
            let found = sysctl::read(path).ok().map(|value| Object::Sysctl { path: path.clone(), value: value.into() });
            if self.mirror.get(&key) != found.as_ref() {
                match found {
                    Some(object) => self.mirror.insert(object),
                    None => self.mirror.remove(&key),
                };
                dirty.insert(key);
            }
        }
        dirty
    }

    /// The whole namespace, anew.
    fn read_all(&mut self) -> io::Result<()> {
        loop {
            // Notifications up to here are part of what is read now.
            self.monitor.collect()?;
            let mut fresh = HostState::new();
            self.names.clear();
            let whole = self.dump_links(&mut fresh)? & self.dump_addrs(&mut fresh)? & self.dump_routes(&mut fresh)?;
            let whole = whole & self.dump_rules(&mut fresh)? & self.dump_neighbours(&mut fresh)?;
            if whole {
                for path in &self.interest.sysctls {
                    if let Ok(value) = sysctl::read(path) {
                        fresh.insert(Object::Sysctl { path: path.clone(), value: value.into() });
                    }
                }
                self.mirror = fresh;
                return Ok(());
            }
        }
    }

    fn dump_links(&mut self, fresh: &mut HostState) -> io::Result<bool> {
        let mut found = Vec::new();
        let whole = self.requests.dump(
            rtm::GETLINK,
            |w| w.put(&[0; 16]),
            |m| {
                if m.kind == rtm::NEWLINK {
                    found.push(m.payload.to_vec());
                }
            },
        )?;
        for (index, name) in found.iter().filter_map(|payload| decode::link_name(payload)) {
            self.names.insert(index, name);
        }
        fresh
            .extend(found.iter().filter_map(|p| decode::link(p, &self.names)).map(|link| Object::Link(Box::new(link))));
        Ok(whole)
    }

    fn dump_addrs(&mut self, fresh: &mut HostState) -> io::Result<bool> {
        let names = &self.names;
        self.requests.dump(
            rtm::GETADDR,
            |w| w.put(&[0; 8]),
            |m| fresh.extend(decode::addr(m.payload, names).map(Object::Addr)),
        )
    }

    fn dump_routes(&mut self, fresh: &mut HostState) -> io::Result<bool> {
        let names = &self.names;
        let mut whole = true;
        for family in [decode::AF_INET, decode::AF_INET6] {
            let fill = |w: &mut Writer| w.put(&[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            whole &= self.requests.dump(rtm::GETROUTE, fill, |m| {
                if let Some(route) = decode::route(m.payload, names).filter(|r| r.key.table != TABLE_LOCAL) {
                    add_twins(fresh, route);
                }
            })?;
        }
        Ok(whole)
    }

    fn dump_rules(&mut self, fresh: &mut HostState) -> io::Result<bool> {
        let mut whole = true;
        for family in [decode::AF_INET, decode::AF_INET6] {
            let fill = |w: &mut Writer| w.put(&[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            whole &=
                self.requests.dump(rtm::GETRULE, fill, |m| fresh.extend(decode::rule(m.payload).map(Object::Rule)))?;
        }
        Ok(whole)
    }

    /// Neighbours and forwarding entries, of the devices of interest or of all.
    fn dump_neighbours(&mut self, fresh: &mut HostState) -> io::Result<bool> {
        let indices: Vec<u32> = match &self.interest.devices {
            None => vec![0],
            Some(devices) => devices.iter().filter_map(|name| self.names.index(*name)).collect(),
        };
        let names = &self.names;
        let mut whole = true;
        for index in indices {
            let neigh = |w: &mut Writer| {
                w.put(&[0; 12]);
                if index != 0 {
                    w.attr(decode::nda::IFINDEX, &index.to_ne_bytes());
                }
            };
            whole &= self
                .requests
                .dump(rtm::GETNEIGH, neigh, |m| fresh.extend(decode::neigh(m.payload, names).map(Object::Neigh)))?;
            let fdb = |w: &mut Writer| {
                w.put(&[AF_BRIDGE, 0, 0, 0]);
                w.put(&index.to_ne_bytes());
                w.put(&[0; 4]);
            };
            whole &= self.requests.dump(rtm::GETNEIGH, fdb, |m| {
                if let Some(entry) = decode::fdb(m.payload, names) {
                    add_host(fresh, entry);
                }
            })?;
        }
        Ok(whole)
    }

    /// Takes in what the kernel has announced.
    fn absorb(&mut self) -> io::Result<()> {
        let (told, lost) = self.monitor.collect()?;
        let mut reread = lost;
        for message in wire::messages(&told) {
            reread |= self.on_notification(&message);
        }
        if reread {
            self.read_all()?;
            self.pending.all = true;
        }
        Ok(())
    }
}

impl Kernel for LinuxKernel {
    fn mirror(&self) -> &HostState {
        &self.mirror
    }

    fn read(&mut self, scope: Scope<'_>) -> Result<(), KernelError> {
        // Single keys are kept by notifications; what is asked for by name are sysctls, and everything else is one dump.
        if let Scope::Keys(keys) = scope
            && keys.iter().all(|key| matches!(key, Key::Sysctl(_)))
        {
            self.poll_sysctls();
            return Ok(());
        }
        self.read_all().map_err(|e| KernelError::new("read the network namespace", e))
    }

    fn apply(&mut self, plan: &Plan) -> Outcome {
        Applier::new(self, plan).run()
    }

    fn changes(&mut self, timeout: Option<Duration>) -> Result<Changes, KernelError> {
        let failed = |e: io::Error| KernelError::new("wait for notifications", e);
        let limit = timeout.map(|t| Timespec { tv_sec: t.as_secs() as _, tv_nsec: t.subsec_nanos().into() });
        let mut fds = [PollFd::new(&self.monitor, PollFlags::IN), PollFd::new(&*self.waker, PollFlags::IN)];
        let limit = if self.pending.all || !self.pending.dirty.is_empty() { Some(Timespec::default()) } else { limit };
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
        let _ = rustix::io::read(&*self.waker, &mut [0; 8]);
        self.absorb().map_err(failed)?;
        Ok(std::mem::take(&mut self.pending))
    }
}

/// Notifications.
impl LinuxKernel {
    /// Brings the mirror up to date with one message; true: only a full read can.
    fn on_notification(&mut self, message: &Message<'_>) -> bool {
        match message.kind {
            rtm::NEWLINK => self.on_link(message),
            rtm::DELLINK => self.on_link_gone(message),
            rtm::NEWADDR | rtm::DELADDR => self.on_addr(message),
            rtm::NEWROUTE | rtm::DELROUTE => self.on_route(message),
            rtm::NEWNEIGH | rtm::DELNEIGH => self.on_neighbour(message),
            rtm::NEWRULE | rtm::DELRULE => self.on_rule(message),
            _ => false,
        }
    }

    /// A link message is a doorbell: what hangs on the device goes without a message of its own.
    fn on_link(&mut self, message: &Message<'_>) -> bool {
        // Bridges repeat their ports' messages in their own family.
        if message.payload.first() != Some(&0) {
            return false;
        }
        let Some((index, name)) = decode::link_name(message.payload) else { return false };
        let renamed = self.names.name(index).is_some_and(|old| old != name);
        self.names.insert(index, name);
        let Some(link) = decode::link(message.payload, &self.names) else { return false };
        let Some(was) = self.mirror.link(name).cloned().filter(|_| !renamed) else {
            self.mirror.insert(Object::Link(Box::new(link)));
            self.pending.dirty.insert(Key::Link(name));
            self.pending.all = true;
            // A device of interest may have been born with neighbours and routes between two messages.
            return renamed || self.interest.covers(name) && self.interest.devices.is_some();
        };
        if was == link {
            return false;
        }
        let shakes = was.up != link.up || was.mac != link.mac;
        let op = Op::Update { from: Object::Link(Box::new(was)), to: Object::Link(Box::new(link.clone())) };
        if shakes {
            effect(&mut self.mirror, &op);
            self.pending.all = true;
        }
        self.mirror.insert(Object::Link(Box::new(link)));
        self.pending.dirty.insert(Key::Link(name));
        false
    }

    fn on_link_gone(&mut self, message: &Message<'_>) -> bool {
        if message.payload.first() != Some(&0) {
            return false;
        }
        let index = wire::u32_at(message.payload, 4).unwrap_or(0);
        let Some(name) = self.names.remove(index) else { return false };
        // A name that was given to a new device in the meantime is the new device's.
        if self.names.index(name).is_none()
            && let Some(link) = self.mirror.link(name).cloned()
        {
            effect(&mut self.mirror, &Op::Delete(Object::Link(Box::new(link))));
            self.pending.dirty.insert(Key::Link(name));
            self.pending.all = true;
        }
        false
    }

    fn on_addr(&mut self, message: &Message<'_>) -> bool {
        let Some(addr) = decode::addr(message.payload, &self.names) else { return false };
        let object = Object::Addr(addr);
        let key = object.key();
        if message.kind == rtm::NEWADDR {
            if self.mirror.get(&key) != Some(&object) {
                self.mirror.insert(object);
                self.pending.dirty.insert(key);
            }
        } else if self.mirror.get(&key).is_some() {
            // Connected routes and those with this source go with it, partly without a message.
            effect(&mut self.mirror, &Op::Delete(object));
            self.pending.dirty.insert(key);
            self.pending.all = true;
        }
        false
    }

    /// Twins make a key's order unknowable from messages: then the tables are read anew.
    fn on_route(&mut self, message: &Message<'_>) -> bool {
        let Some(route) = decode::route(message.payload, &self.names).filter(|r| r.key.table != TABLE_LOCAL) else {
            return false;
        };
        let key = Key::Route(route.key);
        let have = match self.mirror.get(&key) {
            Some(Object::Route(have)) => have.entries.as_slice(),
            _ => &[],
        };
        let told = route.entries.as_slice();
        if message.kind == rtm::NEWROUTE {
            if have == told {
                return false;
            }
            self.pending.dirty.insert(key.clone());
            let replaces = message.flags & flag::REPLACE != 0;
            if have.is_empty() || (replaces && have.len() == 1) {
                self.mirror.insert(Object::Route(route));
                return false;
            }
            return true;
        }
        if !told.iter().any(|entry| have.contains(entry)) {
            return false;
        }
        self.pending.dirty.insert(key.clone());
        if have == told {
            self.mirror.remove(&key);
            return false;
        }
        true
    }

    fn on_neighbour(&mut self, message: &Message<'_>) -> bool {
        let Some(name) = decode::neigh_index(message.payload).and_then(|index| self.names.name(index)) else {
            return false;
        };
        if !self.interest.covers(name) {
            return false;
        }
        let is_fdb = message.payload.first() == Some(&AF_BRIDGE);
        let object = if is_fdb {
            decode::fdb(message.payload, &self.names).map(Object::Fdb)
        } else {
            decode::neigh(message.payload, &self.names).map(Object::Neigh)
        };
        let Some(object) = object else { return false };
        let key = object.key();
        if message.kind == rtm::DELNEIGH {
            // Of an entry with several hosts one has gone.
            let several = matches!(self.mirror.get(&key), Some(Object::Fdb(fdb)) if fdb.dst.as_slice().len() > 1);
            if self.mirror.remove(&key).is_some() {
                self.pending.dirty.insert(key);
            }
            return several;
        }
        if self.mirror.get(&key) != Some(&object) {
            self.pending.dirty.insert(key);
            match object {
                Object::Fdb(fdb) if !fdb.mac.is_unicast() => add_host(&mut self.mirror, fdb),
                object => {
                    self.mirror.insert(object);
                }
            }
        }
        false
    }

    fn on_rule(&mut self, message: &Message<'_>) -> bool {
        let Some(rule) = decode::rule(message.payload) else { return false };
        let object = Object::Rule(rule);
        self.pending.dirty.insert(object.key());
        if message.kind == rtm::NEWRULE {
            self.mirror.insert(object)
        } else {
            self.mirror.remove(&object.key())
        };
        false
    }
}

/// One run through a plan.
struct Applier<'a> {
    kernel: &'a mut LinuxKernel,
    plan: &'a Plan,
    outcome: Outcome,
    writer: Writer,
    files: Vec<File>,
    /// The steps of the batch that is being written, with the numbers of their requests.
    batch: Vec<(RangeInclusive<u32>, usize)>,
    seq: u32,
    limit: usize,
}

impl<'a> Applier<'a> {
    fn new(kernel: &'a mut LinuxKernel, plan: &'a Plan) -> Self {
        let room = kernel.requests.granted().min(kernel.monitor.granted()) / TRUESIZE;
        Self {
            plan,
            outcome: Outcome { steps: Vec::with_capacity(plan.steps.len()) },
            writer: Writer::default(),
            files: Vec::new(),
            batch: Vec::new(),
            seq: 0,
            limit: room.clamp(32, 1024),
            kernel,
        }
    }

    fn run(mut self) -> Outcome {
        for (n, step) in self.plan.steps.iter().enumerate() {
            // The index of a device that is not made yet cannot be written.
            if step.needs.iter().any(|need| self.batch.iter().any(|(_, step)| *step == *need as usize))
                || self.batch.len() >= self.limit
            {
                self.flush();
            }
            let failed =
                step.needs.iter().find(|need| self.outcome.steps.get(**need as usize).is_some_and(Result::is_err));
            if let Some(need) = failed {
                self.outcome.steps.push(Err(StepError::Skipped(*need)));
                continue;
            }
            let first = self.seq + 1;
            let result = self.write(&step.op);
            if result.is_ok() && !matches!(step.op.object(), Object::Sysctl { .. }) {
                self.batch.push((first..=self.seq, n));
            }
            self.outcome.steps.push(result);
        }
        self.flush();
        self.outcome
    }

    /// Writes a step's requests into the batch; a sysctl is done at once.
    fn write(&mut self, op: &Op) -> Result<(), StepError> {
        if let Object::Sysctl { path, value } = op.object() {
            return sysctl::write(path, value)
                .map_err(|e| StepError::Refused {
                    errno: e.raw_os_error().unwrap_or(libc::EIO),
                    text: format!("write {path}: {e}"),
                })
                .map(|()| {
                    self.kernel.mirror.insert(op.object().clone());
                });
        }
        let before = self.writer.buf.len();
        let mut encoder =
            Encoder { writer: &mut self.writer, names: &self.kernel.names, seq: &mut self.seq, files: &mut self.files };
        encoder.op(op).map_err(|text| {
            self.writer.buf.truncate(before);
            StepError::Refused { errno: libc::ENODEV, text }
        })
    }

    /// Sends the batch, notes what was refused, and brings the mirror along.
    fn flush(&mut self) {
        let batch = std::mem::take(&mut self.batch);
        let mut writer = std::mem::take(&mut self.writer);
        if batch.is_empty() {
            return;
        }
        writer.ask_ack();
        let refused = self.kernel.requests.batch(&writer, self.seq);
        self.files.clear();
        match refused {
            Err(error) => {
                let refusal =
                    Refusal { seq: 0, errno: error.raw_os_error().unwrap_or(libc::EIO), text: error.to_string() };
                batch.iter().for_each(|(_, step)| self.refuse(*step, &refusal));
                self.kernel.pending.all = true;
                let _ = self.kernel.read_all();
            }
            Ok(refused) => {
                for (numbers, step) in &batch {
                    match refused.iter().find(|r| numbers.contains(&r.seq)) {
                        Some(refusal) => self.refuse(*step, refusal),
                        None => self.done(*step),
                    }
                }
            }
        }
        // Own echoes are drained between batches, so that they cannot overrun the monitor.
        let _ = self.kernel.absorb();
    }

    fn refuse(&mut self, step: usize, refusal: &Refusal) {
        let text = refusal.text.clone();
        self.outcome.steps[step] = Err(StepError::Refused { errno: refusal.errno, text });
        // "It is there" and "it is not there" mean that the mirror was wrong.
        if [libc::EEXIST, libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::EADDRNOTAVAIL].contains(&refusal.errno) {
            self.kernel.pending.all |= self.kernel.read_all().is_ok();
        }
    }

    fn done(&mut self, step: usize) {
        let op = &self.plan.steps[step].op;
        if matches!(op.object(), Object::Link(_)) {
            // Index, MAC and cascades come with the link's own messages.
            let _ = self.kernel.absorb();
            return;
        }
        match op {
            Op::Delete(Object::Route(gone)) => remove_entries(&mut self.kernel.mirror, gone),
            Op::Create(Object::Route(made)) => {
                if !matches!(self.kernel.mirror.get(&op.object().key()), Some(Object::Route(have)) if have.entries == made.entries)
                {
                    add_twins(&mut self.kernel.mirror, made.clone());
                }
            }
            op => effect(&mut self.kernel.mirror, op),
        }
    }
}

/// Appends a route's entries to those of its key.
fn add_twins(state: &mut HostState, route: Route) {
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
fn remove_entries(state: &mut HostState, gone: &Route) {
    let Some(Object::Route(have)) = state.remove(&Key::Route(gone.key)) else { return };
    let mut entries: Vec<_> = have.entries.into();
    entries.retain(|entry| !gone.entries.as_slice().contains(entry));
    if !entries.is_empty() {
        state.insert(Object::Route(Route { key: gone.key, entries: entries.into() }));
    }
}

/// Adds a forwarding entry, or one more host to an entry that is told once for each host.
fn add_host(state: &mut HostState, mut fdb: Fdb) {
    if let Some(Object::Fdb(have)) = state.remove(&Key::Fdb(fdb.link, fdb.mac))
        && have.port == fdb.port
    {
        let mut hosts: Vec<_> = have.dst.into();
        hosts.extend(Vec::from(fdb.dst).into_iter().filter(|dst| !hosts.contains(dst)).collect::<Vec<_>>());
        fdb.dst = hosts.into();
    }
    state.insert(Object::Fdb(fdb));
}
