//! DEL, GC and CHECK of the CNI plugin where what they are told and what is there do not agree.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use twill_e2e::cni::{Call, Runtime, merge, netns};
use twill_e2e::net::{Bed, Host};
use twill_e2e::{bin, eventually, installed};

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

/// A host whose `iptables` is one of the two that a host can have.
struct Iptables {
    runtime: Runtime,
    kind: &'static str,
    dir: tempfile::TempDir,
}

impl Iptables {
    /// Each kind that this machine has, together with the reference plugins.
    fn each(mut test: impl FnMut(&Self)) {
        let bridge = Path::new("/usr/lib/cni/bridge");
        if !bridge.is_file() {
            return println!("SKIP: {} is missing (containernetworking-plugins)", bridge.display());
        }
        for kind in ["nft", "legacy"] {
            let programs = ["", "6"].map(|v6| (format!("ip{v6}tables"), format!("ip{v6}tables-{kind}")));
            let Some((runtime, dir)) = runtime().filter(|_| programs.iter().all(|(_, program)| installed(program)))
            else {
                continue;
            };
            std::fs::create_dir(dir.path().join("bin")).unwrap();
            for (name, program) in &programs {
                let proof = runtime.host.try_run(&format!("{program} -w -t nat -S"));
                if !proof.status.success() {
                    return println!("SKIP: this kernel has no {program}: {}", String::from_utf8_lossy(&proof.stderr));
                }
                let path = std::env::var_os("PATH").unwrap();
                let found = std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file());
                std::os::unix::fs::symlink(found.unwrap(), dir.path().join("bin").join(name)).unwrap();
            }
            test(&Self { runtime, kind, dir });
        }
    }

    fn conf(&self, name: &str, net: u8) -> Value {
        let (v4, v6) = (format!("10.{net}.0.0/24"), format!("fd{net}::/64"));
        json!({"cniVersion": "1.0.0", "name": name, "type": "bridge", "bridge": format!("br-{name}"), "isGateway": true, "ipMasq": true,
            "stateDir": self.runtime.file("state"), "ipam": {"type": "host-local", "dataDir": self.runtime.file("networks"),
            "ranges": [[{"subnet": v4}], [{"subnet": v6}]]}})
    }

    /// ADD by the reference bridge.
    fn add(&self, conf: &Value, id: &str, container: &Host, ifname: &str) {
        let call = Call { verb: "ADD", conf, id, netns: Some(netns(container)), args: "" };
        let mut command = self.runtime.command(Path::new("/usr/lib/cni/bridge"), &call);
        let path = format!("{}:{}", self.dir.path().join("bin").display(), std::env::var("PATH").unwrap());
        command.env("CNI_PATH", "/usr/lib/cni").env("PATH", path).env("CNI_IFNAME", ifname);
        self.runtime.finish(command, conf).unwrap();
    }

    /// DEL by ours.
    fn del(&self, conf: &Value, id: &str, container: &Host, ifname: &str) {
        let call = Call { verb: "DEL", conf, id, netns: Some(netns(container)), args: "" };
        let mut command = self.runtime.command(&bin("twill-cni"), &call);
        command.env("CNI_IFNAME", ifname);
        assert_eq!(self.runtime.finish(command, conf), Ok(Value::Null));
    }

    fn gc(&self, conf: &Value, valid: &[&str]) -> Result<Value, Value> {
        let valid: Vec<Value> = valid.iter().map(|id| json!({"containerID": id, "ifname": "eth0"})).collect();
        let mut conf = conf.clone();
        merge(&mut conf, json!({"cniVersion": "1.1.0", "cni.dev/valid-attachments": valid}));
        self.runtime.try_verb("GC", &conf, "", None)
    }

    /// All tables, of whichever kind.
    fn rules(&self) -> String {
        let kinds = ["nft list ruleset", "iptables-legacy-save", "ip6tables-legacy-save"];
        let shown = kinds.into_iter().filter(|line| self.kind == "legacy" || !line.contains("legacy"));
        shown.map(|line| self.runtime.host.run(line)).collect()
    }

    /// The rules of the reference bridge's for a container, of both families.
    fn of(&self, network: &str, id: &str) -> Vec<String> {
        let named = format!(r#"name: \"{network}\" id: \"{id}\""#);
        let shown = ["", "6"].map(|v6| self.runtime.host.run(&format!("ip{v6}tables-{} -w -t nat -S", self.kind)));
        let lines = shown.iter().flat_map(|shown| shown.lines());
        lines.filter(|line| line.contains(&named)).map(str::to_owned).collect()
    }

    /// The chain of a container's.
    fn chain(&self, network: &str, id: &str) -> String {
        let rules = self.of(network, id);
        assert_eq!(rules.len(), 6, "{rules:#?}");
        rules.iter().find_map(|rule| rule.split_once("-A POSTROUTING ")?.1.rsplit_once(' ')).unwrap().1.to_owned()
    }
}

