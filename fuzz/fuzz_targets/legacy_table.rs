//! The entries of a legacy iptables table: whatever the bytes are, the walk ends, and a chain that was taken
//! out is gone with nothing else.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::firewall::{Base, ChainKind, Hook};
use twill_kernel::legacy::entries::{chains, without, without_commented};
use twill_kernel::legacy::parse;

fuzz_target!(|input: (bool, u16, u16, &[u8])| {
    let (v4, first, last, entries) = input;
    let (first, last) = (usize::from(first), usize::from(last));
    let base = Base { kind: ChainKind::Filter, hook: Hook::Forward, priority: 0, drops: false };
    let whole = parse(v4, entries, &[("FORWARD", base, first, last)]);
    assert!(whole.contains_key("FORWARD"));
    let names = chains(v4, entries);
    let Some(chain) = names.first() else { return };
    if let Some(rest) = without(v4, entries, chain) {
        assert!(rest.entries.len() < entries.len());
        assert_eq!(chains(v4, &rest.entries), names[1..]);
    }
    if let Some(rest) = without_commented(v4, entries, first..last, chain, "a") {
        assert!(rest.entries.len() < entries.len());
        assert!(chains(v4, &rest.entries).len() + 1 >= names.len());
    }
});
