//! Host ports and masquerading of the CNI plugin, by real traffic and by what `nft` shows.
//!
//! ```text
//!   outside 10.168.0.3 ─ eth0 ── eth0 ─ 10.168.0.2 host ─ cni0 10.1.15.1 ┬ eth0 ─ 10.1.15.2 "a", 80/tcp and 80/udp answer
//!           fd00:168::3                 fd00:168::2       fd00:0:0:15::1 └ eth0 ─ 10.1.15.3 "b"
//! ```

use std::path::Path;
use std::process::{Child, Stdio};

use serde_json::{Value, json};
use twill_e2e::cni::{Call, Runtime, netns, start};
use twill_e2e::net::{Bed, Host};
use twill_e2e::node::Node;
use twill_e2e::site::ruleset;
use twill_e2e::{bin, eventually, installed};

/// Answers each question on a TCP and a UDP port with a name and the asker's address, in both families.
const SERVER: &str = r#"
import socket, sys, threading
name, port = sys.argv[1], int(sys.argv[2])
def answer(peer): return (name + " " + peer[0].replace("::ffff:", "")).encode()
def make(kind):
    s = socket.socket(socket.AF_INET6, kind)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind(("::", port))
    return s
t, u = make(socket.SOCK_STREAM), make(socket.SOCK_DGRAM)
t.listen(16)
def tcp():
    while True:
        c, peer = t.accept()
        c.sendall(answer(peer))
        c.close()
threading.Thread(target=tcp, daemon=True).start()
print("ready", flush=True)
while True:
    _, peer = u.recvfrom(100)
    u.sendto(answer(peer), peer)
"#;

/// Asks one question, and prints what is answered.
const CLIENT: &str = r#"
import socket, sys
kind, host, port = sys.argv[1:4]
family = socket.AF_INET6 if ":" in host else socket.AF_INET
s = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
s.settimeout(1)
if len(sys.argv) > 4: s.bind(("", int(sys.argv[4])))
s.connect((host, int(port)))
if kind == "udp": s.send(b"?")
print(s.recv(100).decode())
"#;

/// A program of the test, ended with it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The picture of the head, all but the containers' devices.
struct Place {
    runtime: Runtime,
    outside: Host,
    a: Host,
    b: Host,
    _server: Running,
    _dir: tempfile::TempDir,
}

fn place() -> Option<Place> {
    if !installed("python3") || !installed("nft") {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let bed = Bed::new()?;
    let outside = bed.host("outside");
    let (a, b) = (bed.host("a"), bed.host("b"));
    let server = serve(&a, "a", 80);
    let runtime = Runtime::new(bed, dir.path());
    runtime.wire_to(&outside);
    Some(Place { runtime, outside, a, b, _server: server, _dir: dir })
}

fn serve(host: &Host, name: &str, port: u16) -> Running {
    use std::io::Read;
    let mut command = host.command("python3");
    command.args(["-c", SERVER, name, &port.to_string()]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 6]).unwrap();
    Running(child)
}

/// What `from` is answered.
fn ask(from: &Host, kind: &str, host: &str, port: u16) -> Result<String, String> {
    let out = from.command("python3").args(["-c", CLIENT, kind, host, &port.to_string()]).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stderr)) }
}

fn answers(from: &Host, kind: &str, host: &str, port: u16, says: &str) {
    eventually(&format!("{} asks {kind} {host} {port} and hears {says:?}", from.name), || {
        let said = ask(from, kind, host, port);
        if said.as_deref() == Ok(says) { Ok(()) } else { Err(said) }
    });
}

fn with_ports(runtime: &Runtime, ports: Value) -> Value {
    runtime.conf("1.0.0", json!({"runtimeConfig": {"portMappings": ports}}))
}

fn port(host: u16, container: u16, protocol: &str) -> Value {
    json!({"hostPort": host, "containerPort": container, "protocol": protocol})
}

/// Rules of the table of host ports, as `nft` tells them.
fn rules(host: &Host) -> Vec<Value> {
    let ours = |object: &Value| object["rule"]["table"] == "twill-cni";
    ruleset(host).into_iter().filter(ours).map(|object| object["rule"].clone()).collect()
}

