//! What crosses a lab's control socket and its supervisor's pipes: one JSON object a line.

use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};
use twill_core::net::Prefix;

use crate::error::{Act, LabError};
use crate::home::LabDir;
use crate::layout::{Spec, UNDERLAY};

/// A lab as it is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabState {
    /// What it was asked to be; `nodes` counts those that were added.
    #[serde(flatten)]
    pub spec: Spec,
    /// The supervisor, as the caller's /proc numbers it.
    pub pid: u32,
    /// True when it stands in a user namespace of its own.
    pub user_namespace: bool,
    /// The namespace between the hosts, as a path.
    pub underlay: String,
    /// Its hosts.
    pub hosts: Vec<HostInfo>,
}

/// One host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostInfo {
    /// `node1` …
    pub name: String,
    /// On the underlay.
    pub address: IpAddr,
    /// Its containers' subnet.
    pub subnet: Prefix,
    /// IPv6 address and subnet, beside IPv4 ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second: Option<(IpAddr, Prefix)>,
    /// Its network namespace, as a path.
    pub netns: String,
    /// Its agent.
    pub agent: AgentState,
    /// Its containers.
    pub containers: Vec<ContainerInfo>,
}

/// One container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerInfo {
    /// `container-1` …
    pub name: String,
    /// Its address.
    pub address: IpAddr,
    /// Its IPv6 address, beside an IPv4 one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second: Option<IpAddr>,
    /// Its network namespace, as a path.
    pub netns: String,
}

/// How an agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentState {
    /// The scenario has none.
    None,
    /// It runs.
    Running,
    /// It runs, and repairs nothing.
    Held,
    /// It has ended.
    Stopped,
}

/// What is done to an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentAct {
    /// Ask it to end (SIGTERM).
    Stop,
    /// Start it, or release it when it is held.
    Start,
    /// Stop and start.
    Restart,
    /// End it without a word (SIGKILL).
    Kill,
    /// It keeps running and watching, and repairs nothing.
    Hold,
}

/// What a supervisor is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    /// How are you?
    Status,
    /// One more host.
    NodeAdd,
    /// Do this to the agent of a node.
    Agent {
        /// What.
        act: AgentAct,
        /// `node1` …
        node: String,
    },
    /// End.
    Down,
}

/// What a supervisor says; the last line of an answer is `Done` or `Failed`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Word {
    /// What happens just now, for a person who waits.
    Progress(String),
    /// It is done, and this is the lab now.
    Done(Box<LabState>),
    /// It could not be done.
    Failed(LabError),
}

impl LabState {
    /// All places with their namespaces, as paths: hosts, containers, the underlay.
    pub fn places(&self) -> Vec<(String, String)> {
        let hosts = self.hosts.iter().map(|h| (h.name.clone(), h.netns.clone()));
        let containers = self.containers().map(|c| (c.name.clone(), c.netns.clone()));
        let underlay = (UNDERLAY.to_owned(), self.underlay.clone());
        hosts.chain(containers).chain([underlay]).collect()
    }

    /// The store, as agents are told.
    pub fn store_url(&self) -> Result<String, LabError> {
        self.spec.store_url().act(|| "plan the store".into())
    }

    /// All containers of all hosts.
    pub fn containers(&self) -> impl Iterator<Item = &ContainerInfo> {
        self.hosts.iter().flat_map(|h| &h.containers)
    }

    /// The namespace of a place, as a path.
    pub fn netns(&self, place: &str) -> Result<String, LabError> {
        let places = self.places();
        let found = places.iter().find(|(name, _)| name == place).map(|(_, path)| path.clone());
        found.ok_or_else(|| {
            let names: Vec<&str> = places.iter().map(|(name, _)| name.as_str()).collect();
            LabError::new("no-such-place", format!("lab {} has no place {place:?}", self.spec.name))
                .hint(format!("its places: {}", names.join(", ")))
        })
    }
}

/// Tells a person who waits what happens.
pub(crate) type Progress<'a> = &'a (dyn Fn(String) + Sync);

/// The word on the supervisor's stdin after which the lab outlives its client.
pub(crate) const STAY: &str = "stay";

/// Writes one line.
pub(crate) fn say(to: &mut impl Write, word: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(word)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

/// Reads words until the last one; `heard` gets each line of progress.
pub(crate) fn listen(from: impl std::io::Read, mut heard: impl FnMut(&str)) -> Result<LabState, LabError> {
    for line in BufReader::new(from).lines() {
        let line = line.act(|| "hear the lab's supervisor".into())?;
        match serde_json::from_str(&line).act(|| "understand the lab's supervisor".into())? {
            Word::Progress(text) => heard(&text),
            Word::Done(state) => return Ok(*state),
            Word::Failed(error) => return Err(error),
        }
    }
    Err(LabError::new("lab-failed", "the lab's supervisor ended without an answer"))
}

/// A connection to a lab's supervisor; no such lab: `no-such-lab`.
pub(crate) fn connect(dir: &LabDir) -> Result<UnixStream, LabError> {
    UnixStream::connect(dir.socket()).map_err(|_| {
        let name = dir.name();
        if dir.path().exists() {
            let message = format!("lab {name} has ended: its supervisor was killed");
            let hint = format!(
                "`twill lab down --name {name}` removes what is left, `twill lab up --name {name}` makes it anew"
            );
            return LabError::new("lab-killed", message).hint(hint);
        }
        LabError::new("no-such-lab", format!("there is no lab {:?}", name.to_string()))
            .hint(format!("`twill lab list` shows those that are, `twill lab up --name {name}` makes it"))
    })
}

/// Asks a lab's supervisor; `heard` gets each line of progress.
pub fn ask(dir: &LabDir, request: &Request, heard: impl FnMut(&str)) -> Result<LabState, LabError> {
    let mut stream = connect(dir)?;
    say(&mut stream, request).act(|| "ask the lab's supervisor".into())?;
    listen(stream, heard)
}
