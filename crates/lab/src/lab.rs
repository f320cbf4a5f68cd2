//! A lab in the making and as it runs: hosts, containers, agents, the store.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::thread;

use twill_core::net::{Inet, LinkName, Mtu};

use crate::agent::{self, AgentProcess};
use crate::children::Children;
use crate::error::{Act, LabError};
use crate::home::LabDir;
use crate::layout::{Backend, MOST_NODES, NodePlan, Spec, UNDERLAY};
use crate::notify::Notify;
use crate::proto::{AgentAct, AgentState, ContainerInfo, HostInfo, LabState, Progress};
use crate::store;
use crate::watch;
use crate::wiring::{self, Place};

/// The whole of it.
#[derive(Debug)]
pub(crate) struct Lab {
    spec: Spec,
    dir: LabDir,
    pid: u32,
    user_namespace: bool,
    children: Arc<Children>,
    underlay: Place,
    bridge: LinkName,
    gateways: Vec<Inet>,
    hosts: Vec<Host>,
}

/// One host.
#[derive(Debug)]
struct Host {
    plan: NodePlan,
    place: Place,
    containers: Vec<Place>,
    agent: Option<AgentProcess>,
    /// Where its agents say that they are ready, and leave what is to be kept.
    notify: Notify,
}

impl Lab {
    /// Builds what `spec` says.
    pub(crate) fn build(
        dir: LabDir,
        spec: Spec,
        user_namespace: bool,
        children: Arc<Children>,
        progress: Progress<'_>,
    ) -> Result<Self, LabError> {
        let netns = twill_kernel::netns::Netns::current().act(|| "open the underlay's namespace".into())?;
        let gateways = spec.underlay().act(|| "plan the underlay".into())?;
        let mut lab = Self {
            pid: wiring::own_pid()?,
            underlay: Place { name: UNDERLAY.into(), netns },
            bridge: UNDERLAY.parse().act(|| "name the underlay".into())?,
            gateways,
            hosts: Vec::new(),
            spec,
            dir,
            user_namespace,
            children,
        };
        wiring::underlay(&lab.underlay, lab.bridge, &lab.gateways)?;
        lab.name(UNDERLAY, &lab.underlay)?;
        // The store starts while the hosts are made.
        let store = lab.spec.has_agents().then(|| store::start(&lab.spec, &lab.dir, &lab.underlay, &lab.children));
        let store = store.transpose()?;
        let made = each(1..=lab.spec.nodes, |number| lab.make_host(number));
        for host in made {
            lab.hosts.push(host?);
        }
        let wires = lab.gateways.iter().map(|gateway| gateway.network().to_string()).collect::<Vec<_>>().join(" and ");
        progress(format!("{} joined by the underlay {wires}", count(lab.hosts.len(), "host")));
        if let Some(store) = store {
            let address = store.ready(&lab.spec, &lab.underlay, &lab.children)?;
            progress(format!("a store at {address}"));
        }
        let mut hosts = std::mem::take(&mut lab.hosts);
        let up = each(hosts.iter_mut(), |host| lab.bring_up(host));
        up.into_iter().collect::<Result<Vec<_>, _>>()?;
        lab.hosts = hosts;
        if lab.spec.has_agents() {
            progress(format!("{}, each with its subnet", count(lab.hosts.len(), "agent")));
        }
        let containers: usize = lab.hosts.iter().map(|h| h.containers.len()).sum();
        progress(format!("{} attached by bridge and veth pair", count(containers, "container")));
        let all: Vec<&Host> = lab.hosts.iter().collect();
        lab.all_know_all(&all)?;
        Ok(lab)
    }

    /// A host with its containers' namespaces, joined to the underlay.
    fn make_host(&self, number: u8) -> Result<Host, LabError> {
        let plan = self.spec.node(number).act(|| format!("plan node{number}"))?;
        let place = Place::create(&plan.name)?;
        wiring::join_host(&self.underlay, self.bridge, &self.gateways, &place, &plan)?;
        self.name(&plan.name, &place)?;
        let containers = plan.containers.iter().map(|container| {
            let place = Place::create(&container.name)?;
            self.name(&container.name, &place)?;
            Ok(place)
        });
        let containers = containers.collect::<Result<_, LabError>>()?;
        let folder = self.dir.node(&plan.name);
        for part in ["state/attachments", "run"] {
            fs::create_dir_all(folder.join(part)).act(|| format!("make {}", folder.display()))?;
        }
        let act = || format!("listen for the agent of {}", plan.name);
        let notify = Notify::bind(&folder.join("notify.sock")).act(act)?;
        Ok(Host { plan, place, containers, agent: None, notify })
    }

