//! The entries of a legacy iptables table: whatever the bytes are, the walk ends, a longer table tells no less, and a chain that was taken
//! out is gone with nothing else.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_kernel::legacy::entries::{chains, without};
use twill_kernel::legacy::parse;

fuzz_target!(|input: (bool, u16, u16, &[u8])| {
    let (v4, first, last, entries) = input;
    let (first, last) = (usize::from(first), usize::from(last));
    let whole = parse(v4, entries, first, last);
    let part = parse(v4, &entries[..entries.len() / 2], first, last);
    assert!(whole.accepts.starts_with(&part.accepts) && (whole.drops || !part.drops));
    assert!(whole.accepts.iter().all(|(src, dst)| src.is_v4() == v4 && dst.is_v4() == v4));
    let names = chains(v4, entries);
    let Some(chain) = names.first() else { return };
    if let Some(rest) = without(v4, entries, chain) {
        assert!(rest.entries.len() < entries.len());
        assert_eq!(chains(v4, &rest.entries), names[1..]);
    }
});
