//! Which address a container gets: one folder shared by processes, and other plugins' files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use serde_json::{Value, json};
use twill_e2e::cni::{Call, Runtime, netns, start};
use twill_e2e::net::{Bed, Host};
use twill_e2e::node::Node;
use twill_e2e::{bin, eventually, installed};

fn runtime() -> Option<(Runtime, tempfile::TempDir)> {
    let dir = tempfile::tempdir().unwrap();
    Some((Runtime::new(Bed::new()?, dir.path()), dir))
}

/// A configuration that gives addresses alone: no device is made, as for somebody else's plugin.
fn alone(runtime: &Runtime, subnet: &str) -> Value {
    json!({"cniVersion": "1.0.0", "name": "net", "type": "macvlan", "ipam": {"type": "host-local", "subnet": subnet,
        "dataDir": runtime.file("networks"), "routes": [{"dst": "0.0.0.0/0"}]}, "stateDir": runtime.file("state")})
}

fn address(said: &Value) -> String {
    said["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned()
}

#[test]
fn no_address_is_used_again_before_the_others_were() {
    let Some((runtime, _dir)) = runtime() else { return };
    let conf = alone(&runtime, "10.9.0.0/28");
    let add = |id: &str| address(&runtime.try_verb("ADD", &conf, id, None).unwrap());
    // One container is there all the time, others come and go.
    assert_eq!(add("stays"), "10.9.0.2");
    let walk: Vec<String> = (0..24)
        .map(|n| {
            let ip = add(&format!("c{n}"));
            runtime.del(&conf, &format!("c{n}"), None);
            ip
        })
        .collect();
    assert_eq!(walk[..12].iter().collect::<BTreeSet<_>>().len(), 12, "{walk:?}");
    assert_eq!(walk[..12], walk[12..], "in a circle, past the one that is held");
    assert_eq!(runtime.held(), ["10.9.0.2"]);
}

/// Whoever asks for an address by its name moves nobody's turn, and the address comes back when the others were used.
#[test]
fn an_address_asked_for_by_name_is_not_used_again_before_the_others_were() {
    let Some((runtime, _dir)) = runtime() else { return };
    let conf = alone(&runtime, "10.9.0.0/28");
    let give = |args: &str| {
        let said = runtime.call(&Call { verb: "ADD", conf: &conf, id: "c", netns: None, args }).unwrap();
        runtime.del(&conf, "c", None);
        address(&said)
    };
    let walk = |count: usize| -> Vec<String> { (0..count).map(|_| give("")).collect() };
    let ips = |hosts: &[u8]| -> Vec<String> { hosts.iter().map(|host| format!("10.9.0.{host}")).collect() };
    assert_eq!(walk(3), ips(&[2, 3, 4]));
    // The next one, and one that was freed just now.
    assert_eq!((give("IP=10.9.0.5"), give("IP=10.9.0.3")), ("10.9.0.5".into(), "10.9.0.3".into()));
    assert_eq!(walk(11), ips(&[6, 7, 8, 9, 10, 11, 12, 13, 14, 2, 4]), "2 was used before 3 and 5 were");
    assert_eq!(walk(13), ips(&[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 2, 3, 4]), "their turn has come");
    // When nothing else is left it is given.
    let held: Vec<String> = (2..14).map(|host| format!("10.9.0.{host}")).filter(|ip| ip != "10.9.0.9").collect();
    give("IP=10.9.0.9");
    held.iter().for_each(|ip| std::fs::write(runtime.file("networks/net").join(ip), "x\r\neth0").unwrap());
    assert_eq!(walk(2), ips(&[14, 9]));
}

/// Addresses alone, one of each family: each file is looked at.
#[test]
fn check_of_addresses_alone_names_each_that_is_missing() {
    let Some((runtime, _dir)) = runtime() else { return };
    let mut conf = json!({"cniVersion": "1.0.0", "name": "net", "type": "macvlan", "ipam": {"type": "host-local",
        "ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00:9::/64"}]], "dataDir": runtime.file("networks")},
        "stateDir": runtime.file("state")});
    conf["prevResult"] = runtime.try_verb("ADD", &conf, "a", None).unwrap();
    let check = |conf: &Value| runtime.try_verb("CHECK", conf, "a", None);
    assert_eq!(check(&conf), Ok(Value::Null));
    let named = |conf: &Value, named: &str| {
        let refused = check(conf).unwrap_err();
        assert!(refused["code"] == 103 && refused["msg"].as_str().unwrap().contains(named), "{named}: {refused:#}");
    };
    for ip in ["10.9.0.2", "fd00:9::2"] {
        let file = runtime.file("networks/net").join(ip);
        let holder = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        named(&conf, &format!("the address file of {ip} is missing"));
        std::fs::write(&file, "other\r\neth0").unwrap();
        named(&conf, &format!("the address {ip} is held by other:eth0"));
        std::fs::write(&file, holder).unwrap();
    }
    // Others by now.
    let mut edited = conf.clone();
    edited["ipam"]["ranges"] = json!([[{"subnet": "10.8.0.0/24"}]]);
    edited["ipam"]["dataDir"] = json!(runtime.file("elsewhere"));
    assert_eq!(check(&edited), Ok(Value::Null));
    conf["prevResult"]["ips"].as_array_mut().unwrap().pop();
    named(&conf, "prevResult lacks the address fd00:9::2/64");
    edited["prevResult"] = conf["prevResult"].clone();
    named(&edited, "prevResult lacks the address fd00:9::2/64");
    // Where nothing is written down the ranges say it.
    std::fs::remove_file(runtime.file("state/attachments/a:eth0.json")).unwrap();
    named(&conf, "prevResult lacks an address of fd00:9::/64");
}

