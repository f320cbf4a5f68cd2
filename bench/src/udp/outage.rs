//! How long nothing passes while the agent is restarted: a datagram each millisecond, both ways, and how many never came.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use twill_e2e::eventually;
use twill_e2e::overlay::Overlay;

use super::load::{Way, datagrams, pace};
use super::nets::Nets;
use crate::report::Report;

/// Before and after, so that what is lost lies between.
const CALM: Duration = Duration::from_millis(200);

/// The next agent takes over; the agent is killed and started again.
pub(crate) fn run(nets: &mut Nets, rounds: usize, report: &mut Report) {
    let (mut taken, mut killed) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        taken.push(lost(&mut nets.overlay, |net| {
            let old = net.site_mut(1).take_agent().unwrap();
            net.site_mut(1).start_at_once("--takeover");
            old.wait();
        }));
        killed.push(lost(&mut nets.overlay, |net| {
            net.site_mut(1).stop(Signal::KILL);
            net.site_mut(1).start_at_once("");
        }));
    }
    report.max_at_most("agent restarted by --takeover, traffic lost, longest (ms)", &taken, 50.0);
    report.note("agent restarted by --takeover, traffic lost (ms)", &taken);
    report.max_at_most("agent killed and started again, traffic lost, longest (ms)", &killed, 300.0);
    report.note("agent killed and started again, traffic lost (ms)", &killed);
}

/// Milliseconds of traffic that were lost, in the worse direction.
fn lost(net: &mut Overlay, act: impl FnOnce(&mut Overlay)) -> f64 {
    let flow = |from: u8, to: u8| {
        let (from, to_host) = (&net.site(from).container, &net.site(to).container);
        datagrams(Way { from, to: to_host, address: Ipv4Addr::from([100, 96, to, 2]) })
    };
    let flows = [flow(1, 2), flow(2, 1)];
    let counts = [(); 2].map(|()| (AtomicU64::new(0), AtomicU64::new(0)));
    let (sending, receiving) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for ((from, to), (sent, received)) in flows.iter().zip(&counts) {
            scope.spawn(|| pace(from, 1, sent, &sending));
            scope.spawn(|| count(to, received, &receiving));
        }
        std::thread::sleep(CALM);
        act(net);
        eventually("the agent runs", || {
            let status = net.site(1).status();
            if status["state"] == "running" { Ok(()) } else { Err((status.to_string(), net.site(1).log())) }
        });
        std::thread::sleep(CALM);
        sending.store(true, Ordering::Relaxed);
        std::thread::sleep(CALM);
        receiving.store(true, Ordering::Relaxed);
    });
    let lost = |(sent, received): &(AtomicU64, AtomicU64)| {
        sent.load(Ordering::Relaxed).saturating_sub(received.load(Ordering::Relaxed))
    };
    counts.iter().map(lost).max().unwrap() as f64
}

fn count(to: &UdpSocket, received: &AtomicU64, end: &AtomicBool) {
    while !end.load(Ordering::Relaxed) {
        if to.recv(&mut [0; 2048]).is_ok() {
            received.fetch_add(1, Ordering::Relaxed);
        }
    }
}