/// The host ports that `nft` shows, each with what it leads to.
fn published(host: &Host) -> Vec<String> {
    let of = |rule: Value| -> Option<String> {
        let exprs = rule["expr"].as_array()?.clone();
        let dnat = exprs.iter().find_map(|expr| expr.get("dnat"))?;
        let at = exprs.iter().find(|expr| expr["match"]["left"]["payload"]["field"] == "dport")?;
        Some(format!("{} {} {}", at["match"]["right"], dnat["addr"].as_str()?, dnat["port"]))
    };
    let mut all: Vec<String> = rules(host).into_iter().filter_map(of).collect();
    all.sort();
    all
}

#[test]
fn a_published_port_answers_from_everywhere_and_del_takes_it_back() {
    let Some(place) = place() else { return };
    let Place { runtime, outside, a, b, .. } = &place;
    let host = &runtime.host;
    let mut at_one = port(8053, 80, "UDP");
    at_one["hostIP"] = json!("10.168.0.2");
    let conf = with_ports(runtime, json!([port(8080, 80, "tcp"), port(8080, 80, "udp"), at_one]));
    runtime.add(&conf, "a", a);
    runtime.add(&runtime.conf("1.0.0", json!({})), "b", b);
    host.ip("addr add 10.168.0.22/24 dev eth0");
    for kind in ["tcp", "udp"] {
        // From outside, with the asker's own address.
        answers(outside, kind, "10.168.0.2", 8080, "a 10.168.0.3");
        answers(outside, kind, "fd00:168::2", 8080, "a fd00:168::3");
        answers(outside, kind, "10.168.0.22", 8080, "a 10.168.0.3");
        // The host itself, by each of its addresses.
        answers(host, kind, "10.168.0.2", 8080, "a 10.168.0.2");
        answers(host, kind, "127.0.0.1", 8080, "a 10.1.15.1");
        answers(host, kind, "fd00:168::2", 8080, "a fd00:168::2");
        // Its neighbour and the container itself: both would hear the answer from a stranger, were they not hidden.
        for container in [a, b] {
            answers(container, kind, "10.168.0.2", 8080, "a 10.1.15.1");
            answers(container, kind, "10.1.15.1", 8080, "a 10.1.15.1");
            answers(container, kind, "fd00:168::2", 8080, "a fd00:0:0:15::1");
        }
    }
    answers(outside, "udp", "10.168.0.2", 8053, "a 10.168.0.3");
    for elsewhere in ["10.168.0.22", "fd00:168::2"] {
        assert!(ask(outside, "udp", elsewhere, 8053).is_err(), "published at one address alone");
    }
    assert!(ask(outside, "tcp", "10.168.0.2", 8053).is_err(), "another protocol");
    // What is not for this host passes: a port of the container's own address, and of somebody else's.
    outside.ip("route add 10.1.15.0/24 via 10.168.0.2");
    answers(outside, "tcp", "10.1.15.2", 80, "a 10.168.0.3");
    assert!(ask(outside, "tcp", "10.1.15.2", 8080).is_err());
    assert_eq!(published(host).len(), 5, "{:#?}", rules(host));
    runtime.del(&conf, "a", Some(a));
    assert!(!ruleset(host).iter().any(|object| object["table"]["name"] == "twill-cni"), "nobody needs it any more");
    assert!(ask(outside, "tcp", "10.168.0.2", 8080).is_err());
}

#[test]
fn the_hosts_loopback_is_not_opened_to_containers() {
    let Some(place) = place() else { return };
    let Place { runtime, a, b, .. } = &place;
    runtime.add(&with_ports(runtime, json!([port(8080, 80, "tcp")])), "a", a);
    runtime.add(&runtime.conf("1.0.0", json!({})), "b", b);
    let _server = serve(&runtime.host, "host", 9000);
    answers(&runtime.host, "tcp", "127.0.0.1", 9000, "host 127.0.0.1");
    // A container that sends to 127.0.0.1 by its way out, with all that the kernel would let it.
    b.run("sysctl -q net.ipv4.conf.eth0.route_localnet=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0");
    b.ip("addr del 127.0.0.1/8 dev lo");
    b.ip("route add 127.0.0.0/8 via 10.1.15.1 src 10.1.15.3");
    let drops = || {
        let guard = rules(&runtime.host).into_iter().find(|rule| rule["chain"] == "loopback");
        assert!(guard.is_some_and(|rule| rule.to_string().contains("drop")));
        runtime.host.run("nft list chain inet twill-cni loopback").contains("packets 0 ")
    };
    assert!(drops(), "nothing was dropped yet");
    assert!(ask(b, "tcp", "127.0.0.1", 9000).is_err());
    assert!(!drops(), "it came, and was dropped");
}

