//! DEL, GC and CHECK of the CNI plugin where what they are told and what is there do not agree.

use serde_json::{Value, json};
use twill_e2e::cni::{Runtime, merge};
use twill_e2e::installed;
use twill_e2e::net::Bed;

fn runtime() -> Option<(Runtime, tempfile::TempDir)> {
    let dir = tempfile::tempdir().unwrap();
    Some((Runtime::new(Bed::new()?, dir.path()), dir))
}

/// The type of a configuration is missing or misspelt: what ADD wrote down goes whole.
#[test]
fn whatever_type_a_configuration_has_no_address_is_freed_while_its_device_stands() {
    let Some((runtime, _dir)) = runtime().filter(|_| installed("nft")) else { return };
    let a = runtime.container("a");
    let port = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
    let conf = |more: Value| {
        let mut conf = runtime.conf("1.1.0", json!({"runtimeConfig": {"portMappings": port}}));
        conf["ipam"]["type"] = json!("host-local");
        merge(&mut conf, more);
        conf
    };
    let all_gone = |why: &str| {
        assert_eq!((runtime.held(), runtime.attachments(), runtime.links().len()), (vec![], vec![], 2), "{why}");
        assert_eq!(runtime.host.run("nft list tables"), "", "{why}");
    };
    for wrong in [json!({"type": null}), json!({"type": "twill-cin"}), json!({"type": "twill", "name": null})] {
        let why = wrong.to_string();
        runtime.add(&conf(json!({})), "a", &a);
        runtime.del(&conf(wrong.clone()), "a", Some(&a));
        all_gone(&format!("DEL {why}"));
        if wrong.get("name").is_some() {
            // Without a name there is no network whose attachments could be stale.
            continue;
        }
        let mut gc = conf(wrong);
        gc["cni.dev/valid-attachments"] = json!([]);
        runtime.add(&conf(json!({})), "a", &a);
        assert_eq!(runtime.try_verb("GC", &gc, "", None), Ok(Value::Null));
        all_gone(&format!("GC {why}"));
        // The attachment file is lost.
        for gc in [None, Some(&gc)] {
            let plain = runtime.conf("1.1.0", json!({}));
            runtime.add(&plain, "a", &a);
            std::fs::remove_file(runtime.file("state/attachments/a:eth0.json")).unwrap();
            match gc {
                Some(gc) => assert_eq!(runtime.try_verb("GC", gc, "", None), Ok(Value::Null)),
                None => runtime.del(&conf(json!({"type": "twill-cin"})), "a", Some(&a)),
            }
            all_gone(&format!("lost {why}"));
        }
    }
    // Somebody else's plugin was refused for a name that another network has: that one's device stays.
    runtime.add(&conf(json!({})), "a", &a);
    let before = runtime.everything();
    runtime.del(&conf(json!({"type": "macvlan", "name": "other"})), "a", Some(&a));
    assert_eq!(runtime.everything(), before);
}
