//! The CNI plugin killed as it enters its n-th system call, for every n until it ends by itself: no address is doubled, no host port leads
//! to who did not ask for it, and whoever cleans up afterwards finds everything.
//!
//! | killed | beside it | host ports | cleaned up by |
//! |---|---|---|---|
//! | ADD, DEL | – | none | DEL, and once more GC, after each n |
//! | ADD, DEL | – | one, and a named address that the next container asks for | DEL and GC in turn |
//! | ADD, DEL | an ADD or the DEL of another container, in turn | none, one each | DEL and GC in turn |
//! | ADD, DEL of addresses alone | – | none | DEL and GC in turn |
//! | ADD | – | none | the agent, once, after the containers of every n have ended |

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::path::Path;
use std::process::Child;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use twill_e2e::cni::{self, Call, Runtime, netns, start};
use twill_e2e::net::{Bed, Host};
use twill_e2e::node::Node;
use twill_e2e::{bin, eventually, installed};

/// A named address that one container after the other asks for.
const ASKED: &str = "10.1.15.9";

/// Starts a plugin that is killed at its n-th system call.
fn start_killed(runtime: &Runtime, call: &Call<'_>, n: usize) -> Child {
    let mut command = runtime.command(Path::new(env!("CARGO_BIN_EXE_kill-at")), call);
    command.arg(n.to_string()).arg(bin("twill-cni"));
    start(command, call.conf.to_string().as_bytes())
}

/// `true`: it ended before.
fn ended(victim: Child) -> bool {
    let out = victim.wait_with_output().unwrap();
    let code = out.status.code();
    assert!(matches!(code, Some(0 | 137)), "{out:?}");
    code == Some(0)
}

fn published(port: u16) -> Value {
    json!({"runtimeConfig": {"portMappings": [{"hostPort": port, "containerPort": 80, "protocol": "tcp"}]}})
}

/// A host, the container whose plugin is killed, and another one.
struct Place {
    runtime: Runtime,
    victim: Host,
    other: Host,
    /// Their configurations.
    conf: Value,
    others: Value,
    has_ports: bool,
    _dir: tempfile::TempDir,
}

