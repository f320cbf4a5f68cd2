//! The real kernel, in a network namespace of the test's own; looked at from outside with `ip` and `bridge`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::disallowed_methods, reason = "a test")]

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use twill_core::host::*;
use twill_core::net::*;
use twill_core::reconcile::{Claim, Desired, Op, Plan, Scope, Step, Why, effect, plan};
use twill_kernel::{Interest, Kernel, LinuxKernel, MemoryKernel};

use common::{in_namespace, run};

fn eventually(what: &str, kernel: &mut LinuxKernel, check: impl Fn(&HostState) -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !check(kernel.mirror()) {
        assert!(Instant::now() < end, "never came true: {what}: {:#?}", kernel.mirror());
        kernel.changes(Some(Duration::from_millis(50))).unwrap();
    }
}

fn interest() -> Interest {
    Interest {
        devices: Some([name("flannel.1")].into()),
        sysctls: ["net/ipv4/ip_forward".into()].into(),
        ..Interest::default()
    }
}

fn name(text: &str) -> LinkName {
    text.parse().unwrap()
}

/// eth0 10.168.0.2/24 with a peer end, both up.
fn underlay() {
    for line in [
        "ip link set lo up",
        "ip link add eth0 type veth peer name other",
        "ip addr add 10.168.0.2/24 dev eth0",
        "ip link set other up",
        "ip link set eth0 up",
    ] {
        run(line);
    }
}

fn entry(link: LinkName, mac: MacAddr, dst: Few<std::net::IpAddr>) -> Fdb {
    Fdb { link, mac, dst, port: None, permanent: true, special: false, detour: None, state: 0x80 }
}

/// flannel.1 and `peers` peers, as the vxlan backend would want them.
fn desired(peers: u8) -> Desired {
    let link = name("flannel.1");
    let mut host = HostState::new();
    let kind = LinkKind::Vxlan(Vxlan {
        vni: Vni::try_from(1).unwrap(),
        port: Port::try_from(8472).unwrap(),
        local: Some("10.168.0.2".parse().unwrap()),
        lower: Some(name("eth0")),
        learning: false,
        gbp: false,
        remote: None,
        outer: OuterHeader::default(),
        room: FdbRoom::default(),
        special: false,
    });
    let mac = Some("5e:f8:4f:00:e3:37".parse().unwrap());
    let mtu = Some(Mtu::try_from(1450).unwrap());
    host.insert(Object::Link(Box::new(Link { mac, mtu, ..Link::up(link, kind) })));
    host.insert(Object::Addr(Addr::global(link, "10.1.15.0/32".parse().unwrap())));
    host.insert(Object::Sysctl { path: "net/ipv4/ip_forward".into(), value: "1".into() });
    for n in 1..=peers {
        let vtep: std::net::IpAddr = format!("10.1.{}.0", 100 + n).parse().unwrap();
        let mac = MacAddr([0x5e, 0, 0, 0, 0, n]);
        let dst = Few::One(format!("10.168.0.{}", 100 + n).parse().unwrap());
        host.insert(Object::Neigh(Neigh {
            link,
            ip: vtep,
            mac: Some(mac),
            permanent: true,
            special: false,
            state: 0x80,
        }));
        host.insert(Object::Fdb(entry(link, mac, dst)));
        host.insert(Object::Route(Route {
            key: RouteKey { table: TABLE_MAIN, dst: Prefix::truncate(vtep, 24).unwrap(), tos: 0, metric: 0 },
            entries: Few::One(RouteEntry {
                via: Some(vtep),
                dev: Some(link),
                onlink: true,
                protocol: PROTO_TWILL,
                kind: 1,
                scope: 0,
                extras: None,
                special: false,
                usurper: Remark::default(),
            }),
        }));
    }
    let claim = Claim {
        devices: [link].into(),
        protocol: Some(PROTO_TWILL),
        networks: vec!["10.1.0.0/16".parse().unwrap()],
        ..Claim::default()
    };
    Desired { host, claim }
}

