//! What other nodes may see and write.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use iroh::endpoint::Connection;
use iroh::protocol::{AcceptError, ProtocolHandler, Router, RouterBuilder};
use parking_lot::Mutex;
use s5_blobs::{ALPN_ACL, ALPN_PUBLIC, BlobAcl, BlobsServer, ServerMode};
use s5_core::blob::{BlobLocation, BlobStore, paths};
use s5_core::store::{Store as S5Store, StoreFeatures, StoreResult};
use s5_core::{Hash, StreamKey};
use s5_registry::{BroadcastingRegistry, RegistryAcl, RegistryServer};
use s5_store_local::LocalStore;
use tokio::sync::Semaphore;
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;
use tracing::warn;

use crate::config::Settings;
use crate::registry::Registry;
use crate::store::{Id, Store, is_whole};

/// Connections that one protocol serves at once.
const CONNECTIONS: usize = 256;

/// Files that are read through at once before they are served.
const CHECKS: usize = 2;

/// Files that are remembered as checked.
const REMEMBERED: usize = 100_000;

/// Opens the doors that the operator wants open. With none, whoever knocks is turned away.
pub fn serve(mut router: RouterBuilder, settings: &Settings, store: &Arc<Store>, registry: &Arc<Registry>) -> Router {
    let guests = Arc::new(Guests { public: settings.serve_public, allow: settings.allow.clone() });
    let window = BlobStore::without_outboard(Window::new(store.clone()));
    let me = *router.endpoint().id().as_bytes();
    // Without a configuration of peers nobody may upload, pin or delete.
    let blobs = BlobsServer::new(HashMap::from([("kept".into(), window)]), HashMap::new(), None)
        .with_acl(guests.clone())
        .with_local_iroh_pubkey(me);
    if settings.serve_public {
        router = router.accept(ALPN_PUBLIC, Limited::new(blobs.clone().with_mode(ServerMode::Public)));
    }
    if !settings.allow.is_empty() {
        router = router.accept(ALPN_ACL, Limited::new(blobs.with_mode(ServerMode::Acl)));
    }
    if settings.serve_public || !settings.allow.is_empty() {
        let entries = RegistryServer::with_acl(BroadcastingRegistry::wrap(registry.clone()), guests);
        router = router.accept(s5_registry::ALPN, Limited::new(entries));
    }
    router.spawn()
}

/// Who may do what.
#[derive(Debug)]
struct Guests {
    public: bool,
    allow: HashSet<[u8; 32]>,
}

#[async_trait]
impl BlobAcl for Guests {
    async fn allow_public_read(&self, _: &Hash) -> bool {
        self.public
    }

    async fn allow_acl_read(&self, guest: &[u8; 32], _: &Hash) -> bool {
        self.allow.contains(guest)
    }

    async fn allow_acl_principal(&self, guest: &[u8; 32]) -> bool {
        self.allow.contains(guest)
    }
}

#[async_trait]
impl RegistryAcl for Guests {
    async fn allow_read(&self, guest: &[u8; 32], _: &StreamKey) -> bool {
        self.public || self.allow.contains(guest)
    }

    async fn allow_write(&self, guest: &[u8; 32], _: &StreamKey) -> bool {
        self.allow.contains(guest)
    }
}

/// A protocol that serves some connections and no more.
#[derive(Debug)]
struct Limited<P> {
    protocol: P,
    places: Semaphore,
}

impl<P> Limited<P> {
    fn new(protocol: P) -> Self {
        Self { protocol, places: Semaphore::new(CONNECTIONS) }
    }
}

impl<P: ProtocolHandler> ProtocolHandler for Limited<P> {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        let Ok(_place) = self.places.try_acquire() else {
            connection.close(1u32.into(), b"busy");
            return Ok(());
        };
        // The server has several lines for each question that anybody asks: a stranger could fill the log.
        self.protocol.accept(connection).with_subscriber(NoSubscriber::new()).await
    }

    async fn shutdown(&self) {
        self.protocol.shutdown().await;
    }
}

