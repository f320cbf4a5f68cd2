//! What the tests on the real kernel share.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::disallowed_methods, reason = "a test")]

use std::process::Command;

/// Runs `body` in a fresh network namespace: this test binary once more, inside `unshare`. Says `SKIP` where the system grants none.
pub(crate) fn in_namespace(test: &str, body: impl FnOnce()) {
    if std::env::var_os("TWILL_TEST_NAMESPACE").is_some() {
        return body();
    }
    let user: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
    let proof = Command::new("unshare").args(user).args(["--net", "ip", "link", "set", "lo", "up"]).output().unwrap();
    if !proof.status.success() {
        return println!("SKIP: no network namespace: {}", String::from_utf8_lossy(&proof.stderr));
    }
    let mut again = Command::new("unshare");
    again.args(user).arg("--net").arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]);
    let done = again.env("TWILL_TEST_NAMESPACE", "1").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(done.status.success(), "{}\n{}", text(&done.stdout), text(&done.stderr));
}

/// The same, where a TUN device may be made.
#[allow(dead_code, reason = "not every file of tests needs one")]
pub(crate) fn in_namespace_with_tun(test: &str, body: impl FnOnce()) {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => in_namespace(test, body),
        Err(error) => println!("SKIP: no TUN device may be made: open /dev/net/tun: {error}"),
    }
}

/// Runs a command line that must succeed; gives what it printed.
pub(crate) fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let out = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}