#[test]
fn check_names_a_host_port_that_is_missing_or_altered() {
    let Some(place) = place() else { return };
    let Place { runtime, a, b, .. } = &place;
    let conf = with_ports(runtime, json!([port(8080, 80, "tcp"), port(8053, 53, "udp")]));
    let said = runtime.add(&conf, "a", a);
    let mut with_prev = conf.clone();
    with_prev["prevResult"] = said;
    let check = || runtime.try_verb("CHECK", &with_prev, "a", Some(a));
    let other = with_ports(runtime, json!([port(8081, 80, "tcp")]));
    runtime.add(&other, "b", b);
    assert_eq!(check(), Ok(Value::Null));
    let cases = [
        (
            "published",
            "tcp dport 8080",
            Some("meta nfproto ipv4 tcp dport 8080 counter dnat ip to 10.1.15.9:80"),
            "host port 8080/tcp does not lead to 10.1.15.2:80",
        ),
        ("published", "udp dport 8053", None, "host port 8053/udp does not lead to 10.1.15.2:53"),
        ("arriving", "jump published", None, "chain inet twill-cni arriving is missing or altered"),
        ("leaving", "masquerade", None, "the container's rules of chain inet twill-cni leaving are altered"),
        ("loopback", "drop", None, "chain inet twill-cni loopback is missing or altered"),
    ];
    for (chain, holds, instead, named) in cases {
        let shown = runtime.host.run(&format!("nft -a list chain inet twill-cni {chain}"));
        let rule = shown.lines().find(|line| line.contains(holds)).unwrap_or_else(|| panic!("{holds}: {shown}"));
        let handle = rule.rsplit(' ').next().unwrap();
        runtime.host.run(&match instead {
            Some(instead) => format!("nft replace rule inet twill-cni {chain} handle {handle} {instead}"),
            None => format!("nft delete rule inet twill-cni {chain} handle {handle}"),
        });
        let refused = check().expect_err(named);
        assert!(refused["code"] == 103 && refused["msg"].as_str().unwrap().contains(named), "{named}: {refused:#}");
        // Whoever comes or goes makes the table anew, of all files.
        runtime.del(&other, "b", Some(b));
        assert_eq!(check(), Ok(Value::Null), "{}", runtime.host.run("nft list ruleset"));
        runtime.add(&other, "b", b);
    }
    runtime.host.run("nft flush ruleset");
    assert!(check().unwrap_err()["msg"].as_str().unwrap().contains("table inet twill-cni is missing"));
    runtime.del(&other, "b", Some(b));
    assert_eq!(check(), Ok(Value::Null));
    runtime.host.run("sysctl -q net.ipv4.conf.cni0.route_localnet=0");
    assert!(check().unwrap_err()["msg"].as_str().unwrap().contains("net/ipv4/conf/cni0/route_localnet is 0"));
}

