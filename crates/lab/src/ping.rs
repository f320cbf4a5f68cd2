//! Who reaches whom: ICMP echo (RFC 792) from inside every container, over raw sockets of our own.

use std::collections::BTreeMap;
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto, socket_with};
use serde::Serialize;
use twill_kernel::netns::Netns;
use twill_packet::{icmp, icmpv6, ipv4, ipv6};

use crate::error::{Act, LabError};
use crate::proto::LabState;
use crate::{enter, proto::ContainerInfo};

/// How long an answer is waited for before the next target is asked; a late answer still counts.
const TURN: Duration = Duration::from_millis(50);
/// How often, and how long after the last question, a target is asked.
const ROUNDS: u16 = 3;
/// How long the last answers are waited for.
const LAST: Duration = Duration::from_secs(1);
/// Bytes after the ICMP header, as ping(8) sends.
const PAYLOAD: usize = 56;

/// The matrix: every pair of containers, both directions.
#[derive(Debug, Clone, Serialize)]
pub struct Matrix {
    /// How many pairs were asked.
    pub pairs: usize,
    /// How many answered.
    pub reachable: usize,
    /// Those that did not.
    pub failed: Vec<Failed>,
    /// Round-trip times in microseconds.
    pub rtt_us: Rtt,
    /// Every pair that answered, with its time in microseconds.
    #[serde(skip)]
    pub answered: BTreeMap<(String, String), u64>,
}

/// A pair without an answer.
#[derive(Debug, Clone, Serialize)]
pub struct Failed {
    /// Who asked.
    pub from: String,
    /// Who did not answer.
    pub to: String,
    /// What was heard instead.
    pub error: String,
}

/// Round-trip times in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Rtt {
    /// Half of the answers were at least as fast.
    pub p50: u64,
    /// 99 of 100 were.
    pub p99: u64,
}

/// Asks every pair of containers of a lab; [`enter::user`] comes before.
pub fn matrix(state: &LabState) -> Result<Matrix, LabError> {
    let containers: Vec<&ContainerInfo> = state.containers().collect();
    let sources = containers.iter().map(|from| Ok((*from, enter::open(state, &from.name)?)));
    let sources = sources.collect::<Result<Vec<_>, LabError>>()?;
    let asked = thread::scope(|scope| {
        let threads: Vec<_> = sources
            .iter()
            .map(|(from, netns)| {
                let others = containers.iter().filter(|to| to.name != from.name);
                let targets: Vec<Target> = others.flat_map(addresses).collect();
                (*from, scope.spawn(move || ask_all(netns, &targets)))
            })
            .collect();
        threads.into_iter().map(|(from, thread)| (from, thread.join())).collect::<Vec<_>>()
    });
    let mut matrix =
        Matrix { pairs: 0, reachable: 0, failed: Vec::new(), rtt_us: Rtt::default(), answered: BTreeMap::new() };
    for (from, results) in asked {
        let results = results.map_err(|_| LabError::new("lab-failed", "a thread that pings panicked"))?;
        for (to, result) in results.act(|| format!("ping from {}", from.name))? {
            matrix.pairs += 1;
            match result {
                Ok(rtt) => {
                    matrix.answered.insert((from.name.clone(), to), rtt.as_micros() as u64);
                }
                Err(error) => matrix.failed.push(Failed { from: from.name.clone(), to, error }),
            }
        }
    }
    matrix.reachable = matrix.answered.len();
    let mut times: Vec<u64> = matrix.answered.values().copied().collect();
    times.sort_unstable();
    matrix.rtt_us = Rtt { p50: percentile(&times, 50), p99: percentile(&times, 99) };
    Ok(matrix)
}

/// A container's addresses, each by a name of its own.
fn addresses(to: &&ContainerInfo) -> Vec<Target> {
    let second = to.second.map(|ip| (format!("{} (IPv6)", to.name), ip));
    [(to.name.clone(), to.address)].into_iter().chain(second).collect()
}

/// One address from one namespace: the time of its answer, or what was heard instead.
pub fn one(from: &Netns, to: IpAddr) -> Result<Duration, String> {
    let answers = ask_all(from, &[(to.to_string(), to)]).map_err(|error| error.to_string())?;
    answers.into_iter().next().map_or_else(|| Err("no answer".to_owned()), |(_, answer)| answer)
}

/// The nearest-rank percentile of sorted values; 0 of none.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0)
}

/// A name and its address.
type Target = (String, IpAddr);
/// What came of each target, by name.
type Answers = Vec<(String, Result<Duration, String>)>;

/// From one namespace to every target, one after the other; IPv4 first.
fn ask_all(netns: &Netns, targets: &[Target]) -> io::Result<Answers> {
    netns.run(|| {
        let mut answers = Vec::new();
        for v4 in [true, false] {
            let of_family: Vec<&Target> = targets.iter().filter(|to| to.1.is_ipv4() == v4).collect();
            if !of_family.is_empty() {
                answers.extend(ask_family(&of_family, v4)?);
            }
        }
        Ok(answers)
    })?
}

fn ask_family(targets: &[&Target], v4: bool) -> io::Result<Answers> {
    let mut asker = Asker::open(targets, v4)?;
    for round in 0..ROUNDS {
        for number in 0..targets.len() {
            if asker.heard[number].is_none() {
                asker.ask(number, round);
                asker.listen(TURN, Some(number))?;
            }
        }
        if asker.is_done() {
            break;
        }
    }
    asker.listen(LAST, None)?;
    let word = |number: usize| match asker.heard[number] {
        Some(rtt) => Ok(rtt),
        None => Err(asker.instead[number].clone().unwrap_or_else(|| "no answer".to_owned())),
    };
    Ok(targets.iter().enumerate().map(|(number, to)| (to.0.clone(), word(number))).collect())
}

