//! Objects → requests → objects: as the kernel tells them, so they are asked for.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::net::IpAddr;

use proptest::prelude::*;
use twill_core::host::*;
use twill_core::net::*;
use twill_kernel::netlink::codec::Codec;
use twill_kernel::netlink::wire::{Message, attrs, messages};

fn device() -> impl Strategy<Value = LinkName> {
    (1..4u32).prop_map(|n| format!("if{n}").parse().unwrap())
}

fn address() -> impl Strategy<Value = IpAddr> {
    let unicast = |ip: &IpAddr| !ip.is_multicast();
    prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
        .prop_filter("", unicast)
}

fn extras() -> impl Strategy<Value = Extras> {
    let metric = || proptest::option::of(any::<u32>());
    (proptest::option::of(address()), metric(), metric()).prop_map(|(src, mtu, advmss)| Extras { src, mtu, advmss })
}

fn route() -> impl Strategy<Value = Object> {
    let hop = (proptest::option::of(address()), device(), any::<bool>(), any::<u8>(), extras());
    (address(), 0..129u8, any::<u32>(), any::<u32>(), any::<u8>(), hop).prop_map(
        |(dst, len, table, metric, tos, (via, dev, onlink, protocol, extras))| {
            let dst = Prefix::truncate(dst, len.min(family_bits(&dst))).unwrap();
            let entry = RouteEntry {
                via,
                dev: Some(dev),
                onlink,
                protocol,
                kind: 1,
                scope: 0,
                extras: extras.boxed(),
                special: false,
                usurper: Remark::default(),
            };
            Object::Route(Route { key: RouteKey { table, dst, tos, metric }, entries: Few::One(entry) })
        },
    )
}

fn link() -> impl Strategy<Value = Object> {
    let kind = prop_oneof![
        Just(LinkKind::Bridge),
        (
            0..1i64 << 24,
            1..65_536i64,
            proptest::option::of(address()),
            proptest::option::of(device()),
            any::<[bool; 2]>(),
            any::<[u8; 3]>()
        )
            .prop_map(|(vni, port, local, lower, [learning, gbp], [ttl, tos, df])| LinkKind::Vxlan(Vxlan {
                vni: Vni::try_from(vni).unwrap(),
                port: Port::try_from(port).unwrap(),
                local: local.filter(|ip| !ip.is_unspecified()),
                lower,
                learning,
                gbp,
                remote: None,
                outer: OuterHeader { ttl, tos, df },
                room: FdbRoom { ageing: u32::from(ttl) * 7, limit: u32::from(tos) },
                special: false,
            })),
    ];
    let master = proptest::option::of(device());
    (kind, any::<[u8; 6]>(), 68..65_536i64, any::<[bool; 3]>(), master).prop_map(
        |(kind, mac, mtu, [up, arp, multicast], master)| {
            let (mac, mtu) = (Some(MacAddr(mac)), Some(Mtu::try_from(mtu).unwrap()));
            Object::Link(Box::new(Link {
                mac,
                mtu,
                up,
                master,
                arp: Some(arp),
                multicast: Some(multicast),
                carrier: false,
                ..Link::up("if9".parse().unwrap(), kind)
            }))
        },
    )
}

fn object() -> impl Strategy<Value = Object> {
    let entry = || (device(), any::<[u8; 6]>().prop_map(MacAddr), address());
    prop_oneof![
        route(),
        link(),
        (device(), address(), 0..129u8, any::<u8>()).prop_map(|(link, ip, len, scope)| {
            let inet = Inet::new(ip, len.min(family_bits(&ip))).unwrap();
            Object::Addr(Addr { scope, ..Addr::global(link, inet) })
        }),
        (entry(), any::<bool>()).prop_map(|((link, mac, ip), permanent)| {
            let state = if permanent { 0x80 } else { 0x40 };
            Object::Neigh(Neigh { link, ip, mac: Some(mac), permanent, special: false, state })
        }),
        (entry(), any::<bool>()).prop_map(|((link, mac, ip), permanent)| {
            let state = if permanent { 0x80 } else { 0x40 };
            Object::Fdb(Fdb {
                link,
                mac,
                dst: Few::One(ip),
                port: None,
                permanent,
                special: false,
                detour: None,
                state,
            })
        }),
    ]
}

proptest! {
    #[test]
    fn what_is_asked_for_is_what_is_told(object in object()) {
        let codec = Codec::new((1..4).map(|n| (n, format!("if{n}").parse().unwrap())));
        let request = codec.write(&object).unwrap();
        let told: Vec<Object> = messages(&request).map(|m| codec.read(&m).unwrap()).collect();
        prop_assert_eq!(told, [object]);
    }

    #[test]
    fn a_cut_message_is_no_message(object in object(), cut in 1..64usize) {
        let codec = Codec::new((1..4).map(|n| (n, format!("if{n}").parse().unwrap())));
        let request = codec.write(&object).unwrap();
        prop_assert_eq!(messages(&request[..request.len().saturating_sub(cut)]).count(), 0);
        // Even one whose length lies about the cut ends without a panic.
        let Message { kind, flags, seq, payload } = messages(&request).next().unwrap();
        let payload = &payload[..payload.len().saturating_sub(cut)];
        let _ = codec.read(&Message { kind, flags, seq, payload });
        prop_assert!(attrs(payload).count() <= payload.len() / 4 + 1);
    }
}