#[test]
fn a_host_port_leads_to_one_container_and_the_other_is_told_to_whom() {
    let Some(place) = place() else { return };
    let Place { runtime, a, b, outside, .. } = &place;
    let first = with_ports(runtime, json!([port(8080, 80, "tcp")]));
    runtime.add(&first, "a", a);
    let before = (runtime.everything(), ruleset(&runtime.host));
    let mut same = port(8080, 81, "tcp");
    same["hostIP"] = json!("10.168.0.2");
    let refused = runtime.try_verb("ADD", &with_ports(runtime, json!([same])), "b", Some(b)).unwrap_err();
    let text = format!("{} {}", refused["msg"], refused["details"]);
    assert!(refused["code"] == 105 && text.contains("host port 10.168.0.2:8080/tcp leads to a:eth0"), "{refused:#}");
    assert_eq!((runtime.everything(), ruleset(&runtime.host)), before);
    runtime.add(&with_ports(runtime, json!([port(8080, 81, "udp")])), "b", b);
    // One that ended without a DEL holds nothing off, once its device is gone with its namespace.
    let (ends, c) = (runtime.container("ends"), runtime.container("c"));
    let conf = with_ports(runtime, json!([port(8081, 80, "tcp")]));
    runtime.add(&conf, "ends", &ends);
    drop(ends);
    let _server = serve(&c, "c", 80);
    eventually("the port is free", || runtime.try_verb("ADD", &conf, "c", Some(&c)));
    answers(outside, "tcp", "10.168.0.2", 8081, "c 10.168.0.3");
    assert_eq!(runtime.attachments(), ["a:eth0.json", "b:eth0.json", "c:eth0.json"]);
}

#[test]
fn what_is_no_host_port_is_refused_and_leaves_nothing_behind() {
    let Some(place) = place() else { return };
    let Place { runtime, a, .. } = &place;
    let before = (runtime.everything(), ruleset(&runtime.host));
    let refused = |code: i64, says: &str, ports: Value| {
        let refused = runtime.try_verb("ADD", &with_ports(runtime, ports), "a", Some(a)).unwrap_err();
        assert!(refused["code"] == code && refused["msg"].as_str().unwrap().contains(says), "{says}: {refused:#}");
        assert!(!refused["details"].as_str().unwrap().is_empty());
        assert_eq!((runtime.everything(), ruleset(&runtime.host)), before);
    };
    refused(7, "hostPort is 0", json!([port(0, 80, "tcp")]));
    refused(7, "hostPort is 70000", json!([{"hostPort": 70000, "containerPort": 80, "protocol": "tcp"}]));
    refused(7, "containerPort is 0", json!([port(80, 0, "tcp")]));
    refused(7, "icmp", json!([port(80, 80, "icmp")]));
    refused(7, "hostIP", json!([{"hostPort": 80, "containerPort": 80, "protocol": "tcp", "hostIP": "here"}]));
    refused(7, "8080/tcp is to lead to port 80", json!([port(8080, 80, "tcp"), port(8080, 81, "tcp")]));
    refused(6, "expected", json!([{"hostPort": "80"}]));
    // Somebody else's table of our name stays as it is.
    runtime.host.run("nft add table inet twill-cni");
    let foreign = ruleset(&runtime.host);
    runtime.host.ip("link add cni0 type bridge");
    let paths = ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv4.conf.cni0.route_localnet"];
    paths.iter().for_each(|path| drop(runtime.host.run(&format!("sysctl -q {path}=0"))));
    let sysctls = || paths.map(|path| runtime.host.run(&format!("sysctl -n {path}")));
    let quiet = (sysctls(), runtime.everything());
    let refused =
        runtime.try_verb("ADD", &with_ports(runtime, json!([port(80, 80, "tcp")])), "a", Some(a)).unwrap_err();
    assert!(
        refused["code"] == 100 && refused["msg"].as_str().unwrap().contains("Twill did not make it"),
        "{refused:#}"
    );
    assert_eq!((sysctls(), runtime.everything()), quiet);
    assert_eq!((runtime.held(), runtime.attachments(), ruleset(&runtime.host)), (vec![], vec![], foreign));
    assert_eq!(a.json("link").as_array().unwrap().len(), 1);
}

