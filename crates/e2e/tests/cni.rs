//! The CNI plugin, called as runtimes call it, on real devices.
//!
//! ```text
//!   host: cni0 10.1.15.1/24, fd00:0:0:15::1/64
//!          ├─ veth… ── eth0 of container "a"
//!          └─ veth… ── eth0 of container "b"
//! ```

use serde_json::{Value, json};
use twill_e2e::cni::{self, Call, Runtime, netns};
use twill_e2e::net::{Bed, Host};
use twill_e2e::{bin, eventually, installed};

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
        let cni0 = link(&runtime.host, "cni0");
        assert_eq!(said["interfaces"][0]["mac"], cni0["address"]);
        // It had no port, and another MTU.
        assert!(version < "1.1.0" || said["interfaces"][0]["mtu"] == cni0["mtu"], "{said:#}");
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

#[test]
fn check_names_everything_that_was_altered() {
    let Some((runtime, _dir)) = runtime() else { return };
    let a = runtime.container("a");
    let conf = runtime.conf("1.0.0", json!({}));
    let said = runtime.add(&conf, "a", &a);
    let pair = said["interfaces"][1]["name"].as_str().unwrap().to_owned();
    let mut with_prev = conf.clone();
    with_prev["prevResult"] = said.clone();
    let check = || runtime.try_verb("CHECK", &with_prev, "a", Some(&a));
    assert_eq!(check(), Ok(Value::Null));
    let mac = link(&a, "eth0")["address"].as_str().unwrap().to_owned();
    let host_mac = link(&runtime.host, &pair)["address"].as_str().unwrap().to_owned();
    let file = runtime.file("networks/net/10.1.15.2");
    let file = file.to_str().unwrap();
    let cases: [(&Host, String, String, &str); 17] = [
        (&a, "ip link set eth0 mtu 1400".into(), "ip link set eth0 mtu 1450".into(), "container: eth0: MTU is 1400, wanted: 1450"),
        (&a, "ip link set eth0 address 02:00:00:00:00:01".into(), format!("ip link set eth0 address {mac}"), "container: eth0: MAC is 02:00:00:00:00:01"),
        (&a, "ip addr add 10.1.15.2/32 dev eth0 && ip addr del 10.1.15.2/24 dev eth0".into(), "ip addr del 10.1.15.2/32 dev eth0; ip addr add 10.1.15.2/24 dev eth0; ip route add default via 10.1.15.1; ip route add 10.1.0.0/16 via 10.1.15.1".into(), "address 10.1.15.2/24 dev eth0 is missing"),
        (&a, "ip addr del fd00:0:0:15::2/64 dev eth0".into(), "ip addr add fd00:0:0:15::2/64 dev eth0 nodad".into(), "address fd00:0:0:15::2/64 dev eth0 is missing"),
        (&a, "ip route del default".into(), "ip route add default via 10.1.15.1".into(), "route default via 10.1.15.1 dev eth0"),
        (&a, "ip route del 10.1.0.0/16".into(), "ip route add 10.1.0.0/16 via 10.1.15.1".into(), "route 10.1.0.0/16 via 10.1.15.1 dev eth0"),
        (&a, "ip link set lo down".into(), "ip link set lo up".into(), "container: lo: state is down, wanted: up"),
        (&runtime.host, format!("ip link set {pair} nomaster"), format!("ip link set {pair} master cni0 && bridge link set dev {pair} hairpin on"), "bridge is none, wanted: cni0"),
        (&runtime.host, format!("bridge link set dev {pair} hairpin off"), format!("bridge link set dev {pair} hairpin on"), "hairpin is off, wanted: on"),
        (&runtime.host, format!("ip link set {pair} mtu 1400"), format!("ip link set {pair} mtu 1450"), "MTU is 1400, wanted: 1450"),
        (&runtime.host, format!("ip link set {pair} address 02:00:00:00:00:01"), format!("ip link set {pair} address {host_mac}"), "MAC is 02:00:00:00:00:01"),
        (&runtime.host, format!("ip link set {pair} down"), format!("ip link set {pair} up"), "state is down, wanted: up"),
        (&runtime.host, "ip addr del 10.1.15.1/24 dev cni0".into(), "ip addr add 10.1.15.1/24 dev cni0".into(), "host: address 10.1.15.1/24 dev cni0 is missing"),
        (&runtime.host, "echo 0 > /proc/sys/net/ipv4/ip_forward".into(), "echo 1 > /proc/sys/net/ipv4/ip_forward".into(), "net/ipv4/ip_forward is 0"),
        (&runtime.host, format!("mv {file} {file}.away"), format!("mv {file}.away {file}"), "the address file of 10.1.15.2 is missing"),
        (&runtime.host, format!("cp {file} {file}.away; printf other > {file}"), format!("mv {file}.away {file}"), "the address 10.1.15.2 is held by other"),
        (&runtime.host, format!("ip link del {pair}"), String::new(), &format!("host: link {pair}")),
    ];
    for (place, alter, restore, named) in &cases {
        sh(place, alter);
        let refused = check().expect_err(alter);
        let msg = refused["msg"].as_str().unwrap();
        assert!(refused["code"] == 103 && msg.contains(named), "{alter}: {refused:#}");
        if !restore.is_empty() {
            // Together with the device its routes go, and a link that is down takes IPv6 with it.
            sh(place, restore);
            eventually("it is as it was", &check);
        }
    }
}

/// Changes what a runtime passes on.
type Alter<'a> = &'a dyn Fn(&mut Value);

