//! ADD: a container gets its device, its addresses and its ways out; or, for somebody else's plugin, addresses alone.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use serde_json::{Map, Value};
use twill_core::attach::{self, Alone, Attachment, Network, Request, Way};
use twill_core::host::{Key, Object, PortFlags};
use twill_core::ipam::{Given, Holder};
use twill_core::net::{Inet, LinkName, Mtu, Prefix};
use twill_core::ports::PortMap;
use twill_kernel::attach::{self as kernel, Before};
use twill_kernel::files::{self, Unsynced};
use twill_kernel::{Kernel, LinuxKernel};

use super::{forget, lease, netns, refused, undo};
use crate::beside::{Beside, hear};
use crate::conf::{Conf, Device, Ipam, resolv_conf};
use crate::env::Target;
use crate::error::{Act, CniError, Code};
use crate::ipam::{Choice, Folder};
use crate::ports::Ports;
use crate::records::Records;
use crate::result::{Answer, Interface, Ip, RouteTo};
use crate::sweep::{is_gone, seen_in, sweep};

/// More bytes than resolv.conf has.
const RESOLV_LIMIT: u64 = 1 << 16;
/// The least MTU that IPv6 runs on.
const IPV6_MTU: u32 = 1280;

/// The most that a route has; the kernel would make this of more, without a word (net/ipv4/metrics.c `ip_metrics_convert`).
const MOST_MTU: u32 = 65_535 - 15;
const MOST_ADVMSS: u32 = 65_535 - 40;

/// An ADD that was done: its answer, and the host's sysctls that it has switched, as they were.
pub(crate) type Added = (String, Vec<Object>);

/// Runs ADD.
pub fn run(mut conf: Conf, target: Target, beside: &Beside) -> Result<Added, CniError> {
    lease(&mut conf)?;
    if let Some(ipam) = &mut conf.ipam {
        ipam.asked.extend(&target.args.ips);
    }
    let version = conf.version;
    let (answer, switched) = match conf.device.clone() {
        Some(device) => attach(conf, device, target, beside)?,
        None => (addresses_alone(&conf, &target)?, Vec::new()),
    };
    Ok((answer.to_json(version), switched))
}

/// Takes; when that fails because something is held, again once what containers have left that are gone was freed.
fn or_swept<T>(records: &Records, held: &[Code], take: impl Fn() -> Result<T, CniError>) -> Result<T, CniError> {
    match take() {
        Err(error) if held.contains(&error.code) => {
            let swept = sweep(records).err();
            take().map_err(|error| swept.into_iter().fold(error, CniError::and))
        }
        taken => taken,
    }
}

fn holder(target: &Target) -> Holder {
    Holder { container_id: target.container_id.clone(), ifname: Some(target.ifname.to_string()) }
}

/// What an IPAM plugin answers. It is written down as an attachment without a device.
fn addresses_alone(conf: &Conf, target: &Target) -> Result<Answer, CniError> {
    let Some(ipam) = &conf.ipam else { return Ok(Answer::default()) };
    let records = Records::new(conf.attachments());
    let (given, changes) = loop {
        let is_free = settle_earlier_alone(conf, target, &records)?;
        let take = || take_alone(conf, ipam, target, is_free.then_some(&records));
        if let Some(taken) = or_swept(&records, &[Code::Addresses], take)? {
            break taken;
        }
    };
    files::sync_all(&changes).act(|| format!("write {} to the disk", ipam.dir.display()))?;
    let ips = given.iter().map(|given| Ip { address: given.inet, gateway: Some(given.gateway), interface: None });
    Ok(Answer { ips: ips.collect(), routes: ipam.routes.clone(), dns: dns(conf)?, interfaces: Vec::new() })
}

/// As [`settle_earlier`]; false: the file is that of another network, which had the device's name first.
fn settle_earlier_alone(conf: &Conf, target: &Target, records: &Records) -> Result<bool, CniError> {
    let Some(earlier) = records.lock(&target.container_id, target.ifname)? else { return Ok(true) };
    // Killed, or freed by another plugin: nobody uses what it tells of.
    if is_gone(&earlier.record, records)? || earlier.record.alone.is_some() && !holds(&earlier.record)? {
        return forget(&earlier.record, records).map(|_| true);
    }
    if earlier.record.alone.is_none() || earlier.record.network.as_ref().is_none_or(|of| of.name != conf.name) {
        return Ok(false);
    }
    let msg = format!("container {} has addresses for its {} already", target.container_id, target.ifname);
    Err(CniError::new(Code::Attached, msg, "the runtime has to DEL it before it ADDs it again"))
}

