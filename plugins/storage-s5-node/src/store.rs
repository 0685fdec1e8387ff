//! Blobs in a folder, in the layout of S5's local store: `blob3/` and the hash in base32, cut into three levels of folders.
//!
//! A blob is written under another name, forced to the disk and then renamed, so under its own name a file is whole or absent, also after
//! a power cut. S5's own way to write neither forces to the disk nor renames what comes as a stream; what it reads is the same.

mod incoming;
mod reading;
mod space;
mod taking;
mod verdicts;

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
pub use reading::{Folders, Opened, Reader, is_whole};
pub use taking::Taking;
pub use verdicts::Stamp;

use space::Space;
use verdicts::Verdicts;

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
    space: Mutex<Space>,
    verdicts: Verdicts,
}

impl Store {
    /// Opens a folder, makes it if it is missing, and removes what a crash left of unfinished puts.
    pub fn open(root: &Path, max: Option<u64>) -> Result<Arc<Self>> {
        for name in [INCOMING, BLOBS] {
            let folder = root.join(name);
            fs::create_dir_all(&folder).map_err(NodeError::io("make the folder", &folder))?;
        }
        sync_folder(root).map_err(NodeError::io("sync the folder", root))?;
        if let Some(above) = root.parent() {
            match sync_folder(above) {
                // Then it was not made here.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                synced => synced.map_err(NodeError::io("sync the folder", above))?,
            }
        }
        let incoming = root.join(INCOMING);
        let removed = remove_leftovers(&incoming).map_err(NodeError::io("clear", &incoming))?;
        if removed > 0 {
            info!(removed, "Removed unfinished puts that a crash had left.");
        }
        let features = LocalStore::new(root).features();
        let store = Self { root: root.to_owned(), features, max, space: Mutex::default(), verdicts: Verdicts::default() };
        if max.is_some() {
            let mut stored = 0;
            let mut folders = store.folders()?;
            while let Some(blobs) = folders.next_blobs()? {
                stored += blobs.iter().map(|blob| blob.size).sum::<u64>();
            }
            store.space.lock().stored = stored;
        }
        Ok(Arc::new(store))
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
            let mut space = self.space.lock();
            match fs::metadata(&path).and_then(|found| fs::remove_file(&path).map(|()| found.len())) {
                Ok(size) => space.stored = space.stored.saturating_sub(size),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(NodeError::io("remove", &path)(error)),
            }
            path.parent()
        };
        if let Some(folder) = removed {
            match sync_folder(folder) {
                // Another delete has found it empty.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                synced => synced.map_err(NodeError::io("sync the folder", folder))?,
            }
            self.remove_empty(folder);
        }
        Ok(true)
    }

    /// Every blob in order of id, one folder's worth at a time.
    pub fn folders(&self) -> Result<Folders> {
        Folders::of(&self.root.join(BLOBS), self.features)
    }

    /// Whether a file has the bytes of a blob, where that is known without reading it again.
    pub fn verdict(&self, id: Id, stamp: Stamp) -> Option<bool> {
        self.verdicts.get(id, stamp)
    }

    pub fn remember(&self, id: Id, stamp: Stamp, sound: bool) {
        self.verdicts.set(id, stamp, sound);
    }

    /// Makes the name of a blob survive a power cut, with the folders above it, unless a delete removes them again.
    fn sync_name(&self, path: &Path) -> io::Result<()> {
        for above in path.ancestors().skip(1) {
            match sync_folder(above) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                synced => synced?,
            }
            if above == self.root {
                break;
            }
        }
        Ok(())
    }

    /// Removes folders that have become empty: nearly every blob has some of its own.
    fn remove_empty(&self, folder: &Path) {
        let top = self.root.join(BLOBS);
        for folder in folder.ancestors().take_while(|folder| **folder != top) {
            if fs::remove_dir(folder).is_err() {
                return;
            }
        }
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
