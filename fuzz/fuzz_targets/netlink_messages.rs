//! The kernel's routing messages: what is read, written as a request and read again is the same object.
#![no_main]

use libfuzzer_sys::fuzz_target;
use twill_core::host::{Few, LinkKind, Object};
use twill_kernel::netlink::codec::Codec;
use twill_kernel::netlink::wire::messages;

/// The object without what a request does not carry: the kernel's own state, and what stands elsewhere in an answer.
fn bare(object: Object) -> Object {
    match object {
        Object::Addr(mut addr) => {
            (addr.noprefixroute, addr.expires) = (false, false);
            Object::Addr(addr)
        }
        Object::Neigh(mut neigh) => {
            (neigh.state, neigh.special) = (0, false);
            Object::Neigh(neigh)
        }
        Object::Fdb(mut fdb) => {
            (fdb.state, fdb.special, fdb.detour) = (0, false, None);
            Object::Fdb(fdb)
        }
        Object::Route(mut route) => {
            if let Few::One(entry) = &mut route.entries {
                entry.special = false;
            }
            Object::Route(route)
        }
        Object::Link(mut link) => {
            link.carrier = false;
            if let LinkKind::Veth { peer, .. } = &mut link.kind {
                *peer = None;
            }
            Object::Link(link)
        }
        other => other,
    }
}

fuzz_target!(|bytes: &[u8]| {
    let codec = Codec::new((1..=4).map(|n| (n, format!("if{n}").parse().unwrap())));
    for object in messages(bytes).filter_map(|message| codec.read(&message)) {
        // A route with several hops becomes several requests; a bridge port's entry does not name the bridge; one without a host is not written.
        let several = match &object {
            Object::Route(route) => route.entries.as_slice().len() != 1,
            Object::Fdb(fdb) => fdb.port.is_some() || fdb.dst.as_slice().is_empty(),
            _ => false,
        };
        let Ok(request) = codec.write(&object) else { continue };
        if !several {
            let again: Vec<Object> = messages(&request).filter_map(|message| codec.read(&message)).map(bare).collect();
            assert_eq!(again, [bare(object)]);
        }
    }
});
