//! Why an operation on the store failed.

use std::io;
use std::path::{Path, PathBuf};

use fabstir_plugin_api::prelude::*;

/// Every way in which the store can fail. Whatever it is, blobs that were there stay and nothing is half stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Not 64 lower-case hexadecimal digits. The text itself is left out: it may be anything, of any length.
    #[error("a blob's id is its BLAKE3 hash as 64 lower-case hexadecimal digits")]
    InvalidId,
    #[error("no blob {0} is stored here")]
    NotFound(String),
    /// The bytes that came are not the bytes that were announced.
    #[error("expected the blob {expected}, the bytes that came are {actual}")]
    WrongId { expected: String, actual: String },
    #[error("expected {expected} bytes, {actual} or more came")]
    TooMany { expected: u64, actual: u64 },
    #[error("expected {expected} bytes, only {actual} came")]
    TooFew { expected: u64, actual: u64 },
    #[error("the range starts at byte {offset}, the blob has {size}")]
    PastTheEnd { offset: u64, size: u64 },
    /// The bytes on the disk are not those that were stored.
    #[error("blob {id} is damaged on the disk ({found}): put it again to repair it, or delete it")]
    Corrupt { id: String, found: String },
    #[error("the disk is full: {}, {} in {}: free some space, or set `dir` to a larger disk", needs(*needed), available(*free), dir.display())]
    DiskFull { needed: Needed, free: Option<u64>, dir: PathBuf },
    #[error(
        "the quota is full: {}, {} of `max_bytes` {} left: delete blobs or raise it",
        needs(*needed), bytes(max_bytes.saturating_sub(*used)), bytes(*max_bytes)
    )]
    QuotaFull { needed: Needed, used: u64, max_bytes: u64 },
    #[error("the caller gave up")]
    Cancelled,
    /// The operating system said no.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

/// How much room a blob needs, as far as is known when there is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needed {
    Exactly(u64),
    /// The caller did not announce the size: this many bytes had come.
    AtLeast(u64),
}

fn needs(needed: Needed) -> String {
    match needed {
        Needed::Exactly(size) => format!("the blob needs {}", bytes(size)),
        Needed::AtLeast(size) => format!("the blob needs {} or more", bytes(size)),
    }
}

fn available(free: Option<u64>) -> String {
    free.map_or("an unknown amount free".into(), |free| format!("{} free", bytes(free)))
}

/// A size for people: exact below 1 KiB, else in the largest unit that keeps it at 1 or more.
pub(crate) fn bytes(size: u64) -> String {
    let mut value = size as f64;
    let mut unit = "bytes";
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, larger);
    }
    if unit == "bytes" { format!("{size} bytes") } else { format!("{value:.1} {unit}") }
}

impl StoreError {
    /// For `map_err` on calls of the operating system.
    pub fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Io { doing, path: path.to_owned(), source }
    }
}

impl From<StoreError> for PluginError {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::InvalidId
            | StoreError::WrongId { .. }
            | StoreError::TooMany { .. }
            | StoreError::TooFew { .. }
            | StoreError::PastTheEnd { .. } => Code::InvalidArgument,
            StoreError::NotFound(_) => Code::NotFound,
            StoreError::Corrupt { .. } => Code::Corrupt,
            StoreError::DiskFull { .. } | StoreError::QuotaFull { .. } => Code::Full,
            StoreError::Cancelled => Code::Cancelled,
            StoreError::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Code::Denied,
                // A missing folder is the disk's fault; `NotFound` would tell the caller that the blob is gone.
                _ => Code::Internal,
            },
        };
        PluginError::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_says_what_is_free_and_what_is_needed() {
        let full = StoreError::DiskFull { needed: Needed::Exactly(3 << 20), free: Some(1200), dir: "/blobs".into() };
        let error = PluginError::from(full);
        assert_eq!(error.code, Code::Full);
        assert_eq!(
            error.message,
            "the disk is full: the blob needs 3.0 MiB, 1.2 KiB free in /blobs: free some space, or set `dir` to a larger disk"
        );
        let full = StoreError::QuotaFull { needed: Needed::AtLeast(10), used: 95, max_bytes: 100 };
        assert_eq!(
            full.to_string(),
            "the quota is full: the blob needs 10 bytes or more, 5 bytes of `max_bytes` 100 bytes left: delete blobs or raise it"
        );
    }

    #[test]
    fn missing_folder_is_not_a_missing_blob() {
        let gone = StoreError::io("read", Path::new("/blobs"))(io::ErrorKind::NotFound.into());
        assert_eq!(PluginError::from(gone).code, Code::Internal);
    }
}