/// A file of a newer release is for that release: whoever it belongs to waits for it, nobody else does, and its host port stays.
#[test]
fn a_file_of_a_newer_release_hinders_only_its_own_container() {
    let Some(place) = place() else { return };
    let Place { runtime, a, b, .. } = &place;
    let (conf, other) =
        (with_ports(runtime, json!([port(8080, 80, "tcp")])), with_ports(runtime, json!([port(8081, 80, "tcp")])));
    runtime.add(&conf, "a", a);
    let of_a = published(&runtime.host);
    let file = runtime.file("state/attachments/a:eth0.json");
    let text = std::fs::read_to_string(&file).unwrap();
    let newer = text.replacen("\"version\": 1", "\"version\": 7, \"more\": true", 1);
    assert_ne!(text, newer);
    std::fs::write(&file, &newer).unwrap();
    let refused = |said: Result<Value, Value>| {
        let refused = said.unwrap_err();
        let msg = refused["msg"].as_str().unwrap();
        assert!(refused["code"] == 6 && msg.contains("a:eth0.json") && msg.contains("version is 7"), "{refused:#}");
    };
    for verb in ["ADD", "DEL"] {
        refused(runtime.try_verb(verb, &conf, "a", Some(a)));
    }
    runtime.add(&other, "b", b);
    assert_eq!(published(&runtime.host).len(), 2 * of_a.len());
    let clash = runtime.try_verb("ADD", &conf, "c", Some(&runtime.container("c"))).unwrap_err();
    assert!(clash["code"] == 105 && clash["msg"].as_str().unwrap().contains("a:eth0"), "{clash:#}");
    runtime.del(&other, "b", Some(b));
    assert_eq!(published(&runtime.host), of_a);
    // GC frees the others, and what this one holds stays.
    runtime.add(&other, "b", b);
    let held = runtime.held().len();
    let mut gc = conf.clone();
    gc["cni.dev/valid-attachments"] = json!([]);
    refused(runtime.try_verb("GC", &gc, "", None));
    assert_eq!((runtime.held().len(), runtime.attachments()), (held / 2, vec!["a:eth0.json".to_owned()]));
    assert_eq!(published(&runtime.host), of_a);
    std::fs::write(&file, text).unwrap();
    runtime.del(&conf, "a", Some(a));
    assert_eq!((runtime.held(), runtime.attachments(), published(&runtime.host)), (vec![], vec![], vec![]));
}

/// The files may be lost: what they asked for goes with the container all the same, and what others ask for stays.
#[test]
fn a_full_disk_keeps_no_container_from_leaving() {
    let Some(place) = place().filter(|_| installed("strace")) else { return };
    let Place { runtime, a, .. } = &place;
    let conf = with_ports(runtime, json!([port(8080, 80, "tcp")]));
    let mut none_valid = conf.clone();
    none_valid["cni.dev/valid-attachments"] = json!([]);
    for (verb, conf) in [("DEL", &conf), ("GC", &none_valid)] {
        runtime.add(conf, "a", a);
        let call = Call { verb, conf, id: "a", netns: Some(netns(a)), args: "" };
        let mut command = runtime.command(Path::new("strace"), &call);
        command.args(["-f", "-qq", "-o", "/dev/null", "-e", "inject=write,rename:error=ENOSPC"]).arg(bin("twill-cni"));
        runtime.finish(command, conf).unwrap_or_else(|e| panic!("{verb}: {e:#}"));
        assert_eq!((runtime.held(), runtime.attachments()), (vec![], vec![]));
        assert_eq!(runtime.host.run("nft list tables"), "");
    }
}

#[test]
fn del_and_gc_take_host_ports_back_without_an_attachment_file() {
    let Some(place) = place() else { return };
    let Place { runtime, a, b, .. } = &place;
    let (conf, other) =
        (with_ports(runtime, json!([port(8080, 80, "tcp")])), with_ports(runtime, json!([port(8081, 80, "tcp")])));
    runtime.add(&other, "b", b);
    let others = published(&runtime.host);
    let file = runtime.file("state/attachments/a:eth0.json");
    let lose: [&dyn Fn(); 2] = [&|| std::fs::remove_file(&file).unwrap(), &|| std::fs::write(&file, "").unwrap()];
    let mut gc = conf.clone();
    gc["cni.dev/valid-attachments"] = json!([{"containerID": "b", "ifname": "eth0"}]);
    for lose in lose {
        for verb in ["DEL", "GC"] {
            runtime.add(&conf, "a", a);
            assert_eq!(published(&runtime.host).len(), others.len() + 2);
            lose();
            let conf = if verb == "GC" { &gc } else { &conf };
            assert_eq!(runtime.try_verb(verb, conf, "a", Some(a)), Ok(Value::Null));
            assert_eq!(published(&runtime.host), others, "{verb}");
            runtime.del(conf, "a", Some(a));
            assert_eq!(runtime.attachments(), ["b:eth0.json"]);
        }
    }
    runtime.del(&other, "b", Some(b));
    assert_eq!(published(&runtime.host), Vec::<String>::new());
}

