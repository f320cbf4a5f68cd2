//! Whole multi-host networks in namespaces on one machine.
//!
//! - [`facts`]: what the kernel holds in each namespace, for an explanation

pub mod facts;
