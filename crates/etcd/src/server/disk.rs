//! The store on disk: redb, three tables, one transaction for each batch, synced before it is answered.
//!
//! | table | key | value |
//! |---|---|---|
//! | `log` | (revision, sub) | key length (u32 LE), key, create, count, lease (i64 LE each), value |
//! | `lease` | id | TTL in seconds |
//! | `meta` | name | number: `version`, `compacted`, `cluster`, `member` |

use std::io::ErrorKind;
use std::path::Path;

use prost::bytes::Bytes;
use redb::backends::InMemoryBackend;
use redb::{
    Database, DatabaseError, ReadOnlyDatabase, ReadableDatabase, ReadableTable, StorageBackend, StorageError,
    TableDefinition,
};

use super::mvcc::{Record, Version};

const LOG: TableDefinition<'_, (u64, u64), &[u8]> = TableDefinition::new("log");
const LEASE: TableDefinition<'_, i64, i64> = TableDefinition::new("lease");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// The layout that this program writes.
const FORMAT: u64 = 1;

/// The database could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A newer program wrote it; it is left untouched.
    #[error("the store's data has format {0}, and this program knows {FORMAT}")]
    Newer(u64),
    /// A row cannot be read.
    #[error("row {0:?} of the store's log is broken")]
    Broken((u64, u64)),
    /// The database's own word.
    #[error("{act} the store's data")]
    Database {
        /// The act.
        act: &'static str,
        /// Its word.
        #[source]
        source: Box<redb::Error>,
    },
    /// The folder could not be made.
    #[error("make the folder of the store's data")]
    Folder(#[source] std::io::Error),
}

impl DiskError {
    /// True when another process holds the database.
    pub fn is_in_use(&self) -> bool {
        matches!(self, DiskError::Database { source, .. } if matches!(**source, redb::Error::DatabaseAlreadyOpen))
    }
}

/// What changes with one batch.
#[derive(Debug, Default)]
pub struct Batch {
    /// Writes.
    pub records: Vec<Record>,
    /// Leases granted (with TTL) and ended (`None`).
    pub leases: Vec<(i64, Option<i64>)>,
    /// A compaction: its revision, and the rows that go.
    pub compaction: Option<(i64, Vec<(i64, i64)>)>,
}

impl Batch {
    /// True when there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty() && self.leases.is_empty() && self.compaction.is_none()
    }
}

/// What was on disk.
#[derive(Debug, Default)]
pub struct Loaded {
    /// All writes in order.
    pub records: Vec<Record>,
    /// Leases with their TTLs.
    pub leases: Vec<(i64, i64)>,
    /// Where the history begins.
    pub compacted: i64,
    /// Identity of the cluster.
    pub cluster: u64,
    /// Identity of the member.
    pub member: u64,
}

/// An open database.
#[derive(Debug)]
pub struct Disk(Database);

impl Disk {
    /// Opens or makes the database in `dir`; `ids` become cluster and member where it is new.
    pub fn open(dir: &Path, ids: (u64, u64)) -> Result<(Disk, Loaded), DiskError> {
        std::fs::create_dir_all(dir).map_err(DiskError::Folder)?;
        let path = dir.join("store.redb");
        // A database that cannot be opened for reading is new, or was not closed: the other door repairs it.
        if let Some(newer) = ReadOnlyDatabase::open(&path).ok().and_then(|old| format_of(&old).ok().flatten()) {
            refuse_newer(newer)?;
        }
        let database = redb::Builder::new().set_cache_size(2 << 20).create(path).map_err(at("open"))?;
        let disk = Disk(database);
        disk.prepare(ids)?;
        let loaded = load(&disk.0)?;
        Ok((disk, loaded))
    }