/// What ADD answered belongs to what is compared, and so does what the kernel chose where nobody did.
#[test]
fn check_names_the_ports_state_an_mtu_that_nobody_chose_and_what_prev_result_says() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    // No MTU anywhere, told from 1.1.0 on.
    for (version, container) in [("1.0.0", &a), ("1.1.0", &b)] {
        let conf =
            runtime.conf(version, json!({"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/24"}]]}}));
        let said = runtime.add(&conf, &container.name, container);
        let pair = said["interfaces"][1]["name"].as_str().unwrap();
        let check = |prev: &Value| {
            let mut conf = conf.clone();
            conf["prevResult"] = prev.clone();
            runtime.try_verb("CHECK", &conf, &container.name, Some(container))
        };
        let names = |said: Result<Value, Value>, named: &str| {
            let refused = said.expect_err(named);
            assert!(refused["code"] == 103 && refused["msg"].as_str().unwrap().contains(named), "{named}: {refused:#}");
        };
        assert_eq!(check(&said), Ok(Value::Null));
        let host = &runtime.host;
        let cases: [(&Host, String, String, &str); 4] = [
            (
                host,
                format!("bridge link set dev {pair} state 0"),
                format!("bridge link set dev {pair} state 3"),
                "bridge port is disabled",
            ),
            (
                host,
                format!("ip link set {pair} mtu 1400"),
                format!("ip link set {pair} mtu 1500"),
                "MTU is 1400, wanted: 1500",
            ),
            (
                container,
                "ip link set eth0 mtu 1400".into(),
                "ip link set eth0 mtu 1500".into(),
                "eth0: MTU is 1400, wanted: 1500",
            ),
            (
                container,
                "ip link set eth0 down".into(),
                "ip link set eth0 up; ip route add default via 10.9.0.1".into(),
                "eth0: state is down",
            ),
        ];
        for (place, alter, restore, named) in &cases {
            sh(place, alter);
            names(check(&said), named);
            sh(place, restore);
            eventually("it is as it was", || check(&said));
        }
        let told: [(Alter<'_>, &str); 9] = [
            (&|p| p["ips"] = json!([]), "prevResult lacks the address 10.9.0."),
            (
                &|p| p["ips"][0]["address"] = json!("10.9.0.77/24"),
                "prevResult has the address 10.9.0.77/24, which ADD did not give",
            ),
            (
                &|p| p["ips"][0]["gateway"] = json!("10.9.0.99"),
                "prevResult has the gateway 10.9.0.99, wanted: 10.9.0.1",
            ),
            (&|p| p["ips"][0]["interface"] = json!(0), "on another interface"),
            (&|p| p["interfaces"][1]["mac"] = json!("02:00:00:00:00:01"), ", wanted: 02:00:00:00:00:01"),
            (&|p| p["interfaces"][2]["mac"] = json!("02:00:00:00:00:02"), "container: eth0: MAC is"),
            (&|p| p["interfaces"][2]["mtu"] = json!(1300), "container: eth0: MTU is 1500, wanted: 1300"),
            (&|p| drop(p["interfaces"].as_array_mut().unwrap().remove(1)), "prevResult lacks the interface veth"),
            (
                &|p| p["routes"].as_array_mut().unwrap().push(json!({"dst": "10.77.0.0/16", "gw": "10.9.0.1"})),
                "route 10.77.0.0/16 via 10.9.0.1 dev eth0",
            ),
        ];
        for (alter, named) in told {
            let mut prev = said.clone();
            alter(&mut prev);
            names(check(&prev), named);
        }
    }
}

/// Runs a line by the shell.
fn sh(host: &Host, line: &str) {
    let out = host.command("sh").args(["-c", line]).output().unwrap();
    assert!(out.status.success(), "{line}: {out:?}");
}

#[test]
fn gc_frees_what_no_attachment_holds() {
    let Some((runtime, _dir)) = runtime() else { return };
    let conf = runtime.conf("1.1.0", json!({}));
    let containers = ["a", "b", "c"].map(|name| runtime.container(name));
    containers.iter().for_each(|container| drop(runtime.add(&conf, &container.name, container)));
    // What a program that was killed has left, an empty file too.
    std::fs::write(runtime.file("networks/net/10.1.15.9"), "ghost\r\neth0").unwrap();
    std::fs::write(runtime.file("networks/net/10.1.15.10"), "").unwrap();
    let refused = runtime.try_verb("GC", &conf, "", None).unwrap_err();
    assert_eq!((&refused["code"], runtime.attachments().len()), (&json!(7), 3), "{refused:#}");
    let mut with_list = conf.clone();
    with_list["cni.dev/valid-attachments"] = json!([{"containerID": "b", "ifname": "eth0"}]);
    assert_eq!(runtime.try_verb("GC", &with_list, "", None), Ok(Value::Null));
    assert_eq!(runtime.held(), ["10.1.15.3", "fd00:0:0:15::3"]);
    assert_eq!(runtime.attachments(), ["b:eth0.json"]);
    assert_eq!(runtime.links().len(), 3, "lo, cni0 and b's");
    reaches(&containers[1], "10.1.15.1");
}

/// The reference bridge's configuration may have no ipam at all.
#[test]
fn gc_takes_what_has_no_address() {
    let Some((runtime, _dir)) = runtime() else { return };
    let conf = |name: &str| json!({"cniVersion": "1.1.0", "name": name, "type": "bridge", "bridge": "cni0", "stateDir": runtime.file("state")});
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    let said = runtime.add(&conf("net"), "a", &a);
    runtime.add(&conf("other"), "b", &b);
    let mut check = conf("net");
    check["prevResult"] = said;
    assert_eq!(runtime.try_verb("CHECK", &check, "a", Some(&a)), Ok(Value::Null));
    let mut gc = conf("net");
    gc["cni.dev/valid-attachments"] = json!([]);
    assert_eq!(runtime.try_verb("GC", &gc, "", None), Ok(Value::Null));
    assert_eq!(runtime.attachments(), ["b:eth0.json"], "another network's stays");
    assert_eq!((runtime.links().len(), a.json("link").as_array().unwrap().len()), (3, 1), "lo, cni0 and b's");
}

