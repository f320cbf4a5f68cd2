//! A network configuration that is understood says the same after its JSON is written anew.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_cni::conf::{Conf, version_of};

fuzz_target!(|text: &[u8]| {
    let Ok(conf) = Conf::parse(text) else { return };
    let value: serde_json::Value = serde_json::from_slice(text).expect("what was understood is JSON");
    let again = serde_json::to_vec(&value).expect("JSON can be written");
    assert_eq!(Conf::parse(&again).expect("and read"), conf);
    assert_eq!(version_of(text), conf.version.as_str());
});
