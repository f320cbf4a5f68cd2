//! What containers have left that are gone: freed by the agent, and by an ADD that finds no address.

use std::fs;
use std::os::unix::fs::MetadataExt;

use twill_core::attach::Attachment;
use twill_kernel::{attach as kernel, files};

use crate::error::{Act, CniError};
use crate::records::Records;
use crate::verb::{all, forget, refused};

/// Frees the addresses of attachments of an earlier boot, and of those whose namespace and device are both gone; gives their names.
/// A namespace that this process cannot see (another mount namespace has its path) still has its device here.
pub fn sweep(records: &Records) -> Result<Vec<String>, CniError> {
    let boot = files::boot_id().act(|| "read the boot's id".into())?;
    let devices = kernel::devices().map_err(|failed| refused(failed, records))?;
    let is_gone = |record: &Attachment| {
        let device = devices.iter().any(|link| link.name == record.request.host_device);
        record.boot_id != boot || (!device && inode(&record.request.netns) != Some(record.netns_inode))
    };
    let gone: Vec<Attachment> = records.all()?.into_iter().filter(|r| r.network.is_some() && is_gone(r)).collect();
    all(gone.iter().map(|record| files::sync_all(&forget(record, records)?).act(|| "write to the disk".into())))?;
    Ok(gone.iter().map(|record| record.file_name().trim_end_matches(".json").to_owned()).collect())
}

fn inode(path: &str) -> Option<u64> {
    fs::metadata(path).ok().map(|meta| meta.ino())
}
