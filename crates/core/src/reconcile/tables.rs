//! nftables tables of the name that ours has, and that are not ours.

use crate::host::{HostState, Object};

use super::{Desired, Finding};

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
