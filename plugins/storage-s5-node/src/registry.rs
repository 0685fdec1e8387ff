//! The entries that are kept here: pointers, in a database file of the form that S5's registry has.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blob_folder::{Ended, disk};
use bytes::Bytes;
use parking_lot::Mutex;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use s5_core::{StreamKey, StreamMessage};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use crate::error::NodeError;
use crate::record;

/// How long an instance waits for one that is about to end, as where one version takes over from another.
const HAND_OVER: Duration = Duration::from_secs(10);

/// How often it looks.
const RETRY: Duration = Duration::from_millis(20);

/// Pointers that another node may have stored here. Each takes about 200 bytes.
pub const OF_A_GUEST: u64 = 10_000;

/// Entries of others that wait for the disk at once: this node's own need not wait for more.
const WRITES_OF_GUESTS: usize = 4;

/// S5's own table: a place and the entry there.
const ENTRIES: TableDefinition<&[u8], &[u8]> = TableDefinition::new("registry");

/// How many places each other node has begun.
const GUESTS: TableDefinition<&[u8; 32], u64> = TableDefinition::new("fabstir-guests");

/// The registry of this node. Nothing is opened before it is used.
#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    state: Mutex<State>,
    guests: Semaphore,
}

enum State {
    Closed,
    /// One call opens it; the others wait.
    Opening,
    Open(Arc<Database>),
    Ended,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Closed => "Closed",
            Self::Opening => "Opening",
            Self::Open(_) => "Open",
            Self::Ended => "Ended",
        })
    }
}

/// What came of a write.
enum Stored {
    /// Or there was the same, or a newer one.
    Done,
    TooMany,
}

impl Registry {
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), state: Mutex::new(State::Closed), guests: Semaphore::new(WRITES_OF_GUESTS) }
    }

    /// The entry of a key.
    pub async fn entry(&self, key: &StreamKey) -> Result<Option<StreamMessage>, NodeError> {
        let place = key.storage_key();
        self.with(move |db| db.begin_read()?.open_table(ENTRIES)?.get(&*place)?.map(|found| read(found.value())).transpose())
            .await
    }

    /// Stores an entry of this node unless one that is not older is there, and gives back what is there now.
    pub async fn store(&self, entry: StreamMessage) -> Result<Option<StreamMessage>, NodeError> {
        let key = entry.key;
        self.write(entry, None).await?;
        self.entry(&key).await
    }

    /// Stores an entry that another node has sent, unless one that is not older is there.
    pub async fn store_for(&self, guest: [u8; 32], entry: StreamMessage) -> Result<(), NodeError> {
        let _turn = self.guests.acquire().await.map_err(|_| Ended)?;
        self.write(entry, Some(guest)).await
    }

    /// Lets go of the file, as soon as what is under way has ended, and refuses everything from now on.
    pub fn close(&self) {
        *self.state.lock() = State::Ended;
    }

    async fn write(&self, entry: StreamMessage, guest: Option<[u8; 32]>) -> Result<(), NodeError> {
        let refused = |why: String| NodeError::Refused { doing: "storing the entry", why };
        // The signature covers neither the type of an entry nor its data: S5's registry takes one of another type in place of a newer one.
        if !record::is_pointer(&entry) {
            return Err(refused("only pointers are kept here".into()));
        }
        match self.with(move |db| write(db, &entry, guest)).await? {
            Stored::Done => Ok(()),
            Stored::TooMany => Err(refused(format!("this node keeps at most {OF_A_GUEST} pointers that another one has begun"))),
        }
    }

    /// Works on the database. After an error it may refuse everything until it is opened anew, which the next call does.
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, NodeError> {
        let db = self.open().await?;
        match spawn_blocking(move || work(&db)).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => {
                let mut state = self.state.lock();
                if matches!(&*state, State::Open(_)) {
                    *state = State::Closed;
                }
                Err(self.failed(error))
            }
            Err(_) => Err(Ended.into()),
        }
    }

    async fn open(&self) -> Result<Arc<Database>, NodeError> {
        let deadline = Instant::now() + HAND_OVER;
        loop {
            let turn = match &mut *self.state.lock() {
                State::Open(db) => return Ok(db.clone()),
                State::Ended => return Err(Ended.into()),
                State::Opening => None,
                state => {
                    *state = State::Opening;
                    Some(Turn(self))
                }
            };
            if let Some(turn) = turn {
                match turn.open().await {
                    Ok(db) => return Ok(db),
                    Err(redb::Error::DatabaseAlreadyOpen) => {}
                    Err(error) => return Err(self.failed(error)),
                }
            }
            if Instant::now() >= deadline {
                let why = "another instance of this plugin has it, such as a node that runs".into();
                return Err(NodeError::Peers { doing: "opening the registry", why });
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    fn failed(&self, error: redb::Error) -> NodeError {
        let full = matches!(&error, redb::Error::Io(why) if disk::is_full(why));
        NodeError::Registry { dir: self.dir.clone(), why: error.to_string(), full }
    }
}

/// The turn to open the database. Where it goes without having done so, the next one has it.
struct Turn<'a>(&'a Registry);

impl Turn<'_> {
    async fn open(self) -> Result<Arc<Database>, redb::Error> {
        let dir = self.0.dir.clone();
        let opened = spawn_blocking(move || open(&dir)).await;
        let db = Arc::new(opened.map_err(|error| redb::Error::Io(std::io::Error::other(error)))??);
        let mut state = self.0.state.lock();
        if matches!(&*state, State::Opening) {
            *state = State::Open(db.clone());
        }
        Ok(db)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        if matches!(&*state, State::Opening) {
            *state = State::Closed;
        }
    }
}

