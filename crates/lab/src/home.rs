//! Where labs keep their state, and what they leave in the file system.
//!
//! ```text
//! $XDG_RUNTIME_DIR/twill  (else /tmp/twill-<uid>, the uid outside of a user namespace; 0700, owner checked)
//!   └─ lab-<name>/  control.sock  supervisor.log  store/  node1/{agent.log, state/, run/, subnet.env} …
//! /run/netns/twill-<name>-<where> → /proc/PID/fd/N         root only
//! ```

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FlockOperation, accessat, flock};
use rustix::process::geteuid;

use crate::error::{Act, LabError};
use crate::layout::{LabName, UNDERLAY};

/// Where `ip netns` looks.
pub const NETNS_DIR: &str = "/run/netns";

/// Tells the supervisor where the client keeps its labs; no setting of the agent, whose names begin with `TWILL_`.
pub(crate) const CLIENTS_HOME: &str = "_TWILL_LAB_HOME";

/// The folder of all labs of this user.
#[derive(Debug, Clone)]
pub struct Home(PathBuf);

impl Home {
    /// Finds the folder, and makes it when it is missing. One that somebody else owns, or may look into, is refused.
    pub fn open() -> Result<Self, LabError> {
        let uid = geteuid().as_raw();
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()).map(PathBuf::from);
        let usable = runtime.filter(|dir| fs::metadata(dir).is_ok_and(|m| m.is_dir() && m.uid() == uid));
        let path =
            usable.map_or_else(|| PathBuf::from(format!("/tmp/twill-{}", user_outside(uid))), |dir| dir.join("twill"));
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(refusal(&path, &error.to_string())),
        }
        let found = fs::symlink_metadata(&path).map_err(|error| refusal(&path, &error.to_string()))?;
        if !found.is_dir() || found.uid() != uid {
            return Err(refusal(&path, "it belongs to somebody else"));
        }
        if found.mode() & 0o077 != 0 {
            return Err(refusal(&path, "others may look into it").hint(format!("chmod 700 {}", path.display())));
        }
        Ok(Self(path))
    }

    /// The folder that the client has found: in its user namespace the supervisor has another user id.
    pub(crate) fn of_client() -> Result<Self, LabError> {
        std::env::var_os(CLIENTS_HOME).map_or_else(Self::open, |path| Ok(Self(path.into())))
    }

    /// The folder of one lab; it need not exist.
    pub fn lab(&self, name: &LabName) -> LabDir {
        LabDir { path: self.0.join(format!("lab-{name}")), name: name.clone() }
    }

    /// Names of all labs that have a folder, sorted.
    pub fn labs(&self) -> Result<Vec<LabName>, LabError> {
        let entries = fs::read_dir(&self.0).act(|| format!("list {}", self.0.display()))?;
        let names = entries.flatten().filter_map(|e| e.file_name().to_str()?.strip_prefix("lab-")?.parse().ok());
        let mut names: Vec<LabName> = names.collect();
        names.sort();
        Ok(names)
    }
}

/// The user as the namespace around this one numbers them: inside one, everybody may be user 0.
fn user_outside(uid: u32) -> u32 {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let outside = map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().filter_map(|number| number.parse::<u32>().ok());
        let (inner, outer, count) = (numbers.next()?, numbers.next()?, numbers.next()?);
        let nth = uid.checked_sub(inner).filter(|nth| *nth < count)?;
        outer.checked_add(nth)
    });
    outside.unwrap_or(uid)
}

/// True when names for `ip netns` can be made and removed: not without root, and not as the root of a user namespace alone.
pub(crate) fn may_name() -> bool {
    let dir = if Path::new(NETNS_DIR).exists() { NETNS_DIR } else { "/run" };
    geteuid().is_root() && accessat(CWD, dir, Access::WRITE_OK, AtFlags::EACCESS).is_ok()
}

fn refusal(path: &Path, why: &str) -> LabError {
    LabError::new("lab-home", format!("use {}: {why}", path.display()))
        .hint("set XDG_RUNTIME_DIR to a folder of your own with mode 0700")
}

/// The folder of one lab.
#[derive(Debug, Clone)]
pub struct LabDir {
    path: PathBuf,
    name: LabName,
}

