//! Vectors by namespace and key, and the nearest of them.
//!
//! `truth` is a database file with every row, durable before a put returns. `index` is an approximate index of a namespace's
//! directions in memory, `snapshot` its copy in a file, `space` what keeps the two beside the rows, `keeper` all that is open. An
//! index says only where to look: what is given comes from the rows, with the exact cosine, and rows that are newer than the index are all
//! looked at, so that an index which is late, lost or not there yet can cost time and never gives a wrong answer.

mod direction;
mod error;
mod index;
mod keeper;
mod snapshot;
mod space;
mod truth;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blob_folder::Ended;
use blob_folder::disk::{self, Disk};
use fabstir_plugin_api::storage::{Near, Vector, VectorQuery};
use parking_lot::Mutex;

pub use error::{Result, VectorError};

use direction::{Candidate, Direction, Nearest};
use keeper::Keeper;
use space::{SMALLEST, Search};
use truth::{Namespace, Reading, Row};

/// Bytes that a namespace's name and a key may have.
const MAX_NAME: usize = 128;

/// Bytes of data that may lie beside a vector.
const MAX_DATA: usize = 4 << 10;

/// How many may be asked for at once.
const MAX_LIMIT: u32 = 1000;

/// How long an instance waits for one that is about to end, as where one version takes over from another.
const HAND_OVER: Duration = Duration::from_secs(10);

/// Rows that are looked at between two questions whether anybody still waits.
const ROWS_PER_LOOK: usize = 1024;

/// Room that is left on the disk, for what the database writes beside the rows.
const SPARE: u64 = 256 << 10;

/// What the vectors may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of all rows, on the disk.
    pub max_bytes: Option<u64>,
    /// Of all indexes, in memory.
    pub index_bytes: u64,
    /// Finds that run at once.
    pub searches: usize,
}

/// The vectors in a folder. Nothing is opened before they are used.
///
/// Every method blocks and may be called from many threads.
pub struct Vectors {
    folder: PathBuf,
    limits: Limits,
    open: Mutex<State>,
}

enum State {
    Closed,
    Open(Arc<Keeper>),
    Ended,
}

impl Vectors {
    pub fn new(folder: PathBuf, limits: Limits) -> Self {
        Self { folder, limits, open: Mutex::new(State::Closed) }
    }

    /// Stores vectors in place of those with the same keys, all or none.
    pub fn put(&self, namespace: &str, vectors: Vec<Vector>, still_wanted: &dyn Fn() -> bool) -> Result<()> {
        check_length("namespace's name", namespace.len(), MAX_NAME)?;
        let rows: Vec<Row> = vectors.into_iter().map(row).collect::<Result<_>>()?;
        let needed = rows.iter().map(|row| (row.key.len() + 4 * row.direction.numbers().len() + row.data.len()) as u64).sum();
        self.with(still_wanted, needed, |keeper| {
            if Disk::of(&self.folder).is_some_and(|disk| disk.free < needed + SPARE) {
                return Err(self.disk_full(needed + SPARE));
            }
            keeper
                .truth()
                .put(namespace, &rows, still_wanted)
                .map(|now| now.iter().for_each(|now| keeper.catch_up(namespace, now)))
        })
    }

    /// Deletes vectors by their keys, or all of a namespace, and says how many there were.
    pub fn delete(&self, namespace: &str, keys: Option<&[String]>, still_wanted: &dyn Fn() -> bool) -> Result<u64> {
        check_length("namespace's name", namespace.len(), MAX_NAME)?;
        self.with(still_wanted, 0, |keeper| {
            let deleted = keeper.truth().delete(namespace, keys)?;
            match deleted.namespace {
                Some(ended) if ended.rows == 0 => keeper.forget(ended.number),
                Some(changed) => keeper.catch_up(namespace, &changed),
                None => {}
            }
            Ok(deleted.rows)
        })
    }

