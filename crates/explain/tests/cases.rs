//! The vxlan scenario in memory, healthy and with one thing wrong at a time. What the explanation says of each case stands in
//! `tests/cases/NAME.txt`; `TWILL_UPDATE_CASES=1` rewrites these files.
//!
//! ```text
//!  container-1 10.1.15.2        container-3 10.1.15.3         container-2 10.1.16.3
//!        │eth0                       │eth0                          │eth0
//!   veth1│                      veth3│                         veth2│
//!  node1: docker0 10.1.15.1/24 ──────┘               node2: docker0 10.1.16.1/24        node3 10.168.0.4
//!         flannel.1 10.1.15.0                               flannel.1 10.1.16.0          flannel.1
//!         eth0 10.168.0.2                                   eth0 10.168.0.3              eth0
//!           └──────────────p1── underlay: br0 ──p2────────────┘   └──────────p3───────────┘
//! ```
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test file: what fails here fails the test")]

use std::net::IpAddr;
use std::path::Path;

use twill_core::host::{
    Addr, Extras, Fdb, FdbRoom, Few, Key, Link, LinkKind, Neigh, Object, OuterHeader, Remark, Route, RouteEntry,
    RouteKey, Vxlan,
};
use twill_core::net::{Inet, LinkName, MacAddr};
use twill_explain::{Code, Explanation, Facts, Far, Memory, PlaceFacts, Verdict, ends, explain};

fn link_name(name: &str) -> LinkName {
    name.parse().unwrap()
}

fn mac(last: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, last])
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// What the builder below adds to a place.
trait Build {
    fn add_link(&mut self, name: &str, kind: LinkKind, mac: MacAddr) -> &mut Self;
    fn port(&mut self, name: &str, bridge: &str) -> &mut Self;
    fn addr(&mut self, link: &str, inet: &str) -> &mut Self;
    fn route(&mut self, dst: &str, via: Option<&str>, dev: &str) -> &mut Self;
    fn add_neigh(&mut self, link: &str, ip: &str, mac: MacAddr, state: u16) -> &mut Self;
    fn vtep(&mut self, mac: MacAddr, host: &str) -> &mut Self;
    fn cam(&mut self, bridge: &str, mac: MacAddr, port: &str) -> &mut Self;
    fn forward(&mut self, on: bool) -> &mut Self;
}

impl Build for PlaceFacts {
    fn add_link(&mut self, name: &str, kind: LinkKind, mac: MacAddr) -> &mut Self {
        let name = link_name(name);
        let link = Link { mac: Some(mac), ..Link::up(name, kind) };
        self.state.insert(Object::Link(Box::new(link)));
        self
    }

    fn port(&mut self, name: &str, bridge: &str) -> &mut Self {
        let mut link = self.state.link(link_name(name)).unwrap().clone();
        link.master = Some(link_name(bridge));
        self.state.insert(Object::Link(Box::new(link)));
        self
    }

    /// With the connected route that the kernel adds.
    fn addr(&mut self, link: &str, inet: &str) -> &mut Self {
        let inet: Inet = inet.parse().unwrap();
        let link = link_name(link);
        self.state.insert(Object::Addr(Addr::global(link, inet)));
        if inet.len() < 32 || inet.addr.is_ipv6() && inet.len() < 128 {
            let entry = RouteEntry {
                via: None,
                dev: Some(link),
                onlink: false,
                protocol: 2,
                kind: 1,
                scope: if inet.addr.is_ipv4() { 253 } else { 0 },
                extras: Extras { src: Some(inet.addr).filter(IpAddr::is_ipv4), ..Extras::default() }.boxed(),
                special: false,
                usurper: Remark::default(),
            };
            let key = RouteKey { table: 254, dst: inet.network(), tos: 0, metric: 0 };
            self.state.insert(Object::Route(Route { key, entries: Few::One(entry) }));
        }
        self
    }

