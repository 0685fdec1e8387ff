//! The storage kind on top of the blobs and the vectors: every step that touches the disk runs on a thread that may block.

use std::sync::Arc;

use blob_folder::{Ended, Id, Store, blocking, kind};
use fabstir_plugin_api::prelude::*;
use tokio::sync::Semaphore;
use tracing::warn;

use crate::vectors::{VectorError, Vectors};

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
    pub(crate) fn new(store: Arc<Store>, vectors: Vectors, searches: usize) -> Self {
        Self { store, vectors: Arc::new(vectors), searches: Semaphore::new(searches), changes: Semaphore::new(CHANGES) }
    }

    /// Works on the vectors in its turn, so that however many wait, they hold no threads.
    async fn with_vectors<T: Send + 'static>(
        &self,
        cx: &Cx,
        turns: &Semaphore,
        work: impl FnOnce(&Vectors, &dyn Fn() -> bool) -> Result<T, VectorError> + Send + 'static,
    ) -> Result<T> {
        let _turn = turns.acquire().await.map_err(|_| VectorError::from(Ended))?;
        let (vectors, cx) = (self.vectors.clone(), cx.clone());
        Ok(blocking(move || work(&vectors, &|| !cx.is_cancelled())).await?)
    }
}

#[async_trait]
impl Lifecycle for Disk {
    async fn shutdown(&self) {
        let vectors = self.vectors.clone();
        if let Err(error) = blocking(move || Ok::<_, VectorError>(vectors.close())).await {
            warn!(%error, "Vectors not closed: the next start makes up for it.");
        }
    }
}

#[async_trait]
impl Storage for Disk {
    async fn put(&self, cx: &Cx, expect: Expect, data: Stream<Blob>) -> Result<Entry> {
        kind::put(&self.store, cx, expect, data).await
    }

    async fn get(&self, _: &Cx, id: String, range: Range) -> Result<Stream<Blob>> {
        let (id, store) = (Id::parse(&id)?, self.store.clone());
        Ok(kind::pieces(blocking(move || store.read(id, range.offset, range.length)).await?))
    }

    async fn head(&self, _: &Cx, id: String) -> Result<Entry> {
        kind::head(&self.store, &id).await
    }

    async fn delete(&self, _: &Cx, id: String) -> Result<bool> {
        kind::delete(&self.store, &id).await
    }

    async fn list(&self, cx: &Cx) -> Result<Stream<Entry>> {
        Ok(kind::list(&self.store, cx))
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
