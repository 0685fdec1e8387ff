//! Why an operation failed.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blob_folder::space::Full;
use blob_folder::{Ended, bytes, code_of};
use fabstir_plugin_api::prelude::*;

use crate::cid::{Id, NameError};
use crate::pointer::EntryError;

/// Every way in which the storage can fail.
#[derive(Debug, thiserror::Error)]
pub enum S5Error {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("no portal of this instance has a blob {0}")]
    NotFound(Id),
    /// Only what was put or read here has a size that was checked.
    #[error("blob {0} was never put or read by this instance, so its size is not known: read it")]
    NotKnown(Id),
    /// The bytes that came are not the bytes that were announced.
    #[error("expected the blob {expected}, the bytes that came are {actual}")]
    WrongId { expected: Id, actual: Id },
    #[error("expected {expected} bytes, {actual} or more came")]
    TooMany { expected: u64, actual: u64 },
    #[error("expected {expected} bytes, only {actual} came")]
    TooFew { expected: u64, actual: u64 },
    #[error("the range starts at byte {offset}, the blob has {size}")]
    PastTheEnd { offset: u64, size: u64 },
    /// No portal has sent the right bytes, and one has sent wrong ones.
    #[error("blob {id} cannot be read: {why}: put it again to repair it or to keep it on another portal, or delete it")]
    Corrupt { id: Id, why: String },
    #[error(
        "the disk is full: {} or more would have to wait in {}, which {}: free some space",
        bytes(*needed), dir.display(), Full::has(*free, *stays, *promised)
    )]
    DiskFull { needed: u64, free: Option<u64>, stays: u64, promised: u64, dir: PathBuf },
    #[error(
        "{} or more would have to wait on the disk, {} of `spool_max_bytes` {} are in use: try again, or raise it",
        bytes(*needed), bytes(*used), bytes(*max)
    )]
    SpoolFull { needed: u64, used: u64, max: u64 },
    /// Nobody is to blame but the portals, and later they may do it.
    #[error("{doing} failed: {why}")]
    Portals { doing: &'static str, why: String, retry_after: Duration, busy: bool },
    /// Asking again changes nothing.
    #[error("{doing} was refused: {why}")]
    Refused { doing: &'static str, why: String },
    #[error(transparent)]
    Entry(#[from] EntryError),
    #[error("no portal has a pointer {0}")]
    NoPointer(String),
    #[error("revision {revision} of the pointer is not newer than the known revision {known}: sign a higher one")]
    OldRevision { revision: u64, known: u64 },
    #[error(transparent)]
    Ended(#[from] Ended),
    /// The operating system said no.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

impl S5Error {
    /// For `map_err` on calls of the operating system.
    pub fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Io { doing, path: path.to_owned(), source }
    }
}

impl From<Full> for S5Error {
    fn from(full: Full) -> Self {
        match full {
            Full::Disk { needed, free, stays, promised, dir } => Self::DiskFull { needed, free, stays, promised, dir },
            Full::Quota { needed, used, max } => Self::SpoolFull { needed, used, max },
        }
    }
}

impl From<S5Error> for PluginError {
    fn from(error: S5Error) -> Self {
        let code = match &error {
            S5Error::Name(_)
            | S5Error::WrongId { .. }
            | S5Error::TooMany { .. }
            | S5Error::TooFew { .. }
            | S5Error::PastTheEnd { .. }
            | S5Error::Entry(_)
            | S5Error::OldRevision { .. } => Code::InvalidArgument,
            S5Error::NotFound(_) | S5Error::NotKnown(_) | S5Error::NoPointer(_) => Code::NotFound,
            S5Error::Corrupt { .. } => Code::Corrupt,
            S5Error::DiskFull { .. } | S5Error::SpoolFull { .. } => Code::Full,
            S5Error::Portals { busy: true, .. } => Code::Overloaded,
            S5Error::Portals { busy: false, .. } => Code::Unavailable,
            S5Error::Refused { .. } => Code::Denied,
            S5Error::Io { source, .. } => code_of(source),
            S5Error::Ended(_) => Code::Unavailable,
        };
        let plain = PluginError::new(code, error.to_string());
        match error {
            S5Error::Portals { retry_after, .. } => plain.retry_after(retry_after),
            _ => plain,
        }
    }
}
