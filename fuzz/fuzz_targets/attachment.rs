//! An attachment file that can be read is written and read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::attach::Attachment;

fuzz_target!(|text: &[u8]| {
    let Ok(first) = Attachment::parse(text) else { return };
    let written = first.to_json().expect("what was read can be written");
    assert_eq!(Attachment::parse(written.as_bytes()).expect("what was written can be read"), first);
});
