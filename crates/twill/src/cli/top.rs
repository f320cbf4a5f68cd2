//! `twill top`: what the tunnel carries now, peer by peer.

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use tokio::time::MissedTickBehavior;
use twill_tunnel::counters::{Dropped, FlowSnapshot, PeerSnapshot, Snapshot};

use super::ask::Socket;
use crate::output::{Format, Output, ago, columns, print_text, to_terminal};

/// Peers that are shown at most.
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
            let mut before: Option<(Instant, Snapshot)> = None;
            let mut beat = tokio::time::interval(Duration::from_secs(self.interval));
            // Stopped and continued, it does not make up for what it missed.
            beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
            for _ in 0..count {
                beat.tick().await;
                let now: Snapshot = self.socket.ask("GET", "/v1/tunnel").await?;
                let at = Instant::now();
                let since = before.as_ref().map(|(then, before)| (before, (at - *then).as_secs_f64()));
                if live {
                    print_text(&format!("{CLEAR}{}", table(&now, since, Screen::now())));
                } else {
                    self.output.print(&now, || table(&now, since, None))?;
                }
                before = Some((at, now));
            }
            Ok(ExitCode::SUCCESS)
        })
    }
}

/// What a terminal has room for.
#[derive(Debug, Clone, Copy)]
struct Screen {
    lines: usize,
    columns: usize,
}

impl Screen {
    /// That of stdout; `None` where it does not say.
    fn now() -> Option<Self> {
        let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
        let (lines, columns) = (usize::from(size.ws_row), usize::from(size.ws_col));
        (lines > 0 && columns > 0).then_some(Self { lines, columns })
    }

    /// Lines that a text takes, which goes on below where it is too long.
    fn taken(self, line: &str) -> usize {
        line.chars().count().div_ceil(self.columns).max(1)
    }

    /// How many of the lines fit above those that stand below, the number of peers left out, and the cursor; a head and a peer always do.
    fn fit(self, lines: &[String], below: &[String]) -> usize {
        let mut left = self.lines.saturating_sub(2 + below.iter().map(|line| self.taken(line)).sum::<usize>());
        let fits = |line: &&String| {
            let fits = left.checked_sub(self.taken(line));
            left = fits.unwrap_or(0);
            fits.is_some()
        };
        lines.iter().take_while(fits).count().max(2)
    }
}

/// The busiest peers first, as many as there is room for; rates where there was a look before, else totals.
fn table(now: &Snapshot, since: Option<(&Snapshot, f64)>, screen: Option<Screen>) -> String {
    let below = [format!("dropped   {}", causes(&now.drops)), format!("crossings {}", crossings(now))];
    let mut lines: Vec<String> = peers(now, since).lines().map(str::to_owned).collect();
    if let Some(screen) = screen {
        lines.truncate(screen.fit(&lines, &below));
    }
    let left = (now.peers.len() + 1).saturating_sub(lines.len());
    if left > 0 {
        lines.push(format!("and {left} quieter peers"));
    }
    lines.extend(below);
    lines.join("\n")
}

fn peers(now: &Snapshot, since: Option<(&Snapshot, f64)>) -> String {
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
    let head = [
        "SUBNET".to_owned(),
        "HOST".into(),
        format!("OUT PKT{unit}"),
        format!("OUT BIT{unit}"),
        "SEG/CALL".into(),
        format!("IN PKT{unit}"),
        format!("IN BIT{unit}"),
        "GRO".into(),
        "LAST SEEN".into(),
        "DROPPED".into(),
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
            seen(peer.last_seen_ms),
            causes(&peer.drops),
        ]
    });
    columns(&head, cells)
}

/// Dropped packets since the tunnel's start.
fn causes(drops: &[Dropped]) -> String {
    let causes = drops.iter().map(|drop| format!("{} {}", drop.cause, drop.packets)).collect::<Vec<_>>();
    if causes.is_empty() { "none".to_owned() } else { causes.join(", ") }
}

/// Calls into the kernel for each packet and for each megabyte, since the tunnel's start.
fn crossings(now: &Snapshot) -> String {
    let all = now.carried();
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

    #[test]
    fn the_busiest_fit_on_the_screen() {
        let flow = |bytes| FlowSnapshot { bytes, packets: 1, ..FlowSnapshot::default() };
        let peer = |number: u8| PeerSnapshot {
            lease: format!("10.1.{number}.0-24"),
            host: [10, 168, 0, number].into(),
            sent: flow(number.into()),
            received: flow(0),
            last_seen_ms: None,
            drops: Vec::new(),
        };
        let now = Snapshot { peers: (1..=50).map(peer).collect(), ..Snapshot::default() };
        for (lines, columns) in [(24, 120), (24, 80), (24, 30), (60, 200)] {
            let text = table(&now, None, Some(Screen { lines, columns }));
            let taken: usize = text.lines().map(|line| line.len().div_ceil(columns)).sum();
            assert!(taken < lines, "{lines} by {columns}: {text}");
            assert!(text.lines().nth(1).unwrap().starts_with("10.1.50.0-24"), "{text}");
        }
        assert_eq!(table(&now, None, None).lines().count(), 1 + SHOWN + 3);
    }
}
