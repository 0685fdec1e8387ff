//! The vectors while they are open: the namespaces in use, the memory that their indexes share, and the thread that makes and saves them.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::{debug, info, warn};

use super::Limits;
use super::error::{Result, VectorError};
use super::index::Index;
use super::snapshot;
use super::space::{SMALLEST, Space};
use super::truth::{Namespace, Truth};

/// Namespaces that are remembered without an index.
const REMEMBERED: usize = 1024;

/// What closing may spend on snapshots. What is not saved is replayed or made anew at the next start.
const CLOSING: Duration = Duration::from_secs(5);

/// Open vectors. Dropping it ends its thread.
pub struct Keeper {
    shared: Arc<Shared>,
    /// At most two per namespace wait: see [`Space::preparing`] and [`Space::saving`].
    work: Mutex<Option<(Sender<Work>, JoinHandle<()>)>>,
}

struct Shared {
    truth: Truth,
    limits: Limits,
    spaces: Mutex<HashMap<u64, Arc<Space>>>,
    clock: AtomicU64,
    stop: AtomicBool,
}

enum Work {
    Prepare(Arc<Space>, Namespace),
    Save(Arc<Space>),
}

impl Keeper {
    /// Opens the vectors in a folder.
    pub fn open(folder: &Path, limits: Limits) -> Result<Self> {
        let truth = Truth::open(folder, limits.max_bytes)?;
        remove_leftovers(&truth)?;
        let shared =
            Arc::new(Shared { truth, limits, spaces: Mutex::default(), clock: AtomicU64::new(1), stop: AtomicBool::new(false) });
        let (sender, work) = mpsc::channel();
        let worker = shared.clone();
        let thread = thread::Builder::new().name("vectors".into()).spawn(move || worker.run(&work));
        let thread = thread.map_err(VectorError::io("start a thread for", folder))?;
        Ok(Self { shared, work: Mutex::new(Some((sender, thread))) })
    }

    pub fn truth(&self) -> &Truth {
        &self.shared.truth
    }

    /// A namespace for use. Where it is large and has no index yet, one is made in the background.
    pub fn space(&self, name: &str, namespace: &Namespace) -> Arc<Space> {
        let space = {
            let mut spaces = self.shared.spaces.lock();
            if spaces.len() > REMEMBERED {
                spaces.retain(|_, space| space.is_indexed() || Arc::strong_count(space) > 1);
            }
            let space = spaces.entry(namespace.number);
            space.or_insert_with(|| Arc::new(Space::new(name.to_owned(), namespace.number))).clone()
        };
        space.used.store(self.shared.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        if namespace.rows >= SMALLEST && !space.is_indexed() && !space.preparing.swap(true, Ordering::Relaxed) {
            self.send(Work::Prepare(space.clone(), *namespace));
        }
        space
    }

    /// Lets a namespace's index follow its rows, which are stored by now: where it cannot, there is no index for a while.
    pub fn catch_up(&self, name: &str, namespace: &Namespace) {
        let space = self.space(name, namespace);
        match space.catch_up(&self.shared.truth) {
            Ok(true) if !space.saving.swap(true, Ordering::Relaxed) => self.send(Work::Save(space.clone())),
            Ok(_) => {}
            Err(error) => {
                warn!(namespace = space.number, %error, "Index dropped: it is made anew.");
                space.forget();
            }
        }
        if !self.shared.make_room(&space, space.memory.load(Ordering::Relaxed)) {
            warn!(namespace = space.number, "Index has become too large for `index_bytes`: every row is looked at.");
            space.preparing.store(true, Ordering::Relaxed);
            space.forget();
        }
    }

    /// What is kept of a namespace that has ended goes.
    pub fn forget(&self, number: u64) {
        if let Some(space) = self.shared.spaces.lock().remove(&number) {
            space.forget();
        }
        // If it is not there, or cannot be removed: nobody takes it for another namespace's, and the next start removes it.
        let _ = fs::remove_file(snapshot::path(self.shared.truth.folder(), number));
    }

    fn send(&self, work: Work) {
        if let Some((sender, _)) = &*self.work.lock() {
            // Where the thread has ended, so has everything.
            let _ = sender.send(work);
        }
    }

    fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let Some((sender, thread)) = self.work.lock().take() else { return };
        drop(sender);
        if thread.join().is_err() {
            warn!("The thread of the vectors has panicked.");
        }
    }

