//! How a blob comes in: hashed while it is written, under a name of its own, renamed once it is whole and on the disk.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use tempfile::{Builder, NamedTempFile};
use tracing::warn;

use super::{Found, INCOMING, Id, Result, Store, sync_folder};
use crate::error::{Needed, StoreError};

/// A put that has begun. Dropping it removes what was written.
#[derive(Debug)]
pub struct Incoming {
    file: NamedTempFile,
    hasher: blake3::Hasher,
    size: u64,
    expect: Option<Id>,
    expected_size: Option<u64>,
    reserved: Reserved,
}

/// Room taken from the quota by a put that has not ended.
#[derive(Debug)]
struct Reserved {
    store: Arc<Store>,
    bytes: u64,
}

impl Incoming {
    pub(super) fn new(store: Arc<Store>, expect: Option<Id>, expected_size: Option<u64>) -> Result<Self> {
        let folder = store.root.join(INCOMING);
        let file = create(&folder).map_err(|error| match is_full(&error) {
            true => store.disk_full(expected_size.map_or(Needed::AtLeast(0), Needed::Exactly)),
            false => StoreError::io("write in", &folder)(error),
        })?;
        let reserved = Reserved { store, bytes: 0 };
        Ok(Self { file, hasher: blake3::Hasher::new(), size: 0, expect, expected_size, reserved })
    }

    /// Takes more of the bytes.
    pub fn write(&mut self, piece: &[u8]) -> Result<()> {
        let size = self.size + piece.len() as u64;
        if let Some(expected) = self.expected_size
            && size > expected
        {
            return Err(StoreError::TooMany { expected, actual: size });
        }
        let needed = self.expected_size.map_or(Needed::AtLeast(size), Needed::Exactly);
        self.reserved.take(piece.len() as u64, needed)?;
        self.file.as_file_mut().write_all(piece).map_err(|error| self.failed(error, needed))?;
        self.hasher.update(piece);
        self.size = size;
        Ok(())
    }

    /// Ends the put: afterwards the blob is stored and survives a power cut. `still_wanted` is asked at the last moment.
    pub fn commit(self, still_wanted: impl FnOnce() -> bool) -> Result<Found> {
        let id = Id::from(self.hasher.finalize());
        if let Some(expected) = self.expected_size
            && self.size < expected
        {
            return Err(StoreError::TooFew { expected, actual: self.size });
        }
        if let Some(expected) = &self.expect
            && *expected != id
        {
            return Err(StoreError::WrongId { expected: expected.as_str().to_owned(), actual: id.as_str().to_owned() });
        }
        let store = self.reserved.store.clone();
        let path = store.path(&id);
        if !holds(&id, &path, self.size)? {
            let needed = Needed::Exactly(self.size);
            self.file.as_file().sync_all().map_err(|error| self.failed(error, needed))?;
            store.make_shard(&id).map_err(|error| self.failed(error, needed))?;
            if !still_wanted() {
                return Err(StoreError::Cancelled);
            }
            return self.adopt(id, &path);
        }
        // The put that stored it may not have come this far yet.
        sync_folder(&store.shard_folder(&id))?;
        Ok(Found { id, size: self.size })
    }

    /// Gives the file its place and its name.
    fn adopt(self, id: Id, path: &Path) -> Result<Found> {
        let Self { file, size, mut reserved, .. } = self;
        let store = reserved.store.clone();
        let rename = |file: NamedTempFile| match file.persist(path) {
            Ok(_) => Ok(()),
            Err(refused) if is_full(&refused.error) => Err(store.disk_full(Needed::Exactly(size))),
            Err(refused) => Err(StoreError::io("rename a finished put to", path)(refused.error)),
        };
        match &store.quota {
            None => rename(file)?,
            Some(quota) => {
                let mut used = quota.used.lock();
                // What the rename replaces: a damaged blob, or one that another put stored a moment ago.
                let replaced = fs::metadata(path).map_or(0, |file| file.len());
                rename(file)?;
                used.stored = (used.stored + size).saturating_sub(replaced);
                // Under the same lock, so that nobody counts these bytes twice.
                used.incoming -= std::mem::take(&mut reserved.bytes);
            }
        }
        sync_folder(&store.shard_folder(&id))?;
        Ok(Found { id, size })
    }

    fn failed(&self, error: io::Error, needed: Needed) -> StoreError {
        let store = &self.reserved.store;
        if is_full(&error) { store.disk_full(needed) } else { StoreError::io("write in", &store.root)(error) }
    }
}

impl Reserved {
    fn take(&mut self, bytes: u64, needed: Needed) -> Result<()> {
        if let Some(quota) = &self.store.quota {
            let mut used = quota.used.lock();
            let total = used.stored + used.incoming;
            if total + bytes > quota.max_bytes {
                let used = total - self.bytes;
                return Err(StoreError::QuotaFull { needed, used, max_bytes: quota.max_bytes });
            }
            used.incoming += bytes;
            self.bytes += bytes;
        }
        Ok(())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(quota) = &self.store.quota {
            quota.used.lock().incoming -= self.bytes;
        }
    }
}

/// A new file that stores opened on this folder will not take for a leftover.
fn create(folder: &Path) -> io::Result<NamedTempFile> {
    loop {
        let file = Builder::new().prefix("put-").tempfile_in(folder)?;
        match file.as_file().try_lock() {
            Ok(()) if file.as_file().metadata()?.nlink() > 0 => return Ok(file),
            // A store that opened between the two lines took it for a leftover.
            Ok(()) | Err(TryLockError::WouldBlock) => continue,
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// Whether a blob is there and whole. A damaged one counts as absent, so that the put repairs it.
fn holds(id: &Id, path: &Path, size: u64) -> Result<bool> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(StoreError::io("read", path)(error)),
    };
    let mut hasher = blake3::Hasher::new();
    let whole = file.metadata().is_ok_and(|file| file.len() == size)
        && hasher.update_reader(&mut file).is_ok()
        && Id::from(hasher.finalize()) == *id;
    if !whole {
        warn!(id = id.as_str(), "Stored blob is damaged: the bytes that came in replace it.");
    }
    Ok(whole)
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