    /// Its agent, and its containers on the bridge.
    fn bring_up(&self, host: &mut Host) -> Result<(), LabError> {
        let mut mtu = None;
        if self.spec.has_agents() {
            let agent = agent::start(&self.spec, &self.dir, &host.plan, &host.place, &host.notify, &self.children)?;
            mtu = agent.mtu(&self.dir.node(&host.plan.name))?;
            host.agent = Some(agent);
        }
        self.attach(host, mtu)
    }

    fn attach(&self, host: &Host, mtu: Option<Mtu>) -> Result<(), LabError> {
        let folder = self.dir.node(&host.plan.name);
        for (container, plan) in host.containers.iter().zip(&host.plan.containers) {
            wiring::join_container(&host.place, container, &host.plan, plan, mtu, &folder)?;
        }
        Ok(())
    }

    /// Waits until each of `hosts` whose agent runs knows the way to every other of them.
    fn all_know_all(&self, hosts: &[&Host]) -> Result<(), LabError> {
        if !self.spec.has_agents() {
            return Ok(());
        }
        let waited = each(hosts.iter().filter(|host| self.runs(host)), |host| {
            let others = hosts.iter().filter(|other| other.plan.name != host.plan.name);
            self.knows(host, &others.map(|other| &other.plan).collect::<Vec<_>>(), &|_| ())
        });
        waited.into_iter().collect()
    }

    /// Waits until a host has what it takes to reach others: in the kernel, or in its agent's tunnel.
    fn knows(&self, host: &Host, others: &[&NodePlan], progress: Progress<'_>) -> Result<(), LabError> {
        match self.spec.backend {
            Backend::Vxlan => watch::knows(&host.place, others, &self.children, progress),
            Backend::Udp => {
                let folder = self.dir.node(&host.plan.name);
                let lives_on = |time| host.agent.as_ref().is_some_and(|agent| agent.lives_on(time, &self.children));
                watch::tunnel_knows(&host.place.name, &folder, others, (&self.children, &lives_on), progress)
            }
        }
    }

    /// True when the host's agent does its work.
    fn runs(&self, host: &Host) -> bool {
        host.agent.as_ref().is_some_and(|agent| agent.state(&self.children) == AgentState::Running)
    }

    /// The hosts that hold a lease, as far as an agent knows; to one that has left nobody has a way.
    fn holders(&self) -> impl Iterator<Item = &Host> {
        let running = self.hosts.iter().filter(|host| self.runs(host));
        let leased = running.filter_map(|host| agent::leased(&self.dir.node(&host.plan.name)).ok()).flatten();
        let leased: BTreeSet<String> = leased.collect();
        self.hosts.iter().filter(move |host| leased.contains(&host.plan.subnet.to_string()))
    }

    /// One more host; the others' new entries are told as they appear.
    pub(crate) fn add_host(&mut self, progress: Progress<'_>) -> Result<(), LabError> {
        let number = self.hosts.len() as u8 + 1;
        if number > MOST_NODES {
            return Err(LabError::new("lab-full", format!("a lab has at most {MOST_NODES} nodes")));
        }
        if !self.spec.has_agents() {
            return Err(LabError::new(
                "no-agent",
                "the scenario bridge has one host, and no agent that another could join",
            ));
        }
        let mut host = self.make_host(number)?;
        let plan = host.plan.clone();
        let holders: BTreeSet<String> = self.holders().map(|holder| holder.plan.name.clone()).collect();
        let held = |host: &&Host| holders.contains(&host.plan.name);
        progress(format!("{} joins the underlay as {}", plan.name, plan.address.addr));
        let (up, watched) = thread::scope(|scope| {
            let watching: Vec<&Host> = self.hosts.iter().filter(held).filter(|host| self.runs(host)).collect();
            let watchers = scope.spawn(|| each(watching, |other| self.knows(other, &[&plan], progress)));
            let up = self.bring_up(&mut host);
            (up, watchers.join())
        });
        up?;
        let watched = watched.map_err(|_| LabError::new("lab-failed", "watch the other hosts"))?;
        self.hosts.push(host);
        self.spec.nodes = number;
        watched.into_iter().collect::<Result<Vec<()>, _>>()?;
        let known: Vec<&Host> = self.hosts.iter().filter(|host| held(host) || host.plan.name == plan.name).collect();
        self.all_know_all(&known)
    }

