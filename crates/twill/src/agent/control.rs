//! The control API: HTTP/1 and JSON over a unix socket, for root and the socket's group.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use twill_core::host::HostState;
use twill_kernel::Waker;

use super::guests;
use super::reconciler::Order;
use super::session::Command;
use super::settings::Settings;
use super::tunnel::SharedGauge;
use super::view::{self, Peers, TunnelView, View};
use crate::output::Failure;

/// What the handlers reach.
#[derive(Clone)]
pub(crate) struct Control {
    pub(crate) view: Arc<Mutex<View>>,
    pub(crate) gauge: SharedGauge,
    pub(crate) orders: Sender<Order>,
    pub(crate) waker: Waker,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) host: watch::Receiver<Arc<HostState>>,
    pub(crate) settings: Settings,
}

/// Makes the socket; an old one that nobody listens on is replaced.
pub(crate) fn listen(run_dir: &Path) -> std::io::Result<UnixListener> {
    std::fs::create_dir_all(run_dir)?;
    let path = socket(run_dir);
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Serves until `stop` ends, and then until what is asked has been answered.
pub(crate) async fn serve(control: Control, listener: UnixListener, stop: impl Future<Output = ()> + Send + 'static) {
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/store", get(store))
        .route("/v1/peers", get(peers))
        .route("/v1/tunnel", get(tunnel))
        .route("/v1/plan", get(plan))
        .route("/v1/hold", post(|control| hold(control, true)))
        .route("/v1/release", post(|control| hold(control, false)))
        .route("/v1/resync", post(resync))
        .route("/v1/leave", post(leave).get(leaving))
        .with_state(control);
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stop).await {
        tracing::error!(%error, "the control socket ended");
    }
}

type Answer = Result<Json<Value>, Refused>;

struct Refused(Failure);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let Failure { code, message, hint, .. } = self.0;
        let body = json!({"schema": 1, "error": {"code": code, "message": message, "hint": hint}});
        (StatusCode::CONFLICT, Json(body)).into_response()
    }
}

/// The value as an object with `"schema": 1`.
fn answer(value: impl serde::Serialize) -> Answer {
    let mut body = json!({"schema": 1});
    if let (Ok(Value::Object(fields)), Some(object)) = (serde_json::to_value(value), body.as_object_mut()) {
        object.extend(fields);
    }
    Ok(Json(body))
}

fn ended() -> Refused {
    Refused(Failure::new("agent-busy", "the agent waits for something else").hint("see: twill status"))
}

async fn status(State(control): State<Control>) -> Answer {
    let mut view = control.view.lock().map_err(|_| ended())?.clone();
    let gauge = control.gauge.lock().map_err(|_| ended())?.clone();
    view.tunnel = gauge.map(|gauge| TunnelView::of(&gauge, view.guarded));
    let host = control.host.borrow().clone();
    view.findings.extend(guests::findings(&control.settings.state_dir, &host, &view));
    answer(view)
}

/// Where the store is, for commands that ask it themselves: names of files, and no secret.
async fn store(State(control): State<Control>) -> Answer {
    answer(control.settings.store.absolute())
}

async fn tunnel(State(control): State<Control>) -> Answer {
    let gauge = control.gauge.lock().map_err(|_| ended())?.clone();
    let gauge = gauge.ok_or_else(|| {
        let failure = Failure::new("no-tunnel", "no tunnel of the udp backend runs on this node");
        Refused(failure.hint("the counters of other backends are the kernel's: ip -s link; see also: twill status"))
    })?;
    let guarded = control.view.lock().map_err(|_| ended())?.guarded;
    answer(view::counters(&gauge, guarded))
}

async fn peers(State(control): State<Control>) -> Answer {
    answer(Peers { peers: ask(&control, Command::Peers).await? })
}

async fn plan(State(control): State<Control>) -> Answer {
    let (reply, plan) = oneshot::channel();
    control.orders.send(Order::Plan(reply)).map_err(|_| ended())?;
    control.waker.wake();
    answer(plan.await.map_err(|_| ended())?)
}

async fn hold(State(control): State<Control>, held: bool) -> Answer {
    control.orders.send(Order::Hold(held)).map_err(|_| ended())?;
    control.waker.wake();
    tracing::info!(held, "repairs");
    answer(json!({"held": held}))
}

async fn resync(State(control): State<Control>) -> Answer {
    let withdrawn = ask(&control, Command::Accept).await?.map_err(Refused)?;
    answer(json!({"withdrawn": withdrawn}))
}

async fn leaving(State(control): State<Control>) -> Answer {
    let steps = ask(&control, Command::Leaving).await?.map_err(Refused)?;
    answer(json!({"steps": steps, "attached": guests::attached(&control.settings.state_dir)}))
}

async fn leave(State(control): State<Control>) -> Answer {
    ask(&control, Command::Leave).await?.map_err(Refused)?;
    answer(json!({"left": true}))
}

async fn ask<T>(control: &Control, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Refused> {
    let (reply, answer) = oneshot::channel();
    control.commands.send(command(reply)).await.map_err(|_| ended())?;
    let patience = std::time::Duration::from_secs(10);
    tokio::time::timeout(patience, answer).await.map_err(|_| ended())?.map_err(|_| ended())
}

/// True when an agent listens there: one that was killed has left its socket.
pub(crate) fn is_there(run_dir: &Path) -> bool {
    let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::PermissionDenied;
    std::os::unix::net::UnixStream::connect(socket(run_dir)).map_or_else(refused, |_| true)
}

fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("twill.sock")
}

/// Asks a running agent. `Ok(None)`: there is none.
pub(crate) async fn call<T: DeserializeOwned>(run_dir: &Path, method: &str, path: &str) -> Result<Option<T>, Failure> {
    let socket = socket(run_dir);
    let stream = match UnixStream::connect(&socket).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let message = format!("the agent at {} is for root and the socket's group", socket.display());
            return Err(Failure::new("agent-forbidden", message).hint("type sudo in front"));
        }
        Err(_) => return Ok(None),
    };
    let failed = |e: &dyn std::fmt::Display| {
        Failure::new("control-socket", format!("ask the agent at {}: {e}", socket.display()))
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| failed(&e))?;
    let connection = tokio::spawn(connection);
    let request =
        hyper::Request::builder().method(method).uri(path).header("host", "twill").body(Empty::<Bytes>::new());
    let response = sender.send_request(request.map_err(|e| failed(&e))?).await.map_err(|e| failed(&e))?;
    let ok = response.status().is_success();
    let body = response.into_body().collect().await.map_err(|e| failed(&e))?.to_bytes();
    connection.abort();
    if ok {
        return serde_json::from_slice(&body).map(Some).map_err(|e| failed(&e));
    }
    let body: Value = serde_json::from_slice(&body).map_err(|e| failed(&e))?;
    let text = |key: &str| body["error"][key].as_str().unwrap_or_default().to_owned();
    Err(Failure::new("agent-refused", text("message")).hint(text("hint")))
}
