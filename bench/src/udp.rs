//! The udp backend beside kernel VXLAN, host routes, the bare underlay and a naive tunnel: every round measures all of them in turn.

mod flannel;
mod flood;
mod load;
mod many;
mod naive;
mod nets;
mod outage;

use crate::plot::Panel;
use crate::report::{Report, median};
use load::{Bulk, Packets};
use nets::{Net, Nets};

/// The whole matrix, so many rounds.
pub(crate) fn run(rounds: usize, wants: impl Fn(&str) -> bool, report: &mut Report) {
    let mut nets = Nets::new();
    if wants("udp-tcp") {
        tcp(&nets, rounds, report);
    }
    if wants("udp-streams") {
        streams(&nets, rounds, report);
    }
    if wants("udp-cut") {
        cut(&nets, rounds, report);
    }
    if wants("udp-packets") {
        packets(&nets, rounds, report);
    }
    if wants("udp-rtt") {
        rtt(&nets, rounds, report);
    }
    if wants("udp-flannel") {
        flannel::run(&nets, rounds, report);
    }
    if wants("udp-many") {
        many::run(&nets, rounds, report);
    }
    if wants("udp-flood") {
        flood::run(&nets, rounds, report);
    }
    if wants("udp-restart") {
        outage::run(&mut nets, rounds, report);
    }
}

/// Samples of each network, round by round.
fn rounds<T, const N: usize>(rounds: usize, nets: [Net; N], sample: impl Fn(Net) -> T) -> [Vec<T>; N] {
    let mut all = nets.map(|_| Vec::with_capacity(rounds));
    for _ in 0..rounds {
        for (samples, net) in all.iter_mut().zip(nets) {
            samples.push(load::clean(|| sample(net)));
        }
    }
    all
}

fn ratios(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    ours.iter().zip(theirs).map(|(o, t)| o / t).collect()
}

fn of<T>(samples: &[T], what: impl Fn(&T) -> f64) -> Vec<f64> {
    samples.iter().map(what).collect()
}

/// The same for the plot.
fn plot<T>(title: &str, nets: &[Net], all: &[Vec<T>], what: impl Fn(&T) -> f64, report: &mut Report) {
    let bars = nets.iter().zip(all).map(|(net, samples)| (net.name().to_owned(), of(samples, &what))).collect();
    report.plot(Panel { title: title.to_owned(), bars });
}

/// Rows of bulk data for each network.
fn bulk(what: &str, nets: &[Net], all: &[Vec<Bulk>], report: &mut Report) {
    for (net, samples) in nets.iter().zip(all) {
        report.note(&format!("{what}, {} (Gbit/s)", net.name()), &of(samples, |s| s.gbits));
    }
    for (net, samples) in nets.iter().zip(all) {
        report.note(&format!("{what}, {}, processors' time for a megabyte (µs)", net.name()), &of(samples, |s| s.cpu));
    }
    plot(&format!("{what}, one stream (Gbit/s)"), nets, all, |s| s.gbits, report);
    plot(&format!("{what}, processors' time for a megabyte (µs)"), nets, all, |s| s.cpu, report);
}

/// One stream.
fn tcp(nets: &Nets, number: usize, report: &mut Report) {
    let kinds = [Net::Twill, Net::Vxlan, Net::Routes, Net::Underlay];
    let all = rounds(number, kinds, |net| load::tcp(nets.way(net), 1));
    bulk("TCP", &kinds, &all, report);
    let [ours, vxlan, ..] = &all;
    let against = |what: fn(&Bulk) -> f64| ratios(&of(ours, what), &of(vxlan, what));
    report.at_least("TCP, twill against VXLAN (×)", &against(|s| s.gbits), 0.7);
    report.at_most("TCP, processors' time for a megabyte, twill against VXLAN (×)", &against(|s| s.cpu), 1.6);
}

