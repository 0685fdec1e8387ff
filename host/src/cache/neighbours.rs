//! The vectors of questions, in the storage plugin that keeps such: the store is the truth, and the plugin finds in it what is near.
//!
//! A task of its own tells the plugin of new questions, and of those whose answers are gone: no request waits for that. Where there is no
//! such plugin, or it fails, nothing is near.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::storage::{Storage, Vector, VectorQuery};
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use super::key::Key;
use super::likeness::Wording;
use super::metrics::Metrics;
use super::store::Store;
use crate::routes::Routes;

/// How many near questions are looked at: of those that are nearer, each asks something else.
const NEAR: u32 = 16;

/// How long the plugin may take over a batch, and how many questions are in one.
const BATCH_TIME: Duration = Duration::from_secs(30);
const BATCH: usize = 64;

/// How long the store may take to say what is to be done.
const STORE: Duration = Duration::from_secs(5);

/// How often what is gone is looked for, and what failed is tried again.
const TEND: Duration = Duration::from_secs(5);

/// Where questions in other words are found.
pub(super) struct Neighbours {
    routes: watch::Receiver<Arc<Routes>>,
    store: Store,
    metrics: Metrics,
    fresh: Notify,
}

/// Why nothing was done.
enum Idle {
    NoPlugin,
    Failed(PluginError),
    Store,
}

impl Neighbours {
    pub fn new(routes: watch::Receiver<Arc<Routes>>, store: Store, metrics: Metrics) -> Arc<Neighbours> {
        Arc::new(Neighbours { routes, store, metrics, fresh: Notify::new() })
    }

    /// The answered questions of the same space that are at least so similar, the likest first, each with its similarity.
    pub async fn near(&self, asked: &Wording, at_least: f32) -> Vec<(Key, f32)> {
        let cx = Cx::new().with_timeout(self.store.look);
        let query = VectorQuery { values: asked.vector.clone(), limit: NEAR, at_least: Some(at_least) };
        let found = self.with(|place| {
            let (cx, query) = (cx.clone(), query.clone());
            async move { place.vectors_find(&cx, namespace(asked.space), query).await }
        });
        let found = tokio::time::timeout(self.store.look, found).await.ok().and_then(Result::ok).unwrap_or_default();
        found.into_iter().filter_map(|near| Some((key(&near.key)?, near.similarity))).collect()
    }

    /// There is a new question in the store.
    pub fn notice(&self) {
        self.fresh.notify_one();
    }

    /// Keeps the plugin up with the store.
    pub async fn tend(self: Arc<Self>) {
        let mut well = true;
        loop {
            let _ = tokio::time::timeout(TEND, self.fresh.notified()).await;
            let told = loop {
                match self.tell().await {
                    Ok(true) => {}
                    Ok(false) => break Ok(()),
                    Err(idle) => break Err(idle),
                }
            };
            match &told {
                Ok(()) if !well => info!("Questions are compared again."),
                Err(Idle::Failed(error)) if well => {
                    warn!(%error, "Questions in other words are not found: their vectors cannot be kept.");
                }
                Err(Idle::NoPlugin) if well && !self.routes.borrow().storage.is_empty() => {
                    warn!("Questions in other words are not found: no storage plugin keeps vectors. storage-disk does.");
                }
                // Plugins are starting; or a store that does not answer has said so itself.
                Err(Idle::NoPlugin | Idle::Store) => continue,
                _ => {}
            }
            well = told.is_ok();
        }
    }

    /// Tells the plugin of some questions, and says whether there may be more.
    async fn tell(&self) -> Result<bool, Idle> {
        let fresh = self.store.ask(STORE, |shelf| shelf.to_place(BATCH)).await.ok_or(Idle::Store)?;
        let gone = self.store.ask(STORE, |shelf| shelf.to_forget(BATCH)).await.ok_or(Idle::Store)?;
        let more = fresh.len() == BATCH || gone.len() == BATCH;
        let cx = || Cx::new().with_timeout(BATCH_TIME);

        let mut spaces: BTreeMap<[u8; 32], Vec<Vector>> = BTreeMap::new();
        for (key, Wording { space, vector, .. }) in fresh {
            let vector = Vector { key: hex::encode(key.0), values: vector, data: Vec::new() };
            spaces.entry(space.0).or_default().push(vector);
        }
        for (space, vectors) in spaces {
            let keys: Vec<Key> = vectors.iter().filter_map(|vector| key(&vector.key)).collect();
            let placed = self.with(|place| {
                let (cx, vectors) = (cx(), vectors.clone());
                async move { place.vectors_put(&cx, namespace(Key(space)), vectors).await }
            });
            match placed.await {
                Ok(()) => drop(self.metrics.questions.inc_by(keys.len() as u64)),
                // It would be refused again.
                Err(Idle::Failed(error)) if error.code == Code::InvalidArgument => warn!(%error, "Vectors were refused."),
                Err(idle) => return Err(idle),
            }
            self.store.ask(STORE, move |shelf| shelf.placed(&keys)).await.ok_or(Idle::Store)?;
        }

        let mut spaces: BTreeMap<[u8; 32], Vec<Key>> = BTreeMap::new();
        gone.into_iter().for_each(|(space, key)| spaces.entry(space.0).or_default().push(key));
        for (space, keys) in spaces {
            let forgotten = self.with(|place| {
                let (cx, keys) = (cx(), keys.iter().map(|key| hex::encode(key.0)).collect());
                async move { place.vectors_delete(&cx, namespace(Key(space)), Some(keys)).await }
            });
            self.metrics.questions_forgotten.inc_by(forgotten.await?);
            self.store.ask(STORE, move |shelf| shelf.forgotten(Key(space), &keys)).await.ok_or(Idle::Store)?;
        }
        Ok(more)
    }

    /// Asks the best storage plugin that keeps vectors.
    async fn with<T, F: Future<Output = Result<T, PluginError>>>(&self, ask: impl Fn(Arc<dyn Storage>) -> F) -> Result<T, Idle> {
        let places: Vec<Arc<dyn Storage>> = self.routes.borrow().storage.iter().map(|route| route.client.clone()).collect();
        for place in places {
            match ask(place).await {
                Err(error) if error.code == Code::Unimplemented => {}
                answer => return answer.map_err(Idle::Failed),
            }
        }
        Err(Idle::NoPlugin)
    }
}

/// The name of a space's vectors. Spaces belong to a tenant, a model and settings, so that vectors of two never lie together.
fn namespace(space: Key) -> String {
    format!("cache-{}", hex::encode(space.0))
}

fn key(text: &str) -> Option<Key> {
    let mut key = [0; 32];
    hex::decode_to_slice(text, &mut key).ok()?;
    Some(Key(key))
}
