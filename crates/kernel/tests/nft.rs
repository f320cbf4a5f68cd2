//! nftables on the real kernel, in a network namespace of the test's own: what is written is read back, and does what it says.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::disallowed_methods, reason = "a test")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, IoSlice};
use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use twill_core::firewall::*;
use twill_core::host::{HostState, Key, Object};
use twill_core::net::{LinkName, Prefix, ip_from_bits, ip_to_bits};
use twill_core::reconcile::{Op, Plan, Step, Why};
use twill_kernel::nft::codec;
use twill_kernel::tun::{HEADER, Offloads, Tun, TunDevice};
use twill_kernel::{Interest, Kernel, LinuxKernel};

use common::{in_namespace, in_namespace_with_tun, run};

fn kernel() -> LinuxKernel {
    LinuxKernel::open(Interest { firewall: true, ..Interest::default() }).unwrap()
}

/// Brings our table to what is wanted, whatever is there.
fn apply(kernel: &mut LinuxKernel, table: &Table) {
    let to = Object::Table(Box::new(table.clone()));
    let op = match kernel.mirror().get(&to.key()) {
        Some(from) => Op::Update { from: from.clone(), to },
        None => Op::Create(to),
    };
    let outcome = kernel.apply(&Plan { steps: vec![Step { op, needs: Vec::new(), why: Why::Missing }] });
    assert!(outcome.steps.iter().all(Result::is_ok), "{:?}\n{table:#?}", outcome.steps);
}

fn table_of(host: &HostState) -> Option<&Table> {
    match host.get(&Key::Table(TableName::twill())) {
        Some(Object::Table(table)) => Some(table),
        _ => None,
    }
}

/// A field of any kind, with the bits that count and a value of its own.
fn comparison() -> impl Strategy<Value = Expr> {
    let meta = [
        Field::Iif,
        Field::Oif,
        Field::NfProto,
        Field::L4Proto,
        Field::Mark,
        Field::CtState,
        Field::CtStatus,
        Field::DstType,
    ];
    let base = prop_oneof![Just(PayloadBase::Link), Just(PayloadBase::Network), Just(PayloadBase::Transport)];
    let payload = (base, 0..60u8, 1..17u8).prop_map(|(base, offset, len)| Field::from_payload(base, offset, len));
    // The beginning of an address is read as a network.
    let payload = payload.prop_filter("", |field| [true, false].iter().all(|v4| field.address_begun(*v4).is_none()));
    let named =
        [Field::SrcV4, Field::DstV4, Field::SrcV6, Field::DstV6, Field::SrcPort, Field::DstPort, Field::TcpFlags];
    let field = prop_oneof![proptest::sample::select(meta.to_vec()), proptest::sample::select(named.to_vec()), payload];
    let op = proptest::sample::select(vec![Cmp::Eq, Cmp::Ne, Cmp::Lt, Cmp::Le, Cmp::Gt, Cmp::Ge]);
    (field, op, any::<[u8; 16]>(), any::<[u8; 16]>(), any::<bool>(), "[a-z]{1,15}").prop_map(
        |(field, op, value, mask, masked, name)| {
            let datum = |bytes: [u8; 16]| match field.kind() {
                Type::Name => Datum::Name(name.parse().unwrap()),
                kind => kind.read(&bytes[..kind.len()]).unwrap(),
            };
            let mask = (masked && field.kind() != Type::Name).then(|| datum(mask));
            Expr::Match { load: Load { field, mask }, op, value: datum(value) }
        },
    )
}

