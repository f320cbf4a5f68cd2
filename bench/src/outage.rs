//! The store is away for long: two nodes, a ping between their containers all the while, and a harm each minute.

use std::process::Stdio;
use std::time::{Duration, Instant};

use twill_e2e::eventually;
use twill_e2e::net::Bed;
use twill_e2e::overlay::Overlay;

use crate::peers::kb;
use crate::report::Report;

const CONFIG: &str = r#"{"Network":"100.96.0.0/16","Backend":{"Type":"vxlan"}}"#;
/// Pings in a second.
const PACE: u64 = 50;

/// From the store's end by SIGKILL to its return after so many minutes.
pub(crate) fn run(minutes: u64, report: &mut Report) {
    let dir = tempfile::tempdir().unwrap();
    let put = |overlay: &Overlay, key: &str, value: &str| {
        assert!(overlay.etcdctl(&["put", &format!("/coreos.com/network/{key}"), value]).status.success());
    };
    let (mut overlay, ()) =
        Overlay::running_on(Bed::new().unwrap(), dir.path(), "", |_, overlay| put(overlay, "config", CONFIG));
    overlay.await_both_ways();
    // Its route is the one that is deleted: that of the ping would lose a packet before anybody can know.
    put(&overlay, "subnets/100.96.8.0-24", &peer(8));
    await_route(&overlay, 1, 8);
    let leases = [overlay.lease(1), overlay.lease(2)];
    let memory = |overlay: &Overlay| kb(overlay.site(1).agent_pid().unwrap(), "VmRSS") / 1024.0;
    let before = memory(&overlay);

    let mut ping = overlay.site(1).container.command("ping");
    let count = (minutes * 60 * PACE).to_string();
    ping.args(["-q", "-i", &(1.0 / PACE as f64).to_string(), "-c", &count, "100.96.2.2"]).stdout(Stdio::piped());
    let ping = ping.spawn().unwrap();
    let began = Instant::now();
    overlay.kill_store();

    let host = &overlay.site(1).host;
    let mut repairs = Vec::new();
    for minute in 1..=minutes {
        std::thread::sleep((began + Duration::from_secs(minute * 60 - 30)).saturating_duration_since(Instant::now()));
        host.ip("route del 100.96.8.0/24");
        let start = Instant::now();
        await_route(&overlay, 1, 8);
        repairs.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let pings = String::from_utf8(ping.wait_with_output().unwrap().stdout).unwrap();
    let away = |overlay: &Overlay, number: u8| {
        let status = overlay.site(number).status();
        status["findings"].as_array().unwrap().iter().any(|finding| finding["code"] == "store-away")
    };
    assert!(away(&overlay, 1) && away(&overlay, 2), "the store was away all the while");
    let after = memory(&overlay);

    overlay.start_store();
    let start = Instant::now();
    put(&overlay, "subnets/100.96.9.0-24", &peer(9));
    [1, 2].into_iter().for_each(|number| await_route(&overlay, number, 9));
    let caught_up = start.elapsed().as_secs_f64();
    eventually("nobody misses the store", || if away(&overlay, 1) || away(&overlay, 2) { Err(()) } else { Ok(()) });
    assert_eq!(leases, [overlay.lease(1), overlay.lease(2)], "each node has the lease that it had");

    report.note("the store away (minutes)", &[minutes as f64]);
    report.at_most("pings between containers meanwhile, lost", &[lost(&pings)], 0.0);
    report.max_at_most("a route deleted meanwhile, back (ms)", &repairs, 200.0);
    report.note("the agent's resident memory before and after (MB)", &[before, after]);
    report.note("store back to a new peer's route on both nodes (s)", &[caught_up]);
}

/// The lease of another node, 10.168.0.N.
fn peer(n: u8) -> String {
    let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:00:0{n}"}}"#);
    format!(r#"{{"PublicIP":"10.168.0.{n}","BackendType":"vxlan","BackendData":{data}}}"#)
}

/// Waits until a node has the route to a peer.
fn await_route(overlay: &Overlay, number: u8, peer: u8) {
    eventually("there is a route to the peer", || {
        let site = overlay.site(number);
        let route = site.host.ip(&format!("route show 100.96.{peer}.0/24"));
        if route.is_empty() { Err(site.log()) } else { Ok(()) }
    });
}

/// Of `N packets transmitted, M received, …`.
fn lost(pings: &str) -> f64 {
    let line = pings.lines().find(|line| line.contains("packets transmitted")).unwrap();
    let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    numbers[0] - numbers[1]
}
