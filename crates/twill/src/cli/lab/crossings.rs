//! What crossing between user and kernel space costs: the udp backend's path, and VXLAN's between the same two hosts, counted alike.

use std::fs;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::sockopt::socket_peercred;
use twill_core::host::{Addr, Fdb, Few, HostState, Link, LinkKind, Neigh, Object, Vxlan};
use twill_core::net::{BadValue, Inet, LinkName, MacAddr};
use twill_core::reconcile::{Claim, Desired, Scope, plan};
use twill_kernel::netns::Netns;
use twill_kernel::tun::device_counters;
use twill_kernel::{Interest, Kernel, LinuxKernel};
use twill_lab::{LabError, enter, stream};
use twill_tunnel::counters::Snapshot;

use super::scenario::Section;
use crate::output::columns;

/// Bytes that are carried to see what they cost.
const BULK: usize = 32 << 20;
/// The VXLAN beside the tunnel, for as long as it is measured: its device and VNI, and addresses that RFC 2544 has for measurements.
const BESIDE: &str = "beside0";
const VNI: i64 = 4095;
const PORT: i64 = 8472;
const MTU: i64 = 1450;
const NETWORK: u8 = 30;

/// One end of both paths.
pub(super) struct End<'a> {
    /// The host's namespace.
    pub(super) host: &'a Netns,
    /// Its address on the underlay.
    pub(super) address: IpAddr,
    /// The container's namespace.
    pub(super) container: &'a Netns,
    /// Its address on the overlay.
    pub(super) inner: IpAddr,
}

/// What was counted on the sender's host while a stream passed.
struct Cost {
    /// Packets and bytes that the path carried, both ways.
    packets: f64,
    megabytes: f64,
    /// For each row of the table.
    calls: [u64; 5],
}

/// The source's crossings, each with what the source says, and what two streams of the same length took.
pub(super) fn section(run_dir: &Path, from: &End<'_>, to: &End<'_>) -> Result<Section, LabError> {
    let watch = Watch::new(run_dir, from.host)?;
    let udp = watch.cost(None, || stream::carry(from.container, to.container, to.inner, BULK))?;
    let beside = Beside::make(from, to)?;
    let vxlan = watch.cost(Some(BESIDE), || stream::carry(from.host, to.host, beside.target, BULK));
    beside.remove(from, to)?;
    let vxlan = vxlan?;
    let names = [
        ("application → kernel", "1"),
        ("kernel → daemon", "1"),
        ("daemon → kernel", "1"),
        ("the daemon waits", "-"),
        ("the daemon is scheduled", "-"),
    ];
    let each = |cost: &Cost, row: usize| {
        let calls = cost.calls[row] as f64;
        [format!("{:.3}", calls / cost.packets.max(1.0)), format!("{:.1}", calls / cost.megabytes.max(1e-6))]
    };
    let rows = names.iter().enumerate().map(|(row, (what, source))| {
        let ([packet, megabyte], [packet_vxlan, megabyte_vxlan]) = (each(&udp, row), each(&vxlan, row));
        [(*what).to_owned(), (*source).to_owned(), packet, megabyte, packet_vxlan, megabyte_vxlan]
    });
    let head = ["CROSSING", "THE SOURCE: EACH PACKET", "UDP: PACKET", "UDP: MB", "VXLAN: PACKET", "VXLAN: MB"];
    let carried = |what: &str, cost: &Cost, how: &str| {
        format!("{what}: {:.0} packets and {:.1} MB, both ways{how}", cost.packets, cost.megabytes)
    };
    let notes = [
        carried("udp", &udp, ", from container to container"),
        carried("vxlan", &vxlan, ", from host to host by a device that stood beside the tunnel meanwhile"),
        "counted by the stream's sender, by the daemon's pumps, and by the kernel (context switches of the daemon's threads)"
            .to_owned(),
    ];
    let lines = columns(&head, rows).lines().map(str::to_owned).chain(notes).collect();
    Ok(Section { title: "crossings between user and kernel space on node1, while a stream passes".into(), lines })
}