/// Plans and applies until nothing is left to do.
fn settle(kernel: &mut LinuxKernel, want: &Desired) {
    for _ in 0..5 {
        let todo = plan(want, kernel.mirror(), Scope::All);
        if todo.steps.is_empty() {
            return;
        }
        let outcome = kernel.apply(&todo);
        for (step, result) in todo.steps.iter().zip(&outcome.steps) {
            assert!(result.is_ok(), "{step}: {result:?}");
        }
        kernel.changes(Some(Duration::ZERO)).unwrap();
    }
    panic!("never settles: {:#?}", plan(want, kernel.mirror(), Scope::All));
}

/// The mirror that notifications kept, against a fresh reading, as soon as the kernel has said all that it has to say.
fn assert_mirror_is_true(kernel: &mut LinuxKernel, after: &[String]) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        kernel.changes(Some(Duration::ZERO)).unwrap();
        let fresh = LinuxKernel::open(kernel.interest().clone()).unwrap();
        let (kept, truth) = (kernel.mirror(), fresh.mirror());
        if kept == truth {
            return;
        }
        let wrong: Vec<_> = kept.iter().filter(|(k, o)| truth.get(k) != Some(o)).collect();
        let right: Vec<_> = truth.iter().filter(|(k, o)| kept.get(k) != Some(o)).collect();
        assert!(Instant::now() < end, "the mirror has {wrong:#?}\nthe kernel {right:#?}\nafter {after:#?}");
    }
}

#[test]
fn a_plan_becomes_what_ip_and_bridge_show() {
    in_namespace("a_plan_becomes_what_ip_and_bridge_show", || {
        underlay();
        let mut kernel = LinuxKernel::open(interest()).unwrap();
        settle(&mut kernel, &desired(3));
        let link = run("ip -d link show flannel.1");
        assert!(
            link.contains("vxlan id 1 local 10.168.0.2 dev eth0") && link.contains("dstport 8472 nolearning"),
            "{link}"
        );
        assert!(link.contains("mtu 1450") && link.contains("5e:f8:4f:00:e3:37"), "{link}");
        assert!(run("ip addr show flannel.1").contains("inet 10.1.15.0/32 scope global flannel.1"));
        assert!(run("ip route show proto 116").contains("10.1.102.0/24 via 10.1.102.0 dev flannel.1 onlink"));
        assert!(run("ip neigh show dev flannel.1").contains("10.1.103.0 lladdr 5e:00:00:00:00:03 PERMANENT"));
        assert!(run("bridge fdb show dev flannel.1").contains("5e:00:00:00:00:01 dst 10.168.0.101 self permanent"));
        assert_mirror_is_true(&mut kernel, &[]);
    });
}