/// Who is told nothing takes the ADD for failed.
#[test]
fn an_add_that_cannot_be_answered_is_taken_back() {
    let Some((runtime, _dir)) = runtime() else { return };
    let a = runtime.container("a");
    let alone = json!({"cniVersion": "1.0.0", "name": "net", "type": "macvlan", "ipam": {"type": "host-local",
        "subnet": "10.9.0.0/24", "dataDir": runtime.file("networks")}, "stateDir": runtime.file("state")});
    let ports =
        json!({"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}});
    let conf = runtime.conf("1.0.0", ports);
    let unheard = |conf: &Value| {
        let mut command = runtime.host.command("sh");
        let netns = netns(&a);
        let env = [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", &netns)];
        command.args(["-c", "exec \"$0\" > /dev/full", bin("twill-cni").to_str().unwrap()]).envs(env);
        let out = cni::start(command.stderr(std::process::Stdio::piped()), conf.to_string().as_bytes());
        let out = out.wait_with_output().unwrap();
        assert!(!out.status.success());
        assert!(String::from_utf8_lossy(&out.stderr).contains("No space left"), "{out:?}");
    };
    let forwarding = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"].map(|path| format!("/proc/sys/{path}"));
    let forwards = || forwarding.each_ref().map(|path| runtime.host.run(&format!("cat {path}")).trim() == "1");
    for conf in [&conf, &alone] {
        forwarding.iter().for_each(|path| sh(&runtime.host, &format!("echo 0 > {path}")));
        unheard(conf);
        assert_eq!(forwards(), [false, false]);
        assert_eq!((runtime.held(), runtime.attachments()), (vec![], vec![]));
        assert_eq!(a.json("link").as_array().unwrap().len(), 1);
        assert_eq!(runtime.host.run("nft list tables"), "");
    }
    // While another container needs it the host forwards on.
    let b = runtime.container("b");
    runtime.add(&runtime.conf("1.0.0", json!({})), "b", &b);
    unheard(&conf);
    assert_eq!(forwards(), [true, true]);
    runtime.del(&conf, "b", Some(&b));
    // One that was answered before stays, whatever becomes of the second.
    runtime.add(&conf, "a", &a);
    let before = runtime.everything();
    unheard(&conf);
    assert_eq!(runtime.everything(), before);
}

/// ADD of "a" by a plugin whose system calls fail.
fn hindered(runtime: &Runtime, conf: &Value, container: &Host, calls: &str) -> Result<Value, Value> {
    let mut command = runtime.command(std::path::Path::new("strace"), &adds(conf, "a", &netns(container)));
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("inject={calls}")]).arg(bin("twill-cni"));
    runtime.finish(command, conf)
}

#[test]
fn an_add_needs_no_second_thread() {
    let Some((runtime, _dir)) = runtime() else { return };
    if !installed("strace") {
        return;
    }
    let a = runtime.container("a");
    let conf = runtime.conf("1.0.0", json!({}));
    hindered(&runtime, &conf, &a, "clone,clone3:error=EAGAIN").unwrap();
    assert_eq!(addresses(&a, "eth0").len(), 2);
    runtime.del(&conf, "a", Some(&a));
}

#[test]
fn an_add_that_fails_in_both_threads_tells_of_both() {
    let Some((runtime, _dir)) = runtime() else { return };
    if !installed("strace") {
        return;
    }
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    let conf = runtime.conf("1.0.0", json!({"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/30"}]]}}));
    runtime.add(&conf, "b", &b);
    let before = runtime.everything();
    let refused = hindered(&runtime, &conf, &a, "setns:error=EPERM").unwrap_err();
    let msg = refused["msg"].as_str().unwrap();
    assert!(msg.contains("10.9.0.2 by b:eth0") && msg.contains("enter the container"), "{refused:#}");
    assert_eq!(runtime.everything(), before);
}

/// The disk fails when everything else is done.
#[test]
fn an_add_that_fails_late_leaves_the_host_as_it_was() {
    let Some((runtime, _dir)) = runtime() else { return };
    if !installed("strace") {
        return;
    }
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    let conf = runtime.conf("1.0.0", json!({}));
    let forwarding = "/proc/sys/net/ipv4/ip_forward";
    let fails = || {
        let mut command = runtime.command(std::path::Path::new("strace"), &adds(&conf, "a", &netns(&a)));
        command.args(["-f", "-qq", "-o", "/dev/null", "-e", "inject=fsync:error=EIO"]).arg(bin("twill-cni"));
        let refused = runtime.finish(command, &conf).unwrap_err();
        assert!(refused["code"] == 5 && refused["msg"].as_str().unwrap().contains("to the disk"), "{refused:#}");
        assert_eq!(a.json("link").as_array().unwrap().len(), 1);
        runtime.host.run(&format!("cat {forwarding}")).trim().to_owned()
    };
    sh(&runtime.host, &format!("echo 0 > {forwarding}"));
    let before = runtime.everything();
    assert_eq!(fails(), "0");
    assert_eq!(runtime.everything(), before);
    runtime.add(&conf, "b", &b);
    sh(&runtime.host, &format!("echo 0 > {forwarding}"));
    let before = runtime.everything();
    assert_eq!(fails(), "1", "b needs it");
    assert_eq!(runtime.everything(), before);
}