/// One after the other, as a runtime calls a chain: each with what the one before has answered, DEL from the end.
fn chain(runtime: &Runtime, verb: &str, confs: &[Value], container: &Host, mut prev: Value) -> Value {
    let mut confs = confs.to_vec();
    if verb == "DEL" {
        confs.reverse();
    }
    for mut conf in confs {
        conf["cniVersion"] = json!("1.0.0");
        conf["name"] = json!("net");
        if !prev.is_null() {
            conf["prevResult"] = prev.clone();
        }
        let name = conf["type"].as_str().unwrap();
        let program = if name == "twill-cni" { bin(name) } else { Path::new(REFERENCE).join(name) };
        let call = Call { verb, conf: &conf, id: "a", netns: Some(netns(container)), args: "" };
        let said = runtime.finish(runtime.command(&program, &call), &conf);
        let said = said.unwrap_or_else(|e| panic!("{verb} by {name}: {e:#}"));
        if verb == "ADD" {
            prev = said;
        }
    }
    prev
}

/// Where Debian puts the reference plugins.
const REFERENCE: &str = "/usr/lib/cni";

#[test]
fn debians_portmap_bandwidth_firewall_and_tuning_work_behind_ours() {
    let Some(place) = place() else { return };
    if !["iptables", "tc"].iter().all(|program| installed(program)) {
        return;
    }
    if !Path::new(REFERENCE).join("firewall").exists() {
        return println!("SKIP: containernetworking-plugins is not installed");
    }
    let Place { runtime, outside, a, .. } = &place;
    let host = &runtime.host;
    let _server = serve(outside, "outside", 7000);
    outside.ip("route add 10.1.15.0/24 via 10.168.0.2");
    host.run("iptables -P FORWARD DROP");
    let ours = runtime.conf("1.0.0", json!({}));
    let rate = 8_000_000;
    let confs = [
        ours.clone(),
        json!({"type": "portmap", "snat": true, "runtimeConfig": {"portMappings": [port(8080, 80, "tcp")]}}),
        json!({"type": "bandwidth", "ingressRate": rate, "ingressBurst": rate, "egressRate": rate, "egressBurst": rate}),
        json!({"type": "firewall", "backend": "iptables"}),
        json!({"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.log_martians": "1"}}),
    ];
    // Ours alone: the host lets nothing through.
    let said = chain(runtime, "ADD", &confs[..1], a, Value::Null);
    assert!(ask(a, "tcp", "10.168.0.3", 7000).is_err());
    chain(runtime, "DEL", &confs[..1], a, said);
    let said = chain(runtime, "ADD", &confs, a, Value::Null);
    answers(a, "tcp", "10.168.0.3", 7000, "outside 10.1.15.3");
    host.run("iptables -P FORWARD ACCEPT");
    answers(outside, "tcp", "10.168.0.2", 8080, "a 10.168.0.3");
    let pair = said["interfaces"][1]["name"].as_str().unwrap();
    let shown: Value = serde_json::from_str(&host.run(&format!("tc -j qdisc show dev {pair}"))).unwrap();
    let bucket =
        shown.as_array().unwrap().iter().find(|qdisc| qdisc["kind"] == "tbf").unwrap_or_else(|| panic!("{shown:#}"));
    assert_eq!(bucket["options"]["rate"], rate / 8);
    assert_eq!(runtime.links().len(), 5, "lo, eth0, cni0, the pair, and bandwidth's for the other direction");
    assert_eq!(a.run("cat /proc/sys/net/ipv4/conf/eth0/log_martians").trim(), "1");
    // Debian's portmap looks for IPv4's rules in IPv6's table: it never passes.
    let checked: Vec<Value> = confs.iter().filter(|conf| conf["type"] != "portmap").cloned().collect();
    chain(runtime, "CHECK", &checked, a, said.clone());
    chain(runtime, "DEL", &confs, a, said);
    assert!(ask(outside, "tcp", "10.168.0.2", 8080).is_err());
    assert!(!host.run("iptables-save").contains("10.1.15.3"), "firewall and portmap have taken their rules back");
    assert_eq!((runtime.links(), runtime.held()), (["lo", "eth0", "cni0"].map(str::to_owned).to_vec(), vec![]));
}

