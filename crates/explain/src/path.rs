//! What an explanation says: hops, a verdict, and their text.

use std::fmt::{self, Write as _};
use std::net::IpAddr;

use serde::Serialize;
use twill_core::net::LinkName;

/// One end of a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct End {
    /// The place: `node1`, `container-1`.
    pub place: String,
    /// The address that the packet carries for it.
    pub address: IpAddr,
}

/// Both directions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// From the first end to the second.
    pub there: Way,
    /// The answer's way; `None`: it starts outside of what is known.
    pub back: Option<Way>,
}

/// One direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Way {
    /// Where the packet starts.
    pub from: End,
    /// Where it is meant to go.
    pub to: End,
    /// What decides, in order.
    pub hops: Vec<Hop>,
    /// How it ends, at the place of the last hop.
    pub verdict: Verdict,
}

/// One decision on the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hop {
    /// In which network namespace.
    pub place: String,
    /// What decides.
    pub what: What,
    /// The device that it is about.
    pub link: Option<LinkName>,
    /// Tunnels around the packet at this hop.
    pub depth: usize,
    /// The decision in plain words.
    pub says: String,
    /// The table lines that it comes from, as `ip` or `bridge` prints them; `hides: …` is a route that a better one hides.
    pub evidence: Vec<String>,
}

/// What kind of thing decides at a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// The routing table.
    Route,
    /// The neighbour (ARP or ND) table.
    Neighbour,
    /// A bridge's CAM table.
    Bridge,
    /// A VXLAN's forwarding table; the frame is wrapped.
    Fdb,
    /// A wire: a veth pair, or the underlay.
    Wire,
    /// The frame is unwrapped.
    Unwrap,
    /// The packet is where it was meant to go.
    Arrival,
}

/// How a way ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// The packet reaches its end.
    Arrives,
    /// It goes no further.
    Stops {
        /// The cause.
        code: Code,
        /// Where.
        place: String,
        /// The cause in plain words.
        why: String,
        /// The table lines that show it, where there are any.
        evidence: Vec<String>,
    },
}

/// Causes; stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// No route covers the destination.
    NoRoute,
    /// A route says to refuse or drop: blackhole, unreachable, prohibit.
    RouteRefuses,
    /// The way back to the source leaves by another device (rp_filter).
    ReversePath,
    /// The packet would have to be forwarded, and this place does not forward.
    ForwardingOff,
    /// A device on the way is down.
    LinkDown,
    /// A device that a route or a bridge names does not exist.
    LinkMissing,
    /// Nobody says which MAC has the next hop's address, and nobody can be asked.
    NoNeighbour,
    /// The one who should answer ARP or ND is not on this link.
    NobodyAnswers,
    /// A VXLAN has no host for the frame's MAC.
    NoFdbEntry,
    /// No port of the bridge leads to the frame's MAC.
    MacUnknown,
    /// The frame came to a device that has another MAC, and is dropped without a word.
    MacNotOurs,
    /// Nothing on the host listens on the tunnel's UDP port.
    PortMismatch,
    /// The host's VXLAN has another VNI.
    VniMismatch,
    /// The packet comes to a place that has the address, and it is not the one that was meant.
    WrongPlace,
    /// The packet is handed to a program.
    UserSpace,
    /// The packet leaves what is known.
    LeavesTheFacts,
    /// The packet goes round in a circle.
    Loop,
}

impl Explanation {
    /// True when both directions arrive.
    pub fn arrives(&self) -> bool {
        [Some(&self.there), self.back.as_ref()].iter().flatten().all(|way| way.verdict == Verdict::Arrives)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.place, self.address)
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.back {
            Some(back) => writeln!(f, "{}\n{back}", self.there),
            None => writeln!(f, "{}", self.there),
        }
    }
}

impl fmt::Display for Way {
    /// A line for each hop, its table line under it; hops inside the tunnel's outer packet stand further in.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} → {}", self.from, self.to)?;
        let place = self.hops.iter().map(|h| h.place.chars().count()).max().unwrap_or(0);
        for (number, hop) in self.hops.iter().enumerate() {
            let indent = "  ".repeat(hop.depth);
            writeln!(f, "{:3}. {:place$}  {:9}  {indent}{}", number + 1, hop.place, hop.what.to_string(), hop.says)?;
            let margin = " ".repeat(5 + place + 2 + 9 + 2);
            for line in &hop.evidence {
                writeln!(f, "{margin}{indent}  │ {line}")?;
            }
        }
        match &self.verdict {
            Verdict::Arrives => writeln!(f, "  ✓  it arrives"),
            Verdict::Stops { code, place, why, evidence } => {
                let mut text = format!("  ✗  it stops at {place}: {why} [{code}]");
                for line in evidence {
                    let _ = write!(text, "\n       │ {line}");
                }
                writeln!(f, "{text}")
            }
        }
    }
}
