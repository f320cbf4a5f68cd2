//! Carrying out what `core::attach` decides, for the CNI plugin and the lab alike.
//!
//! ```text
//!   container: loopback, IPv6 off or on ─▶ host: bridge, pair ─▶ container: device, addresses, routes ─▶ host: forwarding
//!                                             └──────── a failure takes back what was made ◀───────┘
//! ```
//! Forwarding comes last, and is taken back first, unless another container needs it by now.

use std::collections::BTreeSet;
use std::{io, thread};

use twill_core::attach::{Clash, Request, SWITCHES_INSIDE, switches};
use twill_core::firewall::{Table, TableName};
use twill_core::host::{HostState, Key, Link, LinkKind, Object};
use twill_core::net::LinkName;
use twill_core::reconcile::{Claim, Desired, Op, Plan, Scope, Step, StepError, Why, plan};

use crate::netns::Netns;
use crate::nft::{Nft, lacks_nftables};
use crate::wires::{VethEnd, Wires};
use crate::{Depth, Interest, Kernel, KernelError, LinuxKernel, sysctl};

/// How often a plan is made anew because somebody else was faster.
const TRIES: usize = 4;

/// What was not done, and why.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// The namespace could not be read.
    #[error("{}: {}", .0.act, .0.source)]
    Kernel(#[from] KernelError),
    /// A step was refused.
    #[error("{act}: {cause}")]
    Step {
        /// Act and object.
        act: String,
        /// The kernel's word.
        cause: StepError,
    },
    /// The bridge is somebody else's.
    #[error("{0}")]
    Clash(#[from] Clash),
    /// The firewall's table has somebody else's content.
    #[error("the table {0} is there, and Twill did not make it")]
    TableTaken(TableName),
    /// The container has a device of this name.
    #[error("the container has a device {0} already")]
    NameTaken(LinkName),
    /// The container's namespace could not be entered.
    #[error("enter the container's network namespace: {0}")]
    Enter(#[from] io::Error),
    /// And what could not be taken back.
    #[error("{first}; then {then}")]
    And {
        /// What failed first.
        first: Box<Failed>,
        /// What failed while it was undone.
        then: Box<Failed>,
    },
}

impl Failed {
    /// What failed as well.
    fn and(self, then: Failed) -> Failed {
        Failed::And { first: Box::new(self), then: Box::new(then) }
    }
}

/// What is looked at: these sysctls, and the rest as deep as it says; of links these alone, where there are any.
fn interest(sysctls: impl IntoIterator<Item = Box<str>>, depth: Depth, links: &[LinkName]) -> Interest {
    let links = (!links.is_empty()).then(|| links.iter().copied().collect());
    let sysctls = sysctls.into_iter().collect();
    Interest { devices: Some(BTreeSet::new()), sysctls, firewall: false, depth, links }
}

/// The sysctls that are wanted.
fn sysctls(want: &Desired) -> impl Iterator<Item = Box<str>> {
    want.host.iter().filter_map(|(key, _)| match key {
        Key::Sysctl(path) => Some(path.clone()),
        _ => None,
    })
}

/// Reads the calling thread's namespace, a container's: a new one has no device yet, and then no route.
fn open_inside() -> Result<LinuxKernel, KernelError> {
    let mut kernel = LinuxKernel::open(interest(SWITCHES_INSIDE.map(Box::from), Depth::Links, &[]))?;
    if has_devices(kernel.mirror()) {
        widen(&mut kernel)?;
    }
    Ok(kernel)
}

/// More than the loopback device.
fn has_devices(have: &HostState) -> bool {
    have.iter().any(|(_, o)| matches!(o, Object::Link(link) if link.kind != loopback_kind()))
}

/// Reads everything, now and from now on.
fn widen(kernel: &mut LinuxKernel) -> Result<(), KernelError> {
    let is = kernel.interest();
    let depth = if is.depth == Depth::Links { Depth::Routes } else { is.depth };
    let wide = Interest { links: None, depth, ..is.clone() };
    if *kernel.interest() == wide { kernel.read(Scope::All) } else { kernel.set_interest(wide) }
}

/// What was done in a namespace, so that it can be taken back.
#[derive(Debug, Default)]
struct Done(Vec<Op>);

impl Done {
    /// The step that takes `op` back.
    fn note(&mut self, op: &Op) {
        self.0.extend(match op {
            Op::Create(object) => Some(Op::Delete(object.clone())),
            Op::Delete(object) => Some(Op::Create(object.clone())),
            Op::Update { from, to } => Some(Op::Update { from: to.clone(), to: as_wish(from) }),
            Op::Recreate { .. } => None,
        });
    }
}

/// What was read, as what is wanted: there no word on a flag leaves it as it is.
fn as_wish(was: &Object) -> Object {
    match was {
        Object::Link(link) => {
            Object::Link(Box::new(Link { promisc: Some(link.promisc == Some(true)), ..(**link).clone() }))
        }
        other => other.clone(),
    }
}

/// Brings the calling thread's namespace to what is wanted, and notes what was done. When somebody else is faster with a part of it, it
/// is looked at anew.
fn settle(
    kernel: &mut LinuxKernel,
    done: &mut Done,
    want: impl Fn(&HostState) -> Result<Desired, Clash>,
) -> Result<(), Failed> {
    let mut tries = 0;
    loop {
        let mut wanted = want(kernel.mirror())?;
        // What was somebody's is claimed: whoever uses it has to be seen.
        if !wanted.claim.devices.is_empty() && kernel.interest().links.is_some() {
            widen(kernel)?;
            wanted = want(kernel.mirror())?;
        }
        let plan = plan(&wanted, kernel.mirror(), Scope::All);
        let outcome = kernel.apply(&plan);
        let worked = plan.steps.iter().zip(&outcome.steps).filter(|(_, result)| result.is_ok());
        worked.for_each(|(step, _)| done.note(&step.op));
        tries += 1;
        match plan.steps.iter().zip(outcome.steps).find_map(|(step, result)| Some((step, result.err()?))) {
            None => return Ok(()),
            Some((_, StepError::Refused { errno, .. })) if tries < TRIES && raced(errno) => widen(kernel)?,
            Some((step, cause)) => {
                return Err(Failed::Step { act: format!("{} {}", step.op.verb(), step.op.object()), cause });
            }
        }
    }
}

/// Brings the calling thread's namespace to what is wanted.
pub fn make(want: &Desired) -> Result<(), Failed> {
    let mut kernel = LinuxKernel::open(interest(sysctls(want), Depth::Whole, &[]))?;
    let mut done = Done::default();
    settle(&mut kernel, &mut done, |_| Ok(want.clone())).map_err(|failed| undo(&mut kernel, done, failed))
}

/// Answers that mean: the mirror was not the truth.
fn raced(errno: i32) -> bool {
    [libc::EEXIST, libc::ENOENT, libc::ENODEV].contains(&errno)
}

/// Takes back what was done, but of a bridge that somebody uses by now; gives everything that failed.
fn undo(kernel: &mut LinuxKernel, done: Done, failed: Failed) -> Failed {
    take_back(kernel, done).into_iter().fold(failed, Failed::and)
}

fn take_back(kernel: &mut LinuxKernel, done: Done) -> Vec<Failed> {
    let mut failures = Vec::new();
    let back = done.0.into_iter().rev().filter(|op| !matches!(op, Op::Create(Object::Link(_))));
    // Devices that were made go first: what stands on them goes along, and a bridge may then be nobody's.
    let (devices, rest): (Vec<Op>, Vec<Op>) = back.partition(|op| matches!(op, Op::Delete(Object::Link(_))));
    for op in devices.into_iter().chain(rest) {
        let host = kernel.mirror();
        let link = op.object().key().link();
        let is_port_of = |o: &Object, name| matches!(o, Object::Link(port) if port.master == Some(name));
        let used = link.is_some_and(|name| host.iter().any(|(_, o)| is_port_of(o, name)));
        // What stood on a device went with it.
        let gone = link.is_some_and(|name| host.link(name).is_none())
            || matches!(op, Op::Delete(_)) && host.get(&op.object().key()).is_none();
        if !used && !gone {
            failures.extend(carry_out(kernel, op).err().map(|(failed, _)| failed));
        }
    }
    failures
}

/// Deletes a device; false when there is none.
fn delete(kernel: &mut LinuxKernel, name: LinkName) -> Result<bool, Failed> {
    let Some(link) = kernel.mirror().link(name) else { return Ok(false) };
    let op = Op::Delete(Object::Link(Box::new(link.clone())));
    match carry_out(kernel, op) {
        Err((_, StepError::Refused { errno: libc::ENODEV, .. })) => Ok(false),
        done => done.map(|()| true).map_err(|(failed, _)| failed),
    }
}

/// One step; refused, in the kernel's words too.
fn carry_out(kernel: &mut LinuxKernel, op: Op) -> Result<(), (Failed, StepError)> {
    let act = format!("{} {}", op.verb(), op.object());
    let plan = Plan { steps: vec![Step { op, needs: Vec::new(), why: Why::NotWanted }] };
    let refused = kernel.apply(&plan).steps.into_iter().find_map(Result::err);
    refused.map_or(Ok(()), |cause| Err((Failed::Step { act, cause: cause.clone() }, cause)))
}

/// A container that is attached.
#[derive(Debug)]
pub struct Attached {
    /// The host as it then is.
    pub host: LinuxKernel,
    on_host: Done,
    inside: (LinuxKernel, Done),
    /// Sysctls of the host that were switched, as they were.
    pub switched: Vec<Object>,
}

/// True when somebody else needs a sysctl as it is by now.
pub type Needed<'a> = &'a dyn Fn(&str) -> bool;

/// Both namespaces as they are before an attach. They can be looked at while nobody knows yet which addresses the container gets.
#[derive(Debug)]
pub struct Before<'a> {
    host: LinuxKernel,
    home: &'a Netns,
    inside: LinuxKernel,
    container: &'a Netns,
}

impl<'a> Before<'a> {
    /// Looks at `home`, the calling thread's namespace, and at the container's. `bridge` and `device` are all of the host that the
    /// attach is about.
    pub fn look(
        home: &'a Netns,
        container: &'a Netns,
        bridge: Option<LinkName>,
        device: LinkName,
    ) -> Result<Self, Failed> {
        let switches = switches(bridge.unwrap_or(device));
        // However many containers a host has. One that stands alone has routes on it.
        let host = match bridge {
            Some(bridge) => interest(switches, Depth::Links, &[bridge, device]),
            None => interest(switches, Depth::Routes, &[]),
        };
        let host = LinuxKernel::open(host)?;
        let inside = container.visit_from(home, open_inside)??;
        Ok(Self { host, home, inside, container })
    }
}

/// Attaches the container that was looked at to the namespace of the calling thread. Whatever fails, what was made goes again, or is
/// told.
pub fn attach(before: Before<'_>, request: &Request, needed: Needed<'_>) -> Result<Attached, Failed> {
    let Before { mut host, home, inside, container } = before;
    // Of this container, and not written down: what a killed attach has left. Its other end goes with it.
    delete(&mut host, request.host_device)?;
    let mut attached =
        Attached { host, on_host: Done::default(), inside: (inside, Done::default()), switched: Vec::new() };
    match attached.make(container, home, request) {
        Ok(()) => Ok(attached),
        Err(failed) => Err(attached.take_back(container, needed).err().into_iter().fold(failed, Failed::and)),
    }
}

impl Attached {
    fn make(&mut self, container: &Netns, home: &Netns, request: &Request) -> Result<(), Failed> {
        let Self { host, on_host, inside: (inside, in_it), switched } = self;
        container.visit_from(home, || {
            if inside.mirror().link(request.ifname).is_some() {
                return Err(Failed::NameTaken(request.ifname));
            }
            settle(inside, in_it, |have| Ok(before(request, have)))
        })??;
        // Making the pair takes the kernel half a millisecond without a break. What waits for this processor, as a worker that the disk's
        // answer has woken, goes first.
        thread::yield_now();
        settle(host, on_host, |have| request.host_side(have))?;
        let side = request.container_side();
        container.visit_from(home, || {
            inside.take_as_made(request.inner_end())?;
            settle(inside, in_it, |_| Ok(side.clone()))
        })??;
        // What only the kernel knows: a bridge takes over the MTU of its ports.
        let is_known = |is: &Link| request.keeps_mac(is) && is.mtu == request.mtu;
        let bridge = request.bridge.filter(|name| !host.mirror().link(*name).is_some_and(is_known));
        let pair = Some(request.host_device).filter(|_| request.mtu.is_none());
        let made = bridge.into_iter().chain(pair).map(Key::Link).collect();
        host.read(Scope::Keys(&made))?;
        let mut on = Done::default();
        let settled = settle(host, &mut on, |_| Ok(request.forwarding()));
        let was = |op: Op| if let Op::Update { to, .. } = op { Some(to) } else { None };
        switched.extend(on.0.into_iter().filter_map(was));
        settled
    }

    /// Takes back what was done, but a bridge that somebody uses by now; told is everything that failed.
    pub fn take_back(self, container: &Netns, needed: Needed<'_>) -> Result<(), Failed> {
        let Self { mut host, on_host, inside: (mut inside, in_it), switched } = self;
        let mut failures: Vec<Failed> = switch_back(&switched, needed).err().into_iter().collect();
        let stale = widen(&mut host).err().map(Failed::from);
        failures.extend(stale.into_iter().chain(take_back(&mut host, on_host)));
        // A container that has ended has nothing to take back.
        let emptied = container.visit(|| match widen(&mut inside) {
            Err(error) => vec![error.into()],
            Ok(()) => take_back(&mut inside, in_it),
        });
        failures.extend(emptied.unwrap_or_default());
        failures.into_iter().reduce(Failed::and).map_or(Ok(()), Err)
    }
}

/// Switches sysctls back to what they were. Whoever needs one says so before it looks at it: who has said it after the look here finds
/// it switched back, and who has said it before is found.
pub fn switch_back(was: &[Object], needed: Needed<'_>) -> Result<(), Failed> {
    let mut failed = None;
    for object in was {
        let Object::Sysctl { path, value } = object else { continue };
        let back = || {
            if needed(path) {
                return Ok(());
            }
            let is = sysctl::read(path)?;
            sysctl::write(path, value)?;
            if needed(path) { sysctl::write(path, &is) } else { Ok(()) }
        };
        // It goes with its device.
        let done = back().or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) });
        failed = failed.or(done.err().map(|error| KernelError::new(&format!("switch {path} back"), error)));
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}

