//! `twill top`: what the tunnel carries now, peer by peer.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use twill_tunnel::counters::{Dropped, FlowSnapshot, PeerSnapshot, Snapshot};

use super::ask::Socket;
use crate::output::{Format, Output, ago, columns, print_text, to_terminal};

/// Peers that fit on a screen.
const SHOWN: usize = 40;
/// Puts the cursor home and clears what stands below (ECMA-48).
const CLEAR: &str = "\x1b[H\x1b[J";

/// Watch what the udp backend's tunnel carries, peer by peer; ends with Ctrl-C.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  twill top\n  twill top --count 1            once, since the tunnel's start\n  twill top --count 1 -o json"
)]
pub(crate) struct Top {
    /// Show so many times, then end [default: once for programs and files, else until Ctrl-C]
    #[arg(short = 'n', long, value_name = "TIMES")]
    count: Option<u64>,
    /// Seconds between
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    #[command(flatten)]
    socket: Socket,
    #[command(flatten)]
    output: Output,
}

impl Top {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let live = self.output.format == Format::Table && to_terminal();
        let count = self.count.unwrap_or(if live { u64::MAX } else { 1 });
        crate::runtime()?.block_on(async {
            let mut before: Option<Snapshot> = None;
            let mut beat = tokio::time::interval(Duration::from_secs(self.interval));
            for _ in 0..count {
                beat.tick().await;
                let now: Snapshot = self.socket.ask("GET", "/v1/tunnel").await?;
                if live {
                    let since = before.as_ref().map(|before| (before, self.interval as f64));
                    print_text(&format!("{CLEAR}{}", table(&now, since)));
                } else {
                    let since = before.as_ref().map(|before| (before, self.interval as f64));
                    self.output.print(&now, || table(&now, since))?;
                }
                before = Some(now);
            }
            Ok(ExitCode::SUCCESS)
        })
    }
}

/// The busiest peers first; rates where there was a look before, else totals.
fn table(now: &Snapshot, since: Option<(&Snapshot, f64)>) -> String {
    let old = |peer: &PeerSnapshot| {
        since
            .and_then(|(before, _)| before.peers.iter().find(|old| old.lease == peer.lease))
            .map(|old| (old.sent, old.received))
    };
    let mut rows: Vec<(&PeerSnapshot, FlowSnapshot, FlowSnapshot)> = now
        .peers
        .iter()
        .map(|peer| {
            let (sent, received) = old(peer).unwrap_or_default();
            (peer, minus(peer.sent, sent), minus(peer.received, received))
        })
        .collect();
    rows.sort_by_key(|(_, sent, received)| std::cmp::Reverse(sent.bytes + received.bytes));
    let per = since.map_or(1.0, |(_, seconds)| seconds);
    let unit = if since.is_some() { "/s" } else { "" };
    let left = rows.len().saturating_sub(SHOWN);
    let head = [
        "SUBNET".to_owned(),
        "HOST".into(),
        format!("OUT PKT{unit}"),
        format!("OUT BIT{unit}"),
        "SEG/CALL".into(),
        format!("IN PKT{unit}"),
        format!("IN BIT{unit}"),
        "GRO".into(),
        "DROPPED".into(),
        "LAST SEEN".into(),
    ];
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    let cells = rows.iter().take(SHOWN).map(|(peer, sent, received)| {
        [
            peer.lease.clone(),
            peer.host.to_string(),
            short(sent.packets as f64 / per),
            short(sent.bytes as f64 * 8.0 / per),
            ratio(sent.packets, sent.messages),
            short(received.packets as f64 / per),
            short(received.bytes as f64 * 8.0 / per),
            ratio(received.packets, received.super_packets),
            causes(&peer.drops),
            seen(peer.last_seen_ms),
        ]
    });
    let mut lines = vec![columns(&head, cells)];
    if left > 0 {
        lines.push(format!("and {left} quieter peers"));
    }
    lines.push(format!("dropped   {}", causes(&now.drops)));
    lines.push(format!("crossings {}", crossings(now)));
    lines.join("\n")
}

/// Dropped packets since the tunnel's start.
fn causes(drops: &[Dropped]) -> String {
    let causes = drops.iter().map(|drop| format!("{} {}", drop.cause, drop.packets)).collect::<Vec<_>>();
    if causes.is_empty() { "none".to_owned() } else { causes.join(", ") }
}

/// Calls into the kernel for each packet and for each megabyte, since the tunnel's start.
fn crossings(now: &Snapshot) -> String {
    let all = now.peers.iter().flat_map(|peer| [peer.sent, peer.received]).sum::<FlowSnapshot>();
    let calls = now.calls.total() as f64;
    if all.packets == 0 {
        return "none yet".into();
    }
    let each = calls / all.packets as f64;
    let megabyte = calls / (all.bytes as f64 / 1e6);
    format!("{each:.2} calls into the kernel for each packet, {megabyte:.1} for each megabyte")
}

fn minus(now: FlowSnapshot, before: FlowSnapshot) -> FlowSnapshot {
    FlowSnapshot {
        packets: now.packets.saturating_sub(before.packets),
        bytes: now.bytes.saturating_sub(before.bytes),
        super_packets: now.super_packets.saturating_sub(before.super_packets),
        messages: now.messages.saturating_sub(before.messages),
    }
}

/// Three digits and a letter: 1234567 is 1.23M.
fn short(number: f64) -> String {
    let (scaled, letter) = match number {
        n if n >= 1e12 => (n / 1e12, "T"),
        n if n >= 1e9 => (n / 1e9, "G"),
        n if n >= 1e6 => (n / 1e6, "M"),
        n if n >= 1e3 => (n / 1e3, "k"),
        n => return format!("{n:.0}"),
    };
    let digits = if scaled >= 100.0 {
        0
    } else if scaled >= 10.0 {
        1
    } else {
        2
    };
    format!("{scaled:.digits$}{letter}")
}

fn ratio(many: u64, few: u64) -> String {
    if few == 0 { "-".into() } else { format!("{:.1}", many as f64 / few as f64) }
}

fn seen(unix_ms: Option<u64>) -> String {
    let Some(at) = unix_ms else { return "never".into() };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    ago(now.saturating_sub(at) / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (number, text) in [(0.0, "0"), (999.0, "999"), (1234.0, "1.23k"), (123_456.0, "123k"), (9.81e9, "9.81G")] {
            assert_eq!(short(number), text);
        }
        assert_eq!((ratio(10, 4), ratio(1, 0)), ("2.5".into(), "-".into()));
    }
}
