//! The properties of the plan, on random pairs of what is wanted and what is there.
//!
//! Each object has a few variants of which the first is the wanted one; what is there has any of them, or none. What could not stand in
//! a kernel (a neighbour on a device that is not there, a route through one that is down) is left out.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::collections::BTreeSet;
use std::net::IpAddr;

use proptest::prelude::*;
use twill_core::host::*;
use twill_core::net::*;
use twill_core::reconcile::{Claim, Desired, Op, Scope, effect, plan};

const V4: &str = "flannel.1";
const V6: &str = "flannel-v6.1";

fn name(text: &str) -> LinkName {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A tunnel device: as wanted, changed in place, to be made anew, down, or of another kind.
fn tunnel(device: &str) -> Vec<Object> {
    let make = |change: &dyn Fn(&mut Link, &mut Vxlan)| {
        let mut vxlan = Vxlan {
            remote: None,
            vni: Vni::try_from(1).unwrap(),
            port: Port::try_from(8472).unwrap(),
            local: Some(ip(if device == V4 { "10.168.0.2" } else { "fd00:168::2" })),
            lower: Some(name("eth0")),
            learning: false,
            gbp: false,
            outer: OuterHeader::default(),
            room: FdbRoom::default(),
            special: false,
        };
        let mut link = Link {
            mac: Some(MacAddr([2, 0, 0, 0, 0, 1])),
            mtu: Some(Mtu::try_from(1450).unwrap()),
            arp: Some(true),
            multicast: Some(true),
            protodown: Some(false),
            ..Link::up(name(device), LinkKind::Bridge)
        };
        change(&mut link, &mut vxlan);
        if link.carrier {
            link.kind = LinkKind::Vxlan(vxlan);
        }
        link.carrier = true;
        Object::Link(Box::new(link))
    };
    vec![
        make(&|_, _| {}),
        make(&|link, _| link.mtu = Some(Mtu::try_from(1400).unwrap())),
        make(&|link, _| link.mac = Some(MacAddr([2, 0, 0, 0, 0, 2]))),
        make(&|_, vxlan| vxlan.learning = true),
        make(&|_, vxlan| vxlan.lower = Some(name("eth1"))),
        make(&|_, vxlan| vxlan.outer.ttl = 1),
        make(&|link, _| link.arp = Some(false)),
        make(&|link, _| link.multicast = Some(false)),
        make(&|link, _| link.protodown = Some(true)),
        make(&|_, vxlan| vxlan.room.ageing = 7),
        make(&|link, _| link.master = Some(name("br0"))),
        make(&|link, _| link.up = false),
        make(&|_, vxlan| vxlan.vni = Vni::try_from(9).unwrap()),
        make(&|_, vxlan| vxlan.gbp = true),
        make(&|_, vxlan| vxlan.room.limit = 1),
        make(&|_, vxlan| vxlan.special = true),
        make(&|link, _| link.carrier = false),
    ]
}

fn address(device: &str, inet: &str) -> Vec<Object> {
    vec![Object::Addr(Addr::global(name(device), inet.parse().unwrap()))]
}

fn neigh(device: &str, address: &str) -> Vec<Object> {
    let make = |mac, permanent, special| {
        let (link, state) = (name(device), if permanent { 0x80 } else { 4 });
        let mac = Some(MacAddr([2, 0, 0, 0, 1, mac]));
        Object::Neigh(Neigh { link, ip: ip(address), mac, permanent, special, state })
    };
    vec![make(1, true, false), make(2, true, false), make(1, false, false), make(1, true, true)]
}

fn fdb(device: &str, mac: u8) -> Vec<Object> {
    let make = |host: u8, state: u16, special| {
        let (link, mac, dst) =
            (name(device), MacAddr([2, 0, 0, 0, 1, mac]), Few::One(IpAddr::from([10, 168, 0, host])));
        Object::Fdb(Fdb { link, mac, dst, port: None, permanent: state == 0x80, special, detour: None, state })
    };
    vec![make(3, 0x80, false), make(4, 0x80, false), make(3, 2, false), make(3, 0x80, true)]
}

/// A peer's route: as wanted, altered, flannel's, foreign, and with twins before and behind.
fn route(device: &str, dst: &str) -> Vec<Object> {
    let dst: Prefix = dst.parse().unwrap();
    let metric = if dst.is_v4() { 0 } else { 1024 };
    let entry = |dev: &str, protocol, via| RouteEntry {
        via: Some(via),
        dev: Some(name(dev)),
        onlink: true,
        protocol,
        kind: 1,
        scope: 0,
        extras: None,
        special: false,
        usurper: Remark(false),
    };
    let ours = entry(device, PROTO_TWILL, dst.addr());
    let other = entry(device, PROTO_TWILL, dst.last());
    let strays = entry("eth0", PROTO_TWILL, dst.addr());
    let flannels = entry(device, PROTO_BOOT, dst.addr());
    let altered = entry(device, 4, dst.addr());
    let foreign = entry("eth0", 4, dst.last());
    let special = RouteEntry { special: true, ..ours.clone() };
    let usurper = RouteEntry { usurper: Remark(true), ..foreign.clone() };
    [
        vec![ours.clone()],
        vec![other.clone()],
        vec![strays],
        vec![flannels.clone()],
        vec![altered],
        vec![special],
        vec![foreign.clone()],
        vec![usurper],
        vec![foreign.clone(), ours.clone()],
        vec![ours.clone(), foreign.clone()],
        vec![other.clone(), ours.clone(), foreign.clone()],
        vec![foreign.clone(), other, flannels.clone()],
        vec![ours, foreign, flannels],
    ]
    .into_iter()
    .map(|entries| {
        let key = RouteKey { table: TABLE_MAIN, dst, tos: 0, metric };
        Object::Route(Route { key, entries: entries.into() })
    })
    .collect()
}

fn sysctl(path: &str) -> Vec<Object> {
    ["1", "0"].map(|value| Object::Sysctl { path: path.into(), value: value.into() }).into()
}

/// Every object that a case may have, with its variants; devices first.
fn pool() -> Vec<Vec<Object>> {
    vec![
        tunnel(V4),
        tunnel(V6),
        address(V4, "10.1.15.0/32"),
        address(V6, "fd00:1:0:15::/128"),
        address(V4, "10.1.99.0/32"),
        neigh(V4, "10.1.16.0"),
        neigh(V4, "10.1.17.0"),
        neigh(V6, "fd00:1:0:16::"),
        fdb(V4, 1),
        fdb(V4, 2),
        fdb(V6, 1),
        route(V4, "10.1.16.0/24"),
        route(V4, "10.1.17.0/24"),
        route(V6, "fd00:1:0:16::/64"),
        sysctl("net/ipv4/ip_forward"),
        sysctl(&format!("net/ipv6/conf/{V6}/accept_ra")),
    ]
}

/// The underlay, which nobody wants and nobody owns.
fn ground() -> Vec<Object> {
    let device = |text: &str| {
        let kind = LinkKind::Other { name: "veth".into() };
        Object::Link(Box::new(Link::up(name(text), kind)))
    };
    vec![device("eth0"), device("eth1"), address("eth0", "10.168.0.2/24").remove(0)]
}

/// Takes out what cannot stand.
fn standing(objects: impl IntoIterator<Item = Object>) -> HostState {
    let mut host: HostState = objects.into_iter().collect();
    let up: BTreeSet<LinkName> =
        host.iter().filter_map(|(_, o)| if let Object::Link(l) = o { l.up.then_some(l.name) } else { None }).collect();
    let there: BTreeSet<LinkName> =
        host.iter().filter_map(|(k, _)| if let Key::Link(n) = k { Some(*n) } else { None }).collect();
    let tunnels: BTreeSet<LinkName> = host
        .iter()
        .filter_map(|(_, o)| match o {
            Object::Link(l) if matches!(l.kind, LinkKind::Vxlan(_)) => Some(l.name),
            _ => None,
        })
        .collect();
    host.retain(|_, object| match object {
        Object::Link(_) => true,
        Object::Addr(a) => there.contains(&a.link) && (a.inet.addr.is_ipv4() || up.contains(&a.link)),
        Object::Neigh(n) => up.contains(&n.link),
        Object::Fdb(f) => tunnels.contains(&f.link),
        Object::Route(r) => r.entries.as_slice().iter().all(|e| e.dev.is_none_or(|dev| up.contains(&dev))),
        Object::Sysctl { path, .. } => !path.contains(V6) || there.contains(&name(V6)),
        Object::Rule(_) | Object::Table(_) | Object::Head(_) | Object::Leftover(_) => true,
    });
    host
}

/// Wanted or not, and which variant is there (or none), for each object of the pool.
fn cases() -> impl Strategy<Value = (Desired, HostState)> {
    proptest::collection::vec(
        (any::<bool>(), proptest::option::weighted(0.8, any::<(bool, proptest::sample::Index)>())),
        pool().len(),
    )
    .prop_map(|choices| {
        let (mut want, mut have) = (Vec::new(), ground());
        for ((wanted, there), variants) in choices.iter().zip(pool()) {
            // A wanted device has its address, as every backend wants it: the last one takes the routes along.
            let of_device = matches!(variants[0], Object::Addr(_)) && !variants[0].to_string().contains(".99.");
            if *wanted || of_device {
                want.push(variants[0].clone());
            }
            // Half of what is there is as wanted.
            have.extend(
                there.as_ref().map(|(right, nth)| if *right { &variants[0] } else { nth.get(&variants) }).cloned(),
            );
        }
        let mut wanted = standing(want.into_iter().chain(ground()));
        ground().iter().for_each(|object| drop(wanted.remove(&object.key())));
        let claim = Claim {
            devices: [name(V4), name(V6)].into(),
            protocol: Some(PROTO_TWILL),
            networks: vec!["10.1.0.0/16".parse().unwrap(), "fd00:1::/48".parse().unwrap()],
            ..Claim::default()
        };
        (Desired { host: wanted, claim }, standing(have))
    })
}

/// The entries of a route that are not ours to change: all of others, but what took the place of a wanted one.
fn foreign(want: &Desired, host: &HostState) -> Vec<(RouteKey, RouteEntry)> {
    let routes = host.iter().filter_map(|(_, o)| if let Object::Route(r) = o { Some(r) } else { None });
    let entries = routes.flat_map(|r| r.entries.as_slice().iter().map(|e| (r.key, e.clone())));
    let usurps = |key: &RouteKey, e: &RouteEntry| e.usurper.0 && want.host.get(&Key::Route(*key)).is_some();
    entries.filter(|(key, e)| !usurps(key, e) && e.dev == Some(name("eth0")) && e.protocol != PROTO_TWILL).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_plan_that_is_applied_gives_what_is_wanted((want, before) in cases()) {
        let todo = plan(&want, &before, Scope::All);
        let mut have = before.clone();
        for step in &todo.steps {
            effect(&mut have, &step.op);
        }
        for (key, object) in want.host.iter() {
            let found = have.get(key);
            let right = match (object, found) {
                (Object::Route(wanted), Some(Object::Route(found))) => {
                    // Under whatever protocol number: on our device there is this entry and no other.
                    let on_ours = |e: &&RouteEntry| e.dev.is_some_and(|dev| want.claim.devices.contains(&dev));
                    let entries = found.entries.as_slice().iter();
                    let ours: Vec<_> = entries.filter(|e| on_ours(e) || want.claim.owns_entry(found, e)).collect();
                    ours == [wanted.entries.first().unwrap()]
                }
                (Object::Link(_), Some(found)) => object.satisfied_by(found),
                (object, Some(found)) => object == found,
                (_, None) => false,
            };
            prop_assert!(right, "wanted {object}, is {found:?}, after {:#?}", todo.steps);
        }
        for (key, object) in have.iter().filter(|(_, object)| want.claim.owns(object)) {
            prop_assert!(want.host.get(key).is_some(), "{object} is ours, unwanted and still there");
        }
        for object in ground() {
            prop_assert_eq!(have.get(&object.key()), Some(&object));
        }
        prop_assert_eq!(foreign(&want, &have), foreign(&want, &before), "what is not ours stays, in its order");
        let again = plan(&want, &have, Scope::All);
        prop_assert!(again.steps.is_empty(), "a second plan is empty: {:#?}", again.steps);
    }

    #[test]
    fn a_plan_for_the_keys_that_differ_is_the_plan_for_all((want, have) in cases(), more in 0usize..40) {
        let differs = |key: &Key| match (want.host.get(key), have.get(key)) {
            (Some(wanted), Some(found)) => wanted != found,
            (wanted, found) => wanted.is_some() || found.is_some(),
        };
        let all = want.host.iter().chain(have.iter()).map(|(key, _)| key.clone());
        // Every key that differs, and some that do not.
        let keys: BTreeSet<Key> = all.enumerate().filter(|(n, key)| differs(key) || *n == more).map(|(_, key)| key).collect();
        let some = plan(&want, &have, Scope::Keys(&keys));
        prop_assert_eq!(some, plan(&want, &have, Scope::All));
    }

    #[test]
    fn steps_make_before_they_break_and_need_only_what_comes_before((want, have) in cases()) {
        let todo = plan(&want, &have, Scope::All);
        let deletes = |op: &Op| matches!(op, Op::Delete(_));
        let first = todo.steps.iter().position(|step| deletes(&step.op)).unwrap_or(todo.steps.len());
        prop_assert!(todo.steps[first..].iter().all(|step| deletes(&step.op)), "{:#?}", todo.steps);
        let is_link = |op: &Op| matches!(op.object(), Object::Link(_));
        let made: Vec<&Op> = todo.steps[..first].iter().map(|step| &step.op).collect();
        let links = made.iter().take_while(|op| is_link(op)).count();
        prop_assert!(!made[links..].iter().any(|op| is_link(op)), "devices first");
        let keys: Vec<Key> = made[links..].iter().map(|op| op.object().key()).collect();
        prop_assert!(keys.is_sorted(), "in key order: {keys:?}");
        let gone: Vec<Key> = todo.steps[first..].iter().map(|step| step.op.object().key()).collect();
        prop_assert!(gone.iter().rev().is_sorted(), "in reverse key order: {gone:?}");
        for op in made[..links].iter() {
            // VNI, port, GBP, flags, limit and the kind of a device never change in place, and nothing else needs a re-creation.
            let fixed = |object: &Object| match object {
                Object::Link(link) => match &link.kind {
                    LinkKind::Vxlan(v) => Some((v.vni, v.port, v.gbp, v.special, v.room.limit)),
                    _ => None,
                },
                _ => None,
            };
            match op {
                Op::Update { from, to } => prop_assert_eq!(fixed(from), fixed(to)),
                Op::Recreate { from, to } => prop_assert_ne!(fixed(from), fixed(to)),
                _ => {}
            }
        }
        let goes = |link: LinkName| gone.contains(&Key::Link(link));
        let alone = |key: &Key| matches!(key, Key::Link(_)) || !key.link().is_some_and(goes);
        prop_assert!(gone.iter().all(alone), "what stands on a device goes with it: {gone:?}");
        for (n, step) in todo.steps.iter().enumerate() {
            prop_assert!(step.needs.iter().all(|need| (*need as usize) < n));
            // What stands on a device that this plan makes, waits for it.
            let link = step.op.object().key().link().filter(|_| !is_link(&step.op) && n < first);
            let maker = made[..links].iter().position(|op| Some(op.object().key()) == link.map(Key::Link));
            prop_assert!(maker.is_none_or(|maker| step.needs.contains(&(maker as u32))), "{step:?}");
        }
    }
}
