//! A real network namespace: its mirror, kept by notifications, and the one way to change it.
//!
//! ```text
//!   kernel ──monitor──▶ notice ─┬─ says all: the mirror follows the message
//!                               └─ says too little: Stale ─▶ dump of just that ─▶ mirror, dirty keys
//!   Plan ──▶ apply ──batches──▶ kernel ──acknowledged──▶ mirror; the echo then says nothing new
//! ```

mod apply;
mod dump;
mod notice;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use twill_core::firewall::{Leftover, Table};
use twill_core::host::{Fdb, HostState, Key, Object};
use twill_core::net::{LinkName, MacAddr};
use twill_core::reconcile::{Changes, Outcome, Plan, Scope};

use self::apply::Applier;
use self::dump::Stale;
use crate::netlink::names::Names;
use crate::netlink::socket::Socket;
use crate::nft::Nft;
use crate::{Kernel, KernelError, legacy, sysctl};

/// RTNLGRP_LINK 1, NEIGH 3, IPV4_IFADDR 5, IPV4_ROUTE 7, IPV4_RULE 8, IPV6_IFADDR 9, IPV6_ROUTE 11, IPV6_RULE 19, NEXTHOP 32.
const GROUPS: u32 = (1 << 0) | (1 << 2) | (1 << 4) | (1 << 6) | (1 << 7) | (1 << 8) | (1 << 10) | (1 << 18) | (1 << 31);

/// How much of a namespace is read and followed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Depth {
    /// Links, addresses, routes and rules, and all that the kernel announces.
    #[default]
    Whole,
    /// Links, addresses and routes, for who makes one change and goes. What others do meanwhile is not seen: on a host where many change
    /// something at once, each would else be told of all that the others do.
    Routes,
    /// The same without routes.
    Links,
}

/// What of a namespace is worth a place in the mirror, beside links, addresses, routes and rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interest {
    /// Devices whose neighbours and forwarding entries are kept; `None`: every device.
    pub devices: Option<BTreeSet<LinkName>>,
    /// Sysctls that are kept, as paths below /proc/sys.
    pub sysctls: BTreeSet<Box<str>>,
    /// Our nftables table is kept, and those of others that may drop what we forward.
    pub firewall: bool,
    /// How much of the rest is kept.
    pub depth: Depth,
    /// These links and their addresses alone, for who follows nothing; `None`: every link.
    pub links: Option<BTreeSet<LinkName>>,
}

impl Interest {
    fn covers(&self, device: LinkName) -> bool {
        self.devices.as_ref().is_none_or(|devices| devices.contains(&device))
    }

    /// True for the devices that whoever looks keeps in order.
    fn reconciles(&self, device: LinkName) -> bool {
        self.devices.as_ref().is_some_and(|devices| devices.contains(&device))
    }

    /// A bridge lists the multicast addresses that it listens to itself. They come and go without a message, and nobody reconciles
    /// them: only who looks at everything sees them.
    fn keeps(&self, entry: &Fdb) -> bool {
        let listens = entry.port.is_none()
            && entry.dst.as_slice().is_empty()
            && !entry.mac.is_unicast()
            && entry.mac != MacAddr::ZERO;
        self.covers(entry.link) && !(listens && self.devices.is_some())
    }
}

/// The network namespace of the thread that opened it.
#[derive(Debug)]
pub struct LinuxKernel {
    requests: Socket,
    /// `None`: nothing is followed.
    monitor: Option<Socket>,
    firewall: Firewall,
    legacy: Vec<Table>,
    waker: Arc<OwnedFd>,
    names: Names,
    mirror: HostState,
    interest: Interest,
    pending: Changes,
}

/// nftables, where it is of interest.
#[derive(Debug)]
enum Firewall {
    Ignored,
    Open(Nft),
    /// Of interest, and this kernel does not have it: its word.
    Lacking(io::Error),
}