/// The container before the pair is there; while it has other devices, their IPv6 is not ours to switch off. A kernel without IPv6
/// has no such file.
fn before(request: &Request, have: &HostState) -> Desired {
    let mut want = request.container_before();
    let others = has_devices(have);
    want.host.retain(|_, object| match object {
        Object::Sysctl { path, value } => {
            let for_this_one = &**value == "0" && path.contains("/default/");
            (!others || for_this_one) && have.get(&Key::Sysctl(path.clone())).is_some()
        }
        _ => true,
    });
    want
}

fn loopback_kind() -> LinkKind {
    LinkKind::Other { name: "device".into() }
}

/// Takes a container's pair away from the calling thread's namespace; false when it is gone already.
pub fn detach(host_device: LinkName) -> Result<bool, Failed> {
    delete(&mut LinuxKernel::open(interest([], Depth::Links, &[host_device]))?, host_device)
}

/// Takes a container's pair away by its inner end, as another plugin has made it; false when there is no pair of that name whose other
/// end is a port of `bridge` in the calling thread's namespace.
pub fn detach_inside(container: &Netns, ifname: LinkName, bridge: LinkName) -> Result<bool, Failed> {
    let inside = container.visit(|| Wires::open()?.veths())??;
    let Some(inner) = inside.into_iter().find(|end| end.link == ifname) else { return Ok(false) };
    let mut wires = Wires::open()?;
    let number = wires.netns_id(container)?;
    let is_outer =
        |end: &VethEnd| (end.index, end.peer_index, end.peer_netns) == (inner.peer_index, inner.index, number);
    let Some(outer) = wires.veths()?.into_iter().find(is_outer) else { return Ok(false) };
    let mut host = LinuxKernel::open(interest([], Depth::Links, &[bridge, outer.link]))?;
    let is_port = host.mirror().link(outer.link).is_some_and(|link| link.master == Some(bridge));
    if is_port { delete(&mut host, outer.link) } else { Ok(false) }
}

