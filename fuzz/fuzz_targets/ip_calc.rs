//! `ip calc`: network and host part make the address again, and what was understood can be printed and understood again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::ipcalc::calc;
use twill_core::net::ip_to_bits;

fuzz_target!(|text: &str| {
    let Ok(found) = calc(text) else { return };
    assert!(found.network.contains(found.address));
    assert_eq!(ip_to_bits(found.network_address) | ip_to_bits(found.host_part), ip_to_bits(found.address));
    assert_eq!(ip_to_bits(found.mask) & ip_to_bits(found.wildcard), 0);
    assert!(ip_to_bits(found.first_host) <= ip_to_bits(found.last_host));
    let again = calc(&format!("{}/{}", found.address, found.prefix_length)).unwrap();
    assert_eq!((again.network, again.hosts, again.binary), (found.network, found.hosts, found.binary));
});
