//! The `twill` binary: node agent, command line, store server and lab.
//!
//! - [`cli`]: one file for each command; each parses its arguments, calls the crate that knows, and prints
//! - [`output`]: tables, JSON, YAML, and how an error meets its user

mod cli;
mod output;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
