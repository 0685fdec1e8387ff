//! A blob into a file, such that an interruption costs only what was on its way.

use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::Code;
use fabstir_plugin_api::storage::{Range, Storage};
use tempfile::NamedTempFile;
use tokio::task::block_in_place;

use super::{Failure, bytes_of, of_file, of_storage};
use crate::sealed::{self, Key};

/// What has been fetched.
pub(super) struct Fetched {
    /// The size of the file that is there now.
    pub size: u64,
    /// How many bytes of the blob were there from an earlier try.
    pub resumed_at: u64,
}

/// Fetches a blob into `output`, by way of a file beside it that keeps what has come.
pub(super) async fn to_file(storage: &Arc<dyn Storage>, id: &str, output: &Path, key: Option<&Key>) -> Result<Fetched, Failure> {
    let mut part = Part::open(output)?;
    let mut from = part.size;
    let mut bytes = loop {
        match storage.get(&Cx::new(), id.to_owned(), Range { offset: from, length: None }).await {
            Ok(bytes) => break bytes,
            // What lies there is longer than the blob: it was another one's.
            Err(error) if error.code == Code::InvalidArgument && from > 0 => {
                part.clear()?;
                from = 0;
            }
            Err(error) => return Err(part.kept(of_storage(error))),
        }
    };
    while let Some(piece) = bytes.next().await {
        match piece {
            Ok(piece) => block_in_place(|| part.append(&piece))?,
            Err(error) => return Err(part.kept(of_storage(error))),
        }
    }
    if part.hasher.finalize().to_hex().as_str() != id {
        block_in_place(|| part.clear())?;
        let why = match from {
            0 => "the bytes that came have another hash".to_owned(),
            _ => format!("what {} held was not of this blob: it is empty now, so try again", part.path.display()),
        };
        return Err(Failure::new(Failure::FAILED, "corrupt", why));
    }
    let size = match key {
        None => block_in_place(|| part.become_file(output)),
        Some(key) => open(part, output, key).await,
    };
    Ok(Fetched { size: size?, resumed_at: from })
}

/// What has come of a blob so far.
struct Part {
    path: PathBuf,
    file: File,
    size: u64,
    /// Of the bytes that are there.
    hasher: blake3::Hasher,
}

impl Part {
    fn open(output: &Path) -> Result<Self, Failure> {
        let mut name = output.file_name().ok_or_else(|| of_file("write", output, io::ErrorKind::IsADirectory.into()))?.to_owned();
        name.push(".part");
        let path = output.with_file_name(name);
        let failed = |error| of_file("write", &path, error);
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let message = format!("another command is writing {}: wait for it, or name another file", path.display());
                return Err(Failure::new(Failure::FAILED, "busy", message));
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let mut hasher = blake3::Hasher::new();
        block_in_place(|| hasher.update_reader(&mut file).map(|_| ())).map_err(failed)?;
        let size = hasher.count();
        Ok(Self { path, file, size, hasher })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all(bytes).map_err(|error| of_file("write", &self.path, error))?;
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }

    fn clear(&mut self) -> Result<(), Failure> {
        let cleared = self.file.set_len(0).and_then(|()| self.file.rewind());
        cleared.map_err(|error| of_file("write", &self.path, error))?;
        (self.size, self.hasher) = (0, blake3::Hasher::new());
        Ok(())
    }

    /// Adds to a failure what is left to go on from.
    fn kept(self, failure: Failure) -> Failure {
        if self.size == 0 {
            // An empty file is of no use to anybody; that it stays would harm nobody either.
            let _ = std::fs::remove_file(&self.path);
            return failure;
        }
        let (code, text) = (failure.json["error"]["code"].as_str().unwrap_or("plugin").to_owned(), failure.text().to_owned());
        let message = format!("{text}\n{} bytes are in {}: the same command goes on from there", self.size, self.path.display());
        Failure::new(failure.exit, &code, message)
    }

    fn become_file(self, output: &Path) -> Result<u64, Failure> {
        let placed = self.file.sync_all().and_then(|()| std::fs::rename(&self.path, output)).and_then(|()| sync_folder(output));
        placed.map_err(|error| of_file("write", output, error))?;
        Ok(self.size)
    }
}

/// Decrypts what has come into `output`.
async fn open(mut part: Part, output: &Path, key: &Key) -> Result<u64, Failure> {
    let failed = |error| of_file("write", output, error);
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = NamedTempFile::new_in(folder).map_err(failed)?;
    part.file.seek(SeekFrom::Start(0)).map_err(failed)?;
    let sealed = part.file.try_clone().map_err(failed)?;
    let mut plain = sealed::open(bytes_of(sealed), key);
    let mut size = 0;
    while let Some(piece) = plain.next().await {
        let piece = piece.map_err(of_storage)?;
        size += piece.len() as u64;
        block_in_place(|| file.write_all(&piece)).map_err(failed)?;
    }
    block_in_place(|| file.as_file().sync_all()).map_err(failed)?;
    file.persist(output).map_err(|refused| failed(refused.error))?;
    std::fs::remove_file(&part.path).and_then(|()| sync_folder(output)).map_err(failed)?;
    Ok(size)
}

/// Makes a new name survive a power cut.
fn sync_folder(file: &Path) -> io::Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}