/// With the container goes what the reference bridge has written with iptables for `ipMasq`, and nothing of anybody else.
#[test]
fn what_the_reference_bridge_masquerades_by_goes_with_the_container() {
    Iptables::each(|host| {
        let (conf, other) = (host.conf("net", 78), host.conf("other", 79));
        let runtime = &host.runtime;
        let outside = runtime.container("outside");
        runtime.wire_to(&outside);
        let [a, b] = ["a", "ab"].map(|id| {
            let container = runtime.container(id);
            host.add(&conf, id, &container, "eth0");
            container
        });
        for line in ["route add default via 10.78.0.1", "-6 route add default via fd78::1"] {
            b.ip(line);
        }
        // Nobody outside knows the way back.
        let leaves = || {
            for ip in ["10.168.0.3", "fd00:168::3"] {
                eventually("ab has the host's address outside", || {
                    let out = b.try_run(&format!("ping -c 1 -W 1 {ip}"));
                    if out.status.success() { Ok(()) } else { Err(out) }
                });
            }
        };
        leaves();
        // The same container in another network, and twice in one.
        host.add(&other, "a", &a, "eth1");
        host.add(&conf, "a", &a, "eth2");
        let rules = host.of("net", "a");
        runtime.del(&conf, "a", Some(&a));
        assert_eq!(host.of("net", "a"), rules, "eth2 masquerades by the same chain");
        assert_eq!(runtime.held(), ["10.78.0.3", "10.78.0.4", "fd78::3", "fd78::4"]);
        let chain = rules.iter().find_map(|rule| rule.split_once("-A POSTROUTING ")?.1.rsplit_once(' ')).unwrap().1;
        assert!(host.rules().contains(chain));
        for _ in 0..2 {
            host.del(&conf, "a", &a, "eth2");
            assert!(host.of("net", "a").is_empty() && !host.rules().contains(chain), "{}", host.rules());
            assert_eq!((host.of("net", "ab").len(), host.of("other", "a").len()), (6, 6), "{}", host.rules());
        }
        leaves();
        // GC: of this network, and nobody who is attached.
        let chain = host.chain("other", "a");
        assert_eq!(host.gc(&conf, &["ab"]), Ok(Value::Null));
        assert_eq!((host.of("net", "ab").len(), host.of("other", "a").len()), (6, 6), "{}", host.rules());
        leaves();
        assert_eq!(host.gc(&other, &[]), Ok(Value::Null));
        assert!(host.of("other", "a").is_empty() && !host.rules().contains(&chain), "{}", host.rules());
        leaves();
        // The last one: nothing is left, by whatever type the network has by now.
        let mut ours = conf.clone();
        merge(&mut ours, json!({"type": "twill-cni", "subnetFile": runtime.file("subnet.env")}));
        runtime.del(&ours, "ab", Some(&b));
        assert!(!host.rules().contains("CNI-"), "{}", host.rules());
        assert_eq!(runtime.held(), Vec::<String>::new());
    });
}

