//! The attachment files: what was asked for, for DEL, CHECK, GC and the agent.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use twill_core::attach::{Attachment, BadAttachment, file_name};
use twill_core::net::LinkName;
use twill_kernel::files::{self, Lock, Unsynced};

use crate::error::{Act, CniError, Code};

/// More bytes than an attachment file has.
const LIMIT: u64 = 1 << 20;

/// An attachment, and the sole right to it: its ADD has it until the device stands, whoever frees it until that is done; a process that
/// is killed gives it back.
#[derive(Debug)]
pub struct Locked {
    /// The attachment.
    pub record: Attachment,
    _lock: Lock,
}

/// The folder of the attachment files.
#[derive(Debug)]
pub struct Records(PathBuf);

impl Records {
    /// The folder `dir`; it may be missing.
    pub fn new(dir: PathBuf) -> Self {
        Self(dir)
    }

    /// Somebody was attached once.
    pub(crate) fn has_folder(&self) -> bool {
        self.0.is_dir()
    }

    /// Held by whoever changes what the files ask of the firewall.
    pub(crate) fn lock_file(&self) -> PathBuf {
        self.0.with_extension("lock")
    }

    /// What is written down of a container's device. A file that a crash has cut says nothing; one of a newer release is refused.
    pub fn get(&self, container_id: &str, ifname: LinkName) -> Result<Option<Attachment>, CniError> {
        read(&self.0.join(file_name(container_id, ifname)))
    }

    /// The same once nobody else is at work at it.
    pub fn lock(&self, container_id: &str, ifname: LinkName) -> Result<Option<Locked>, CniError> {
        self.locked(container_id, ifname, true)
    }

    /// The same without waiting; `None`: it is gone, or somebody is at work at it.
    pub fn try_lock(&self, container_id: &str, ifname: LinkName) -> Result<Option<Locked>, CniError> {
        self.locked(container_id, ifname, false)
    }

    fn locked(&self, container_id: &str, ifname: LinkName, wait: bool) -> Result<Option<Locked>, CniError> {
        let path = self.0.join(file_name(container_id, ifname));
        let lock = Lock::of(&path, wait).act(|| format!("lock {}", path.display()))?;
        let Some(lock) = lock else { return Ok(None) };
        Ok(read(&path)?.map(|record| Locked { record, _lock: lock }))
    }

    /// Writes an attachment down, locked until the answer is dropped.
    pub fn put(&self, attachment: &Attachment) -> Result<Unsynced, CniError> {
        let path = self.0.join(attachment.file_name());
        let write = || files::put_locked(&path, attachment.to_json()?.as_bytes(), 0o644);
        write().act(|| format!("write {}", path.display()))
    }

    /// The same for an attachment that is new; `None`: somebody else has written one down of this container's device.
    pub(crate) fn put_new(&self, attachment: &Attachment) -> Result<Option<Unsynced>, CniError> {
        let path = self.0.join(attachment.file_name());
        let is_taken = || !matches!(read(&path), Ok(None));
        let put = || files::put_locked_unless(&path, attachment.to_json()?.as_bytes(), 0o644, is_taken);
        match put() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            put => put.map(Some).act(|| format!("write {}", path.display())),
        }
    }

    /// Writes less down of an attachment whose lock the caller has. A full disk hinders nobody from leaving.
    pub(crate) fn put_less(&self, attachment: &Attachment) -> Result<Unsynced, CniError> {
        let path = self.0.join(attachment.file_name());
        let put = || {
            let json = attachment.to_json()?;
            files::put_locked(&path, json.as_bytes(), 0o644).or_else(|error| match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => files::put_within(&path, json.as_bytes()),
                _ => Err(error),
            })
        };
        put().act(|| format!("write {}", path.display()))
    }

    /// Forgets an attachment, one that was half made too; `None`: there is no such file.
    pub fn remove(&self, container_id: &str, ifname: LinkName) -> Result<Option<Unsynced>, CniError> {
        self.sweep_half_made_of(container_id, ifname)?;
        let path = self.0.join(file_name(container_id, ifname));
        match files::set_aside(&path) {
            // The folder is missing as well.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            removed => removed.act(|| format!("remove {}", path.display())),
        }
    }

    /// Removes what a process has left half made of an attachment, that was killed.
    pub(crate) fn sweep_half_made_of(&self, container_id: &str, ifname: LinkName) -> Result<(), CniError> {
        let path = self.0.join(file_name(container_id, ifname));
        files::sweep_half_made(&path).act(|| format!("remove what was left beside {}", path.display()))
    }

    /// Removes what processes have left half made that were killed.
    pub fn sweep_half_made(&self) -> Result<(), CniError> {
        files::sweep_folder(&self.0).act(|| format!("remove what was left half made in {}", self.0.display()))
    }

    /// All attachments that are understood. One that is not, of a newer release for instance, hinders nobody else.
    pub fn all(&self) -> Result<Vec<Attachment>, CniError> {
        Ok(self.paths()?.iter().filter_map(|path| read(path).ok().flatten()).collect())
    }

    /// The others: `<containerID>:<ifname>`, and what is wrong with the file.
    pub(crate) fn not_understood(&self) -> Result<Vec<(String, CniError)>, CniError> {
        let wrong = |path: &PathBuf| Some((path.file_stem()?.to_string_lossy().into_owned(), read(path).err()?));
        Ok(self.paths()?.iter().filter_map(wrong).collect())
    }

    /// All that ask something of the firewall, those of a newer release as far as they are understood: their rules stay.
    pub(crate) fn all_for_rules(&self) -> Result<Vec<Attachment>, CniError> {
        let read = |path: PathBuf| {
            let text = files::read_limited(&path, LIMIT).ok().flatten()?;
            let found = Attachment::parse(&text).ok().or_else(|| Attachment::parse_newer(&text));
            found.filter(|attachment| is_at(&path, attachment))
        };
        Ok(self.paths()?.into_iter().filter_map(read).collect())
    }

    fn paths(&self) -> Result<Vec<PathBuf>, CniError> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.act(|| format!("list {}", self.0.display()))?,
        };
        Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_record(path)).collect())
    }
}

fn is_record(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.ends_with(".json") && !name.starts_with('.')
}

/// Not where the file was set aside since it was opened, and another attachment written to it.
fn is_at(path: &Path, attachment: &Attachment) -> bool {
    path.ends_with(attachment.file_name())
}

fn read(path: &Path) -> Result<Option<Attachment>, CniError> {
    let act = || format!("read {}", path.display());
    let Some(text) = files::read_limited(path, LIMIT).act(act)? else { return Ok(None) };
    match Attachment::parse(&text) {
        Ok(attachment) => Ok(Some(attachment).filter(|attachment| is_at(path, attachment))),
        Err(BadAttachment::Json(_)) => Ok(None),
        Err(error @ (BadAttachment::Format(_) | BadAttachment::Newer(_))) => {
            Err(CniError::new(Code::Decode, format!("{}: {error}", act()), "use the release that wrote it"))
        }
    }
}