#[test]
fn many_at_once_lose_no_host_port() {
    let Some(place) = place() else { return };
    let runtime = &place.runtime;
    let containers: Vec<Host> = (0..16).map(|n| runtime.container(&format!("c{n}"))).collect();
    let confs: Vec<Value> =
        (0..16).map(|n| with_ports(runtime, json!([port(9000 + n, 80, "tcp"), port(9000 + n, 80, "sctp")]))).collect();
    let all_at_once = |verb| {
        let started: Vec<_> = containers
            .iter()
            .zip(&confs)
            .map(|(container, conf)| {
                let call = Call { verb, conf, id: &container.name, netns: Some(netns(container)), args: "" };
                start(&mut runtime.command(&bin("twill-cni"), &call), conf.to_string().as_bytes())
            })
            .collect();
        for child in started {
            let out = child.wait_with_output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        }
    };
    all_at_once("ADD");
    assert_eq!(published(&runtime.host).len(), 16 * 2 * 2);
    all_at_once("DEL");
    assert_eq!((published(&runtime.host), runtime.attachments()), (vec![], vec![]));
}

#[test]
fn the_agent_restores_host_ports_after_a_flush_and_after_it_was_away() {
    let Some(bed) = Bed::new() else { return };
    if !["etcdctl", "python3", "nft"].iter().all(|program| installed(program)) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(bed, dir.path());
    let a = node.container("a");
    let _server = serve(&a, "a", 80);
    let agent = node.agent("");
    let env = || std::fs::read_to_string(node.file("subnet.env")).map_err(|e| e.to_string());
    eventually("the agent has its lease", env);
    let conf = json!({"cniVersion": "1.0.0", "name": "net", "type": "twill-cni", "stateDir": node.file("state"),
        "subnetFile": node.file("subnet.env"), "ipam": {"dataDir": node.file("networks")},
        "runtimeConfig": {"portMappings": [port(8080, 80, "tcp")]}});
    let call = |verb: &str| {
        let mut command = node.host.command(bin("twill-cni"));
        command.env("CNI_COMMAND", verb).env("CNI_CONTAINERID", "a").env("CNI_IFNAME", "eth0");
        let out = start(command.env("CNI_NETNS", netns(&a)), conf.to_string().as_bytes()).wait_with_output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    };
    call("ADD");
    let works = || answers(&node.other, "tcp", "10.168.0.2", 8080, "a 10.168.0.3");
    works();
    // It is the plugin's: an agent that restores its own table leaves this one as it stands.
    let table = |name: &str| -> Option<Value> {
        let shown: Value = serde_json::from_str(&node.host.run("nft -j list tables inet")).unwrap();
        let tables = shown["nftables"].as_array().unwrap().iter().map(|object| &object["table"]);
        tables.filter(|table| table["name"] == name).map(|table| table["handle"].clone()).next()
    };
    let before = table("twill-cni");
    node.host.run("nft delete table inet twill");
    eventually("the agent restores its table", || table("twill").ok_or(()));
    assert_eq!(table("twill-cni"), before);
    node.host.run("nft flush ruleset");
    works();
    node.host.run("nft flush chain inet twill-cni published");
    works();
    drop(agent);
    node.host.run("nft flush ruleset");
    assert!(ask(&node.other, "tcp", "10.168.0.2", 8080).is_err());
    let _agent = node.agent("");
    works();
    call("DEL");
    assert_eq!(published(&node.host), Vec::<String>::new());
}

