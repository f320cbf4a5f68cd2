//! Routing netlink: bytes, sockets, and the way between messages and objects.
//!
//! - [`wire`]: headers and attributes
//! - `socket`: requests that are answered, dumps, notifications
//! - `names`: ifindex ⇄ name; the index never leaves this crate
//! - `decode`, `encode`: messages ⇄ objects

pub mod codec;
pub(crate) mod decode;
pub(crate) mod encode;
pub(crate) mod names;
pub(crate) mod socket;
pub mod wire;
