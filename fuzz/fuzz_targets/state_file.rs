//! State files: what is understood is written and understood again, the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::state_file::State;

fuzz_target!(|bytes: &[u8]| {
    let Ok(state) = State::parse(bytes) else { return };
    let again = State::parse(&state.to_json().unwrap()).expect("what we write can be read");
    assert_eq!(again, state);
});