/// A rule for a chain that may masquerade, clamp, and jump to `to`; or not.
fn rule(nat: bool, to: Option<&'static str>) -> impl Strategy<Value = Rule> {
    let verdicts = [Verdict::Accept, Verdict::Drop, Verdict::Continue, Verdict::Return];
    let jumps = to.map(|to| [Verdict::Jump(to.into()), Verdict::Goto(to.into())]);
    let verdicts: Vec<_> = verdicts.into_iter().chain(jumps.into_iter().flatten()).collect();
    let last = proptest::sample::select(verdicts).prop_map(Expr::Verdict);
    let special = if nat {
        any::<bool>().prop_map(|fully_random| Expr::Masquerade { fully_random }).boxed()
    } else {
        prop_oneof![Just(Expr::ClampMaxSeg), Just(Expr::Notrack)].boxed()
    };
    let end = prop_oneof![3 => last, 1 => special];
    let comment = proptest::option::of("[ -!#-~]{1,100}");
    let compared = prop_oneof![4 => comparison(), 1 => member()];
    (proptest::collection::vec(compared, 0..4), any::<bool>(), end, comment).prop_map(
        |(mut exprs, counted, end, comment)| {
            exprs.extend(counted.then_some(Expr::Counter));
            exprs.push(end);
            Rule { exprs, comment: comment.map(Into::into), handle: None }
        },
    )
}

fn led(mut to: SocketAddr) -> Rule {
    // Neither flow label nor scope is an address.
    to = SocketAddr::new(to.ip(), to.port());
    Rule::new([Expr::Counter, Expr::Dnat(to), Expr::Verdict(Verdict::Return)])
}

/// Two sets of addresses, one of each family, and a question for them.
const SETS: [(&str, Field); 2] = [("peers", Field::SrcV4), ("six", Field::DstV6)];

fn member() -> impl Strategy<Value = Expr> {
    let masked = any::<Option<[u8; 16]>>();
    (proptest::sample::select(SETS.to_vec()), masked, any::<bool>()).prop_map(|((set, field), mask, inside)| {
        let mask = mask.map(|bytes| field.kind().read(&bytes[..field.kind().len()]).unwrap());
        Expr::Member { loads: vec![Load { field, mask }], set: set.into(), inside, keys: Vec::new() }
    })
}

fn sets() -> impl Strategy<Value = BTreeMap<Box<str>, Set>> {
    let of = |v4| {
        let address = any::<[u8; 16]>().prop_map(move |bytes| match v4 {
            true => IpAddr::from(<[u8; 4]>::try_from(&bytes[..4]).unwrap()),
            false => IpAddr::from(bytes),
        });
        proptest::collection::btree_set(address, 0..40).prop_map(move |elements| Set { v4, elements })
    };
    (of(true), of(false))
        .prop_map(|sets| SETS.map(|(name, _)| name.into()).into_iter().zip(<[Set; 2]>::from(sets)).collect())
}

fn table() -> impl Strategy<Value = Table> {
    let rules = |nat, to| proptest::collection::vec(rule(nat, to), 0..6);
    let all = (rules(false, Some("inner")), rules(true, None), rules(false, None), sets(), -400..400i32, any::<bool>());
    all.prop_map(|(forward, leaving, inner, sets, priority, drops)| {
        let base = |kind, hook, priority| Some(Base { kind, hook, priority, drops });
        let chains = [
            ("forward", base(ChainKind::Filter, Hook::Forward, priority), forward),
            ("leaving", base(ChainKind::Nat, Hook::Postrouting, priority.max(-199)), leaving),
            ("inner", None, inner),
        ];
        let chains = chains.map(|(name, base, rules)| (name.into(), Chain { base, rules }));
        Table {
            name: TableName::twill(),
            comment: Some(policy::TAG.into()),
            dormant: false,
            owner: None,
            others: BTreeSet::new(),
            sets,
            chains: chains.into(),
        }
    })
}

#[test]
fn a_table_is_read_back_as_it_was_written() {
    in_namespace("a_table_is_read_back_as_it_was_written", || {
        let mut writer = kernel();
        let mut runner = TestRunner::new(Config { cases: 200, failure_persistence: None, ..Config::default() });
        let law = |table: Table| {
            apply(&mut writer, &table);
            let fresh = kernel();
            prop_assert_eq!(table_of(fresh.mirror()), Some(&table));
            Ok(())
        };
        let law = std::cell::RefCell::new(law);
        runner.run(&table(), |table| (law.borrow_mut())(table)).unwrap();
    });
}

proptest! {
    #[test]
    fn a_rule_is_the_same_after_its_bytes(
        rule in prop_oneof![rule(true, None), rule(false, Some("inner")), any::<SocketAddr>().prop_map(led)]
    ) {
        prop_assert_eq!(codec::read(&codec::write(&rule)), rule);
    }
}

