//! A result that can be read is written in the shape of each version, and read again as the same; 1.1.0 loses nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_cni::result::{Answer, Version};

fuzz_target!(|text: &[u8]| {
    let Ok(answer) = serde_json::from_slice::<Answer>(text) else { return };
    for version in Version::ALL {
        let written = answer.to_json(version);
        let read: Answer = serde_json::from_str(&written).expect("what was written can be read");
        assert_eq!((&read.ips, &read.dns), (&answer.ips, &answer.dns));
        if version == Version::V110 {
            assert_eq!(read, answer);
        }
    }
});