/// A conntrack entry that is older than the published port would keep a UDP client away for as long as it asks.
#[test]
fn a_udp_client_that_was_there_first_is_led_to_the_container() {
    let Some(place) = place() else { return };
    let Place { runtime, a, outside, .. } = &place;
    let from_one_port = || {
        let out =
            outside.command("python3").args(["-c", CLIENT, "udp", "10.168.0.2", "8080", "40000"]).output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        if said == "a 10.168.0.3" { Ok(()) } else { Err(said) }
    };
    let _other = serve(&runtime.host, "host", 8080);
    assert_eq!(from_one_port(), Err("host 10.168.0.3".into()));
    // The connection is tracked only where a table asks for it.
    runtime.host.run("nft add table inet track");
    runtime.host.run("nft add chain inet track c { type filter hook prerouting priority 0 ; }");
    runtime.host.run("nft add rule inet track c ct state new counter");
    assert_eq!(from_one_port(), Err("host 10.168.0.3".into()));
    let conf = with_ports(runtime, json!([port(8080, 80, "udp")]));
    runtime.add(&conf, "a", a);
    assert_eq!(from_one_port(), Ok(()));
    runtime.del(&conf, "a", Some(a));
    assert_eq!(from_one_port(), Err("host 10.168.0.3".into()));
}

#[test]
fn ip_masq_hides_containers_from_the_outside_and_from_nobody_else() {
    let Some(place) = place() else { return };
    let Place { runtime, a, b, outside, .. } = &place;
    let _server = serve(outside, "outside", 7000);
    // The reference bridge's configuration, with a network of its own.
    let bridge = json!({"cniVersion": "1.0.0", "name": "net", "type": "bridge", "bridge": "cni0", "isDefaultGateway": true,
        "ipMasq": true, "stateDir": runtime.file("state"), "ipam": {"type": "host-local", "dataDir": runtime.file("networks"),
        "ranges": [[{"subnet": "10.8.0.0/24"}], [{"subnet": "fd00:8::/64"}]]}});
    runtime.add(&bridge, "a", a);
    runtime.add(&bridge, "b", b);
    for kind in ["tcp", "udp"] {
        answers(a, kind, "10.168.0.3", 7000, "outside 10.168.0.2");
        answers(a, kind, "fd00:168::3", 7000, "outside fd00:168::2");
        answers(b, kind, "10.8.0.2", 80, "a 10.8.0.3");
    }
    runtime.del(&bridge, "a", Some(a));
    runtime.del(&bridge, "b", Some(b));
    assert!(!ruleset(&runtime.host).iter().any(|object| object["table"]["name"] == "twill-cni"));
    // flannel's, where the daemon does not masquerade; a container of another node is no stranger.
    outside.ip("addr add 10.1.40.2/32 dev lo");
    outside.ip("route add 10.1.15.0/24 via 10.168.0.2");
    runtime.host.ip("route add 10.1.40.0/24 via 10.168.0.3");
    runtime.host.ip("link del cni0");
    let env = runtime.file("subnet.env");
    let text = std::fs::read_to_string(&env).unwrap();
    std::fs::write(&env, text.replace("IPMASQ=true", "IPMASQ=false")).unwrap();
    let flannel = |delegate: Value| {
        json!({"cniVersion": "0.3.1", "name": "net", "type": "flannel", "subnetFile": env, "dataDir": runtime.file("flannel"),
            "stateDir": runtime.file("state"), "ipam": {"dataDir": runtime.file("networks")}, "delegate": delegate})
    };
    let conf = flannel(json!({"isDefaultGateway": true}));
    runtime.add(&conf, "a", a);
    answers(a, "tcp", "10.168.0.3", 7000, "outside 10.168.0.2");
    let own = a.json("addr show dev eth0 scope global")[0]["addr_info"][0]["local"].as_str().unwrap().to_owned();
    answers(a, "tcp", "10.1.40.2", 7000, &format!("outside {own}"));
    runtime.del(&conf, "a", Some(a));
    // The configuration has the last word, and so has a daemon that masquerades.
    let conf = flannel(json!({"isDefaultGateway": true, "ipMasq": false}));
    runtime.add(&conf, "a", a);
    assert_eq!(rules(&runtime.host), Vec::<Value>::new());
    runtime.del(&conf, "a", Some(a));
    std::fs::write(&env, text).unwrap();
    runtime.add(&flannel(json!({"isDefaultGateway": true})), "a", a);
    assert_eq!(rules(&runtime.host), Vec::<Value>::new());
    assert!(Path::new(&runtime.file("state/attachments/a:eth0.json")).exists());
}