#[test]
fn elements_change_and_the_rest_of_the_table_is_not_touched() {
    in_namespace("elements_change_and_the_rest_of_the_table_is_not_touched", || {
        let mut writer = kernel();
        let at = "192.0.2.1:8285".parse().unwrap();
        let mut table = Policy { socket: Some(at), ..Policy::default() }.table();
        let mut with = |hosts: std::ops::Range<u32>| {
            let elements = hosts.map(|n| IpAddr::from((0x0a00_0000 + n).to_be_bytes())).collect();
            table.sets.get_mut(policy::PEERS).unwrap().elements = elements;
            writer.changes(Some(std::time::Duration::ZERO)).unwrap();
            apply(&mut writer, &table);
            assert_eq!(table_of(kernel().mirror()), Some(&table));
            assert!(table_of(writer.mirror()) == Some(&table));
        };
        with(0..3);
        // A handle is never given twice: who replaces a rule gets another.
        let handles = || run("nft -a list chain inet twill strangers");
        let before = handles();
        with(1..10_000);
        with(9_000..9_002);
        assert_eq!(handles(), before);
        assert!(run("nft list set inet twill peers").contains("elements = { 10.0.35.40, 10.0.35.41 }"));
        // Somebody else's change is seen, and repaired by the same step.
        run("nft delete element inet twill peers { 10.0.35.40 }");
        with(9_000..9_002);
        assert_eq!(handles(), before);
    });
}

#[test]
fn a_ruleset_that_was_saved_and_loaded_is_the_same() {
    in_namespace("a_ruleset_that_was_saved_and_loaded_is_the_same", || {
        let mut writer = kernel();
        let nets = |all: &[&str]| all.iter().map(|text| text.parse().unwrap()).collect::<Vec<Prefix>>();
        for networks in [["10.0.0.0/8", "fd00::/8"], ["10.1.0.0/16", "fd00:1::/48"], ["10.1.2.0/23", "fd00:1::/49"]] {
            let policy = Policy {
                networks: nets(&networks),
                subnets: nets(&["10.1.2.0/24", "fd00:1::/64"]),
                excluded: nets(&["192.0.2.7/32", "2001:db8::/32", "100.64.0.0/10"]),
                tunnels: vec!["flannel.1".parse().unwrap()],
                outer: vec!["192.0.2.1:8472".parse().unwrap(), "[2001:db8::1]:8472".parse().unwrap()],
                socket: Some("192.0.2.1:8285".parse().unwrap()),
                masquerade: true,
                clamp: true,
            };
            let mut table = policy.table();
            table.sets.get_mut(policy::PEERS).unwrap().elements =
                ["192.0.2.2", "192.0.2.9"].map(|ip| ip.parse().unwrap()).into();
            writer.changes(Some(std::time::Duration::ZERO)).unwrap();
            apply(&mut writer, &table);
            let saved = std::env::temp_dir().join(format!("twill-ruleset-{}", std::process::id()));
            std::fs::write(&saved, format!("flush ruleset\n{}", run("nft list ruleset"))).unwrap();
            run(&format!("nft -f {}", saved.display()));
            std::fs::remove_file(&saved).unwrap();
            assert_eq!(table_of(kernel().mirror()), Some(&table));
        }
    });
}

#[test]
fn a_refused_transaction_changes_nothing() {
    in_namespace("a_refused_transaction_changes_nothing", || {
        let mut writer = kernel();
        let policy = Policy { networks: vec!["10.1.0.0/16".parse().unwrap()], masquerade: true, ..Policy::default() };
        let good = policy.table();
        apply(&mut writer, &good);
        let mut bad = good.clone();
        let nowhere = Rule { exprs: vec![Expr::Verdict(Verdict::Jump("nowhere".into()))], comment: None, handle: None };
        bad.chains.get_mut("leaving").unwrap().rules.push(nowhere);
        let (from, to) = (Object::Table(Box::new(good.clone())), Object::Table(Box::new(bad)));
        let step = Step { op: Op::Update { from, to }, needs: Vec::new(), why: Why::Differs };
        let outcome = writer.apply(&Plan { steps: vec![step] });
        assert!(outcome.steps[0].is_err());
        assert_eq!(table_of(kernel().mirror()), Some(&good));
        assert_eq!(table_of(writer.mirror()), Some(&good));
    });
}