    /// Ends the thread and saves what has changed.
    pub fn close(&self) {
        self.stop();
        let deadline = Instant::now() + CLOSING;
        let spaces: Vec<_> = self.shared.spaces.lock().values().cloned().collect();
        for space in spaces {
            if Instant::now() > deadline {
                warn!("Not all indexes could be saved in time: the next start makes up for it.");
                break;
            }
            if let Err(error) = space.save(&self.shared.truth) {
                warn!(namespace = space.number, %error, "Index not saved: the next start makes up for it.");
            }
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn run(&self, work: &Receiver<Work>) {
        while let Ok(work) = work.recv() {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let saved = match &work {
                Work::Prepare(space, namespace) => {
                    self.prepare(space, namespace);
                    // What took long to make is saved at once.
                    space.save(&self.truth)
                }
                Work::Save(space) => {
                    space.saving.store(false, Ordering::Relaxed);
                    space.save(&self.truth)
                }
            };
            if let (Err(error), Work::Prepare(space, _) | Work::Save(space)) = (saved, work) {
                warn!(namespace = space.number, %error, "Index not saved: it is tried again later.");
            }
        }
    }

    fn prepare(&self, space: &Space, namespace: &Namespace) {
        let needed = Index::estimate(namespace.rows, namespace.dimensions);
        if !self.make_room(space, needed) {
            // It stays marked as being prepared, so that this is said once.
            let limit = self.limits.index_bytes;
            warn!(namespace = space.number, needed, limit, "Index too large for `index_bytes`: every row is looked at.");
            return;
        }
        let began = Instant::now();
        match space.prepare(&self.truth, self.limits.searches, &self.stop) {
            Ok(()) => debug!(namespace = space.number, took = ?began.elapsed(), "Index ready."),
            Err(VectorError::Closed(_)) => {}
            Err(error) => warn!(namespace = space.number, %error, "No index: every row is looked at."),
        }
        space.preparing.store(false, Ordering::Relaxed);
    }

    /// Takes the indexes of those that were not used for the longest time until there is room for another.
    fn make_room(&self, space: &Space, needed: u64) -> bool {
        if needed > self.limits.index_bytes {
            return false;
        }
        let mut others: Vec<_> = self.spaces.lock().values().filter(|other| other.number != space.number).cloned().collect();
        others.sort_by_key(|other| other.used.load(Ordering::Relaxed));
        let mut taken: u64 = others.iter().map(|other| other.memory.load(Ordering::Relaxed)).sum();
        for other in others {
            if taken + needed <= self.limits.index_bytes {
                break;
            }
            taken -= other.memory.load(Ordering::Relaxed).min(taken);
            if other.is_indexed() {
                info!(namespace = other.number, "Index put away to make room for another.");
                other.forget();
            }
        }
        true
    }
}

/// Removes snapshots that were not finished, or whose namespace has ended.
fn remove_leftovers(truth: &Truth) -> Result<()> {
    let folder = truth.folder();
    let known = truth.read()?.numbers()?;
    for entry in fs::read_dir(folder).map_err(VectorError::io("list", folder))? {
        let path = entry.map_err(VectorError::io("list", folder))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let Some(number) = snapshot::number(name) else { continue };
        if name.ends_with(".new") || !known.contains(&number) {
            fs::remove_file(&path).map_err(VectorError::io("remove", &path))?;
        }
    }
    Ok(())
}
