//! How much may come: what the operator allows, and what the disk has.

use std::sync::Arc;

use crate::disk::Disk;
use crate::{BlobError, Result, Store};

/// Bytes that are taken. Those of stored blobs are counted only where there is a most.
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
            return Err(BlobError::QuotaFull { needed: size, used: used.saturating_sub(self.bytes), max });
        }
        // No disk is so large.
        let coming = space.coming.checked_add(more).ok_or_else(|| self.store.disk_full(size))?;
        if Disk::of(&self.store.root).is_some_and(|disk| disk.for_blobs() < coming - space.written) {
            return Err(self.store.disk_full(size));
        }
        space.coming = coming;
        self.bytes = size;
        Ok(())
    }

    pub fn wrote(&mut self, bytes: u64) {
        self.store.space.lock().written += bytes;
        self.written += bytes;
    }

    /// The room is a stored blob's from now on, in place of `replaced` bytes.
    pub fn keep(mut self, space: &mut Space, replaced: u64) {
        space.stored = space.stored.saturating_add(self.bytes).saturating_sub(replaced);
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