/// Where a packet comes from, goes to, and what is known of it: all that the model looks at.
#[derive(Debug, Clone, Copy)]
struct Packet {
    from: Device,
    src: IpAddr,
    dst: IpAddr,
    marked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Device {
    Bridge,
    Tunnel,
    Outside,
}

const DEVICES: [(Device, &str); 3] =
    [(Device::Bridge, "cni0"), (Device::Tunnel, "flannel.1"), (Device::Outside, "eth0")];

/// A family's networks, and the node's own address on each device.
#[derive(Debug, Clone)]
struct Site {
    network: Prefix,
    subnet: Prefix,
    excluded: Vec<Prefix>,
    own: [IpAddr; 3],
}

/// Bytes as an address of a family.
fn ip(v4: bool, bytes: [u8; 16]) -> IpAddr {
    if v4 { IpAddr::from(<[u8; 4]>::try_from(&bytes[..4]).unwrap()) } else { IpAddr::from(bytes) }
}

/// An address that a packet may come from and go to.
fn is_routed(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => (1..224).contains(&ip.octets()[0]) && !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => (0x2000..0x4000).contains(&ip.segments()[0]) || ip.segments()[0] >> 8 == 0xfd,
    }
}

/// A network of any length with a subnet and up to three networks that are excluded, inside or outside.
fn site(v4: bool) -> impl Strategy<Value = Site> {
    let (lens, bits): (std::ops::Range<u8>, u8) = if v4 { (4..25, 32) } else { (8..65, 128) };
    let excluded = proptest::collection::vec((any::<[u8; 16]>(), any::<bool>(), 0..=bits), 0..4);
    (any::<[u8; 16]>(), lens, 2..bits, excluded).prop_filter_map(
        "a network of the node's address",
        move |(bytes, len, more, excluded)| {
            let inner = ip(v4, bytes);
            let network = Prefix::truncate(inner, len).unwrap();
            let subnet = Prefix::truncate(inner, (len + more).min(bits - 2)).unwrap();
            let outside: IpAddr = if v4 { "198.51.100.1" } else { "2001:db8:51::1" }.parse().unwrap();
            let excluded = excluded.into_iter().map(|(other, inside, len)| {
                let around = Prefix::truncate(if inside { inner } else { ip(v4, other) }, len);
                around.unwrap()
            });
            let own = [subnet.nth(1).unwrap(), subnet.addr(), outside];
            let good = is_routed(network.addr())
                && is_routed(network.last())
                && !network.contains(outside)
                && subnet != network;
            good.then(|| Site { network, subnet, excluded: excluded.collect(), own })
        },
    )
}

/// The model, by hand: the device that the packet leaves by and the source that it then has; `None`: it goes nowhere.
fn expected(policy: &Policy, site: &Site, packet: &Packet) -> Option<(Device, IpAddr)> {
    let (of_node, of_network) = (|ip| site.subnet.contains(ip), |ip| site.network.contains(ip));
    let of_policy = policy.networks.contains(&site.network);
    let guarded = of_policy && !policy.tunnels.is_empty();
    let to = match packet.dst {
        dst if of_node(dst) => Device::Bridge,
        dst if of_network(dst) => Device::Tunnel,
        _ => Device::Outside,
    };
    let comes_back = packet.from == Device::Tunnel && of_node(packet.src);
    let stolen =
        packet.from != Device::Tunnel && to == Device::Tunnel && of_network(packet.src) && !of_node(packet.src);
    if guarded && (comes_back || stolen) {
        return None;
    }
    // Where the list names addresses of the network itself, it holds for them as well.
    let kept = of_network(packet.src) && policy.excluded.iter().any(|net| net.contains(packet.dst));
    let leaves = of_network(packet.src) && to == Device::Outside;
    let enters = !of_network(packet.src) && to == Device::Tunnel;
    let passes_through = of_network(packet.src) && !of_node(packet.src) && to == Device::Tunnel;
    let changed = of_policy && policy.masquerade && !packet.marked && !kept && (leaves || enters || passes_through);
    Some((to, if changed { site.own[to as usize] } else { packet.src }))
}

