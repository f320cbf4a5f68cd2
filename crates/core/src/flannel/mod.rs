//! flannel's formats, so that a cluster moves node by node.
//!
//! - [`keys`]: store keys `10.1.15.0-24` ⇄ subnets
//! - [`attrs`]: lease values ⇄ JSON
//! - [`subnet_env`][]: `/run/flannel/subnet.env`
//! - [`go_json`]: how Go's encoding/json reads an object

pub mod attrs;
pub mod go_json;
pub mod keys;
pub mod subnet_env;