/// Whether the calling thread's namespace has a device.
pub fn has_device(name: LinkName) -> Result<bool, Failed> {
    let kernel = LinuxKernel::open(interest([], Depth::Links, &[name]))?;
    Ok(kernel.mirror().link(name).is_some())
}

/// How a bridge treats a port of the calling thread's namespace that lets nothing pass, or only what is written down
/// (include/uapi/linux/if_bridge.h), and what it should be. While a spanning tree listens and learns it is about to let pass.
pub fn hindered_port(port: LinkName) -> Result<Vec<(&'static str, &'static str)>, Failed> {
    let Some(port) = Wires::open()?.port(port)? else { return Ok(Vec::new()) };
    let hindered = [
        (port.state == 0, ("disabled", "forwarding")),
        (port.state == 4, ("blocking", "forwarding")),
        (port.locked, ("locked", "not locked")),
        (!port.learning && !port.flood, ("without learning and without flooding", "learning")),
    ];
    Ok(hindered.into_iter().filter_map(|(is, words)| is.then_some(words)).collect())
}

/// The devices of the calling thread's namespace.
pub fn devices() -> Result<Vec<Link>, Failed> {
    let kernel = LinuxKernel::open(interest([], Depth::Links, &[]))?;
    let links = kernel.mirror().iter().filter_map(|(_, object)| match object {
        Object::Link(link) => Some((**link).clone()),
        _ => None,
    });
    Ok(links.collect())
}

