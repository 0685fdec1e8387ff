//! Files that their owner alone may read.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

use zeroize::Zeroizing;

/// Why a file was not read.
#[derive(Debug)]
pub(super) enum Unread {
    /// Others have had the opportunity to read it.
    Exposed {
        mode: u32,
    },
    NotAFile,
    TooLong,
    Io(io::Error),
}

impl From<io::Error> for Unread {
    fn from(error: io::Error) -> Self {
        Unread::Io(error)
    }
}

/// The whole file, if it has no more than `most` bytes and nobody but its owner may read or write it.
pub(super) fn read(path: &Path, most: usize) -> Result<Zeroizing<Vec<u8>>, Unread> {
    // Looked at before it is opened, because opening a pipe would wait for somebody to write to it.
    if !fs::metadata(path)?.is_file() {
        return Err(Unread::NotAFile);
    }
    let file = File::open(path)?;
    let mode = file.metadata()?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Unread::Exposed { mode });
    }
    read_from(file, most)
}

/// All of `source`, if it has no more than `most` bytes.
pub(super) fn read_from(mut source: impl Read, most: usize) -> Result<Zeroizing<Vec<u8>>, Unread> {
    // One byte more than may be there, so that a longer file shows; and never more than this, so that no copy is left behind by a
    // buffer that has grown.
    let mut bytes = Zeroizing::new(vec![0; most + 1]);
    let mut len = 0;
    while len < bytes.len() {
        match source.read(&mut bytes[len..]) {
            Ok(0) => break,
            Ok(got) => len += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    if len > most {
        return Err(Unread::TooLong);
    }
    bytes.truncate(len);
    Ok(bytes)
}

/// Writes a file that was not there, with mode 0600, in `folder`, which is made with mode 0700. The file appears whole or not at all.
///
/// # Errors
/// `AlreadyExists`, and what is there stays as it is.
pub(super) fn create(folder: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let mut file = tempfile::Builder::new().permissions(Permissions::from_mode(0o600)).tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist_noclobber(path).map_err(|error| error.error)?;
    // Or the name could be gone after a power failure, and with it the key.
    File::open(folder)?.sync_all()
}