    fn route(&mut self, dst: &str, via: Option<&str>, dev: &str) -> &mut Self {
        let tunnel = dev == "flannel.1";
        let entry = RouteEntry {
            via: via.map(ip),
            dev: Some(link_name(dev)),
            onlink: tunnel,
            protocol: if tunnel { 116 } else { 3 },
            kind: 1,
            scope: 0,
            extras: None,
            special: false,
            usurper: Remark::default(),
        };
        let key = RouteKey { table: 254, dst: dst.parse().unwrap(), tos: 0, metric: 0 };
        self.state.insert(Object::Route(Route { key, entries: Few::One(entry) }));
        self
    }

    fn add_neigh(&mut self, link: &str, address: &str, mac: MacAddr, state: u16) -> &mut Self {
        let (link, ip) = (link_name(link), ip(address));
        self.state.insert(Object::Neigh(Neigh {
            link,
            ip,
            mac: Some(mac),
            permanent: state == 0x80,
            special: false,
            state,
        }));
        self
    }

    fn vtep(&mut self, mac: MacAddr, host: &str) -> &mut Self {
        let link = link_name("flannel.1");
        self.state.insert(Object::Fdb(Fdb {
            link,
            mac,
            dst: Few::One(ip(host)),
            port: None,
            permanent: true,
            special: false,
            detour: None,
            state: 0x80,
        }));
        self
    }

    fn cam(&mut self, bridge: &str, mac: MacAddr, port: &str) -> &mut Self {
        let (link, port) = (link_name(bridge), Some(link_name(port)));
        self.state.insert(Object::Fdb(Fdb {
            link,
            mac,
            dst: Few::none(),
            port,
            permanent: false,
            special: false,
            detour: None,
            state: 2,
        }));
        self
    }

    fn forward(&mut self, on: bool) -> &mut Self {
        let value: Box<str> = if on { "1".into() } else { "0".into() };
        let links: Vec<LinkName> = self.links().map(|l| l.name).collect();
        for link in links {
            let path = format!("net/ipv4/conf/{link}/forwarding").into();
            self.state.insert(Object::Sysctl { path, value: value.clone() });
        }
        self.state.insert(Object::Sysctl { path: "net/ipv6/conf/all/forwarding".into(), value });
        self
    }
}

const VETH: LinkKind = LinkKind::Veth { peer: None, peer_netns: None };

fn vxlan(local: &str) -> LinkKind {
    LinkKind::Vxlan(Vxlan {
        vni: 1.try_into().unwrap(),
        port: 8472.try_into().unwrap(),
        local: Some(ip(local)),
        lower: Some(link_name("eth0")),
        learning: false,
        gbp: false,
        remote: None,
        outer: OuterHeader::default(),
        room: FdbRoom::default(),
        special: false,
    })
}

fn container(facts: &mut Memory, name: &str, net: &str, host: u8, node: &str, port: &str) {
    let mut place = PlaceFacts::default();
    place.add_link("eth0", VETH, mac(host)).addr("eth0", &format!("10.1.{net}.{}/24", host & 15));
    place.addr("eth0", &format!("fd00:{net}::{}/64", host & 15));
    place.route("0.0.0.0/0", Some(&format!("10.1.{net}.1")), "eth0");
    place.route("::/0", Some(&format!("fd00:{net}::1")), "eth0");
    facts.insert(name, place);
    join(facts, (name, "eth0"), (node, port));
}

/// Node `n` (1 to 3): underlay 10.168.0.(n+1), subnet 10.1.(14+n).0/24, VTEP MAC 02:…:f(n).
fn node(facts: &mut Memory, n: u8) {
    let name = format!("node{n}");
    let mut place = PlaceFacts::default();
    let net = 14 + n;
    place.add_link("eth0", VETH, mac(0xe0 + n)).addr("eth0", &format!("10.168.0.{}/24", n + 1));
    place.add_link("docker0", LinkKind::Bridge, mac(0xd0 + n)).addr("docker0", &format!("10.1.{net}.1/24"));
    place.addr("docker0", &format!("fd00:{net}::1/64"));
    place.add_link("flannel.1", vxlan(&format!("10.168.0.{}", n + 1)), mac(0xf0 + n));
    place.addr("flannel.1", &format!("10.1.{net}.0/32")).addr("flannel.1", &format!("fd00:{net}::/128"));
    for peer in (1..=3).filter(|p| *p != n) {
        let net = 14 + peer;
        place.route(&format!("10.1.{net}.0/24"), Some(&format!("10.1.{net}.0")), "flannel.1");
        place.route(&format!("fd00:{net}::/64"), Some(&format!("fd00:{net}::")), "flannel.1");
        place.add_neigh("flannel.1", &format!("10.1.{net}.0"), mac(0xf0 + peer), 0x80);
        place.add_neigh("flannel.1", &format!("fd00:{net}::"), mac(0xf0 + peer), 0x80);
        place.vtep(mac(0xf0 + peer), &format!("10.168.0.{}", peer + 1));
    }
    facts.insert(name.clone(), place);
    let port = format!("p{n}");
    facts.place_mut("underlay").unwrap().add_link(&port, VETH, mac(0xa0 + n)).port(&port, "br0");
    join(facts, (&name, "eth0"), ("underlay", &port));
}