fn open(dir: &Path) -> Result<Database, redb::Error> {
    fs::create_dir_all(dir)?;
    let db = Database::create(dir.join("registry.redb")).map_err(|error: DatabaseError| redb::Error::from(error))?;
    let write = db.begin_write()?;
    write.open_table(ENTRIES)?;
    write.open_table(GUESTS)?;
    write.commit()?;
    for folder in [Some(dir), dir.parent()].into_iter().flatten() {
        File::open(folder)?.sync_all()?;
    }
    Ok(db)
}

fn write(db: &Database, entry: &StreamMessage, guest: Option<[u8; 32]>) -> Result<Stored, redb::Error> {
    let place = entry.key.storage_key();
    let write = db.begin_write()?;
    {
        let mut entries = write.open_table(ENTRIES)?;
        let known = entries.get(&*place)?.map(|known| read(known.value())).transpose()?;
        if known.as_ref().is_some_and(|known| known == entry) || !entry.should_store(known.as_ref()) {
            return Ok(Stored::Done);
        }
        if let Some(guest) = guest.filter(|_| known.is_none()) {
            let mut guests = write.open_table(GUESTS)?;
            let begun = guests.get(&guest)?.map_or(0, |begun| begun.value());
            if begun >= OF_A_GUEST {
                return Ok(Stored::TooMany);
            }
            guests.insert(&guest, begun + 1)?;
        }
        entries.insert(&*place, &*entry.serialize())?;
    }
    write.commit()?;
    Ok(Stored::Done)
}

fn read(bytes: &[u8]) -> Result<StreamMessage, redb::Error> {
    StreamMessage::deserialize(Bytes::copy_from_slice(bytes)).map_err(|why| redb::Error::Corrupted(why.to_string()))
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use s5_core::{Hash, RegistryApi};
    use s5_registry_redb::RedbRegistry;

    use super::*;

    fn entry(seed: u64, revision: u64) -> StreamMessage {
        let mut secret = [0; 32];
        secret[..8].copy_from_slice(&seed.to_le_bytes());
        StreamMessage::sign_ed25519_registry(&SigningKey::from_bytes(&secret), record::VAULT, Hash::EMPTY, revision).unwrap()
    }

    #[tokio::test]
    async fn file_is_the_one_of_s5() {
        let dir = tempfile::tempdir().unwrap();
        let theirs = RedbRegistry::open(dir.path()).unwrap();
        theirs.set(entry(1, 5)).await.unwrap();
        drop(theirs);
        let ours = Registry::new(dir.path());
        assert_eq!(ours.entry(&entry(1, 0).key).await.unwrap(), Some(entry(1, 5)));
        assert_eq!(ours.store(entry(1, 4)).await.unwrap(), Some(entry(1, 5)), "an older one is not stored");
        assert_eq!(ours.store(entry(1, 6)).await.unwrap(), Some(entry(1, 6)));
        ours.close();
        assert!(matches!(ours.entry(&entry(1, 0).key).await, Err(NodeError::Ended(_))));
        let theirs = RedbRegistry::open(dir.path()).unwrap();
        assert_eq!(theirs.get(&entry(1, 0).key).await.unwrap(), Some(entry(1, 6)));
    }

    #[tokio::test]
    async fn others_begin_so_many_pointers_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::new(dir.path());
        registry.store_for([1; 32], entry(1, 1)).await.unwrap();
        let counted = |db: &Database| {
            let write = db.begin_write()?;
            write.open_table(GUESTS)?.insert(&[1; 32], OF_A_GUEST)?;
            Ok(write.commit()?)
        };
        registry.with(counted).await.unwrap();
        let refused = registry.store_for([1; 32], entry(2, 1)).await.unwrap_err();
        assert!(refused.to_string().contains("at most 10000 pointers"), "{refused}");
        registry.store_for([1; 32], entry(1, 2)).await.unwrap();
        registry.store_for([2; 32], entry(2, 1)).await.unwrap();
        registry.store(entry(3, 1)).await.unwrap();
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_told_at_once_and_what_is_in_use_is_waited_for_together() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let started = Instant::now();
        Registry::new(&file).entry(&entry(1, 0).key).await.unwrap_err();
        assert!(started.elapsed() < HAND_OVER / 2);

        let first = Registry::new(dir.path());
        first.store(entry(1, 1)).await.unwrap();
        let second = Registry::new(dir.path());
        let key = entry(1, 0).key;
        let asked = futures::future::join_all((0..20).map(|_| second.entry(&key)));
        let (answers, ()) = tokio::join!(asked, async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            first.close();
        });
        assert!(answers.into_iter().all(|answer| answer.unwrap() == Some(entry(1, 1))));
        assert!(started.elapsed() < HAND_OVER);
    }

    #[tokio::test]
    async fn end_waits_for_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let first = Registry::new(dir.path());
        first.store(entry(1, 1)).await.unwrap();
        let second = Registry::new(dir.path());
        let key = entry(1, 0).key;
        let started = Instant::now();
        let (answer, ()) = tokio::join!(second.entry(&key), async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            second.close();
        });
        assert!(matches!(answer, Err(NodeError::Ended(_))), "{answer:?}");
        assert!(started.elapsed() < HAND_OVER / 2);
    }
}