/// The daemon of a host, to be counted.
struct Watch<'a> {
    host: &'a Netns,
    run_dir: String,
    daemon: i32,
}

/// What stands in the counters at one moment.
struct Count {
    pumps: Snapshot,
    switches: u64,
    /// TCP's segments on the host, and bytes of the device.
    device: [u64; 2],
}

impl<'a> Watch<'a> {
    fn new(run_dir: &Path, host: &'a Netns) -> Result<Self, LabError> {
        let failed = |e: std::io::Error| LabError::new("lab-failed", format!("ask who the agent is: {e}"));
        let stream = UnixStream::connect(run_dir.join("twill.sock")).map_err(failed)?;
        let peer = socket_peercred(&stream).map_err(|e| failed(e.into()))?;
        let daemon = peer.pid.as_raw_nonzero().get();
        Ok(Self { host, run_dir: run_dir.to_string_lossy().into_owned(), daemon })
    }

    /// What an act took. Without a device the pumps know what was carried; it gives how often it wrote.
    fn cost(&self, device: Option<&str>, act: impl FnOnce() -> Result<u64, LabError>) -> Result<Cost, LabError> {
        let before = self.count(device)?;
        let writes = act()?;
        let after = self.count(device)?;
        let total = |count: &Count| count.pumps.carried();
        let carried = |count: &Count| match device {
            None => [total(count).packets, total(count).bytes],
            Some(_) => count.device,
        };
        let ([old_packets, old_bytes], [packets, bytes]) = (carried(&before), carried(&after));
        let (b, a) = (before.pumps.calls, after.pumps.calls);
        Ok(Cost {
            packets: (packets - old_packets) as f64,
            megabytes: (bytes - old_bytes) as f64 / 1e6,
            calls: [
                writes,
                (a.tun_reads - b.tun_reads) + (a.udp_receives - b.udp_receives),
                (a.udp_sends - b.udp_sends) + (a.tun_writes - b.tun_writes),
                a.waits - b.waits,
                after.switches - before.switches,
            ],
        })
    }

    fn count(&self, device: Option<&str>) -> Result<Count, LabError> {
        let text = enter::output(self.host, &["top", "--count", "1", "-o", "json", "--run-dir", &self.run_dir])?;
        let failed = |text: String| LabError::new("lab-failed", text);
        let pumps = serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
        let device = match device {
            None => [0; 2],
            Some(name) => {
                // A device counts what is cut behind it as one packet: how many there are on the wire only TCP knows.
                let read = |file: &str| {
                    let text = self.host.run(|| fs::read_to_string(format!("/proc/thread-self/net/{file}")));
                    text.and_then(|text| text).map_err(|e| failed(format!("read the kernel's counters: {e}")))
                };
                let segments = tcp_segments(&read("snmp")?).ok_or_else(|| failed("TCP has no counters".into()))?;
                let bytes = device_bytes(&read("dev")?, name);
                [segments, bytes.ok_or_else(|| failed(format!("{name} has no counters")))?]
            }
        };
        Ok(Count { pumps, switches: switches(self.daemon), device })
    }
}

/// Bytes of a device, both ways (Documentation/filesystems/proc.rst, `net/dev`).
fn device_bytes(text: &str, name: &str) -> Option<u64> {
    let numbers = device_counters(text, name)?;
    Some(numbers.first()? + numbers.get(8)?)
}

/// Segments that TCP received and sent (RFC 4022, `net/snmp`).
fn tcp_segments(text: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp:"));
    let (names, numbers) = (lines.next()?, lines.next()?);
    let of = |name: &str| {
        let at = names.split_whitespace().position(|word| word == name)?;
        numbers.split_whitespace().nth(at)?.parse::<u64>().ok()
    };
    Some(of("InSegs")? + of("OutSegs")?)
}