fn join(facts: &mut Memory, a: (&str, &str), b: (&str, &str)) {
    for ((place, link), (far, far_link)) in [(a, b), (b, a)] {
        let far = Far { place: far.to_owned(), link: link_name(far_link) };
        facts.place_mut(place).unwrap().peers.insert(link_name(link), far);
    }
}

fn healthy() -> Memory {
    let mut facts = Memory::default();
    let mut underlay = PlaceFacts::default();
    underlay.add_link("br0", LinkKind::Bridge, mac(0xb0));
    facts.insert("underlay", underlay);
    (1..=3).for_each(|n| node(&mut facts, n));
    for (name, n, port, net, host) in [
        ("container-1", 1, "veth1", "15", 0x12),
        ("container-3", 1, "veth3", "15", 0x13),
        ("container-2", 2, "veth2", "16", 0x23),
    ] {
        let node = format!("node{n}");
        facts.place_mut(&node).unwrap().add_link(port, VETH, mac(0xc0 + host)).port(port, "docker0");
        container(&mut facts, name, net, host, &node, port);
    }
    // What a first ping leaves behind in one half of the tables; the other half is asked for.
    facts.place_mut("container-1").unwrap().add_neigh("eth0", "10.1.15.1", mac(0xd1), 0x02);
    facts.place_mut("node1").unwrap().cam("docker0", mac(0x12), "veth1");
    facts.place_mut("underlay").unwrap().cam("br0", mac(0xe2), "p2");
    (1..=3).for_each(|n| {
        facts.place_mut(&format!("node{n}")).unwrap().forward(true);
    });
    facts
}

fn remove(facts: &mut Memory, place: &str, key: Key) {
    assert!(facts.place_mut(place).unwrap().state.remove(&key).is_some(), "{key:?} was there");
}

fn edit_link(facts: &mut Memory, place: &str, link: &str, edit: impl FnOnce(&mut Link)) {
    let state = &mut facts.place_mut(place).unwrap().state;
    let mut found = state.link(link_name(link)).unwrap().clone();
    edit(&mut found);
    state.insert(Object::Link(Box::new(found)));
}

fn run(facts: &Memory, a: &str, b: &str, v6: bool) -> Explanation {
    let (from, to) = ends(facts, a, b, v6).unwrap();
    explain(facts, &from, &to)
}

/// The explanation's text is what the file says.
fn golden(name: &str, explanation: &impl std::fmt::Display) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name).with_extension("txt");
    let text = explanation.to_string();
    if std::env::var_os("TWILL_UPDATE_CASES").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    let want = std::fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(text, want, "{name}: the explanation differs from {}", file.display());
}

/// A healthy network with one fault: the way there stops for this cause at this place.
fn fault(name: &str, code: Code, at: &str, break_it: impl FnOnce(&mut Memory)) {
    let mut facts = healthy();
    break_it(&mut facts);
    let explanation = run(&facts, "container-1", "container-2", false);
    match &explanation.there.verdict {
        Verdict::Stops { code: found, place, .. } => assert_eq!((*found, place.as_str()), (code, at), "{explanation}"),
        Verdict::Arrives => panic!("{name}: it arrives\n{explanation}"),
    }
    golden(name, &explanation.there);
}

#[test]
fn a_healthy_overlay_path_arrives_both_ways() {
    let explanation = run(&healthy(), "container-1", "container-2", false);
    assert!(explanation.arrives(), "{explanation}");
    golden("healthy", &explanation);
}

