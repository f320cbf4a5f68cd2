//! The `twill` binary: node agent, command line, store server and lab.
//!
//! - [`cli`]: one file for each command; each parses its arguments, calls the crate that knows, and prints
//! - [`agent`]: the node daemon
//! - [`stores`]: which store, and our own
//! - [`output`]: tables, JSON, YAML, and how an error meets its user

mod agent;
mod cli;
mod output;
mod probe;
mod stores;

use std::process::ExitCode;

use anyhow::Context;

fn main() -> ExitCode {
    cli::run()
}

/// An async runtime on this thread.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the async runtime")
}

/// Ends when the process is asked to end (SIGTERM, SIGINT); SIGHUP never ends it.
async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int), Ok(mut hup)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()))
    else {
        return std::future::pending().await;
    };
    loop {
        tokio::select! {
            _ = term.recv() => return,
            _ = int.recv() => return,
            _ = hup.recv() => tracing::info!("SIGHUP: nothing to read again, the store is watched"),
        }
    }
}
