//! What `lab` prints of a lab.

use std::net::IpAddr;

use serde_json::{Value, json};
use twill_core::net::Prefix;
use twill_lab::home::NETNS_DIR;
use twill_lab::start::{self, Listed};
use twill_lab::{AgentState, LabState};

use super::scenario::Section;
use crate::output::{Failure, Output, columns};

/// A lab, for programs: {"name","nodes":[{"name","address","subnet","netns","containers":[…]}]}.
fn value(state: &LabState) -> Value {
    let nodes = state.hosts.iter().map(|host| {
        // As root by its name for `ip netns`; else by the descriptor that the supervisor holds.
        let netns = |place: &str, path: &str| match state.user_namespace {
            true => path.to_owned(),
            false => format!("{NETNS_DIR}/{}", state.spec.name.netns_name(place)),
        };
        let containers = host.containers.iter().map(|c| {
            let all: Vec<IpAddr> = std::iter::once(c.address).chain(c.second).collect();
            json!({"name": c.name, "address": c.address, "addresses": all, "netns": netns(&c.name, &c.netns)})
        });
        let (addresses, subnets): (Vec<IpAddr>, Vec<Prefix>) =
            std::iter::once((host.address, host.subnet)).chain(host.second).unzip();
        json!({
            "name": host.name,
            "address": host.address,
            "subnet": host.subnet,
            "addresses": addresses,
            "subnets": subnets,
            "netns": netns(&host.name, &host.netns),
            "agent": host.agent,
            "containers": containers.collect::<Vec<_>>(),
        })
    });
    json!({
        "name": state.spec.name,
        "nodes": nodes.collect::<Vec<_>>(),
        "scenario": state.spec.scenario,
        "store": state.spec.store,
        "pid": state.pid,
        "user_namespace": state.user_namespace,
    })
}

/// Prints a lab.
pub(super) fn print(output: Output, state: &LabState) -> anyhow::Result<()> {
    print_with(output, state, Vec::new())
}

/// Prints a lab and what its scenario shows.
pub(super) fn print_with(output: Output, state: &LabState, shown: Vec<Section>) -> anyhow::Result<()> {
    let mut value = value(state);
    if !shown.is_empty() {
        value["shown"] = serde_json::to_value(&shown)?;
    }
    output.print(&value, || {
        let sections = shown.iter().map(|s| format!("\n\n{}\n  {}", s.title, s.lines.join("\n  ")));
        format!("{}{}", text(state), sections.collect::<String>())
    })
}

/// A lab, for people.
fn text(state: &LabState) -> String {
    let header = ["PLACE", "ADDRESS", "SUBNET", "AGENT"];
    let rows = state.hosts.iter().flat_map(|host| {
        let agent = match host.agent {
            AgentState::None => "-",
            AgentState::Running => "running",
            AgentState::Held => "held",
            AgentState::Stopped => "stopped",
        };
        let (address, subnet) = host.second.map_or((None, None), |(address, subnet)| (Some(address), Some(subnet)));
        let (address, subnet) = (both(host.address, address), both(host.subnet, subnet));
        let row = [host.name.clone(), address, subnet, agent.to_owned()];
        let containers = host
            .containers
            .iter()
            .map(|c| [format!("  {}", c.name), both(c.address, c.second), String::new(), String::new()]);
        std::iter::once(row).chain(containers).collect::<Vec<_>>()
    });
    columns(&header, rows)
}

/// One value, or that of each family.
fn both<T: ToString>(first: T, second: Option<T>) -> String {
    second.map_or(first.to_string(), |second| format!("{}, {}", first.to_string(), second.to_string()))
}

/// Prints all labs of this user.
pub(super) fn list(output: Output) -> anyhow::Result<()> {
    let labs = start::list(&super::home()?).map_err(Failure::from)?;
    let values = labs.iter().map(|lab| match &lab.state {
        Some(state) => json!({
            "name": lab.name, "state": "running", "nodes": state.hosts.len(), "containers": state.containers().count(),
        }),
        None => json!({"name": lab.name, "state": "killed", "nodes": 0, "containers": 0}),
    });
    output.print(&json!({"labs": values.collect::<Vec<_>>()}), || list_text(&labs))
}

/// All labs, for people.
fn list_text(labs: &[Listed]) -> String {
    let rows = labs.iter().map(|lab| match &lab.state {
        Some(state) => [
            lab.name.to_string(),
            "running".into(),
            state.hosts.len().to_string(),
            state.containers().count().to_string(),
        ],
        None => {
            let killed = format!("killed (`twill lab down --name {}` removes what is left)", lab.name);
            [lab.name.to_string(), killed, "-".into(), "-".into()]
        }
    });
    columns(&["LAB", "STATE", "NODES", "CONTAINERS"], rows)
}
