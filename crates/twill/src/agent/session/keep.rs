//! Files that the node writes, again and again where that fails: a full or read-only disk may be cured at any time, and nobody tells. Nor
//! does whoever alters the file by which containers start.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;
use twill_kernel::files;

use super::{Session, WAIT};

/// A file of a node: the code of the finding while it cannot be written, its mode, and the way out.
pub(super) struct Kind {
    code: &'static str,
    mode: u32,
    fix: &'static str,
}

pub(super) const STATE: Kind =
    Kind { code: "state-unwritable", mode: 0o600, fix: "make the folder writable, or name another with --state-dir" };
pub(super) const SUBNET_ENV: Kind = Kind {
    code: "subnet-env-unwritable",
    mode: 0o644,
    fix: "make the folder writable, or name another file with --subnet-file",
};

/// How often the containers' file is looked at.
const LOOK: Duration = Duration::from_secs(10);

/// What is to be written still, by its finding's code.
#[derive(Default)]
pub(super) struct Unwritten {
    /// What subnet.env shall say, and when it is looked at next.
    env: Option<(String, Instant)>,
    files: BTreeMap<&'static str, (&'static Kind, PathBuf, Vec<u8>)>,
    /// When all are tried next, and how long the wait for it is.
    next: Option<(Instant, Duration)>,
}

impl Unwritten {
    /// When there is something to be done; `None`: nothing waits.
    pub(super) fn due(&self) -> Option<Instant> {
        [self.next.map(|(at, _)| at), self.env.as_ref().map(|(_, at)| *at)].into_iter().flatten().min()
    }
}

impl Session {
    /// Writes a file, now or as soon as that can be done; true: now.
    pub(super) fn write(&mut self, kind: &'static Kind, path: &Path, bytes: Vec<u8>) -> bool {
        match files::write_atomic(path, &bytes, kind.mode) {
            Ok(()) => {
                self.need_not_write(kind);
                true
            }
            Err(error) => {
                self.find(kind.code, &path.display().to_string(), &error.to_string(), kind.fix);
                self.unwritten.files.insert(kind.code, (kind, path.to_owned(), bytes));
                self.unwritten.next.get_or_insert_with(|| (Instant::now() + WAIT.0, WAIT.0));
                false
            }
        }
    }

    /// The file stands as it shall, or shall not be there.
    pub(super) fn need_not_write(&mut self, kind: &Kind) {
        self.unfind(kind.code);
        self.unwritten.files.remove(kind.code);
        if self.unwritten.files.is_empty() {
            self.unwritten.next = None;
        }
    }

    /// What subnet.env shall say from now on.
    pub(super) fn keep_subnet_env(&mut self, env: String) {
        self.unwritten.env = Some((env, Instant::now() + LOOK));
    }

    /// subnet.env goes, and stays away.
    pub(super) fn withdraw_subnet_env(&mut self) {
        self.unwritten.env = None;
        self.need_not_write(&SUBNET_ENV);
        // Where there is none it need not go.
        let _ = std::fs::remove_file(&self.settings.subnet_file);
    }

    /// What is due.
    pub(super) fn write_again(&mut self) {
        let now = Instant::now();
        if self.unwritten.next.is_some_and(|(at, _)| at <= now) {
            self.try_again();
        }
        if let Some((env, _)) = self.unwritten.env.clone().filter(|(_, at)| *at <= now) {
            self.unwritten.env = Some((env.clone(), now + LOOK));
            let (path, waits) = (self.settings.subnet_file.clone(), self.unwritten.files.contains_key(SUBNET_ENV.code));
            if !waits && self.subnet_env() != env && self.write(&SUBNET_ENV, &path, env.into_bytes()) {
                tracing::warn!(file = %path.display(), "somebody altered or removed it: it is written again");
            }
        }
    }

    /// Tries what could not be written, and waits longer for the next time.
    fn try_again(&mut self) {
        if let Some((at, wait)) = &mut self.unwritten.next {
            *wait = (*wait * 2).min(WAIT.1);
            *at = Instant::now() + *wait;
        }
        for (kind, path, bytes) in std::mem::take(&mut self.unwritten.files).into_values() {
            if self.write(kind, &path, bytes) {
                tracing::info!(file = %path.display(), "it can be written again");
            }
        }
    }
}
