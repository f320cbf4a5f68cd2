//! From one agent to the next: the tunnel's descriptors, over a socket, once the old one has stopped to read them.
//!
//! ```text
//!   new: twill agent --takeover ──connect──▶ handover.sock ──▶ old: stops its pumps
//!   new: starts pumps           ◀──JSON + TUN + socket─────    old: ends, and lets go of the state's lock
//! ```
//! Nothing is lost in between: the device and the socket stay open, and queue.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use twill_core::backend::TunnelSpec;
use twill_kernel::Waker;

use super::reconciler::Order;
use crate::output::Failure;

const VERSION: u32 = 1;
const MOST: usize = 4096;
/// How long the other side may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The first message.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    version: u32,
    /// `None`: no tunnel runs, and no descriptor comes.
    tunnel: Option<TunnelSpec>,
}

/// A tunnel whose pumps have stopped.
#[derive(Debug)]
pub(crate) struct Handed {
    pub(crate) spec: TunnelSpec,
    pub(crate) tun: OwnedFd,
    pub(crate) udp: OwnedFd,
}

/// Listens for the next agent, on a thread of its own; `gone` is told once it has everything.
pub(crate) fn offer(run_dir: &Path, orders: Sender<Order>, waker: Waker, gone: oneshot::Sender<()>) {
    if let Err(error) = listen(run_dir, orders, waker, gone) {
        tracing::warn!(%error, "no agent can take over from this one without loss");
    }
}

fn listen(run_dir: &Path, orders: Sender<Order>, waker: Waker, gone: oneshot::Sender<()>) -> io::Result<()> {
    let path = run_dir.join("handover.sock");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    let serve = move || {
        for stream in listener.incoming().flatten() {
            let (reply, handed) = oneshot::channel();
            if orders.send(Order::HandOver(reply)).is_err() {
                return;
            }
            waker.wake();
            let Ok(handed) = handed.blocking_recv() else { return };
            match send(&stream, handed.as_ref()) {
                Ok(()) => {
                    let _ = gone.send(());
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "the next agent went away: this one goes on");
                    let _ = orders.send(Order::TakeBack(handed));
                    waker.wake();
                }
            }
        }
    };
    std::thread::Builder::new().name("handover".into()).spawn(serve).map(drop)
}

fn send(stream: &UnixStream, handed: Option<&Handed>) -> io::Result<()> {
    let hello = Hello { version: VERSION, tunnel: handed.map(|handed| handed.spec.clone()) };
    let bytes = serde_json::to_vec(&hello)?;
    let fds = handed.map(|handed| [handed.tun.as_fd(), handed.udp.as_fd()]);
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
    // The other side says that it has them.
    stream.set_read_timeout(Some(PATIENCE))?;
    io::Read::read_exact(&mut &*stream, &mut [0])
}

/// Gets the tunnel from the running agent, which then ends. `None`: no agent listens; inside, it has no tunnel.
pub(crate) fn take(run_dir: &Path) -> Result<Option<Option<Handed>>, Failure> {
    let path = run_dir.join("handover.sock");
    let Ok(stream) = UnixStream::connect(&path) else {
        tracing::info!(socket = %path.display(), "no agent to take over from");
        return Ok(None);
    };
    let failed = |error: &dyn std::fmt::Display| {
        Failure::new("takeover-failed", format!("take over from the agent at {}: {error}", path.display()))
            .hint("stop the running agent, then start this one without --takeover")
    };
    receive(&stream).map(Some).map_err(|error| failed(&error))
}

fn receive(stream: &UnixStream) -> io::Result<Option<Handed>> {
    let bad = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut bytes = [0; MOST];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let hello: Hello = serde_json::from_slice(&bytes[..got.bytes])?;
    if hello.version > VERSION {
        return Err(bad(&format!("its message has version {}, and this program knows {VERSION}", hello.version)));
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(bad("too many descriptors came"));
    }
    let mut fds: Vec<OwnedFd> = Vec::with_capacity(2);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let handed = match (hello.tunnel, fds.pop(), fds.pop()) {
        (Some(spec), Some(udp), Some(tun)) => Some(Handed { spec, tun, udp }),
        (None, None, None) => None,
        _ => return Err(bad("a tunnel has two descriptors")),
    };
    io::Write::write_all(&mut &*stream, &[1])?;
    Ok(handed)
}