/// UDP with no checksum and a number in its ports, over the family of its addresses.
fn bytes(packet: &Packet, number: u16) -> Vec<u8> {
    let source = (number << 1) | u16::from(packet.marked);
    let mut udp = [source.to_be_bytes(), number.to_be_bytes(), [0, 12], [0, 0]].concat();
    udp.extend_from_slice(b"twil");
    match (packet.src, packet.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut header = vec![0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0];
            header.extend(src.octets().into_iter().chain(dst.octets()));
            let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
            let sum = !(((sum >> 16) + (sum & 0xffff)) as u16);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            [header, udp].concat()
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 12, 17, 64];
            header.extend(src.octets().into_iter().chain(dst.octets()));
            [header, udp].concat()
        }
        _ => panic!("one family"),
    }
}

/// The source of a packet that carries this number to this destination.
fn source(bytes: &[u8], number: u16, v4: bool) -> Option<IpAddr> {
    let (protocol, at, len, udp) = if v4 { (9, 12, 4, 20) } else { (6, 8, 16, 40) };
    // The node tells of a better way (ICMP), and then a checksum stands where the port does.
    let same = bytes[0] >> 4 == if v4 { 4 } else { 6 }
        && bytes.get(protocol) == Some(&17)
        && bytes.get(udp + 2..udp + 4)? == number.to_be_bytes();
    let address = &bytes[at..at + len];
    same.then(|| match v4 {
        true => IpAddr::from(<[u8; 4]>::try_from(address).unwrap()),
        false => IpAddr::from(<[u8; 16]>::try_from(address).unwrap()),
    })
}

/// Three devices that the test holds the other ends of.
fn node() -> BTreeMap<Device, TunDevice> {
    let mut held = BTreeMap::new();
    for (device, name) in DEVICES {
        held.insert(device, TunDevice::open(name, Offloads::NONE).unwrap());
        run(&format!("ip link set {name} up"));
    }
    run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0");
    for (_, name) in DEVICES {
        run(&format!("sysctl -qw net/ipv4/conf/{name}/rp_filter=0"));
    }
    // Who has an odd source port is marked, with a bit of somebody else's beside flannel's.
    run("nft add table inet marks");
    run("nft add chain inet marks odd { type filter hook prerouting priority -200 ; }");
    run("nft add rule inet marks odd udp sport & 1 == 1 meta mark set 0x4001");
    held
}

/// The addresses and routes of a node, and none of another site's.
fn place(sites: &[Site]) {
    for (_, name) in DEVICES {
        for act in ["link set dev {} down", "addr flush dev {}", "link set dev {} up"] {
            run(&format!("ip {}", act.replace("{}", name)));
        }
    }
    for Site { network, subnet, own, .. } in sites {
        let (family, nodad) = if network.is_v4() { ("-4", "") } else { ("-6", "nodad") };
        for (device, name) in DEVICES {
            run(&format!("ip addr add {} dev {name} {nodad}", Prefix::host(own[device as usize])));
        }
        for (to, device) in
            [(subnet.to_string(), "cni0"), (network.to_string(), "flannel.1"), ("default".into(), "eth0")]
        {
            run(&format!("ip {family} route add {to} dev {device}"));
        }
    }
}

