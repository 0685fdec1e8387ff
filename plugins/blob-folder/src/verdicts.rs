//! What is known of files without reading them again.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use parking_lot::Mutex;

use crate::Id;

/// Files that are remembered.
const REMEMBERED: usize = 100_000;

/// What changes with a file, whoever changes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Stamp {
    pub fn of(file: &Metadata) -> Self {
        Self { inode: file.ino(), size: file.len(), changed: (file.ctime(), file.ctime_nsec()) }
    }
}

/// Whether files have the bytes of their blobs, as far as it is known.
#[derive(Debug, Default)]
pub struct Verdicts(Mutex<HashMap<Id, (Stamp, bool)>>);

impl Verdicts {
    pub fn get(&self, id: Id, stamp: Stamp) -> Option<bool> {
        let known = self.0.lock().get(&id).copied();
        known.and_then(|(known, sound)| (known == stamp).then_some(sound))
    }

    pub fn set(&self, id: Id, stamp: Stamp, sound: bool) {
        let mut known = self.0.lock();
        if known.len() >= REMEMBERED
            && let Some(any) = known.keys().next().copied()
        {
            known.remove(&any);
        }
        known.insert(id, (stamp, sound));
    }
}
