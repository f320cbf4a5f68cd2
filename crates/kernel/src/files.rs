//! Files that survive a crash, and locks that do not.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

/// Puts `bytes` at `path` so that a reader sees the old content or the new, and a crash loses neither: write beside it, fsync, rename,
/// fsync the folder. The folder is made when it is missing.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(dir)?;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    let beside = dir.join(format!(".{name}.{}", std::process::id()));
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&beside)?;
        file.write_all(bytes)?;
        // The mode is what was asked for, whatever the umask.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        File::open(dir)?.sync_all()
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

/// What a [`write_atomic`] of `path` has left beside it that was killed, while nobody else writes `path`.
pub fn left_beside(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { return Ok(Vec::new()) };
    let prefix = format!(".{}.", name.to_string_lossy());
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?.collect::<io::Result<Vec<_>>>()?,
    };
    let is_left = |name: &str| name.strip_prefix(&prefix).is_some_and(|pid| pid.parse::<u32>().is_ok());
    Ok(entries.iter().filter(|e| is_left(&e.file_name().to_string_lossy())).map(fs::DirEntry::path).collect())
}

/// Reads a file of at most `limit` bytes; a longer one is an error. `None`: there is no such file.
pub fn read_limited(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {limit} bytes")));
    }
    Ok(Some(bytes))
}

/// Puts `bytes` at `path` as [`write_atomic`] does, but without waiting for the disk: that is what the answer is for. Until the answer is
/// dropped, or the process ends, the file is locked; nobody sees it before it is. A process that is killed may leave [`half_made`].
pub fn put_locked(path: &Path, bytes: &[u8], mode: u32) -> io::Result<Unsynced> {
    put_locked_unless(path, bytes, mode, || false)
}

/// The same, refused as [`io::ErrorKind::AlreadyExists`] where somebody else has put there what `is_taken` sees: nobody puts anything
/// between that look and this.
pub fn put_locked_unless(path: &Path, bytes: &[u8], mode: u32, is_taken: impl Fn() -> bool) -> io::Result<Unsynced> {
    in_folder(path, || {
        let (dir, beside) = (folder(path)?, half_made(path));
        let mut file = match take_spare(dir, &beside, mode) {
            Some(file) => file,
            None => loop {
                let file = OpenOptions::new().write(true).create(true).truncate(false).mode(mode).open(&beside)?;
                let lock = Lock::wait(file)?;
                // Whoever wrote it before may have put it in place, or somebody may have swept it.
                if is_at(&lock.0, &beside)? {
                    break lock.0;
                }
            },
        };
        let mut write = || {
            if is_taken() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            write_whole(&mut file, bytes)?;
            fs::rename(&beside, path)?;
            File::open(dir)
        };
        let dir = write().inspect_err(|_| {
            let _ = fs::remove_file(&beside);
        })?;
        Ok(Unsynced { files: vec![file], aside: Vec::new(), dir })
    })
}

/// The file that was [`set_aside`], locked and at `beside`. `None`: there is none, or whoever set it aside is at work still.
fn take_spare(dir: &Path, beside: &Path, mode: u32) -> Option<File> {
    let spare = spare_of(dir);
    let file = open_plain(&spare, mode, &mut OpenOptions::new()).ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    renameat_with(CWD, &spare, CWD, beside, RenameFlags::NOREPLACE).ok()?;
    // Meanwhile another one may have been set aside in its place.
    is_at(&file, beside).ok()?.then_some(file)
}

/// Where a folder's spare file is.
fn spare_of(dir: &Path) -> PathBuf {
    dir.join(".spare")
}

/// Writes over what a file holds.
fn write_whole(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    let length = bytes.len() as u64;
    if file.metadata()?.len() > length { file.set_len(length) } else { Ok(()) }
}

