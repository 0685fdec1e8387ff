//! Why an operation failed.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fabstir_plugin_api::prelude::*;

use crate::record::RecordError;
use crate::store::Id;

/// When to ask nodes again that could not be asked.
const LATER: Duration = Duration::from_secs(5);

/// Every way in which the storage can fail. Whatever it is, blobs that were there stay and nothing is half stored.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Not 64 lower-case hexadecimal digits. The text itself is left out: it may be anything, of any length.
    #[error("a blob's id is its BLAKE3 hash as 64 lower-case hexadecimal digits")]
    InvalidId,
    #[error("blob {0} is not kept here")]
    NotKept(Id),
    #[error("neither this node nor one of its peers has a blob {0}")]
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
    /// Whoever has it sends something else.
    #[error("blob {id} cannot be fetched: {why}")]
    Wrong { id: Id, why: String },
    #[error(
        "the disk is full: {needed} bytes or more would have to go to {}, {free} are free there, and 1 GiB or a tenth of the disk stays so: \
         free some space, or set `dir` to a larger disk",
        dir.display()
    )]
    DiskFull { needed: u64, free: u64, dir: PathBuf },
    #[error("{needed} bytes or more would have to be kept, {used} of `max_bytes` {max} are in use: delete blobs or raise it")]
    QuotaFull { needed: u64, used: u64, max: u64 },
    #[error("{doing} failed: {why}")]
    WrongEntry { doing: &'static str, why: String },
    /// Later they may answer.
    #[error("{doing} failed: {why}")]
    Peers { doing: &'static str, why: String },
    /// Asking again changes nothing.
    #[error("{doing} was refused: {why}")]
    Refused { doing: &'static str, why: String },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("neither this node nor one of its peers has a pointer {0}")]
    NoPointer(String),
    #[error("revision {revision} of the pointer is not newer than the known revision {known}: sign a higher one")]
    OldRevision { revision: u64, known: u64 },
    #[error("the registry in {} cannot be used: {why}", dir.display())]
    Registry { dir: PathBuf, why: String, full: bool },
    #[error("cannot listen on {listen}: {why}")]
    Listen { listen: std::net::SocketAddr, why: String },
    #[error("{} does not hold the key of a node: restore it, or remove it to get another node id", path.display())]
    Identity { path: PathBuf },
    #[error("the caller gave up")]
    Cancelled,
    #[error("the plugin is shutting down")]
    Ended,
    /// The operating system said no.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

impl NodeError {
    /// For `map_err` on calls of the operating system.
    pub fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Io { doing, path: path.to_owned(), source }
    }
}

/// Whether a disk or a quota has no more room.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl From<NodeError> for PluginError {
    fn from(error: NodeError) -> Self {
        let code = match &error {
            NodeError::InvalidId
            | NodeError::WrongId { .. }
            | NodeError::TooMany { .. }
            | NodeError::TooFew { .. }
            | NodeError::PastTheEnd { .. }
            | NodeError::Record(_)
            | NodeError::OldRevision { .. } => Code::InvalidArgument,
            NodeError::NotKept(_) | NodeError::NotFound(_) | NodeError::NoPointer(_) => Code::NotFound,
            NodeError::Corrupt { .. } | NodeError::Wrong { .. } | NodeError::WrongEntry { .. } => Code::Corrupt,
            NodeError::DiskFull { .. } | NodeError::QuotaFull { .. } | NodeError::Registry { full: true, .. } => Code::Full,
            NodeError::Peers { .. } | NodeError::Ended => Code::Unavailable,
            NodeError::Refused { .. } => Code::Denied,
            NodeError::Cancelled => Code::Cancelled,
            NodeError::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Code::Denied,
                _ if is_full(source) => Code::Full,
                // A missing file of ours is no missing blob.
                _ => Code::Internal,
            },
            NodeError::Registry { .. } | NodeError::Listen { .. } | NodeError::Identity { .. } => Code::Internal,
        };
        let plain = PluginError::new(code, error.to_string());
        if matches!(error, NodeError::Peers { .. }) { plain.retry_after(LATER) } else { plain }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_folder_is_not_a_missing_blob() {
        let gone = NodeError::io("read", Path::new("/blobs"))(io::ErrorKind::NotFound.into());
        assert_eq!(PluginError::from(gone).code, Code::Internal);
    }

    #[test]
    fn nodes_that_could_not_be_asked_are_asked_again() {
        let error = PluginError::from(NodeError::Peers { doing: "fetching", why: "no answer".into() });
        assert_eq!((error.code, error.retry_after_ms), (Code::Unavailable, Some(5000)));
    }
}
