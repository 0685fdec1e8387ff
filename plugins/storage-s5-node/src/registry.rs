//! The entries that are kept here: S5's registry in a database file, and what it does not refuse by itself.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::ensure;
use async_trait::async_trait;
use s5_core::{MessageType, RegistryApi, StreamKey, StreamMessage};
use s5_registry_redb::RedbRegistry;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use crate::error::{NodeError, is_full};

/// How long an instance waits for one that is about to end, as where one version takes over from another.
const HAND_OVER: Duration = Duration::from_secs(10);

/// The registry of this node. Nothing is opened before it is used.
#[derive(Debug)]
pub struct Registry {
    dir: PathBuf,
    open: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Closed,
    Open(RedbRegistry),
    Ended,
}

impl Registry {
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), open: Mutex::new(State::Closed) }
    }

    /// The entry of a key.
    pub async fn entry(&self, key: &StreamKey) -> Result<Option<StreamMessage>, NodeError> {
        self.get(key).await.map_err(|error| self.failed(&error))
    }

    /// Stores an entry unless one that is not older is there, and gives back what is there now.
    pub async fn store(&self, entry: StreamMessage) -> Result<Option<StreamMessage>, NodeError> {
        let key = entry.key;
        self.set(entry).await.map_err(|error| self.failed(&error))?;
        self.entry(&key).await
    }

    /// Lets go of the file, as soon as what is under way has ended, and refuses everything from now on.
    pub async fn close(&self) {
        *self.open.lock().await = State::Ended;
    }

    async fn redb(&self) -> anyhow::Result<RedbRegistry> {
        let mut open = self.open.lock().await;
        match &*open {
            State::Open(redb) => return Ok(redb.clone()),
            State::Ended => return Err(NodeError::Ended.into()),
            State::Closed => {}
        }
        let deadline = Instant::now() + HAND_OVER;
        loop {
            let dir = self.dir.clone();
            let opened =
                spawn_blocking(move || std::fs::create_dir_all(&dir).map_err(Into::into).and_then(|()| RedbRegistry::open(&dir)));
            match opened.await? {
                Ok(redb) => {
                    *open = State::Open(redb.clone());
                    return Ok(redb);
                }
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// After a failed read or write the database may refuse everything until it is opened anew, which the next call does.
    async fn reopen_after<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        if result.is_err() {
            let mut open = self.open.lock().await;
            if matches!(&*open, State::Open(_)) {
                *open = State::Closed;
            }
        }
        result
    }

    fn failed(&self, error: &anyhow::Error) -> NodeError {
        if matches!(error.downcast_ref(), Some(NodeError::Ended)) {
            return NodeError::Ended;
        }
        let full = error.chain().any(|cause| cause.downcast_ref().is_some_and(is_full));
        NodeError::Registry { dir: self.dir.clone(), why: format!("{error:#}"), full }
    }
}

#[async_trait]
impl RegistryApi for Registry {
    async fn get(&self, key: &StreamKey) -> anyhow::Result<Option<StreamMessage>> {
        let redb = self.redb().await?;
        self.reopen_after(redb.get(key).await).await
    }

    async fn set(&self, message: StreamMessage) -> anyhow::Result<()> {
        // The type is not signed, and S5's registry takes an entry of the other type in place of a newer one.
        ensure!(message.type_id == MessageType::Registry, "only entries of the registry are stored here");
        // Nobody signs the others.
        ensure!(matches!(message.key, StreamKey::Vault { .. }), "only entries under a public key are stored here");
        let redb = self.redb().await?;
        self.reopen_after(redb.set(message).await).await
    }

    async fn delete(&self, _: &StreamKey) -> anyhow::Result<()> {
        anyhow::bail!("entries are not deleted here: a deleted one could be followed by an older one")
    }
}