#[test]
fn without_a_lease_status_says_50_and_51_and_add_says_try_again() {
    let Some((runtime, _dir)) = runtime() else { return };
    let conf = runtime.conf("1.1.0", json!({}));
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    let code = |verb: &str, container| {
        let refused = runtime.try_verb(verb, &conf, "b", container).unwrap_err();
        assert!(refused["details"].as_str().unwrap().contains("twill agent"), "{refused:#}");
        refused["code"].as_i64().unwrap()
    };
    assert_eq!(runtime.try_verb("STATUS", &conf, "", None), Ok(Value::Null));
    let env = runtime.file("subnet.env");
    std::fs::remove_file(&env).unwrap();
    assert_eq!((code("STATUS", None), code("ADD", Some(&b))), (50, 11));
    std::fs::write(&env, "FLANNEL_NETWORK=10.1.0.0/16\n").unwrap();
    assert_eq!((code("STATUS", None), code("ADD", Some(&b))), (50, 11));
    runtime.lease("10.1.15.1/24");
    runtime.add(&conf, "a", &a);
    std::fs::remove_file(&env).unwrap();
    assert_eq!((code("STATUS", None), code("ADD", Some(&b))), (51, 11));
    // Written down in an earlier boot: it runs no more.
    let file = runtime.file("state/attachments/a:eth0.json");
    let text = std::fs::read_to_string(&file).unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    std::fs::write(&file, text.replace(boot.trim(), "another")).unwrap();
    assert_eq!(code("STATUS", None), 50);
    // DEL needs no lease.
    runtime.del(&conf, "a", Some(&a));
    assert_eq!(runtime.links(), ["lo", "cni0"]);
}

fn adds<'a>(conf: &'a Value, id: &'a str, netns: &str) -> Call<'a> {
    Call { verb: "ADD", conf, id, netns: Some(netns.into()), args: "" }
}

