//! An address file that names a holder is written and read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::ipam::Holder;

fuzz_target!(|text: &str| {
    let Some(holder) = Holder::parse(text) else { return };
    assert_eq!(Holder::parse(&holder.to_string()).expect("what was written can be read"), holder);
});