/// 64 streams against 4; and 64 that begin one after the other, each while those before it send.
fn streams(nets: &Nets, number: usize, report: &mut Report) {
    let kinds = [Net::Twill, Net::Vxlan];
    let ratio = kinds.map(|net| {
        let (mut few, mut many) = (Vec::new(), Vec::new());
        for _ in 0..number {
            few.push(load::clean(|| load::tcp(nets.way(net), 4)).gbits);
            many.push(load::clean(|| load::tcp(nets.way(net), 64)).gbits);
        }
        report.note(&format!("TCP, 4 streams, {} (Gbit/s)", net.name()), &few);
        report.note(&format!("TCP, 64 streams, {} (Gbit/s)", net.name()), &many);
        ratios(&many, &few)
    });
    report.note("TCP, 64 streams against 4, kernel VXLAN (×)", &ratio[1]);
    report.at_least("TCP, 64 streams against 4 (×)", &ratio[0], 0.9);
    let begun = rounds(number, kinds, |net| load::tcp_one_after_the_other(nets.way(net), 64));
    for (net, samples) in kinds.iter().zip(&begun) {
        let what = format!("TCP, 64 streams that begin one after the other, {} (Gbit/s)", net.name());
        report.note(&what, &of(samples, |s| s.gbits));
    }
}

/// The same with frames of the MTU on the wire.
fn cut(nets: &Nets, number: usize, report: &mut Report) {
    nets.cut_on_the_wire(true);
    let kinds = [Net::Twill, Net::Vxlan, Net::Routes];
    let all = rounds(number, kinds, |net| load::tcp(nets.way(net), 1));
    nets.cut_on_the_wire(false);
    bulk("TCP in frames of the MTU", &kinds, &all, report);
    let [ours, vxlan, ..] = &all;
    let ratio = ratios(&of(ours, |s| s.gbits), &of(vxlan, |s| s.gbits));
    report.at_least("TCP in frames of the MTU, twill against VXLAN (×)", &ratio, 1.0);
}

/// 64-byte UDP: as much as the sender can, and 40,000 each second.
fn packets(nets: &Nets, number: usize, report: &mut Report) {
    let kinds = [Net::Twill, Net::Vxlan, Net::Routes, Net::Underlay];
    let all = rounds(number, kinds, |net| load::udp(nets.way(net), None));
    for (net, samples) in kinds.iter().zip(&all) {
        let middle = |what: fn(&Packets) -> f64| median(&of(samples, what));
        let (offered, loss, cpu) = (middle(|s| s.offered), middle(|s| s.loss), middle(|s| s.cpu));
        let what = format!(
            "64-byte UDP, {}: offered {offered:.1} thousand/s, loss {loss:.1} %, processors' time {cpu:.1} µs for each; received (thousand/s)",
            net.name()
        );
        report.note(&what, &of(samples, |s| s.received));
    }
    plot("64-byte UDP received (thousand/s)", &kinds, &all, |s| s.received, report);
    plot("64-byte UDP, processors' time for each (µs)", &kinds, &all, |s| s.cpu, report);
    let ratio = ratios(&of(&all[0], |s| s.received), &of(&all[1], |s| s.received));
    report.at_least("64-byte UDP received, twill against VXLAN (×)", &ratio, 1.4);
    let [ours, vxlan] = rounds(number, [Net::Twill, Net::Vxlan], |net| load::udp(nets.way(net), Some(40)));
    let loss = |s: &Packets| s.loss;
    report.note("64-byte UDP, 40,000/s, loss, kernel VXLAN (%)", &of(&vxlan, loss));
    report.at_most("64-byte UDP, 40,000/s, loss, twill udp (%)", &of(&ours, loss), 0.05);
}

/// How long a small packet takes, there and back.
fn rtt(nets: &Nets, number: usize, report: &mut Report) {
    let kinds = [Net::Twill, Net::Vxlan, Net::Naive, Net::Routes, Net::Underlay];
    let all = rounds(number, kinds, |net| load::ping(nets.way(net)).0);
    for (net, samples) in kinds.iter().zip(&all) {
        report.note(&format!("RTT, {} (ms)", net.name()), samples);
    }
    plot("RTT (ms)", &kinds, &all, |ms| *ms, report);
    report.at_most("RTT, twill against VXLAN (×)", &ratios(&all[0], &all[1]), 6.0);
    report.at_most("RTT, twill against naive tunnel (×)", &ratios(&all[0], &all[2]), 1.2);
}