#[test]
fn whatever_is_altered_from_outside_is_seen_and_put_right() {
    in_namespace("whatever_is_altered_from_outside_is_seen_and_put_right", || {
        underlay();
        let mut kernel = LinuxKernel::open(interest()).unwrap();
        let want = desired(3);
        settle(&mut kernel, &want);
        for line in [
            "ip route del 10.1.101.0/24",
            "ip route replace 10.1.101.0/24 via 10.168.0.9 dev eth0",
            "ip route append 10.1.102.0/24 via 10.1.103.0 dev flannel.1 onlink",
            "ip route prepend 10.1.102.0/24 via 10.1.103.0 dev flannel.1 onlink",
            "ip route add 10.1.77.0/24 via 10.1.77.0 dev flannel.1 onlink",
            "ip neigh del 10.1.101.0 dev flannel.1",
            "ip neigh replace 10.1.101.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent",
            "ip neigh replace 10.1.101.0 lladdr 5e:00:00:00:00:01 dev flannel.1 nud reachable",
            "ip neigh add 10.1.77.0 lladdr 02:00:00:00:00:77 dev flannel.1 nud permanent",
            "bridge fdb del 5e:00:00:00:00:02 dev flannel.1",
            "bridge fdb replace 5e:00:00:00:00:02 dev flannel.1 dst 10.168.0.9",
            "bridge fdb replace 5e:00:00:00:00:02 dev flannel.1 dst 10.168.0.102 port 1234",
            "bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 10.168.0.9",
            "bridge fdb add 02:00:00:00:00:77 dev flannel.1 dst 10.168.0.9",
            "ip addr del 10.1.15.0/32 dev flannel.1",
            "ip addr add 10.1.99.1/24 dev flannel.1",
            "ip link set flannel.1 mtu 1300",
            "ip link set flannel.1 address 02:11:11:11:11:11",
            "ip link set flannel.1 type vxlan learning",
            "ip link set flannel.1 type vxlan local 10.168.0.77",
            "ip link set flannel.1 down",
            "ip link del flannel.1",
        ] {
            run(line);
            let claim = &want.claim;
            let differs = |have: &HostState| {
                !plan(&Desired { host: want.host.clone(), claim: claim.clone() }, have, Scope::All).steps.is_empty()
            };
            eventually(&format!("`{line}` is seen"), &mut kernel, differs);
            settle(&mut kernel, &want);
            assert_mirror_is_true(&mut kernel, &[line.to_owned()]);
            let left = plan(&want, kernel.mirror(), Scope::All);
            assert!(left.steps.is_empty(), "after `{line}`: {left:#?}");
        }
        run("sysctl -qw net.ipv4.ip_forward=0");
        assert_eq!(kernel.poll_sysctls().len(), 1);
        settle(&mut kernel, &want);
        assert_eq!(run("sysctl -n net.ipv4.ip_forward").trim(), "1");
    });
}

#[test]
fn what_nothing_wants_is_removed_and_what_is_not_ours_stays() {
    in_namespace("what_nothing_wants_is_removed_and_what_is_not_ours_stays", || {
        underlay();
        run("ip route add 192.0.2.0/24 via 10.168.0.9");
        let mut kernel = LinuxKernel::open(interest()).unwrap();
        let mut want = desired(3);
        settle(&mut kernel, &want);
        want.host = HostState::new();
        settle(&mut kernel, &want);
        assert!(!run("ip link").contains("flannel.1"));
        assert!(run("ip route").contains("192.0.2.0/24 via 10.168.0.9 dev eth0"));
    });
}

#[test]
fn a_refused_step_skips_what_needs_it_alone() {
    in_namespace("a_refused_step_skips_what_needs_it_alone", || {
        underlay();
        let mut kernel = LinuxKernel::open(interest()).unwrap();
        let want = desired(2);
        // Somebody else has the same VNI and port under another name: the kernel refuses ours.
        run("ip link add vx type vxlan id 1 dstport 8472 dev eth0 nolearning");
        kernel.changes(Some(Duration::ZERO)).unwrap();
        let todo = plan(&want, kernel.mirror(), Scope::All);
        let outcome = kernel.apply(&todo);
        let forward = todo.steps.iter().position(|s| s.op.object().key() == Key::Sysctl("net/ipv4/ip_forward".into()));
        for (n, result) in outcome.steps.iter().enumerate() {
            assert_eq!(result.is_ok(), Some(n) == forward, "{}: {result:?}", todo.steps[n]);
        }
        let error = outcome.steps[0].as_ref().unwrap_err().to_string();
        assert!(error.contains("VNI") || error.contains("exists"), "{error}");
    });
}