#[test]
fn bad_input_is_named_and_leaves_nothing_behind() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    b.ip("link add eth0 type bridge");
    let conf = runtime.conf("1.0.0", json!({}));
    let own = |more| runtime.conf("1.0.0", more);
    let range = |subnet: &str| json!({"ipam": {"type": "host-local", "ranges": [[{"subnet": subnet}]]}});
    let (taken, last) = (runtime.container("taken"), runtime.container("last"));
    runtime.add(&conf, "taken", &taken);
    let mut small = range("10.9.0.0/30");
    small["bridge"] = json!("cni1");
    runtime.add(&own(small.clone()), "last", &last);
    let file = runtime.file("file");
    std::fs::write(&file, "").unwrap();
    let netns_a = netns(&a);
    let before = runtime.everything();
    let refused = |code: i64, says: &str, call: &Call<'_>| {
        let refused = runtime.call(call).expect_err(says);
        let text = format!("{}{}", refused["msg"], refused["details"]);
        assert!(refused["code"] == code && text.contains(says), "{code} {says}: {refused:#}");
        assert!(!refused["details"].as_str().unwrap().is_empty(), "the way out: {refused:#}");
        assert_eq!(runtime.everything(), before, "{says}");
        assert_eq!(a.json("link").as_array().unwrap().len(), 1, "{says}");
    };
    let raw = |text: &str| {
        let mut command = runtime.command(&bin("twill-cni"), &adds(&conf, "a", &netns_a));
        let refused = runtime.finish_raw(command.env("CNI_COMMAND", "ADD"), text.as_bytes()).unwrap_err();
        assert!(
            refused["code"] == 6 && refused["msg"].as_str().unwrap().contains("network configuration"),
            "{refused:#}"
        );
        assert_eq!(runtime.everything(), before, "{text:?}");
    };
    ["", "{", "{\"cniVersion\": \"1.0.0\", ", "[]", "\u{0}", "{\"cniVersion\": 1}"].into_iter().for_each(raw);
    refused(6, "expected", &adds(&json!("text"), "a", &netns_a));
    refused(7, "name", &adds(&json!({"cniVersion": "1.0.0", "type": "twill-cni"}), "a", &netns_a));
    refused(7, "type", &adds(&json!({"cniVersion": "1.0.0", "name": "net"}), "a", &netns_a));
    refused(
        7,
        "no ranges",
        &adds(
            &json!({"cniVersion": "1.0.0", "name": "net", "type": "bridge", "ipam": {"type": "host-local"}}),
            "a",
            &netns_a,
        ),
    );
    refused(1, "9.9.9", &adds(&own(json!({"cniVersion": "9.9.9"})), "a", &netns_a));
    refused(7, "name", &adds(&own(json!({"name": ""})), "a", &netns_a));
    refused(7, "name", &adds(&own(json!({"name": "../up"})), "a", &netns_a));
    refused(7, "type", &adds(&own(json!({"type": ""})), "a", &netns_a));
    refused(7, "bridge", &adds(&own(json!({"bridge": "a/b"})), "a", &netns_a));
    refused(7, "mtu", &adds(&own(json!({"mtu": 1})), "a", &netns_a));
    refused(7, "needs 1280", &adds(&own(json!({"mtu": 1279})), "a", &netns_a));
    refused(7, "01:00:5e:00:00:01", &adds(&own(json!({"runtimeConfig": {"mac": "01:00:5e:00:00:01"}})), "a", &netns_a));
    refused(4, "MAC=", &Call { args: "MAC=00:00:00:00:00:00", ..adds(&conf, "a", &netns_a) });
    let route = json!({"ipam": {"routes": [{"dst": "10.99.0.0/16", "priority": -1}]}});
    refused(7, "priority -1", &adds(&own(route), "a", &netns_a));
    let two = json!({"runtimeConfig": {"ips": ["10.1.15.7", "10.1.15.8"]}});
    refused(102, "10.1.15.7 and 10.1.15.8", &adds(&own(two), "a", &netns_a));
    refused(2, "vlan", &adds(&own(json!({"vlan": 7})), "a", &netns_a));
    refused(2, "dhcp", &adds(&own(json!({"ipam": {"type": "dhcp"}})), "a", &netns_a));
    refused(7, "10.9.0.0/31", &adds(&own(range("10.9.0.0/31")), "a", &netns_a));
    let within = |first: &str, last: &str| json!({"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/24", "rangeStart": first, "rangeEnd": last}]]}});
    let two = json!({"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/24", "rangeEnd": "10.9.0.9"}, {"subnet": "10.9.0.0/24", "rangeStart": "10.9.0.9"}]]}});
    for (asked, says) in [
        (range("10.9.0.2/32"), "10.9.0.2/32 has no room"),
        (range("224.0.0.0/24"), "of multicast addresses"),
        (range("127.0.0.0/8"), "of loopback addresses"),
        (range("ff02::/64"), "of multicast addresses"),
        (within("10.9.0.9", "10.9.0.8"), "from 10.9.0.9 to 10.9.0.8 is empty"),
        (within("10.9.0.1", "10.9.0.1"), "no address but its gateway's"),
        (two, "overlap"),
        (json!({"bridge": "all"}), "bridge: all is not"),
        (json!({"bridge": "br%d"}), "bridge: br%d is not"),
    ] {
        refused(7, says, &adds(&own(asked), "a", &netns_a));
    }
    for name in ["all", "default", "eth%d"] {
        let call = adds(&conf, "a", &netns_a);
        let mut command = runtime.command(&bin("twill-cni"), &call);
        command.env("CNI_IFNAME", name);
        let refused = runtime.finish(command, &conf).unwrap_err();
        assert!(refused["code"] == 4 && refused["msg"].as_str().unwrap().contains(name), "{refused:#}");
        assert_eq!(runtime.everything(), before, "{name}");
    }
    // Published at one address of the host, of a family that the container has not.
    let published = |ip: &str, subnet: &str| {
        let mut asked = range(subnet);
        asked["bridge"] = json!("cni2");
        asked["runtimeConfig"] =
            json!({"portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": "tcp", "hostIP": ip}]});
        own(asked)
    };
    refused(7, "[::1]:80/tcp: IPv6 leads nothing from ::1", &adds(&published("::1", "fd00:7::/64"), "a", &netns_a));
    refused(
        7,
        "[fd00::9]:80/tcp: the container has no IPv6 address",
        &adds(&published("fd00::9", "10.7.0.0/24"), "a", &netns_a),
    );
    refused(
        7,
        "10.0.0.9:80/tcp: the container has no IPv4 address",
        &adds(&published("10.0.0.9", "fd00:7::/64"), "a", &netns_a),
    );
    refused(4, "CNI_CONTAINERID", &adds(&conf, "", &netns_a));
    refused(4, "CNI_CONTAINERID", &adds(&conf, "../up", &netns_a));
    refused(4, "CNI_NETNS", &adds(&conf, "a", ""));
    refused(4, "CNI_COMMAND", &Call { verb: "JUMP", ..adds(&conf, "a", &netns_a) });
    refused(4, "CNI_ARGS", &Call { args: "IP=here", ..adds(&conf, "a", &netns_a) });
    refused(3, "has ended", &adds(&conf, "a", "/proc/1/gone"));
    refused(3, "no network namespace", &adds(&conf, "a", file.to_str().unwrap()));
    // Nobody will ever write into it.
    let pipe = runtime.file("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    refused(3, "no network namespace", &adds(&conf, "a", pipe.to_str().unwrap()));
    refused(3, "host's own", &adds(&conf, "a", &netns(&runtime.host)));
    refused(101, "eth0 already", &adds(&conf, "b", &netns(&b)));
    refused(101, "taken", &adds(&conf, "taken", &netns_a));
    refused(102, "10.9.0.2 by last:eth0", &adds(&own(small), "a", &netns_a));
    refused(102, "taken:eth0 holds it", &Call { args: "IP=10.1.15.2", ..adds(&conf, "a", &netns_a) });
    refused(102, "no range", &Call { args: "IP=10.77.0.2", ..adds(&conf, "a", &netns_a) });
    refused(104, "no bridge", &adds(&own(json!({"bridge": "lo"})), "a", &netns_a));
    refused(104, "taken", &adds(&own(range("10.8.0.0/24")), "a", &netns_a));
    refused(
        100,
        "10.99.0.1",
        &adds(&own(json!({"ipam": {"routes": [{"dst": "10.99.0.0/16", "gw": "10.99.0.1"}]}})), "a", &netns_a),
    );
}

/// The device was there before: the DEL after the refused ADD, as libcni sends it, is not for it.
#[test]
fn del_after_an_add_that_was_refused_for_the_name_leaves_the_device() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    let pair = |container: &Host, name: &str| {
        runtime.host.ip(&format!("link add {name} type veth peer name eth0 netns {}", container.pid()));
    };
    let conf = runtime.conf("1.0.0", json!({}));
    let plain = json!({"cniVersion": "1.0.0", "name": "net", "type": "bridge", "bridge": "cni0", "stateDir": runtime.file("state")});
    runtime.host.ip("link add cni0 type bridge");
    pair(&a, "theirs");
    runtime.host.ip("link set theirs master cni0");
    pair(&b, "alone");
    let before = runtime.everything();
    for (conf, id, container) in [(&conf, "a", &a), (&plain, "a", &a), (&conf, "b", &b)] {
        let refused = runtime.try_verb("ADD", conf, id, Some(container)).unwrap_err();
        assert_eq!(refused["code"], 101, "{refused:#}");
        runtime.del(conf, id, Some(container));
        assert_eq!(runtime.everything(), before);
    }
    // What is said to be ours and stands on no bridge of ours stays as well.
    let answered = json!({"prevResult": {"interfaces": [{"name": "eth0", "sandbox": netns(&b)}]}});
    runtime.del(&runtime.conf("1.0.0", answered.clone()), "b", Some(&b));
    assert_eq!(runtime.everything(), before);
    // The other plugin's own: it goes.
    runtime.del(&runtime.conf("1.0.0", answered), "a", Some(&a));
    assert_eq!(runtime.links(), ["lo", "cni0", "alone"]);
}

