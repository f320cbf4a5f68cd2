//! A whole frame: every layer lies behind the one before it and inside the frame, and each has its line.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_packet::{Header, decode, render};

fuzz_target!(|frame: &[u8]| {
    let layers = decode(frame);
    assert!(!layers.is_empty());
    assert!(
        layers
            .windows(2)
            .all(|w| w[0].offset < w[1].offset || matches!(w[1].header, Header::Bad { .. } | Header::More(_)))
    );
    assert!(layers.iter().all(|l| l.offset <= frame.len()));
    assert_eq!(render(&layers).lines().count(), layers.len());
    for layer in &layers {
        assert!(!layer.header.fields().is_empty());
    }
});