/// One of our tables as the calling thread's namespace has it.
pub fn table(name: &TableName) -> Result<Option<Table>, Failed> {
    Ok(tables(name)?.1)
}

/// Whether the calling thread's namespace has such a table; a kernel without tables has none.
pub fn has_table(name: &TableName) -> Result<bool, Failed> {
    match tables(name) {
        Err(Failed::Kernel(error)) if lacks_nftables(&error.source) => Ok(false),
        tables => tables.map(|(_, table)| table.is_some()),
    }
}

/// Brings one of our tables in the calling thread's namespace to what is wanted, in one transaction. Gives what was done, if anything.
pub fn settle_table(name: &TableName, want: Option<&Table>) -> Result<Option<Step>, Failed> {
    let (mut nft, have) = match tables(name) {
        Err(Failed::Kernel(error)) if want.is_none() && lacks_nftables(&error.source) => return Ok(None),
        tables => tables?,
    };
    let object = |table: &Table| Object::Table(Box::new(table.clone()));
    let (op, why) = match (&have, want) {
        (Some(have), want) if !have.is_ours() && !want.is_some_and(|want| have.is_as_made(want)) => {
            return Err(Failed::TableTaken(name.clone()));
        }
        (have, want) if have.as_ref() == want => return Ok(None),
        (Some(have), Some(want)) => (Op::Update { from: object(have), to: object(want) }, Why::Differs),
        (Some(have), None) => (Op::Delete(object(have)), Why::NotWanted),
        (None, Some(want)) => (Op::Create(object(want)), Why::Missing),
        (None, None) => return Ok(None),
    };
    match nft.apply(&op) {
        Ok(()) => Ok(Some(Step { op, needs: Vec::new(), why })),
        Err(cause) => Err(Failed::Step { act: format!("{} {}", op.verb(), op.object()), cause }),
    }
}

fn tables(name: &TableName) -> Result<(Nft, Option<Table>), Failed> {
    let read = || {
        let mut nft = Nft::open()?;
        let table = nft.table(name)?;
        Ok((nft, table))
    };
    read().map_err(|error| KernelError::new(&format!("read table {name}"), error).into())
}

/// What of `want` the calling thread's namespace does not hold.
pub fn differences(want: impl Fn(&HostState) -> Result<Desired, Clash>) -> Result<Plan, Failed> {
    let mut kernel = LinuxKernel::open(interest([], Depth::Routes, &[]))?;
    let want = Desired { claim: Claim::default(), ..want(kernel.mirror())? };
    kernel.set_interest(interest(sysctls(&want), Depth::Routes, &[]))?;
    Ok(plan(&want, kernel.mirror(), Scope::All))
}
