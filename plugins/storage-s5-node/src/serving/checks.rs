//! Which files are what they should be.
//!
//! A put knows what it has stored. Other files are read through once before a byte of them is given away, whoever asks and however often; a
//! large one is read while it is sent instead, and its last piece goes out only if all of it was right.

use std::collections::HashMap;
use std::sync::Arc;

use blob_folder::{Id, Stamp, Store, is_whole};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tracing::warn;

/// Files that are read through at once.
const CHECKS: usize = 2;

/// Files up to this size are read through while whoever has asked waits.
pub const SMALL: u64 = 16 << 20;

type Running = Arc<Mutex<HashMap<Id, Shared<BoxFuture<'static, bool>>>>>;

#[derive(Debug)]
pub struct Checks {
    store: Arc<Store>,
    turns: Arc<Semaphore>,
    running: Running,
}

impl Checks {
    pub fn new(store: Arc<Store>) -> Self {
        Self { store, turns: Arc::new(Semaphore::new(CHECKS)), running: Running::default() }
    }

    /// Reads a file through, together with all who wait for the same.
    pub async fn is_sound(&self, id: Id, stamp: Stamp) -> bool {
        let check = self.running.lock().entry(id).or_insert_with(|| self.begin(id, stamp)).clone();
        check.await
    }

    /// Goes on also when nobody waits any more: the next one has the answer.
    fn begin(&self, id: Id, stamp: Stamp) -> Shared<BoxFuture<'static, bool>> {
        let (store, turns, running) = (self.store.clone(), self.turns.clone(), self.running.clone());
        let check = tokio::spawn(async move {
            let _turn = turns.acquire().await;
            let path = store.path(id);
            let whole = spawn_blocking(move || is_whole(&path, id)).await;
            if let Ok(Ok(whole)) = whole {
                found(&store, id, stamp, whole);
            }
            running.lock().remove(&id);
            matches!(whole, Ok(Ok(true)))
        });
        check.map(|sound| sound.unwrap_or(false)).boxed().shared()
    }
}

/// Remembers what a file is, so that a damaged one is told of once.
pub fn found(store: &Store, id: Id, stamp: Stamp, sound: bool) {
    if !sound && store.verdict(id, stamp) != Some(false) {
        warn!(blob = %id, "A kept blob is damaged, and is not served.");
    }
    store.remember(id, stamp, sound);
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::layout::S5Layout;

    #[tokio::test]
    async fn all_who_ask_for_a_file_wait_for_one_check() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), S5Layout::of(dir.path()), None).unwrap();
        let mut incoming = store.begin(None, None).unwrap();
        incoming.write(b"sound").unwrap();
        let id = store.keep(incoming.finish().unwrap(), || true).unwrap().id;
        let stamp = |store: &Store| store.open_file(id).unwrap().unwrap().stamp;
        assert_eq!(store.verdict(id, stamp(&store)), Some(true), "what was put is known");
        let store = Store::open(dir.path(), S5Layout::of(dir.path()), None).unwrap();
        assert_eq!(store.verdict(id, stamp(&store)), None);

        let checks = Checks::new(store.clone());
        let turns = checks.turns.clone().acquire_many_owned(CHECKS as u32).await.unwrap();
        let asked: Vec<_> = (0..20).map(|_| checks.is_sound(id, stamp(&store)).boxed()).collect();
        let all = futures::future::join_all(asked);
        let (answers, ()) = tokio::join!(all, async {
            assert_eq!(checks.running.lock().len(), 1);
            drop(turns);
        });
        assert!(answers.into_iter().all(|sound| sound));
        assert!(checks.running.lock().is_empty());
        assert_eq!(store.verdict(id, stamp(&store)), Some(true));

        let file = OpenOptions::new().write(true).open(store.path(id)).unwrap();
        file.set_len(3).unwrap();
        file.write_all_at(b"!", 0).unwrap();
        // Goes on for the next one, whoever began it.
        let _ = checks.is_sound(id, stamp(&store)).now_or_never();
        assert!(!checks.is_sound(id, stamp(&store)).await);
        assert_eq!(store.verdict(id, stamp(&store)), Some(false));
    }
}
