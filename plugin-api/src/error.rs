//! The one error that crosses the boundary.

use std::fmt;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What every call across the boundary returns.
pub type Result<T, E = PluginError> = std::result::Result<T, E>;

/// Why a call failed, as a word that programs can act on.
///
/// The set grows only by addition; a code that this build does not know is read as [`Code::Unknown`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request itself is wrong; sending it again will fail again.
    InvalidArgument,
    /// The named thing (a model, a blob) does not exist here.
    NotFound,
    /// Prompt and `max_tokens` together exceed the context.
    TooLong,
    /// No room at the moment: ask again after `retry_after`.
    Overloaded,
    /// The plugin is starting, draining or gone. The host tries another instance, or asks again.
    Unavailable,
    /// The caller gave up.
    Cancelled,
    /// The call's deadline passed.
    DeadlineExceeded,
    /// The method is an optional one that this plugin does not declare.
    Unimplemented,
    /// Plugin code panicked; the panic ended this call and nothing else.
    Panicked,
    /// Stored bytes do not match their content id.
    Corrupt,
    /// A disk, a quota or memory is full. Nothing was stored.
    Full,
    /// The operating system or a policy said no.
    Denied,
    /// The other side broke the frame protocol.
    Protocol,
    /// A fault inside the plugin.
    Internal,
    /// A code of a newer interface than this build knows.
    #[serde(other)]
    Unknown,
}

impl Code {
    /// Whether the same request may succeed later or on another instance.
    pub fn is_retryable(self) -> bool {
        matches!(self, Code::Overloaded | Code::Unavailable)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Code::InvalidArgument => "invalid argument",
            Code::NotFound => "not found",
            Code::TooLong => "too long",
            Code::Overloaded => "overloaded",
            Code::Unavailable => "unavailable",
            Code::Cancelled => "cancelled",
            Code::DeadlineExceeded => "deadline exceeded",
            Code::Unimplemented => "unimplemented",
            Code::Panicked => "panicked",
            Code::Corrupt => "corrupt",
            Code::Full => "full",
            Code::Denied => "denied",
            Code::Protocol => "protocol error",
            Code::Internal => "internal error",
            Code::Unknown => "unknown error",
        };
        f.write_str(text)
    }
}

/// A failed call: a code for programs, a sentence for people.
///
/// The message reaches operators' logs and, for codes that are the client's doing, the client. It names the cause, the limit and
/// the next step, and never holds prompts, completions or keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{message}")]
pub struct PluginError {
    pub code: Code,
    pub message: String,
    /// For `Overloaded` and `Unavailable`: how long to wait before asking again, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl PluginError {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after_ms: None }
    }

    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after_ms = Some(wait.as_millis() as u64);
        self
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    pub fn cancelled() -> Self {
        Self::new(Code::Cancelled, "the caller gave up")
    }

    pub fn unimplemented(method: &str) -> Self {
        Self::new(Code::Unimplemented, format!("this plugin does not provide `{method}`"))
    }

    pub(crate) fn protocol(message: impl Into<String>) -> Self {
        Self::new(Code::Protocol, message)
    }
}

impl From<std::io::Error> for PluginError {
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind;
        let code = match error.kind() {
            ErrorKind::NotFound => Code::NotFound,
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Code::Denied,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Code::Full,
            _ => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}