    /// Stop, start, restart, kill or hold.
    pub(crate) fn act_on_agent(&mut self, act: AgentAct, node: &str) -> Result<(), LabError> {
        if !self.spec.has_agents() {
            return Err(LabError::new("no-agent", "the scenario bridge runs no agent"));
        }
        let names: Vec<String> = self.hosts.iter().map(|h| h.plan.name.clone()).collect();
        let Some(host) = self.hosts.iter_mut().find(|h| h.plan.name == node) else {
            return Err(LabError::new("no-such-place", format!("lab {} has no node {node:?}", self.spec.name))
                .hint(format!("its nodes: {}", names.join(", "))));
        };
        let folder = self.dir.node(node);
        let (start, stop) = match act {
            AgentAct::Start => (true, false),
            AgentAct::Restart => (true, true),
            AgentAct::Stop | AgentAct::Kill | AgentAct::Hold => (false, true),
        };
        if let Some(agent) = host.agent.as_mut().filter(|_| stop) {
            match act {
                AgentAct::Hold => {
                    let start = format!("`twill lab agent start {node} --name {}` comes before", self.spec.name);
                    return agent.hold(&folder, &self.children).map_err(|error| error.hint(start));
                }
                AgentAct::Kill => agent.kill(&self.children)?,
                AgentAct::Stop => {
                    agent.stop(&self.children)?;
                    // As a service manager does with a unit that is stopped, and not with one that crashed or is restarted.
                    host.notify.forget();
                }
                AgentAct::Restart | AgentAct::Start => agent.stop(&self.children)?,
            }
        }
        if start {
            return match host.agent.as_mut().filter(|agent| agent.is_alive(&self.children)) {
                Some(agent) => agent.release(&folder),
                None => {
                    let (spec, dir) = (&self.spec, &self.dir);
                    let agent = agent::start(spec, dir, &host.plan, &host.place, &host.notify, &self.children)?;
                    host.agent = Some(agent);
                    Ok(())
                }
            };
        }
        Ok(())
    }

    /// Gives a namespace a name for `ip netns`, as root.
    fn name(&self, where_: &str, place: &Place) -> Result<(), LabError> {
        if self.user_namespace {
            return Ok(());
        }
        self.dir.link_netns(where_, &place.path(self.pid))
    }

    /// The lab as it is.
    pub(crate) fn state(&self) -> LabState {
        let hosts = self.hosts.iter().map(|host| HostInfo {
            name: host.plan.name.clone(),
            address: host.plan.address.addr,
            subnet: host.plan.subnet,
            second: host.plan.second.map(|second| (second.address.addr, second.subnet)),
            netns: host.place.path(self.pid),
            agent: host.agent.as_ref().map_or(AgentState::None, |agent| agent.state(&self.children)),
            containers: host
                .containers
                .iter()
                .zip(&host.plan.containers)
                .map(|(place, plan)| ContainerInfo {
                    name: plan.name.clone(),
                    address: plan.address.addr,
                    second: plan.second.map(|inet| inet.addr),
                    netns: place.path(self.pid),
                })
                .collect(),
        });
        LabState {
            spec: self.spec.clone(),
            pid: self.pid,
            user_namespace: self.user_namespace,
            underlay: self.underlay.path(self.pid),
            hosts: hosts.collect(),
        }
    }
}

/// Does something for each, all at the same time; what comes of it in the same order.
fn each<I: IntoIterator, T: Send>(
    items: I,
    act: impl Fn(I::Item) -> Result<T, LabError> + Sync,
) -> Vec<Result<T, LabError>>
where
    I::Item: Send,
{
    let act = &act;
    thread::scope(|scope| {
        let threads: Vec<_> = items.into_iter().map(|item| scope.spawn(move || act(item))).collect();
        let joined = threads.into_iter().map(thread::ScopedJoinHandle::join);
        joined.map(|r| r.unwrap_or_else(|_| Err(LabError::new("lab-failed", "a thread of the lab panicked")))).collect()
    })
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
