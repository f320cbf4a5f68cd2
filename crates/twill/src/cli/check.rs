//! `twill agent --check`: what would be used, and what is in the way. Touches nothing.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;

use serde::Serialize;
use twill_core::alloc::Choice;
use twill_core::backend::{Cx, Rule};
use twill_core::config;
use twill_core::host::{HostState, Link, LinkKind, Object};
use twill_core::iface;
use twill_core::lease::RawLease;
use twill_core::lease_set::LeaseSet;
use twill_core::reconcile::{Finding, taken_tunnels};
use twill_core::state_file::State;
use twill_kernel::process;
use twill_kernel::udp::UdpSocket;
use twill_kernel::{Interest, Kernel, LinuxKernel};
use twill_store::{RawConfig, StoreError};

use super::offline::{choose, parse_config};
use crate::agent::compose::{self, Network};
use crate::agent::settings::Settings;
use crate::agent::{load_state, missing_capabilities, refuse_beside_flannel};
use crate::output::{FINDINGS, Failure, Output, on_a_line};
use crate::stores;

#[derive(Debug, Default, Serialize)]
struct Check {
    interface: Option<String>,
    why: Option<String>,
    addresses: Vec<String>,
    mtu: Option<u32>,
    /// Whose config and leases are judged.
    store: Option<String>,
    networks: Vec<String>,
    backend: Option<String>,
    ports: Vec<String>,
    findings: Vec<Finding>,
}

impl Check {
    fn find(&mut self, code: &str, object: &str, evidence: &str, fix: &str) {
        let (code, object, evidence, fix) = (code.into(), object.into(), evidence.into(), fix.into());
        self.findings.push(Finding { code, object, evidence, fix });
    }

    fn failure(&mut self, object: &str, failure: &Failure) {
        self.find(failure.code, object, &failure.message, failure.hint.as_deref().unwrap_or("see the message"));
    }
}

/// Looks, prints, and exits with 3 when something is in the way.
pub(crate) fn run(settings: &Settings, output: Output) -> anyhow::Result<ExitCode> {
    let mut check = Check::default();
    for (name, failure) in missing_capabilities() {
        check.failure(name, &failure);
    }
    if let Err(failure) = refuse_beside_flannel() {
        check.failure("host", &failure);
    }
    own_store(&mut check, settings);
    let kernel = LinuxKernel::open(Interest::default())?;
    let host = kernel.mirror();
    let chosen = match iface::choose(host, &settings.wishes) {
        Ok(chosen) => Some(chosen),
        Err(refusal) => {
            check.find(refusal.code, "underlay", &refusal.message, &refusal.hint);
            None
        }
    };
    if let Some(chosen) = &chosen {
        check.interface = Some(chosen.underlay.link.to_string());
        check.why = Some(chosen.why.clone());
        check.addresses =
            [true, false].into_iter().filter_map(|v4| chosen.underlay.public(v4)).map(|ip| ip.to_string()).collect();
    }
    let (text, entries) = match of_store(&mut check, settings) {
        Ok((from, text, entries)) => {
            check.store = Some(from);
            (text, entries)
        }
        Err(failure) => {
            check.failure("store", &failure);
            return finish(&check, output);
        }
    };
    check.findings.extend(text.as_ref().and_then(|raw| stores::ignored_network(settings.asked_network, &raw.value)));
    match parse_config(text, &settings.store) {
        Ok((config, ignored)) => {
            for key in ignored {
                check.find("config-key-ignored", "network config", &key, "remove it, or correct its spelling");
            }
            check.networks = config.networks().iter().map(ToString::to_string).collect();
            let state = load_state(&settings.state_dir)?;
            let network = chosen.map(|chosen| Network::new(&config, chosen.underlay, host, &state, settings.way_out));
            match network {
                Some(Ok(network)) => {
                    on_network(&mut check, &network, &config, host, &state, settings);
                    check.findings.extend(of_leases(network, settings, &config, entries, host, &state));
                }
                Some(Err(refusals)) => refusals.iter().for_each(|refusal| {
                    check.find(refusal.code, "backend", &refusal.message, &refusal.hint);
                }),
                None => {}
            }
        }
        Err(error) => {
            if let Some(failure) = error.downcast_ref::<Failure>() {
                check.failure("network config", failure);
            }
        }
    }
    finish(&check, output)
}

