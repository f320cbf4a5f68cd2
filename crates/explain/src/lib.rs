//! From facts to the path of a packet, and the hop where it ends. Pure: runs on live namespaces as on a file that someone sent.
//!
//! ```text
//!   Send ──route──▶ neighbour ──▶ Transmit ──▶ veth ─▶ Receive ──▶ bridge port? ─▶ Bridge ─▶ Transmit …
//!    ▲   (RTM_GETROUTE)               │                   │
//!    │                          VXLAN: FDB, wrap          ▼  our MAC?
//!    └────────── outer packet ────────┘                 Input ──▶ ours: unwrap (VNI, port) or arrived
//!                                                         └─────▶ not ours: forward ──▶ route …
//! ```
//! - [`facts`]: what is asked of the world: the trait [`Facts`], and [`Memory`], its twin that looks routes up by itself
//! - [`find`]: from a name or an address to an end of the path
//! - [`walk`]: the walk, one handler for each step
//! - [`segment`]: who hears a broadcast
//! - [`path`]: what comes out: hops, verdict, and their text
//!
//! Routes are asked of the kernel, never looked up by this crate when the kernel is there: docs/decisions/0001-explain-asks-the-kernel.md.

pub mod facts;
pub mod find;
pub mod path;
pub mod segment;
pub mod walk;

pub use facts::{Facts, Far, Memory, NoRoute, PlaceFacts, RouteAnswer, RouteQuery};
pub use find::{NotFound, ends};
pub use path::{Code, End, Explanation, Hop, Verdict, Way, What};
pub use walk::explain;