#[test]
fn effect_is_the_kernels_answer() {
    in_namespace("effect_is_the_kernels_answer", || {
        underlay();
        let mut kernel = LinuxKernel::open(interest()).unwrap();
        let want = desired(4);
        settle(&mut kernel, &want);
        let mut twin = kernel.mirror().clone();
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        for round in 0..150 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let all: Vec<Object> =
                want.host.iter().map(|(_, o)| o.clone()).filter(|o| !matches!(o, Object::Sysctl { .. })).collect();
            let object = all[(seed % all.len() as u64) as usize].clone();
            let op = match (twin.get(&object.key()).cloned(), object) {
                (None, object) => Op::Create(object),
                (Some(from), Object::Link(link)) => {
                    let mut to = (*link).clone();
                    to.up = seed & 0x100 != 0;
                    to.mac = Some(MacAddr([2, 0, 0, 0, 1, (seed >> 32) as u8]));
                    Op::Update { from, to: Object::Link(Box::new(to)) }
                }
                (Some(from), _) => Op::Delete(from),
            };
            let step = Step { op: op.clone(), needs: vec![], why: Why::Missing };
            let outcome = kernel.apply(&Plan { steps: vec![step] });
            if outcome.steps[0].is_err() {
                continue; // the kernel refuses, and nothing has happened
            }
            effect(&mut twin, &op);
            kernel.read(Scope::All).unwrap();
            let ours = |state: &HostState| -> Vec<Object> {
                // IPv6 link-local addresses and routes come by themselves, some time after the device.
                let by_itself = |o: &Object| match o {
                    Object::Addr(a) => a.inet.addr.is_ipv6(),
                    Object::Route(r) => !r.key.dst.is_v4(),
                    _ => false,
                };
                state
                    .iter()
                    .filter(|(k, o)| !matches!(k, Key::Link(l) if l.as_str() != "flannel.1") && !by_itself(o))
                    .map(|(_, o)| o.clone())
                    .collect()
            };
            let (have, expect) = (ours(kernel.mirror()), ours(&twin));
            assert_eq!(have.len(), expect.len(), "round {round}, {op}:\nkernel {have:#?}\ntwin {expect:#?}");
            for (have, expect) in have.iter().zip(&expect) {
                assert!(expect.satisfied_by(have), "round {round}, {op}: {expect} is {have}");
            }
        }
    });
}

/// One draw of a random command that somebody could type. `n` is any number.
fn mischief(n: u64) -> String {
    let pick = |shift: u32, list: &[&str]| list[(n >> shift) as usize % list.len()].to_owned();
    let dev = pick(8, &["eth0", "flannel.1", "br0", "dum0", "vx2"]);
    let verb = pick(16, &["add", "del", "replace", "append", "prepend", "change"]);
    let dst = pick(24, &["10.1.101.0/24", "10.1.102.0/24", "192.0.2.0/25", "default", "fd00:1::/64", "fd00:2::/64"]);
    let v6 = dst.starts_with("fd");
    let via = if v6 { pick(32, &["fd00:9::9", "fd00:9::8"]) } else { pick(32, &["10.168.0.9", "10.1.101.0"]) };
    let tail = pick(40, &["", "metric 7", "table 77", "proto static", "proto 116", "src 10.168.0.2"]);
    let tail = if v6 && tail.starts_with("src") { String::new() } else { tail };
    let on = pick(48, &["up", "down"]);
    let mac = pick(40, &["02:00:00:00:00:01", "02:00:00:00:00:02", "5e:00:00:00:00:01"]);
    match n % 16 {
        0 => format!("ip link set {dev} {on}"),
        1 => format!("ip link set {dev} address {mac}"),
        2 => format!("ip link set {dev} mtu {}", pick(32, &["1200", "1300", "1500"])),
        3 => format!(
            "ip addr {} {} dev {dev}",
            pick(16, &["add", "del"]),
            pick(24, &["10.168.0.2/24", "10.9.0.1/16", "10.9.0.2/16", "fd00:9::1/64"])
        ),
        4..=6 if n & 0x80 == 0 => format!("ip route {verb} {dst} via {via} dev {dev} onlink {tail}"),
        4..=6 => format!("ip route {verb} {dst} dev {dev} {tail}"),
        7 => format!("ip route {verb} {} {dst} {tail}", pick(32, &["blackhole", "unreachable", "prohibit"])),
        8 => {
            format!("ip route {verb} {dst} {tail} nexthop via {via} dev {dev} onlink nexthop via {via} dev eth0 onlink")
        }
        9 => format!(
            "ip neigh {} {via} lladdr {mac} dev {dev} nud {}",
            pick(16, &["add", "replace"]),
            pick(24, &["permanent", "noarp"])
        ),
        10 => format!("ip neigh del {via} dev {dev}"),
        11 => format!(
            "bridge fdb {} {mac} dev {} dst {}",
            pick(16, &["add", "replace", "del"]),
            pick(8, &["flannel.1", "vx2"]),
            pick(24, &["10.168.0.9", "10.168.0.8"])
        ),
        12 => format!(
            "bridge fdb {} 00:00:00:00:00:00 dev {} dst {}",
            pick(16, &["append", "del"]),
            pick(8, &["flannel.1", "vx2"]),
            pick(24, &["10.168.0.9", "10.168.0.8", "10.168.0.7"])
        ),
        _ => link_mischief(n),
    }
}

