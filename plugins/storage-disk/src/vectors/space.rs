//! A namespace that is in use: its index, and how far that is along with the rows.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use tracing::{info, warn};

use super::direction::Direction;
use super::error::{Result, VectorError};
use super::index::Index;
use super::snapshot;
use super::truth::{Change, Namespace, Truth};

/// With fewer rows than this, a look at each of them is as fast as an index, and exact.
pub const SMALLEST: u64 = 2000;

/// Rows that are read at once while an index is made.
const BATCH: u64 = 256;

/// A snapshot is written after so many changes, or an eighth of the rows if that is more.
const CHANGES_PER_SNAPSHOT: u64 = 5000;

/// A namespace by its number. Its rows are always right; its index follows them, where there is one.
pub struct Space {
    pub name: String,
    pub number: u64,
    /// Who changes it holds `progress`, so that a reader waits for one row at most.
    index: RwLock<Option<Index>>,
    progress: Mutex<Progress>,
    /// What the index takes of the memory, about; 0 where there is none.
    pub memory: AtomicU64,
    /// When it was used last, by the clock of who keeps it.
    pub used: AtomicU64,
    /// Whether its index is being made, or cannot be.
    pub preparing: AtomicBool,
    /// Whether a snapshot has been asked for.
    pub saving: AtomicBool,
}

/// The numbers of the first changes that are not in the index, and not in its snapshot.
#[derive(Debug, Default, Clone, Copy)]
struct Progress {
    next: u64,
    saved: u64,
}

impl Space {
    pub fn new(name: String, number: u64) -> Self {
        Self {
            name,
            number,
            index: RwLock::new(None),
            progress: Mutex::default(),
            memory: AtomicU64::new(0),
            used: AtomicU64::new(0),
            preparing: AtomicBool::new(false),
            saving: AtomicBool::new(false),
        }
    }

    /// Rows that are among the nearest; `None` where there is no index to tell.
    pub fn search(&self, direction: &Direction, wanted: usize) -> Option<Vec<u64>> {
        let found = self.index.read().as_ref()?.search(direction.numbers(), wanted);
        found.inspect_err(|error| warn!(namespace = self.number, %error, "Index failed: every row is looked at.")).ok()
    }

    pub fn is_indexed(&self) -> bool {
        self.index.read().is_some()
    }

    /// The namespace, while it is this one.
    fn current(&self, truth: &Truth) -> Result<Option<(super::truth::Reading, Namespace)>> {
        let reading = truth.read()?;
        let found = reading.namespace(&self.name)?.filter(|namespace| namespace.number == self.number);
        Ok(found.map(|namespace| (reading, namespace)))
    }

    /// Brings the index up to the rows as they are now. Says whether a snapshot is due. After an error the index is
    /// of no use any more.
    pub fn catch_up(&self, truth: &Truth) -> Result<bool> {
        let mut progress = self.progress.lock();
        if !self.is_indexed() {
            return Ok(false);
        }
        let Some((reading, namespace)) = self.current(truth)? else {
            self.forget();
            return Ok(false);
        };
        let applied = reading.changes(&namespace, progress.next, |change| match &mut *self.index.write() {
            Some(index) => apply(index, change),
            None => Ok(()),
        });
        applied?;
        progress.next = namespace.next;
        self.memory.store(Index::estimate(namespace.rows, namespace.dimensions), Ordering::Relaxed);
        Ok(progress.next - progress.saved > CHANGES_PER_SNAPSHOT.max(namespace.rows / 8))
    }

    /// Gives up the index.
    pub fn forget(&self) {
        *self.index.write() = None;
        self.memory.store(0, Ordering::Relaxed);
    }