/// Whether an attachment holds any of its addresses.
fn holds(record: &Attachment) -> Result<bool, CniError> {
    let Request { container_id, ifname, addresses, .. } = &record.request;
    let folder = record.network.as_ref().map(|network| Folder::find(Path::new(&*network.dir)));
    let Some(folder) = folder.transpose()?.flatten() else { return Ok(false) };
    let is_own = |inet: &Inet| Ok(folder.holder(inet.addr)?.is_some_and(|of| of.is(container_id, ifname.as_str())));
    addresses.iter().try_fold(false, |held, inet| Ok(held || is_own(inet)?))
}

/// Addresses that were taken, and what the disk has to be waited for.
type Taken = (Vec<Given>, Vec<Unsynced>);

/// Chooses addresses, writes them down where there is a place for it, and takes them; `None`: another ADD of the device was first.
fn take_alone(conf: &Conf, ipam: &Ipam, target: &Target, records: Option<&Records>) -> Result<Option<Taken>, CniError> {
    let folder = Folder::open(&ipam.dir)?;
    let choice = folder.choose(&ipam.sets, &ipam.asked)?;
    let mut changes = Vec::new();
    if let Some(records) = records {
        let path = target.netns.as_deref().unwrap_or_default();
        let addresses = choice.given.iter().map(|given| given.inet).collect();
        let request = Request::alone(&target.container_id, target.ifname, path, addresses);
        let boot = files::boot_id().act(|| "read the boot's id".into())?;
        let inode = fs::metadata(path).map(|meta| meta.ino()).unwrap_or_default();
        let mut record = request.record(&boot, inode);
        record.network = Some(Network { name: conf.name.clone(), dir: ipam.dir.to_string_lossy().into() });
        // What is not there now will not be missed later.
        record.alone = Some(Alone { seen_in: seen_in(Path::new(path)).filter(|_| inode != 0) });
        let Some(put) = records.put_new(&record)? else { return Ok(None) };
        changes.push(put);
    }
    match folder.take(&choice, &holder(target)) {
        Ok(taken) => changes.extend(taken),
        Err(error) => {
            let forgotten = records.map(|records| records.remove(&target.container_id, target.ifname));
            return Err(forgotten.and_then(Result::err).into_iter().fold(error, CniError::and));
        }
    }
    Ok(Some((choice.given, changes)))
}

fn attach(conf: Conf, device: Device, target: Target, beside: &Beside) -> Result<(Answer, Vec<Object>), CniError> {
    let dns = dns(&conf)?;
    let path = target.netns()?;
    let (netns, home) = netns(path)?;
    let inode = netns.inode().act(|| format!("look at {path}"))?;
    let boot = files::boot_id().act(|| "read the boot's id".into())?;
    let host_device = attach::host_device(&target.container_id, target.ifname);
    let records = Records::new(conf.attachments());
    let plan = Arc::new(Plan { conf, device, target, records, boot, inode });

    let (tell_written, written) = channel();
    let (tell_synced, synced) = channel();
    let writer = Arc::clone(&plan);
    beside.begin(move || {
        let (record, given, changes) = match writer.write_down() {
            Ok(written) => written,
            Err(error) => return drop(tell_written.send(Err(error))),
        };
        let _ = tell_written.send(Ok((record, given)));
        let done = files::sync_all(&changes);
        // Locked until it is answered.
        let _ = tell_synced.send((done, changes));
    });
    let Plan { conf, device, target, records, .. } = &*plan;
    let before = Before::look(&home, &netns, device.bridge, host_device);
    let (record, given) = match hear(&written).act(|| "take an address".into()).and_then(|written| written) {
        Ok(written) => written,
        Err(error) => {
            let unseen = before.err().map(|failed| refused(failed, records));
            return Err(unseen.into_iter().fold(error, CniError::and));
        }
    };
    let request = &record.request;
    let needed = |path: &str| needs(records, target, path);
    let attached = before.and_then(|before| kernel::attach(before, request, &needed));
    let attached = attached.map_err(|failed| refused(failed, records));
    let published = attached.as_ref().map_or(Ok(()), |_| publish(request, records));
    let act = || format!("write {} to the disk", conf.state.display());
    let (synced, _held) = hear(&synced).unwrap_or_else(|error| (Err(error), Vec::new()));
    match (attached, all([published, synced.act(act)])) {
        (Ok(attached), Ok(())) => Ok((answer(conf, device, (request, dns), &given, &attached.host), attached.switched)),
        (attached, rest) => {
            let attached = attached
                .and_then(|attached| attached.take_back(&netns, &needed).map_err(|failed| refused(failed, records)));
            all([attached, rest, give_back(&record, records)]).map(|()| (Answer::default(), Vec::new()))
        }
    }
}