    /// The nearest vectors, nearest first.
    pub fn find(&self, namespace: &str, query: VectorQuery, still_wanted: &dyn Fn() -> bool) -> Result<Vec<Near>> {
        check_length("namespace's name", namespace.len(), MAX_NAME)?;
        if query.limit > MAX_LIMIT {
            return Err(VectorError::Limit(query.limit));
        }
        let at_least = query.at_least.unwrap_or(-1.0);
        if at_least.is_nan() {
            return Err(VectorError::Threshold);
        }
        let length = query.values.len();
        let direction = Direction::of(query.values)?;
        self.with(still_wanted, 0, |keeper| {
            let Some(found) = keeper.truth().read()?.namespace(namespace)? else { return Ok(Vec::new()) };
            if found.dimensions != length as u64 {
                return Err(VectorError::Dimension { expected: found.dimensions, actual: length });
            }
            let limit = query.limit as usize;
            // A namespace that was large may have an index, and is searched without.
            let is_large = found.rows >= SMALLEST;
            // A few more than are wanted: in 16-bit numbers, and with rows that are gone by now, the order may be a little off.
            let wanted = limit + limit / 4 + 8;
            let search =
                is_large.then(|| keeper.space(namespace, &found).search(&direction, wanted)).flatten().unwrap_or_default();
            let reading = keeper.truth().read()?;
            // It may have ended, and begun anew, since.
            let Some(now) = reading.namespace(namespace)?.filter(|now| now.number == found.number) else { return Ok(Vec::new()) };
            let nearest = rank(&reading, &now, &direction, search, Nearest::new(limit, at_least), still_wanted)?;
            let mut near = Vec::with_capacity(nearest.len());
            // In one reading none of them goes, and they come in the order in which they are asked for.
            let mut cosines = nearest.iter().map(|candidate| candidate.cosine);
            reading.rows(&now, nearest.iter().map(|candidate| candidate.row), |_, stored| {
                let similarity = cosines.next().unwrap_or_default();
                near.push(Near { key: stored.key.to_owned(), similarity, data: stored.data.to_vec() });
            })?;
            Ok(near)
        })
    }

    /// Saves what makes the next start fast, and refuses everything from now on.
    pub fn close(&self) {
        let state = std::mem::replace(&mut *self.open.lock(), State::Ended);
        if let State::Open(keeper) = state {
            keeper.close();
        }
    }

    /// Works on the open vectors. `needed` is what is to be stored, for the message if there is no room.
    fn with<T>(&self, still_wanted: &dyn Fn() -> bool, needed: u64, work: impl FnOnce(&Keeper) -> Result<T>) -> Result<T> {
        let keeper = self.keeper(still_wanted, needed)?;
        work(&keeper).map_err(|error| self.failed(error, &keeper, needed))
    }

    /// After a failed read or write the database refuses everything until it is opened anew, which the next call does.
    fn failed(&self, error: VectorError, keeper: &Arc<Keeper>, needed: u64) -> VectorError {
        let VectorError::Database(cause) = &error else { return error };
        let mut open = self.open.lock();
        if matches!(&*open, State::Open(current) if Arc::ptr_eq(current, keeper)) {
            *open = State::Closed;
        }
        if is_full(cause) { self.disk_full(needed) } else { error }
    }

    fn disk_full(&self, needed: u64) -> VectorError {
        VectorError::DiskFull { needed, free: Disk::of(&self.folder).map(|disk| disk.free), dir: self.folder.clone() }
    }

    fn keeper(&self, still_wanted: &dyn Fn() -> bool, needed: u64) -> Result<Arc<Keeper>> {
        let deadline = Instant::now() + HAND_OVER;
        loop {
            let mut open = self.open.lock();
            match &*open {
                State::Open(keeper) => return Ok(keeper.clone()),
                State::Ended => return Err(Ended.into()),
                State::Closed => {}
            }
            match Keeper::open(&self.folder, self.limits) {
                Ok(keeper) => {
                    let keeper = Arc::new(keeper);
                    *open = State::Open(keeper.clone());
                    return Ok(keeper);
                }
                Err(VectorError::InUse(_)) if Instant::now() < deadline && still_wanted() => {}
                Err(VectorError::Database(cause)) if is_full(&cause) => return Err(self.disk_full(needed)),
                Err(error) => return Err(error),
            }
            drop(open);
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The nearest of the rows that are to be looked at.
fn rank(
    reading: &Reading,
    namespace: &Namespace,
    direction: &Direction,
    search: Search,
    mut nearest: Nearest,
    still_wanted: &dyn Fn() -> bool,
) -> Result<Vec<Candidate>> {
    let offer = |row, stored: truth::Stored<'_>| nearest.offer(Candidate { cosine: direction.cosine(stored.numbers), row });
    reading.rows(namespace, search.rows, offer)?;
    let mut looked = 0;
    reading.scan(namespace, search.from..u64::MAX, |row, stored| {
        nearest.offer(Candidate { cosine: direction.cosine(stored.numbers), row });
        looked += 1;
        match looked % ROWS_PER_LOOK == 0 && !still_wanted() {
            true => Err(VectorError::Cancelled),
            false => Ok(true),
        }
    })?;
    Ok(nearest.into_sorted())
}

fn row(Vector { key, values, data }: Vector) -> Result<Row> {
    check_length("key", key.len(), MAX_NAME)?;
    check_length("vector's data", data.len(), MAX_DATA)?;
    Ok(Row { key, direction: Direction::of(values)?, data })
}

fn check_length(what: &'static str, length: usize, limit: usize) -> Result<()> {
    if length > limit { Err(VectorError::TooLong { what, length, limit }) } else { Ok(()) }
}

fn is_full(error: &redb::Error) -> bool {
    matches!(error, redb::Error::Io(error) if disk::is_full(error))
}

#[cfg(test)]
mod tests;
