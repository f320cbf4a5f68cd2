//! Whole multi-host networks in namespaces on one machine.
//!
//! ```text
//!  client ──spawns──▶ launcher ──unshare──▶ supervisor (PID 1 of its namespace; without root in a user namespace)
//!    ▲ progress lines                          ├─ underlay: a bridge in its own network namespace, the store process
//!    └──── control.sock ──────────────────────▶├─ node1 …: a network namespace each, a `twill agent` process in it
//!                                              └─ container-1 …: a network namespace each, on the node's bridge
//! ```
//! The supervisor holds every namespace by a descriptor: ending it ends everything.
//!
//! - [`layout`]: which addresses a lab uses; [`home`]: where it keeps its state
//! - [`start`]: making a lab, and the processes that become it; [`proto`]: talking to it
//! - [`enter`]: going into its namespaces; [`ping`]: who reaches whom; [`frames`]: what passes meanwhile
//! - [`facts`]: live facts for an explanation

mod agent;
mod children;
pub mod enter;
pub mod error;
pub mod facts;
pub mod frames;
pub mod home;
mod lab;
pub mod layout;
mod notify;
pub mod ping;
pub mod proto;
pub mod start;
mod store;
pub mod stream;
mod supervisor;
mod watch;
mod wiring;

pub use error::LabError;
pub use home::Home;
pub use layout::{Backend, LabName, Scenario, Spec, StoreKind};
pub use notify::become_with_kept;
pub use proto::{AgentAct, AgentState, LabState, Request, ask};
