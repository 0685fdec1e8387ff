//! How blobs go out: the bytes of one, piece by piece, and the ids of all, folder by folder.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::{Found, Id, PIECE, Result, is_digit, missing_or};
use crate::error::StoreError;

/// A read that has begun. The blob may be deleted meanwhile: the bytes still come.
#[derive(Debug)]
pub struct Reader {
    file: File,
    path: PathBuf,
    id: Id,
    left: u64,
    /// Of what has been read, where the whole blob is read.
    hasher: Option<blake3::Hasher>,
}

impl Reader {
    pub(super) fn open(id: &Id, path: &Path, offset: u64, length: Option<u64>) -> Result<Self> {
        let mut file = File::open(path).map_err(|error| missing_or("read", id, path, error))?;
        let size = file.metadata().map_err(StoreError::io("read", path))?.len();
        if offset > size {
            return Err(StoreError::PastTheEnd { offset, size });
        }
        if offset > 0 {
            file.seek(SeekFrom::Start(offset)).map_err(StoreError::io("read", path))?;
        }
        let left = (size - offset).min(length.unwrap_or(u64::MAX));
        let hasher = (left == size).then(blake3::Hasher::new);
        Ok(Self { file, path: path.to_owned(), id: id.clone(), left, hasher })
    }

    /// The next bytes, at most [`PIECE`] of them; `None` at the end.
    ///
    /// # Errors
    /// `Corrupt` after the last piece of a whole read whose bytes do not have the id, and where the file ends too early.
    pub fn next_piece(&mut self) -> Result<Option<Vec<u8>>> {
        if self.left == 0 {
            return self.check().map(|()| None);
        }
        let want = self.left.min(PIECE as u64);
        let mut piece = Vec::with_capacity(want as usize);
        (&mut self.file).take(want).read_to_end(&mut piece).map_err(StoreError::io("read", &self.path))?;
        if (piece.len() as u64) < want {
            return Err(self.corrupt(format!("it ends {} bytes early", self.left - piece.len() as u64)));
        }
        self.left -= want;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&piece);
        }
        Ok(Some(piece))
    }

    fn check(&self) -> Result<()> {
        match self.hasher.as_ref().map(|hasher| Id::from(hasher.finalize())) {
            Some(actual) if actual != self.id => Err(self.corrupt(format!("its bytes are those of {}", actual.as_str()))),
            _ => Ok(()),
        }
    }

    fn corrupt(&self, found: String) -> StoreError {
        StoreError::Corrupt { id: self.id.as_str().to_owned(), found }
    }
}

/// All blobs in order of id. Holds the names of two levels of folders and of one folder's blobs, never all of them.
#[derive(Debug)]
pub struct Shards {
    /// Folders still to be entered, last one next.
    outer: Vec<PathBuf>,
    inner: Vec<PathBuf>,
}

impl Shards {
    pub(super) fn of(root: &Path) -> Result<Self> {
        Ok(Self { outer: folders(root)?, inner: Vec::new() })
    }

    /// The blobs of the next folder that has any; `None` at the end.
    pub fn next_shard(&mut self) -> Result<Option<Vec<Found>>> {
        loop {
            while let Some(folder) = self.inner.pop() {
                let blobs = blobs(&folder)?;
                if !blobs.is_empty() {
                    return Ok(Some(blobs));
                }
            }
            match self.outer.pop() {
                Some(folder) => self.inner = folders(&folder)?,
                None => return Ok(None),
            }
        }
    }
}

/// The folders in `parent` that are named by two hexadecimal digits, in descending order.
fn folders(parent: &Path) -> Result<Vec<PathBuf>> {
    let mut names = names(parent)?;
    names.retain(|name| name.len() == 2 && name.bytes().all(is_digit));
    names.sort_unstable_by(|a, b| b.cmp(a));
    Ok(names.into_iter().map(|name| parent.join(name)).collect())
}

/// The blobs in a folder in order of id. Files that are not named like a blob of this folder are somebody else's.
fn blobs(folder: &Path) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for name in names(folder)? {
        let Ok(id) = Id::parse(&name) else { continue };
        let (first, second) = id.shard();
        if !folder.ends_with(Path::new(first).join(second)) {
            continue;
        }
        match fs::metadata(folder.join(&name)) {
            Ok(file) => found.push(Found { size: file.len(), id }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(StoreError::io("read", &folder.join(&name))(error)),
        }
    }
    found.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    Ok(found)
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        // A file that is named like a folder of ours is somebody else's, too.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io("list", folder)(error)),
    };
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_string().ok()));
    let names: io::Result<Vec<Option<String>>> = names.collect();
    Ok(names.map_err(StoreError::io("list", folder))?.into_iter().flatten().collect())
}
