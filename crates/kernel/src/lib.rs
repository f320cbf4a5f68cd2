//! The Linux door, and the only `unsafe` of the project.
//!
//! - [`Kernel`]: what the reconciler needs of a network namespace; [`LinuxKernel`] is the real one, [`MemoryKernel`] its twin
//! - [`lookup`]: the kernel's own routing decision; [`wires`]: the other ends of veth pairs
//! - [`tun`], [`udp`], [`icmp`]: the doors of a tunnel in user space, each with its twin
//! - [`nft`]: nftables; [`legacy`]: what it does not show; [`conntrack`]: connections that are tracked
//! - [`netns`]: namespaces; [`sysctl`], [`files`], [`capture`]: the rest of the host
//! - [`attach`]: containers joined to a host; [`left`]: what a reference plugin has left of one
//! - [`netlink::wire`]: netlink's bytes

pub mod attach;
pub mod capture;
pub mod conntrack;
pub mod files;
pub mod icmp;
pub mod left;
pub mod legacy;
mod linux;
pub mod lookup;
mod memory;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod process;
pub mod sysctl;
pub mod tun;
pub mod udp;
pub mod wires;

use std::time::Duration;

use twill_core::host::HostState;
use twill_core::reconcile::{Changes, Outcome, Plan, Scope, StepError};

pub use linux::{Depth, Interest, LinuxKernel, Waker};
pub use memory::MemoryKernel;

/// A network namespace that can be read, changed and watched.
pub trait Kernel {
    /// The mirror: the last known state, kept by notifications.
    fn mirror(&self) -> &HostState;
    /// Reads from the kernel into the mirror: everything, or at least what these keys name.
    fn read(&mut self, scope: Scope<'_>) -> Result<(), KernelError>;
    /// Carries out a plan, and brings the mirror to where the kernel says it ended.
    fn apply(&mut self, plan: &Plan) -> Outcome;
    /// Waits until the kernel announces something, a waker is rung, or `timeout` has passed; the mirror is then up to date.
    fn changes(&mut self, timeout: Option<Duration>) -> Result<Changes, KernelError>;
}

/// The kernel could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("{act}")]
pub struct KernelError {
    /// Act and object, e.g. `dump routes`.
    pub act: String,
    /// The kernel's word.
    #[source]
    pub source: std::io::Error,
}

impl KernelError {
    /// `act` failed with `source`.
    pub fn new(act: &str, source: std::io::Error) -> Self {
        Self { act: act.to_owned(), source }
    }
}

/// A step that failed outside of a netlink answer.
pub(crate) fn refused(error: &std::io::Error, text: String) -> StepError {
    StepError::Refused { errno: error.raw_os_error().unwrap_or(libc::EIO), text }
}
