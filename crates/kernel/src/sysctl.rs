//! Sysctls of the calling thread's network namespace, by their path below /proc/sys.

use std::{fs, io};

/// The value without its newline.
pub fn read(path: &str) -> io::Result<String> {
    fs::read_to_string(format!("/proc/sys/{path}")).map(|text| text.trim_end().to_owned())
}

/// Writes a value.
pub fn write(path: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/{path}"), value)
}
