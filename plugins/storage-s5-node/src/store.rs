//! Blobs in a folder, in the layout of S5's local store: `blob3/` and the hash in base32, cut into three levels of folders.
//!
//! A blob is written under another name, forced to the disk and then renamed, so under its own name a file is whole or absent, also after
//! a power cut. S5's own way to write neither forces to the disk nor renames what comes as a stream; what it reads is the same.

mod incoming;
mod reading;
mod taking;

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use s5_core::Hash;
use s5_core::blob::paths;
use s5_core::store::{Store as _, StoreFeatures};
use s5_store_local::LocalStore;
use tokio::task::spawn_blocking;
use tracing::info;

use crate::error::NodeError;

pub use incoming::{Incoming, Whole};
pub use reading::{Folders, Reader, is_whole};
pub use taking::Taking;

pub type Result<T, E = NodeError> = std::result::Result<T, E>;

/// Bytes that one read or one piece of a stream may have.
pub const PIECE: usize = 1 << 20;

/// Where blobs lie.
const BLOBS: &str = "blob3";

/// Where unfinished puts live: S5 lists nothing in it. In the same folder, so that a rename is atomic.
const INCOMING: &str = ".tmp";

/// A blob's content id.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Id(pub Hash);

impl Id {
    pub fn parse(text: &str) -> Result<Self> {
        let mut bytes = [0; 32];
        let upper = text.bytes().any(|byte| byte.is_ascii_uppercase());
        match hex::decode_to_slice(text, &mut bytes) {
            Ok(()) if !upper => Ok(Self(Hash::from_bytes(bytes))),
            _ => Err(NodeError::InvalidId),
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_hex())
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A blob that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    pub id: Id,
    pub size: u64,
}

/// Blobs in a folder.
///
/// Every method blocks on the disk and may be called from many threads. Two stores may share a folder, as they do while one version
/// of the plugin takes over from another; each then counts only its own changes towards the most bytes.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    features: StoreFeatures,
    max: Option<u64>,
    /// Bytes of blobs, those on their way included. Counted only where there is a most.
    used: Mutex<u64>,
    /// Folders of blobs that are known to survive a power cut.
    durable: Mutex<HashSet<PathBuf>>,
}

impl Store {
    /// Opens a folder, makes it if it is missing, and removes what a crash left of unfinished puts.
    pub fn open(root: &Path, max: Option<u64>) -> Result<Arc<Self>> {
        for name in [INCOMING, BLOBS] {
            let folder = root.join(name);
            fs::create_dir_all(&folder).map_err(NodeError::io("make the folder", &folder))?;
        }
        let incoming = root.join(INCOMING);
        let removed = remove_leftovers(&incoming).map_err(NodeError::io("clear", &incoming))?;
        if removed > 0 {
            info!(removed, "Removed unfinished puts that a crash had left.");
        }
        let features = LocalStore::new(root).features();
        let store = Self { root: root.to_owned(), features, max, used: Mutex::new(0), durable: Mutex::default() };
        if max.is_some() {
            let mut used = 0;
            let mut folders = store.folders()?;
            while let Some(blobs) = folders.next_blobs()? {
                used += blobs.iter().map(|blob| blob.size).sum::<u64>();
            }
            *store.used.lock() = used;
        }
        Ok(Arc::new(store))
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The file of a blob, whether it is there or not.
    pub fn path(&self, id: Id) -> PathBuf {
        self.root.join(paths::blob_path_for_hash(id.0, &self.features))
    }

    /// A blob's size.
    pub fn size(&self, id: Id) -> Result<u64> {
        let path = self.path(id);
        match fs::metadata(&path) {
            Ok(found) => Ok(found.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(NodeError::NotKept(id)),
            Err(error) => Err(NodeError::io("read", &path)(error)),
        }
    }

    /// Removes a blob and says whether it was there. Reads of it that have begun go on.
    pub fn delete(&self, id: Id) -> Result<bool> {
        let path = self.path(id);
        let removed = {
            let mut used = self.used.lock();
            match fs::metadata(&path).and_then(|found| fs::remove_file(&path).map(|()| found.len())) {
                Ok(size) => *used = used.saturating_sub(size),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(NodeError::io("remove", &path)(error)),
            }
            path.parent()
        };
        // The folders stay, even when empty: a put may be about to rename into them.
        removed.map_or(Ok(()), |folder| sync_folder(folder).map_err(NodeError::io("sync the folder", folder)))?;
        Ok(true)
    }

    /// Every blob in order of id, one folder's worth at a time.
    pub fn folders(&self) -> Result<Folders> {
        Folders::of(&self.root.join(BLOBS), self.features)
    }

    /// Makes the folders above a blob such that they survive a power cut.
    fn make_folders(&self, path: &Path) -> io::Result<()> {
        let Some(folder) = path.parent() else { return Ok(()) };
        if !self.durable.lock().contains(folder) {
            fs::create_dir_all(folder)?;
            // Synced even if they were there: another put may have made them a moment ago and not have come to this line.
            for above in folder.ancestors().skip(1) {
                sync_folder(above)?;
                if above == self.root {
                    break;
                }
            }
            self.durable.lock().insert(folder.to_owned());
        }
        Ok(())
    }
}

/// Makes the names in a folder survive a power cut.
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Removes the files of puts that will never end. A put that runs, here or in another store on the folder, holds a lock on its
/// file; a process that dies lets go of it.
fn remove_leftovers(incoming: &Path) -> io::Result<usize> {
    let mut removed = 0;
    for entry in fs::read_dir(incoming)? {
        let path = entry?.path();
        let file = match File::open(&path) {
            Ok(file) if file.metadata()?.is_file() => file,
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        match file.try_lock() {
            Ok(()) => fs::remove_file(&path)?,
            Err(TryLockError::WouldBlock) => continue,
            Err(TryLockError::Error(error)) => return Err(error),
        }
        removed += 1;
    }
    Ok(removed)
}

/// Runs work that blocks on a thread that may.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(stopped) if stopped.is_panic() => std::panic::resume_unwind(stopped.into_panic()),
        Err(_) => Err(NodeError::Ended),
    }
}

#[cfg(test)]
mod tests;