    /// What lies in `dir`, while no store runs there, without a change to it; `None`: nothing does.
    pub fn look(dir: &Path) -> Result<Option<Loaded>, DiskError> {
        let path = dir.join("store.redb");
        match ReadOnlyDatabase::open(&path) {
            Ok(database) => loaded_from(&database),
            Err(DatabaseError::Storage(StorageError::Io(e))) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(error @ DatabaseError::DatabaseAlreadyOpen) => Err(at("open")(error)),
            // One that is new, or was not closed, goes through the other door beside the disk.
            Err(_) => {
                let bytes = std::fs::read(&path).map_err(|e| at("read")(StorageError::from(e)))?;
                let copy = InMemoryBackend::new();
                let written = copy.set_len(bytes.len() as u64).and_then(|()| copy.write(0, &bytes));
                written.map_err(|e| at("read")(StorageError::from(e)))?;
                loaded_from(&redb::Builder::new().create_with_backend(copy).map_err(at("open"))?)
            }
        }
    }

    /// Writes a batch; it is on the disk when this returns.
    pub fn write(&self, batch: &Batch) -> Result<(), DiskError> {
        let txn = self.0.begin_write().map_err(at("write"))?;
        {
            let mut log = txn.open_table(LOG).map_err(at("write"))?;
            for record in &batch.records {
                let place = (record.version.rev as u64, record.version.sub as u64);
                log.insert(place, encode(record).as_slice()).map_err(at("write"))?;
            }
            let mut leases = txn.open_table(LEASE).map_err(at("write"))?;
            for (id, ttl) in &batch.leases {
                match ttl {
                    Some(ttl) => leases.insert(id, ttl).map(|_| ()).map_err(at("write"))?,
                    None => leases.remove(id).map(|_| ()).map_err(at("write"))?,
                }
            }
            if let Some((rev, gone)) = &batch.compaction {
                for (rev, sub) in gone {
                    log.remove((*rev as u64, *sub as u64)).map_err(at("write"))?;
                }
                let mut meta = txn.open_table(META).map_err(at("write"))?;
                meta.insert("compacted", *rev as u64).map_err(at("write"))?;
            }
        }
        txn.commit().map_err(at("sync"))
    }

    /// Checks the format, and writes it where the database is new.
    fn prepare(&self, (cluster, member): (u64, u64)) -> Result<(), DiskError> {
        if let Some(version) = format_of(&self.0)? {
            return refuse_newer(version);
        }
        let txn = self.0.begin_write().map_err(at("write"))?;
        {
            let mut meta = txn.open_table(META).map_err(at("write"))?;
            for (name, value) in [("version", FORMAT), ("cluster", cluster), ("member", member), ("compacted", 0)] {
                meta.insert(name, value).map_err(at("write"))?;
            }
            txn.open_table(LOG).map_err(at("write"))?;
            txn.open_table(LEASE).map_err(at("write"))?;
        }
        txn.commit().map_err(at("sync"))
    }
}

/// All of a database that may be new.
fn loaded_from(database: &impl ReadableDatabase) -> Result<Option<Loaded>, DiskError> {
    let Some(version) = format_of(database)? else { return Ok(None) };
    refuse_newer(version)?;
    load(database).map(Some)
}

fn load(database: &impl ReadableDatabase) -> Result<Loaded, DiskError> {
    let txn = database.begin_read().map_err(at("read"))?;
    let meta = txn.open_table(META).map_err(at("read"))?;
    let number = |name| Ok::<u64, DiskError>(meta.get(name).map_err(at("read"))?.map_or(0, |row| row.value()));
    let mut loaded = Loaded {
        compacted: number("compacted")? as i64,
        cluster: number("cluster")?,
        member: number("member")?,
        ..Loaded::default()
    };
    for row in txn.open_table(LOG).map_err(at("read"))?.iter().map_err(at("read"))? {
        let (place, bytes) = row.map_err(at("read"))?;
        let record = decode(place.value(), bytes.value()).ok_or(DiskError::Broken(place.value()))?;
        loaded.records.push(record);
    }
    for row in txn.open_table(LEASE).map_err(at("read"))?.iter().map_err(at("read"))? {
        let (id, ttl) = row.map_err(at("read"))?;
        loaded.leases.push((id.value(), ttl.value()));
    }
    Ok(loaded)
}