/// A raw socket of one family, and what it has heard of each target.
struct Asker {
    socket: OwnedFd,
    v4: bool,
    ident: u16,
    targets: Vec<IpAddr>,
    sent: BTreeMap<u16, (usize, Instant)>,
    heard: Vec<Option<Duration>>,
    instead: Vec<Option<String>>,
}

impl Asker {
    fn open(targets: &[&Target], v4: bool) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (family, protocol) =
            if v4 { (AddressFamily::INET, ipproto::ICMP) } else { (AddressFamily::INET6, ipproto::ICMPV6) };
        let socket = socket_with(family, SocketType::RAW, flags, Some(protocol))?;
        let ident = std::process::id() as u16;
        let (heard, instead) = (vec![None; targets.len()], vec![None; targets.len()]);
        let targets = targets.iter().map(|to| to.1).collect();
        Ok(Self { socket, v4, ident, targets, sent: BTreeMap::new(), heard, instead })
    }

    fn is_done(&self) -> bool {
        self.heard.iter().all(Option::is_some)
    }

    fn ask(&mut self, number: usize, round: u16) {
        let seq = round * self.targets.len() as u16 + number as u16;
        let (mut message, ident) = ([0; icmp::LEN + PAYLOAD], self.ident);
        // The buffer holds the header. Over IPv6 the kernel writes the checksum, since it chooses the source (RFC 3542, 3.1).
        let _ = match self.v4 {
            true => icmp::Repr::EchoRequest { ident, seq }.emit(&mut message),
            false => {
                let any = Ipv6Addr::UNSPECIFIED;
                icmpv6::Repr::EchoRequest { ident, seq }.emit(any, any, &mut message)
            }
        };
        self.sent.insert(seq, (number, Instant::now()));
        let to = SocketAddr::new(self.targets[number], 0);
        if let Err(error) = sendto(&self.socket, &message, SendFlags::empty(), &to) {
            self.instead[number] = Some(io::Error::from(error).to_string());
        }
    }

    /// Listens until `until` (or everybody) has answered, or `patience` has passed.
    fn listen(&mut self, patience: Duration, until: Option<usize>) -> io::Result<()> {
        let end = Instant::now() + patience;
        let mut buf = [MaybeUninit::uninit(); 2048];
        while !until.map_or_else(|| self.is_done(), |number| self.heard[number].is_some()) {
            let Some(left) = end.checked_duration_since(Instant::now()) else { break };
            let limit = Timespec { tv_sec: left.as_secs() as _, tv_nsec: left.subsec_nanos().into() };
            poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&limit))?;
            let now = Instant::now();
            while let Ok(((packet, _), _)) = recv(&self.socket, &mut buf, RecvFlags::empty()) {
                let packet = packet.to_vec();
                self.hear(&packet, now);
            }
        }
        Ok(())
    }

    /// An ICMPv6 message, which comes without its packet: what is not for us is passed over.
    fn hear6(&mut self, message: &[u8], now: Instant) -> Option<()> {
        let message = icmpv6::Packet::new(message).ok()?;
        let repr = icmpv6::Repr::parse(message).ok()?;
        match repr {
            icmpv6::Repr::EchoReply { ident, seq } if ident == self.ident => {
                let (number, at) = *self.sent.get(&seq)?;
                self.heard[number].get_or_insert(now.duration_since(at));
            }
            // Unreachable, too big, time exceeded: each carries the packet that it is about.
            icmpv6::Repr::Other { kind: kind @ 1..=3, code, .. } => {
                let about = ipv6::Packet::new(message.payload(&repr)).ok()?;
                let question = icmpv6::Packet::new(about.payload()).ok()?;
                if let Ok(icmpv6::Repr::EchoRequest { ident, seq }) = icmpv6::Repr::parse(question)
                    && ident == self.ident
                {
                    let (number, _) = *self.sent.get(&seq)?;
                    self.instead[number] = Some(format!("ICMPv6 type {kind} code {code}"));
                }
            }
            _ => {}
        }
        Some(())
    }

    /// An IPv4 packet with ICMP inside; what is not for us is passed over.
    fn hear(&mut self, packet: &[u8], now: Instant) -> Option<()> {
        if !self.v4 {
            return self.hear6(packet, now);
        }
        let packet = ipv4::Packet::new(packet).ok()?;
        let from = ipv4::Repr::parse(packet).src;
        let message = icmp::Packet::new(packet.payload()).ok()?;
        match icmp::Repr::parse(message) {
            icmp::Repr::EchoReply { ident, seq } if ident == self.ident => {
                let (number, at) = *self.sent.get(&seq)?;
                if self.targets[number] == from && self.heard[number].is_none() {
                    self.heard[number] = Some(now.duration_since(at));
                }
            }
            error @ (icmp::Repr::Unreachable { .. } | icmp::Repr::TimeExceeded { .. }) => {
                // It carries the packet that it is about.
                let about = ipv4::Packet::new(message.payload()).ok()?;
                let question = icmp::Packet::new(about.payload()).ok()?;
                if let icmp::Repr::EchoRequest { ident, seq } = icmp::Repr::parse(question)
                    && ident == self.ident
                {
                    let (number, _) = *self.sent.get(&seq)?;
                    self.instead[number] = Some(format!("{error}, says {from}"));
                }
            }
            _ => {}
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        assert_eq!((percentile(&[], 50), percentile(&[7], 99)), (0, 7));
        let hundred: Vec<u64> = (1..=100).collect();
        assert_eq!((percentile(&hundred, 50), percentile(&hundred, 99)), (50, 99));
    }
}
