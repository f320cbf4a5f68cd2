//! A store that speaks etcd's v3 API: one node, durable, small.

pub mod disk;
mod engine;
mod grpc;
pub mod lease;
pub mod mvcc;

pub use grpc::{Server, ServerError};
