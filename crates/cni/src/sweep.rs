//! What containers have left that are gone: one judgement for the agent, for an ADD that finds no address, and for `twill ipam`.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

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
/// path) still has its device here; where the device is somebody else's, the path has to be missing where it was seen.
pub(crate) fn is_gone(record: &Attachment, records: &Records) -> Result<bool, CniError> {
    let boot = files::boot_id().act(|| "read the boot's id".into())?;
    let path = Path::new(&*record.request.netns);
    let is_away = || match &record.alone {
        Some(alone) => Ok(alone.seen_in.is_some_and(|folder| seen_in(path) == Some(folder) && is_missing(path))),
        None => {
            let netns = fs::metadata(path).is_ok_and(|meta| meta.ino() == record.netns_inode);
            let device = || kernel::has_device(record.request.host_device).map_err(|failed| refused(failed, records));
            Ok(!netns && !device()?)
        }
    };
    Ok(record.boot_id != boot || is_away()?)
}

/// The folder that a namespace's path goes on from: /proc, or the one that it lies in.
pub(crate) fn seen_in(path: &Path) -> Option<(u64, u64)> {
    let folder = if path.starts_with("/proc") { Path::new("/proc") } else { path.parent()? };
    fs::metadata(folder).ok().map(|meta| (meta.dev(), meta.ino()))
}

fn is_missing(path: &Path) -> bool {
    matches!(fs::symlink_metadata(path), Err(error) if error.kind() == io::ErrorKind::NotFound)
}

/// Frees what an attachment has but its device: host ports, addresses, file; they are on the disk then.
pub fn free(locked: &Locked, records: &Records) -> Result<(), CniError> {
    files::sync_all(&forget(&locked.record, records)?).act(|| "write to the disk".into())
}
