//! `cargo run --release -p twill-bench -- [NAME…]`: the measurements of docs and issues, each beside its reference in the same run.
//!
//! | name | what | reference | target |
//! |---|---|---|---|
//! | `cold` | exec to last route, 10,000 and 20,000 leases; device lost; one change; memory; idle | `ip -batch` + `bridge -batch` of the same objects | 1.3 ×; 2.2 ×; 1.5 ×; 5 ms p99; 25 MB; 0.6 % |
//! | `small` | exec to first route; idle with 100 peers | | 100 ms; 0.3 % |
//! | `lab` | `twill lab`, start to end | | 3 s |
//! | `drift` | 100 peers, every kind of drift, altered to repaired | | 200 ms |
//! | `together` | 200 agents at once for 200 free subnets | | 200 distinct |
//! | `cni` | ADD, DEL, 110 pods at once, an address beside 60,000 | Debian's bridge + host-local, a bare RTM_DELLINK | 0.25 ×; + 5 ms; 0.3 ×; 1.25 × |
//! | `tcp` | TCP between containers over VXLAN, with masquerading and without | the same network by hand, with masquerading and without | 0.95 × |
//! | `outage` | the store away for an hour (`--minutes N`): pings lost, repairs; by its name only | | 0; 200 ms |
//! | `udp` | the udp backend: TCP, 64-byte UDP, RTT (parts: `udp-tcp`, `udp-streams`, `udp-cut`, `udp-packets`, `udp-rtt`, `udp-many`, `udp-flood`, `udp-restart`, `udp-flannel`) | kernel VXLAN, host routes, underlay, a naive tunnel, the real flannel | 0.7 ×; 1 × in frames of the MTU; 1.4 × received; 6 × RTT; 0.8 × under a flood; 50 and 300 ms |
//!
//! Needs root. The result is kept in `bench/runs/<date>-<n>/`: command, versions, raw numbers, verdicts.

mod cni;
mod drift;
mod outage;
mod peers;
mod plot;
mod report;
mod tcp;
mod together;
mod udp;

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use report::Report;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut wanted = words.clone();
    let rounds = number_of("--rounds", &mut wanted).unwrap_or(10);
    let minutes = number_of("--minutes", &mut wanted).unwrap_or(60);
    if wanted.iter().any(|w| w == "--help") {
        println!(
            "cargo run --release -p twill-bench -- [cold] [small] [drift] [lab] [together] [cni] [tcp] [udp] [outage] [--rounds N] [--minutes N]\nwithout a name: all but outage, which takes an hour; needs root"
        );
        return;
    }
    let wants = |name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
    let twill = std::cell::LazyCell::new(release_binary);
    let mut report = Report::new();
    if wants("lab") {
        lab(&twill, &mut report);
    }
    if wants("small") {
        peers::small(&twill, &mut report);
    }
    if wants("drift") {
        drift::run(&twill, &mut report);
    }
    if wants("together") {
        together::run(&twill, &mut report);
    }
    if wants("cni") {
        cni::run(&plugin(), &mut report);
    }
    if wants("tcp") {
        tcp::run(&twill, &mut report);
    }
    if wants("udp") || wanted.iter().any(|w| w.starts_with("udp-")) {
        twill_e2e::use_binaries_in(twill.parent().unwrap().to_owned());
        udp::run(rounds, |part| wants("udp") || wants(part), &mut report);
    }
    if wanted.iter().any(|w| w == "outage") {
        twill_e2e::use_binaries_in(twill.parent().unwrap().to_owned());
        outage::run(minutes, &mut report);
    }
    if wants("cold") {
        peers::cold(&twill, &mut report);
    }
    report.keep(&words);
}

/// Takes a flag and its number out of the words.
fn number_of<N: std::str::FromStr<Err: std::fmt::Debug>>(flag: &str, words: &mut Vec<String>) -> Option<N> {
    let at = words.iter().position(|word| word == flag)?;
    Some(words.drain(at..at + 2).nth(1).unwrap().parse().unwrap())
}

/// The product, built as it is shipped.
fn release_binary() -> PathBuf {
    built("twill", &["--release", "--package", "twill"]).join("release/twill")
}

/// The plugin, static as it is shipped (docs/guide/containers.md); needs `rustup target add x86_64-unknown-linux-musl`.
fn plugin() -> PathBuf {
    let musl = "x86_64-unknown-linux-musl";
    let words = ["--profile", "plugin", "--package", "twill-cni", "--target", musl];
    built("twill-cni", &words).join(musl).join("plugin/twill-cni")
}

/// The folder that it was built in.
fn built(name: &str, words: &[&str]) -> PathBuf {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let mut build = Command::new(env!("CARGO"));
    let built = build.args(["build", "--locked"]).args(words).current_dir(root).status();
    assert!(built.unwrap().success(), "the release build of {name} failed");
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from(root).join("target"), PathBuf::from)
}

fn lab(twill: &PathBuf, report: &mut Report) {
    let mut samples = Vec::new();
    for _ in 0..10 {
        let start = Instant::now();
        let out = Command::new(twill).arg("lab").output().unwrap();
        samples.push(start.elapsed().as_secs_f64() * 1e3);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    report.at_most("twill lab, two nodes, start to end (ms)", &samples, 3000.0);
}
