//! A host's agent: a real `twill agent` process, and what is done to it.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use twill_core::net::Mtu;

use crate::children::{Children, own_program};
use crate::error::{Act, LabError};
use crate::home::LabDir;
use crate::layout::{NodePlan, Spec};
use crate::notify::Notify;
use crate::proto::AgentState;
use crate::wiring::Place;

/// How long an agent may take to have its subnet, or to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// The device that it takes for the underlay.
pub(crate) const IFACE: &str = "eth0";

/// Files of the agent whose host has this folder.
pub(crate) fn settings(folder: &Path) -> PathBuf {
    folder.join("agent.toml")
}

pub(crate) fn state_dir(folder: &Path) -> PathBuf {
    folder.join("state")
}

pub(crate) fn run_dir(folder: &Path) -> PathBuf {
    folder.join("run")
}

pub(crate) fn subnet_file(folder: &Path) -> PathBuf {
    folder.join("subnet.env")
}

/// An agent that was started.
#[derive(Debug)]
pub(crate) struct AgentProcess {
    pid: u32,
    held: bool,
}

/// Starts the agent of a host and waits until it has its subnet.
pub(crate) fn start(
    spec: &Spec,
    dir: &LabDir,
    plan: &NodePlan,
    place: &Place,
    notify: &Notify,
    children: &Children,
) -> Result<AgentProcess, LabError> {
    let name = &plan.name;
    let folder = dir.node(name);
    let (env, log) = (subnet_file(&folder), folder.join("agent.log"));
    // At first it is ready with its subnet; later, when it says so: the file of an earlier run may stay as it is.
    let again = env.exists();
    // Nothing of this machine's own settings is for the lab.
    let settings = settings(&folder);
    fs::write(&settings, "version = 1\n").act(|| format!("write {}", settings.display()))?;
    let store = spec.store_url().act(|| "plan the store".into())?;
    let act = || format!("start the agent of {name}");
    notify.begin();
    let kept = Kept::of(notify).act(act)?;
    let mut command = kept.command()?;
    command.arg("agent").arg("--config").arg(&settings).args(["--store", &store]).args(["--iface", IFACE]);
    let subnets = [plan.subnet].into_iter().chain(plan.second.map(|second| second.subnet));
    command.args(["--subnet", &subnets.map(|subnet| subnet.to_string()).collect::<Vec<_>>().join(",")]);
    command.arg("--state-dir").arg(state_dir(&folder)).arg("--run-dir").arg(run_dir(&folder));
    command.arg("--subnet-file").arg(&env).env("NOTIFY_SOCKET", notify.path());
    let pid =
        children.spawn(&place.netns, &mut command, &log, kept.0.map(|[(_, tun), (_, udp)]| [tun, udp])).act(act)?;
    let ready = |said: bool| if again { said } else { env.exists() };
    if !notify.wait(PATIENCE, || children.is_alive(pid), ready) {
        let said = fs::read_to_string(&log).unwrap_or_default();
        let last = said.lines().rfind(|line| line.starts_with("error:")).or(said.lines().last());
        let last = last.unwrap_or("it said nothing");
        return Err(LabError::new("agent-failed", format!("the agent of {name} is not ready: {last}")));
    }
    Ok(AgentProcess { pid, held: false })
}

/// What the agent before had in the descriptor store: a tunnel's two descriptors, or nothing of use.
struct Kept(Option<[(String, OwnedFd); 2]>);

impl Kept {
    fn of(notify: &Notify) -> io::Result<Self> {
        Ok(Self(<[_; 2]>::try_from(notify.kept()?).ok()))
    }

    /// This program, behind the one that puts the descriptors where they belong.
    fn command(&self) -> Result<Command, LabError> {
        let mut command = own_program()?;
        if let Some([(first, _), (second, _)]) = &self.0 {
            let program = command.get_program().to_owned();
            command.args(["lab", "keep", &format!("{first}:{second}"), "--"]).arg(program);
        }
        Ok(command)
    }
}

impl AgentProcess {
    /// The MTU that its containers are to have, as subnet.env says.
    pub(crate) fn mtu(&self, folder: &Path) -> Result<Option<Mtu>, LabError> {
        let path = subnet_file(folder);
        let text = fs::read_to_string(&path).act(|| format!("read {}", path.display()))?;
        let value = text.lines().find_map(|line| line.strip_prefix("FLANNEL_MTU="));
        value.map(|value| value.parse().act(|| format!("read {}", path.display()))).transpose()
    }