/// Puts `bytes` in place of longer content of the file at `path`, spaces behind them: what a full disk still takes. Only by who has the
/// file's lock.
pub fn put_within(path: &Path, bytes: &[u8]) -> io::Result<Unsynced> {
    let file = OpenOptions::new().write(true).open(path)?;
    let room = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    let mut whole = bytes.to_vec();
    if whole.len() > room {
        return Err(io::ErrorKind::StorageFull.into());
    }
    whole.resize(room, b' ');
    file.write_all_at(&whole, 0)?;
    Ok(Unsynced { files: vec![file], aside: Vec::new(), dir: File::open(folder(path)?)? })
}

/// Where a [`put_locked`] of `path` writes.
pub fn half_made(path: &Path) -> PathBuf {
    path.with_file_name(format!(".{}{HALF_MADE}", path.file_name().unwrap_or_default().to_string_lossy()))
}

/// How the name of [`half_made`] ends.
const HALF_MADE: &str = ".new";

/// Removes what a [`put_locked`] of `path` has left that was killed; one that is at work goes on.
pub fn sweep_half_made(path: &Path) -> io::Result<()> {
    sweep(&half_made(path))
}

/// The same of a whole folder.
pub fn sweep_folder(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_string_lossy().starts_with('.') && name.to_string_lossy().ends_with(HALF_MADE) {
            sweep(&entry.path())?;
        }
    }
    Ok(())
}

fn sweep(beside: &Path) -> io::Result<()> {
    match Lock::of(beside, false)? {
        Some(_alone) => fs::remove_file(beside),
        None => Ok(()),
    }
}

/// Puts `bytes` at `path`, refused when it is there; without waiting for the disk. Only under a lock of the folder. They are written to
/// the file that was [`set_aside`], or that a process has left here that was killed, unless the disk may have it by its old name still.
pub fn put_new(path: &Path, bytes: &[u8]) -> io::Result<Unsynced> {
    let dir = folder(path)?;
    let spare = &spare_of(dir);
    let write = || {
        let mut file = open_spare(spare, 0o644)?;
        write_whole(&mut file, bytes)?;
        match renameat_with(CWD, spare, CWD, path, RenameFlags::NOREPLACE) {
            // The file system cannot.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if fs::symlink_metadata(path).is_err() => {
                fs::rename(spare, path)?;
            }
            done => done?,
        }
        Ok(Unsynced { files: vec![file], aside: Vec::new(), dir: File::open(dir)? })
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(spare);
    })
}

/// The file at `spare`, or a new one where there is none that is a plain file with this mode.
fn open_spare(spare: &Path, mode: u32) -> io::Result<File> {
    let open = || {
        let file = open_plain(spare, mode, OpenOptions::new().create(true))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(file)
    };
    match open() {
        // Nothing is in the way: there is no place for it.
        Err(error) if fs::symlink_metadata(spare).is_err() => Err(error),
        Err(_) => {
            let in_the_way = |e: io::Error| io::Error::new(e.kind(), format!("{} is in the way: {e}", spare.display()));
            fs::remove_file(spare).map_err(in_the_way)?;
            OpenOptions::new().write(true).create_new(true).mode(mode).open(spare)
        }
        file => file,
    }
}

/// Opens a plain file that has this mode and no other name: that one may be in use. What is none is neither followed nor waited for.
fn open_plain(path: &Path, mode: u32, how: &mut OpenOptions) -> io::Result<File> {
    let file = how.write(true).mode(mode).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let is = file.metadata()?;
    let is_ours = is_plain(&is) && is.permissions().mode() & 0o7777 == mode;
    is_ours.then_some(file).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn is_plain(is: &fs::Metadata) -> bool {
    is.is_file() && is.nlink() == 1
}

/// Puts `bytes` in place of what is at `path`, for as long as the machine runs: after a crash either may be there, or nothing readable.
/// Only under a lock of the folder. The two change places, and `spare` stays for the next time: nothing is made and nothing removed,
/// and the disk is not hurried, as it is by a file that takes another one's place by `rename` (fs/ext4/namei.c `ext4_rename`).
pub fn put_over(path: &Path, spare: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = open_spare(spare, 0o644)?;
    write_whole(&mut file, bytes)?;
    // Nothing is there, or the file system cannot.
    if renameat_with(CWD, spare, CWD, path, RenameFlags::EXCHANGE).is_err() {
        fs::rename(spare, path)?;
    }
    Ok(())
}

fn folder(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// True when `path` is this very file.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let id = |is: fs::Metadata| (is.dev(), is.ino());
    Ok(fs::metadata(path).ok().map(id) == Some(id(file.metadata()?)))
}

/// Does `act` at `path`; when the folder is missing, makes it and does it then.
fn in_folder<T>(path: &Path, act: impl Fn() -> io::Result<T>) -> io::Result<T> {
    match (act(), path.parent()) {
        (Err(error), Some(dir)) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(dir)?;
            act()
        }
        (done, _) => done,
    }
}