/// What an ADD is refused for is in the DEL that follows as well: refused too, it would follow for ever.
#[test]
fn del_needs_nothing_of_what_add_is_refused_for() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, gone) = (runtime.container("a"), runtime.container("gone"));
    let conf = runtime.conf("1.0.0", json!({}));
    let file = runtime.file("file");
    std::fs::write(&file, "").unwrap();
    let ports = |port: Value| json!({"runtimeConfig": {"portMappings": [port]}});
    let interface = |more: Value| {
        let mut made = json!({"name": "eth0", "sandbox": "/run/netns/a"});
        cni::merge(&mut made, more);
        json!({"prevResult": {"interfaces": [made]}})
    };
    let wrong = [
        json!({"runtimeConfig": {"mac": "zz"}}),
        json!({"runtimeConfig": {"ips": ["here"]}}),
        ports(json!({"hostPort": 0, "containerPort": 80, "protocol": "tcp"})),
        ports(json!({"hostPort": "80"})),
        json!({"mtu": 1}),
        json!({"vlan": 7}),
        json!({"cniVersion": "9.9.9"}),
        json!({"bridge": "a/b"}),
        json!({"ipam": {"ranges": [[{"subnet": "10.9.0.0/31"}]]}}),
        interface(json!({"mac": "00:00:10:86:fe:80:00:00:00:00:00:00:00:02:c9:03:00:12:34:56"})),
        interface(json!({"mac": ""})),
        json!({"prevResult": {"ips": [{"address": "10.1.15.2/24", "interface": -1}]}}),
        json!({"prevResult": {"routes": [{"dst": "10.1.15.9/16"}]}}),
    ];
    let dels = |conf: &Value, id: &str, netns: Option<String>, args: &str| {
        let said = runtime.call(&Call { verb: "DEL", conf, id, netns, args });
        assert_eq!(said, Ok(Value::Null), "{conf:#} {args}");
    };
    let all_gone = || {
        assert_eq!((runtime.held(), runtime.attachments()), (vec![], vec![]));
        assert!(runtime.links().iter().all(|link| !link.starts_with("veth")));
    };
    for more in wrong {
        let asked = runtime.conf("1.0.0", more);
        dels(&asked, "gone", Some(netns(&gone)), "");
        // Of a container that is there everything goes.
        runtime.add(&conf, "a", &a);
        dels(&asked, "a", Some(netns(&a)), "");
        all_gone();
        runtime.add(&conf, "a", &a);
        let mut gc = asked.clone();
        gc["cni.dev/valid-attachments"] = json!([]);
        assert_eq!(runtime.try_verb("GC", &gc, "", None), Ok(Value::Null), "{gc:#}");
        all_gone();
    }
    for args in ["IP=nonsense", "MAC=01:00:00:00:00:01"] {
        runtime.add(&conf, "a", &a);
        dels(&conf, "a", Some(netns(&a)), args);
        all_gone();
    }
    for path in [file.to_str().unwrap(), "/proc/1/gone", runtime.file("").to_str().unwrap()] {
        dels(&conf, "gone", Some(path.into()), "");
    }
}

/// The container's route is refused when everything else is done: what the kernel had before is there again.
#[test]
fn an_add_that_fails_late_leaves_sysctls_loopback_and_bridge_as_they_were() {
    let Some((runtime, _dir)) = runtime() else { return };
    let a = runtime.container("a");
    a.ip("link set lo down");
    runtime.host.ip("link add cni0 type bridge");
    runtime.host.ip("addr add 10.9.9.1/24 dev cni0");
    let sysctls = || a.run("sysctl net.ipv6.conf.all.disable_ipv6 net.ipv6.conf.default.disable_ipv6");
    let flags = || link(&runtime.host, "cni0")["flags"].clone();
    let state = || (sysctls(), a.json("addr"), flags(), runtime.everything());
    let before = state();
    assert!(before.0.contains("= 0"), "{}", before.0);
    // IPv4 alone switches IPv6 off in the container.
    let late = runtime.conf(
        "1.0.0",
        json!({"promiscMode": true, "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.8.0.0/24"}]],
        "routes": [{"dst": "10.99.0.0/16", "gw": "10.99.0.1"}]}}),
    );
    let refused = runtime.try_verb("ADD", &late, "a", Some(&a)).unwrap_err();
    assert!(refused["code"] == 100 && refused["msg"].as_str().unwrap().contains("10.99.0.1"), "{refused:#}");
    assert_eq!(state(), before);
    runtime.add(&runtime.conf("1.0.0", json!({})), "a", &a);
    reaches(&a, "10.1.15.1");
}