/// How often the threads of a process have left a processor, by the kernel's count.
fn switches(process: i32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let of = |text: String| {
        let lines = text.lines().filter(|line| line.contains("ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok()).sum::<u64>()
    };
    tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok()).map(of).sum()
}

/// A VXLAN tunnel between the two hosts, beside everything else.
struct Beside {
    target: IpAddr,
}

impl Beside {
    fn make(from: &End<'_>, to: &End<'_>) -> Result<Self, LabError> {
        bring(from.host, &objects((1, from.address), (2, to.address)).map_err(bad)?)?;
        bring(to.host, &objects((2, to.address), (1, from.address)).map_err(bad)?)?;
        Ok(Self { target: inner(2) })
    }

    fn remove(self, from: &End<'_>, to: &End<'_>) -> Result<(), LabError> {
        bring(from.host, &HostState::new())?;
        bring(to.host, &HostState::new())
    }
}

fn inner(number: u8) -> IpAddr {
    IpAddr::from([198, 18, 0, number])
}

/// Device, address, and the other end's entries, on the host of end `own`.
fn objects(own: (u8, IpAddr), other: (u8, IpAddr)) -> Result<HostState, BadValue> {
    let link: LinkName = BESIDE.parse()?;
    let mac = |number: u8| MacAddr([2, 0, 0, 0x41, 0x98, number]);
    let kind = LinkKind::Vxlan(Vxlan {
        vni: VNI.try_into()?,
        port: PORT.try_into()?,
        local: Some(own.1),
        lower: Some("eth0".parse()?),
        learning: false,
        gbp: false,
        remote: None,
        outer: Default::default(),
        room: Default::default(),
        special: false,
    });
    let device = Link { mac: Some(mac(own.0)), mtu: Some(MTU.try_into()?), ..Link::up(link, kind) };
    let (ip, there) = (inner(other.0), Few::One(other.1));
    let neigh = Neigh { link, ip, mac: Some(mac(other.0)), permanent: true, special: false, state: 0 };
    let fdb = Fdb {
        link,
        mac: mac(other.0),
        dst: there,
        port: None,
        permanent: true,
        special: false,
        detour: None,
        state: 0,
    };
    let all = [
        Object::Link(Box::new(device)),
        Object::Addr(Addr::global(link, Inet::new(inner(own.0), NETWORK)?)),
        Object::Neigh(neigh),
        Object::Fdb(fdb),
    ];
    Ok(all.into_iter().collect())
}

/// Brings what there is of the tunnel on a host to what is wanted of it.
fn bring(host: &Netns, wanted: &HostState) -> Result<(), LabError> {
    let link: LinkName = BESIDE.parse().map_err(bad)?;
    let claim = Claim { devices: [link].into(), ..Claim::default() };
    let work = || {
        let interest = Interest { devices: Some([link].into()), ..Interest::default() };
        let mut kernel = LinuxKernel::open(interest).map_err(|e| format!("{e}: {}", e.source))?;
        let want = Desired { host: wanted.clone(), claim };
        let todo = plan(&want, kernel.mirror(), Scope::All);
        let outcome = kernel.apply(&todo);
        let failed = todo.steps.iter().zip(&outcome.steps).find_map(|(step, done)| Some((step, done.as_ref().err()?)));
        failed.map_or(Ok(()), |(step, error)| Err(format!("{step}: {error}")))
    };
    let done = host.run(work).unwrap_or_else(|error| Err(error.to_string()));
    done.map_err(|text| LabError::new("lab-failed", format!("put a VXLAN beside the tunnel: {text}")))
}

fn bad(error: BadValue) -> LabError {
    LabError::new("lab-failed", error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_devices_counters_are_found_in_the_kernels_table() {
        let text = "Inter-|   Receive\n face |bytes    packets errs\n    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n\
                    beside0: 100 20 0 0 0 0 0 0 3000 40 0 0 0 0 0 0\n";
        assert_eq!(device_bytes(text, "beside0"), Some(3100));
        assert_eq!(device_bytes(text, "beside"), None);
        let text = "Ip: Forwarding\nIp: 1\nTcp: MaxConn InSegs OutSegs RetransSegs\nTcp: -1 20 40 7\nUdp: In\nUdp: 3\n";
        assert_eq!(tcp_segments(text), Some(60));
        assert_eq!(tcp_segments("Tcp: InSegs\n"), None);
    }
}