#[test]
fn ipv6_walks_the_same_way() {
    let facts = healthy();
    let v6 = run(&facts, "container-1", "container-2", true);
    assert!(v6.arrives() && v6.there.to.address.is_ipv6(), "{v6}");
    let what = |e: &Explanation| e.there.hops.iter().map(|h| (h.place.clone(), h.what)).collect::<Vec<_>>();
    assert_eq!(what(&v6), what(&run(&facts, "container-1", "container-2", false)));
}

#[test]
fn two_containers_of_one_host_use_the_bridge_only() {
    let explanation = run(&healthy(), "container-1", "container-3", false);
    assert!(explanation.arrives(), "{explanation}");
    let ways = [&explanation.there, explanation.back.as_ref().unwrap()];
    assert!(ways.iter().flat_map(|w| &w.hops).all(|h| h.depth == 0 && h.place != "underlay"));
    golden("same-host-bridge", &explanation);
}

#[test]
fn an_address_that_nobody_has_is_followed_as_far_as_the_tables_go() {
    let mut facts = healthy();
    let stops = |facts: &Memory, from: &str, to: &str| {
        let explanation = run(facts, from, to, false);
        assert_eq!(
            (explanation.back.as_ref(), explanation.there.to.place.as_str()),
            (None, "outside"),
            "{explanation}"
        );
        match &explanation.there.verdict {
            Verdict::Stops { code, place, .. } => (*code, place.clone(), explanation.there.hops.len()),
            Verdict::Arrives => panic!("{explanation}"),
        }
    };
    // Through the default route to the host, which has none.
    let (code, place, hops) = stops(&facts, "container-1", "192.0.2.9");
    assert!((code, place.as_str()) == (Code::NoRoute, "node1") && hops > 1, "{code} {place} {hops}");
    let (code, place, _) = stops(&facts, "node1", "10.168.0.77");
    assert_eq!((code, place.as_str()), (Code::NobodyAnswers, "node1"));
    let (code, ..) = stops(&facts, "container-2", "10.1.15.77");
    assert_eq!(code, Code::NobodyAnswers);
    let node1 = facts.place_mut("node1").unwrap();
    node1.route("192.0.2.0/24", None, "eth0");
    let key = RouteKey { table: 254, dst: "192.0.2.0/24".parse().unwrap(), tos: 0, metric: 0 };
    let Some(Object::Route(mut route)) = node1.state.get(&Key::Route(key)).cloned() else { panic!("it is there") };
    let Few::One(entry) = &mut route.entries else { panic!("it is alone") };
    (entry.dev, entry.kind) = (None, 6);
    node1.state.insert(Object::Route(route));
    let (code, place, _) = stops(&facts, "container-1", "192.0.2.9");
    assert_eq!((code, place.as_str()), (Code::RouteRefuses, "node1"));
    // Where it starts must be known.
    assert!(ends(&facts, "192.0.2.9", "node1", false).is_err());
    assert!(ends(&facts, "node1", "nowhere", false).is_err());
}

#[test]
fn a_node_is_an_end_as_well() {
    let facts = healthy();
    for (a, b) in [("node1", "node2"), ("node1", "container-2"), ("container-2", "node1"), ("10.1.15.0", "10.1.16.3")] {
        let explanation = run(&facts, a, b, false);
        assert!(explanation.arrives(), "{explanation}");
    }
}

#[test]
fn fdb_entry_missing() {
    fault("fdb-missing", Code::NoFdbEntry, "node1", |f| {
        remove(f, "node1", Key::Fdb(link_name("flannel.1"), mac(0xf2)));
    });
}

#[test]
fn fdb_entry_with_the_wrong_host() {
    fault("fdb-wrong-host", Code::MacNotOurs, "node3", |f| {
        f.place_mut("node1").unwrap().vtep(mac(0xf2), "10.168.0.4");
    });
}

#[test]
fn fdb_entry_with_a_host_that_is_not_there() {
    fault("fdb-nobody", Code::NobodyAnswers, "node1", |f| {
        f.place_mut("node1").unwrap().vtep(mac(0xf2), "10.168.0.77");
    });
}

