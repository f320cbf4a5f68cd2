//! A rule of nftables as the kernel tells it: what is read, written and read again is the same rule.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_kernel::nft::codec;

fuzz_target!(|bytes: &[u8]| {
    let rule = codec::read(bytes);
    // An attribute's length has 16 bits: the kernel tells no longer one, and none that nests more.
    if bytes.len() < 4096 {
        let again = codec::read(&codec::write(&rule));
        assert_eq!(codec::write(&again), codec::write(&rule));
    }
});
