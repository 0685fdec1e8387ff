//! Which blob, and where it lies.

use std::fmt;

use fabstir_plugin_api::prelude::Entry;

use crate::{BlobError, Result};

/// A blob's content id: its BLAKE3 hash, written as 64 lower-case hexadecimal digits. In the order of those.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub [u8; 32]);

impl Id {
    /// Reads an id.
    ///
    /// # Errors
    /// [`BlobError::InvalidId`] for anything but 64 lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Result<Self> {
        let upper = text.bytes().any(|byte| byte.is_ascii_uppercase());
        match blake3::Hash::from_hex(text) {
            Ok(hash) if !upper => Ok(hash.into()),
            _ => Err(BlobError::InvalidId),
        }
    }
}

impl From<blake3::Hash> for Id {
    fn from(hash: blake3::Hash) -> Self {
        Self(hash.into())
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A blob that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Which one.
    pub id: Id,
    /// Its size in bytes.
    pub size: u64,
}

impl From<Found> for Entry {
    fn from(found: Found) -> Self {
        Self { id: found.id.to_string(), size: found.size }
    }
}

/// Where blobs lie in a folder. Paths start at the folder, and their parts are separated by `/`. They are in the order of the ids.
pub trait Layout: fmt::Debug + Send + Sync + 'static {
    /// The folder in which unfinished puts live: one in which no blobs lie.
    fn incoming(&self) -> &'static str;

    /// The folder under which all blobs lie; empty where that is the store's own.
    fn blobs(&self) -> &'static str;

    /// Where a blob lies, whether it is there or not.
    fn path(&self, id: Id) -> String;

    /// The blob that lies at a path. Other files are somebody else's.
    fn blob(&self, path: &str) -> Option<Id>;

    /// Whether blobs may lie under a folder. Other folders are somebody else's.
    fn is_folder(&self, path: &str) -> bool;
}
