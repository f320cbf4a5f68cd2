//! DEL, GC and CHECK of the CNI plugin where what they are told and what is there do not agree.

use std::path::Path;

use serde_json::{Value, json};
use twill_e2e::cni::{Call, Runtime, merge, netns};
use twill_e2e::net::{Bed, Host};
use twill_e2e::{eventually, installed};

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

fn sh(host: &Host, line: &str) {
    let out = host.command("sh").args(["-c", line]).output().unwrap();
    assert!(out.status.success(), "{line}: {out:?}");
}

/// Each cuts the container off, and leaves addresses, routes and states as they are.
#[test]
fn check_names_what_cuts_a_container_off() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    for (bridge, id, container) in [("cni0", "a", &a), ("", "b", &b)] {
        let mut conf = runtime.conf("1.0.0", json!({"bridge": bridge}));
        let said = runtime.add(&conf, id, container);
        let at = usize::from(!bridge.is_empty());
        let pair = said["interfaces"][at]["name"].as_str().unwrap().to_owned();
        conf["prevResult"] = said;
        let check = || runtime.try_verb("CHECK", &conf, id, Some(container));
        assert_eq!(check(), Ok(Value::Null));
        let host = &runtime.host;
        let port = |words: &str| format!("bridge link set dev {pair} {words}");
        let arp = |device: &str, word: &str| format!("ip link set {device} arp {word}");
        let on_bridge = [
            (host, port("locked on"), port("locked off"), format!("{pair}: its bridge port is locked")),
            (
                host,
                port("learning off flood off"),
                port("learning on flood on"),
                format!("{pair}: its bridge port is without learning and without flooding"),
            ),
            (host, arp("cni0", "off"), arp("cni0", "on"), "host: cni0: ARP is off, wanted: on".to_owned()),
        ];
        let alone = [(host, arp(&pair, "off"), arp(&pair, "on"), format!("host: {pair}: ARP is off, wanted: on"))];
        let inside = [(container, arp("eth0", "off"), arp("eth0", "on"), "container: eth0: ARP is off".to_owned())];
        let cases: Vec<_> = if bridge.is_empty() { alone.into() } else { on_bridge.into() };
        for (place, alter, restore, named) in cases.iter().chain(&inside) {
            sh(place, alter);
            let refused = check().expect_err(alter);
            let msg = refused["msg"].as_str().unwrap();
            assert!(refused["code"] == 103 && msg.contains(named), "{alter}: {refused:#}");
            sh(place, restore);
            eventually("it is as it was", check);
        }
        // Either alone cuts nobody off.
        if !bridge.is_empty() {
            sh(host, &port("learning off"));
            assert_eq!(check(), Ok(Value::Null));
            sh(host, &port("learning on flood off"));
            assert_eq!(check(), Ok(Value::Null));
        }
    }
}

/// The reference plugin `tuning` changes the MTU behind ours and does not say so in its result.
#[test]
fn check_leaves_the_mtu_that_a_chained_plugin_has_set_to_that_plugin() {
    let tuning = Path::new("/usr/lib/cni/tuning");
    if !tuning.is_file() {
        println!("SKIP: {} is missing (containernetworking-plugins)", tuning.display());
        return;
    }
    // It keeps a file for each container, in one place for the whole machine.
    if !rustix::process::geteuid().is_root() {
        println!("SKIP: tuning's place in /run/cni needs root");
        return;
    }
    let Some((runtime, _dir)) = runtime() else { return };
    let a = runtime.container("a");
    let id = &format!("tuned-{}", std::process::id());
    let mut conf = runtime.conf("1.0.0", json!({}));
    let said = runtime.add(&conf, id, &a);
    let chained = json!({"cniVersion": "1.0.0", "name": "net", "type": "tuning", "mtu": 1300, "prevResult": said});
    let tuned = |verb: &'static str| {
        let call = Call { verb, conf: &chained, id, netns: Some(netns(&a)), args: "" };
        runtime.finish(runtime.command(tuning, &call), &chained).unwrap()
    };
    conf["prevResult"] = tuned("ADD");
    let check = || runtime.try_verb("CHECK", &conf, id, Some(&a));
    let checked = check();
    tuned("DEL");
    assert_eq!(checked, Ok(Value::Null));
    // With tuning's word that it has changed the MTU goes the reason to leave it alone.
    assert_eq!(check(), Ok(Value::Null), "tuning has restored it");
    sh(&a, "ip link set eth0 mtu 1300");
    let refused = check().expect_err("by hand");
    assert!(refused["msg"].as_str().unwrap().contains("MTU is 1300, wanted: 1450"), "{refused:#}");
}