#[test]
fn concurrent_processes_never_share_an_address() {
    let Some((runtime, _dir)) = runtime() else { return };
    let conf = alone(&runtime, "10.9.0.0/26");
    let started: Vec<Child> = (0..30)
        .map(|n| {
            let id = format!("c{n}");
            let call = Call { verb: "ADD", conf: &conf, id: &id, netns: None, args: "" };
            start(runtime.command(&bin("twill-cni"), &call), conf.to_string().as_bytes())
        })
        .collect();
    let given = started.into_iter().map(|child| {
        let out = child.wait_with_output().unwrap();
        address(&serde_json::from_slice(&out.stdout).unwrap())
    });
    assert_eq!(given.collect::<BTreeSet<_>>().len(), 30);
    assert_eq!(runtime.held().len(), 30);
}

/// Starts plugins that all wait for the folder's lock, lets them go, and gives what each says and whether it is an error.
fn all_at_once(runtime: &Runtime, calls: &[Call<'_>]) -> Vec<(bool, String)> {
    let lock = std::fs::File::open(runtime.file("networks/net/lock")).unwrap();
    lock.lock().unwrap();
    let started: Vec<Child> = calls
        .iter()
        .map(|call| {
            let child = start(runtime.command(&bin("twill-cni"), call), call.conf.to_string().as_bytes());
            eventually("it waits", || waits(&child));
            child
        })
        .collect();
    lock.unlock().unwrap();
    let said = started.into_iter().map(|child| child.wait_with_output().unwrap());
    said.map(|out| (out.status.success(), String::from_utf8(out.stdout).unwrap())).collect()
}

/// For a lock.
fn waits(child: &Child) -> Result<(), String> {
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    let of = format!(" {} ", child.id());
    if locks.lines().any(|line| line.contains("->") && line.contains(&of)) { Ok(()) } else { Err(locks) }
}

#[test]
fn of_two_adds_of_one_device_at_once_one_is_refused() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, first) = (runtime.container("a"), runtime.container("first"));
    for conf in [runtime.conf("1.1.0", json!({})), alone(&runtime, "10.9.0.0/26")] {
        runtime.add(&conf, "first", &first);
        let call = Call { verb: "ADD", conf: &conf, id: "a", netns: Some(netns(&a)), args: "" };
        let said = all_at_once(&runtime, &[call.clone(), call]);
        assert_eq!(said.iter().filter(|(is_done, _)| *is_done).count(), 1, "{said:?}");
        assert!(said.iter().any(|(_, said)| said.contains("\"code\":101")), "{said:?}");
        held_by(&runtime, &a, "a");
        ["a", "first"].iter().zip([&a, &first]).for_each(|(id, container)| runtime.del(&conf, id, Some(container)));
        assert_eq!((runtime.held(), runtime.attachments()), (vec![], vec![]));
    }
}

