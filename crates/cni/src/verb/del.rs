//! DEL: never fails for what is gone already, and never forgets what it could not remove.

use std::path::Path;

use twill_core::attach::{self, Attachment};
use twill_kernel::attach as kernel;
use twill_kernel::files::{self, Unsynced};

use super::{forget, free, netns, refused};
use crate::clear::Clear;
use crate::env::Target;
use crate::error::{Act, CniError};
use crate::ipam::{Folder, Held};
use crate::masquerade;
use crate::ports::Ports;
use crate::records::Records;

/// Runs DEL.
pub fn run(conf: &Clear, target: &Target) -> Result<String, CniError> {
    let records = Records::new(conf.attachments());
    let locked = records.lock(&target.container_id, target.ifname)?;
    let record = locked.as_ref().map(|locked| &locked.record);
    if !has_device(conf, target, record).map_err(|failed| refused(failed, &records))? {
        return addresses_alone(conf, target, &records, record);
    }
    let host_device = record.map(|record| record.request.host_device);
    let host_device = host_device.unwrap_or_else(|| attach::host_device(&target.container_id, target.ifname));
    let gone = kernel::detach(host_device).map_err(|failed| refused(failed, &records))?;
    if !gone && record.is_none() && is_known(conf, target)? {
        take_away_inside(conf, target).map_err(|failed| refused(failed, &records))?;
    }
    if record.is_none() {
        Ports::clear(&records)?;
        // What the container's other device has goes with the last of them.
        let is_stale = |id: &str| Ok(id == target.container_id && !has_another(conf, target, &records)?);
        masquerade::clear(conf, &records, is_stale)?;
    }
    // The addresses are on no device any more.
    let mut changes = match (record, &conf.addresses) {
        (Some(record), _) => forget(record, &records)?,
        // Where nothing is written down every file is looked at, as host-local does.
        (None, Some(dir)) => match release_by_search(dir, target, Some(&records))? {
            Some(changes) => changes,
            None => return run(conf, target),
        },
        (None, None) => records.remove(&target.container_id, target.ifname)?.into_iter().collect(),
    };
    if let Some(dir) = &conf.flannel_dir {
        let file = dir.join(&target.container_id);
        if file.exists() {
            changes.extend(files::remove(&file).act(|| format!("remove {}", file.display()))?);
        }
    }
    files::sync_all(&changes).act(|| format!("write {} to the disk", conf.state.display()))?;
    Ok(String::new())
}

/// Whatever type the configuration has by now: what ADD has written down goes whole, and no address while its device stands.
fn has_device(conf: &Clear, target: &Target, record: Option<&Attachment>) -> Result<bool, kernel::Failed> {
    match record {
        _ if conf.has_device => Ok(true),
        Some(record) => Ok(record.alone.is_none() && conf.is_of(record)),
        None => kernel::has_device(attach::host_device(&target.container_id, target.ifname)),
    }
}

/// For somebody else's plugin.
fn addresses_alone(
    conf: &Clear,
    target: &Target,
    records: &Records,
    record: Option<&Attachment>,
) -> Result<String, CniError> {
    let changes = match (record.filter(|record| conf.has_alone(record)), &conf.addresses) {
        (Some(record), _) => free(record, records)?,
        (None, dir) => {
            records.sweep_half_made_of(&target.container_id, target.ifname)?;
            // What is written down is another network's.
            let unwritten = record.is_none().then_some(records);
            match dir.as_deref().map_or(Ok(Some(Vec::new())), |dir| release_by_search(dir, target, unwritten))? {
                Some(changes) => changes,
                None => return run(conf, target),
            }
        }
    };
    files::sync_all(&changes).act(|| format!("write {} to the disk", conf.state.display()))?;
    Ok(String::new())
}

/// Another plugin has attached it, as what it answered says or its address file. Any other device of that name is one that an ADD was
/// refused for.
fn is_known(conf: &Clear, target: &Target) -> Result<bool, CniError> {
    if conf.was_answered(target.ifname) {
        return Ok(true);
    }
    let Some(folder) = conf.addresses.as_deref().map(Folder::find).transpose()?.flatten() else { return Ok(false) };
    Ok(folder.held()?.iter().any(|held| is_of(held, target)))
}

fn take_away_inside(conf: &Clear, target: &Target) -> Result<(), kernel::Failed> {
    let (Some(path), Some(bridge)) = (&target.netns, conf.bridge) else { return Ok(()) };
    let Ok((container, _)) = netns(path) else { return Ok(()) };
    match kernel::detach_inside(&container, target.ifname, bridge) {
        // A plain file: no namespace, hence no device.
        Err(kernel::Failed::Enter(error)) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        taken => taken.map(|_| ()),
    }
}

fn is_of(held: &Held, target: &Target) -> bool {
    held.holder.as_ref().is_some_and(|holder| holder.is(&target.container_id, target.ifname.as_str()))
}

/// Another device of the container's holds an address of the network, and another plugin has attached that one, too.
fn has_another(conf: &Clear, target: &Target, records: &Records) -> Result<bool, CniError> {
    let Some(folder) = conf.addresses.as_deref().map(Folder::find).transpose()?.flatten() else { return Ok(false) };
    for held in folder.held()?.iter().filter(|held| !is_of(held, target)) {
        let Some(holder) = held.holder.as_ref().filter(|holder| holder.container_id == target.container_id) else {
            continue;
        };
        let ifname = holder.ifname.as_deref().and_then(|name| name.parse().ok());
        if ifname.map(|ifname| records.get(&target.container_id, ifname)).transpose()?.flatten().is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// With `unwritten`, a file that says nothing goes as well, unless an ADD has written one down meanwhile: `None`, and its addresses stay.
fn release_by_search(
    dir: &Path,
    target: &Target,
    unwritten: Option<&Records>,
) -> Result<Option<Vec<Unsynced>>, CniError> {
    let Target { container_id, ifname, .. } = target;
    let forget = || unwritten.map_or(Ok(None), |records| records.remove(container_id, *ifname));
    let Some(folder) = Folder::find(dir)? else { return Ok(Some(forget()?.into_iter().collect())) };
    // An ADD takes addresses, and writes down whose they are, under this lock.
    if unwritten.map_or(Ok(None), |records| records.get(container_id, *ifname))?.is_some() {
        return Ok(None);
    }
    let held = folder.held()?;
    let ips: Vec<_> = held.iter().filter(|held| is_of(held, target)).map(|held| held.ip).collect();
    let mut changes = folder.release(&ips, container_id, ifname.as_str())?;
    changes.extend(forget()?);
    Ok(Some(changes))
}
