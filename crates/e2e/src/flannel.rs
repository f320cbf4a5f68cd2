//! The real flannel, where it is installed (`scripts/install-test-needs` builds it from its Go module).

use std::ffi::OsStr;
use std::path::Path;

use crate::eventually;
use crate::net::Host;
use crate::node::{Daemon, spawn};

/// Starts flanneld on `host` with `eth0` as its underlay and its files below `dir`; gives it back when it has all its work
/// behind it: told to end before that, it may not end.
pub fn flanneld(program: impl AsRef<OsStr>, host: &Host, store: &str, dir: &Path, flags: &str) -> Daemon {
    let log = dir.join("flanneld.log");
    let runs = || std::fs::read_to_string(&log).unwrap_or_default().matches("to renew lease").count();
    let before = runs();
    let mut command = host.command(program);
    command.args(["--etcd-endpoints", store, "--iface", "eth0", "--subnet-file"]).arg(dir.join("subnet.env"));
    let daemon = spawn(
        {
            command.args(flags.split_whitespace());
            command
        },
        &log,
    );
    eventually("flannel watches over its lease", || {
        if runs() > before { Ok(()) } else { Err(std::fs::read_to_string(&log).unwrap_or_default()) }
    });
    daemon
}
