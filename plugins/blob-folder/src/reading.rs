//! How blobs go out: the bytes of one, piece by piece, and the ids of all, folder by folder.

use std::any::Any;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{BlobError, Found, Id, Layout, Result, Stamp, Store};

/// Bytes that one read or one piece of a stream may have.
pub const PIECE: usize = 1 << 20;

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
    /// What changes with it.
    pub stamp: Stamp,
    /// Its size in bytes.
    pub size: u64,
    id: Id,
    file: File,
    path: PathBuf,
}

impl Opened {
    /// Begins a read of `length` bytes from `offset`, or of all that follow.
    ///
    /// # Errors
    /// [`BlobError::PastTheEnd`], [`BlobError::Io`].
    pub fn read(self, offset: u64, length: Option<u64>) -> Result<Reader> {
        Reader::new(self.id, self.file, &self.path, offset, length)
    }
}

impl Store {
    /// Begins a read of `length` bytes from `offset`, or of all that follow.
    ///
    /// # Errors
    /// [`BlobError::NotFound`], [`BlobError::PastTheEnd`], [`BlobError::Io`].
    pub fn read(&self, id: Id, offset: u64, length: Option<u64>) -> Result<Reader> {
        self.open_file(id)?.ok_or(BlobError::NotFound(id))?.read(offset, length)
    }

    /// The file of a blob, if it is there.
    ///
    /// # Errors
    /// [`BlobError::Io`].
    pub fn open_file(&self, id: Id) -> Result<Option<Opened>> {
        let path = self.path(id);
        let opened = File::open(&path).and_then(|file| file.metadata().map(|about| (file, about)));
        match opened {
            Ok((file, about)) => Ok(Some(Opened { stamp: Stamp::of(&about), size: about.len(), id, file, path })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(BlobError::io("read", &path)(error)),
        }
    }
}

impl Reader {
    pub(crate) fn new(id: Id, mut file: File, path: &Path, offset: u64, length: Option<u64>) -> Result<Self> {
        let size = file.metadata().map_err(BlobError::io("read", path))?.len();
        if offset > size {
            return Err(BlobError::PastTheEnd { offset, size });
        }
        file.seek(SeekFrom::Start(offset)).map_err(BlobError::io("read", path))?;
        let left = (size - offset).min(length.unwrap_or(u64::MAX));
        // A read of no bytes says nothing of the blob, unless it has none.
        let hasher = (left == size).then(blake3::Hasher::new);
        Ok(Self { file, path: path.to_owned(), id, left, hasher, _held: None })
    }

    /// Does not hash what is known to be right.
    pub fn trusting(self) -> Self {
        Self { hasher: None, ..self }
    }

    pub(crate) fn holding(self, held: Box<dyn Any + Send>) -> Self {
        Self { _held: Some(held), ..self }
    }

    /// The next bytes, at most [`PIECE`] of them; `None` at the end. The last piece of a whole read comes only if the bytes have the id.
    ///
    /// # Errors
    /// [`BlobError::Corrupt`], [`BlobError::Io`].
    pub fn next_piece(&mut self) -> Result<Option<Vec<u8>>> {
        let want = self.left.min(PIECE as u64);
        let mut piece = Vec::with_capacity(want as usize);
        (&mut self.file).take(want).read_to_end(&mut piece).map_err(BlobError::io("read", &self.path))?;
        if (piece.len() as u64) < want {
            let early = self.left - piece.len() as u64;
            return Err(BlobError::Corrupt { id: self.id, found: format!("it ends {early} bytes early") });
        }
        self.left -= want;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&piece);
        }
        if self.left == 0
            && let Some(actual) = self.hasher.take().map(|hasher| Id::from(hasher.finalize()))
            && actual != self.id
        {
            return Err(BlobError::Corrupt { id: self.id, found: format!("its bytes are those of {actual}") });
        }
        Ok(Some(piece).filter(|piece| !piece.is_empty()))
    }
}

/// Whether a file has the bytes of a blob.
///
/// # Errors
/// What the operating system says.
pub fn is_whole(path: &Path, id: Id) -> io::Result<bool> {
    let mut hasher = blake3::Hasher::new();
    match File::open(path).and_then(|file| hasher.update_reader(file).map(drop)) {
        Ok(()) => Ok(Id::from(hasher.finalize()) == id),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// All blobs in order of id. Holds the names of a few folders, never all blobs.
#[derive(Debug)]
pub struct Folders {
    root: PathBuf,
    layout: Arc<dyn Layout>,
    /// Folders still to be entered, last one next.
    left: Vec<String>,
}

impl Folders {
    pub(crate) fn of(root: &Path, layout: Arc<dyn Layout>) -> Self {
        Self { root: root.to_owned(), left: vec![layout.blobs().to_owned()], layout }
    }

    /// The blobs of the next folder that has any; `None` at the end.
    ///
    /// # Errors
    /// [`BlobError::Io`].
    pub fn next_blobs(&mut self) -> Result<Option<Vec<Found>>> {
        while let Some(folder) = self.left.pop() {
            let path = self.root.join(&folder);
            let (mut inner, mut blobs) = (Vec::new(), Vec::new());
            self.look(&folder, &path, &mut inner, &mut blobs).map_err(BlobError::io("list", &path))?;
            inner.sort_unstable_by(|a, b| b.cmp(a));
            self.left.extend(inner);
            if !blobs.is_empty() {
                blobs.sort_unstable_by_key(|blob| blob.id);
                return Ok(Some(blobs));
            }
        }
        Ok(None)
    }

    /// What is in a folder. What goes meanwhile is not there.
    fn look(&self, folder: &str, path: &Path, inner: &mut Vec<String>, blobs: &mut Vec<Found>) -> io::Result<()> {
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            // One that is always there has not gone by itself.
            Err(error) if error.kind() == io::ErrorKind::NotFound && folder != self.layout.blobs() => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let name = if folder.is_empty() { name } else { format!("{folder}/{name}") };
            let (is_folder, id) = (self.layout.is_folder(&name), self.layout.blob(&name));
            if !is_folder && id.is_none() {
                continue;
            }
            match (fs::metadata(entry.path()), id) {
                (Ok(file), _) if file.is_dir() => inner.extend(is_folder.then_some(name)),
                (Ok(file), Some(id)) => blobs.push(Found { id, size: file.len() }),
                (Ok(_), None) => {}
                (Err(error), _) if error.kind() == io::ErrorKind::NotFound => {}
                (Err(error), _) => return Err(error),
            }
        }
        Ok(())
    }
}
