//! What goes wrong in a lab, as a user meets it and as it crosses the control socket.

use serde::{Deserialize, Serialize};

/// An error of a lab.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct LabError {
    /// Stable kebab-case code, one of [`CODES`].
    pub code: String,
    /// The act, the object and the cause.
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
}

/// Every code that a lab's error can have.
pub const CODES: [&str; 14] = [
    "agent-failed",
    "backend-not-built",
    "bad-lab-name",
    "lab-exists",
    "lab-failed",
    "lab-full",
    "lab-home",
    "lab-killed",
    "no-agent",
    "no-such-device",
    "no-such-lab",
    "no-such-place",
    "store-failed",
    "userns-forbidden",
];

impl LabError {
    /// An error without a hint.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        debug_assert!(CODES.contains(&code), "{code} is not in the list");
        Self { code: code.to_owned(), message: message.into(), hint: None }
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The code as it is listed in [`CODES`].
    pub fn code(&self) -> &'static str {
        CODES.iter().copied().find(|code| *code == self.code).unwrap_or("lab-failed")
    }
}

/// Turns a cause into a [`LabError`] that says the act.
pub(crate) trait Act<T> {
    /// The act and its object, lower case.
    fn act(self, act: impl FnOnce() -> String) -> Result<T, LabError>;
}

impl<T, E: std::error::Error> Act<T> for Result<T, E> {
    fn act(self, act: impl FnOnce() -> String) -> Result<T, LabError> {
        self.map_err(|error| {
            let mut message = format!("{}: {error}", act());
            let mut cause = error.source();
            while let Some(error) = cause {
                message += &format!(": {error}");
                cause = error.source();
            }
            LabError::new("lab-failed", message)
        })
    }
}