/// Whether an attachment of this boot, but that of `own`, needs a sysctl of the host. Where nobody can tell, one does.
fn needs(records: &Records, own: &Target, path: &str) -> bool {
    let key = Key::Sysctl(path.into());
    let boot = files::boot_id().unwrap_or_default();
    let needs = |Attachment { request, boot_id, .. }: &Attachment| {
        let is_own = request.container_id == own.container_id && request.ifname == own.ifname;
        *boot_id == boot && !is_own && request.forwarding().host.get(&key).is_some()
    };
    records.all_for_rules().map_or(true, |all| all.iter().any(needs))
}

/// Switches back what an ADD has switched that was done and could not be answered.
pub(crate) fn switch_back(switched: &[Object], records: &Records, own: &Target) -> Result<(), CniError> {
    kernel::switch_back(switched, &|path| needs(records, own, path)).map_err(|failed| refused(failed, records))
}

/// Addresses and file go back, unless the device that has them refuses to go: then DEL finds the file.
fn give_back(record: &Attachment, records: &Records) -> Result<(), CniError> {
    let Request { host_device, addresses, .. } = &record.request;
    let held = |unknown: &str| {
        let addresses: Vec<String> = addresses.iter().map(|inet| inet.addr.to_string()).collect();
        let msg = format!("{unknown}what is written down of {host_device} stays: {}", addresses.join(", "));
        CniError::new(Code::Kernel, msg, "the DEL of this container takes what is left")
    };
    match kernel::has_device(*host_device) {
        Ok(false) => undo(record, records),
        Ok(true) => Err(held("")),
        Err(failed) => Err(held(&format!("{failed}; "))),
    }
}

/// The container's rules, as its file says.
fn publish(request: &Request, records: &Records) -> Result<(), CniError> {
    let Some(ports) = Ports::lock_for(records, request)? else { return Ok(()) };
    ports.settle()?;
    Ports::lead_anew(request);
    Ok(())
}

/// Everything that went wrong.
pub(crate) fn all(results: impl IntoIterator<Item = Result<(), CniError>>) -> Result<(), CniError> {
    results.into_iter().filter_map(Result::err).reduce(CniError::and).map_or(Ok(()), Err)
}

/// A second ADD is refused; what an ADD of an earlier boot, or one that was killed, has left is freed.
fn settle_earlier(Plan { target, records, boot, .. }: &Plan) -> Result<(), CniError> {
    let Some(earlier) = records.lock(&target.container_id, target.ifname)? else { return Ok(()) };
    let device = earlier.record.request.host_device;
    let stands = kernel::has_device(device).map_err(|failed| refused(failed, records))?;
    if earlier.record.boot_id == *boot && stands {
        let msg = format!("container {} has its {} already, joined to {device}", target.container_id, target.ifname);
        return Err(CniError::new(Code::Attached, msg, "the runtime has to DEL it before it ADDs it again"));
    }
    forget(&earlier.record, records).map(|_| ())
}

/// What was written down, the addresses of it, and what the disk has to be waited for.
type Written = (Attachment, Vec<Given>, Vec<Unsynced>);

/// What an ADD knows before it begins.
struct Plan {
    conf: Conf,
    device: Device,
    target: Target,
    records: Records,
    boot: String,
    inode: u64,
}

impl Plan {
    /// Chooses addresses, writes the attachment down, and takes them, in this order. When no address is free, or a host port is not,
    /// those of containers that are gone are.
    fn write_down(&self) -> Result<Written, CniError> {
        loop {
            settle_earlier(self)?;
            let held = [Code::Addresses, Code::Port];
            if let Some(written) = or_swept(&self.records, &held, || self.try_write_down())? {
                return Ok(written);
            }
        }
    }

