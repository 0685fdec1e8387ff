//! Why an operation on vectors failed.

use std::io;
use std::path::{Path, PathBuf};

use blob_folder::{Ended, bytes, code_of};
use fabstir_plugin_api::prelude::*;

pub type Result<T, E = VectorError> = std::result::Result<T, E>;

/// Every way in which the vectors can fail. Whatever it is, what was stored stays and nothing is half stored.
#[derive(Debug, thiserror::Error)]
pub enum VectorError {
    #[error("a {what} of {length} bytes is too long: at most {limit}")]
    TooLong { what: &'static str, length: usize, limit: usize },
    #[error("a vector has 1 to 4096 numbers, this one has {0}")]
    Length(usize),
    #[error("a vector may hold numbers only: one of these is infinite or none at all")]
    NotFinite,
    #[error("a vector of zeros only has no direction to compare")]
    Zero,
    #[error(
        "the vectors of this namespace have {expected} numbers, this one has {actual}: use another namespace for another model"
    )]
    Dimension { expected: u64, actual: usize },
    #[error("`limit` is {0}: at most 1000 are given at once")]
    Limit(u32),
    #[error("`at_least` is no number: give a cosine from -1 to 1, or leave it out")]
    Threshold,
    #[error("the disk is full: the vectors need {}, {} free in {}: free some space, or set `dir` to a larger disk",
        bytes(*needed), free.map_or("an unknown amount is".into(), bytes), dir.display())]
    DiskFull { needed: u64, free: Option<u64>, dir: PathBuf },
    #[error("the quota is full: with these vectors it would be {} of `max_vector_bytes` {}: delete some or raise it",
        bytes(*wanted), bytes(*max_bytes))]
    QuotaFull { wanted: u64, max_bytes: u64 },
    /// Another instance, here or in another process, has the file open.
    #[error("another instance has the vectors in {} open: give each its own `dir`, or wait until the other has ended", .0.display())]
    InUse(PathBuf),
    #[error(transparent)]
    Closed(#[from] Ended),
    #[error("the caller gave up")]
    Cancelled,
    /// A row that this plugin did not write so.
    #[error("the stored vectors are damaged ({0}): delete the namespace and put them again")]
    Damaged(String),
    #[error("the vectors in {} were written by another version of this plugin (format {found}): use that version, or another `dir`", dir.display())]
    Format { found: u64, dir: PathBuf },
    #[error("the file of the vectors cannot be read or written: {0}")]
    Database(Box<redb::Error>),
    /// The index alone, never the truth: it is made anew.
    #[error("the index cannot be used: {0}")]
    Index(String),
    /// The operating system said no.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

impl VectorError {
    /// For `map_err` on calls of the operating system.
    pub fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Io { doing, path: path.to_owned(), source }
    }

    /// For `map_err` on calls of the index.
    pub fn index(error: impl std::fmt::Display) -> Self {
        Self::Index(error.to_string())
    }
}

macro_rules! from_database {
    ($($error:ident),*) => {
        $(impl From<redb::$error> for VectorError {
            fn from(error: redb::$error) -> Self {
                Self::Database(Box::new(error.into()))
            }
        })*
    };
}

from_database!(DatabaseError, TransactionError, TableError, StorageError, CommitError);

impl From<VectorError> for PluginError {
    fn from(error: VectorError) -> Self {
        let code = match &error {
            VectorError::TooLong { .. }
            | VectorError::Length(_)
            | VectorError::NotFinite
            | VectorError::Zero
            | VectorError::Dimension { .. }
            | VectorError::Limit(_)
            | VectorError::Threshold => Code::InvalidArgument,
            VectorError::DiskFull { .. } | VectorError::QuotaFull { .. } => Code::Full,
            VectorError::InUse(_) | VectorError::Closed(_) => Code::Unavailable,
            VectorError::Cancelled => Code::Cancelled,
            VectorError::Damaged(_) => Code::Corrupt,
            VectorError::Database(error) => match &**error {
                redb::Error::Corrupted(_) => Code::Corrupt,
                _ => Code::Internal,
            },
            VectorError::Io { source, .. } => code_of(source),
            VectorError::Format { .. } | VectorError::Index(_) => Code::Internal,
        };
        PluginError::new(code, error.to_string())
    }
}
