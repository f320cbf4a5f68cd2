//! Network configs: what is accepted is printed and accepted again, the same; its subnets are counted as they are enumerated.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};
use twill_core::config::{BackendConfig, NetworkConfig};

/// The config with every default written out.
fn print(config: &NetworkConfig) -> Vec<u8> {
    let mut object = Map::new();
    for (family, range) in [("", config.v4), ("IPv6", config.v6)] {
        let enable = if family.is_empty() { "EnableIPv4" } else { "EnableIPv6" };
        object.insert(enable.into(), range.is_some().into());
        if let Some(range) = range {
            object.insert(format!("{family}Network"), range.network.to_string().into());
            object.insert(format!("{family}SubnetLen"), range.subnet_len.into());
            object.insert(format!("{family}SubnetMin"), range.min.addr().to_string().into());
            object.insert(format!("{family}SubnetMax"), range.max.addr().to_string().into());
        }
    }
    let backend = match &config.backend {
        BackendConfig::Udp(u) => json!({"Type": "udp", "Port": u.port.get()}),
        BackendConfig::NotBuilt(kind) => json!({"Type": kind}),
        BackendConfig::Vxlan(v) => json!({
            "Type": "vxlan", "VNI": v.vni.get(), "Port": v.port.get(), "MTU": v.mtu.map_or(0, |mtu| mtu.get()),
            "GBP": v.gbp, "Learning": v.learning,
        }),
    };
    object.insert("Backend".into(), backend);
    object.insert("NoMasqCIDRs".into(), config.no_masq.iter().map(ToString::to_string).collect());
    Value::Object(object).to_string().into_bytes()
}

fuzz_target!(|bytes: &[u8]| {
    let Ok((config, _)) = NetworkConfig::parse(bytes) else { return };
    assert_eq!(NetworkConfig::parse(&print(&config)), Ok((config.clone(), Vec::new())));
    assert!(config.ranges().count() > 0);
    for range in config.ranges() {
        assert!(range.network.covers(&range.min) && range.network.covers(&range.max));
        assert_eq!(range.nth(0), Some(range.min));
        assert_eq!(range.nth(range.count() - 1), Some(range.max));
        assert_eq!(range.nth(range.count()), None);
        assert!(range.allows(&range.min) && range.allows(&range.max));
    }
});
