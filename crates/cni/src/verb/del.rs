//! DEL: never fails for what is gone already, and never forgets what it could not remove.

use std::path::Path;

use twill_core::attach::{self, Attachment};
use twill_kernel::attach as kernel;
use twill_kernel::files::{self, Unsynced};

use super::{forget, netns, refused};
use crate::clear::Clear;
use crate::env::Target;
use crate::error::{Act, CniError};
use crate::ipam::Folder;
use crate::ports::Ports;
use crate::records::Records;

/// Runs DEL.
pub fn run(conf: &Clear, target: &Target) -> Result<String, CniError> {
    let records = Records::new(conf.attachments());
    let locked = if conf.has_device { records.lock(&target.container_id, target.ifname)? } else { None };
    let record = locked.as_ref().map(|locked| &locked.record);
    if conf.has_device {
        take_away(record, target).map_err(|failed| refused(failed, &records))?;
    }
    if conf.has_device && record.is_none() {
        Ports::clear(&records)?;
    }
    // The addresses are on no device any more.
    let mut changes = match (record, &conf.addresses) {
        (Some(record), _) => forget(record, &records)?,
        // Where nothing is written down every file is looked at, as host-local does.
        (None, Some(dir)) => release_by_search(dir, &target.container_id, target.ifname.as_str())?,
        (None, None) => Vec::new(),
    };
    if conf.has_device && record.is_none() {
        changes.extend(records.remove(&target.container_id, target.ifname)?);
    }
    if let Some(dir) = &conf.flannel_dir {
        let file = dir.join(&target.container_id);
        if file.exists() {
            changes.extend(files::remove(&file).act(|| format!("remove {}", file.display()))?);
        }
    }
    files::sync_all(&changes).act(|| format!("write {} to the disk", conf.state.display()))?;
    Ok(String::new())
}

fn take_away(record: Option<&Attachment>, target: &Target) -> Result<(), kernel::Failed> {
    let derived = || attach::host_device(&target.container_id, target.ifname);
    let gone = kernel::detach(record.map_or_else(derived, |record| record.request.host_device))?;
    // Not ours, or of an ADD that was killed: its device is known by the container's end alone.
    if !gone
        && record.is_none()
        && let Some(path) = &target.netns
        && let Ok((container, _)) = netns(path)
    {
        return match kernel::detach_inside(&container, target.ifname) {
            // A plain file: no namespace, hence no device.
            Err(kernel::Failed::Enter(error)) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            taken => taken.map(|_| ()),
        };
    }
    Ok(())
}

fn release_by_search(dir: &Path, container_id: &str, ifname: &str) -> Result<Vec<Unsynced>, CniError> {
    let Some(folder) = Folder::find(dir)? else { return Ok(Vec::new()) };
    let held = folder.held()?;
    let ips = held.iter().filter(|held| held.holder.as_ref().is_some_and(|holder| holder.is(container_id, ifname)));
    let ips: Vec<_> = ips.map(|held| held.ip).collect();
    folder.release(&ips, container_id, ifname)
}
