//! Rows of the embedded store's log: what can be read is written the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_etcd::server::disk::{decode, encode};

fuzz_target!(|row: &[u8]| {
    if let Some(record) = decode((7, 1), row) {
        assert_eq!(encode(&record), row);
    }
});
