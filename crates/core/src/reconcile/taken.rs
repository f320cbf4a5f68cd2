//! Things of others that take the only place for one of ours.

use crate::firewall::beside::may_shut;
use crate::firewall::{Base, Hook, Table};
use crate::host::{HostState, Link, Object};

use super::plan::same_tunnel;
use super::{Desired, Finding};

/// A finding for each wanted tunnel whose VNI and port another device has.
pub fn taken_tunnels(want: &HostState, have: &HostState) -> Vec<Finding> {
    let missing = want.iter().filter_map(|(key, object)| match object {
        Object::Link(link) if have.get(key).is_none() => Some(link),
        _ => None,
    });
    let finding = |link: &Link, other: &Link| Finding {
        code: "vni-taken".into(),
        object: link.to_string(),
        evidence: format!("the kernel has one device for a VNI and port, and that is {other}"),
        fix: format!("ip link del {}, or another Backend.VNI or Backend.Port in the network config", other.name),
    };
    missing.flat_map(|link| same_tunnel(link, have).into_iter().map(move |other| finding(link, other))).collect()
}

/// A finding for each wanted table whose place somebody else's takes.
pub fn taken_tables(want: &Desired, have: &HostState) -> Vec<Finding> {
    let tables = want.host.iter().filter_map(|(key, object)| match (object, have.get(key)) {
        (Object::Table(ours), Some(Object::Table(table))) if !table.is_ours() && !table.is_as_made(ours) => {
            Some(&**table)
        }
        _ => None,
    });
    tables.map(taken_table).collect()
}

fn taken_table(table: &Table) -> Finding {
    let forward = |base: &Base| base.hook == Hook::Forward;
    let mut shut = table
        .chains
        .iter()
        .filter(|(name, chain)| chain.base.as_ref().is_some_and(forward) && may_shut(table, name) && !table.dormant);
    let shut = shut.next().map_or_else(String::new, |(name, _)| {
        format!("; its chain {name} may drop what containers forward, and no accept is put there")
    });
    Finding {
        code: "table-taken".into(),
        object: format!("table {}", table.name),
        evidence: format!(
            "a {table} is there that Twill did not make, and it is left as it is: none of Twill's own rules is in force, so nothing is masqueraded; accepts in the forward chains of other tables are{shut}"
        ),
        fix: format!("nft delete table {} # and whoever made it takes another name", table.name),
    }
}
