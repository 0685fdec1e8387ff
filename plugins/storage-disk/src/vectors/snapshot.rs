//! An index in a file, which spares making it anew at the next start.
//!
//! ```text
//! the index, as usearch writes it
//! 16 bytes   "fabstir-vectors", and 1 for this layout
//! 16 bytes   the version of usearch, filled up with zeros
//!  8 bytes   the namespace's number
//!  8 bytes   the number of the first change that is not in it
//!  8 bytes   how many numbers a vector has
//!  8 bytes   the length of the index
//! 32 bytes   BLAKE3 of all of the above
//! ```
//!
//! Numbers are little-endian. The file is written under another name, forced to the disk and renamed. It is used only if every byte of
//! it is as it was written, by this version of usearch, for this namespace; else the index is made from the rows.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::error::{Result, VectorError};
use super::index::Index;

const MAGIC: &[u8; 16] = b"fabstir-vectors\x01";
const FIELDS: usize = 64;
const FOOTER: usize = FIELDS + blake3::OUT_LEN;

/// What a snapshot is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Of {
    pub number: u64,
    pub dimensions: u64,
    /// The number of the first change that is not in it.
    pub next: u64,
}

/// The file of a namespace's snapshot.
pub fn path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("index-{number}"))
}

/// Where it is written before it gets its name.
pub fn unfinished(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("index-{number}.new"))
}

/// The number of the namespace whose snapshot, finished or not, has this name.
pub fn number(name: &str) -> Option<u64> {
    let number = name.strip_prefix("index-")?;
    number.strip_suffix(".new").unwrap_or(number).parse().ok()
}

fn fields(of: Of, length: u64) -> [u8; FIELDS] {
    let mut fields = [0; FIELDS];
    fields[..16].copy_from_slice(MAGIC);
    let version = usearch::version().as_bytes();
    let kept = version.len().min(16);
    fields[16..16 + kept].copy_from_slice(&version[..kept]);
    for (field, value) in fields[32..].as_chunks_mut::<8>().0.iter_mut().zip([of.number, of.next, of.dimensions, length]) {
        *field = value.to_le_bytes();
    }
    fields
}

/// Completes the file that [`Index::save`] has left under the unfinished name: it must be `length` bytes long.
pub fn finish(folder: &Path, of: Of, length: u64) -> Result<()> {
    let from = unfinished(folder, of.number);
    let mut file = OpenOptions::new().read(true).append(true).open(&from).map_err(VectorError::io("open", &from))?;
    let written = file.metadata().map_err(VectorError::io("read", &from))?.len();
    if written != length {
        return Err(VectorError::Index(format!("its file has {written} bytes where {length} were written: is the disk full?")));
    }
    let fields = fields(of, length);
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&mut file).map_err(VectorError::io("read", &from))?;
    let hash = hasher.update(&fields).finalize();
    file.write_all(&fields).and_then(|()| file.write_all(hash.as_bytes())).map_err(VectorError::io("write", &from))?;
    file.sync_all().map_err(VectorError::io("sync", &from))?;
    let to = path(folder, of.number);
    fs::rename(&from, &to).map_err(VectorError::io("rename", &from))?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(VectorError::io("sync the folder", folder))
}

/// Reads a namespace's snapshot, if it is whole and its changes end within `changes`. Gives the number of the first change not in it.
pub fn load(
    folder: &Path,
    number: u64,
    dimensions: u64,
    changes: std::ops::RangeInclusive<u64>,
    searches: usize,
) -> Result<(Index, u64)> {
    let unusable = |why: &str| VectorError::Index(format!("its snapshot {why}"));
    let path = path(folder, number);
    let mut file = File::open(&path).map_err(VectorError::io("open", &path))?;
    let size = file.metadata().map_err(VectorError::io("read", &path))?.len();
    let length = size.checked_sub(FOOTER as u64).ok_or_else(|| unusable("is cut short"))?;
    let mut footer = [0; FOOTER];
    file.seek(SeekFrom::Start(length)).and_then(|_| file.read_exact(&mut footer)).map_err(VectorError::io("read", &path))?;
    let (found, hash) = footer.split_at(FIELDS);
    let next = found[40..48].try_into().map(u64::from_le_bytes).map_err(VectorError::index)?;
    if found != fields(Of { number, dimensions, next }, length) {
        return Err(unusable("is of another version or namespace, or cut short"));
    }
    if !changes.contains(&next) {
        return Err(unusable("is of another time than the rows"));
    }
    file.seek(SeekFrom::Start(0)).map_err(VectorError::io("read", &path))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader((&mut file).take(length)).map_err(VectorError::io("read", &path))?;
    if hasher.update(found).finalize() != *<&[u8; blake3::OUT_LEN]>::try_from(hash).map_err(VectorError::index)? {
        return Err(unusable("has other bytes than were written"));
    }
    Ok((Index::load(&path, dimensions as usize, searches)?, next))
}
