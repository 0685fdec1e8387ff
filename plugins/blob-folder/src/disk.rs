//! What a disk has left, and what it takes to be sure that something is on it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// What stays free on a disk for others: this much, or a tenth of a smaller disk. Whoever sends without end must not stop the node, which may
/// have its journal there.
const STAYS_FREE: u64 = 1 << 30;

/// What a disk has, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disk {
    /// What is free for us.
    pub free: u64,
    all: u64,
}

impl Disk {
    /// The disk of a folder; `None` where it does not tell.
    pub fn of(folder: &Path) -> Option<Self> {
        let disk = rustix::fs::statvfs(folder).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
        Some(Self { free: bytes(disk.f_bavail), all: bytes(disk.f_blocks) })
    }

    /// What blobs leave free.
    pub fn stays_free(&self) -> u64 {
        STAYS_FREE.min(self.all / 10)
    }

    /// What blobs may take of it.
    pub fn for_blobs(&self) -> u64 {
        self.free.saturating_sub(self.stays_free())
    }
}

/// Whether a disk or a quota has no more room.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Makes the names in a folder survive a power cut.
///
/// # Errors
/// What the operating system says.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Makes a folder and those above it that are missing, such that they survive a power cut.
///
/// # Errors
/// What the operating system says.
pub fn make_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let above = folder.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_folder(above)?;
    match fs::create_dir(folder) {
        // Another one was faster, and may not have come to the next line.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
        made => made?,
    }
    sync_folder(above)
}

/// Gives a file that only its owner may read its content, such that it is whole or as before, also after a power cut. Makes its folder.
///
/// # Errors
/// What the operating system says.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    make_folder(folder)?;
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|refused| refused.error)?;
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_is_not_filled_to_its_end() {
        const GIB: u64 = 1 << 30;
        let disk = |free, all| Disk { free, all }.for_blobs();
        assert_eq!((disk(300 * GIB, 1000 * GIB), disk(GIB, 1000 * GIB)), (299 * GIB, 0));
        assert_eq!((disk(1000, 1000), disk(101, 1000), disk(50, 1000)), (900, 1, 0));
        assert!(Disk::of(Path::new("/")).is_some_and(|disk| disk.free <= disk.all));
        assert_eq!(Disk::of(Path::new("/no/such/folder")), None);
    }
}
