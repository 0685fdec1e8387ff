//! How much may come: what the operator allows, and what the disk has.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::{Result, Store};
use crate::error::NodeError;

/// What stays free on the disk for others: this much, or a tenth of a smaller disk. A peer that sends without end must not stop the node, which
/// has its journal there.
const STAYS_FREE: u64 = 1 << 30;

/// Bytes that are taken. Those of kept blobs are counted only where there is a most.
#[derive(Debug, Default)]
pub struct Space {
    pub stored: u64,
    /// Of rooms.
    pub coming: u64,
    /// Of these, what is on the disk already.
    written: u64,
}

/// Room that a blob takes while it is on its way. It is free again when this goes.
#[derive(Debug)]
pub struct Room {
    pub store: Arc<Store>,
    bytes: u64,
    written: u64,
}

impl Room {
    pub fn new(store: &Arc<Store>) -> Self {
        Self { store: store.clone(), bytes: 0, written: 0 }
    }

    /// Has room for so many bytes in all.
    pub fn reach(&mut self, size: u64) -> Result<()> {
        let more = size.saturating_sub(self.bytes);
        if more == 0 {
            return Ok(());
        }
        let mut space = self.store.space.lock();
        let used = space.stored.saturating_add(space.coming);
        if let Some(max) = self.store.max.filter(|&max| used.saturating_add(more) > max) {
            return Err(NodeError::QuotaFull { needed: size, used: used.saturating_sub(self.bytes), max });
        }
        let full = |free| NodeError::DiskFull { needed: size, free, dir: self.store.root.clone() };
        // No disk is so large.
        let coming = space.coming.checked_add(more).ok_or_else(|| full(free(&self.store.root)))?;
        if let Some(disk) = disk(&self.store.root).filter(|disk| disk.for_blobs() < coming - space.written) {
            return Err(full(disk.free));
        }
        space.coming = coming;
        self.bytes = size;
        Ok(())
    }

    pub fn wrote(&mut self, bytes: u64) {
        self.store.space.lock().written += bytes;
        self.written += bytes;
    }

    /// The room is a kept blob's from now on, in place of `replaced` bytes.
    pub fn keep(self, space: &mut Space, replaced: u64) {
        space.stored = space.stored.saturating_add(self.bytes).saturating_sub(replaced);
        self.leave(space);
    }

    fn leave(mut self, space: &mut Space) {
        give_back(space, &mut self.bytes, &mut self.written);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // One that is kept has nothing to give back, and whoever keeps it holds the lock.
        if self.bytes > 0 || self.written > 0 {
            give_back(&mut self.store.space.lock(), &mut self.bytes, &mut self.written);
        }
    }
}

fn give_back(space: &mut Space, bytes: &mut u64, written: &mut u64) {
    space.coming -= std::mem::take(bytes);
    space.written -= std::mem::take(written);
}

/// What a disk has, in bytes.
struct Disk {
    free: u64,
    all: u64,
}

impl Disk {
    /// What blobs may take of it.
    fn for_blobs(&self) -> u64 {
        self.free.saturating_sub(STAYS_FREE.min(self.all / 10))
    }
}

/// What is free on the disk of a folder; 0 where it does not tell.
pub fn free(folder: &Path) -> u64 {
    disk(folder).map_or(0, |disk| disk.free)
}

/// The disk of a folder; `None` where it does not tell.
fn disk(folder: &Path) -> Option<Disk> {
    let path = CString::new(folder.as_os_str().as_bytes()).ok()?;
    let mut disk = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends with NUL, and `statvfs` fills the structure before it returns 0.
    let disk = unsafe {
        if libc::statvfs(path.as_ptr(), disk.as_mut_ptr()) != 0 {
            return None;
        }
        disk.assume_init()
    };
    let bytes = |blocks: libc::fsblkcnt_t| blocks.saturating_mul(disk.f_frsize);
    Some(Disk { free: bytes(disk.f_bavail), all: bytes(disk.f_blocks) })
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
    }
}