impl Place {
    /// With host ports both ask for one address by its name too, where `asked` says so.
    fn new(has_ports: bool, how: How) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let runtime = Runtime::new(Bed::new()?, dir.path());
        if has_ports && !installed("nft") {
            return None;
        }
        let conf = |port| {
            let mut conf = runtime.conf("1.1.0", if has_ports { published(port) } else { json!({}) });
            cni::merge(
                &mut conf,
                if how == How::Asking { json!({"runtimeConfig": {"ips": [ASKED]}}) } else { json!({}) },
            );
            conf
        };
        let (victim, other) = (runtime.container("victim"), runtime.container("other"));
        let mut place = Self { conf: conf(8080), others: conf(8081), victim, other, has_ports, runtime, _dir: dir };
        // The bridge is there, as on every host but for its first container.
        place.runtime.add(&place.conf, "victim", &place.victim);
        place.runtime.del(&place.conf, "victim", Some(&place.victim));
        if how == How::Addresses {
            let ranges = json!([[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00:9::/64"}]]);
            cni::merge(&mut place.conf, json!({"type": "macvlan", "ipam": {"type": "host-local", "ranges": ranges}}));
        }
        Some(place)
    }

    fn call(&self, verb: &'static str) -> Call<'_> {
        Call { verb, conf: &self.conf, id: "victim", netns: Some(netns(&self.victim)), args: "" }
    }

    /// The host's rules in words; none where no port is published.
    fn rules(&self) -> String {
        if self.has_ports { self.runtime.host.run("nft list ruleset") } else { String::new() }
    }

    /// Frees everything of the victim, in one of two ways.
    fn clean(&self, verb: &'static str, is_other_there: bool) {
        let mut conf = self.conf.clone();
        let valid = if is_other_there { json!([{"containerID": "other", "ifname": "eth0"}]) } else { json!([]) };
        conf["cni.dev/valid-attachments"] = valid;
        let said = self.runtime.call(&Call { conf: &conf, ..self.call(verb) });
        assert_eq!(said, Ok(Value::Null));
    }

    /// Nothing is left of anybody but those who are `there`: no file, half made ones included, no device, no rule.
    fn is_clean(&self, there: &[&str], when: &str) {
        let attached: Vec<String> = there.iter().map(|id| format!("{id}:eth0.json")).collect();
        assert_eq!(self.runtime.attachments(), attached, "{when}");
        let network = std::fs::read_dir(self.runtime.file("networks/net")).unwrap();
        let mut held = 0;
        for file in network.map(|entry| entry.unwrap().path()) {
            let name = file.file_name().unwrap().to_str().unwrap();
            // The walk's files, and the spare ones.
            let is_walks = |name: &str| name.starts_with("last_reserved_ip.") || name.starts_with("asked.");
            if name != "lock" && name != ".spare" && !is_walks(name.trim_start_matches('.')) {
                let holder = std::fs::read_to_string(&file).unwrap();
                assert!(there.iter().any(|id| holder == format!("{id}\r\neth0")), "{when}: {name}: {holder:?}");
                held += 1;
            }
        }
        assert_eq!(held, 2 * there.len(), "{when}: one address of each family for each container");
        assert_eq!(links(&self.runtime.host).len(), 2 + there.len(), "{when}: lo, cni0 and a pair for each container");
        let rules = self.rules();
        assert!(!rules.contains("dport 8080 "), "{when}: {rules}");
        let others = self.has_ports && there.contains(&"other");
        assert_eq!(rules.contains("dport 8081 "), others, "{when}: {rules}");
    }

    /// The next container asks for what the victim asked for: either the victim holds it, or nothing of the victim is left that leads to
    /// it. `true`: it was given.
    fn give_to_the_next(&self, when: &str) -> bool {
        let given = self.runtime.try_verb("ADD", &self.others, "other", Some(&self.other)).is_ok();
        if given {
            self.held_by(&self.other, "other");
            self.held_by(&self.victim, "victim");
            let rules = self.rules();
            assert!(rules.contains("dport 8081 ") && !rules.contains("dport 8080 "), "{when}: {rules}");
        }
        given
    }

    /// Every address on a container's device is held by it: then nobody else gets it.
    fn held_by(&self, container: &Host, id: &str) {
        for ip in addresses(container) {
            let holder = std::fs::read_to_string(self.runtime.file("networks/net").join(&ip)).unwrap_or_default();
            assert_eq!(holder, format!("{id}\r\neth0"), "{ip} is on the device of {id}");
        }
    }
}

/// What the kernel says of a host's network, without a program: there are thousands of looks.
fn proc_net(host: &Host, name: &str) -> String {
    std::fs::read_to_string(format!("/proc/{}/net/{name}", host.pid())).unwrap()
}

/// The devices of a host.
fn links(host: &Host) -> Vec<String> {
    proc_net(host, "dev").lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect()
}

/// The addresses of a host's devices, but loopback's and those that IPv6 gives itself.
fn addresses(host: &Host) -> BTreeSet<String> {
    let trie = proc_net(host, "fib_trie");
    let lines: Vec<&str> = trie.lines().map(str::trim).collect();
    let v4 =
        lines.windows(2).filter(|pair| pair[1].ends_with("host LOCAL")).filter_map(|pair| pair[0].strip_prefix("|-- "));
    let v4 = v4.filter(|ip| !ip.starts_with("127.")).map(str::to_owned);
    let v6 = proc_net(host, "if_inet6");
    let v6 = v6.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).filter(|words| words[3] == "00");
    let v6 = v6.map(|words| Ipv6Addr::from(u128::from_str_radix(words[0], 16).unwrap())).map(|ip| ip.to_string());
    v4.chain(v6).collect()
}

/// What happens beside a kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Nothing.
    Alone,
    /// Nothing; the next container asks for the same address.
    Asking,
    /// Another container is added, or taken away.
    Beside,
    /// Nothing; addresses alone, for somebody else's plugin.
    Addresses,
}

/// How many places work at once: a device that goes is waited for.
const PLACES: usize = 4;

/// Kills `verb` at every system call, each in one of several places; after each kill `after` looks and cleans up. What another
/// process does meanwhile has to work.
fn kill(verb: &'static str, has_ports: bool, how: How, after: impl Fn(&Place, usize, &str) + Sync) {
    let in_a_place = |first: usize| {
        let Some(place) = Place::new(has_ports, how) else { return };
        let (runtime, other) = (&place.runtime, &place.other);
        for (turn, n) in (first..).step_by(PLACES).enumerate() {
            if verb == "DEL" {
                runtime.add(&place.conf, "victim", &place.victim);
            }
            let when = format!("{verb} killed at call {n}");
            let victim = start_killed(runtime, &place.call(verb), n);
            if how == How::Beside {
                let second = ["ADD", "DEL"][turn % 2];
                let second =
                    Call { verb: second, conf: &place.others, id: "other", netns: Some(netns(other)), args: "" };
                runtime.call(&second).unwrap_or_else(|e| panic!("{when}: {e:#}"));
            }
            let ended = ended(victim);
            place.held_by(&place.victim, "victim");
            place.held_by(other, "other");
            after(&place, turn, &when);
            if ended {
                return assert!(n > 100, "{verb} has ended after {n} calls");
            }
        }
    };
    let in_a_place = &in_a_place;
    std::thread::scope(|scope| {
        (1..=PLACES).for_each(|first| drop(scope.spawn(move || in_a_place(first))));
    });
}

const WAYS: [&str; 2] = ["DEL", "GC"];

fn alone(verb: &'static str, way: &'static str) {
    kill(verb, false, How::Alone, |place, _, when| {
        place.clean(way, false);
        place.is_clean(&[], when);
    });
}

#[test]
fn add_killed_at_every_system_call_leaves_nothing_behind_a_del() {
    alone("ADD", "DEL");
}

#[test]
fn add_killed_at_every_system_call_leaves_nothing_behind_a_gc() {
    alone("ADD", "GC");
}

#[test]
fn del_killed_at_every_system_call_leaves_nothing_behind_a_del() {
    alone("DEL", "DEL");
}

#[test]
fn del_killed_at_every_system_call_leaves_nothing_behind_a_gc() {
    alone("DEL", "GC");
}

/// The next container asks for the address and for another host port.
fn with_ports(verb: &'static str) {
    let given = AtomicUsize::new(0);
    kill(verb, true, How::Asking, |place, turn, when| {
        let is_given = place.give_to_the_next(when);
        place.clean(WAYS[turn % 2], is_given);
        place.is_clean(if is_given { &["other"] } else { &[] }, when);
        if is_given {
            given.fetch_add(1, Ordering::Relaxed);
            place.runtime.del(&place.others, "other", Some(&place.other));
        }
    });
    let given = given.into_inner();
    assert!(given > 10, "the next container got the address {given} times");
}

#[test]
fn add_with_a_host_port_killed_at_every_system_call_leads_it_to_nobody_else() {
    with_ports("ADD");
}

#[test]
fn del_with_a_host_port_killed_at_every_system_call_leads_it_to_nobody_else() {
    with_ports("DEL");
}

/// The second process is at work while the first one is: it adds another container, and takes it away again, in turn.
fn beside(verb: &'static str, has_ports: bool) {
    kill(verb, has_ports, How::Beside, |place, turn, when| {
        let there: &[&str] = if turn % 2 == 0 { &["other"] } else { &[] };
        place.clean(WAYS[turn / 2 % 2], !there.is_empty());
        place.is_clean(there, when);
    });
}

#[test]
fn add_killed_at_every_system_call_beside_a_second_process_doubles_no_address() {
    beside("ADD", false);
}

#[test]
fn del_killed_at_every_system_call_beside_a_second_process_doubles_no_address() {
    beside("DEL", false);
}

#[test]
fn add_killed_at_every_system_call_beside_a_second_process_with_host_ports_leaves_none() {
    beside("ADD", true);
}

#[test]
fn del_killed_at_every_system_call_beside_a_second_process_with_host_ports_leaves_none() {
    beside("DEL", true);
}

fn addresses_alone(verb: &'static str) {
    kill(verb, false, How::Addresses, |place, turn, when| {
        place.clean(WAYS[turn % 2], false);
        place.is_clean(&[], when);
    });
}

#[test]
fn add_of_addresses_alone_killed_at_every_system_call_leaves_nothing_behind() {
    addresses_alone("ADD");
}

#[test]
fn del_of_addresses_alone_killed_at_every_system_call_leaves_nothing_behind() {
    addresses_alone("DEL");
}

/// Nobody says DEL or GC: the containers have ended.
#[test]
fn what_adds_killed_at_every_system_call_have_left_is_freed_by_the_agent() {
    let Some(bed) = Bed::new() else { return };
    if !installed("etcdctl") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(bed, dir.path());
    let networks = node.file("networks");
    let files = |dir: &Path| -> Vec<String> {
        let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "lock" && name != ".spare" && !name.contains("last_reserved_ip.")).collect()
    };
    for n in 1.. {
        let container = node.container("c");
        let conf = json!({"cniVersion": "1.0.0", "name": "net", "type": "twill-cni", "bridge": "cni1", "stateDir": node.file("state"),
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/20"}]], "dataDir": networks}});
        let (id, netns) = (format!("c{n}"), netns(&container));
        let mut command = node.host.command(env!("CARGO_BIN_EXE_kill-at"));
        command.arg(n.to_string()).arg(bin("twill-cni")).env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", &id);
        if ended(start(command.env("CNI_IFNAME", "eth0").env("CNI_NETNS", &netns), conf.to_string().as_bytes())) {
            break;
        }
    }
    let attachments = node.file("state/attachments");
    let left = (files(&attachments).len(), files(&networks.join("net")).len());
    assert!(left.0 > 80 && left.1 > 30, "{left:?}");
    eventually("their devices go with them", || {
        let left = links(&node.host);
        if left.iter().any(|name| name.starts_with("veth")) { Err(left) } else { Ok(()) }
    });
    let _agent = node.agent("");
    eventually("the agent frees everything", || {
        let left = (files(&attachments), files(&networks.join("net")));
        if left.0.is_empty() && left.1.is_empty() { Ok(()) } else { Err(left) }
    });
}