impl LabDir {
    /// The lab's name.
    pub fn name(&self) -> &LabName {
        &self.name
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of all labs.
    pub(crate) fn home(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    /// Where the supervisor listens.
    pub fn socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// A node's folder.
    pub fn node(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes the folder, which must not exist.
    pub fn create(&self) -> Result<(), LabError> {
        let socket = self.node("node16").join("run/twill.sock");
        if socket.as_os_str().len() > LONGEST_SOCKET {
            return Err(LabError::new("lab-home", format!("{} is too long for a socket's path", socket.display()))
                .hint("take a shorter XDG_RUNTIME_DIR or a shorter --name"));
        }
        let mut builder = DirBuilder::new();
        let made = match builder.mode(0o700).create(&self.path) {
            // The last lab that ended has taken the folder of all labs along.
            Err(error) if error.kind() == io::ErrorKind::NotFound => builder.recursive(true).create(&self.path),
            made => made,
        };
        made.act(|| format!("make {}", self.path.display()))
    }

    /// Waits until no process of a lab whose supervisor was killed writes here any more: the kernel ends them a moment after it,
    /// and each has its log locked until then.
    pub(crate) fn silent(&self) -> io::Result<()> {
        let inside =
            |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect::<Vec<_>>();
        let top = inside(&self.path);
        let logs = top.iter().flat_map(|path| inside(path)).chain(top.clone());
        for log in logs.filter(|path| path.extension().is_some_and(|end| end == "log")) {
            flock(File::open(log)?, FlockOperation::LockExclusive)?;
        }
        Ok(())
    }

    /// Removes what a lab whose supervisor is no more has left; true when there was something.
    pub(crate) fn bury(&self) -> Result<bool, LabError> {
        gone(self.silent()).act(|| format!("wait for the processes of {}", self.path.display()))?;
        self.remove()
    }

    /// Removes every trace in the file system: names for `ip netns`, and the folder. True when there was one.
    pub fn remove(&self) -> Result<bool, LabError> {
        let links = self.netns_links();
        for link in &links {
            gone(fs::remove_file(link)).act(|| format!("remove {}", link.display()))?;
        }
        let was = fs::symlink_metadata(&self.path).is_ok();
        gone(fs::remove_dir_all(&self.path)).act(|| format!("remove {}", self.path.display()))?;
        if let Some(home) = self.path.parent() {
            // Only when it is empty.
            let _ = fs::remove_dir(home);
        }
        Ok(was || !links.is_empty())
    }

    /// Gives a namespace a name for `ip netns`: a symbolic link, never a bind mount, which would keep the namespace alive.
    pub fn link_netns(&self, place: &str, target: &str) -> Result<(), LabError> {
        let act = || format!("name the network namespace of {place} for `ip netns`");
        DirBuilder::new().mode(0o755).recursive(true).create(NETNS_DIR).act(act)?;
        let link = Path::new(NETNS_DIR).join(self.name.netns_name(place));
        if self.is_ours(&link) {
            gone(fs::remove_file(&link)).act(act)?;
        }
        symlink(target, &link).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                LabError::new("lab-exists", format!("{} is not of this lab {}", link.display(), self.name))
                    .hint("it is that of another lab of this name: take another --name")
            }
            _ => LabError::new("lab-failed", format!("{}: {error}", act())),
        })
    }

    /// The names of this lab's namespaces; none where they could not be removed.
    fn netns_links(&self) -> Vec<PathBuf> {
        if !may_name() {
            return Vec::new();
        }
        let prefix = format!("twill-{}-", self.name);
        let entries = fs::read_dir(NETNS_DIR).into_iter().flatten().flatten();
        let ours = entries.filter(|entry| {
            let name = entry.file_name();
            let place = name.to_str().and_then(|name| name.strip_prefix(&prefix));
            // Another lab's name may begin with ours: what is left must be a place.
            place.is_some_and(is_place) && self.is_ours(&entry.path())
        });
        ours.map(|entry| entry.path()).collect()
    }

    /// True for a link into /proc that leads to this lab's supervisor, or to one that is no more. A lab of the same name in another
    /// folder has a supervisor that says so.
    fn is_ours(&self, link: &Path) -> bool {
        let Ok(target) = fs::read_link(link) else { return false };
        let Some(pid) = target.strip_prefix("/proc").ok().and_then(|rest| rest.iter().next()) else { return false };
        let homes = |words: &[u8]| -> Vec<PathBuf> {
            let mark = [CLIENTS_HOME.as_bytes(), b"="].concat();
            let words = words.split(|byte| *byte == 0).filter_map(|word| word.strip_prefix(&*mark));
            words.map(|home| PathBuf::from(OsStr::from_bytes(home))).collect()
        };
        match fs::metadata(&target) {
            // The kernel gives the number of a process that has ended to any other one.
            Ok(_) => fs::read(Path::new("/proc").join(pid).join("environ"))
                .is_ok_and(|words| homes(&words).iter().all(|home| home == self.home())),
            Err(error) => error.kind() != io::ErrorKind::PermissionDenied,
        }
    }
}

/// `sun_path` of sockaddr_un, less its closing zero.
const LONGEST_SOCKET: usize = 107;

/// True for `underlay`, `node1` …, `container-1` ….
pub(crate) fn is_place(text: &str) -> bool {
    let number = text.strip_prefix("node").or_else(|| text.strip_prefix("container-"));
    text == UNDERLAY || number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// What is not there need not be removed.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