#[test]
fn a_chain_of_the_reference_bridges_that_others_lead_to_stays_without_the_containers_rule() {
    Iptables::each(|host| {
        let conf = host.conf("net", 78);
        let a = host.runtime.container("a");
        host.add(&conf, "a", &a, "eth0");
        let chain = host.chain("net", "a");
        // By a jump, and by `goto`.
        let [v4, v6] = ["", "6"].map(|v6| format!("ip{v6}tables-{} -w -t nat", host.kind));
        for line in [
            format!("{v4} -A POSTROUTING -s 192.0.2.1 -j {chain}"),
            format!("{v6} -A POSTROUTING -s 2001:db8::1 -g {chain}"),
        ] {
            host.runtime.host.run(&line);
        }
        let rules = || [&v4, &v6].map(|program| host.runtime.host.run(&format!("{program} -S")));
        let of_a = |rule: &str| rule.contains("-A POSTROUTING") && rule.contains("--comment");
        let want = rules().map(|rules| rules.split_inclusive('\n').filter(|rule| !of_a(rule)).collect::<String>());
        host.runtime.del(&conf, "a", Some(&a));
        assert_eq!(rules(), want);
        assert_eq!(want.concat().matches(&format!("-A {chain} ")).count(), 4, "{want:#?}");
    });
}

/// A table that this program alone may change, with a rule whose comment has quotes, which `nft` takes as JSON only.
const OWNER: &str = r#"
import ctypes, json, sys
nft = ctypes.CDLL("libnftables.so.1")
nft.nft_ctx_new.restype = ctypes.c_void_p
context, chain = ctypes.c_void_p(nft.nft_ctx_new(0)), sys.argv[1]
def run(text): return nft.nft_run_cmd_from_buffer(context, text.encode())
made = run("add table ip nat { flags owner; }\nadd chain ip nat " + chain +
    "\nadd chain ip nat POSTROUTING { type nat hook postrouting priority 100; }\n")
nft.nft_ctx_output_set_flags(context, 1 << 4)
ruled = run(json.dumps({"nftables": [{"add": {"rule": {"family": "ip", "table": "nat", "chain": "POSTROUTING",
    "comment": 'name: "net" id: "a"', "expr": [{"jump": {"target": chain}}]}}}]}))
print(made, ruled, flush=True)
sys.stdin.read()
"#;

/// The table is another program's alone: its chain cannot go, and so the address stays held until it can.
#[test]
fn a_chain_that_does_not_go_is_named_and_the_address_stays_held() {
    let Some((runtime, _dir)) = runtime().filter(|_| installed("nft") && installed("python3")) else { return };
    let chain = "CNI-0123456789abcdef01234567";
    let mut owner = runtime.host.command("python3");
    let mut owner = owner.args(["-c", OWNER, chain]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(owner.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "0 0\n");
    let net = runtime.file("networks/net");
    std::fs::create_dir_all(&net).unwrap();
    std::fs::write(net.join("10.78.0.2"), "a\r\neth0").unwrap();
    let conf =
        runtime.conf("1.1.0", json!({"type": "bridge", "ipam": {"type": "host-local", "subnet": "10.78.0.0/24"}}));
    let mut gc = conf.clone();
    gc["cni.dev/valid-attachments"] = json!([]);
    for (verb, conf, id) in [("DEL", &conf, "a"), ("GC", &gc, "")] {
        let refused = runtime.try_verb(verb, conf, id, None).unwrap_err();
        let msg = refused["msg"].as_str().unwrap();
        assert!(msg.contains(chain) && msg.contains("Operation not permitted"), "{refused:#}");
        assert_eq!(runtime.held(), ["10.78.0.2"]);
    }
    drop(owner.stdin.take());
    owner.wait().unwrap();
    runtime.del(&conf, "a", None);
    assert_eq!(runtime.held(), Vec::<String>::new());
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