/// As [`mischief`], with devices that come, go and change their names and masters.
fn link_mischief(n: u64) -> String {
    let pick = |list: &[&str]| list[(n >> 16) as usize % list.len()].to_owned();
    match n >> 8 & 15 {
        0 => "ip link del vx2".into(),
        1 | 2 => "ip link add vx2 type vxlan id 2 dstport 4789 dev eth0".into(),
        3 => "ip link set vx2 master br0".into(),
        4 | 5 => format!("ip link set dum0 {}", pick(&["master br0", "nomaster"])),
        6 => "ip link del br0".into(),
        7 | 8 => "ip link add br0 type bridge".into(),
        9 => format!("bridge fdb {} 02:00:00:00:00:01 dev dum0 master static", pick(&["add", "del"])),
        10 => "ip link set dum0 name dum1".into(),
        11 | 12 => "ip link set dum1 name dum0".into(),
        13 => format!("ip rule {} from 10.9.0.0/16 table 77 priority 100", pick(&["add", "del"])),
        14 => "ip link del dum0".into(),
        _ => "ip link add dum0 type veth peer name dum9".into(),
    }
}

#[test]
fn the_mirror_is_true_whatever_somebody_types() {
    in_namespace("the_mirror_is_true_whatever_somebody_types", || {
        underlay();
        run("ip link add dum0 type veth peer name dum9");
        run("ip link set dum9 up");
        let interest = Interest { devices: Some([name("flannel.1"), name("br0"), name("vx2")].into()), ..interest() };
        let mut kernel = LinuxKernel::open(interest).unwrap();
        settle(&mut kernel, &desired(3));
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
        // SEED and ROUNDS search further.
        let mut seed: u64 = number("SEED").unwrap_or(0x2545_f491_4f6c_dd1d);
        let mut typed = Vec::new();
        for _ in 0..number("ROUNDS").unwrap_or(100) {
            for _ in 0..=seed & 1 {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let line = mischief(seed >> 3);
                let mut words = line.split_whitespace();
                let done = Command::new(words.next().unwrap()).args(words).output().unwrap();
                typed.push(format!("{line} -> {}", String::from_utf8_lossy(&done.stderr).trim()));
            }
            assert_mirror_is_true(&mut kernel, &typed[typed.len().saturating_sub(12)..]);
        }
    });
}