    /// `None`: another ADD of the device was first.
    fn try_write_down(&self) -> Result<Option<Written>, CniError> {
        let Self { conf, device, target, records, .. } = self;
        let has_rules = !device.ports.is_empty() || device.masquerade == Some(true);
        let ports = has_rules.then(|| Ports::lock(records)).transpose()?;
        ports.as_ref().map_or(Ok(()), Ports::refuse_foreign)?;
        let folder = conf.ipam.as_ref().map(|ipam| Folder::open(&ipam.dir)).transpose()?;
        let choice = match (&conf.ipam, &folder) {
            (Some(ipam), Some(folder)) => folder.choose(&ipam.sets, &ipam.asked)?,
            _ => Choice::default(),
        };
        let mut record = request(conf, device, target, &choice.given)?.record(&self.boot, self.inode);
        let dir = conf.ipam.as_ref().map(|ipam| ipam.dir.to_string_lossy().into()).unwrap_or_default();
        record.network = Some(Network { name: conf.name.clone(), dir });
        if let Some(ports) = &ports {
            ports.refuse_clash(&record.request)?;
        }
        // With its rules once the addresses are held: they must not lead to the next holder's.
        let Some(put) = records.put_new(&record.without_rules())? else { return Ok(None) };
        let mut changes = vec![put];
        let mut take = || {
            let taken = folder.as_ref().map(|folder| folder.take(&choice, &holder(target))).transpose()?;
            changes.extend(taken.flatten());
            if record.request.has_rules() {
                changes.push(records.put(&record)?);
            }
            Ok(())
        };
        if let Err(error) = take() {
            let ips: Vec<_> = choice.given.iter().map(|given| given.inet.addr).collect();
            let release = |folder: &Folder| folder.release(&ips, &target.container_id, target.ifname.as_str());
            let freed = folder.as_ref().map(release).and_then(Result::err);
            let forgotten = records.remove(&target.container_id, target.ifname).err();
            return Err([freed, forgotten].into_iter().flatten().fold(error, CniError::and));
        }
        Ok(Some((record, choice.given, changes)))
    }
}

/// The configuration as `core::attach` wants it.
fn request(conf: &Conf, device: &Device, target: &Target, given: &[Given]) -> Result<Request, CniError> {
    let alone = device.bridge.is_none();
    let gateways = given.iter().filter(|_| alone || device.is_gateway);
    let gateways =
        gateways.map(|given| Inet::new(given.gateway, given.inet.len()).unwrap_or(Inet::host(given.gateway)));
    let mut routes: Vec<Way> =
        given.iter().filter(|_| device.default_route).map(|given| Way::out(given.gateway)).collect();
    for route in conf.ipam.iter().flat_map(|ipam| &ipam.routes) {
        routes.push(way(route, given)?);
    }
    routes.iter_mut().for_each(|way| way.onlink = alone && way.via.is_some());
    if let Some(mtu) = device.mtu.filter(|mtu| mtu.get() < IPV6_MTU)
        && let Some(v6) = given.iter().find(|given| given.inet.addr.is_ipv6())
    {
        let msg = format!("the MTU is {mtu}, and {} needs {IPV6_MTU} (RFC 8200)", v6.inet.addr);
        return Err(CniError::new(Code::Config, msg, "raise mtu, or leave the IPv6 range out"));
    }
    device.ports.iter().try_for_each(|map| reachable(map, given))?;
    Ok(Request {
        container_id: target.container_id.clone(),
        ifname: target.ifname,
        netns: target.netns()?.into(),
        host_device: attach::host_device(&target.container_id, target.ifname),
        bridge: device.bridge,
        gateways: gateways.collect(),
        addresses: given.iter().map(|given| if alone { Inet::host(given.inet.addr) } else { given.inet }).collect(),
        routes,
        mac: target.args.mac.or(device.mac),
        mtu: device.mtu,
        forward: alone || device.is_gateway,
        port: PortFlags { hairpin: device.hairpin, isolated: device.isolated },
        promisc: device.promisc,
        ports: device.ports.clone(),
        masquerade_beyond: beyond(device, given),
    })
}

/// A host port at one address leads to a container of the same family, and from where packets can be led at all.
fn reachable(map: &PortMap, given: &[Given]) -> Result<(), CniError> {
    let Some(ip) = map.only_at() else { return Ok(()) };
    let refuse = |why: &str, hint: &str| Err(CniError::new(Code::Config, format!("portMappings: {map}: {why}"), hint));
    if ip.is_ipv6() && ip.is_loopback() {
        return refuse("IPv6 leads nothing from ::1 elsewhere", "publish it at 127.0.0.1, or leave hostIP out");
    }
    if !given.iter().any(|given| given.inet.addr.is_ipv4() == ip.is_ipv4()) {
        let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        let hint = format!("give the network an {family} range, or publish the port at an address of the other family");
        return refuse(&format!("the container has no {family} address"), &hint);
    }
    Ok(())
}

/// `ipMasq`: what leaves the container's subnet has the host's address, but towards containers of other nodes.
fn beyond(device: &Device, given: &[Given]) -> Vec<Prefix> {
    if device.masquerade != Some(true) {
        return Vec::new();
    }
    // An outer network says all.
    let subnets = given.iter().map(|given| given.inet.network());
    let subnets = subnets.filter(|subnet| !device.networks.iter().any(|network| network.covers(subnet)));
    subnets.chain(device.networks.iter().copied()).collect()
}

