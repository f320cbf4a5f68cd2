//! A store that speaks etcd's v3 API: one node, durable, small.

pub mod disk;
mod engine;
mod grpc;
pub mod lease;
pub mod mvcc;

use std::path::Path;

pub use grpc::{Server, ServerError};

/// The keys of a store that does not run, without a change to its folder; `None`: there are none.
pub fn look(dir: &Path) -> Result<Option<mvcc::Mvcc>, disk::DiskError> {
    Ok(disk::Disk::look(dir)?.map(|mut loaded| mvcc::Mvcc::of(&mut loaded)))
}