    /// Gives the process time to do what nothing announces; false when it has ended.
    pub(crate) fn lives_on(&self, time: Duration, children: &Children) -> bool {
        !children.wait(self.pid, time)
    }

    pub(crate) fn is_alive(&self, children: &Children) -> bool {
        children.is_alive(self.pid)
    }

    pub(crate) fn state(&self, children: &Children) -> AgentState {
        match (self.is_alive(children), self.held) {
            (false, _) => AgentState::Stopped,
            (true, true) => AgentState::Held,
            (true, false) => AgentState::Running,
        }
    }

    /// Asks it to end, and waits.
    pub(crate) fn stop(&mut self, children: &Children) -> Result<(), LabError> {
        self.end(children, Signal::TERM)
    }

    /// Ends it without a word.
    pub(crate) fn kill(&mut self, children: &Children) -> Result<(), LabError> {
        self.end(children, Signal::KILL)
    }

    fn end(&mut self, children: &Children, signal: Signal) -> Result<(), LabError> {
        children.signal(self.pid, signal).act(|| "signal the agent".into())?;
        if !children.wait(self.pid, PATIENCE) {
            return Err(LabError::new("agent-failed", "the agent does not end"));
        }
        self.held = false;
        Ok(())
    }

    /// It keeps running, and repairs nothing.
    pub(crate) fn hold(&mut self, folder: &Path, children: &Children) -> Result<(), LabError> {
        if !self.is_alive(children) {
            return Err(LabError::new("agent-failed", "the agent is stopped"));
        }
        post(folder, "/v1/hold")?;
        self.held = true;
        Ok(())
    }

    /// It repairs again.
    pub(crate) fn release(&mut self, folder: &Path) -> Result<(), LabError> {
        if self.held {
            post(folder, "/v1/release")?;
            self.held = false;
        }
        Ok(())
    }
}

fn post(folder: &Path, path: &str) -> Result<(), LabError> {
    ask(folder, "POST", path).map(drop)
}

/// A look at an agent.
fn get(folder: &Path, path: &str) -> Result<serde_json::Value, LabError> {
    serde_json::from_str(&ask(folder, "GET", path)?).act(|| "read an agent's answer".into())
}

/// The subnets that are leased, as an agent knows: its own, and those of its peers.
pub(crate) fn leased(folder: &Path) -> Result<Vec<String>, LabError> {
    let (own, others) = (get(folder, "/v1/status")?, get(folder, "/v1/peers")?);
    let peers = others["peers"].as_array().into_iter().flatten().filter(|peer| peer["fault"].is_null());
    let subnets = [&own].into_iter().chain(peers).filter_map(|holder| holder["subnets"].as_array()).flatten();
    Ok(subnets.filter_map(|subnet| subnet.as_str().map(str::to_owned)).collect())
}

/// The subnets whose hosts an agent's tunnel reaches, each with its host's address.
pub(crate) fn tunnel_peers(folder: &Path) -> Result<Vec<(String, String)>, LabError> {
    let answer = get(folder, "/v1/tunnel")?;
    let word = |peer: &serde_json::Value, key: &str| peer[key].as_str().unwrap_or_default().to_owned();
    let mut reached = Vec::new();
    for peer in answer["peers"].as_array().into_iter().flatten() {
        // A lease of both families is named `10.1.16.0-24&fd00:1:0:10::-64`.
        let subnets = word(peer, "lease").replace('-', "/");
        reached.extend(subnets.split('&').map(|subnet| (subnet.to_owned(), word(peer, "host"))));
    }
    Ok(reached)
}

/// One request to an agent's control API (HTTP/1.1 over its unix socket); gives the answer's body.
fn ask(folder: &Path, method: &str, path: &str) -> Result<String, LabError> {
    let socket = run_dir(folder).join("twill.sock");
    let act = || format!("ask the agent at {} for {path}", socket.display());
    let mut stream = UnixStream::connect(&socket).act(act)?;
    stream.set_read_timeout(Some(PATIENCE)).act(act)?;
    let request = format!("{method} {path} HTTP/1.1\r\nHost: twill\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).act(act)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).act(act)?;
    let status = answer.split_whitespace().nth(1).unwrap_or_default();
    if status.starts_with('2') {
        Ok(answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
    } else {
        Err(LabError::new("agent-failed", format!("{}: {}", act(), answer.lines().next().unwrap_or("no answer"))))
    }
}