#[test]
fn a_del_beside_the_add_of_its_device_frees_no_address_of_a_device_that_stands() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, first) = (runtime.container("a"), runtime.container("first"));
    let conf = runtime.conf("1.1.0", json!({}));
    runtime.add(&conf, "first", &first);
    let call = |verb| Call { verb, conf: &conf, id: "a", netns: Some(netns(&a)), args: "" };
    // Whichever has the lock first.
    for verbs in [["ADD", "DEL"], ["DEL", "ADD"]] {
        let said = all_at_once(&runtime, &verbs.map(call));
        assert!(said.iter().all(|(is_done, _)| *is_done), "{said:?}");
        held_by(&runtime, &a, "a");
        runtime.del(&conf, "a", Some(&a));
        assert_eq!((runtime.held().len(), runtime.attachments().len()), (2, 1));
    }
}

#[test]
fn a_gc_beside_an_add_frees_no_address_of_a_device_that_stands() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, first) = (runtime.container("a"), runtime.container("first"));
    let conf = runtime.conf("1.1.0", json!({}));
    let mut valid = conf.clone();
    valid["cni.dev/valid-attachments"] = json!([{"containerID": "first", "ifname": "eth0"}]);
    runtime.add(&conf, "first", &first);
    let add = Call { verb: "ADD", conf: &conf, id: "a", netns: Some(netns(&a)), args: "" };
    let gc = Call { verb: "GC", conf: &valid, ..add.clone() };
    let said = all_at_once(&runtime, &[add, gc]);
    assert!(said.iter().all(|(is_done, _)| *is_done), "{said:?}");
    held_by(&runtime, &a, "a");
    held_by(&runtime, &first, "first");
}

#[test]
fn nothing_is_answered_before_it_is_on_the_disk() {
    let Some((runtime, _dir)) = runtime() else { return };
    if !installed("strace") {
        return;
    }
    let a = runtime.container("a");
    let conf = runtime.conf("1.0.0", json!({}));
    let trace = runtime.file("trace");
    let traced = |calls: &str| {
        let mut command = strace(&["-f", "-y", "-s", "2000", "-o", trace.to_str().unwrap(), "-e", calls]);
        command.arg(bin("twill-cni"));
        command
    };
    let command = traced("trace=fsync,write,linkat,link,rename,renameat");
    let call = Call { verb: "ADD", conf: &conf, id: "a", netns: Some(netns(&a)), args: "" };
    runtime.finish(within(&runtime, command, &call), &conf).unwrap();
    let calls = std::fs::read_to_string(&trace).unwrap();
    let lines: Vec<&str> = calls.lines().collect();
    let answered = lines.iter().position(|l| l.contains("write(1<") && l.contains("cniVersion"));
    let before = &lines[..answered.unwrap_or_else(|| panic!("{calls}"))];
    let files = [
        ("networks/net/10.1.15.2>", 1),
        ("networks/net/fd00:0:0:15::2>", 1),
        // Of which address was the last one no connection is left when the machine comes back.
        ("networks/net/last_reserved_ip.", 0),
        ("networks/net>", 1),
        ("attachments/a:eth0.json", 1),
        ("attachments>", 1),
    ];
    for (file, times) in files {
        let synced = before.iter().filter(|l| l.contains("fsync(") && l.contains(file)).count();
        assert_eq!(synced, times, "{file}: {calls}");
    }
}

