//! What the store said last, from a file: what is understood is written and understood again, the same, and its leases are taken in whole.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::lease_set::LeaseSet;
use twill_core::net::NodeId;
use twill_core::state_file::{State, StoreCache};

fuzz_target!(|bytes: &[u8]| {
    let Ok(cache) = StoreCache::parse(bytes) else { return };
    let again = StoreCache::parse(&cache.to_json().unwrap()).expect("what we write can be read");
    assert_eq!(again, cache);
    let mut state = State::new(NodeId([0; 16]), String::new());
    state.store = Some(cache.store);
    let _ = cache.trusted(&cache.source, &state);
    let (mut leases, source) = (LeaseSet::default(), cache.source.clone());
    leases.reset(cache.clone().into_leases().collect());
    let kept = StoreCache::new(source, cache.store, cache.at, &cache.config, leases.raw());
    // Each name once, in order.
    assert!(kept.leases.windows(2).all(|pair| pair[0].name < pair[1].name));
    assert!(kept.leases.iter().all(|lease| cache.leases.contains(lease)));
});