/// What a kernel's mirror makes the plan say, when each wanted object in turn is deleted and each field of the device altered.
fn transcript(kernel: &mut impl Kernel, want: &Desired) -> Vec<String> {
    let mut said = Vec::new();
    let deleted = want.host.iter().filter(|(_, o)| !matches!(o, Object::Sysctl { .. })).map(|(key, _)| {
        let key = key.clone();
        Box::new(move |have: &HostState| Op::Delete(have.get(&key).unwrap().clone())) as Box<dyn Fn(&HostState) -> Op>
    });
    let alter = |change: fn(&mut Link)| {
        Box::new(move |have: &HostState| {
            let from = have.link(name("flannel.1")).unwrap().clone();
            let mut to = from.clone();
            change(&mut to);
            Op::Update { from: Object::Link(Box::new(from)), to: Object::Link(Box::new(to)) }
        }) as Box<dyn Fn(&HostState) -> Op>
    };
    let altered = [
        alter(|link| link.up = false),
        alter(|link| link.mac = Some(MacAddr([2, 0, 0, 0, 0, 1]))),
        alter(|link| link.mtu = Some(Mtu::try_from(1400).unwrap())),
        alter(|link| {
            let LinkKind::Vxlan(vxlan) = &mut link.kind else { return };
            vxlan.learning = true;
        }),
    ];
    let sysctl: Box<dyn Fn(&HostState) -> Op> = Box::new(|have| {
        let from = have.get(&Key::Sysctl("net/ipv4/ip_forward".into())).unwrap().clone();
        Op::Update { from, to: Object::Sysctl { path: "net/ipv4/ip_forward".into(), value: "0".into() } }
    });
    for harm in deleted.chain(altered).chain([sysctl]) {
        let op = harm(kernel.mirror());
        said.push(format!("# {} {:?}", op.verb(), op.object().key()));
        let outcome = kernel.apply(&Plan { steps: vec![Step { op, needs: vec![], why: Why::Differs }] });
        assert!(outcome.steps[0].is_ok(), "{said:?}: {:?}", outcome.steps);
        kernel.changes(Some(Duration::ZERO)).unwrap();
        let repair = plan(want, kernel.mirror(), Scope::All);
        said.extend(repair.steps.iter().map(|s| format!("{} {:?} {:?}", s.op.verb(), s.op.object().key(), s.why)));
        let outcome = kernel.apply(&repair);
        assert!(outcome.steps.iter().all(Result::is_ok), "{said:?}: {:?}", outcome.steps);
        kernel.changes(Some(Duration::ZERO)).unwrap();
        let left = plan(want, kernel.mirror(), Scope::All);
        assert!(left.steps.is_empty(), "{said:?}: {left:?}");
        want.host.iter().for_each(|(key, object)| assert!(object.satisfied_by(kernel.mirror().get(key).unwrap())));
    }
    said
}

#[test]
fn the_twin_and_the_kernel_need_the_same_repairs() {
    in_namespace("the_twin_and_the_kernel_need_the_same_repairs", || {
        underlay();
        let mut kernel = LinuxKernel::open(interest()).unwrap();
        let want = desired(3);
        settle(&mut kernel, &want);
        let mut twin = MemoryKernel::default();
        kernel.mirror().iter().for_each(|(_, object)| twin.meddle(&Op::Create(object.clone())));
        let (real, twin) = (transcript(&mut kernel, &want), transcript(&mut twin, &want));
        assert!(real.len() > 40, "{real:#?}");
        assert_eq!(real, twin);
    });
}

#[test]
fn an_entry_with_several_hosts_has_exactly_those_wanted() {
    in_namespace("an_entry_with_several_hosts_has_exactly_those_wanted", || {
        underlay();
        let mut kernel = LinuxKernel::open(interest()).unwrap();
        settle(&mut kernel, &desired(0));
        let flood = |hosts: &[&str]| {
            let dst: Few<std::net::IpAddr> = hosts.iter().map(|h| h.parse().unwrap()).collect::<Vec<_>>().into();
            let (link, mac) = (name("flannel.1"), MacAddr::ZERO);
            Object::Fdb(entry(link, mac, dst))
        };
        let (two, other) = (flood(&["10.168.0.3", "10.168.0.4"]), flood(&["10.168.0.4", "10.168.0.5", "10.168.0.6"]));
        let steps: [(Op, &[&str]); 3] = [
            (Op::Create(two.clone()), &["10.168.0.3", "10.168.0.4"]),
            (Op::Update { from: two, to: other.clone() }, &["10.168.0.4", "10.168.0.5", "10.168.0.6"]),
            (Op::Delete(other), &[]),
        ];
        for (op, hosts) in steps {
            let outcome = kernel.apply(&Plan { steps: vec![Step { op, needs: vec![], why: Why::Differs }] });
            assert!(outcome.steps[0].is_ok(), "{:?}", outcome.steps);
            let shown = run("bridge fdb show dev flannel.1");
            let mut shown: Vec<&str> = shown.lines().filter_map(|l| l.split(' ').nth(2)).collect();
            shown.sort_unstable();
            assert_eq!(shown, hosts);
            assert_mirror_is_true(&mut kernel, &[]);
        }
    });
}