/// DEL and GC say nothing: their end is the answer, and the folders of what they removed are on the disk by then.
#[test]
fn nothing_is_freed_before_it_is_on_the_disk() {
    let Some((runtime, _dir)) = runtime() else { return };
    if !installed("strace") {
        return;
    }
    let a = runtime.container("a");
    let conf = runtime.conf("1.1.0", json!({}));
    let mut none_valid = conf.clone();
    none_valid["cni.dev/valid-attachments"] = json!([]);
    for (verb, conf, id) in [("DEL", &conf, "a"), ("GC", &none_valid, "a"), ("GC", &none_valid, "ghost")] {
        let mut removed = vec![("networks/net/", "networks/net>")];
        if id == "a" {
            runtime.add(conf, "a", &a);
            removed.push(("a:eth0.json", "attachments>"));
        } else {
            ["10.1.15.9", "10.1.15.10"].iter().for_each(|ip| {
                std::fs::write(runtime.file("networks/net").join(ip), "ghost\r\neth0").unwrap();
            });
        }
        let trace = runtime.file("trace");
        let calls = "trace=fsync,rename,exit_group";
        let mut command = strace(&["-f", "-y", "-s", "2000", "-o", trace.to_str().unwrap(), "-e", calls]);
        command.arg(bin("twill-cni"));
        let call = Call { verb, conf, id, netns: Some(netns(&a)), args: "" };
        runtime.finish(within(&runtime, command, &call), conf).unwrap();
        assert_eq!((runtime.held(), runtime.attachments()), (vec![], vec![]));
        let calls = std::fs::read_to_string(&trace).unwrap();
        let last = |what: &str, holds: &str| {
            let lines: Vec<&str> = calls.lines().filter(|l| !l.contains("ENOENT")).collect();
            let found = lines.iter().rposition(|l| l.contains(what) && l.contains(holds));
            found.unwrap_or_else(|| panic!("{verb} {id}: {what} {holds}: {calls}"))
        };
        for (file, folder) in removed {
            let synced = last("fsync(", folder);
            assert!(last("rename(", file) < synced && synced < last("exit_group", "(0)"), "{verb} {id}: {calls}");
        }
    }
}

fn strace(words: &[&str]) -> Command {
    let mut command = Command::new("strace");
    command.arg("-qq").args(words);
    command
}

/// A command as the runtime runs it on its host.
fn within(runtime: &Runtime, command: Command, call: &Call<'_>) -> Command {
    let mut inside = runtime.command(Path::new(command.get_program()), call);
    inside.args(command.get_args());
    inside
}

/// Every address on the device is held by its container: then nobody else gets it.
fn held_by(runtime: &Runtime, container: &Host, id: &str) {
    let shown = container.json("addr show scope global");
    let ips =
        shown.as_array().unwrap().iter().flat_map(|link| link["addr_info"].as_array().cloned().unwrap_or_default());
    for ip in ips.filter_map(|info| info["local"].as_str().map(str::to_owned)) {
        let holder = std::fs::read_to_string(runtime.file("networks/net").join(&ip)).unwrap_or_default();
        assert_eq!(holder, format!("{id}\r\neth0"), "{ip} is on the device of {id}");
    }
}

/// The host port that `conf` publishes is in the kernel's table, whatever became of the one beside.
fn leads_to(runtime: &Runtime, conf: &Value, port: u16) {
    let asked = !conf["runtimeConfig"].is_null();
    let rule = format!("dport {port} ");
    assert!(!asked || runtime.host.run("nft list table inet twill-cni").contains(&rule), "{rule}");
}

fn published(port: u16) -> Value {
    json!({"runtimeConfig": {"portMappings": [{"hostPort": port, "containerPort": 80, "protocol": "tcp"}]}})
}