/// Takes a file away, without waiting for the disk; `None`: there is none. It stays in the folder for the next one that is put there,
/// which then needs no new place on the disk, and nothing but the disk itself to be waited for: a new place is written down as one in use
/// by a worker of the kernel's, which may stand behind whatever runs (fs/ext4/page-io.c `ext4_end_io_rsv_work`).
///
/// Until the answer is dropped it is locked, by this or by the caller: what is written to it could get to the disk before its new name.
pub fn set_aside(path: &Path) -> io::Result<Option<Unsynced>> {
    let spare = spare_of(folder(path)?);
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path).ok();
    let locked = file.filter(|file| flock(file, FlockOperation::NonBlockingLockExclusive).is_ok());
    let aside = match fs::symlink_metadata(path) {
        Ok(is) if is_plain(&is) => fs::rename(path, spare),
        // A directory would be in everybody's way, and a rename to another name of the same file does nothing.
        Ok(_) => Err(io::ErrorKind::InvalidInput.into()),
        Err(error) => Err(error),
    };
    let done = aside.or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Err(error),
        // A full disk may have no place for the name, and what has it already may be no file.
        _ => fs::remove_file(path),
    });
    Ok(removed(path, done)?.map(|change| Unsynced { aside: locked.into_iter().collect(), ..change }))
}

/// Removes a file, without waiting for the disk; `None`: there is none.
pub fn remove(path: &Path) -> io::Result<Option<Unsynced>> {
    removed(path, fs::remove_file(path))
}

fn removed(path: &Path, done: io::Result<()>) -> io::Result<Option<Unsynced>> {
    let dir = folder(path)?;
    match done {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
        Ok(()) => Ok(Some(Unsynced { files: Vec::new(), aside: Vec::new(), dir: File::open(dir)? })),
    }
}

/// A change of a folder that a crash of the machine may still undo.
#[derive(Debug)]
#[must_use]
pub struct Unsynced {
    files: Vec<File>,
    /// Locked, and not waited for.
    aside: Vec<File>,
    dir: File,
}

