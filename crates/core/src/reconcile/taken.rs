//! Things of others that take the only place for one of ours.

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
    let tables = want.host.iter().filter_map(|(key, _)| match have.get(key) {
        Some(Object::Table(table)) if !table.is_ours() => Some(table),
        _ => None,
    });
    let finding = |table: &crate::firewall::Table| Finding {
        code: "table-taken".into(),
        object: format!("table {}", table.name),
        evidence: format!("a {table} is there that Twill did not make: nothing is masqueraded or accepted"),
        fix: format!("rename it, or remove it: nft delete table {}", table.name),
    };
    tables.map(|table| finding(table)).collect()
}
