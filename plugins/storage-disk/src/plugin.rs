//! The storage kind on top of the store and the vectors: every step that touches the disk runs on a thread that may block.

use std::sync::Arc;

use fabstir_plugin_api::prelude::*;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tracing::warn;

use crate::error::StoreError;
use crate::store::{Found, Id, Incoming, Store};
use crate::vectors::{VectorError, Vectors};

/// Small pieces of a put are gathered up to this size, so that a trip to another thread is paid once for many.
const GATHER: usize = 256 << 10;

/// Pieces that a get reads ahead of its consumer.
const READ_AHEAD: usize = 2;

/// Changes of vectors that may be under way: while one is forced to the disk, another may bring its index up to date.
const CHANGES: usize = 2;

/// Blobs and vectors in a folder, as a storage plugin.
pub struct Disk {
    store: Arc<Store>,
    vectors: Arc<Vectors>,
    searches: Semaphore,
    changes: Semaphore,
}

impl Disk {
    pub(crate) fn new(store: Store, vectors: Vectors, searches: usize) -> Self {
        Self {
            store: Arc::new(store),
            vectors: Arc::new(vectors),
            searches: Semaphore::new(searches),
            changes: Semaphore::new(CHANGES),
        }
    }

    /// Works on the vectors in its turn, so that however many wait, they hold no threads.
    async fn with_vectors<T: Send + 'static>(
        &self,
        cx: &Cx,
        turns: &Semaphore,
        work: impl FnOnce(&Vectors, &dyn Fn() -> bool) -> Result<T, VectorError> + Send + 'static,
    ) -> Result<T> {
        let _turn = turns.acquire().await.map_err(|_| PluginError::unavailable("the plugin is shutting down"))?;
        let (vectors, cx) = (self.vectors.clone(), cx.clone());
        blocking(move || work(&vectors, &|| !cx.is_cancelled())).await
    }
}

#[async_trait]
impl Lifecycle for Disk {
    async fn shutdown(&self) {
        let vectors = self.vectors.clone();
        if let Err(error) = blocking(move || Ok::<_, StoreError>(vectors.close())).await {
            warn!(%error, "Vectors not closed: the next start makes up for it.");
        }
    }
}

#[async_trait]
impl Storage for Disk {
    async fn put(&self, cx: &Cx, expect: Expect, mut data: Stream<Blob>) -> Result<Entry> {
        let id = expect.id.as_deref().map(Id::parse).transpose()?;
        let store = self.store.clone();
        let mut put = Put(Some(blocking(move || store.begin(id, expect.size)).await?));
        let (mut gathered, mut bytes) = (Vec::<Blob>::new(), 0);
        loop {
            let piece = data.next().await.transpose()?;
            let last = piece.is_none();
            bytes += piece.as_ref().map_or(0, |piece| piece.len());
            gathered.extend(piece);
            if last || bytes >= GATHER {
                bytes = 0;
                let pieces = std::mem::take(&mut gathered);
                put = put.step(move |incoming| pieces.iter().try_for_each(|piece| incoming.write(piece))).await?;
            }
            if last {
                break;
            }
        }
        let cx = cx.clone();
        let stored = blocking(move || put.take().commit(|| !cx.is_cancelled())).await?;
        Ok(entry(stored))
    }

    async fn get(&self, _: &Cx, id: String, range: Range) -> Result<Stream<Blob>> {
        let id = Id::parse(&id)?;
        let store = self.store.clone();
        let mut reader = blocking(move || store.read(&id, range.offset, range.length)).await?;
        // Pieces are large, so fewer of them wait for a slow consumer than in a stream of tokens.
        let (sender, stream) = Stream::channel(READ_AHEAD);
        tokio::spawn(async move {
            loop {
                let step = blocking(move || reader.next_piece().map(|piece| (piece, reader))).await;
                match step {
                    Ok((Some(piece), rest)) => {
                        reader = rest;
                        if sender.send(Blob::from(piece)).await.is_err() {
                            return;
                        }
                    }
                    Ok((None, _)) => return,
                    Err(error) => {
                        warn!(%error, "Read failed.");
                        return sender.fail(error).await;
                    }
                }
            }
        });
        Ok(stream)
    }

    async fn head(&self, _: &Cx, id: String) -> Result<Entry> {
        let id = Id::parse(&id)?;
        let store = self.store.clone();
        blocking(move || store.size(&id).map(|size| entry(Found { id, size }))).await
    }

    async fn delete(&self, _: &Cx, id: String) -> Result<bool> {
        let id = Id::parse(&id)?;
        let store = self.store.clone();
        blocking(move || store.delete(&id)).await
    }

    async fn list(&self, cx: &Cx) -> Result<Stream<Entry>> {
        let store = self.store.clone();
        let mut shards = blocking(move || store.shards()).await?;
        let (sender, stream) = cx.stream();
        tokio::spawn(async move {
            loop {
                match blocking(move || shards.next_shard().map(|blobs| (blobs, shards))).await {
                    Ok((Some(blobs), rest)) => {
                        shards = rest;
                        for blob in blobs {
                            if sender.send(entry(blob)).await.is_err() {
                                return;
                            }
                        }
                    }
                    Ok((None, _)) => return,
                    Err(error) => return sender.fail(error).await,
                }
            }
        });
        Ok(stream)
    }

    async fn vectors_put(&self, cx: &Cx, namespace: String, vectors: Vec<Vector>) -> Result<()> {
        self.with_vectors(cx, &self.changes, move |all, still_wanted| all.put(&namespace, vectors, still_wanted)).await
    }

    async fn vectors_find(&self, cx: &Cx, namespace: String, query: VectorQuery) -> Result<Vec<Near>> {
        self.with_vectors(cx, &self.searches, move |all, still_wanted| all.find(&namespace, query, still_wanted)).await
    }

    async fn vectors_delete(&self, cx: &Cx, namespace: String, keys: Option<Vec<String>>) -> Result<u64> {
        self.with_vectors(cx, &self.changes, move |all, still_wanted| all.delete(&namespace, keys.as_deref(), still_wanted)).await
    }
}

/// A put between two steps. Where it is dropped unfinished, its file is removed, and that too may block.
struct Put(Option<Incoming>);

impl Put {
    fn take(mut self) -> Incoming {
        self.0.take().expect("a put is taken once, by a method that consumes it")
    }

    async fn step(self, work: impl FnOnce(&mut Incoming) -> Result<(), StoreError> + Send + 'static) -> Result<Self> {
        blocking(move || {
            let mut incoming = self.take();
            work(&mut incoming).map(|()| Self(Some(incoming)))
        })
        .await
    }
}

impl Drop for Put {
    fn drop(&mut self) {
        if let Some(incoming) = self.0.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn_blocking(move || drop(incoming));
        }
    }
}

fn entry(found: Found) -> Entry {
    Entry { id: found.id.as_str().to_owned(), size: found.size }
}

/// Runs work that blocks on a thread that may.
pub(crate) async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T>
where
    T: Send + 'static,
    E: Send + 'static,
    PluginError: From<E>,
{
    match spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(stopped) if stopped.is_panic() => std::panic::resume_unwind(stopped.into_panic()),
        Err(_) => Err(PluginError::unavailable("the plugin is shutting down")),
    }
}