impl Unsynced {
    /// Several changes of one folder as one: the folder is waited for once.
    pub fn of_folder(changes: Vec<Unsynced>) -> Option<Unsynced> {
        changes.into_iter().reduce(|mut all, next| {
            all.files.extend(next.files);
            all.aside.extend(next.aside);
            all
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.files.iter().chain([&self.dir]).try_for_each(File::sync_all)
    }
}

/// Waits until the disk has them all, the last first. The waits are one: every file is on its way before the first wait, and a journal
/// that writes one down writes down the others too.
pub fn sync_all(changes: &[Unsynced]) -> io::Result<()> {
    changes.iter().rev().flat_map(|change| &change.files).for_each(hurry);
    changes.iter().rev().try_for_each(Unsynced::sync)
}

/// Begins to bring a file to the disk, without waiting. Where that fails the wait is longer, and says what is wrong.
#[allow(unsafe_code, reason = "rustix does not have this call")]
fn hurry(file: &File) {
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and no memory is handed over.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

/// An exclusive lock that ends with the process.
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// Takes the lock of a file, made when it is missing; `None`: somebody else holds it.
    pub fn try_exclusive(path: &Path) -> io::Result<Option<Lock>> {
        let file = Self::open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the lock of a file, made when it is missing, and waits for whoever holds it.
    pub fn exclusive(path: &Path) -> io::Result<Lock> {
        Self::wait(Self::open(path)?)
    }

    /// Takes the lock of a folder that is there, and waits for whoever holds it.
    pub fn folder(path: &Path) -> io::Result<Lock> {
        Self::wait(File::open(path)?)
    }

    fn wait(file: File) -> io::Result<Lock> {
        loop {
            match flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(Lock(file)),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes the lock of the file that is at `path`; `None`: there is none, or, unless it is waited for, somebody else holds it.
    pub fn of(path: &Path, wait: bool) -> io::Result<Option<Lock>> {
        let how = if wait { FlockOperation::LockExclusive } else { FlockOperation::NonBlockingLockExclusive };
        loop {
            let file = match File::open(path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                file => file?,
            };
            match flock(&file, how) {
                // Whoever held it may have removed or replaced it.
                Ok(()) if is_at(&file, path)? => return Ok(Some(Lock(file))),
                Ok(()) | Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn open(path: &Path) -> io::Result<File> {
        in_folder(path, || OpenOptions::new().create(true).append(true).mode(0o600).open(path))
    }

    /// The locked file.
    pub fn file(&self) -> &File {
        &self.0
    }
}

/// Random bytes from the kernel.
pub fn random_bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The id of this boot: another one after each start of the machine.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// The machine's id (machine-id(5)); empty where there is none.
pub fn machine_id() -> String {
    fs::read_to_string("/etc/machine-id").map(|text| text.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/state.json");
        for content in ["first", "a longer second", ""] {
            write_atomic(&path, content.as_bytes(), 0o640).unwrap();
            assert_eq!(read_limited(&path, 100).unwrap().unwrap(), content.as_bytes());
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        // What a killed one has left is known by its name.
        assert_eq!(left_beside(&path).unwrap(), Vec::<PathBuf>::new());
        let names = [".state.json.77", ".state.json.77x", "state.json.77", ".other.77"].map(|n| path.with_file_name(n));
        names.iter().for_each(|name| fs::write(name, "").unwrap());
        assert_eq!(left_beside(&path).unwrap(), names[..1]);
        assert_eq!(left_beside(&dir.path().join("missing/file")).unwrap(), Vec::<PathBuf>::new());
        // A folder in its place: refused, and again nothing is left.
        assert!(write_atomic(path.parent().unwrap(), b"x", 0o600).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_over_the_limit_is_refused_and_a_missing_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("big");
        assert_eq!(read_limited(&path, 4).unwrap(), None);
        fs::write(&path, "12345").unwrap();
        assert_eq!(read_limited(&path, 4).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(read_limited(&path, 5).unwrap().unwrap(), b"12345");
    }

    #[test]
    fn a_lock_has_one_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/lock");
        let held = Lock::try_exclusive(&path).unwrap().unwrap();
        assert!(Lock::try_exclusive(&path).unwrap().is_none());
        drop(held);
        assert!(Lock::try_exclusive(&path).unwrap().is_some());
    }

    #[test]
    fn a_file_is_put_locked_and_a_lock_is_of_the_file_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/file");
        assert!(Lock::of(&path, true).unwrap().is_none(), "there is no file");
        let put = put_locked(&path, b"first", 0o644).unwrap();
        assert!(Lock::of(&path, false).unwrap().is_none());
        // Another file in its place: whoever waits for the first one gets the lock of the second one.
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| Lock::of(&path, true).unwrap().unwrap());
            let second = put_locked(&path, b"second", 0o644).unwrap();
            drop(put);
            assert!(Lock::of(&path, false).unwrap().is_none());
            drop(second);
            assert_eq!(waits.join().unwrap().file().metadata().unwrap().len(), 6);
        });
    }

    #[test]
    fn the_next_file_is_made_of_the_one_that_was_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second, third] = ["first", "second", "third"].map(|name| dir.path().join(name));
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        let spare = spare_of(dir.path());
        assert!(set_aside(&first).unwrap().is_none(), "there is no file");
        drop(put_new(&first, b"long content").unwrap());
        assert_eq!(put_new(&first, b"other").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&first).unwrap(), b"long content");
        let was = inode(&first);
        assert!(set_aside(&first).unwrap().is_some());
        assert!(!first.exists());
        drop(put_new(&second, b"short").unwrap());
        assert_eq!((inode(&second), fs::read(&second).unwrap()), (was, b"short".to_vec()));
        // Not before whoever set it aside has waited for the disk.
        let aside = set_aside(&second).unwrap();
        drop(put_new(&second, b"meanwhile").unwrap());
        assert_ne!(inode(&second), was);
        drop(aside);
        let was = inode(&second);
        // The same for one that is locked, unless whoever set it aside is at work still.
        let lock = Lock::of(&second, true).unwrap().unwrap();
        assert!(set_aside(&second).unwrap().is_some());
        drop(put_locked(&third, b"{}", 0o644).unwrap());
        assert_ne!(inode(&third), was);
        drop(lock);
        drop(put_locked(&third, b"{\"a\":1}", 0o644).unwrap());
        assert_eq!((inode(&third), fs::read(&third).unwrap()), (was, b"{\"a\":1}".to_vec()));
        assert!(!spare.exists() && !half_made(&third).exists());
    }

    #[test]
    fn what_has_the_spares_name_keeps_nothing_from_going() {
        let dir = tempfile::tempdir().unwrap();
        let (path, spare) = (dir.path().join("file"), spare_of(dir.path()));
        let odd: [&dyn Fn(); 2] = [&|| fs::create_dir(&spare).unwrap(), &|| fs::hard_link(&path, &spare).unwrap()];
        for make in odd {
            fs::write(&path, "ours").unwrap();
            make();
            assert!(set_aside(&path).unwrap().is_some());
            assert!(!path.exists());
            fs::remove_dir(&spare).or_else(|_| fs::remove_file(&spare)).unwrap();
        }
        // Whoever cannot do without is told what is in the way.
        fs::create_dir(&spare).unwrap();
        assert!(put_new(&path, b"ours").unwrap_err().to_string().contains(".spare is in the way: "));
        fs::remove_dir(&spare).unwrap();
        // And no directory of somebody's gets that name.
        fs::create_dir(&path).unwrap();
        assert!(set_aside(&path).is_err());
        assert!(path.exists() && !spare.exists());
        fs::remove_dir(&path).unwrap();
    }

    #[test]
    fn what_is_no_plain_file_of_this_folder_alone_is_not_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other, spare) = (dir.path().join("file"), dir.path().join("other"), spare_of(dir.path()));
        fs::write(&other, "another's").unwrap();
        let fifo = || rustix::fs::mknodat(CWD, &spare, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        let closed = || {
            fs::write(&spare, "").unwrap();
            fs::set_permissions(&spare, fs::Permissions::from_mode(0o600)).unwrap();
        };
        let odd: [&dyn Fn(); 4] = [
            &|| std::os::unix::fs::symlink(&other, &spare).unwrap(),
            &|| fs::hard_link(&other, &spare).unwrap(),
            &fifo,
            &closed,
        ];
        let puts: [fn(&Path, &[u8]); 3] = [
            |path, bytes| drop(put_new(path, bytes).unwrap()),
            |path, bytes| drop(put_locked(path, bytes, 0o644).unwrap()),
            |path, bytes| put_over(path, &path.with_file_name(".spare"), bytes).unwrap(),
        ];
        for (make, put) in odd.iter().flat_map(|make| puts.map(|put| (make, put))) {
            let _ = fs::remove_file(&spare);
            make();
            put(&path, b"ours");
            assert_eq!(
                (fs::read(&path).unwrap(), fs::read(&other).unwrap()),
                (b"ours".to_vec(), b"another's".to_vec())
            );
            let is = fs::symlink_metadata(&path).unwrap();
            assert!(is.is_file() && is.permissions().mode() & 0o777 == 0o644, "{is:?}");
            fs::remove_file(&path).unwrap();
        }
    }
}
