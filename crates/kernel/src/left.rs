//! What the reference bridge has written with `iptables` for `ipMasq`, in nftables' tables `nat` or in those of legacy iptables, in the
//! calling thread's namespace.
//!
//! ```text
//!   chain POSTROUTING    -s 10.1.15.2 -m comment --comment 'name: "cbr0" id: "5c1d…"' -j CNI-2a9f…
//!   chain CNI-2a9f…      -d 10.1.15.0/24 -j ACCEPT, ! -d 224.0.0.0/4 -j MASQUERADE
//! ```

use std::collections::BTreeSet;

use twill_core::firewall::beside::{POSTROUTING, masqueraded};
use twill_core::firewall::{Family, Leftover, TableName};
use twill_core::host::Object;
use twill_core::reconcile::Op;

use crate::attach::Failed;
use crate::nft::{Nft, lacks_nftables};
use crate::{KernelError, legacy, refused};

/// What was left for containers of a network, each with the container's ID. A kernel without such tables has nothing.
pub fn masquerading(network: &str) -> Result<BTreeSet<(Box<str>, Leftover)>, Failed> {
    let failed = |error| KernelError::new("read the tables nat of iptables", error);
    let mut nft = match Nft::open() {
        Err(error) if lacks_nftables(&error) => None,
        nft => Some(nft.map_err(failed)?),
    };
    let mut found = BTreeSet::new();
    for (v4, family) in [(true, Family::Ip), (false, Family::Ip6)] {
        let nat = TableName::new(family, "nat");
        let by_nft = match nft.as_mut().map_or(Ok(Vec::new()), |nft| nft.rules_of(&nat, POSTROUTING)) {
            Err(error) if lacks_nftables(&error) => Vec::new(),
            rules => rules.map_err(failed)?,
        };
        let by_legacy = legacy::leaving(v4).map_err(failed)?;
        for (legacy, rules) in [(false, by_nft), (true, by_legacy)] {
            found.extend(rules.iter().filter_map(|rule| masqueraded(&nat, legacy, rule, network)));
        }
    }
    Ok(found)
}

/// Removes it; that it is gone already is no failure.
pub fn remove(network: &str, what: (Box<str>, Leftover)) -> Result<(), Failed> {
    let op = Op::Delete(Object::Leftover(Box::new(what.1.clone())));
    let removed = match &what.1 {
        left if left.legacy => legacy::remove(left),
        _ => Nft::open().map_err(|e| refused(&e, e.to_string())).and_then(|mut nft| nft.apply(&op)),
    };
    match removed {
        Err(cause) if masquerading(network)?.contains(&what) => {
            Err(Failed::Step { act: format!("{} {}", op.verb(), op.object()), cause })
        }
        _ => Ok(()),
    }
}
