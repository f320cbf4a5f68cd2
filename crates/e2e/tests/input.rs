//! Hostile input: every field of config, settings and flags has one error that names the key, the value and what is allowed.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use twill_e2e::net::Bed;
use twill_e2e::node::{Node, spawn};
use twill_e2e::{bin, eventually, installed};

fn node() -> Option<(Node, tempfile::TempDir)> {
    if !installed("etcdctl") {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    Some((Node::new(Bed::new()?, dir.path()), dir))
}

/// Writes the config as it is, whatever bytes it has.
fn put_config(node: &Node, bytes: &[u8]) {
    use std::io::Write;
    if bytes.is_empty() {
        // etcdctl takes no empty standard input.
        return node.put("config", "");
    }
    let mut command = node.host.command("etcdctl");
    command.env("ETCDCTL_API", "3").args(["put", "/coreos.com/network/config"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    assert!(child.wait().unwrap().success());
}

/// Code and evidence of what `agent --check` finds.
fn findings(node: &Node, flags: &str) -> Vec<(String, String)> {
    let check = node.twill_json(&format!("agent --check {flags}"));
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    check["findings"].as_array().unwrap().iter().map(|f| (text(&f["code"]), text(&f["evidence"]))).collect()
}

/// A config of one family with one field more.
fn with(field: &str) -> String {
    format!(r#"{{"Network":"10.1.0.0/16",{field},"Backend":{{"Type":"vxlan"}}}}"#)
}

fn v6(fields: &str) -> String {
    format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,{fields}"Backend":{{"Type":"vxlan"}}}}"#)
}

fn backend(fields: &str) -> String {
    format!(r#"{{"Network":"10.1.0.0/16","Backend":{{{fields}}}}}"#)
}

#[test]
fn every_field_of_the_network_config_has_its_error() {
    let Some((node, _dir)) = node() else { return };
    let cases = [
        (with(r#""EnableIPv4":"yes""#), r#"EnableIPv4: "\"yes\"" is not true or false"#),
        (with(r#""EnableIPv6":1"#), r#"EnableIPv6: "1" is not true or false"#),
        (with(r#""enableipv4":false"#), r#"EnableIPv4: "false" is not true where EnableIPv6 is not"#),
        (with(r#""network":5"#), r#"Network: "5" is not an IPv4 network like 10.244.0.0/16"#),
        (with(r#""network":"fd00::/56""#), r#"Network: "fd00::/56" is not an IPv4 network like"#),
        (with(r#""NETWORK":"10.1.0.0/29""#), r#"Network: "10.1.0.0/29" is not a network of /28 or larger"#),
        (with(r#""Network":null"#), r#"Network: "absent" is not an IPv4 network like"#),
        (with(r#""SubnetLen":-3"#), r#"SubnetLen: "-3" is not a prefix length up to 30"#),
        (with(r#""SubnetLen":17"#), r#"SubnetLen: "17" is not at least two more than the network's length"#),
        (with(r#""SubnetLen":31"#), r#"SubnetLen: "31" is not at most 30"#),
        (with(r#""SubnetLen":18446744073709551616"#), r#"SubnetLen: "18446744073709551616" is not a prefix length"#),
        (with(r#""SubnetMin":"10.2.0.0""#), r#"SubnetMin: "10.2.0.0" is not an address in the network"#),
        (with(r#""SubnetMin":"10.1.0.5""#), r#"SubnetMin: "10.1.0.5" is not the first address of a subnet"#),
        (with(r#""SubnetMax":[]"#), r#"SubnetMax: "[]" is not an address in the network"#),
        (
            with(r#""SubnetMin":"10.1.9.0","SubnetMax":"10.1.8.0""#),
            r#"SubnetMin: "10.1.9.0" is not an address not above SubnetMax"#,
        ),
        (v6(""), r#"IPv6Network: "absent" is not an IPv6 network like fd00:244::/56"#),
        (v6(r#""IPv6Network":"10.1.0.0/16","#), r#"IPv6Network: "10.1.0.0/16" is not an IPv6 network like"#),
        (v6(r#""IPv6Network":"fd00::/125","#), r#"IPv6Network: "fd00::/125" is not a network of /124 or larger"#),
        (v6(r#""IPv6Network":"fd00::/56","IPv6SubnetLen":127,"#), r#"IPv6SubnetLen: "127" is not at most 126"#),
        (v6(r#""IPv6Network":"fd00::/56","IPv6SubnetLen":"64","#), r#"IPv6SubnetLen: "\"64\"" is not a prefix length"#),
        (v6(r#""IPv6Network":"fd00::/56","IPv6SubnetMin":"fd01::","#), r#"IPv6SubnetMin: "fd01::" is not an address"#),
        (v6(r#""IPv6Network":"fd00::/56","IPv6SubnetMax":"fd00::1","#), r#"IPv6SubnetMax: "fd00::1" is not the first"#),
        (with(r#""backend":[]"#).replace(r#","Backend":{"Type":"vxlan"}"#, ""), r#"Backend: "[]" is not an object"#),
        (backend(r#""Type":5"#), r#"Backend.Type: "5" is not a backend's name"#),
        (backend(r#""Type":"magic""#), r#"Backend.Type: "magic" is not one of vxlan, udp, host-gw"#),
        (backend(r#""Type":"vxlan","VNI":-1"#), r#"Backend.VNI: "-1" is not a VNI from 0 to 16777215"#),
        (backend(r#""Type":"vxlan","vni":"7""#), r#"Backend.VNI: "\"7\"" is not a VNI from 0 to 16777215"#),
        (backend(r#""Type":"vxlan","Port":70000"#), r#"Backend.Port: "70000" is not a port from 1 to 65535"#),
        (backend(r#""Type":"vxlan","MTU":3"#), r#"Backend.MTU: "3" is not an MTU from 68 to 65535"#),
        (backend(r#""Type":"vxlan","MTU":1e3"#), r#"Backend.MTU: "1e3" is not an MTU from 68 to 65535"#),
        (backend(r#""Type":"vxlan","GBP":"on""#), r#"Backend.GBP: "\"on\"" is not true or false"#),
        (backend(r#""Type":"vxlan","Learning":1"#), r#"Backend.Learning: "1" is not true or false"#),
    ];
    for (config, want) in &cases {
        put_config(&node, config.as_bytes());
        let found = findings(&node, "");
        assert_eq!(found.len(), 1, "{config}: one error: {found:?}");
        assert_eq!(found[0].0, "bad-config", "{config}");
        assert!(
            found[0].1.starts_with(&format!("network config /coreos.com/network/config: {want}")),
            "{config}: {}",
            found[0].1
        );
    }
}

#[test]
fn a_network_that_no_container_can_be_in_is_refused_wherever_it_is_named() {
    let Some((node, dir)) = node() else { return };
    let v4_allowed = "is not a network outside 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4 and 240.0.0.0/4";
    let v6_allowed = "is not a network outside ::1, fe80::/10 and ff00::/8";
    for network in [
        "224.0.0.0/8",
        "239.1.0.0/16",
        "240.0.0.0/8",
        "255.255.0.0/16",
        "169.254.0.0/16",
        "169.254.8.0/24",
        "0.1.0.0/16",
        "127.1.0.0/16",
        "0.0.0.0/0",
        "128.0.0.0/1",
        "ff02::/64",
        "fe80::/56",
        "::/64",
        "::/0",
    ] {
        let is_v6 = network.contains(':');
        let (key, allowed) = if is_v6 { ("IPv6Network", v6_allowed) } else { ("Network", v4_allowed) };
        let want = format!("{key}: \"{network}\" {allowed}");
        let config = if is_v6 {
            v6(&format!(r#""IPv6Network":"{network}","#))
        } else {
            with(&format!(r#""Network":"{network}""#))
        };
        put_config(&node, config.as_bytes());
        let bad = [("bad-config".to_owned(), format!("network config /coreos.com/network/config: {want}"))];
        assert_eq!(findings(&node, ""), bad, "{network}");
        assert_eq!(findings(&node, &format!("--serve-store --network {network}")), bad, "{network}");
        let data = dir.path().join("refused");
        for words in [
            format!("agent --iface eth0 --serve-store 127.0.0.1:2380 --network {network}"),
            format!("store serve --listen 127.0.0.1:2380 --data {} --network {network}", data.display()),
            format!("ip plan --network {network} --nodes 1 --containers 1"),
        ] {
            let (code, err) = node.twill(&words);
            let err = err.unwrap_err();
            assert!(
                code == Some(1) && err.contains(&format!("error: network config: {want}\nhint: ")),
                "{words}: {code:?} {err}"
            );
        }
        assert!(!data.exists() && !node.file("state/store").exists(), "{network}: nothing is written");
    }
    let (code, err) = node.twill("store serve --listen 127.0.0.1:2380 --network 10.0.0.0/29");
    assert!(code == Some(1) && err.unwrap_err().contains("\"10.0.0.0/29\" is not a network of /28 or larger"));
    let (code, out) = node.twill("ip plan --network 223.255.0.0/16 --nodes 1 --containers 1");
    assert!(code == Some(0), "the last one that is usable: {out:?}");
}

#[test]
fn what_is_no_json_at_all_is_said_in_one_line_and_crashes_nothing() {
    let Some((node, _dir)) = node() else { return };
    let deep = |n: usize| [vec![b'['; n], vec![b']'; n]].concat();
    let long = format!(r#"{{"Network":"{}"}}"#, "x".repeat(300_000));
    for bytes in [
        b"".to_vec(),
        b"[1]".to_vec(),
        b"{\"Network\":\"10.1\xff\"}".to_vec(),
        b"{\"Network\":\"10.1.0.0/16\0\"}".to_vec(),
        deep(200_000),
        [&br#"{"Network":"10.1.0.0/16","Backend":"#[..], &deep(200_000), b"}"].concat(),
        long.into_bytes(),
    ] {
        put_config(&node, &bytes);
        let found = findings(&node, "");
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].0 == "bad-config" && found[0].1.len() < 500, "{found:?}");
        let (code, error) = node.twill("plan");
        assert_eq!(code, Some(1));
        assert!(error.unwrap_err().starts_with("error: network config /coreos.com/network/config: "));
    }
}

#[test]
fn what_is_no_json_is_named_with_its_key_its_value_and_what_is_allowed() {
    let Some((node, _dir)) = node() else { return };
    let whole = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}"#;
    let said = |bytes: &str, value: &str| {
        put_config(&node, bytes.as_bytes());
        let found = findings(&node, "").remove(0).1;
        let want = format!("network config /coreos.com/network/config: {value} is not a JSON object: ");
        assert!(found.starts_with(&want), "{found}");
    };
    said("garbage", r#""garbage""#);
    said("", r#""""#);
    said(&format!("{whole} x"), &format!("{:?}", format!("{whole} x")));
    // A running agent says the same, of its leases as well.
    put_config(&node, whole.as_bytes());
    let _agent = node.agent("");
    put_config(&node, b"garbage");
    node.put("subnets/10.1.40.0-24", "garbage");
    for (code, object, want) in [
        (
            "bad-config",
            "network config",
            r#"network config /coreos.com/network/config: "garbage" is not a JSON object: "#,
        ),
        ("bad-lease-value", "lease 10.1.40.0-24", r#"its value: "garbage" is not a JSON object: "#),
    ] {
        eventually(&format!("{code} is named"), || {
            let found = node.status()["findings"].take();
            let named = |f: &Value| f["code"] == code && f["object"] == object;
            let named = found.as_array().unwrap().iter().find(|f| named(f)).ok_or(found.clone())?;
            if named["evidence"].as_str().unwrap().starts_with(want) { Ok(()) } else { Err(found.clone()) }
        });
    }
}

#[test]
fn control_characters_of_keys_and_values_are_written_out() {
    let Some((node, _dir)) = node() else { return };
    put_config(&node, with("\"a\\nforged \\u001b[2J\":1").as_bytes());
    node.put("subnets/10.1.40.0-24\nforged \u{1b}[2J", "{}");
    node.put("subnets/10.1.41.0-24", "gar\nforged \u{1b}[2J");
    let kind = r#"{"PublicIP":"10.168.0.42","BackendType":"v\nforged \u001b[2J"}"#;
    node.put("subnets/10.1.42.0-24", kind);
    let _agent = node.agent("");
    node.finding("foreign-backend");
    node.finding("config-key-ignored");
    let mut said: Vec<(String, String)> = ["status", "leases", "peers", "store ls", "agent --check"]
        .iter()
        .map(|words| (words.to_string(), node.twill(words).1.unwrap()))
        .collect();
    said.push(("the log".into(), node.log("agent.log")));
    for (words, text) in said {
        let raw = |c: char| c.is_control() && c != '\n';
        assert!(text.contains("forged") && !text.contains(raw), "{words}: {text:?}");
        assert!(!text.lines().any(|line| line.trim_start().starts_with("forged")), "{words}: {text}");
    }
}

#[test]
fn keys_without_meaning_are_named_once_and_the_last_duplicate_wins() {
    let Some((node, _dir)) = node() else { return };
    let fields = r#""Type":"vxlan","VNI":5,"vni":7,"DirectRouting":true,"directrouting":false"#;
    let config =
        format!(r#"{{"NETWORK":"10.9.0.0/16","Foo":1,"foo":2,"Network":"10.1.0.0/16","Backend":{{{fields}}}}}"#);
    put_config(&node, config.as_bytes());
    let want = ["Foo is not a key of the network config", "Backend.DirectRouting has no effect yet"];
    let want: Vec<_> = want.map(|w| ("config-key-ignored".to_owned(), w.to_owned())).into();
    assert_eq!(findings(&node, ""), want);
    let _agent = node.agent("");
    let status = node.status();
    let said = |f: &Value| f.to_string().contains("Foo") || f.to_string().contains("DirectRouting");
    assert_eq!(status["findings"].as_array().unwrap().iter().filter(|f| said(f)).count(), 2, "{status:#}");
    let log = node.log("agent.log");
    for word in ["Foo", "DirectRouting"] {
        assert_eq!(log.lines().filter(|line| line.contains(word)).count(), 1, "{word} in {log}");
    }
    assert_eq!(status["networks"][0], "10.1.0.0/16", "the last one wins");
    let link = node.host.json("-d link show flannel.7");
    assert_eq!(link[0]["linkinfo"]["info_data"]["id"], 7);
}

#[test]
fn a_backend_that_is_not_built_says_so() {
    let Some((node, _dir)) = node() else { return };
    for (config, name) in [
        (r#"{"Network":"10.1.0.0/16","Backend":{"type":"Host-GW"}}"#, "host-gw"),
        (r#"{"Network":"10.1.0.0/16","Backend":{"Type":"alloc"}}"#, "alloc"),
        (r#"{"Network":"10.1.0.0/16","Backend":{"Type":"wireguard"}}"#, "wireguard"),
    ] {
        put_config(&node, config.as_bytes());
        let found = findings(&node, "");
        assert!(found.len() == 1 && found[0].0 == "backend-not-built" && found[0].1.contains(name), "{found:?}");
        let error = node.twill("plan -o json").1.unwrap_err();
        assert!(error.contains(name), "{error}");
    }
    // The running agent says it as well, waits, and goes on when the config is right.
    let _agent = node.agent_at_once("");
    node.finding("backend-not-built");
    put_config(&node, twill_e2e::node::CONFIG.as_bytes());
    eventually("the agent goes on", || std::fs::read_to_string(node.file("subnet.env")));
}

fn run(dir: &Path, words: &[&str]) -> (i32, String) {
    let out = Command::new(bin("twill")).args(words).env("TWILL_STATE_DIR", dir).stdin(Stdio::null()).output().unwrap();
    (out.status.code().unwrap(), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[test]
fn every_key_of_the_settings_file_has_its_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.toml");
    for (line, want) in [
        ("", "version"),
        ("version = 2", "version: 2 is not 1"),
        ("version = \"1\"", "invalid type: string \"1\""),
        ("version = 1\ncolour = 3", "unknown field `colour`, expected one of `version`, `store`"),
        ("version = 1\nversion = 1", "duplicate key"),
        ("version = 1\nstore = 5", "invalid type: integer `5`, expected a sequence"),
        ("version = 1\nprefix = 5", "invalid type: integer `5`, expected a string"),
        ("version = 1\nprefix = \"\"", "\"\" is not a key prefix like /coreos.com/network"),
        ("version = 1\nprefix = \"/net/\"", "\"/net/\" is not a key prefix like /coreos.com/network"),
        ("version = 1\niface = [\"\"]", "\"\" is not a device's name or address like eth0"),
        ("version = 1\nca = 5", "ca = 5"),
        ("version = 1\ncert = 5", "cert = 5"),
        ("version = 1\nkey = 5", "key = 5"),
        ("version = 1\nuser = 5", "user = 5"),
        ("version = 1\npassword_file = 5", "password_file = 5"),
        ("version = 1\nserve_store = \"x\"", "\"x\" is not an address and port like 192.0.2.11:2379"),
        ("version = 1\ninsecure = 3", "invalid type: integer `3`, expected a boolean"),
        ("version = 1\nnetwork = \"10.0.0.0/99\"", "\"10.0.0.0/99\" is not a network like 10.244.0.0/16"),
        ("version = 1\niface = \"eth0\"", "invalid type: string \"eth0\", expected a sequence"),
        ("version = 1\npublic_ip = [\"a\"]", "\"a\" is not an address like 192.0.2.11"),
        ("version = 1\nsubnet = [\"10.1.1.1/24\"]", "\"10.1.1.1/24\" is not a network without host bits"),
        ("version = 1\nsubnet_file = 5", "subnet_file = 5"),
        ("version = 1\nstate_dir = 5", "state_dir = 5"),
        ("version = 1\nrun_dir = 5", "run_dir = 5"),
    ] {
        std::fs::write(&file, line).unwrap();
        for check in ["--check", "--insecure"] {
            let (code, err) = run(dir.path(), &["agent", check, "--config", file.to_str().unwrap()]);
            assert_eq!(code, 1, "{line}: {err}");
            assert!(err.starts_with("error: ") && err.contains("agent.toml") && err.contains(want), "{line}: {err}");
            let key = line.lines().last().unwrap_or_default().split(' ').next().unwrap();
            assert!(err.contains(key) && err.contains("hint: docs/guide/settings.md"), "{line}: {err}");
        }
    }
    std::fs::write(&file, "version = 1\nnetwork = \"10.1.0.0/16\"").unwrap();
    let (code, err) = run(dir.path(), &["agent", "--check", "--config", file.to_str().unwrap()]);
    let want =
        "error: network 10.1.0.0/16 is for a store that this agent serves, and it serves none\nhint: add --serve-store";
    assert!(code == 2 && err.starts_with(want), "as for the flag: {code} {err}");
    std::fs::write(&file, b"version = 1\nprefix = \"\xff\"").unwrap();
    assert_eq!(run(dir.path(), &["agent", "--config", file.to_str().unwrap()]).0, 1);
    assert!(run(dir.path(), &["agent", "--config", "/nowhere.toml"]).1.contains("/nowhere.toml is not there"));
}

#[test]
fn every_flag_has_its_error() {
    let dir = tempfile::tempdir().unwrap();
    for (words, want) in [
        ("--serve-store 1.2.3.4", "'--serve-store [<ADDR:PORT>]': \"1.2.3.4\" is not an address and port like"),
        ("--serve-store 127.0.0.1:65536", "\"127.0.0.1:65536\" is not an address and port like"),
        ("--serve-store --network x", "'--network <PREFIX>': \"x\" is not a network like 10.244.0.0/16"),
        ("--serve-store --network 10.1.2.3/16", "\"10.1.2.3/16\" is not a network without host bits"),
        ("--network 10.1.0.0/16", "--serve-store"),
        ("--public-ip x", "'--public-ip <ADDR>': \"x\" is not an address like 192.0.2.11"),
        ("--subnet 10.1.1.1/24", "'--subnet <PREFIX>': \"10.1.1.1/24\" is not a network without host bits"),
        ("--prefix", "'--prefix <PREFIX>'"),
        ("--prefix=", "'--prefix <PREFIX>': \"\" is not a key prefix like /coreos.com/network"),
        ("--prefix /net/", "\"/net/\" is not a key prefix like /coreos.com/network"),
        ("--prefix net", "\"net\" is not a key prefix like /coreos.com/network"),
        ("--iface=", "'--iface <NAME|ADDR>': \"\" is not a device's name or address like eth0"),
        ("--iface eth0,", "\"\" is not a device's name or address like eth0"),
        ("-o xml", "[possible values: table, json, yaml]"),
        ("--colour", "unexpected argument '--colour'"),
    ] {
        let words: Vec<&str> = ["agent", "--check"].into_iter().chain(words.split_whitespace()).collect();
        let (code, err) = run(dir.path(), &words);
        assert!(code == 2 && err.starts_with("error: ") && err.contains(want), "{words:?}: {code} {err}");
    }
    let out = Command::new(bin("twill")).args(["leases", "-o", "json", "--colour"]).output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((out.status.code(), &said["error"]["code"]), (Some(2), &"usage".into()), "{said}");
    assert!(said["error"]["message"].as_str().unwrap().contains("unexpected argument '--colour'"), "{said}");
    let (code, err) = run(dir.path(), &["store", "serve", "--listen", "127.0.0.1:0", "--data", "/nowhere"]);
    assert!(code == 1 && err.contains("nobody would know the port") && err.contains("hint: name one"), "{err}");
    for (words, want) in [
        ("--store ftp://x", "store endpoint \"ftp://x\": must begin with http:// or https://"),
        ("--store http://127.0.0.1:99999", "store endpoint \"http://127.0.0.1:99999\": its port must be 1 to 65535"),
        ("--store http://[::1]:0", "store endpoint \"http://[::1]:0\": its port must be 1 to 65535"),
        ("--store http://", "store endpoint \"http://\""),
        (
            "--store http://root:secret@[::1]:2379",
            "store endpoint \"…@[::1]:2379\": user and password are told by --user",
        ),
        ("--store http://[::1]:2379/net", "store endpoint \"http://[::1]:2379/net\": must end behind the port"),
        ("--user x", "--user and --password-file belong together"),
        ("--cert x", "--cert and --key belong together"),
        ("--ca /nowhere", "read --ca /nowhere"),
    ] {
        let words: Vec<&str> = ["leases"].into_iter().chain(words.split_whitespace()).collect();
        let (code, err) = run(dir.path(), &words);
        assert!(
            code == 1 && err.starts_with("error: ") && err.contains(want) && err.contains("hint: "),
            "{words:?} {err}"
        );
    }
}

#[test]
fn a_certificate_or_key_that_cannot_be_used_is_named_with_its_flag_and_file() {
    if !installed("openssl") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        let line = format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.key -subj /CN={name} -days 2 -out {name}.pem"
        );
        let out = Command::new("openssl").args(line.split_whitespace()).current_dir(dir.path()).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("text"), "no certificate at all\n").unwrap();
    std::fs::write(at("empty"), "").unwrap();
    let torn = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    std::fs::write(at("torn"), torn).unwrap();
    let (a, key) = (at("a.pem"), at("a.key"));
    let pair = |cert: &str, key: &str| vec!["--cert".to_owned(), cert.to_owned(), "--key".to_owned(), key.to_owned()];
    let mut cases = vec![
        (pair(&a, &at("b.key")), format!("--cert {a} and --key {}: ", at("b.key")), "the key that the certificate"),
        (pair(&key, &key), format!("--cert {key}: no certificate in PEM is in it"), "BEGIN CERTIFICATE"),
        (pair(&a, &a), format!("--key {a}: no private key in PEM is in it"), "BEGIN PRIVATE KEY"),
    ];
    for bad in ["text", "empty", "torn"] {
        let bad = at(bad);
        cases.push((pair(&bad, &key), format!("--cert {bad}: "), "BEGIN CERTIFICATE"));
        cases.push((pair(&a, &bad), format!("--key {bad}: "), "BEGIN PRIVATE KEY"));
        cases.push((vec!["--ca".into(), bad.clone()], format!("--ca {bad}: "), "BEGIN CERTIFICATE"));
    }
    for store in ["https://127.0.0.1:1", "http://127.0.0.1:1"] {
        for (flags, want, way_out) in &cases {
            let words: Vec<&str> =
                ["leases", "--store", store].into_iter().chain(flags.iter().map(String::as_str)).collect();
            let (code, err) = run(dir.path(), &words);
            assert!(code == 1 && err.starts_with(&format!("error: {want}")), "{words:?} {err}");
            assert!(err.contains("hint: ") && err.contains(way_out), "{words:?} {err}");
        }
        let (code, err) = run(dir.path(), &["leases", "--store", store, "--ca", &a, "--cert", &a, "--key", &key]);
        assert!(code == 1 && err.contains("no store answers"), "good files are taken: {err}");
    }
}

#[test]
fn a_store_that_is_away_is_one_clear_error_with_the_way_out() {
    let Some((mut node, _dir)) = node() else { return };
    node.kill_store();
    for words in ["plan", "leases", "store ls"] {
        let (code, err) = node.twill(words);
        let err = err.unwrap_err();
        assert_eq!(code, Some(1));
        assert!(
            err.contains("no store answers at http://127.0.0.1:2379") && err.contains("Connection refused"),
            "{err}"
        );
        assert!(err.contains("hint: start it, or name another with --store"), "{err}");
    }
    let found = findings(&node, "");
    assert_eq!(found.iter().map(|(code, _)| code.as_str()).collect::<Vec<_>>(), ["store-away"]);
    for words in ["status", "peers", "resync --accept"] {
        let (code, err) = node.twill(words);
        let err = err.unwrap_err();
        assert!(
            code == Some(1) && err.contains("error: no agent listens in") && err.contains("hint: start it"),
            "{err}"
        );
    }
}

#[test]
fn output_that_cannot_be_written_is_a_failure_and_no_crash() {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for format in ["table", "json", "yaml"] {
        let out = Command::new(bin("twill"))
            .args(["ip", "calc", "192.0.2.1", "-o", format])
            .stdout(full())
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        let err = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(1) && err.contains("error: write the answer to stdout"), "{format}: {err}");
    }
    let status = Command::new(bin("twill")).args(["ip", "calc", "x"]).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(2), "nobody can be told why");
}

#[test]
fn an_agent_whose_log_cannot_be_written_goes_on() {
    let Some((node, _dir)) = node() else { return };
    put_config(&node, br#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let mut agent = node.host.command(bin("twill"));
    agent.args(["agent", "--store", "http://127.0.0.1:2379", "--iface", "eth0"]);
    for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--subnet-file", "subnet.env")] {
        agent.arg(flag).arg(node.file(name));
    }
    let _agent = spawn(agent, Path::new("/dev/full"));
    eventually("the agent goes on", || std::fs::read_to_string(node.file("subnet.env")));
    assert_eq!(node.status()["state"], "running");
}

/// Every command of the tree, by its own help.
fn walk(words: &[String], seen: &mut usize) {
    let out = Command::new(bin("twill")).args(words).arg("--help").output().unwrap();
    let help = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{words:?}");
    let below: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ").filter(|l| !l.starts_with(' '))?.split_whitespace().next())
        .collect();
    *seen += 1;
    let name = format!("twill {}", words.join(" "));
    assert!(help.contains("\nExample") && help.contains(&format!("\n  {}", name.trim_end())), "{name}: {help}");
    for word in below {
        walk(&[words, &[word.to_owned()]].concat(), seen);
    }
}

#[test]
fn every_command_has_help_with_examples() {
    let mut seen = 0;
    walk(&[], &mut seen);
    assert!(seen > 20, "{seen}");
}

#[test]
fn a_network_that_is_asked_for_in_vain_is_named_once() {
    let Some((mut node, _dir)) = node() else { return };
    node.kill_store();
    let ignored = "--network 10.9.0.0/16 is ignored: the store has a config already, with 10.1.0.0/16";
    let agent = node.agent("--serve-store --network 10.1.0.0/16");
    assert_eq!(node.status()["networks"][0], "10.1.0.0/16");
    assert_eq!(node.status()["findings"], serde_json::json!([]));
    assert_eq!(findings(&node, "--serve-store --network 10.1.0.0/16"), []);
    assert_eq!(findings(&node, "--serve-store"), []);
    assert_eq!(
        findings(&node, "--serve-store --network 10.9.0.0/16"),
        [("network-ignored".to_owned(), ignored.to_owned())]
    );
    agent.end(rustix::process::Signal::TERM);
    let _agent = node.agent("--serve-store --network 10.9.0.0/16");
    assert_eq!(node.finding("network-ignored")["evidence"], ignored);
    assert_eq!(node.log("agent.log").matches(ignored).count(), 1, "{}", node.log("agent.log"));
    assert_eq!(node.status()["networks"][0], "10.1.0.0/16", "the config is what it was");
}
