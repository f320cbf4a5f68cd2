//! GC: what no attachment holds is freed.

use std::net::IpAddr;

use twill_core::attach;
use twill_core::ipam::Holder;
use twill_kernel::attach as kernel;
use twill_kernel::files;

use super::{all, refused};
use crate::clear::{Clear, Valid};
use crate::error::{Act, CniError};
use crate::ipam::Folder;
use crate::masquerade;
use crate::ports::Ports;
use crate::records::Records;
use crate::sweep;

/// Runs GC: attachments of this network that the runtime does not name go as DEL takes them, then addresses without one.
pub fn run(conf: &Clear) -> Result<String, CniError> {
    let mut valid = conf.valid()?;
    // Those of no network, a lab's, are no runtime's to name.
    let records = Records::new(conf.attachments());
    let others = records.all()?.into_iter().filter(|record| record.network.is_none()).map(|record| record.request);
    valid.extend(others.map(|r| Valid { container_id: r.container_id, ifname: r.ifname.to_string() }));
    let not_understood = records.not_understood()?;
    let holders = not_understood.iter().filter_map(|(name, _)| name.split_once(':'));
    valid.extend(holders.map(|(id, ifname)| Valid { container_id: id.to_owned(), ifname: ifname.to_owned() }));
    // Only then: a device that refuses to go, or a rule, has its addresses still.
    stale_attachments(conf, &valid, &records)?;
    stale_addresses(conf, &valid, &records)?;
    // They were left alone, and so was what they hold.
    all(not_understood.into_iter().map(|(_, error)| Err(error)))?;
    Ok(String::new())
}

fn names(valid: &[Valid], container_id: &str, ifname: Option<&str>) -> bool {
    valid.iter().any(|v| v.container_id == container_id && ifname.is_none_or(|ifname| v.ifname == ifname))
}

fn stale_attachments(conf: &Clear, valid: &[Valid], records: &Records) -> Result<(), CniError> {
    records.sweep_half_made()?;
    // Whatever type the configuration has by now.
    let ours = records.all()?.into_iter().filter(|record| conf.has(record));
    let stale = ours.filter(|r| !names(valid, &r.request.container_id, Some(r.request.ifname.as_str())));
    all(stale.map(|record| {
        let Some(locked) = records.lock(&record.request.container_id, record.request.ifname)? else { return Ok(()) };
        if locked.record.alone.is_none() {
            kernel::detach(locked.record.request.host_device).map_err(|failed| refused(failed, records))?;
        }
        sweep::free(&locked, records)
    }))?;
    if !conf.has_device {
        return Ok(());
    }
    let cleared = Ports::clear(records);
    all([cleared, masquerade::clear(conf, records, |id| Ok(!names(valid, id, None)))])
}

fn stale_addresses(conf: &Clear, valid: &[Valid], records: &Records) -> Result<(), CniError> {
    let Some(folder) = conf.addresses.as_deref().map(Folder::find).transpose()?.flatten() else { return Ok(()) };
    let stale = folder.held()?.into_iter().filter(|held| {
        let is_valid = |holder: &Holder| names(valid, &holder.container_id, holder.ifname.as_deref());
        !held.is_odd && !held.holder.as_ref().is_some_and(is_valid)
    });
    let mut last = None;
    let freed = all(stale.map(|held| {
        if held.holder.as_ref().map_or(Ok(false), |holder| is_new(holder, held.ip, conf, records))? {
            return Ok(());
        }
        held.holder.iter().try_for_each(|holder| unwritten_device(holder, records))?;
        folder.free(held.ip).map(|change| last = change.or(last.take()))
    }));
    drop(folder);
    // They are of one folder: with the last one the disk has them all.
    let synced = files::sync_all(last.as_slice()).act(|| "write to the disk what was freed".into());
    all([freed, synced])
}

/// An ADD has written it down since the stale attachments went.
fn is_new(holder: &Holder, ip: IpAddr, conf: &Clear, records: &Records) -> Result<bool, CniError> {
    let Some(ifname) = holder.ifname.as_deref().and_then(|name| name.parse().ok()) else { return Ok(false) };
    let record = records.get(&holder.container_id, ifname)?.filter(|record| conf.has(record));
    Ok(record.is_some_and(|record| record.request.addresses.iter().any(|inet| inet.addr == ip)))
}

/// The device of an attachment whose file was lost: it has the address still.
fn unwritten_device(holder: &Holder, records: &Records) -> Result<(), CniError> {
    let Some(ifname) = holder.ifname.as_deref().and_then(|name| name.parse().ok()) else { return Ok(()) };
    if records.get(&holder.container_id, ifname)?.is_some() {
        return Ok(());
    }
    let device = attach::host_device(&holder.container_id, ifname);
    kernel::detach(device).map(|_| ()).map_err(|failed| refused(failed, records))
}
