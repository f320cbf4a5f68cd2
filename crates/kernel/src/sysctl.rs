//! Sysctls of the calling thread's network namespace, by their path below /proc/sys.

use std::fs::{self, File};
use std::io::{self, Read};

/// The value without its newline.
pub fn read(path: &str) -> io::Result<String> {
    let path = format!("/proc/sys/{path}");
    // Nearly all are a few digits, which one read takes: it gives a value whole or, with too little room, cut.
    let mut bytes = [0; 64];
    let len = File::open(&path)?.read(&mut bytes)?;
    let text =
        if len < bytes.len() { String::from_utf8_lossy(&bytes[..len]).into() } else { fs::read_to_string(path)? };
    Ok(text.trim_end().to_owned())
}

/// Writes a value.
pub fn write(path: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/{path}"), value)
}