/// What the reference bridge has written with iptables goes by the guide's command, and nothing of anybody else.
#[test]
fn the_guides_command_removes_the_chain_that_the_reference_bridge_has_left() {
    let bridge = Path::new("/usr/lib/cni/bridge");
    if !bridge.is_file() {
        println!("SKIP: {} is missing (containernetworking-plugins)", bridge.display());
        return;
    }
    let Some((runtime, _dir)) = runtime().filter(|_| installed("iptables")) else { return };
    let conf = json!({"cniVersion": "1.0.0", "name": "net", "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
        "stateDir": runtime.file("state"),
        "ipam": {"type": "host-local", "dataDir": runtime.file("networks"), "subnet": "10.78.0.0/24"}});
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    for (id, container) in [("a", &a), ("ab", &b)] {
        let call = Call { verb: "ADD", conf: &conf, id, netns: Some(netns(container)), args: "" };
        let mut command = runtime.command(bridge, &call);
        command.env("CNI_PATH", "/usr/lib/cni");
        runtime.finish(command, &conf).unwrap();
    }
    let of = |id: &str| {
        let rules = runtime.host.run("iptables -t nat -S");
        rules.lines().filter(|line| line.contains(&format!(r#"id: \"{id}\""#))).count()
    };
    runtime.del(&conf, "a", Some(&a));
    assert_eq!((runtime.held(), of("a"), of("ab")), (vec!["10.78.0.3".to_owned()], 3, 3));
    let guide = include_str!("../../../docs/guide/containers.md");
    let (_, command) = guide.split_once("    id=CONTAINER\n").unwrap();
    let lines: Vec<&str> = command.lines().take_while(|line| line.starts_with("    ")).collect();
    sh(&runtime.host, &format!("id=a\n{}", lines.join("\n")));
    assert_eq!((of("a"), of("ab")), (0, 3));
    let chains = runtime.host.run("iptables -t nat -S");
    assert_eq!(chains.matches("-N CNI-").count(), 1, "{chains}");
}

/// Podman and docker ask for a port at every address of each family and at every address: it leads to one place.
#[test]
fn a_host_port_that_is_asked_for_at_every_address_and_at_some_is_one() {
    let Some((runtime, _dir)) = runtime().filter(|_| installed("nft")) else { return };
    let a = runtime.container("a");
    let at = |ip: &str| json!({"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ip});
    let table = |ports: Value| {
        let conf = runtime.conf("1.0.0", json!({"runtimeConfig": {"portMappings": ports}}));
        runtime.add(&conf, "a", &a);
        let rules = runtime.host.run("nft list table inet twill-cni");
        runtime.del(&conf, "a", Some(&a));
        rules
    };
    let all = table(json!([at("")]));
    // Each container gets another address.
    let of = |rules: &str| rules.replace(|c: char| c.is_ascii_digit(), "").len();
    for ports in [json!([at(""), at("0.0.0.0")]), json!([at("::"), at("127.0.0.1"), at("")])] {
        let rules = table(ports);
        assert_eq!(of(&rules), of(&all), "{rules}\n{all}");
    }
    let v4 = table(json!([at("0.0.0.0")]));
    assert_eq!(of(&table(json!([at("10.0.0.9"), at("0.0.0.0")]))), of(&v4));
    let mut other = at("0.0.0.0");
    other["containerPort"] = json!(81);
    let conf = runtime.conf("1.0.0", json!({"runtimeConfig": {"portMappings": [at(""), other]}}));
    let refused = runtime.try_verb("ADD", &conf, "a", Some(&a)).unwrap_err();
    assert!(refused["msg"].as_str().unwrap().contains("is to lead to port 80"), "{refused:#}");
}

/// A directory, a pipe, a link to nowhere, a file of any length: each has an address's name and is no address file.
#[test]
fn what_is_no_address_file_is_named_and_hinders_nobody() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    let net = runtime.file("networks/net");
    std::fs::create_dir_all(net.join("10.9.0.2/inside")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, net.join("10.9.0.3"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    std::os::unix::fs::symlink("/nowhere", net.join("10.9.0.4")).unwrap();
    std::fs::write(net.join("10.9.0.5"), vec![b'x'; 5000]).unwrap();
    let odd = ["10.9.0.2", "10.9.0.3", "10.9.0.4", "10.9.0.5"];
    let conf = runtime.conf("1.1.0", json!({"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/29"}]]}}));
    let said = runtime.add(&conf, "a", &a);
    assert_eq!(said["ips"][0]["address"], "10.9.0.6/29");
    let refused = runtime.try_verb("ADD", &conf, "b", Some(&b)).unwrap_err();
    let msg = refused["msg"].as_str().unwrap();
    assert_eq!(refused["code"], 102, "{refused:#}");
    for ip in odd {
        assert!(msg.contains(&format!("{ip} by nobody (no address file has that name)")), "{msg}");
    }
    assert!(msg.contains("10.9.0.6 by a:eth0"), "{msg}");
    // Every file is looked at where nothing is written down.
    runtime.del(&conf, "gone", None);
    let mut gc = conf.clone();
    gc["cni.dev/valid-attachments"] = json!([]);
    assert_eq!(runtime.try_verb("GC", &gc, "", None), Ok(Value::Null));
    assert_eq!(runtime.held(), odd);
    runtime.add(&conf, "a", &a);
    runtime.del(&conf, "a", Some(&a));
    assert_eq!(runtime.held(), odd);
}

#[test]
fn a_route_has_the_scope_that_is_asked_for_and_check_names_another() {
    let Some((runtime, _dir)) = runtime() else { return };
    let a = runtime.container("a");
    let routes = json!([{"dst": "192.0.2.0/24", "scope": 253}, {"dst": "198.51.100.0/24", "scope": 200, "gw": "10.1.15.77"},
        {"dst": "203.0.113.0/24", "scope": 0}, {"dst": "2001:db8::/64", "scope": 253}]);
    let mut conf = runtime.conf("1.1.0", json!({"ipam": {"routes": routes}}));
    let said = runtime.add(&conf, "a", &a);
    assert!(said["routes"].as_array().unwrap().contains(&routes[0]), "{said:#}");
    let route = |dst: &str| a.run(&format!("ip route show {dst}")).trim().to_owned();
    assert_eq!(route("192.0.2.0/24"), "192.0.2.0/24 dev eth0 scope link");
    assert_eq!(route("198.51.100.0/24"), "198.51.100.0/24 via 10.1.15.77 dev eth0 scope site");
    assert_eq!(route("203.0.113.0/24"), "203.0.113.0/24 via 10.1.15.1 dev eth0");
    assert!(!a.run("ip -6 route show 2001:db8::/64").contains("via"));
    conf["prevResult"] = said;
    let check = || runtime.try_verb("CHECK", &conf, "a", Some(&a));
    assert_eq!(check(), Ok(Value::Null));
    sh(&a, "ip route replace 198.51.100.0/24 via 10.1.15.77 dev eth0 scope global");
    let refused = check().expect_err("another scope");
    assert!(refused["msg"].as_str().unwrap().contains("scope site"), "{refused:#}");
    let before = runtime.everything();
    let b = runtime.container("b");
    let wrong = runtime.conf("1.1.0", json!({"ipam": {"routes": [{"dst": "192.0.2.0/24", "scope": 256}]}}));
    let refused = runtime.try_verb("ADD", &wrong, "b", Some(&b)).unwrap_err();
    assert!(refused["code"] == 7 && refused["msg"].as_str().unwrap().contains("scope 256"), "{refused:#}");
    assert_eq!(runtime.everything(), before);
}

#[test]
fn a_route_has_the_metrics_that_are_asked_for_and_check_names_others() {
    let Some((runtime, _dir)) = runtime() else { return };
    let a = runtime.container("a");
    let routes = json!([{"dst": "192.0.2.0/24", "mtu": 1400, "advmss": 1300}, {"dst": "198.51.100.0/24", "mtu": 1300},
        {"dst": "2001:db8::/64", "mtu": 1380, "advmss": 1310}, {"dst": "203.0.113.0/24", "advmss": 65495, "mtu": 65520}]);
    let mut conf = runtime.conf("1.1.0", json!({"ipam": {"routes": routes}}));
    let said = runtime.add(&conf, "a", &a);
    let metrics = |words: &str| a.json(words)[0]["metrics"].clone();
    assert_eq!(metrics("route show 192.0.2.0/24"), json!([{"mtu": 1400, "advmss": 1300}]));
    assert_eq!(metrics("route show 198.51.100.0/24"), json!([{"mtu": 1300}]));
    assert_eq!(metrics("-6 route show 2001:db8::/64"), json!([{"mtu": 1380, "advmss": 1310}]));
    assert_eq!(metrics("route show 203.0.113.0/24"), json!([{"mtu": 65520, "advmss": 65495}]));
    for route in routes.as_array().unwrap() {
        assert!(said["routes"].as_array().unwrap().contains(route), "{said:#}");
    }
    let kept = std::fs::read(runtime.file("state/attachments/a:eth0.json")).unwrap();
    let kept: Value = serde_json::from_slice(&kept).unwrap();
    let kept = kept["routes"].as_array().unwrap().iter().find(|way| way["dst"] == "192.0.2.0/24").unwrap();
    assert_eq!((&kept["mtu"], &kept["advmss"]), (&json!(1400), &json!(1300)));
    conf["prevResult"] = said;
    let check = |conf: &Value| runtime.try_verb("CHECK", conf, "a", Some(&a));
    assert_eq!(check(&conf), Ok(Value::Null));
    let names = |conf: &Value, named: &str| {
        let refused = check(conf).expect_err(named);
        let msg = refused["msg"].as_str().unwrap();
        assert!(refused["code"] == 103 && msg.contains(named) && msg.matches("route").count() == 1, "{refused:#}");
    };
    let (v4, v6) = ("192.0.2.0/24 via 10.1.15.1 dev eth0", "2001:db8::/64 via fd00:0:0:15::1 dev eth0 metric 1024");
    for (way, family, mtu, advmss) in [(v4, "-4", 1400, 1300), (v6, "-6", 1380, 1310)] {
        let change = |metrics: &str| sh(&a, &format!("ip {family} route change {way} {metrics}"));
        for altered in [
            String::new(),
            format!("mtu {mtu}"),
            format!("advmss {advmss}"),
            format!("mtu 1290 advmss {advmss}"),
            format!("mtu {mtu} advmss 1200"),
            format!("mtu {mtu} advmss {advmss} window 9000"),
        ] {
            change(&altered);
            names(&conf, &format!("container: route {way} mtu {mtu} advmss {advmss} is missing"));
        }
        change(&format!("mtu {mtu} advmss {advmss}"));
        assert_eq!(check(&conf), Ok(Value::Null));
    }
    // A chained plugin's.
    let mut chained = conf.clone();
    let theirs = json!({"dst": "10.77.0.0/16", "gw": "10.1.15.1", "mtu": 1350, "priority": 9});
    chained["prevResult"]["routes"].as_array_mut().unwrap().push(theirs);
    sh(&a, "ip route add 10.77.0.0/16 via 10.1.15.1 metric 9 mtu 1350");
    assert_eq!(check(&chained), Ok(Value::Null));
    sh(&a, "ip route change 10.77.0.0/16 via 10.1.15.1 metric 9");
    names(&chained, "route 10.77.0.0/16 via 10.1.15.1 dev eth0 metric 9 mtu 1350 is missing");
    let (before, b) = (runtime.everything(), runtime.container("b"));
    let (mtu, advmss) = ("write a number from 1 to 65520", "write a number from 1 to 65495");
    for (key, allowed, value) in [
        ("mtu", mtu, json!(-1)),
        ("mtu", mtu, json!("1400")),
        ("mtu", mtu, json!(0)),
        ("mtu", mtu, json!(65_521)),
        ("mtu", mtu, json!(1u64 << 32)),
        ("mtu", mtu, json!(1400.5)),
        ("advmss", advmss, json!(0)),
        ("advmss", advmss, json!(65_496)),
        ("advmss", advmss, json!([1300])),
        ("advmss", advmss, json!((1u64 << 32) + 1300)),
    ] {
        let wrong = runtime.conf("1.1.0", json!({"ipam": {"routes": [{"dst": "192.0.2.0/24", key: value}]}}));
        let refused = runtime.try_verb("ADD", &wrong, "b", Some(&b)).unwrap_err();
        let msg = format!("the route to 192.0.2.0/24 has the {key} {value}");
        assert_eq!((&refused["code"], &refused["msg"], &refused["details"]), (&json!(7), &json!(msg), &json!(allowed)));
        assert_eq!(runtime.everything(), before, "{key} {value}");
    }
}

/// The next ADD is for it.
#[test]
fn check_is_of_what_add_made_whatever_the_configuration_says_by_now() {
    let Some((runtime, _dir)) = runtime() else { return };
    let a = runtime.container("a");
    let conf = runtime.conf("1.1.0", json!({}));
    let said = runtime.add(&conf, "a", &a);
    let edits = [
        json!({"mtu": 1300}),
        json!({"bridge": "cni9"}),
        json!({"bridge": ""}),
        json!({"promiscMode": true}),
        json!({"hairpinMode": false, "portIsolation": true}),
        json!({"isDefaultGateway": false, "isGateway": false}),
        json!({"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.8.0.0/24"}]], "dataDir": runtime.file("elsewhere")}}),
        json!({"ipam": {"routes": [{"dst": "192.0.2.0/24", "mtu": 1400}]}}),
        json!({"subnetFile": runtime.file("gone")}),
    ];
    for edit in edits {
        let check = || {
            let mut conf = conf.clone();
            twill_e2e::cni::merge(&mut conf, edit.clone());
            conf["prevResult"] = said.clone();
            runtime.try_verb("CHECK", &conf, "a", Some(&a))
        };
        assert_eq!(check(), Ok(Value::Null), "{edit}");
        // An alteration is named as ever.
        sh(&a, "ip link set eth0 mtu 1300");
        let refused = check().expect_err("another MTU");
        assert!(refused["msg"].as_str().unwrap().contains("eth0: MTU is 1300, wanted: 1450"), "{edit}: {refused:#}");
        sh(&a, "ip link set eth0 mtu 1450");
    }
}
