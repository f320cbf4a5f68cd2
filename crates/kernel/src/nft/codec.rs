//! Rules ⇄ bytes away from any socket: what tests and the fuzzer hold against each other.

use twill_core::firewall::{Family, Rule};

use super::{decode, encode};
use crate::netlink::wire::Writer;

/// The rule that these attributes of a rule message tell in a table of both families; what is not known becomes [`twill_core::firewall::Expr::Other`].
pub fn read(attributes: &[u8]) -> Rule {
    decode::content(Family::Inet, attributes)
}

/// The attributes that ask for this rule.
pub fn write(rule: &Rule) -> Vec<u8> {
    let mut writer = Writer::default();
    encode::rule(&mut writer, rule, 0);
    writer.buf
}