/// What comes out, and where, when a packet goes in. The kernel is done with it when the write returns (drivers/net/tun.c
/// `tun_rx_batched`).
fn forwarded(devices: &BTreeMap<Device, TunDevice>, packet: &Packet, number: u16) -> Option<(Device, IpAddr)> {
    let (header, bytes) = ([0; HEADER], bytes(packet, number));
    devices[&packet.from].write(&[IoSlice::new(&header), IoSlice::new(&bytes)]).unwrap();
    let mut out = None;
    for (device, tun) in devices {
        loop {
            let (mut header, mut room) = ([0; HEADER], [0; 2048]);
            match tun.read(&mut header, &mut room) {
                Ok(len) => {
                    let seen = source(&room[..len], number, packet.src.is_ipv4()).map(|src| (*device, src));
                    out = out.or(seen);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
    out
}

/// A packet between two places of a site, which are drawn before the site is known.
#[derive(Debug, Clone)]
struct Draw {
    from: Device,
    ends: [(usize, [u8; 16]); 2],
    marked: bool,
}

fn draw() -> impl Strategy<Value = Draw> {
    let end = || (0..6usize, any::<[u8; 16]>());
    let device = proptest::sample::select(DEVICES.map(|(device, _)| device).to_vec());
    (device, end(), end(), any::<bool>()).prop_map(|(from, src, dst, marked)| Draw { from, ends: [src, dst], marked })
}

/// The packet; `None`: nobody sends it, or it is for the node itself.
fn packet(site: &Site, draw: &Draw) -> Option<Packet> {
    let v4 = site.network.is_v4();
    let [src, dst] = draw.ends.map(|(place, bytes)| {
        let anywhere = if v4 { Prefix::DEFAULT_V4 } else { Prefix::DEFAULT_V6 };
        let places = [
            Some(&site.subnet),
            Some(&site.network),
            site.excluded.first(),
            site.excluded.get(1),
            site.excluded.get(2),
        ];
        let place = places.get(place).copied().flatten().unwrap_or(&anywhere);
        // The place's bits before those that are drawn.
        let (base, ones) = (ip_to_bits(place.addr()), ip_to_bits(place.last()) ^ ip_to_bits(place.addr()));
        ip_from_bits(&place.addr(), base | (ip_to_bits(ip(v4, bytes)) & ones))
    });
    let good = [src, dst].iter().all(|ip| is_routed(*ip) && !site.own.contains(ip)) && src != dst;
    good.then_some(Packet { from: draw.from, src, dst, marked: draw.marked })
}

#[test]
fn the_kernel_does_what_the_model_says() {
    in_namespace_with_tun("the_kernel_does_what_the_model_says", || {
        let devices = node();
        let mut writer = kernel();
        let (mut number, mut outcomes) = (0, std::collections::BTreeSet::new());
        let draws = || proptest::collection::vec(draw(), 40);
        let case = (site(true), site(false), [draws(), draws()], any::<[bool; 5]>());
        let mut law = |(four, six, draws, [masquerade, guarded, clamp, no_four, no_six]): (
            Site,
            Site,
            [Vec<Draw>; 2],
            [bool; 5],
        )| {
            let (tunnel, sites): (LinkName, _) = ("flannel.1".parse().unwrap(), [four, six]);
            let in_use = || {
                sites.iter().zip([no_four && !no_six, no_six && !no_four]).filter(|(_, not)| !not).map(|(site, _)| site)
            };
            let policy = Policy {
                networks: in_use().map(|site| site.network).collect(),
                subnets: in_use().map(|site| site.subnet).collect(),
                socket: None,
                excluded: sites.iter().flat_map(|site| site.excluded.clone()).collect(),
                tunnels: guarded.then_some(tunnel).into_iter().collect(),
                outer: guarded.then_some("203.0.113.1:8472".parse().unwrap()).into_iter().collect(),
                masquerade,
                clamp,
            };
            writer.changes(Some(std::time::Duration::ZERO)).unwrap();
            apply(&mut writer, &policy.table());
            place(&sites);
            for (site, draws) in sites.iter().zip(draws) {
                for packet in draws.iter().filter_map(|draw| packet(site, draw)) {
                    number += 1;
                    let (seen, wanted) = (forwarded(&devices, &packet, number), expected(&policy, site, &packet));
                    prop_assert_eq!(seen, wanted, "{:?} of {:?} under {:?}", packet, site, policy);
                    outcomes.insert(wanted.map(|(to, src)| (to, src == packet.src)));
                }
            }
            Ok(())
        };
        let mut runner = TestRunner::new(Config { cases: 60, failure_persistence: None, ..Config::default() });
        let law = std::cell::RefCell::new(&mut law);
        runner.run(&case, |case| (law.borrow_mut())(case)).unwrap();
        // Kept and changed on the way out and into the tunnel, kept to the bridge, and dropped: each has happened.
        assert_eq!(outcomes.len(), 6, "{outcomes:?}");
    });
}
