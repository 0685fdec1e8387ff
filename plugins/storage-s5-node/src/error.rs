//! Why an operation failed.

use std::path::PathBuf;
use std::time::Duration;

use blob_folder::{BlobError, Ended, Id};
use fabstir_plugin_api::prelude::*;

use crate::record::RecordError;

/// When to ask nodes again that could not be asked.
const LATER: Duration = Duration::from_secs(5);

/// Every way in which the storage can fail. Whatever it is, blobs that were there stay and nothing is half stored.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(transparent)]
    Blob(BlobError),
    #[error("neither this node nor one of its peers has a blob {0}")]
    NotFound(Id),
    /// Whoever has it sends something else.
    #[error("blob {id} cannot be fetched: {why}")]
    Wrong { id: Id, why: String },
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
    #[error(transparent)]
    Ended(#[from] Ended),
}

impl From<BlobError> for NodeError {
    fn from(error: BlobError) -> Self {
        match error {
            BlobError::Ended(ended) => Self::Ended(ended),
            other => Self::Blob(other),
        }
    }
}

impl From<NodeError> for PluginError {
    fn from(error: NodeError) -> Self {
        let code = match &error {
            NodeError::Blob(error) => error.code(),
            NodeError::Record(_) | NodeError::OldRevision { .. } => Code::InvalidArgument,
            NodeError::NotFound(_) | NodeError::NoPointer(_) => Code::NotFound,
            NodeError::Wrong { .. } | NodeError::WrongEntry { .. } => Code::Corrupt,
            NodeError::Registry { full: true, .. } => Code::Full,
            NodeError::Peers { .. } | NodeError::Ended(_) => Code::Unavailable,
            NodeError::Refused { .. } => Code::Denied,
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
    fn nodes_that_could_not_be_asked_are_asked_again() {
        let error = PluginError::from(NodeError::Peers { doing: "fetching", why: "no answer".into() });
        assert_eq!((error.code, error.retry_after_ms), (Code::Unavailable, Some(5000)));
    }
}
