//! The node daemon.
//!
//! - [`settings`]: flags, environment, file
//! - [`session`]: the node's life in the store (async)
//! - [`reconciler`]: the thread that owns the kernel
//! - [`compose`]: from leases and facts to what is wanted
//! - [`tunnel`], [`handover`]: the udp backend's tunnel, and how the next agent gets it
//! - [`place`]: one agent for each state folder and network namespace
//! - [`control`], [`view`], [`guests`]: the control API and what it shows

pub(crate) mod compose;
pub(crate) mod control;
pub(crate) mod guests;
mod handover;
pub(crate) mod place;
pub(crate) mod reconciler;
pub(crate) mod session;
pub(crate) mod settings;
pub(crate) mod tunnel;
pub(crate) mod view;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, oneshot, watch};
use twill_cni::records::Records;
use twill_core::backend;
use twill_core::config;
use twill_core::host::HostState;
use twill_core::iface;
use twill_core::net::NodeId;
use twill_core::state_file::State;
use twill_kernel::{files, process};

use self::control::Control;
use self::reconciler::{Order, Reconciler};
use self::session::Session;
use self::settings::Settings;
use self::tunnel::{SharedGauge, TunnelHost};
use self::view::{StoreView, View};
use crate::output::Failure;
use crate::stores;

/// How long answers may take when the agent ends.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How often containers are looked for that have ended without a DEL.
const SWEEP: Duration = Duration::from_secs(60);

const NET_ADMIN: &str = "CAP_NET_ADMIN";
/// Capabilities with their bits (include/uapi/linux/capability.h), and what they are for.
const NEEDED: [(u32, &str, &str); 2] =
    [(12, NET_ADMIN, "to make devices and routes"), (13, "CAP_NET_RAW", "to probe peers and capture frames")];
/// How a process comes to them.
const GRANT: &str = "run as root; or in the unit AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW; or setcap cap_net_admin,cap_net_raw+ep on the twill binary";

/// Runs the agent until it is told to end. Everything stays in the kernel.
pub(crate) fn run(settings: Settings) -> anyhow::Result<()> {
    process::one_heap();
    let view = Arc::new(Mutex::new(View { state: "starting".into(), ..View::default() }));
    let (host_sender, host) = watch::channel(Arc::new(HostState::new()));
    let gauge = SharedGauge::default();
    let attachments = settings.state_dir.join("attachments");
    let tunnel = |waker| TunnelHost::new(waker, Arc::clone(&gauge), &settings.state_dir, !settings.tunnel_offloads);
    let mut reconciler = Reconciler::new(host_sender, Arc::clone(&view), Records::new(attachments.clone()), tunnel)
        .context("look at this host's network")?;
    let store = store(&settings)?;
    let _place = place::take(&settings, &mut reconciler)?;
    let state = load_state(&settings.state_dir)?;
    show(&view, &state, &store);
    let (waker, (orders, receiver)) = (reconciler.waker(), std::sync::mpsc::channel());
    let thread = std::thread::Builder::new().name("reconciler".into());
    let thread = thread.spawn(move || reconciler.run(&receiver)).context("start the reconciler")?;
    let result = crate::runtime()?.block_on(async {
        let listener =
            control::listen(&settings.run_dir).with_context(|| format!("listen in {}", settings.run_dir.display()))?;
        if let Some(address) = settings.serve_store {
            serve_store(&settings, address, &host.borrow().clone(), &state, &view).await?;
        } else if store.is_open()
            && !settings.store.store.iter().all(|url| url.contains("127.0.0.1") || url.contains("[::1]"))
        {
            tracing::warn!(endpoints = store.endpoints(), "nothing authenticates the store to us, nor us to the store");
        }
        let (commands, command_receiver) = mpsc::channel(16);
        let control = Control {
            view: Arc::clone(&view),
            gauge,
            orders: orders.clone(),
            waker: waker.clone(),
            commands,
            host: host.clone(),
            settings: settings.clone(),
        };
        let session =
            Session::new(settings.clone(), store, orders.clone(), waker.clone(), host, view, command_receiver, state);
        let (gone, handed_over) = oneshot::channel();
        handover::offer(&settings.run_dir, orders.clone(), waker.clone(), gone);
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(control::serve(control, listener, async { drop(stopped.await) }));
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        tokio::select! {
            () = session.run() => tracing::info!("the node has left"),
            () = crate::terminated() => tracing::info!("ending; devices, routes and lease stay"),
            Ok(()) = handed_over => tracing::info!("the next agent has the tunnel: ending"),
            () = watchdog() => {}
            () = sweep(attachments) => {}
        }
        // Whoever asked to leave is told that it was done; a client that stays is not waited for.
        drop(stop);
        let _ = tokio::time::timeout(LAST_WORDS, served).await;
        anyhow::Ok(())
    });
    let _ = orders.send(Order::End);
    waker.wake();
    let _ = thread.join();
    for socket in ["twill.sock", "handover.sock"] {
        let _ = std::fs::remove_file(settings.run_dir.join(socket));
    }
    result
}

/// The store. What may be wrong with it is found before an agent that runs is made to end for this one.
fn store(settings: &Settings) -> anyhow::Result<twill_store::EtcdStore> {
    let store = settings.store.connect()?;
    if let Some(address) = settings.serve_store {
        stores::check_listen(address, settings.insecure)?;
        stores::check_is_ours(address)?;
    }
    Ok(store)
}

