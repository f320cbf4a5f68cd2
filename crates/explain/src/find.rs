//! From a name or an address to an end of the path.

use std::net::IpAddr;

use twill_core::host::LinkKind;

use crate::facts::{Facts, PlaceFacts};
use crate::path::End;

/// A word that is no end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// Neither a place nor an address of one.
    #[error("{word:?} is neither a place nor an address of one; places are {places}")]
    Nobody {
        /// As typed.
        word: String,
        /// All names.
        places: String,
    },
    /// The two have no address family in common.
    #[error("{a} and {b} have no address of the same family")]
    NoFamily {
        /// The first word.
        a: String,
        /// The second word.
        b: String,
    },
}

/// The place of an address that no known place has.
pub const OUTSIDE: &str = "outside";

/// The two ends that `a` and `b` name: a place's name, or an address; the second one's may be one that no place has. A family that an
/// address fixes holds for both; else IPv4 is taken unless `v6`.
pub fn ends<F: Facts + ?Sized>(facts: &F, a: &str, b: &str, v6: bool) -> Result<(End, End), NotFound> {
    let outside = |fault| match b.parse() {
        Ok(address) => Ok(vec![End { place: OUTSIDE.to_owned(), address }]),
        Err(_) => Err(fault),
    };
    let (first, second) = (candidates(facts, a)?, candidates(facts, b).or_else(outside)?);
    for want_v6 in [v6, !v6] {
        let of = |ends: &[End]| ends.iter().find(|e| e.address.is_ipv6() == want_v6).cloned();
        if let (Some(from), Some(to)) = (of(&first), of(&second)) {
            return Ok((from, to));
        }
    }
    Err(NotFound::NoFamily { a: a.to_owned(), b: b.to_owned() })
}

fn candidates<F: Facts + ?Sized>(facts: &F, word: &str) -> Result<Vec<End>, NotFound> {
    if let Some(place) = facts.place(word) {
        return Ok(addresses(place).map(|address| End { place: word.to_owned(), address }).collect());
    }
    let owner = |ip: IpAddr| facts.places().into_iter().find(|p| facts.place(p).is_some_and(|f| f.owns(ip)));
    if let Ok(address) = word.parse::<IpAddr>()
        && let Some(place) = owner(address)
    {
        return Ok(vec![End { place: place.to_owned(), address }]);
    }
    Err(NotFound::Nobody { word: word.to_owned(), places: facts.places().join(", ") })
}

/// The global addresses of a place, those that others know it by first: on its own wires before bridges and tunnels.
fn addresses(facts: &PlaceFacts) -> impl Iterator<Item = IpAddr> {
    let wire = |kind: &LinkKind| matches!(kind, LinkKind::Veth { .. } | LinkKind::Other { .. });
    let mut found: Vec<(bool, IpAddr)> = facts
        .addrs()
        .filter(|a| a.scope == 0 && !a.inet.addr.is_loopback())
        .map(|a| (!facts.link(a.link).is_some_and(|l| wire(&l.kind)), a.inet.addr))
        .collect();
    found.sort_by_key(|(late, _)| *late);
    found.into_iter().map(|(_, ip)| ip)
}
