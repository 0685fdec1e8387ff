//! How much may come: what the operator allows, and what the disk has.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::disk::Disk;
use crate::error::bytes;

/// What blobs may take in a folder, and what they have taken.
#[derive(Debug)]
pub struct Space {
    dir: PathBuf,
    max: Option<u64>,
    taken: Mutex<Taken>,
}

/// Bytes that are taken.
#[derive(Debug, Default)]
pub struct Taken {
    /// By blobs that are stored.
    pub stored: u64,
    /// By rooms.
    pub coming: u64,
    /// Of these, what is on the disk already.
    written: u64,
}

/// Why there is no more room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Full {
    /// The disk has no more.
    Disk {
        /// What the blob needs at least, in bytes.
        needed: u64,
        /// What the disk has free; `None` where it does not tell.
        free: Option<u64>,
        /// What blobs leave of that.
        stays: u64,
        /// What is promised to blobs on their way, this one not among them.
        promised: u64,
        /// The folder that it is about.
        dir: PathBuf,
    },
    /// The operator allows no more.
    Quota {
        /// What the blob needs at least, in bytes.
        needed: u64,
        /// What others take.
        used: u64,
        /// What is allowed.
        max: u64,
    },
}

impl Full {
    /// What a disk has and what of it is not to be had, for people.
    pub fn has(free: Option<u64>, stays: u64, promised: u64) -> String {
        let free = free.map_or("an unknown amount".into(), bytes);
        match promised {
            0 => format!("has {free} free, and blobs leave {} of the disk free", bytes(stays)),
            _ => format!(
                "has {free} free, {} are promised to others on their way, and blobs leave {} of the disk free",
                bytes(promised),
                bytes(stays)
            ),
        }
    }
}

impl Space {
    /// The space in a folder, of which blobs may take so many bytes at the most, and the disk.
    pub fn new(dir: PathBuf, max: Option<u64>) -> Arc<Self> {
        Arc::new(Self { dir, max, taken: Mutex::default() })
    }

    /// Whether stored blobs have to be counted.
    pub fn is_counted(&self) -> bool {
        self.max.is_some()
    }

    /// What is taken.
    pub fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock()
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is to be said where the disk has refused a blob of so many bytes.
    pub fn full(&self, needed: u64) -> Full {
        self.full_of(Disk::of(&self.dir), needed, 0)
    }

    fn full_of(&self, disk: Option<Disk>, needed: u64, promised: u64) -> Full {
        let stays = disk.map_or(0, |disk| disk.stays_free());
        Full::Disk { needed, free: disk.map(|disk| disk.free), stays, promised, dir: self.dir.clone() }
    }
}

/// Room that a blob takes while it is on its way. It is free again when this goes.
#[derive(Debug)]
pub struct Room {
    space: Arc<Space>,
    bytes: u64,
    written: u64,
}

impl Room {
    /// No room yet.
    pub fn new(space: &Arc<Space>) -> Self {
        Self { space: space.clone(), bytes: 0, written: 0 }
    }

    /// Has room for so many bytes in all. Looks at the disk also where that is promised already: others write there, too.
    ///
    /// # Errors
    /// Why there is no more.
    pub fn reach(&mut self, size: u64) -> Result<(), Full> {
        let more = size.saturating_sub(self.bytes);
        let mut taken = self.space.taken.lock();
        let used = taken.stored.saturating_add(taken.coming);
        if let Some(max) = self.space.max.filter(|&max| more > 0 && used.saturating_add(more) > max) {
            return Err(Full::Quota { needed: size, used: used.saturating_sub(self.bytes), max });
        }
        let disk = Disk::of(&self.space.dir);
        let promised = (taken.coming - taken.written) - (self.bytes - self.written);
        // No disk is so large that this is too much for a number.
        let Some(coming) = taken.coming.checked_add(more) else { return Err(self.space.full_of(disk, size, promised)) };
        if disk.is_some_and(|disk| disk.for_blobs() < coming - taken.written) {
            return Err(self.space.full_of(disk, size, promised));
        }
        taken.coming = coming;
        self.bytes += more;
        Ok(())
    }

    /// So many bytes more are on the disk.
    pub fn wrote(&mut self, bytes: u64) {
        self.space.taken.lock().written += bytes;
        self.written += bytes;
    }

    /// The room is a stored blob's from now on, in place of `replaced` bytes.
    pub fn keep(mut self, taken: &mut Taken, replaced: u64) {
        taken.stored = taken.stored.saturating_add(self.bytes).saturating_sub(replaced);
        give_back(taken, &mut self.bytes, &mut self.written);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // One that is kept has nothing to give back, and whoever keeps it holds the lock.
        if self.bytes > 0 || self.written > 0 {
            give_back(&mut self.space.taken.lock(), &mut self.bytes, &mut self.written);
        }
    }
}

fn give_back(taken: &mut Taken, bytes: &mut u64, written: &mut u64) {
    taken.coming -= std::mem::take(bytes);
    taken.written -= std::mem::take(written);
}