/// Who we are, before the store has answered.
fn show(view: &Mutex<View>, state: &State, store: &twill_store::EtcdStore) {
    if let Ok(mut view) = view.lock() {
        view.node = state.node.to_string();
        view.store =
            StoreView { endpoints: store.endpoints(), state: "not-asked".into(), revision: 0, open: store.is_open() };
    }
}

/// Frees what containers have left that are gone, now and then; never ends.
async fn sweep(attachments: PathBuf) {
    let mut turn = tokio::time::interval(SWEEP);
    loop {
        turn.tick().await;
        let records = Records::new(attachments.clone());
        match tokio::task::spawn_blocking(move || twill_cni::sweep::sweep(&records)).await {
            Ok(Ok(freed)) => {
                freed.iter().for_each(|name| tracing::info!(name, "the container is gone, its addresses are free"))
            }
            Ok(Err(error)) => tracing::warn!(%error, hint = error.details, "cannot free what containers have left"),
            Err(error) => tracing::error!(%error, "the task that frees addresses ended"),
        }
    }
}

/// The capabilities that this process lacks, by name. Without the first the kernel refuses every step.
pub(crate) fn missing_capabilities() -> Vec<(&'static str, Failure)> {
    let have = process::network_capabilities();
    let missing = NEEDED.into_iter().filter(|(bit, ..)| have & (1 << bit) == 0);
    let failure = |(_, name, what_for)| {
        let failure = Failure::new(
            "capability-missing",
            format!("this process lacks {name} over its network namespace, {what_for}"),
        );
        (name, failure.hint(GRANT))
    };
    missing.map(failure).collect()
}

/// Two daemons on one device would undo each other's work.
pub(crate) fn refuse_beside_flannel() -> Result<(), Failure> {
    match process::neighbours_named("flanneld").first() {
        None => Ok(()),
        Some(pid) => {
            let message = format!("flanneld (pid {pid}) runs in this network namespace");
            Err(Failure::new("flanneld-running", message)
                .hint("stop it first; its devices, routes and lease are taken over in place"))
        }
    }
}

/// Identity and memory. A machine that was cloned is another node.
pub(crate) fn load_state(dir: &Path) -> anyhow::Result<State> {
    let path = dir.join("state.json");
    let machine = files::machine_id();
    if let Some(bytes) = files::read_limited(&path, 1 << 20).with_context(|| format!("read {}", path.display()))? {
        let state = State::parse(&bytes).map_err(|e| {
            Failure::new("bad-state", format!("{}: {e}", path.display())).hint("move it away to begin as a new node")
        })?;
        if state.machine == machine {
            return Ok(state);
        }
        tracing::warn!(file = %path.display(), "the state was made on another machine: this node gets an identity of its own");
    }
    Ok(State::new(NodeId(files::random_bytes().context("make an identity")?), machine))
}

/// The embedded store, with a network config where there is none, and the line to type on the next host.
async fn serve_store(
    settings: &Settings,
    address: SocketAddr,
    host: &HostState,
    state: &State,
    view: &Mutex<View>,
) -> anyhow::Result<()> {
    let (text, written) = stores::first_config(&[settings.network], "vxlan")?;
    let data = settings.state_dir.join("store");
    let open = stores::open(address, &data).await?;
    tokio::spawn(async move {
        if let Err(error) = stores::serve(open, address, &data, std::future::pending()).await {
            tracing::error!(%error, "the store ended");
        }
    });
    let store = settings.store.connect()?;
    let found = store.config().await.map_err(Failure::from)?;
    if found.is_none() {
        // What an earlier run left is no stranger's.
        let devices = backend::build(&written.backend)
            .map_err(|refusal| Failure::new(refusal.code, refusal.message).hint(refusal.hint))?
            .devices(&[settings.network]);
        if let Some(clash) =
            config::overlaps(&[settings.network], host, &devices, &state.known().collect::<Vec<_>>()).first()
        {
            let message = format!("the network {} overlaps what this host has: {clash}", settings.network);
            return Err(Failure::new("network-overlap", message).hint("choose another with --network PREFIX").into());
        }
        store.create_config(text.as_bytes()).await.map_err(Failure::from)?;
        tracing::info!(config = text, "wrote the network config");
    }
    if !address.ip().is_loopback() {
        let at = reached_at(address, host, settings)
            .map_or_else(|| format!("ADDRESS-OF-THIS-HOST:{}", address.port()), |at| at.to_string());
        tracing::info!("on the next host type: twill agent --store http://{at}");
    }
    let ignored = found.and_then(|raw| stores::ignored_network(settings.asked_network, &raw.value));
    if let (Some(finding), Ok(mut view)) = (ignored, view.lock()) {
        tracing::warn!(code = finding.code, hint = finding.fix, "{}", finding.evidence);
        view.findings.push(finding);
    }
    Ok(())
}

/// Where other hosts reach what listens at this address; `None`: nothing says which of this host's addresses is meant.
fn reached_at(listen: SocketAddr, host: &HostState, settings: &Settings) -> Option<SocketAddr> {
    if !listen.ip().is_unspecified() {
        return Some(listen);
    }
    let underlay = iface::choose(host, &settings.wishes).ok()?.underlay;
    // A socket of [::] hears both.
    let inet = underlay.v4.or(underlay.v6.filter(|_| listen.is_ipv6()))?;
    Some(SocketAddr::new(inet.addr, listen.port()))
}

/// Tells systemd that we live, where it asks.
async fn watchdog() {
    let Some(every) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let mut beat = tokio::time::interval(every / 2);
    loop {
        beat.tick().await;
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    }
}