    /// Takes the index from its snapshot, or makes it from the rows, while others search without it.
    pub fn prepare(&self, truth: &Truth, searches: usize, stop: &AtomicBool) -> Result<()> {
        let Some(namespace) = truth.log(&self.name, self.number)? else { return Ok(()) };
        let earliest = namespace.logged.unwrap_or(namespace.next);
        let loaded = snapshot::load(truth.folder(), self.number, namespace.dimensions, earliest..=namespace.next, searches);
        let (mut index, mut next, saved) = match loaded {
            Ok((index, next)) => (index, next, next),
            Err(why) => {
                info!(namespace = self.number, rows = namespace.rows, %why, "Making an index.");
                let Some(index) = self.make(truth, &namespace, searches, stop)? else { return Ok(()) };
                (index, namespace.next, 0)
            }
        };
        // What came meanwhile, once without and once with those held back who would add more.
        next = self.follow(truth, &mut index, next, stop)?;
        let mut progress = self.progress.lock();
        next = self.follow(truth, &mut index, next, stop)?;
        *progress = Progress { next, saved };
        self.memory.store(Index::estimate(index.len() as u64, namespace.dimensions), Ordering::Relaxed);
        *self.index.write() = Some(index);
        Ok(())
    }

    /// An index of all rows up to now; `None` if it is to stop.
    fn make(&self, truth: &Truth, namespace: &Namespace, searches: usize, stop: &AtomicBool) -> Result<Option<Index>> {
        let mut index = Index::new(namespace.dimensions as usize, searches)?;
        let mut from = 0;
        while from < namespace.next {
            // Read in pieces, so that the database can use again what is given up meanwhile.
            let Some((reading, _)) = self.current(truth)? else { return Ok(None) };
            let (mut read, mut last) = (0, namespace.next);
            reading.scan(namespace, from..namespace.next, |number, row| {
                index.add(number, &Direction::read(row.numbers))?;
                (read, last) = (read + 1, number + 1);
                Ok(read < BATCH && !stop.load(Ordering::Relaxed))
            })?;
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            from = if read < BATCH { namespace.next } else { last };
        }
        Ok(Some(index))
    }

    fn follow(&self, truth: &Truth, index: &mut Index, next: u64, stop: &AtomicBool) -> Result<u64> {
        let Some((reading, namespace)) = self.current(truth)? else {
            return Err(VectorError::Index("the namespace has ended".into()));
        };
        reading.changes(&namespace, next, |change| match stop.load(Ordering::Relaxed) {
            true => Err(VectorError::Closed),
            false => apply(index, change),
        })?;
        Ok(namespace.next)
    }

    /// Writes a snapshot, if anything has changed since the last one.
    pub fn save(&self, truth: &Truth) -> Result<()> {
        let unfinished = snapshot::unfinished(truth.folder(), self.number);
        let saved = self.write_snapshot(truth);
        if saved.is_err() {
            // What is left of it would only take room; if it cannot be removed, the next start does.
            let _ = fs::remove_file(unfinished);
        }
        saved
    }

    fn write_snapshot(&self, truth: &Truth) -> Result<()> {
        let Some((_, namespace)) = self.current(truth)? else { return Ok(()) };
        let (of, length) = {
            // Nobody changes the index meanwhile, and everybody may search it.
            let mut progress = self.progress.lock();
            let index = self.index.read();
            let Some(index) = index.as_ref().filter(|_| progress.saved < progress.next) else { return Ok(()) };
            // Also where it fails: it is not tried again before there are as many changes again.
            progress.saved = progress.next;
            let length = index.save(&snapshot::unfinished(truth.folder(), self.number))?;
            (snapshot::Of { number: self.number, dimensions: namespace.dimensions, next: progress.next }, length)
        };
        snapshot::finish(truth.folder(), of, length)?;
        truth.forget_log(&self.name, self.number, of.next)
    }
}

fn apply(index: &mut Index, change: Change<'_>) -> Result<()> {
    match change {
        Change::Removed(row) => index.remove(row),
        Change::Put(row, stored) => index.add(row, &Direction::read(stored.numbers)),
    }
}