/// The store as other nodes see it: they change nothing, and what is damaged is not there.
///
/// A file is read through once before anybody gets a byte of it, and once more where it has changed since.
#[derive(Debug)]
struct Window {
    local: LocalStore,
    store: Arc<Store>,
    checked: Mutex<HashMap<Hash, Stamp>>,
    turns: Semaphore,
}

/// What changes with a file, whoever changes it.
type Stamp = (u64, u64, i64, i64);

impl Window {
    fn new(store: Arc<Store>) -> Self {
        let local = LocalStore::new(store.root());
        Self { local, store, checked: Mutex::default(), turns: Semaphore::new(CHECKS) }
    }

    /// Whether a blob is there, and is what it should be.
    async fn is_sound(&self, path: &str) -> StoreResult<bool> {
        let Some(hash) = paths::hash_from_blob_path(path, &self.features())? else { return Ok(false) };
        let file = self.store.path(Id(hash));
        let Ok(found) = tokio::fs::metadata(&file).await else { return Ok(false) };
        let stamp = (found.ino(), found.len(), found.ctime(), found.ctime_nsec());
        if self.checked.lock().get(&hash) == Some(&stamp) {
            return Ok(true);
        }
        let _turn = self.turns.acquire().await?;
        let check = move || {
            let whole = is_whole(&file, Id(hash));
            if matches!(whole, Ok(false)) {
                warn!(blob = %Id(hash), "A kept blob is damaged, and is not served.");
            }
            whole
        };
        let sound = tokio::task::spawn_blocking(check).await??;
        if sound {
            let mut checked = self.checked.lock();
            if checked.len() >= REMEMBERED {
                checked.clear();
            }
            checked.insert(hash, stamp);
        }
        Ok(sound)
    }

    async fn only_sound(&self, path: &str) -> StoreResult<()> {
        ensure!(self.is_sound(path).await?, "no such blob");
        Ok(())
    }
}

fn read_only() -> anyhow::Error {
    anyhow!("blobs come in by the node alone")
}

type Pieces<T> = Box<dyn Stream<Item = Result<T, std::io::Error>> + Send + Unpin + 'static>;

#[async_trait]
impl S5Store for Window {
    fn features(&self) -> StoreFeatures {
        self.local.features()
    }

    async fn exists(&self, path: &str) -> StoreResult<bool> {
        self.is_sound(path).await
    }

    async fn size(&self, path: &str) -> StoreResult<u64> {
        self.only_sound(path).await?;
        self.local.size(path).await
    }

    async fn open_read_stream(&self, path: &str, offset: u64, max_len: Option<u64>) -> StoreResult<Pieces<Bytes>> {
        self.only_sound(path).await?;
        self.local.open_read_stream(path, offset, max_len).await
    }

    async fn open_read_bytes(&self, path: &str, offset: u64, max_len: Option<u64>) -> StoreResult<Bytes> {
        self.only_sound(path).await?;
        self.local.open_read_bytes(path, offset, max_len).await.context("a kept blob cannot be read")
    }

    async fn list(&self) -> StoreResult<Pieces<String>> {
        bail!("blobs are not listed for others")
    }

    async fn provide(&self, _: &str) -> StoreResult<Vec<BlobLocation>> {
        Ok(Vec::new())
    }

    async fn put_stream(&self, _: &str, _: Pieces<Bytes>) -> StoreResult<()> {
        Err(read_only())
    }

    async fn put_bytes(&self, _: &str, _: Bytes) -> StoreResult<()> {
        Err(read_only())
    }

    async fn delete(&self, _: &str) -> StoreResult<()> {
        Err(read_only())
    }

    async fn rename(&self, _: &str, _: &str) -> StoreResult<()> {
        Err(read_only())
    }
}
