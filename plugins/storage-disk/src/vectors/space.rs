//! A namespace that is in use: its index, and how far that is along with the rows.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blob_folder::Ended;
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

/// How long a change waits for another one to bring the index up to date, before it looks whether a snapshot is being written instead.
const MOMENT: Duration = Duration::from_millis(5);

/// A snapshot is written after so many changes, or an eighth of the rows if that is more.
const CHANGES_PER_SNAPSHOT: u64 = 5000;

/// A namespace by its number. Its rows are always right; its index follows them, where there is one.
pub struct Space {
    pub name: String,
    pub number: u64,
    /// Who changes it holds `progress`, so that a reader waits for one row at most.
    index: RwLock<Option<Index>>,
    progress: Mutex<Progress>,
    /// The number of the first change that may not be in the index.
    next: AtomicU64,
    /// Whether a snapshot is being written, or is about to be: nobody waits for that.
    writing: AtomicBool,
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

/// Where the nearest rows are.
#[derive(Debug, Default)]
pub struct Search {
    /// By the index: rows that are among the nearest.
    pub rows: Vec<u64>,
    /// From this number on, every row: the index may not have them yet.
    pub from: u64,
}

impl Space {
    pub fn new(name: String, number: u64) -> Self {
        Self {
            name,
            number,
            index: RwLock::new(None),
            progress: Mutex::default(),
            next: AtomicU64::new(0),
            writing: AtomicBool::new(false),
            memory: AtomicU64::new(0),
            used: AtomicU64::new(0),
            preparing: AtomicBool::new(false),
            saving: AtomicBool::new(false),
        }
    }

    /// Which rows to look at for the nearest; `None` where there is no index to tell.
    pub fn search(&self, direction: &Direction, wanted: usize) -> Option<Search> {
        // Before the search: what the index takes in meanwhile is looked at twice rather than not at all.
        let from = self.next.load(Ordering::Acquire);
        let found = self.index.read().as_ref()?.search(direction.numbers(), wanted);
        let mut rows =
            found.inspect_err(|error| warn!(namespace = self.number, %error, "Index failed: every row is looked at.")).ok()?;
        rows.retain(|&row| row < from);
        Some(Search { rows, from })
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

    /// Brings the index up to the rows as they are now, or leaves it to a snapshot that is being written to do so afterwards. Says whether a
    /// snapshot is due. After an error the index is of no use any more.
    pub fn catch_up(&self, truth: &Truth) -> Result<bool> {
        let mut progress = loop {
            match self.progress.try_lock_for(MOMENT) {
                Some(progress) => break progress,
                None if self.writing.load(Ordering::Relaxed) => return Ok(false),
                None => {}
            }
        };
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
        self.next.store(namespace.next, Ordering::Release);
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
        self.next.store(next, Ordering::Release);
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
            true => Err(Ended.into()),
            false => apply(index, change),
        })?;
        Ok(namespace.next)
    }

    /// Writes a snapshot, if anything has changed since the last one.
    pub fn save(&self, truth: &Truth) -> Result<()> {
        let unfinished = snapshot::unfinished(truth.folder(), self.number);
        self.writing.store(true, Ordering::Relaxed);
        let saved = self.write_snapshot(truth);
        self.writing.store(false, Ordering::Relaxed);
        if let Err(error) = self.catch_up(truth) {
            warn!(namespace = self.number, %error, "Index dropped: it is made anew.");
            self.forget();
        }
        if saved.is_err() {
            // What is left of it would only take room; if it cannot be removed, the next start does.
            let _ = fs::remove_file(unfinished);
        }
        saved
    }

    fn write_snapshot(&self, truth: &Truth) -> Result<()> {
        let Some((_, namespace)) = self.current(truth)? else { return Ok(()) };
        let (of, length) = {
            // Nobody changes the index meanwhile, and everybody may search it. Whoever changes rows does not wait for this.
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Instant;

    use super::super::tests::{ALWAYS, find, large, open, values, vector, wait_for_index};
    use super::*;

    /// The namespace that `large` makes.
    fn space(vectors: &super::super::Vectors) -> std::sync::Arc<Space> {
        let keeper = vectors.keeper(ALWAYS, 0).unwrap();
        let found = keeper.truth().read().unwrap().namespace("large").unwrap().unwrap();
        keeper.space("large", &found)
    }

    #[test]
    fn namespace_that_has_become_small_is_searched_exactly() {
        let folder = tempfile::tempdir().unwrap();
        let vectors = open(folder.path());
        large(&vectors, 16);
        wait_for_index(&vectors, "large");
        let gone: Vec<String> = (100..SMALLEST + 500).map(|seed| format!("key {seed}")).collect();
        vectors.delete("large", Some(&gone), ALWAYS).unwrap();
        // As one that misses what is near, which it may.
        let space = space(&vectors);
        *space.index.write() = Some(Index::new(16, 2).unwrap());
        assert_eq!(find(&vectors, "large", values(1, 16), 1000).len(), 100);
        assert_eq!(find(&vectors, "large", values(7, 16), 1)[0].key, "key 7");
    }

    #[test]
    fn changes_do_not_wait_for_a_snapshot_and_are_found_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let vectors = open(folder.path());
        large(&vectors, 16);
        wait_for_index(&vectors, "large");
        let space = space(&vectors);
        // The index is saved once it is made: that is over first.
        let is_saved = || {
            let progress = space.progress.lock();
            progress.saved == progress.next
        };
        let began = Instant::now();
        while !is_saved() || space.writing.load(Ordering::Relaxed) {
            // What came after that is saved much later.
            if began.elapsed() > Duration::from_secs(5) && !space.writing.load(Ordering::Relaxed) {
                space.save(vectors.keeper(ALWAYS, 0).unwrap().truth()).unwrap();
            }
            thread::yield_now();
        }
        thread::scope(|scope| {
            // What writing a snapshot holds.
            space.writing.store(true, Ordering::Relaxed);
            let progress = space.progress.lock();
            let (done, changed) = mpsc::channel();
            let vectors = &vectors;
            scope.spawn(move || {
                vectors.put("large", vec![vector(70_000, 16)], ALWAYS).unwrap();
                vectors.delete("large", Some(&["key 5".to_owned()]), ALWAYS).unwrap();
                // Where nobody listens any more, the test has failed already.
                let _ = done.send(());
            });
            let changed = changed.recv_timeout(Duration::from_secs(20));
            let found =
                changed.is_ok().then(|| [70_000, 5].map(|seed| find(vectors, "large", values(seed, 16), 1).remove(0).key));
            drop(progress);
            let found = found.expect("the changes wait for the snapshot");
            assert_eq!(found[0], "key 70000", "it is not in the index yet");
            assert_ne!(found[1], "key 5");
        });
        let keeper = vectors.keeper(ALWAYS, 0).unwrap();
        space.save(keeper.truth()).unwrap();
        let rows = keeper.truth().read().unwrap().namespace("large").unwrap().unwrap().rows;
        assert_eq!(space.index.read().as_ref().unwrap().len() as u64, rows, "the index has caught up");
    }
}