#[test]
fn neighbour_missing() {
    fault("neighbour-missing", Code::NoNeighbour, "node1", |f| {
        remove(f, "node1", Key::Neigh(link_name("flannel.1"), ip("10.1.16.0")));
    });
}

#[test]
fn neighbour_mac_stale() {
    fault("neighbour-stale", Code::MacNotOurs, "node2", |f| {
        f.place_mut("node1")
            .unwrap()
            .add_neigh("flannel.1", "10.1.16.0", mac(0x99), 0x80)
            .vtep(mac(0x99), "10.168.0.3");
    });
}

#[test]
fn route_missing() {
    fault("route-missing", Code::NoRoute, "node1", |f| {
        let key = RouteKey { table: 254, dst: "10.1.16.0/24".parse().unwrap(), tos: 0, metric: 0 };
        remove(f, "node1", Key::Route(key));
    });
}

#[test]
fn route_shadowed_by_a_longer_one() {
    fault("route-shadowed", Code::NobodyAnswers, "node1", |f| {
        f.place_mut("node1").unwrap().route("10.1.16.0/25", None, "docker0");
    });
}

#[test]
fn forwarding_off() {
    fault("forwarding-off", Code::ForwardingOff, "node2", |f| {
        f.place_mut("node2").unwrap().forward(false);
    });
}

#[test]
fn tunnel_device_down() {
    fault("tunnel-down", Code::LinkDown, "node2", |f| edit_link(f, "node2", "flannel.1", |l| l.up = false));
    fault("tunnel-held", Code::LinkDown, "node1", |f| {
        edit_link(f, "node1", "flannel.1", |l| l.protodown = Some(true));
    });
}

#[test]
fn container_port_out_of_the_bridge() {
    fault("port-out-of-bridge", Code::NobodyAnswers, "node2", |f| edit_link(f, "node2", "veth2", |l| l.master = None));
}

#[test]
fn vni_differs() {
    fault("vni-mismatch", Code::VniMismatch, "node2", |f| {
        edit_link(f, "node2", "flannel.1", |l| {
            if let LinkKind::Vxlan(v) = &mut l.kind {
                v.vni = 2.try_into().unwrap();
            }
        });
    });
}

#[test]
fn udp_port_differs() {
    fault("port-mismatch", Code::PortMismatch, "node2", |f| {
        edit_link(f, "node2", "flannel.1", |l| {
            if let LinkKind::Vxlan(v) = &mut l.kind {
                v.port = 4789.try_into().unwrap();
            }
        });
    });
}

#[test]
fn two_routes_that_point_at_each_other_are_a_circle() {
    let mut facts = healthy();
    facts.place_mut("node2").unwrap().route("10.1.77.0/24", Some("10.168.0.2"), "eth0");
    facts.place_mut("node1").unwrap().route("10.1.77.0/24", Some("10.168.0.3"), "eth0");
    facts.place_mut("node3").unwrap().addr("flannel.1", "10.1.77.1/32");
    let explanation = run(&facts, "container-1", "10.1.77.1", false);
    assert!(matches!(explanation.there.verdict, Verdict::Stops { code: Code::Loop, .. }), "{explanation}");
}

#[test]
fn a_wrong_name_says_which_names_there_are() {
    let error = ends(&healthy(), "container-9", "node1", false).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("\"container-9\" is neither a place nor an address of one; places are underlay, node1")
    );
}

#[test]
fn the_json_shape_is_kept() {
    let mut facts = healthy();
    remove(&mut facts, "node1", Key::Fdb(link_name("flannel.1"), mac(0xf2)));
    let json = serde_json::to_value(run(&facts, "container-1", "container-2", false).there).unwrap();
    assert_eq!(json["verdict"]["verdict"], "stops");
    assert_eq!(json["verdict"]["code"], "no-fdb-entry");
    assert_eq!(json["hops"][0]["what"], "route");
    assert_eq!(json["hops"][0]["link"], "eth0");
    assert_eq!(json["hops"][0]["evidence"], serde_json::json!(["default via 10.1.15.1 dev eth0"]));
    assert!(facts.places().contains(&"underlay"));
}

