//! How a blob comes in: hashed while it is written, under a name of its own, renamed once it is whole and on the disk.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use tempfile::{Builder, NamedTempFile};
use tracing::warn;

use crate::space::Room;
use crate::{BlobError, Found, Id, Reader, Result, Stamp, Store, is_whole};

/// How often folders are made anew that a delete removes at the same moment.
const TRIES: usize = 20;

/// A blob that is being written. Dropping it removes what was written.
#[derive(Debug)]
pub struct Incoming {
    store: Arc<Store>,
    file: NamedTempFile,
    hasher: blake3::Hasher,
    size: u64,
    expect: Option<Id>,
    expected_size: Option<u64>,
    room: Room,
}

/// A blob that has come whole, and is not kept yet. Dropping it removes it.
#[derive(Debug)]
pub struct Whole {
    /// Which blob.
    pub id: Id,
    /// Its size in bytes.
    pub size: u64,
    file: NamedTempFile,
    room: Room,
}

impl Store {
    /// Begins to take a blob. `expect` and `size` are what is said about the bytes to come.
    ///
    /// # Errors
    /// [`BlobError::DiskFull`] and [`BlobError::QuotaFull`], also later; [`BlobError::Io`].
    pub fn begin(self: &Arc<Self>, expect: Option<Id>, size: Option<u64>) -> Result<Incoming> {
        let mut room = Room::new(&self.space);
        room.reach(size.unwrap_or(0))?;
        let folder = self.root.join(self.layout.incoming());
        let file = create(&folder).map_err(|error| self.failed(size.unwrap_or(0), error))?;
        let store = self.clone();
        Ok(Incoming { store, file, hasher: blake3::Hasher::new(), size: 0, expect, expected_size: size, room })
    }

    /// Keeps a blob: afterwards it survives a power cut. `still_wanted` is asked at the last moment.
    ///
    /// # Errors
    /// [`BlobError::Cancelled`] where it is not, [`BlobError::DiskFull`], [`BlobError::Io`].
    pub fn keep(self: &Arc<Self>, whole: Whole, still_wanted: impl FnOnce() -> bool) -> Result<Found> {
        let Whole { id, size, file, room } = whole;
        let path = self.path(id);
        let failed = |error| self.failed(size, error);
        // A damaged one counts as absent, so that the put repairs it.
        if is_whole(&path, id).is_ok_and(|whole| whole) {
            // The put that stored it may not have come this far yet, or it was another program's, which forces nothing to the disk.
            self.sync_found(&path).map_err(failed)?;
        } else {
            if path.exists() {
                warn!(blob = %id, "A stored blob is damaged: the bytes that came in replace it.");
            }
            file.as_file().sync_all().map_err(failed)?;
            if !still_wanted() {
                return Err(BlobError::Cancelled);
            }
            self.persist(file, &path, room).map_err(failed)?;
        }
        if let Ok(file) = fs::metadata(&path) {
            self.remember(id, Stamp::of(&file), true);
        }
        Ok(Found { id, size })
    }

    fn persist(&self, mut file: NamedTempFile, path: &Path, room: Room) -> io::Result<()> {
        for _ in 0..TRIES {
            match path.parent().map_or(Ok(()), fs::create_dir_all) {
                // A delete has found one of them empty.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => continue,
                made => made?,
            }
            let mut taken = self.space.taken();
            // What the rename replaces: a damaged blob, or one that another put stored a moment ago.
            let replaced = fs::metadata(path).map_or(0, |file| file.len());
            match file.persist(path) {
                Ok(_) => {
                    room.keep(&mut taken, replaced);
                    drop(taken);
                    return self.sync_name(path);
                }
                Err(refused) if refused.error.kind() == io::ErrorKind::NotFound => file = refused.file,
                Err(refused) => return Err(refused.error),
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// Makes a blob survive a power cut that was found there.
    fn sync_found(&self, path: &Path) -> io::Result<()> {
        match File::open(path).and_then(|file| file.sync_all()) {
            // It was deleted a moment later.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => self.sync_name(path),
        }
    }
}

impl Incoming {
    /// Takes more of the bytes.
    ///
    /// # Errors
    /// [`BlobError::TooMany`], [`BlobError::DiskFull`], [`BlobError::QuotaFull`], [`BlobError::Io`].
    pub fn write(&mut self, piece: &[u8]) -> Result<()> {
        let size = self.size + piece.len() as u64;
        if let Some(expected) = self.expected_size.filter(|&expected| size > expected) {
            return Err(BlobError::TooMany { expected, actual: size });
        }
        self.room.reach(size)?;
        self.file.as_file_mut().write_all(piece).map_err(|error| self.store.failed(size, error))?;
        self.room.wrote(piece.len() as u64);
        self.hasher.update(piece);
        self.size = size;
        Ok(())
    }

    /// Ends it, if it is what was expected.
    ///
    /// # Errors
    /// [`BlobError::TooFew`], [`BlobError::WrongId`].
    pub fn finish(self) -> Result<Whole> {
        let Self { file, hasher, size, expect, expected_size, room, .. } = self;
        let id = Id::from(hasher.finalize());
        if let Some(expected) = expected_size.filter(|&expected| size < expected) {
            return Err(BlobError::TooFew { expected, actual: size });
        }
        if let Some(expected) = expect.filter(|expected| *expected != id) {
            return Err(BlobError::WrongId { expected, actual: id });
        }
        Ok(Whole { id, size, file, room })
    }
}

impl Whole {
    /// Reads a blob that is not kept. It is gone when the reader is.
    ///
    /// # Errors
    /// [`BlobError::PastTheEnd`], [`BlobError::Io`].
    pub fn read(self, offset: u64, length: Option<u64>) -> Result<Reader> {
        let path = self.file.path().to_owned();
        let file = self.file.reopen().map_err(BlobError::io("read", &path))?;
        Reader::new(self.id, file, &path, offset, length).map(|reader| reader.holding(Box::new(self)))
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
