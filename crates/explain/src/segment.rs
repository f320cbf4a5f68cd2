//! Who hears a broadcast: the ends of one link-layer segment.

use std::collections::BTreeSet;
use std::net::IpAddr;

use twill_core::host::LinkKind;
use twill_core::net::{LinkName, MacAddr};

use crate::facts::{Facts, Far};

/// Every device, the bridges themselves included, that hears a broadcast sent out of `link`. Devices that are down hear nothing.
pub fn hearers<F: Facts + ?Sized>(facts: &F, place: &str, link: LinkName) -> Vec<Far> {
    let mut flood = Flood { facts, seen: BTreeSet::new(), ends: Vec::new() };
    flood.send(place, link);
    flood.ends
}

/// The device on the segment behind `link` whose place has `ip`, with its MAC: the one that answers ARP or ND.
pub fn who_has<F: Facts + ?Sized>(facts: &F, place: &str, link: LinkName, ip: IpAddr) -> Option<(Far, MacAddr)> {
    let owns = |far: &Far| facts.place(&far.place).is_some_and(|f| f.owns(ip));
    let far = hearers(facts, place, link).into_iter().find(owns)?;
    let mac = facts.place(&far.place)?.link(far.link)?.mac?;
    Some((far, mac))
}

/// The device with `mac` on the segment behind `link`.
pub fn who_is<F: Facts + ?Sized>(facts: &F, place: &str, link: LinkName, mac: MacAddr) -> Option<Far> {
    let has = |far: &Far| facts.place(&far.place).and_then(|f| f.link(far.link)).is_some_and(|l| l.mac == Some(mac));
    hearers(facts, place, link).into_iter().find(has)
}

/// Every device with `mac`, wherever it is, tunnels and bridges included; for messages.
pub fn owner_of_mac<F: Facts + ?Sized>(facts: &F, mac: MacAddr) -> Option<Far> {
    facts.places().into_iter().find_map(|place| {
        let link = facts.place(place)?.links().find(|l| l.mac == Some(mac))?;
        Some(Far { place: place.to_owned(), link: link.name })
    })
}

/// Why nobody on the segment behind `link` answers for `ip`; for messages.
pub fn why_silent<F: Facts + ?Sized>(facts: &F, place: &str, link: LinkName, ip: IpAddr) -> String {
    let Some(owner) = facts.places().into_iter().find(|p| facts.place(p).is_some_and(|f| f.owns(ip))) else {
        return "nobody that is known has this address".to_owned();
    };
    silent_device(facts, place, link, owner, ip)
        .unwrap_or_else(|| format!("it is an address of {owner}, which is not on this link"))
}

/// The device between here and the owner that keeps the question from it.
fn silent_device<F: Facts + ?Sized>(facts: &F, place: &str, link: LinkName, owner: &str, ip: IpAddr) -> Option<String> {
    let there = facts.place(owner)?;
    let own = there.link(there.addrs().find(|a| a.inet.addr == ip)?.link)?;
    if !own.up {
        return Some(format!("{} of {owner} is down", own.name));
    }
    let far = there.peers.get(&own.name)?;
    let middle = facts.place(&far.place)?;
    let port = middle.link(far.link)?;
    if !port.up {
        return Some(format!("{} of {}, the other end of {owner}'s {}, is down", far.link, far.place, own.name));
    }
    let loose = far.place == place && port.name != link && middle.bridge_of(port) != Some(link);
    loose.then(|| format!("{}, the other end of {owner}'s {}, is not a port of {link}", far.link, own.name))
}

/// What hangs on a wire that has no other end in the facts: the hardware devices of all other places, taken as one underlay.
pub fn underlay<F: Facts + ?Sized>(facts: &F, place: &str) -> Vec<Far> {
    let others = facts.places().into_iter().filter(|p| *p != place);
    let devices = others.flat_map(|p| facts.place(p).into_iter().flat_map(|f| f.links()).map(move |l| (p, l)));
    devices
        .filter(|(_, l)| matches!(l.kind, LinkKind::Other { .. }) && l.mac.is_some_and(|m| m.is_unicast()))
        .map(|(p, l)| Far { place: p.to_owned(), link: l.name })
        .collect()
}

struct Flood<'f, F: ?Sized> {
    facts: &'f F,
    seen: BTreeSet<Far>,
    ends: Vec<Far>,
}

impl<F: Facts + ?Sized> Flood<'_, F> {
    /// Out of `link`.
    fn send(&mut self, place: &str, link: LinkName) {
        let Some(here) = self.facts.place(place) else { return };
        let Some(device) = here.link(link).filter(|l| l.up) else { return };
        match &device.kind {
            LinkKind::Bridge => self.flood_ports(place, link, None),
            LinkKind::Veth { .. } => {
                if let Some(far) = here.peers.get(&link) {
                    self.hear(far.clone());
                }
            }
            LinkKind::Vxlan(vxlan) => {
                let Some(default) = here.fdb(link, MacAddr::ZERO) else { return };
                for host in default.dst.as_slice() {
                    let same = |l: &&twill_core::host::Link| matches!(&l.kind, LinkKind::Vxlan(v) if (v.vni, v.port) == (vxlan.vni, vxlan.port));
                    let far = self.facts.places().into_iter().find_map(|p| {
                        let there = self.facts.place(p).filter(|f| f.owns(*host))?;
                        Some(Far { place: p.to_owned(), link: there.links().find(same)?.name })
                    });
                    far.into_iter().for_each(|f| self.hear(f));
                }
            }
            LinkKind::Other { .. } => {
                underlay(self.facts, place).into_iter().for_each(|far| self.hear(far));
            }
            LinkKind::Tun => {}
        }
    }

    /// In at `far`: the device itself, or the bridge that it is a port of and its other ports.
    fn hear(&mut self, far: Far) {
        if !self.seen.insert(far.clone()) {
            return;
        }
        let Some(there) = self.facts.place(&far.place) else { return };
        let Some(device) = there.link(far.link).filter(|l| l.up) else { return };
        match there.bridge_of(device) {
            Some(bridge) => {
                self.ends.push(Far { place: far.place.clone(), link: bridge });
                self.flood_ports(&far.place, bridge, Some(far.link));
            }
            None => self.ends.push(far),
        }
    }

    fn flood_ports(&mut self, place: &str, bridge: LinkName, except: Option<LinkName>) {
        let Some(here) = self.facts.place(place) else { return };
        let ports: Vec<LinkName> = here.ports(bridge).map(|l| l.name).filter(|p| Some(*p) != except).collect();
        ports.into_iter().for_each(|port| self.send(place, port));
    }
}