/// Whether the store that we are to serve may listen where it is told to.
fn own_store(check: &mut Check, settings: &Settings) {
    if let Some(listen) = settings.serve_store {
        let verdicts = [stores::check_listen(listen, settings.insecure), stores::check_is_ours(listen)];
        verdicts
            .iter()
            .filter_map(|verdict| verdict.as_ref().err())
            .for_each(|failure| check.failure("store", failure));
    }
}

fn finish(check: &Check, output: Output) -> anyhow::Result<ExitCode> {
    output.print(check, || describe(check))?;
    Ok(if check.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(FINDINGS) })
}

/// The config and the leases of the store, and where they stand; of a store that we are to serve ourselves what lies in its folder, or
/// what we would write.
fn of_store(check: &mut Check, settings: &Settings) -> Result<(String, Option<RawConfig>, Vec<RawLease>), Failure> {
    let runtime = crate::runtime().map_err(|e| Failure::new("failed", e.to_string()))?;
    let store = settings.store.connect()?;
    let found = runtime.block_on(async {
        let config = store.config().await?;
        Ok((config, store.list().await?.entries))
    });
    let answers = format!("{}, which answers", store.endpoints());
    let Some(listen) = settings.serve_store else {
        return found.map(|(config, leases)| (answers, config, leases)).map_err(|error: StoreError| error.into());
    };
    // While it is served already it answers for itself.
    if let Ok((Some(config), leases)) = found {
        return Ok((answers, Some(config), leases));
    }
    if stores::check_is_ours(listen).is_ok()
        && let Err(failure) = stores::check_nobody_listens(listen)
    {
        check.failure("store", &failure);
    }
    let data = settings.state_dir.join("store");
    if let Some((config, leases)) = stores::look(&data, settings.store.prefix())? {
        return Ok((format!("the data in {}, whose store does not run", data.display()), Some(config), leases));
    }
    let value = config::NetworkConfig::default_json(&[settings.network], "vxlan").into_bytes();
    let written = Some(RawConfig { value, mod_rev: 0 });
    Ok((format!("the config that the store in {} would get", data.display()), written, Vec::new()))
}

fn on_network(
    check: &mut Check,
    network: &Network,
    config: &config::NetworkConfig,
    host: &HostState,
    state: &State,
    settings: &Settings,
) {
    check.backend = Some(network.backend.lease_type().unwrap_or("udp").to_owned());
    check.mtu = network.mtu().ok().map(|mtu| mtu.get());
    tunnels_port(check, network, config, host, state);
    if let Some(listen) = settings.serve_store.filter(|listen| !listen.ip().is_loopback()) {
        check.ports.push(format!("tcp/{}", listen.port()));
    }
    for refusal in network.left_out(&network.cx.underlay) {
        check.find(refusal.code, "node", &refusal.message, &refusal.hint);
    }
    // Which subnets it will be matters to no device: the whole networks stand for them.
    let cx = Cx { subnets: network.cx.networks.clone(), ..network.cx.clone() };
    if let Ok(base) = network.backend.base(&cx) {
        check.findings.extend(taken_tunnels(&base, host));
    }
    let env = std::fs::read_to_string(&settings.subnet_file).unwrap_or_default();
    let (devices, remembered) = compose::ours(network, &config.networks(), state, &env);
    for clash in config::overlaps(&config.networks(), host, &devices, &remembered) {
        check.find(
            "network-overlap",
            &format!("{:?}", config.networks()),
            &clash,
            "choose another Network, or remove what clashes",
        );
    }
}

