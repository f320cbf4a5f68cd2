//! Twill's decisions, and nothing else: no clock, no socket, no randomness, no thread.
//!
//! - [`net`]: the facts of addressing (prefix, MAC, VNI, …), checked once
//! - [`host`]: the state of a network namespace, as wanted and as found
//! - [`lease`]: who holds which subnet; [`backend`]: what that means for the kernel
//! - [`reconcile`]: from wanted and found to steps

pub mod backend;
pub mod host;
pub mod lease;
pub mod net;
pub mod reconcile;