impl Firewall {
    fn open(wanted: bool) -> Self {
        match wanted.then(Nft::open) {
            None => Firewall::Ignored,
            Some(Ok(nft)) => Firewall::Open(nft),
            Some(Err(error)) => Firewall::Lacking(error),
        }
    }
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
        let socket =
            |groups| Socket::open(None, groups).map_err(|e| KernelError::new("open a routing netlink socket", e));
        let waker = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| KernelError::new("open an eventfd", e.into()))?;
        let requests = socket(0)?;
        let monitor = (interest.depth == Depth::Whole).then(|| socket(GROUPS)).transpose()?;
        if let Some(monitor) = &monitor {
            let filtered = monitor.ignore_echoes_of(requests.port());
            filtered.map_err(|e| KernelError::new("filter a routing netlink socket", e))?;
        }
        let mut kernel = Self {
            requests,
            monitor,
            firewall: Firewall::open(interest.firewall),
            legacy: Vec::new(),
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

    /// Why nftables, which is of interest, cannot be asked.
    pub fn without_nftables(&self) -> Option<&io::Error> {
        match &self.firewall {
            Firewall::Lacking(error) => Some(error),
            Firewall::Ignored | Firewall::Open(_) => None,
        }
    }

    /// Changes what is kept, and reads what is new. What was opened less than whole does not become so.
    pub fn set_interest(&mut self, interest: Interest) -> Result<(), KernelError> {
        if self.interest == interest {
            return Ok(());
        }
        if self.interest.firewall != interest.firewall {
            self.firewall = Firewall::open(interest.firewall);
        }
        self.interest = interest;
        self.pending.all = true;
        self.read(Scope::All)
    }

    /// Packs the mirror, after bulk work.
    pub fn pack(&mut self) {
        self.mirror.pack();
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

    /// The number of a device, which the rules of others may compare.
    pub fn index(&self, device: LinkName) -> Option<u32> {
        self.names.index(device)
    }

    /// The tables of legacy iptables, as they were last read.
    pub fn legacy(&self) -> &[Table] {
        &self.legacy
    }

    /// Reads legacy iptables, which announces nothing; gives the keys of what flannel left there that differs from the mirror.
    pub fn poll_legacy(&mut self) -> BTreeSet<Key> {
        let (tables, found) = legacy::read();
        self.legacy = tables;
        if !matches!(self.firewall, Firewall::Open(_)) {
            return BTreeSet::new();
        }
        let found: BTreeSet<Leftover> = found.into_iter().collect();
        // The mirror's last keys.
        let had = self
            .mirror
            .iter()
            .rev()
            .map_while(|(key, _)| if let Key::Leftover(left) = key { Some(left) } else { None });
        let had: BTreeSet<Leftover> = had.filter(|left| left.legacy).map(|left| Leftover::clone(left)).collect();
        let mut dirty = BTreeSet::new();
        for left in &found ^ &had {
            let key = Key::Leftover(Box::new(left.clone()));
            if found.contains(&left) {
                self.mirror.insert(Object::Leftover(Box::new(left)));
            } else {
                self.mirror.remove(&key);
            }
            dirty.insert(key);
        }
        dirty
    }
}

impl Kernel for LinuxKernel {
    fn mirror(&self) -> &HostState {
        &self.mirror
    }

    fn read(&mut self, scope: Scope<'_>) -> Result<(), KernelError> {
        let failed = |e: io::Error| KernelError::new("read the network namespace", e);
        match scope {
            Scope::All => self.read_all().map_err(failed),
            Scope::Keys(keys) => {
                if keys.iter().any(|key| matches!(key, Key::Sysctl(_))) {
                    self.poll_sysctls();
                }
                let mut stale = Stale::default();
                keys.iter().for_each(|key| match key {
                    Key::Link(name) if self.monitor.is_none() => drop(stale.links.insert(*name)),
                    key => stale.add(key),
                });
                self.refresh(stale).map_err(failed)
            }
        }
    }

    fn apply(&mut self, plan: &Plan) -> Outcome {
        Applier::new(self, plan).run()
    }

    fn changes(&mut self, timeout: Option<Duration>) -> Result<Changes, KernelError> {
        let failed = |e: io::Error| KernelError::new("wait for notifications", e);
        let limit = timeout.map(|t| Timespec { tv_sec: t.as_secs() as _, tv_nsec: t.subsec_nanos().into() });
        let mut fds = vec![PollFd::new(&*self.waker, PollFlags::IN)];
        fds.extend(self.monitor.iter().map(|monitor| PollFd::new(monitor, PollFlags::IN)));
        if let Firewall::Open(nft) = &self.firewall {
            fds.push(PollFd::new(nft, PollFlags::IN));
        }
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