#[test]
fn a_device_that_refuses_to_go_is_told_and_remembered() {
    let Some((runtime, _dir)) = runtime() else { return };
    if !twill_e2e::installed("setpriv") {
        return;
    }
    let a = runtime.container("a");
    let conf = runtime.conf("1.1.0", json!({}));
    runtime.add(&conf, "a", &a);
    let before = runtime.everything();
    // Without the capability the kernel refuses.
    let call = Call { verb: "DEL", conf: &conf, id: "a", netns: None, args: "" };
    let without = |call: &Call<'_>| {
        let mut command = runtime.command(std::path::Path::new("setpriv"), call);
        command.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]).arg(bin("twill-cni"));
        runtime.finish(command, call.conf).unwrap_err()
    };
    let refused = without(&call);
    let text = format!("{} {}", refused["msg"], refused["details"]);
    assert!(
        refused["code"] == 100 && text.contains("delete link veth") && text.contains("CAP_NET_ADMIN"),
        "{refused:#}"
    );
    assert_eq!(runtime.everything(), before, "nothing is forgotten");
    let mut gc = conf.clone();
    gc["cni.dev/valid-attachments"] = json!([]);
    let refused = without(&Call { verb: "GC", conf: &gc, ..call });
    assert!(refused["msg"].as_str().unwrap().contains("delete link veth"), "{refused:#}");
    assert_eq!(runtime.everything()["attachments"], before["attachments"]);
    reaches(&a, "10.1.15.1");
    runtime.del(&conf, "a", None);
    assert_eq!((runtime.held(), runtime.attachments(), runtime.links().len()), (vec![], vec![], 2));
}

/// An ADD that fails when the device is there, and cannot take the device back: nobody else gets its address.
#[test]
fn an_add_that_cannot_take_its_device_back_keeps_address_and_file_for_the_del() {
    let Some((runtime, _dir)) = runtime() else { return };
    if !installed("strace") {
        return;
    }
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    runtime.add(&runtime.conf("1.0.0", json!({})), "b", &b);
    let before = runtime.everything();
    let trace = runtime.file("trace");
    // The container's route is refused.
    let late = runtime.conf("1.0.0", json!({"ipam": {"routes": [{"dst": "10.99.0.0/16", "gw": "10.99.0.1"}]}}));
    let fails = |more: &[&str]| {
        let mut command = runtime.command(std::path::Path::new("strace"), &adds(&late, "a", &netns(&a)));
        command.args(["-qq", "-e", "trace=sendto", "-o", trace.to_str().unwrap()]).args(more).arg(bin("twill-cni"));
        let refused = runtime.finish(command, &late).unwrap_err();
        assert!(refused["code"] == 100 && refused["msg"].as_str().unwrap().contains("10.99.0.1"), "{refused:#}");
        (refused, std::fs::read_to_string(&trace).unwrap())
    };
    let (refused, sent) = fails(&[]);
    assert_eq!(
        (runtime.everything(), &refused["details"]),
        (before.clone(), &json!("correct the cause and try again"))
    );
    let nth = 1 + sent.lines().position(|line| line.contains("RTM_DELLINK")).unwrap_or_else(|| panic!("{sent}"));
    // This one request fails, and then all from there on, so that nobody can tell whether the device is there.
    for (which, told) in
        [(format!("{nth}"), "Operation not permitted"), (format!("{nth}+"), "read the network namespace")]
    {
        let earlier = runtime.held();
        let (refused, sent) = fails(&["-e", &format!("inject=sendto:error=EPERM:when={which}")]);
        assert!(sent.lines().nth(nth - 1).is_some_and(|line| line.contains("RTM_DELLINK")), "{sent}");
        let held: Vec<String> = runtime.held().into_iter().filter(|ip| !earlier.contains(ip)).collect();
        let (msg, details) = (refused["msg"].as_str().unwrap(), refused["details"].as_str().unwrap());
        let stays = format!(" stays: {}", held.join(", "));
        assert!(msg.contains("then delete link veth") && msg.contains(told) && msg.contains(&stays), "{refused:#}");
        assert!(details.contains("the DEL of this container takes what is left"), "{refused:#}");
        assert_eq!((held.len(), runtime.attachments()), (2, vec!["a:eth0.json".to_owned(), "b:eth0.json".into()]));
        assert_eq!((runtime.links().len(), a.json("link").as_array().unwrap().len()), (4, 2), "lo, cni0 and two pairs");
        // Nobody else gets it.
        let c = runtime.container("c");
        let conf = runtime.conf("1.0.0", json!({"runtimeConfig": {"ips": [held[0]]}}));
        let taken = runtime.try_verb("ADD", &conf, "c", Some(&c)).unwrap_err();
        assert!(taken["msg"].as_str().unwrap().contains("a:eth0 holds it"), "{taken:#}");
        runtime.del(&late, "a", Some(&a));
        assert_eq!(runtime.everything(), before);
    }
    runtime.add(&runtime.conf("1.0.0", json!({})), "a", &a);
    reaches(&a, "10.1.15.1");
}

#[test]
fn a_foreign_address_on_an_unused_bridge_is_repaired() {
    let Some((runtime, _dir)) = runtime() else { return };
    let a = runtime.container("a");
    runtime.host.ip("link add cni0 type bridge");
    runtime.host.ip("addr add 10.9.9.1/24 dev cni0");
    runtime.add(&runtime.conf("1.0.0", json!({})), "a", &a);
    assert_eq!(addresses(&runtime.host, "cni0"), ["10.1.15.1/24", "fd00:0:0:15::1/64"]);
    reaches(&a, "10.1.15.1");
}