/// The tunnel's port, and whether it can have it. Another program's socket keeps it from us; our device does not, nor another VXLAN one
/// from ours.
fn tunnels_port(check: &mut Check, network: &Network, config: &config::NetworkConfig, host: &HostState, state: &State) {
    // The kernel's VXLAN listens on all addresses of the host, our tunnel on one.
    let everywhere = |v4| if v4 { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    let underlay = &network.cx.underlay;
    let own = |v4: bool| if v4 { underlay.v4 } else { underlay.v6 }.map(|inet| inet.addr);
    let over: BTreeSet<bool> = network.cx.networks.iter().map(|n| network.backend.over_v4(n.is_v4())).collect();
    let (port, at): (_, Vec<IpAddr>) = match &config.backend {
        config::BackendConfig::Vxlan(vxlan) => (vxlan.port, over.into_iter().map(everywhere).collect()),
        config::BackendConfig::Udp(udp) => (udp.port, over.into_iter().filter_map(own).collect()),
        config::BackendConfig::NotBuilt(_) => return,
    };
    check.ports.push(format!("udp/{port}"));
    let devices = network.backend.devices(&network.cx.networks);
    let shares = matches!(config.backend, config::BackendConfig::Vxlan(_));
    let has_it = |link: &Link| match &link.kind {
        LinkKind::Vxlan(vxlan) => vxlan.port == port && link.up && (shares || state.devices.contains_key(&link.name)),
        _ => devices.contains(&link.name),
    };
    if host.iter().any(|(_, object)| matches!(object, Object::Link(link) if has_it(link))) {
        return;
    }
    let mut at = at.into_iter().map(|ip| SocketAddr::new(ip, port.get()));
    // A free port is not taken for a moment: the agent that needs it may just be starting. Whether a socket of the other family is in
    // the way, only the kernel knows.
    let others = process::udp_sockets();
    let is_taken = |at: &SocketAddr| {
        others.iter().any(|other| other.port() == at.port())
            && UdpSocket::bind(*at).is_err_and(|error| error.kind() == ErrorKind::AddrInUse)
    };
    if let Some(at) = at.find(is_taken) {
        check.find(
            "port-taken",
            &format!("udp/{port}"),
            &format!("another program, or a VXLAN device, has a socket in the way of {at}, which the tunnel needs"),
            &format!("end it (ss -ulpn 'sport = :{port}' or ip -d link show type vxlan names it), or set another Backend.Port in the network config"),
        );
    }
}

/// The leases of others that would be left out, as `status` shows them.
fn of_leases(
    mut network: Network,
    settings: &Settings,
    config: &config::NetworkConfig,
    entries: Vec<RawLease>,
    host: &HostState,
    state: &State,
) -> Vec<Finding> {
    let mut leases = LeaseSet::default();
    if let Ok(rule) = Rule::new(config) {
        leases.follow(rule);
    }
    leases.reset(entries);
    let mut own = None;
    match choose(settings, config, &network, &leases, host, state) {
        Choice::Keep(lease) | Choice::GiveBack(lease) => {
            network.take(&lease.key, Some(&lease));
            own = Some(lease.key.to_string());
        }
        Choice::Create(key) => network.take(&key, None),
        Choice::Refuse(_) => network.cx.subnets.clone_from(&network.cx.networks),
    }
    let others = leases.names().filter(|name| own.as_deref() != Some(&***name));
    let faults = others.filter_map(|name| network.reach(&leases, name)?.fault);
    faults.map(|fault| compose::of_lease(&fault)).collect()
}

fn describe(check: &Check) -> String {
    let mut lines = Vec::new();
    if let (Some(interface), Some(why)) = (&check.interface, &check.why) {
        lines.push(format!("interface  {interface} ({}): {why}", check.addresses.join(", ")));
    }
    if let Some(store) = &check.store {
        lines.push(format!("store      {store}"));
    }
    if !check.networks.is_empty() {
        lines.push(format!(
            "network    {}, backend {}",
            check.networks.join(", "),
            check.backend.as_deref().unwrap_or("none")
        ));
    }
    if !check.ports.is_empty() {
        lines.push(format!("open       {} between all nodes", check.ports.join(", ")));
    }
    if let Some(mtu) = check.mtu {
        lines.push(format!("MTU        {mtu} for containers"));
    }
    if check.findings.is_empty() {
        lines.push("findings   none".into());
    }
    for finding in &check.findings {
        lines.push(format!("finding    {}: {}", finding.code, on_a_line(&finding.evidence)));
        lines.push(format!("           fix: {}", finding.fix));
    }
    lines.join("\n")
}
