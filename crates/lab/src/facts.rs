//! Live facts for an explanation: every namespace read once, and each route question asked of the kernel itself.

use std::collections::BTreeMap;
use std::io;

use twill_core::host::{HostState, Object, Route};
use twill_core::net::LinkName;
use twill_core::words::route_kind;
use twill_explain::{Facts, Far, NoRoute, PlaceFacts, RouteAnswer, RouteQuery};
use twill_kernel::lookup::{Question, Router};
use twill_kernel::netns::Netns;
use twill_kernel::wires::{VethEnd, Wires};
use twill_kernel::{Interest, Kernel, KernelError, LinuxKernel, sysctl};

/// Named namespaces as they were when read; routes are asked for when the walk comes to them.
#[derive(Debug)]
pub struct LiveFacts {
    places: Vec<Live>,
}

#[derive(Debug)]
struct Live {
    name: String,
    netns: Netns,
    facts: PlaceFacts,
}

/// What one look into a namespace finds.
struct Look {
    state: HostState,
    veths: Vec<VethEnd>,
    /// This namespace's number for each place, in the order of the places.
    numbers: Vec<Option<i32>>,
}

impl LiveFacts {
    /// Reads each of these namespaces. The names are those of the explanation; the caller must be allowed to enter each.
    pub fn read(places: Vec<(String, Netns)>) -> Result<Self, KernelError> {
        let all: Vec<&Netns> = places.iter().map(|(_, netns)| netns).collect();
        let looks =
            places.iter().map(|(name, netns)| inside(name, netns, || look(&all))).collect::<Result<Vec<_>, _>>()?;
        let peers: Vec<_> = (0..places.len()).map(|here| peers(here, &places, &looks)).collect();
        let joined = places.into_iter().zip(looks).zip(peers);
        let live = joined.map(|(((name, netns), Look { state, .. }), peers)| Live {
            name,
            netns,
            facts: PlaceFacts { state, peers },
        });
        Ok(Self { places: live.collect() })
    }
}

/// Runs `act` in a namespace; failing to enter it is a failure of the act.
fn inside<T: Send>(
    name: &str,
    netns: &Netns,
    act: impl FnOnce() -> Result<T, KernelError> + Send,
) -> Result<T, KernelError> {
    netns.run(act).map_err(|e| KernelError::new(&format!("enter the network namespace of {name}"), e))?
}

/// Everything of the calling thread's namespace.
fn look(all: &[&Netns]) -> Result<Look, KernelError> {
    let mut state = LinuxKernel::open(Interest::default())?.mirror().clone();
    let links: Vec<LinkName> =
        state.iter().filter_map(|(_, o)| if let Object::Link(l) = o { Some(l.name) } else { None }).collect();
    let v4 = links.iter().map(|link| format!("net/ipv4/conf/{link}/forwarding"));
    for path in v4.chain(["net/ipv6/conf/all/forwarding".to_owned()]) {
        // A kernel without IPv6 has no such file: then it is not known.
        if let Ok(value) = sysctl::read(&path) {
            state.insert(Object::Sysctl { path: path.into(), value: value.into() });
        }
    }
    let mut wires = Wires::open()?;
    let veths = wires.veths()?;
    let far = veths.iter().any(|v| v.peer_netns.is_some());
    let numbers = if far { all.iter().map(|n| wires.netns_id(n)).collect::<Result<_, _>>()? } else { Vec::new() };
    Ok(Look { state, veths, numbers })
}

/// The other end of each veth of place number `here`, as far as it is in one of the places.
fn peers(here: usize, places: &[(String, Netns)], looks: &[Look]) -> BTreeMap<LinkName, Far> {
    let look = &looks[here];
    let far = |end: &VethEnd| {
        let there = match end.peer_netns {
            None => here,
            Some(number) => look.numbers.iter().position(|n| *n == Some(number))?,
        };
        let other = looks[there].veths.iter().find(|v| v.index == end.peer_index)?;
        Some((end.link, Far { place: places[there].0.clone(), link: other.link }))
    };
    look.veths.iter().filter_map(far).collect()
}

impl Facts for LiveFacts {
    fn places(&self) -> Vec<&str> {
        self.places.iter().map(|p| p.name.as_str()).collect()
    }

    fn place(&self, name: &str) -> Option<&PlaceFacts> {
        self.places.iter().find(|p| p.name == name).map(|p| &p.facts)
    }

    fn route(&self, place: &str, query: &RouteQuery) -> Result<RouteAnswer, NoRoute> {
        let live = self.places.iter().find(|p| p.name == place);
        let live = live.ok_or_else(|| NoRoute::NotAsked(format!("nothing is known of {place}")))?;
        let question = Question { dst: query.dst, src: query.src, iif: query.iif, oif: query.oif };
        let asked = inside(place, &live.netns, || Router::open()?.matching(&question));
        match asked {
            Ok(Some(route)) => answer(&route),
            Ok(None) => Err(refused(libc::ENETUNREACH)),
            Err(error) => match error.source.raw_os_error() {
                Some(errno) => Err(covering(&live.facts, query, errno).unwrap_or_else(|| refused(errno))),
                None => Err(NoRoute::NotAsked(format!("{error}: {}", error.source))),
            },
        }
    }
}

/// The route that matched. Of several next hops the kernel takes one by a hash of the packet: the first is followed.
fn answer(route: &Route) -> Result<RouteAnswer, NoRoute> {
    let entry = route.entries.first().ok_or_else(|| NoRoute::NotAsked("the kernel's answer is empty".to_owned()))?;
    match entry.kind {
        6 => Err(covered(entry.kind, libc::EINVAL)),
        7 => Err(covered(entry.kind, libc::EHOSTUNREACH)),
        8 => Err(covered(entry.kind, libc::EACCES)),
        kind => Ok(RouteAnswer {
            kind,
            dev: entry.dev,
            via: entry.via,
            src: entry.extras().src,
            table: route.key.table,
            others: route.entries.as_slice().len() - 1,
        }),
    }
}

/// The refusal by a route that is there to refuse: the kernel says "Invalid argument" of a blackhole.
fn covering(facts: &PlaceFacts, query: &RouteQuery, errno: i32) -> Option<NoRoute> {
    let covering = facts.routes().filter(|route| route.key.dst.contains(query.dst));
    let entry = covering.max_by_key(|route| route.key.dst.len())?.entries.first()?;
    let fits = matches!((entry.kind, errno), (6, libc::EINVAL) | (7, libc::EHOSTUNREACH) | (8, libc::EACCES));
    fits.then(|| covered(entry.kind, errno))
}

fn covered(kind: u8, errno: i32) -> NoRoute {
    NoRoute::Refused { errno, text: format!("a route of the type {} covers it", route_kind(kind)) }
}

fn refused(errno: i32) -> NoRoute {
    let text = io::Error::from_raw_os_error(errno).to_string();
    // Rust adds the number; the explanation does so too.
    let text = text.split(" (os error").next().unwrap_or_default().to_owned();
    NoRoute::Refused { errno, text }
}
