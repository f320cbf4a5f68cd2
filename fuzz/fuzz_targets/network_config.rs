//! Network configs: whatever is accepted has subnets in its networks, at least four of them, counted as they are enumerated.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::config::NetworkConfig;

fuzz_target!(|bytes: &[u8]| {
    let Ok((config, _)) = NetworkConfig::parse(bytes) else { return };
    assert!(config.ranges().count() > 0);
    for range in config.ranges() {
        assert!(range.network.covers(&range.min) && range.network.covers(&range.max));
        assert_eq!(range.nth(0), Some(range.min));
        assert_eq!(range.nth(range.count() - 1), Some(range.max));
        assert_eq!(range.nth(range.count()), None);
        assert!(range.allows(&range.min) && range.allows(&range.max));
    }
});