#[test]
fn what_is_asked_for_is_given() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, b, c) = (runtime.container("a"), runtime.container("b"), runtime.container("c"));
    let more = json!({"bridge": "docker0", "mtu": 1300, "hairpinMode": false, "promiscMode": true, "portIsolation": true,
        "ipam": {"routes": [{"dst": "192.0.2.0/24"}, {"dst": "198.51.100.0/24", "gw": "10.1.15.77", "priority": 7}]},
        "runtimeConfig": {"ips": ["10.1.15.50/24"], "mac": "02:00:00:00:00:50"}});
    let said = runtime.add(&runtime.conf("1.1.0", more.clone()), "a", &a);
    assert_eq!(
        (&said["ips"][0]["address"], &said["interfaces"][2]["mac"]),
        (&json!("10.1.15.50/24"), &json!("02:00:00:00:00:50"))
    );
    let eth0 = link(&a, "eth0");
    assert_eq!((&eth0["address"], &eth0["mtu"]), (&json!("02:00:00:00:00:50"), &json!(1300)));
    assert_eq!(addresses(&runtime.host, "docker0")[0], "10.1.15.1/24");
    assert!(link(&runtime.host, "docker0")["flags"].as_array().unwrap().contains(&json!("PROMISC")));
    let pair = link(&runtime.host, said["interfaces"][1]["name"].as_str().unwrap());
    let port = &pair["linkinfo"]["info_slave_data"];
    assert_eq!((&port["hairpin"], &port["isolated"]), (&json!(false), &json!(true)));
    let route = |dst: &str| a.json(&format!("route show {dst}"))[0].clone();
    assert_eq!(route("192.0.2.0/24")["gateway"], "10.1.15.1");
    assert_eq!(
        (&route("198.51.100.0/24")["gateway"], &route("198.51.100.0/24")["metric"]),
        (&json!("10.1.15.77"), &json!(7))
    );
    // By CNI_ARGS as well.
    let conf = runtime.conf("1.0.0", json!({"bridge": "docker0"}));
    let call = Call {
        verb: "ADD",
        conf: &conf,
        id: "b",
        netns: Some(netns(&b)),
        args: "IgnoreUnknown=1;IP=10.1.15.60;MAC=02:00:00:00:00:60",
    };
    let said = runtime.call(&call).unwrap();
    assert_eq!(
        (&said["ips"][0]["address"], &link(&b, "eth0")["address"]),
        (&json!("10.1.15.60/24"), &json!("02:00:00:00:00:60"))
    );
    // A stable MAC and device name, whenever the container is attached anew.
    let conf = runtime.conf("1.0.0", json!({"bridge": "docker0"}));
    let first = runtime.add(&conf, "c", &c);
    runtime.del(&conf, "c", Some(&c));
    let second = runtime.add(&conf, "c", &c);
    assert_eq!(first["interfaces"], second["interfaces"]);
    assert_ne!(first["ips"], second["ips"]);
}

/// containerd writes `HostPort`; Go's empty lists are `null`.
#[test]
fn a_configuration_is_read_as_go_reads_it() {
    let Some((runtime, _dir)) = runtime().filter(|_| twill_e2e::installed("nft")) else { return };
    let a = runtime.container("a");
    let mut conf = runtime.conf("1.0.0", json!({}));
    let plain = runtime.add(&conf, "a", &a);
    runtime.del(&conf, "a", Some(&a));
    let keys = conf.as_object().unwrap().clone().into_iter();
    conf = keys.map(|(key, value)| (key.to_uppercase(), value)).collect();
    cni::merge(
        &mut conf,
        json!({"MTU": 1300, "Mtu": 1400, "promiscMode": null, "dns": null, "vlanTrunk": null, "prevResult": null,
            "runtimeConfig": {"Ips": ["10.1.15.50"], "PortMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}]},
            "IPAM": {"Routes": null, "ranges": null}}),
    );
    let said = runtime.add(&conf, "a", &a);
    assert_eq!((&said["cniVersion"], &said["interfaces"]), (&json!("1.0.0"), &plain["interfaces"]));
    assert_eq!((&said["ips"][0]["address"], &link(&a, "eth0")["mtu"]), (&json!("10.1.15.50/24"), &json!(1400)));
    let rules = runtime.host.run("nft list chain inet twill-cni published");
    assert!(rules.contains("tcp dport 8080") && rules.contains("to 10.1.15.50:80"), "{rules}");
}

#[test]
fn a_configured_default_route_is_the_only_one_and_told_once() {
    let Some((runtime, _dir)) = runtime() else { return };
    let a = runtime.container("a");
    let conf = runtime.conf("1.1.0", json!({"ipam": {"routes": [{"dst": "0.0.0.0/0", "gw": "10.1.15.77"}]}}));
    let said = runtime.add(&conf, "a", &a);
    let ways = |routes: &Value, dst: &str, gw: &str| -> Vec<Value> {
        let routes = routes.as_array().unwrap().iter().filter(|route| route["dst"] == dst);
        routes.map(|route| route[gw].clone()).collect()
    };
    assert_eq!(ways(&a.json("route"), "default", "gateway"), ["10.1.15.77"]);
    assert_eq!(ways(&said["routes"], "0.0.0.0/0", "gw"), ["10.1.15.77"]);
}

#[test]
fn point_to_point_needs_no_bridge() {
    let Some((runtime, _dir)) = runtime() else { return };
    let (a, b) = (runtime.container("a"), runtime.container("b"));
    let conf = runtime.conf("1.0.0", json!({"bridge": ""}));
    let said = runtime.add(&conf, "a", &a);
    runtime.add(&conf, "b", &b);
    assert_eq!(runtime.links().len(), 3, "lo and two pairs");
    assert_eq!((said["interfaces"].as_array().unwrap().len(), &said["ips"][0]["address"]), (2, &json!("10.1.15.2/32")));
    for ip in ["10.1.15.1", "10.1.15.3", "fd00:0:0:15::1", "fd00:0:0:15::3"] {
        reaches(&a, ip);
    }
    let mut with_prev = conf.clone();
    with_prev["prevResult"] = said;
    assert_eq!(runtime.try_verb("CHECK", &with_prev, "a", Some(&a)), Ok(Value::Null));
    runtime.del(&conf, "a", Some(&a));
    runtime.del(&conf, "b", Some(&b));
    assert_eq!((runtime.links(), runtime.held()), (vec!["lo".to_owned()], vec![]));
}