/// A configured route; without a next hop it goes by the gateway of its family.
pub(super) fn way(route: &RouteTo, given: &[Given]) -> Result<Way, CniError> {
    let gateway = given.iter().map(|given| given.gateway).find(|gateway| gateway.is_ipv4() == route.dst.is_v4());
    let mut way = Way::new(route.dst, route.gw.or(gateway));
    for (key, value) in &route.rest {
        let number = |first: u32, last: u32| {
            let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
            let number = number.filter(|number| (first..=last).contains(number));
            let msg = format!("the route to {} has the {key} {value}", route.dst);
            number.ok_or_else(|| CniError::new(Code::Config, msg, format!("write a number from {first} to {last}")))
        };
        match key.as_str() {
            "priority" => way.metric = Some(number(0, u32::MAX)?),
            "table" => way.table = Some(number(0, u32::MAX)?),
            "scope" => way.scope = Some(scope(number(0, u32::MAX)?, route)?),
            "mtu" => way.mtu = Some(number(1, MOST_MTU)?),
            "advmss" => way.advmss = Some(number(1, MOST_ADVMSS)?),
            _ => {
                let msg = format!("the route to {} has {key}, which is not built in", route.dst);
                return Err(CniError::new(Code::Unsupported, msg, format!("take {key} out of the configuration")));
            }
        }
    }
    if way.scope.is_some_and(|scope| scope >= attach::SCOPE_LINK) {
        way.via = route.gw;
    }
    Ok(way)
}

/// rtm_scope; what it means the kernel says.
fn scope(number: u32, route: &RouteTo) -> Result<u8, CniError> {
    u8::try_from(number).map_err(|_| {
        let msg = format!("the route to {} has the scope {number}", route.dst);
        CniError::new(Code::Config, msg, "write 0 (global), 200 (site), 253 (link) or 254 (host)")
    })
}

/// The resolvers that are told on.
fn dns(conf: &Conf) -> Result<Map<String, Value>, CniError> {
    if let Some(device) = conf.device.as_ref().filter(|device| !device.dns.is_empty()) {
        return Ok(device.dns.clone());
    }
    let Some(path) = conf.ipam.as_ref().and_then(|ipam| ipam.resolv_conf.as_deref()) else { return Ok(Map::new()) };
    let text = files::read_limited(path, RESOLV_LIMIT).act(|| format!("read {}", path.display()))?.unwrap_or_default();
    Ok(resolv_conf(&String::from_utf8_lossy(&text)))
}

fn answer(
    conf: &Conf,
    device: &Device,
    (request, dns): (&Request, Map<String, Value>),
    given: &[Given],
    host: &LinuxKernel,
) -> Answer {
    let of_host = |name: LinkName| {
        let link = host.mirror().link(name);
        let (mac, mtu) = (link.and_then(|link| link.mac), link.and_then(|link| link.mtu).map(Mtu::get));
        Interface { name: name.to_string(), mac, mtu, sandbox: None }
    };
    let mut interfaces: Vec<Interface> = request.bridge.into_iter().chain([request.host_device]).map(of_host).collect();
    let mtu = interfaces.last().and_then(|pair| pair.mtu);
    let mac = request.container_side().host.link(request.ifname).and_then(|link| link.mac);
    let sandbox = Some(request.netns.to_string());
    interfaces.push(Interface { name: request.ifname.to_string(), mac, mtu, sandbox });
    let last = Some(interfaces.len() - 1);
    let ips = given.iter().zip(&request.addresses);
    let ips = ips.map(|(given, address)| Ip { address: *address, gateway: Some(given.gateway), interface: last });
    let default = given.iter().filter(|_| device.default_route).map(|given| {
        let dst = if given.gateway.is_ipv4() { Prefix::DEFAULT_V4 } else { Prefix::DEFAULT_V6 };
        RouteTo { dst, gw: Some(given.gateway), rest: Map::new() }
    });
    let configured = || conf.ipam.iter().flat_map(|ipam| &ipam.routes);
    // A configured one of the same table and priority has taken its place.
    let is_same =
        |of: &RouteTo, dst| of.dst == dst && ["table", "priority"].iter().all(|key| !of.rest.contains_key(*key));
    let default = default.filter(|default| !configured().any(|of| is_same(of, default.dst)));
    Answer { interfaces, ips: ips.collect(), routes: default.chain(configured().cloned()).collect(), dns }
}
