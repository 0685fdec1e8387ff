//! Why an operation failed.

use std::io;
use std::path::{Path, PathBuf};

use fabstir_plugin_api::prelude::*;

use crate::Id;
use crate::disk::is_full;
use crate::space::Full;

/// Every way in which a folder of blobs can fail. Whatever it is, blobs that were there stay and nothing is half stored.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// Not 64 lower-case hexadecimal digits. The text itself is left out: it may be anything, of any length.
    #[error("a blob's id is its BLAKE3 hash as 64 lower-case hexadecimal digits")]
    InvalidId,
    #[error("no blob {0} is stored here")]
    NotFound(Id),
    /// The bytes that came are not the bytes that were announced.
    #[error("expected the blob {expected}, the bytes that came are {actual}")]
    WrongId { expected: Id, actual: Id },
    #[error("expected {expected} bytes, {actual} or more came")]
    TooMany { expected: u64, actual: u64 },
    #[error("expected {expected} bytes, only {actual} came")]
    TooFew { expected: u64, actual: u64 },
    #[error("the range starts at byte {offset}, the blob has {size}")]
    PastTheEnd { offset: u64, size: u64 },
    /// The bytes on the disk are not those that were stored.
    #[error("blob {id} is damaged on the disk ({found}): put it again to repair it, or delete it")]
    Corrupt { id: Id, found: String },
    #[error(
        "the disk is full: a blob needs {} or more; {} {}: free some space, or set `dir` to a larger disk",
        bytes(*needed), dir.display(), Full::has(*free, *stays, *promised)
    )]
    DiskFull { needed: u64, free: Option<u64>, stays: u64, promised: u64, dir: PathBuf },
    #[error(
        "the quota is full: a blob needs {} or more, {} of `max_bytes` {} are left: delete blobs or raise it",
        bytes(*needed), bytes(max.saturating_sub(*used)), bytes(*max)
    )]
    QuotaFull { needed: u64, used: u64, max: u64 },
    #[error("the caller gave up")]
    Cancelled,
    #[error(transparent)]
    Ended(#[from] Ended),
    /// The operating system said no.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

/// There is nothing any more that would do it.
#[derive(Debug, thiserror::Error)]
#[error("the plugin is shutting down")]
pub struct Ended;

/// A size for people: exact below 1 KiB, else in the largest unit that keeps it at 1 or more.
pub fn bytes(size: u64) -> String {
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

impl BlobError {
    /// For `map_err` on calls of the operating system.
    pub fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Io { doing, path: path.to_owned(), source }
    }

    /// What a plugin tells of it.
    pub fn code(&self) -> Code {
        match self {
            Self::InvalidId | Self::WrongId { .. } | Self::TooMany { .. } | Self::TooFew { .. } | Self::PastTheEnd { .. } => {
                Code::InvalidArgument
            }
            Self::NotFound(_) => Code::NotFound,
            Self::Corrupt { .. } => Code::Corrupt,
            Self::DiskFull { .. } | Self::QuotaFull { .. } => Code::Full,
            Self::Cancelled => Code::Cancelled,
            Self::Ended(_) => Code::Unavailable,
            Self::Io { source, .. } => code_of(source),
        }
    }
}

impl From<Full> for BlobError {
    fn from(full: Full) -> Self {
        match full {
            Full::Disk { needed, free, stays, promised, dir } => Self::DiskFull { needed, free, stays, promised, dir },
            Full::Quota { needed, used, max } => Self::QuotaFull { needed, used, max },
        }
    }
}

/// What a plugin tells of an error of the operating system. A file of ours that is missing is no missing blob.
pub fn code_of(error: &io::Error) -> Code {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Code::Denied,
        _ if is_full(error) => Code::Full,
        _ => Code::Internal,
    }
}

impl From<BlobError> for PluginError {
    fn from(error: BlobError) -> Self {
        PluginError::new(error.code(), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_says_what_is_free_and_what_is_needed() {
        let full = |promised| BlobError::DiskFull {
            needed: 3 << 20,
            free: Some(300 << 20),
            stays: 1 << 30,
            promised,
            dir: "/blobs".into(),
        };
        let error = PluginError::from(full(0));
        assert_eq!(error.code, Code::Full);
        assert_eq!(
            error.message,
            "the disk is full: a blob needs 3.0 MiB or more; /blobs has 300.0 MiB free, and blobs leave 1.0 GiB of the disk free: free some \
             space, or set `dir` to a larger disk"
        );
        let full = full(200 << 20).to_string();
        assert!(
            full.contains("/blobs has 300.0 MiB free, 200.0 MiB are promised to others on their way, and blobs leave"),
            "{full}"
        );
        let full = BlobError::QuotaFull { needed: 10, used: 95, max: 100 };
        assert_eq!(
            full.to_string(),
            "the quota is full: a blob needs 10 bytes or more, 5 bytes of `max_bytes` 100 bytes are left: delete blobs or raise it"
        );
    }

    #[test]
    fn missing_folder_is_not_a_missing_blob() {
        let gone = BlobError::io("read", Path::new("/blobs"))(io::ErrorKind::NotFound.into());
        assert_eq!(PluginError::from(gone).code, Code::Internal);
    }
}
