//! The CNI plugin, called as runtimes call it, on real devices.
//!
//! ```text
//!   host: cni0 10.1.15.1/24, fd00:0:0:15::1/64
//!          ├─ veth… ── eth0 of container "a"
//!          └─ veth… ── eth0 of container "b"
//! ```

use serde_json::{Value, json};
use twill_e2e::cni::{Runtime, netns};
use twill_e2e::net::{Bed, Host};
use twill_e2e::{bin, eventually};

const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

fn runtime() -> Option<(Runtime, tempfile::TempDir)> {
    let dir = tempfile::tempdir().unwrap();
    Some((Runtime::new(Bed::new()?, dir.path()), dir))
}

/// The one link that is called so.
fn link(host: &Host, name: &str) -> Value {
    host.json(&format!("-d link show {name}"))[0].clone()
}

fn addresses(host: &Host, device: &str) -> Vec<String> {
    let shown = host.json(&format!("addr show dev {device} scope global"));
    let infos = shown[0]["addr_info"].as_array().unwrap();
    infos.iter().filter_map(|a| Some(format!("{}/{}", a["local"].as_str()?, a["prefixlen"]))).collect()
}

fn reaches(from: &Host, ip: &str) {
    eventually(&format!("{} reaches {ip}", from.name), || {
        let out = from.try_run(&format!("ping -c 1 -W 1 {ip}"));
        if out.status.success() { Ok(()) } else { Err(out) }
    });
}

#[test]
fn a_container_is_attached_and_detached_and_each_version_is_told_in_its_shape() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    for (n, version) in VERSIONS.into_iter().enumerate() {
        let conf = runtime.conf(version, json!({}));
        let said = runtime.add(&conf, "a", &a);
        // Two for each version: none is used again before the others were.
        let (ip, ip6) = (format!("10.1.15.{}", 2 + 2 * n), format!("fd00:0:0:15::{}", 2 + 2 * n));
        assert_eq!(said["cniVersion"], version);
        let names: Vec<&str> =
            said["interfaces"].as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap()).collect();
        assert_eq!((names[0], names[2], names.len()), ("cni0", "eth0", 3));
        let (pair, eth0) = (link(&runtime.host, names[1]), link(&a, "eth0"));
        assert_eq!(said["interfaces"][0]["mac"], link(&runtime.host, "cni0")["address"]);
        assert_eq!(
            (&said["interfaces"][1]["mac"], &said["interfaces"][2]["mac"]),
            (&pair["address"], &eth0["address"])
        );
        assert_eq!(said["interfaces"][2]["sandbox"], netns(&a));
        let mtu = if version == "1.1.0" { json!(1450) } else { Value::Null };
        assert_eq!(said["interfaces"][2]["mtu"], mtu);
        let family = |n: &str| if version < "1.0.0" { json!(n) } else { Value::Null };
        assert_eq!(said["ips"][0]["version"], family("4"));
        assert_eq!(said["ips"][1]["version"], family("6"));
        assert_eq!(said["ips"][0]["address"], format!("{ip}/24"));
        assert_eq!((&said["ips"][0]["gateway"], &said["ips"][0]["interface"]), (&json!("10.1.15.1"), &json!(2)));
        assert_eq!(said["routes"][0], json!({"dst": "0.0.0.0/0", "gw": "10.1.15.1"}));
        // From outside.
        assert_eq!(addresses(&a, "eth0"), [format!("{ip}/24"), format!("{ip6}/64")]);
        assert_eq!((&pair["master"], &pair["mtu"], &eth0["mtu"]), (&json!("cni0"), &json!(1450), &json!(1450)));
        assert_eq!(pair["linkinfo"]["info_slave_data"]["hairpin"], true);
        assert_eq!(addresses(&runtime.host, "cni0"), ["10.1.15.1/24", "fd00:0:0:15::1/64"]);
        assert_eq!(a.json("route show default")[0]["gateway"], "10.1.15.1");
        assert_eq!(a.json("-6 route show default")[0]["gateway"], "fd00:0:0:15::1");
        let other = runtime.add(&conf, "b", &b);
        reaches(&a, other["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap());
        reaches(&a, other["ips"][1]["address"].as_str().unwrap().split('/').next().unwrap());
        reaches(&runtime.host, &ip);
        runtime.del(&conf, "b", Some(&b));
        // The namespace may be gone by then, and so may everything.
        runtime.del(&conf, "a", None);
        runtime.del(&conf, "a", Some(&a));
        assert_eq!(runtime.links(), ["lo", "cni0"]);
        assert_eq!((runtime.held(), runtime.attachments()), (vec![], vec![]));
        assert_eq!(a.json("link").as_array().unwrap().len(), 1);
    }
}

#[test]
fn version_names_what_is_spoken_and_answers_in_the_callers_version() {
    let Some((runtime, _dir)) = runtime() else { return };
    let conf = json!({"cniVersion": "1.0.0"});
    let said = runtime.try_verb("VERSION", &conf, "a", None).unwrap();
    assert_eq!(said["cniVersion"], "1.0.0");
    for version in VERSIONS {
        assert!(said["supportedVersions"].as_array().unwrap().contains(&json!(version)), "{said}");
    }
    let text = runtime.host.command(bin("twill-cni")).arg("--version").env_remove("CNI_COMMAND").output().unwrap();
    assert!(String::from_utf8(text.stdout).unwrap().contains("1.1.0"));
}
