//! The folder itself: room, and the operations that touch no bytes of a blob.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::info;

use crate::disk::{is_full, make_folder, sync_folder};
use crate::space::Space;
use crate::verdicts::Verdicts;
use crate::{BlobError, Folders, Id, Layout, Result, Stamp};

/// Blobs in a folder.
///
/// Every method blocks on the disk and may be called from many threads. Two stores may share a folder, as they do while one version
/// of the plugin takes over from another; each then counts only its own changes towards the most bytes.
#[derive(Debug)]
pub struct Store {
    pub(crate) root: PathBuf,
    pub(crate) layout: Arc<dyn Layout>,
    pub(crate) space: Arc<Space>,
    verdicts: Verdicts,
}

impl Store {
    /// Opens a folder, makes it if it is missing, and removes what a crash left of unfinished puts. `max` is the most bytes that all blobs
    /// together may take, those on their way included.
    ///
    /// # Errors
    /// [`BlobError::Io`].
    pub fn open(root: &Path, layout: impl Layout, max: Option<u64>) -> Result<Arc<Self>> {
        let incoming = root.join(layout.incoming());
        for folder in [&incoming, &root.join(layout.blobs())] {
            make_folder(folder).map_err(BlobError::io("make the folder", folder))?;
        }
        let removed = remove_leftovers(&incoming).map_err(BlobError::io("clear", &incoming))?;
        if removed > 0 {
            info!(removed, "Removed unfinished puts that a crash had left.");
        }
        let store = Self {
            root: root.to_owned(),
            layout: Arc::new(layout),
            space: Space::new(root.to_owned(), max),
            verdicts: Verdicts::default(),
        };
        if store.space.is_counted() {
            let mut stored = 0;
            let mut folders = store.folders();
            while let Some(blobs) = folders.next_blobs()? {
                stored += blobs.iter().map(|blob| blob.size).sum::<u64>();
            }
            store.space.taken().stored = stored;
        }
        Ok(Arc::new(store))
    }

    /// The file of a blob, whether it is there or not.
    pub fn path(&self, id: Id) -> PathBuf {
        self.root.join(self.layout.path(id))
    }

    /// A blob's size in bytes.
    ///
    /// # Errors
    /// [`BlobError::NotFound`], [`BlobError::Io`].
    pub fn size(&self, id: Id) -> Result<u64> {
        let path = self.path(id);
        match fs::metadata(&path) {
            Ok(found) => Ok(found.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(BlobError::NotFound(id)),
            Err(error) => Err(BlobError::io("read", &path)(error)),
        }
    }

    /// Removes a blob and says whether it was there. Reads of it that have begun go on.
    ///
    /// # Errors
    /// [`BlobError::Io`].
    pub fn delete(&self, id: Id) -> Result<bool> {
        let path = self.path(id);
        {
            // Where nothing is counted, a large file holds up nobody.
            let taken = self.space.is_counted().then(|| self.space.taken());
            match fs::metadata(&path).and_then(|found| fs::remove_file(&path).map(|()| found.len())) {
                Ok(size) => {
                    if let Some(mut taken) = taken {
                        taken.stored = taken.stored.saturating_sub(size);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(BlobError::io("remove", &path)(error)),
            }
        }
        for folder in path.ancestors().skip(1) {
            match sync_folder(folder) {
                // Another delete has found it empty, and may not have told the disk yet.
                Err(error) if error.kind() == io::ErrorKind::NotFound && folder != self.root => {}
                synced => {
                    synced.map_err(BlobError::io("sync the folder", folder))?;
                    self.remove_empty(folder);
                    break;
                }
            }
        }
        Ok(true)
    }

    /// Every blob in order of id, one folder's worth at a time.
    pub fn folders(&self) -> Folders {
        Folders::of(&self.root, self.layout.clone())
    }

    /// Whether a file has the bytes of a blob, where that is known without reading it again.
    pub fn verdict(&self, id: Id, stamp: Stamp) -> Option<bool> {
        self.verdicts.get(id, stamp)
    }

    /// Remembers whether a file has the bytes of a blob.
    pub fn remember(&self, id: Id, stamp: Stamp, sound: bool) {
        self.verdicts.set(id, stamp, sound);
    }

    /// Makes the name of a blob survive a power cut, with the folders above it, unless a delete removes them again.
    pub(crate) fn sync_name(&self, path: &Path) -> io::Result<()> {
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

    /// What went wrong with a blob that needs so many bytes.
    pub(crate) fn failed(&self, needed: u64, error: io::Error) -> BlobError {
        if is_full(&error) { self.space.full(needed).into() } else { BlobError::io("write in", &self.root)(error) }
    }

    /// Removes folders that have become empty: there may be nearly as many as blobs.
    fn remove_empty(&self, folder: &Path) {
        let top = self.root.join(self.layout.blobs());
        for folder in folder.ancestors().take_while(|folder| **folder != top) {
            if fs::remove_dir(folder).is_err() {
                return;
            }
        }
    }
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
            Ok(()) => match fs::remove_file(&path) {
                // It has come to its end, or another store has removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                gone => gone?,
            },
            Err(TryLockError::WouldBlock) => continue,
            Err(TryLockError::Error(error)) => return Err(error),
        }
        removed += 1;
    }
    Ok(removed)
}
