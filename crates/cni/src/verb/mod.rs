//! The verbs, and what they share.

pub mod add;
pub mod check;
pub mod del;
pub mod gc;
pub mod status;

pub(crate) use add::all;

use std::path::Path;

use twill_core::attach::{Attachment, Clash, Request};
use twill_core::flannel::subnet_env::SubnetEnv;
use twill_core::reconcile::StepError;
use twill_kernel::attach::Failed;
use twill_kernel::files::{self, Unsynced};
use twill_kernel::netns::Netns;

use crate::conf::Conf;
use crate::error::{Act, CniError, Code};
use crate::ipam::{Folder, who_has_device};
use crate::ports::Ports;
use crate::records::Records;

/// More bytes than subnet.env has.
const LIMIT: u64 = 1 << 16;

/// Fills in what comes from the node's lease: ranges, MTU, who masquerades.
fn lease(conf: &mut Conf) -> Result<(), CniError> {
    let Some(file) = &conf.subnet_file else { return Ok(()) };
    let hint = "start `twill agent` on this node; `twill status` says what it waits for";
    let text = files::read_limited(file, LIMIT).act(|| format!("read {}", file.display()))?;
    let Some(text) = text else {
        return Err(CniError::new(
            Code::TryAgain,
            format!("this node has no lease yet: {} is not there", file.display()),
            hint,
        ));
    };
    let env = SubnetEnv::parse(&String::from_utf8_lossy(&text))
        .map_err(|lacks| CniError::new(Code::TryAgain, format!("read {}: {lacks}", file.display()), hint))?;
    if let Some(ipam) = &mut conf.ipam {
        ipam.of_subnets([env.v4, env.v6].into_iter().flatten())?;
    }
    if let Some(device) = &mut conf.device {
        device.networks = [env.v4, env.v6].into_iter().flatten().map(|(network, _)| network).collect();
        device.mtu = device.mtu.or(Some(env.mtu));
        device.masquerade = device.masquerade.or(Some(!env.ip_masq));
    }
    Ok(())
}

/// A container's namespace, and the host's, in which the program runs.
fn netns(path: &str) -> Result<(Netns, Netns), CniError> {
    let gone = |error: std::io::Error| {
        let msg = format!("open the network namespace {path}: {error}");
        CniError::new(Code::NoContainer, msg, "the container has ended, or the runtime names the wrong path")
    };
    let container = Netns::open(Path::new(path)).map_err(gone)?;
    let home = Netns::of_first_thread().act(|| "open the own network namespace".into())?;
    if container == home {
        let msg = format!("{path} is the host's own network namespace");
        return Err(CniError::new(Code::NoContainer, msg, "a container with the host's network needs no plugin"));
    }
    Ok((container, home))
}

/// Takes everything of an attachment but its device: its rules, then its addresses, then its file; each only when the one before is
/// gone, so that whoever finds the file can go on. Gives what the disk has to be waited for.
pub(crate) fn forget(record: &Attachment, records: &Records) -> Result<Vec<Unsynced>, CniError> {
    let ports = Ports::lock_for(records, &record.request)?;
    let _struck = match &ports {
        Some(ports) => Some(ports.withdraw(record)?),
        None => Ports::clear(records).map(|()| None)?,
    };
    free(record, records)
}

/// As [`forget`], for an ADD that is undone: what fails keeps nothing from being freed, since it was never answered.
fn undo(record: &Attachment, records: &Records) -> Result<(), CniError> {
    let ports = Ports::lock_for(records, &record.request)?;
    let unpublished = ports.as_ref().map(|ports| ports.withdraw(record)).transpose();
    let freed = free(record, records).map(|_| ());
    all([unpublished.map(|_| ()), freed])
}

/// The addresses, then the file.
pub(crate) fn free(record: &Attachment, records: &Records) -> Result<Vec<Unsynced>, CniError> {
    let Request { container_id, ifname, addresses, .. } = &record.request;
    let folder = record.network.as_ref().map(|network| Folder::find(network.dir.as_ref().as_ref()));
    let folder = folder.transpose()?.flatten();
    let mut changes = Vec::new();
    if let Some(folder) = folder {
        let ips: Vec<_> = addresses.iter().map(|inet| inet.addr).collect();
        changes.extend(folder.release(&ips, container_id, ifname.as_str())?);
    }
    changes.extend(records.remove(container_id, *ifname)?);
    Ok(changes)
}

/// A refusal of the kernel as the specification's error.
pub(crate) fn refused(failed: Failed, records: &Records) -> CniError {
    let msg = failed.to_string();
    let (code, details) = match failed {
        Failed::Enter(_) => {
            (Code::NoContainer, "the container has ended, or its path is no network namespace".to_owned())
        }
        Failed::TableTaken(name) => {
            (Code::Kernel, format!("remove it: nft delete table {name}; or start containers without published ports"))
        }
        Failed::NameTaken(_) => (Code::Attached, "let the runtime choose another CNI_IFNAME".to_owned()),
        Failed::Clash(Clash::NotABridge(name)) => {
            (Code::Bridge, format!("name another bridge in the configuration, or remove {name}"))
        }
        Failed::Clash(Clash::Addresses { bridge, ports, .. }) => {
            let users: Vec<String> = ports.iter().map(|port| who_has_device(*port, records)).collect();
            let users = users.join(", ");
            (
                Code::Bridge,
                format!("stop who uses {bridge} ({users}) and it is repaired by itself, or name another bridge"),
            )
        }
        Failed::And { first, .. } => {
            let CniError { code, details, .. } = refused(*first, records);
            (code, details)
        }
        Failed::Step { cause: StepError::Refused { errno: libc::EPERM, .. }, .. } => {
            (Code::Kernel, "the plugin needs CAP_NET_ADMIN: run it as root".to_owned())
        }
        Failed::Step { .. } | Failed::Kernel(_) => (Code::Kernel, "correct the cause and try again".to_owned()),
    };
    CniError::new(code, msg, details)
}
