//! Lease values: what is understood can be written and understood again, the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::flannel::attrs;

fuzz_target!(|bytes: &[u8]| {
    let Ok(read) = attrs::parse(bytes) else { return };
    let written = read.to_json();
    let again = attrs::parse(&written).expect("what we write can be read");
    assert_eq!(again, read);
    assert_eq!(again.to_json(), written);
});
