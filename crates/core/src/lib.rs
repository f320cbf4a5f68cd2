//! Twill's decisions, and nothing else: no clock, no socket, no randomness, no thread.
//!
//! - [`net`]: the facts of addressing (prefix, MAC, VNI, …), checked once
//! - [`flannel`]: flannel's formats; [`config`]: the network config
//! - [`lease`]: who holds which subnet; [`backend`]: what that means for the kernel
//! - [`firewall`]: nftables as values
//! - [`host`]: the state of a network namespace, as wanted and as found
//! - [`reconcile`]: from wanted and found to steps
//! - [`attach`]: containers on a bridge; [`misfits`]: those that do not fit any more; [`ipam`]: which address each of them gets;
//!   [`ports`]: host ports that lead to them
//! - [`ipcalc`]: address arithmetic for people
//! - [`words`]: kernel numbers and table lines as `ip` and `bridge` print them

pub mod alloc;
pub mod attach;
pub mod backend;
pub mod config;
mod few;
pub mod firewall;
pub mod flannel;
pub mod host;
pub mod iface;
pub mod ipam;
pub mod ipcalc;
pub mod lease;
pub mod lease_set;
pub mod misfits;
pub mod net;
pub mod ports;
pub mod reconcile;
pub mod state_file;
pub mod words;
