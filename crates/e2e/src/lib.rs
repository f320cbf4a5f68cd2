//! What every end-to-end test shares: the built binaries, and waiting for facts.
//!
//! The tests in `tests/` run real programs in network namespaces that they made themselves, and look from outside.

pub mod capture;
pub mod cni;
pub mod flannel;
pub mod foreign;
pub mod net;
pub mod node;
pub mod overlay;
pub mod ping;
pub mod site;

use std::fmt::Debug;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long a fact may take to become true.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Where the built binaries lie.
static BUILT: OnceLock<PathBuf> = OnceLock::new();

/// Binaries that are there already, instead of what [`bin`] would build; before its first call.
pub fn use_binaries_in(dir: PathBuf) {
    let _ = BUILT.set(dir);
}

/// The built binary `name`, built once for each test process from this workspace.
pub fn bin(name: &str) -> PathBuf {
    let dir = BUILT.get_or_init(|| {
        let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
        let done = Command::new(env!("CARGO"))
            .args([
                "build",
                "--quiet",
                "--locked",
                "--package",
                "twill",
                "--package",
                "twill-cni",
                "--message-format=json",
            ])
            .current_dir(workspace)
            .output()
            .expect("run cargo build");
        assert!(done.status.success(), "cargo build failed: {}", String::from_utf8_lossy(&done.stderr));
        let out = String::from_utf8_lossy(&done.stdout);
        let path = out
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .find_map(|m| Some(PathBuf::from(m["executable"].as_str()?)))
            .expect("cargo names the executable that it built");
        path.parent().expect("an executable lies in a folder").to_owned()
    });
    dir.join(name)
}

/// Waits until `check` gives `Ok`, and gives its value; fails with the last `Err` when patience ends.
pub fn eventually<T, E: Debug>(what: &str, mut check: impl FnMut() -> Result<T, E>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        match check() {
            Ok(value) => return value,
            Err(error) if Instant::now() >= end => panic!("never came true: {what}: {error:?}"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// True when this machine grants what a backend needs; when not, says so as a counted skip.
pub fn grants(backend: &str) -> bool {
    if backend != "udp" {
        return true;
    }
    // A distribution lets everybody open it; a machine that does not lets nobody but root have a TUN device.
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    if let Err(error) = &opened {
        println!("SKIP: no TUN device may be made: open /dev/net/tun: {error}");
    }
    opened.is_ok()
}

/// True when the program is on PATH; when it is not, says so as a counted skip.
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    if !found {
        println!("SKIP: {program} is not installed");
    }
    found
}
