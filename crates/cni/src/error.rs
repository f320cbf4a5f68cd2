//! What went wrong, as the specification wants it (CNI 1.1.0, section "Error").

use serde_json::json;

/// The specification's codes, and ours from 100 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The version of the configuration is not spoken.
    Version = 1,
    /// A key asks for something that is not built.
    Unsupported = 2,
    /// The container's namespace is not there.
    NoContainer = 3,
    /// An environment variable is missing or wrong.
    Environment = 4,
    /// Reading or writing failed.
    Io = 5,
    /// Not JSON, or not the JSON that was expected.
    Decode = 6,
    /// A value of the configuration makes no sense.
    Config = 7,
    /// No lease yet.
    TryAgain = 11,
    /// The plugin cannot serve.
    NotAvailable = 50,
    /// The plugin cannot serve, and running containers suffer.
    Limited = 51,
    /// The kernel refused.
    Kernel = 100,
    /// The container has this device already.
    Attached = 101,
    /// No address is free, or not the one that was asked for.
    Addresses = 102,
    /// CHECK found differences.
    Differs = 103,
    /// The bridge belongs to another network.
    Bridge = 104,
    /// A host port leads to another container.
    Port = 105,
}

/// A refusal: code, what happened, and the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{msg}")]
pub struct CniError {
    /// Its code.
    pub code: Code,
    /// Act and object.
    pub msg: String,
    /// What to do next.
    pub details: String,
}

impl CniError {
    /// A refusal with its way out.
    pub fn new(code: Code, msg: impl Into<String>, details: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: details.into() }
    }

    /// The error object.
    pub fn to_json(&self, version: &str) -> String {
        json!({"cniVersion": version, "code": self.code as u32, "msg": self.msg, "details": self.details}).to_string()
    }

    /// What else went wrong; the code stays the first one's.
    pub fn and(mut self, next: CniError) -> Self {
        if !self.msg.contains(&next.msg) {
            self.msg += &format!("; {}", next.msg);
        }
        if !self.details.contains(&next.details) {
            self.details += &format!("; {}", next.details);
        }
        self
    }
}

/// Adds to an input or output error what was done to which file.
pub(crate) trait Act<T> {
    /// `act` says act and object.
    fn act(self, act: impl FnOnce() -> String) -> Result<T, CniError>;
}

impl<T> Act<T> for std::io::Result<T> {
    fn act(self, act: impl FnOnce() -> String) -> Result<T, CniError> {
        self.map_err(|error| {
            let hint = match error.kind() {
                std::io::ErrorKind::PermissionDenied => "the plugin must run as root",
                std::io::ErrorKind::StorageFull => "make room on that file system",
                _ => "look at that path on this host",
            };
            CniError::new(Code::Io, format!("{}: {error}", act()), hint)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_is_told_under_the_first_ones_code() {
        let first = CniError::new(Code::Kernel, "make eth0", "look at the kernel");
        let all = first.and(CniError::new(Code::Io, "free 10.1.15.2", "run it as root"));
        let all = all.and(CniError::new(Code::Io, "forget a:eth0", "run it as root"));
        assert_eq!(
            all.to_json("1.0.0"),
            json!({"cniVersion": "1.0.0", "code": 100,
            "msg": "make eth0; free 10.1.15.2; forget a:eth0", "details": "look at the kernel; run it as root"})
            .to_string()
        );
    }
}