/// Whatever single thing is taken away, both ways end, and a way that stops says where and why.
#[test]
fn no_single_loss_goes_without_an_end() {
    let whole = healthy();
    let mut stopped = std::collections::BTreeSet::new();
    for place in whole.places() {
        for (key, _) in whole.place(place).unwrap().state.iter() {
            let mut facts = whole.clone();
            remove(&mut facts, place, key.clone());
            let Ok((from, to)) = ends(&facts, "container-1", "container-2", false) else { continue };
            let explanation = explain(&facts, &from, &to);
            for way in [&explanation.there, explanation.back.as_ref().unwrap()] {
                assert!(way.hops.len() < 40, "{key:?}: {explanation}");
                if let Verdict::Stops { code, place, why, .. } = &way.verdict {
                    assert!(whole.place(place).is_some() && !why.is_empty());
                    stopped.insert(code.to_string());
                }
            }
        }
    }
    for code in ["link-missing", "no-fdb-entry", "no-neighbour", "no-route", "nobody-answers"] {
        assert!(stopped.contains(code), "{code} among {stopped:?}");
    }
}

/// The underlay may be IPv6 as well: the outer packet takes the same steps.
#[test]
fn an_ipv6_underlay_carries_ipv4_containers() {
    let mut facts = healthy();
    for n in 1..=3u8 {
        let place = facts.place_mut(&format!("node{n}")).unwrap();
        place.addr("eth0", &format!("fd00:168::{}/64", n + 1));
        for peer in (1..=3).filter(|p| *p != n) {
            place.vtep(mac(0xf0 + peer), &format!("fd00:168::{}", peer + 1));
        }
        edit_link(&mut facts, &format!("node{n}"), "flannel.1", |l| {
            if let LinkKind::Vxlan(v) = &mut l.kind {
                v.local = Some(ip(&format!("fd00:168::{}", n + 1)));
            }
        });
    }
    let explanation = run(&facts, "container-1", "container-2", false);
    assert!(explanation.arrives() && explanation.to_string().contains("behind host fd00:168::3"), "{explanation}");
}

/// Two devices with one VNI and port, one for each family of the underlay: a packet's own family says whose it is.
#[test]
fn of_two_tunnels_with_one_port_the_outer_family_chooses() {
    let mut facts = healthy();
    for n in 1..=3u8 {
        let place = facts.place_mut(&format!("node{n}")).unwrap();
        place.addr("eth0", &format!("fd00:168::{}/64", n + 1));
        // By name it stands before the other one.
        place.add_link("flannel-v6.1", vxlan(&format!("fd00:168::{}", n + 1)), mac(0x60 + n));
        for peer in (1..=3).filter(|p| *p != n) {
            let (net, link) = (14 + peer, link_name("flannel-v6.1"));
            let (vtep, tunnel_mac) = (format!("fd00:{net}::"), mac(0x60 + peer));
            place.route(&format!("{vtep}/64"), Some(&vtep), "flannel-v6.1");
            place.add_neigh("flannel-v6.1", &vtep, tunnel_mac, 0x80);
            let dst = Few::One(ip(&format!("fd00:168::{}", peer + 1)));
            let fdb = Fdb {
                link,
                mac: tunnel_mac,
                dst,
                port: None,
                permanent: true,
                special: false,
                detour: None,
                state: 0x80,
            };
            place.state.insert(Object::Fdb(fdb));
        }
    }
    for (v6, device) in [(false, "flannel.1"), (true, "flannel-v6.1")] {
        let explanation = run(&facts, "container-1", "container-2", v6);
        assert!(explanation.arrives(), "{explanation}");
        assert!(explanation.to_string().contains(&format!("are {device}'s: the frame is unwrapped")), "{explanation}");
    }
    // Without the tunnel of its family the packet finds no socket, whatever the other one listens to.
    edit_link(&mut facts, "node2", "flannel.1", |l| {
        if let LinkKind::Vxlan(v) = &mut l.kind {
            v.local = Some(ip("fd00:168::3"));
        }
    });
    let there = run(&facts, "container-1", "container-2", false).there;
    assert!(matches!(there.verdict, Verdict::Stops { code: Code::PortMismatch, .. }), "{there}");
}
