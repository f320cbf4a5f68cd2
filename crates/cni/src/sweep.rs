//! What containers have left that are gone: one judgement for the agent, for an ADD that finds no address, and for `twill ipam`.

use std::fs;
use std::os::unix::fs::MetadataExt;

use twill_core::attach::Attachment;
use twill_kernel::{attach as kernel, files};

use crate::error::{Act, CniError};
use crate::records::{Locked, Records};
use crate::verb::{forget, refused};

/// Frees what gone containers have left; gives their names.
pub fn sweep(records: &Records) -> Result<Vec<String>, CniError> {
    records.sweep_half_made()?;
    let mut freed = Vec::new();
    let mut failed = records.not_understood()?.into_iter().map(|(_, error)| error).reduce(CniError::and);
    for record in records.all()?.iter().filter(|record| record.network.is_some()) {
        match leaked(records, record).and_then(|leak| leak.map(|leak| free(&leak, records)).transpose()) {
            Ok(Some(())) => freed.push(record.file_name().trim_end_matches(".json").to_owned()),
            Ok(None) => {}
            Err(error) => failed = Some(failed.map_or(error.clone(), |first: CniError| first.and(error))),
        }
    }
    failed.map_or(Ok(freed), Err)
}

/// The attachment when it is leaked. An ADD that is at work has no device yet, and may know a namespace by a path that this process
/// cannot see: it holds its lock, and is left alone.
pub fn leaked(records: &Records, record: &Attachment) -> Result<Option<Locked>, CniError> {
    let locked = records.try_lock(&record.request.container_id, record.request.ifname)?;
    // Looked at behind the lock: an ADD that was at work is done.
    locked.map(|locked| Ok(is_gone(&locked.record, records)?.then_some(locked))).transpose().map(Option::flatten)
}

/// Of an earlier boot, or namespace and device are both gone. A namespace that this process cannot see (another mount namespace has its
/// path) still has its device here.
pub(crate) fn is_gone(record: &Attachment, records: &Records) -> Result<bool, CniError> {
    let boot = files::boot_id().act(|| "read the boot's id".into())?;
    let netns = fs::metadata(&*record.request.netns).is_ok_and(|meta| meta.ino() == record.netns_inode);
    let device = || kernel::has_device(record.request.host_device).map_err(|failed| refused(failed, records));
    Ok(record.boot_id != boot || (!netns && !device()?))
}

/// Frees what an attachment has but its device: host ports, addresses, file; they are on the disk then.
pub fn free(locked: &Locked, records: &Records) -> Result<(), CniError> {
    files::sync_all(&forget(&locked.record, records)?).act(|| "write to the disk".into())
}
