//! Store keys: what is taken prints as it came, and its subnets have no host bits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::lease::LeaseKey;
use twill_core::net::Prefix;

fuzz_target!(|text: &str| {
    let Ok(key) = text.parse::<LeaseKey>() else { return };
    assert_eq!(key.to_string(), text);
    assert!(key.subnets().count() > 0);
    for subnet in key.subnets() {
        assert_eq!(Prefix::strict(subnet.addr(), subnet.len()), Ok(subnet));
    }
});
