//! The folder itself: layout, room, and the operations that touch no bytes of a blob.

mod read;
mod write;

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::info;

use crate::error::{Needed, StoreError};

pub use read::{Reader, Shards};
pub use write::Incoming;

pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Bytes that one read or one piece of a stream may have.
pub const PIECE: usize = 1 << 20;

/// Where unfinished puts live. Not two hexadecimal digits, so never a shard; in the same folder, so that a rename is atomic.
const INCOMING: &str = "incoming";

/// A blob's content id. Holding one proves that it has the form, so no path made of it leads out of the folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id(String);

impl Id {
    pub fn parse(text: &str) -> Result<Self> {
        let well_formed = text.len() == 64 && text.bytes().all(is_digit);
        if well_formed { Ok(Self(text.to_owned())) } else { Err(StoreError::InvalidId) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The two folders that the blob lies in.
    fn shard(&self) -> (&str, &str) {
        (&self.0[..2], &self.0[2..4])
    }
}

impl From<blake3::Hash> for Id {
    fn from(hash: blake3::Hash) -> Self {
        Self(hash.to_hex().as_str().to_owned())
    }
}

fn is_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

/// A blob that is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub id: Id,
    pub size: u64,
}

/// Blobs in a folder.
///
/// Every method blocks on the disk and may be called from many threads. Two stores may share a folder, as they do while one version
/// of the plugin takes over from another; each then counts only its own changes towards `max_bytes`.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    quota: Option<Quota>,
    /// Shards whose folders are known to survive a power cut.
    durable: Mutex<HashSet<String>>,
}

#[derive(Debug)]
struct Quota {
    max_bytes: u64,
    used: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    stored: u64,
    /// Written by puts that have not ended.
    incoming: u64,
}

impl Store {
    /// Opens a folder, makes it if it is missing, and removes what a crash left of unfinished puts.
    pub fn open(root: &Path, max_bytes: Option<u64>) -> Result<Self> {
        let incoming = root.join(INCOMING);
        fs::create_dir_all(&incoming).map_err(StoreError::io("make the folder", &incoming))?;
        let removed = remove_leftovers(&incoming).map_err(StoreError::io("clear", &incoming))?;
        if removed > 0 {
            info!(removed, "Removed unfinished puts that a crash had left.");
        }
        let mut store = Self { root: root.to_owned(), quota: None, durable: Mutex::default() };
        if let Some(max_bytes) = max_bytes {
            let mut stored = 0;
            let mut shards = store.shards()?;
            while let Some(blobs) = shards.next_shard()? {
                stored += blobs.iter().map(|blob| blob.size).sum::<u64>();
            }
            store.quota = Some(Quota { max_bytes, used: Mutex::new(Used { stored, incoming: 0 }) });
        }
        Ok(store)
    }

    /// Begins a put. `expect` and `size` are what the caller says about the bytes to come.
    pub fn begin(self: &Arc<Self>, expect: Option<Id>, size: Option<u64>) -> Result<Incoming> {
        if let Some(size) = size {
            self.check_room(size)?;
        }
        Incoming::new(self.clone(), expect, size)
    }

    /// A blob's size.
    pub fn size(&self, id: &Id) -> Result<u64> {
        let path = self.path(id);
        match fs::metadata(&path) {
            Ok(found) => Ok(found.len()),
            Err(error) => Err(missing_or("read", id, &path, error)),
        }
    }

    /// Begins a read of `length` bytes from `offset`, or of all that follow.
    pub fn read(&self, id: &Id, offset: u64, length: Option<u64>) -> Result<Reader> {
        Reader::open(id, &self.path(id), offset, length)
    }

    /// Removes a blob and says whether it was there. Reads of it that have begun go on.
    pub fn delete(&self, id: &Id) -> Result<bool> {
        let path = self.path(id);
        let remove = || match fs::metadata(&path).and_then(|found| fs::remove_file(&path).map(|()| found.len())) {
            Ok(size) => Ok(Some(size)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::io("remove", &path)(error)),
        };
        let removed = match &self.quota {
            None => remove()?,
            Some(quota) => {
                let mut used = quota.used.lock();
                let removed = remove()?;
                used.stored = used.stored.saturating_sub(removed.unwrap_or(0));
                removed
            }
        };
        // The folders stay, even when empty: a put may be about to rename into them.
        if removed.is_some() {
            sync_folder(&self.shard_folder(id))?;
        }
        Ok(removed.is_some())
    }

    /// Every blob in order of id, one folder's worth at a time.
    pub fn shards(&self) -> Result<Shards> {
        Shards::of(&self.root)
    }

    fn shard_folder(&self, id: &Id) -> PathBuf {
        let (first, second) = id.shard();
        self.root.join(first).join(second)
    }

    fn path(&self, id: &Id) -> PathBuf {
        self.shard_folder(id).join(id.as_str())
    }

    /// Makes the folders of a blob's shard such that they survive a power cut.
    fn make_shard(&self, id: &Id) -> io::Result<PathBuf> {
        let folder = self.shard_folder(id);
        let shard = id.as_str()[..4].to_owned();
        if !self.durable.lock().contains(&shard) {
            fs::create_dir_all(&folder)?;
            // Synced even if they were there: another put may have made them a moment ago and not have come to this line.
            File::open(self.root.join(id.shard().0))?.sync_all()?;
            File::open(&self.root)?.sync_all()?;
            self.durable.lock().insert(shard);
        }
        Ok(folder)
    }

    /// Refuses a blob of a known size before anything is written.
    fn check_room(&self, size: u64) -> Result<()> {
        if let Some(quota) = &self.quota {
            let used = quota.used.lock();
            let used = used.stored + used.incoming;
            if used.saturating_add(size) > quota.max_bytes {
                return Err(StoreError::QuotaFull { needed: Needed::Exactly(size), used, max_bytes: quota.max_bytes });
            }
        }
        match free(&self.root) {
            Some(free) if free < size => Err(self.disk_full(Needed::Exactly(size))),
            _ => Ok(()),
        }
    }

    fn disk_full(&self, needed: Needed) -> StoreError {
        StoreError::DiskFull { needed, free: free(&self.root), dir: self.root.clone() }
    }
}

/// Bytes that the disk of a folder has free for us; `None` where it does not tell.
pub fn free(folder: &Path) -> Option<u64> {
    let path = CString::new(folder.as_os_str().as_bytes()).ok()?;
    let mut disk = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends with NUL, and `statvfs` fills the structure before it returns 0.
    let disk = unsafe {
        if libc::statvfs(path.as_ptr(), disk.as_mut_ptr()) != 0 {
            return None;
        }
        disk.assume_init()
    };
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Removes the files of puts that will never end. A put that runs, here or in another store on the folder, holds a lock on its
/// file; a process that dies lets go of it.
fn remove_leftovers(incoming: &Path) -> io::Result<usize> {
    let mut removed = 0;
    for entry in fs::read_dir(incoming)? {
        let path = entry?.path();
        let file = match File::open(&path) {
            Ok(file) => file,
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

/// Makes the names in a folder survive a power cut.
fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(StoreError::io("sync the folder", folder))
}

fn missing_or(doing: &'static str, id: &Id, path: &Path, error: io::Error) -> StoreError {
    match error.kind() {
        io::ErrorKind::NotFound => StoreError::NotFound(id.as_str().to_owned()),
        _ => StoreError::io(doing, path)(error),
    }
}

#[cfg(test)]
mod tests;