#[test]
fn flannels_and_the_reference_configuration_are_understood() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    // As flannel's manifest installs it, but for the paths.
    let flannel = json!({"cniVersion": "0.3.1", "name": "net", "type": "flannel", "subnetFile": runtime.file("subnet.env"),
        "dataDir": runtime.file("flannel"), "stateDir": runtime.file("state"), "ipam": {"dataDir": runtime.file("networks")},
        "delegate": {"hairpinMode": true, "isDefaultGateway": true}});
    let said = runtime.add(&flannel, "a", &a);
    assert_eq!((&said["ips"][0]["version"], &said["ips"][0]["address"]), (&json!("4"), &json!("10.1.15.2/24")));
    assert_eq!(a.json("route show 10.1.0.0/16")[0]["gateway"], "10.1.15.1");
    let eth0 = &a.json("link show eth0")[0];
    assert_eq!(eth0["mtu"], 1450);
    // The reference bridge's, with the network of its own.
    let bridge = json!({"cniVersion": "0.4.0", "name": "net", "type": "bridge", "bridge": "docker0", "isGateway": true,
        "stateDir": runtime.file("state"), "ipam": {"type": "host-local", "dataDir": runtime.file("networks"),
        "ranges": [[{"subnet": "10.8.0.0/24", "rangeStart": "10.8.0.9"}], [{"subnet": "fd00:8::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}]}});
    let said = runtime.add(&bridge, "b", &b);
    assert_eq!((address(&said), said["routes"].clone()), ("10.8.0.9".into(), json!([{"dst": "0.0.0.0/0"}])));
    assert_eq!(b.json("route show default")[0]["gateway"], "10.8.0.1");
    assert!(b.try_run("ping -c 1 -W 5 10.8.0.1").status.success());
    runtime.del(&flannel, "a", Some(&a));
    runtime.del(&bridge, "b", Some(&b));
    assert_eq!((runtime.held(), runtime.attachments()), (vec![], vec![]));
    for (delegate, code) in [(json!({"name": "x"}), 7), (json!({"ipam": {}}), 7), (json!({"type": "macvlan"}), 2)] {
        let mut conf = flannel.clone();
        conf["delegate"] = delegate;
        assert_eq!(runtime.try_verb("ADD", &conf, "a", Some(&a)).unwrap_err()["code"], code);
    }
}

/// The reference plugins, where Debian puts them.
fn reference() -> Option<PathBuf> {
    let dir = PathBuf::from("/usr/lib/cni");
    if dir.join("bridge").is_file() {
        return Some(dir);
    }
    println!("SKIP: containernetworking-plugins is not installed");
    None
}

#[test]
fn a_host_local_folder_goes_on_as_it_is_in_both_directions() {
    let (Some((runtime, _dir)), Some(reference)) = (runtime(), reference()) else { return };
    let (a, b, c) = (runtime.container("a"), runtime.container("b"), runtime.container("c"));
    let conf = json!({"cniVersion": "1.0.0", "name": "net", "type": "bridge", "bridge": "cni0", "isDefaultGateway": true,
        "stateDir": runtime.file("state"), "ipam": {"type": "host-local", "dataDir": runtime.file("networks"),
        "ranges": [[{"subnet": "10.1.15.0/24"}]]}});
    let theirs = |verb: &str, id: &str, container: &Host| {
        let call = Call { verb, conf: &conf, id, netns: Some(netns(container)), args: "" };
        let mut command = runtime.command(&reference.join("bridge"), &call);
        command.env("CNI_PATH", &reference);
        runtime.finish(command, &conf)
    };
    assert_eq!(address(&theirs("ADD", "a", &a).unwrap()), "10.1.15.2");
    assert_eq!(address(&runtime.add(&conf, "b", &b)), "10.1.15.3");
    assert_eq!(address(&theirs("ADD", "c", &c).unwrap()), "10.1.15.4");
    let (code, _, err) = twill(&runtime, "ipam free 10.1.15.2 10.1.15.4");
    assert!(code == Some(1) && err.contains("a:eth0 may run") && err.contains("--force"), "{err}");
    assert!(b.try_run("ping -c 1 -W 5 10.1.15.2").status.success());
    // Each takes the other's away.
    runtime.del(&conf, "a", Some(&a));
    theirs("DEL", "b", &b).unwrap();
    assert_eq!(runtime.held(), ["10.1.15.4"]);
    runtime.del(&conf, "b", Some(&b));
    runtime.del(&conf, "c", Some(&c));
    assert_eq!(
        (runtime.held(), runtime.attachments(), runtime.links()),
        (vec![], vec![], vec!["lo".into(), "cni0".into()])
    );
}

#[test]
fn a_reference_plugin_gets_addresses_from_ours_under_the_name_of_host_local() {
    let (Some((runtime, _dir)), Some(reference)) = (runtime(), reference()) else { return };
    let a = runtime.container("a");
    // Ours under the name host-local, asked by the reference's ptp.
    let path = runtime.file("plugins");
    std::fs::create_dir(&path).unwrap();
    std::fs::copy(bin("twill-cni"), path.join("host-local")).unwrap();
    let conf = json!({"cniVersion": "1.0.0", "name": "net", "type": "ptp", "ipam": {"type": "host-local",
        "dataDir": runtime.file("networks"), "subnet": "10.7.0.0/24"}, "stateDir": runtime.file("state")});
    let call = |verb| Call { verb, conf: &conf, id: "a", netns: Some(netns(&a)), args: "" };
    let mut command = runtime.command(&reference.join("ptp"), &call("ADD"));
    command.env("CNI_PATH", &path);
    assert_eq!(address(&runtime.finish(command, &conf).unwrap()), "10.7.0.2");
    let mut command = runtime.command(&reference.join("ptp"), &call("DEL"));
    command.env("CNI_PATH", &path);
    runtime.finish(command, &conf).unwrap();
    assert_eq!(runtime.held(), Vec::<String>::new());
}

#[test]
fn a_leak_is_freed_by_the_agent_and_after_a_reboot() {
    let Some(bed) = Bed::new() else { return };
    if !installed("etcdctl") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(bed, dir.path());
    let conf = json!({"cniVersion": "1.0.0", "name": "net", "type": "twill-cni", "stateDir": node.file("state"),
        "ipam": {"type": "host-local", "dataDir": node.file("networks"), "subnet": "10.9.0.0/29"}});
    let held = || {
        let names = std::fs::read_dir(node.file("networks/net"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut held: Vec<String> = names.filter(|n| n.parse::<std::net::IpAddr>().is_ok()).collect();
        held.sort();
        held
    };
    let add = |id: &str, container: &Host| {
        let mut command = node.host.command(bin("twill-cni"));
        command
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", id)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", netns(container));
        let out = start(command, conf.to_string().as_bytes()).wait_with_output().unwrap();
        (out.status.success(), String::from_utf8(out.stdout).unwrap())
    };
    // One that stays, one that ends without a DEL: its device goes with its namespace.
    let (stays, ends) = (node.container("stays"), node.container("ends"));
    assert!(add("stays", &stays).0 && add("ends", &ends).0);
    assert_eq!(held(), ["10.9.0.2", "10.9.0.3"]);
    drop(ends);
    eventually("its device is gone", || {
        if node.host.json("link").as_array().unwrap().len() == 4 { Ok(()) } else { Err(()) }
    });
    let leaked = node.twill_json(&format!("ipam list --data-dir {}", node.file("networks").display()));
    let state = |n: usize| leaked["addresses"][n]["state"].clone();
    assert_eq!((state(0), state(1)), (json!("attached"), json!("leaked")), "{leaked:#}");
    let agent = node.agent("");
    eventually("the agent frees it", || if held() == ["10.9.0.2"] { Ok(()) } else { Err(held()) });
    drop(agent);
    // The machine starts anew: what was attached before is nobody's when an address is needed.
    let file = node.file("state/attachments/stays:eth0.json");
    let text = std::fs::read_to_string(&file).unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    std::fs::write(&file, text.replace(boot.trim(), "another")).unwrap();
    let others: Vec<Host> = (0..6).map(|n| node.container(&format!("c{n}"))).collect();
    for (n, other) in others.iter().enumerate() {
        let (added, said) = add(&format!("c{n}"), other);
        assert_eq!(added, n < 5, "{said}");
    }
    assert_eq!(held(), ["10.9.0.2", "10.9.0.3", "10.9.0.4", "10.9.0.5", "10.9.0.6"]);
}

/// Addresses alone, for somebody else's plugin: its device is unknown here, its namespace and this boot are not.
#[test]
fn a_leak_of_addresses_alone_is_freed_where_its_end_is_known() {
    let Some(bed) = Bed::new() else { return };
    if !installed("etcdctl") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(bed, dir.path());
    let names = |part: &str| {
        let names = std::fs::read_dir(node.file(part)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> =
            names.filter(|n| n.ends_with(".json") || n.parse::<std::net::IpAddr>().is_ok()).collect();
        names.sort();
        names
    };
    let held = || names("networks/net");
    let conf = json!({"cniVersion": "1.1.0", "name": "net", "type": "macvlan", "stateDir": node.file("state"),
        "cni.dev/valid-attachments": [], "ipam": {"type": "host-local", "dataDir": node.file("networks"), "subnet": "10.9.0.0/29"}});
    let finish = |mut command: Command, verb: &str, id: &str| {
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", id).env("CNI_IFNAME", "eth0");
        let out = start(command, conf.to_string().as_bytes()).wait_with_output().unwrap();
        (out.status.success(), String::from_utf8(out.stdout).unwrap())
    };
    let call = |verb: &str, id: &str, netns: &str| {
        let mut command = node.host.command(bin("twill-cni"));
        command.env("CNI_NETNS", netns);
        finish(command, verb, id)
    };
    let (stays, ends) = (node.container("stays"), node.container("ends"));
    assert!(call("ADD", "stays", &netns(&stays)).0 && call("ADD", "ends", &netns(&ends)).0);
    // A runtime in a mount namespace of its own: nobody here sees the namespace's path, whatever becomes of it.
    let folder = node.file("hidden");
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("ns");
    let mut hidden = node.host.command("unshare");
    let line = "mount -t tmpfs none \"$0\" && touch \"$1\" && mount --bind /proc/self/ns/net \"$1\" && exec \"$2\"";
    hidden.args(["-m", "sh", "-c", line]).args([&folder, &path, &bin("twill-cni")]).env("CNI_NETNS", &path);
    assert!(finish(hidden, "ADD", "hidden").0);
    let (again, said) = call("ADD", "stays", &netns(&stays));
    assert!(!again && said.contains("has addresses for its eth0 already"), "{said}");
    assert_eq!(held(), ["10.9.0.2", "10.9.0.3", "10.9.0.4"]);
    drop(ends);
    let _agent = node.agent("");
    eventually("the agent frees it", || if held() == ["10.9.0.2", "10.9.0.4"] { Ok(()) } else { Err(held()) });
    assert_eq!(names("state/attachments"), ["hidden:eth0.json", "stays:eth0.json"]);
    // The machine starts anew: both are nobody's as soon as an address is needed.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    for id in ["hidden", "stays"] {
        let file = node.file(&format!("state/attachments/{id}:eth0.json"));
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace(boot.trim(), "another")).unwrap();
    }
    for n in 0..6 {
        let (added, said) = call("ADD", &format!("c{n}"), "");
        assert_eq!(added, n < 5, "{said}");
    }
    assert_eq!(held().len(), 5);
    // DEL and GC leave no file.
    assert!(call("DEL", "c0", "").0);
    assert_eq!((held().len(), names("state/attachments").len()), (4, 4));
    assert!(call("GC", "", "").0);
    assert_eq!((held(), names("state/attachments")), (vec![], vec![]));
}

/// Runs `twill` on the runtime's host and files: exit code, stdout, stderr.
fn twill(runtime: &Runtime, words: &str) -> (Option<i32>, String, String) {
    let mut command = runtime.host.command(bin("twill"));
    command.args(words.split_whitespace()).env("TWILL_STATE_DIR", runtime.file("state"));
    let out = command.env("TWILL_IPAM_DIR", runtime.file("networks")).output().unwrap();
    (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
}

#[test]
fn ipam_lists_and_frees() {
    let Some((runtime, _dir)) = runtime() else { return };
    if !installed("nft") {
        return;
    }
    let a = runtime.container("a");
    let conf = runtime.conf("1.0.0", published(8080));
    runtime.add(&conf, "a", &a);
    std::fs::write(runtime.file("networks/net/10.1.15.9"), "ghost\r\neth0").unwrap();
    let twill = |words: &str| twill(&runtime, words);
    let (_, text, _) = twill("ipam list -o json");
    let listed: Value = serde_json::from_str(&text).unwrap();
    let row = |address: &str, container: &str, state: &str| json!({"network": "net", "address": address, "container": container, "state": state});
    let rows = [
        row("10.1.15.2", "a:eth0", "attached"),
        row("10.1.15.9", "ghost:eth0", "unknown"),
        row("fd00:0:0:15::2", "a:eth0", "attached"),
    ];
    assert_eq!(listed, json!({"schema": 1, "addresses": rows}));
    let (code, _, err) = twill("ipam free 10.1.15.2");
    assert!(code == Some(1) && err.contains("a:eth0 is attached") && err.contains("--force"), "{err}");
    let (code, _, err) = twill("ipam free 10.1.15.77");
    assert!(code == Some(1) && err.contains("nobody holds 10.1.15.77"), "{err}");
    let (code, _, err) = twill("ipam free 10.1.15.9");
    assert!(code == Some(1) && err.contains("ghost:eth0 may run") && err.contains("--force"), "{err}");
    assert_eq!(twill("ipam free --force 10.1.15.9").1, "freed 10.1.15.9\n");
    assert_eq!(runtime.held(), ["10.1.15.2", "fd00:0:0:15::2"]);
    // Its namespace is there.
    a.ip("link del eth0");
    assert_eq!(twill("ipam free --leaked").1, "nothing to free\n");
    leads_to(&runtime, &conf, 8080);
    // With the address goes all that the attachment has: no host port leads to who gets the address next.
    let freed = "freed 10.1.15.2\nfreed fd00:0:0:15::2\n";
    drop(a);
    assert_eq!(twill("ipam free --leaked").1, freed);
    let nothing = || (runtime.held(), runtime.attachments(), runtime.host.run("nft list tables"));
    assert_eq!(nothing(), (vec![], vec![], String::new()));
    let b = runtime.container("b");
    runtime.add(&conf, "b", &b);
    assert_eq!(twill("ipam free --force 10.1.15.3").1, freed.replace('2', "3"));
    assert_eq!(nothing(), (vec![], vec![], String::new()));
    runtime.del(&conf, "b", Some(&b));
    assert_eq!(runtime.links(), ["lo", "cni0"]);
}

/// An ADD that stands still between its address and its device, and its process. Its namespace has a path that nobody else sees.
fn stopped_add(runtime: &Runtime, conf: &Value, container: &Host) -> (Child, String) {
    let (hidden, trace) = (runtime.file("hidden"), runtime.file("trace"));
    [&hidden, &trace].iter().for_each(|file| std::fs::write(file, "").unwrap());
    let call = Call { verb: "ADD", conf, id: "a", netns: Some(hidden.display().to_string()), args: "" };
    let mut command = runtime.command(Path::new("unshare"), &call);
    // Its own thread, which strace follows alone, enters the container to make devices.
    let line = "mount --bind \"$0\" \"$CNI_NETNS\" && exec strace -o \"$1\" -e trace=setns -e inject=setns:signal=STOP:when=3 \"$2\"";
    command.args(["-m", "sh", "-c", line, &netns(container)]).arg(&trace).arg(bin("twill-cni"));
    let child = start(command, conf.to_string().as_bytes());
    eventually("it stands still", || {
        let said = std::fs::read_to_string(&trace).unwrap();
        if said.contains("stopped by SIGSTOP") { Ok(()) } else { Err(said) }
    });
    let of = format!("/proc/{0}/task/{0}/children", child.id());
    let pid = std::fs::read_to_string(of).unwrap().trim().to_owned();
    (child, pid)
}

#[test]
fn an_add_at_work_keeps_its_address_and_one_that_was_killed_leaks_it() {
    let Some((runtime, _dir)) = runtime() else { return };
    if !installed("strace") {
        return;
    }
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    // It has one address for containers.
    let conf = runtime.conf("1.0.0", json!({"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/30"}]]}}));
    let signal = |name: &str, pid: &str| assert!(Command::new("kill").args([name, pid]).status().unwrap().success());
    let (add, pid) = stopped_add(&runtime, &conf, &a);
    let full = runtime.try_verb("ADD", &conf, "b", Some(&b)).unwrap_err();
    assert!(full["msg"].as_str().unwrap().contains("10.9.0.2 by a:eth0"), "{full:#}");
    assert_eq!(twill(&runtime, "ipam free --leaked").1, "nothing to free\n");
    let (code, _, err) = twill(&runtime, "ipam free 10.9.0.2");
    assert!(code == Some(1) && err.contains("a:eth0 is attached"), "{err}");
    // A second ADD of the same waits for it, and is refused.
    let call = Call { verb: "ADD", conf: &conf, id: "a", netns: Some(netns(&a)), args: "" };
    let second = start(runtime.command(&bin("twill-cni"), &call), conf.to_string().as_bytes());
    eventually("it waits", || waits(&second));
    signal("-CONT", &pid);
    let said = second.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&said.stdout).contains("has its eth0 already"), "{said:?}");
    assert!(add.wait_with_output().unwrap().status.success());
    assert_eq!(a.json("addr show eth0")[0]["addr_info"][0]["local"], "10.9.0.2");
    held_by(&runtime, &a, "a");
    runtime.del(&conf, "a", Some(&a));
    let (add, pid) = stopped_add(&runtime, &conf, &a);
    signal("-KILL", &pid);
    assert!(!add.wait_with_output().unwrap().status.success());
    assert_eq!(runtime.held(), ["10.9.0.2"]);
    assert_eq!(address(&runtime.add(&conf, "b", &b)), "10.9.0.2");
    runtime.del(&conf, "b", Some(&b));
    assert_eq!((runtime.held(), runtime.attachments()), (vec![], vec![]));
}
