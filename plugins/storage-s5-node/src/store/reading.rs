//! How blobs go out: the bytes of one, piece by piece, and the ids of all, folder by folder.

use std::any::Any;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use s5_core::Hash;
use s5_core::blob::paths;
use s5_core::store::StoreFeatures;

use super::{BLOBS, Found, Id, PIECE, Result, Stamp, Store};
use crate::error::NodeError;

/// A read that has begun. The blob may be deleted meanwhile: the bytes still come.
pub struct Reader {
    file: File,
    path: PathBuf,
    id: Id,
    left: u64,
    /// Of what has been read, where the whole blob is read.
    hasher: Option<blake3::Hasher>,
    /// What must not go before the reader does.
    _held: Option<Box<dyn Any + Send>>,
}

/// The file of a blob.
#[derive(Debug)]
pub struct Opened {
    pub stamp: Stamp,
    pub size: u64,
    id: Id,
    file: File,
    path: PathBuf,
}

impl Opened {
    /// Begins a read of `length` bytes from `offset`, or of all that follow.
    pub fn read(self, offset: u64, length: Option<u64>) -> Result<Reader> {
        Reader::new(self.id, self.file, &self.path, offset, length)
    }
}

impl Store {
    /// Begins a read of `length` bytes from `offset`, or of all that follow.
    pub fn read(&self, id: Id, offset: u64, length: Option<u64>) -> Result<Reader> {
        self.open_file(id)?.ok_or(NodeError::NotKept(id))?.read(offset, length)
    }

    /// The file of a blob, if it is there.
    pub fn open_file(&self, id: Id) -> Result<Option<Opened>> {
        let path = self.path(id);
        let opened = File::open(&path).and_then(|file| file.metadata().map(|about| (file, about)));
        match opened {
            Ok((file, about)) => Ok(Some(Opened { stamp: Stamp::of(&about), size: about.len(), id, file, path })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(NodeError::io("read", &path)(error)),
        }
    }
}

impl Reader {
    pub(super) fn new(id: Id, mut file: File, path: &Path, offset: u64, length: Option<u64>) -> Result<Self> {
        let size = file.metadata().map_err(NodeError::io("read", path))?.len();
        if offset > size {
            return Err(NodeError::PastTheEnd { offset, size });
        }
        file.seek(SeekFrom::Start(offset)).map_err(NodeError::io("read", path))?;
        let left = (size - offset).min(length.unwrap_or(u64::MAX));
        // A read of no bytes says nothing of the blob, unless it has none.
        let hasher = (left == size).then(blake3::Hasher::new);
        Ok(Self { file, path: path.to_owned(), id, left, hasher, _held: None })
    }

    /// Does not hash what is known to be right.
    pub fn trusting(self) -> Self {
        Self { hasher: None, ..self }
    }

    pub(super) fn holding(self, held: Box<dyn Any + Send>) -> Self {
        Self { _held: Some(held), ..self }
    }

    /// The next bytes, at most [`PIECE`] of them; `None` at the end. The last piece of a whole read comes only if the bytes have the id.
    pub fn next_piece(&mut self) -> Result<Option<Vec<u8>>> {
        let want = self.left.min(PIECE as u64);
        let mut piece = Vec::with_capacity(want as usize);
        (&mut self.file).take(want).read_to_end(&mut piece).map_err(NodeError::io("read", &self.path))?;
        if (piece.len() as u64) < want {
            let early = self.left - piece.len() as u64;
            return Err(NodeError::Corrupt { id: self.id, found: format!("it ends {early} bytes early") });
        }
        self.left -= want;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&piece);
        }
        if self.left == 0
            && let Some(actual) = self.hasher.take().map(|hasher| Id(Hash::from(hasher.finalize())))
            && actual != self.id
        {
            return Err(NodeError::Corrupt { id: self.id, found: format!("its bytes are those of {actual}") });
        }
        Ok(Some(piece).filter(|piece| !piece.is_empty()))
    }
}

/// Whether a file has the bytes of a blob.
pub fn is_whole(path: &Path, id: Id) -> io::Result<bool> {
    let mut hasher = blake3::Hasher::new();
    match File::open(path).and_then(|file| hasher.update_reader(file).map(drop)) {
        Ok(()) => Ok(Hash::from(hasher.finalize()) == id.0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// All blobs in order of id: the digits of base32 are in the order of their characters. Holds the names of a few folders, never all blobs.
#[derive(Debug)]
pub struct Folders {
    features: StoreFeatures,
    /// Folders still to be entered, last one next, and what is written before a blob's name in each.
    left: Vec<(PathBuf, String)>,
}

impl Folders {
    pub(super) fn of(root: &Path, features: StoreFeatures) -> Result<Self> {
        Ok(Self { features, left: vec![(root.to_owned(), format!("{BLOBS}/"))] })
    }

    /// The blobs of the next folder that has any; `None` at the end. Files that are not named like a blob are somebody else's.
    pub fn next_blobs(&mut self) -> Result<Option<Vec<Found>>> {
        while let Some((folder, prefix)) = self.left.pop() {
            let failed = |error| NodeError::io("list", &folder)(error);
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            let (mut inner, mut blobs) = (Vec::new(), Vec::new());
            for entry in entries {
                let entry = entry.map_err(failed)?;
                let Ok(name) = entry.file_name().into_string() else { continue };
                if entry.file_type().map_err(failed)?.is_dir() {
                    inner.push((entry.path(), format!("{prefix}{name}/")));
                } else if let Ok(Some(hash)) = paths::hash_from_blob_path(&format!("{prefix}{name}"), &self.features)
                    && paths::blob_path_for_hash(hash, &self.features) == format!("{prefix}{name}")
                {
                    match entry.metadata() {
                        Ok(file) => blobs.push(Found { id: Id(hash), size: file.len() }),
                        Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                        Err(error) => return Err(failed(error)),
                    }
                }
            }
            inner.sort_unstable_by(|a, b| b.cmp(a));
            self.left.extend(inner);
            if !blobs.is_empty() {
                blobs.sort_unstable_by_key(|blob| *blob.id.0.as_bytes());
                return Ok(Some(blobs));
            }
        }
        Ok(None)
    }
}