/// The format that a database says it has; `None`: it is new.
fn format_of(database: &impl ReadableDatabase) -> Result<Option<u64>, DiskError> {
    let txn = database.begin_read().map_err(at("read"))?;
    let Ok(meta) = txn.open_table(META) else { return Ok(None) };
    Ok(meta.get("version").map_err(at("read"))?.map(|version| version.value()))
}

fn refuse_newer(version: u64) -> Result<(), DiskError> {
    if version <= FORMAT { Ok(()) } else { Err(DiskError::Newer(version)) }
}

fn at<E: Into<redb::Error>>(act: &'static str) -> impl Fn(E) -> DiskError {
    move |error| DiskError::Database { act, source: Box::new(error.into()) }
}

/// A row of the log.
pub fn encode(record: &Record) -> Vec<u8> {
    let version = &record.version;
    let mut row = Vec::with_capacity(28 + record.key.len() + version.value.len());
    row.extend_from_slice(&(record.key.len() as u32).to_le_bytes());
    row.extend_from_slice(&record.key);
    for number in [version.create, version.count, version.lease] {
        row.extend_from_slice(&number.to_le_bytes());
    }
    row.extend_from_slice(&version.value);
    row
}

/// The record of a row; `None`: it is too short for what it says.
pub fn decode((rev, sub): (u64, u64), row: &[u8]) -> Option<Record> {
    let (len, rest) = row.split_first_chunk::<4>()?;
    let (key, mut rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    let mut number = || {
        let (bytes, left) = rest.split_first_chunk::<8>()?;
        rest = left;
        Some(i64::from_le_bytes(*bytes))
    };
    let (create, count, lease) = (number()?, number()?, number()?);
    let value = Bytes::copy_from_slice(rest);
    let version = Version { rev: rev as i64, sub: sub as i64, create, count, lease, value };
    Some(Record { key: Bytes::copy_from_slice(key), version })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_changes_nothing_and_sees_what_was_closed_and_what_was_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("store.redb");
        let nowhere = dir.path().join("nowhere");
        assert!(Disk::look(&nowhere).unwrap().is_none() && !nowhere.exists());
        let version = Version { rev: 2, sub: 0, create: 2, count: 1, lease: 0, value: Bytes::from_static(b"value") };
        let record = Record { key: Bytes::from_static(b"/key"), version };
        let disk = Disk::open(dir.path(), (1, 2)).unwrap().0;
        disk.write(&Batch { records: vec![record.clone()], ..Batch::default() }).unwrap();
        assert!(Disk::look(dir.path()).unwrap_err().is_in_use());
        // As a kill leaves it.
        let killed = tempfile::tempdir().unwrap();
        std::fs::copy(&file, killed.path().join("store.redb")).unwrap();
        drop(disk);
        let begun = tempfile::tempdir().unwrap();
        std::fs::write(begun.path().join("store.redb"), "").unwrap();
        assert!(Disk::look(begun.path()).unwrap().is_none());
        for dir in [dir.path(), killed.path()] {
            let before = std::fs::read(dir.join("store.redb")).unwrap();
            assert_eq!(Disk::look(dir).unwrap().unwrap().records, std::slice::from_ref(&record), "{dir:?}");
            assert_eq!(std::fs::read(dir.join("store.redb")).unwrap(), before);
            assert_eq!(std::fs::read_dir(dir).unwrap().count(), 1, "and nothing lies beside it");
        }
    }

    #[test]
    fn a_newer_database_is_refused_and_left_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("store.redb");
        let write = |version: u64| {
            let disk = Disk::open(dir.path(), (1, 2)).unwrap().0;
            let txn = disk.0.begin_write().unwrap();
            txn.open_table(META).unwrap().insert("version", version).unwrap();
            txn.commit().unwrap();
        };
        write(FORMAT);
        write(FORMAT + 1);
        let before = std::fs::read(&file).unwrap();
        let refused = Disk::open(dir.path(), (1, 2)).unwrap_err();
        assert_eq!(refused.to_string(), "the store's data has format 2, and this program knows 1");
        assert_eq!(std::fs::read(&file).unwrap(), before);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "and nothing lies beside it");
    }
}
