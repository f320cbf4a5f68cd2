//! Watching a host learn the way to another: route, neighbour, forwarding entry.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use twill_core::host::{HostState, Object, TABLE_MAIN};
use twill_kernel::{Interest, Kernel, LinuxKernel};

use crate::agent;
use crate::children::Children;
use crate::error::{Act, LabError};
use crate::layout::NodePlan;
use crate::proto::Progress;
use crate::wiring::Place;

/// How long entries may take to appear.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `host` has what it takes to reach every one of `others`; each entry is told once, as it appears.
pub(crate) fn knows(
    host: &Place,
    others: &[&NodePlan],
    children: &Children,
    progress: Progress<'_>,
) -> Result<(), LabError> {
    let name = &host.name;
    let watched = host.netns.run(|| {
        let mut kernel = LinuxKernel::open(Interest::default()).act(|| format!("look into {name}"))?;
        let end = Instant::now() + PATIENCE;
        let mut told = BTreeSet::new();
        loop {
            let mut missing = Vec::new();
            for other in others {
                let entries = entries(kernel.mirror(), other);
                for entry in &entries.found {
                    if told.insert(entry.clone()) {
                        progress(format!("{name}: {entry}"));
                    }
                }
                missing.extend(entries.missing.map(|what| format!("{what} for {}", other.name)));
            }
            if missing.is_empty() {
                return Ok(());
            }
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                return Err(LabError::new("agent-failed", format!("{name} has no {}", missing.join(", no "))));
            };
            if children.is_closed() {
                return Err(LabError::new("lab-failed", "the lab is ending"));
            }
            kernel.changes(Some(left.min(LOOK))).act(|| format!("watch {name}"))?;
        }
    });
    watched.act(|| format!("enter {name}"))?
}

/// As [`knows`], for a tunnel in the agent. It announces nothing, so it is asked.
/// `lives_on` lets so much time pass, and is false when the agent has ended.
pub(crate) fn tunnel_knows(
    name: &str,
    folder: &Path,
    others: &[&NodePlan],
    (children, lives_on): (&Children, &dyn Fn(Duration) -> bool),
    progress: Progress<'_>,
) -> Result<(), LabError> {
    let end = Instant::now() + PATIENCE;
    let mut told = BTreeSet::new();
    loop {
        // Refused until the tunnel runs.
        let peers = agent::tunnel_peers(folder).unwrap_or_default();
        let found = |other: &&&NodePlan| {
            let want = (other.subnet.to_string(), other.address.addr.to_string());
            peers.contains(&want)
        };
        for other in others.iter().filter(found) {
            if told.insert(other.subnet) {
                progress(format!("{name}: tunnel {} to {}", other.subnet, other.address.addr));
            }
        }
        if told.len() == others.len() {
            return Ok(());
        }
        if !lives_on(LOOK / 10) || children.is_closed() || Instant::now() >= end {
            let missing: Vec<&str> = others.iter().filter(|o| !found(o)).map(|o| o.name.as_str()).collect();
            let error =
                LabError::new("agent-failed", format!("the tunnel of {name} does not reach {}", missing.join(", ")));
            let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
            return Err(match tun {
                Ok(_) => error,
                Err(closed) => {
                    error.hint(format!("a tunnel needs /dev/net/tun ({closed}); as root: chmod 666 /dev/net/tun"))
                }
            });
        }
    }
}

/// How often it is looked whether the lab is ending.
const LOOK: Duration = Duration::from_millis(200);

/// What a host has of the way to another.
struct Entries {
    /// As lines.
    found: Vec<String>,
    /// The first thing that is missing.
    missing: Option<&'static str>,
}

fn entries(state: &HostState, other: &NodePlan) -> Entries {
    let mut entries = Entries { found: Vec::new(), missing: None };
    let route = state.iter().find_map(|(_, object)| match object {
        Object::Route(route) if route.key.table == TABLE_MAIN && route.key.dst == other.subnet => {
            Some((object, route.entries.first()?))
        }
        _ => None,
    });
    let Some((object, route)) = route else {
        entries.missing = Some("route");
        return entries;
    };
    entries.found.push(object.to_string());
    let Some((dev, via)) = route.dev.zip(route.via) else { return entries };
    let neigh = state.iter().find_map(|(_, object)| match object {
        Object::Neigh(neigh) if (neigh.link, neigh.ip) == (dev, via) && neigh.permanent => Some((object, neigh.mac?)),
        _ => None,
    });
    let Some((object, mac)) = neigh else {
        entries.missing = Some("neighbour");
        return entries;
    };
    entries.found.push(object.to_string());
    let fdb = state.iter().map(|(_, object)| object).find(|object| {
        matches!(object, Object::Fdb(fdb) if (fdb.link, fdb.mac) == (dev, mac) && fdb.dst.first() == Some(&other.address.addr))
    });
    match fdb {
        Some(object) => entries.found.push(object.to_string()),
        None => entries.missing = Some("forwarding entry"),
    }
    entries
}
