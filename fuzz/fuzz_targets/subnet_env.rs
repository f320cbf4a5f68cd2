//! subnet.env: the subnets that are read are read again from the file that we would write of them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::flannel::subnet_env::{SubnetEnv, subnets};
use twill_core::net::Mtu;

fuzz_target!(|text: &str| {
    let read = subnets(text);
    let of = |v4: bool| read.iter().find(|s| s.is_v4() == v4).map(|s| (*s, *s));
    let env = SubnetEnv { v4: of(true), v6: of(false), mtu: Mtu::try_from(1450).unwrap(), ip_masq: false };
    let again = subnets(&env.to_string());
    assert!(again.iter().all(|subnet| read.contains(subnet)));
    assert_eq!(again.len(), usize::from(env.v4.is_some()) + usize::from(env.v6.is_some()));
});
