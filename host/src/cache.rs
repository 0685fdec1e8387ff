//! Answers that were given before, and answers that several clients wait for at once.
//!
//! ```text
//! gateway --> is it reproducible? --no--> scheduler
//!                     |
//!                    key --> flight: is somebody being told this right now? --yes--> read along
//!                               |
//!                             store: was it said before? --yes--> say it again
//!                               |
//!                          likeness: to a question that means the same? --yes--> say that
//!                               |
//!                           scheduler, and the whole answer into the store
//!
//! neighbours: which questions are near, by a storage plugin that keeps vectors
//! shared: packs of answers in a storage plugin, for the operator's other nodes
//! ```
//!
//! - A [`Key`](key::Key) covers the tenant, the model by its digest, and every setting. Tenants never meet.
//! - Only what would come out the same is looked up: at temperature 0, or with a seed. Another client has to ask for it by name.
//! - Only whole answers are kept, and only of the model that the key names.
//! - Another question's answer is given only where the operator has named a model that embeds, and only where the words agree in all that an
//!   answer hangs on: see [`veto`].
//! - Making a vector takes time. The generation begins meanwhile, and is given up if an answer is found before it has begun to speak.
//! - What other nodes share is fetched in the background. Nobody's request waits for anything but this machine.
//! - Whatever fails here fails to a miss.
//!
//! It serves the node's own HTTP edge alone. Sessions with other nodes are paid by the token that is generated, and posted jobs promise work
//! that can be proved: both go to the scheduler without a look.

use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::inference::{Chunk, Embed, Finish, Generation, Input};
use futures::FutureExt;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use crate::clock::now_ms;
use crate::config;
use crate::identity::{GroupKey, IdentityError};
use crate::routes::Routes;
use crate::scheduler::{Answer, Refused, Scheduler, ServedModelInfo};

mod flight;
mod key;
mod likeness;
mod metrics;
mod neighbours;
mod shared;
pub mod store;
#[cfg(test)]
mod tests;
pub mod veto;

use flight::{Begun, Flights, Keep, Reader};
use key::{Identity, Key};
use likeness::Wording;
use metrics::Metrics;
use neighbours::Neighbours;
use shared::Sharing;
use store::{Fresh, Limits, Store};

/// What a client wants of the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wish {
    /// The answer is not to be kept, nor told to others: `no-store`.
    pub no_store: bool,
    /// The answer is to be generated anew: `no-cache`.
    pub anew: bool,
    /// No answer is to be generated: `only-if-cached`.
    pub only_kept: bool,
    /// How old a kept answer may be: `max-age`.
    pub max_age: Option<Duration>,
    /// An earlier answer will do, although a new one would turn out otherwise.
    pub any_draw: bool,
}

/// Where an answer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// It is generated for this client.
    Miss,
    /// It was being generated when this client came.
    Joined,
    /// It was given before to the same request, so long ago.
    Kept { age: Duration },
    /// It was given before to a question that means the same. The similarity is a cosine in thousandths.
    Alike { age: Duration, permille: u16 },
}

/// An answer that was given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The plugin that gave it.
    pub plugin: String,
    pub stored_ms: u64,
    /// All that was said, as it was said, with [`Chunk::Done`] at its end.
    pub chunks: Vec<Chunk>,
}

/// An answer on its way to a client.
pub struct Telling {
    pub found: Found,
    pub plugin: String,
    source: Source,
    /// Counts the tokens that did not have to be generated for this client.
    saved: Option<Counter>,
}

enum Source {
    Own(Answer),
    Shared(Reader),
}

impl From<Answer> for Telling {
    fn from(answer: Answer) -> Self {
        Self { found: Found::Miss, plugin: answer.plugin().to_owned(), source: Source::Own(answer), saved: None }
    }
}

impl Telling {
    /// The next chunk; `None` after the end. A dropped call loses nothing.
    pub async fn next(&mut self) -> Option<Result<Chunk, Refused>> {
        let mut item = match &mut self.source {
            Source::Own(answer) => answer.next().await,
            Source::Shared(reader) => reader.next().await,
        };
        if let Some(Ok(Chunk::Done(done))) = &mut item
            && let Some(saved) = self.saved.take()
        {
            saved.inc_by(done.usage.completion_tokens.into());
            // No token of the prompt was read for this client.
            done.usage.cached_tokens = done.usage.prompt_tokens;
        }
        item
    }
}

/// The cache of a running node.
pub struct Cache {
    scheduler: Arc<Scheduler>,
    routes: watch::Receiver<Arc<Routes>>,
    store: Store,
    flights: Arc<Flights>,
    metrics: Metrics,
    ttl: Duration,
    semantic: Option<Semantic>,
    /// What is done beside the requests, until the cache is dropped.
    _tasks: Vec<AbortOnDropHandle<()>>,
}

/// How questions are compared.
struct Semantic {
    /// The model that embeds.
    model: String,
    /// The least cosine.
    at_least: f32,
    /// How long an answer that could begin is held back for a look at others.
    wait: Duration,
    neighbours: Arc<Neighbours>,
}

/// How long making one may take. One that comes while the answer is generated is kept with it.
const EMBED: Duration = Duration::from_secs(10);

/// A request that may be answered from the cache.
#[derive(Clone)]
struct Asked {
    key: Key,
    identity: Identity,
    request: Arc<Generation>,
    /// The oldest that will do, as Unix time in milliseconds.
    since_ms: u64,
    /// The space and the question, where others may be alike.
    question: Option<(Key, String)>,
    wording: Arc<Worded>,
}

/// A question with its vector, once that is made.
#[derive(Default)]
struct Worded {
    made: OnceLock<Wording>,
    /// What makes it, until nobody waits for the answer any more.
    making: OnceLock<AbortOnDropHandle<()>>,
}

impl Cache {
    /// Opens the cache of a data folder; `None` where the configuration wants none. A store that cannot be used is set aside or done without.
    ///
    /// # Errors
    /// The key that nodes share answers by can be neither read nor made.
    pub fn open(
        config: &config::Cache,
        data_dir: &std::path::Path,
        scheduler: Arc<Scheduler>,
        routes: watch::Receiver<Arc<Routes>>,
    ) -> Result<Option<Arc<Cache>>, IdentityError> {
        if !config.enabled {
            if Store::is_there(data_dir) {
                tracing::info!(
                    "The cache is off; answers of an earlier time are still on the disk. `fabstir-node cache flush` removes them."
                );
            }
            return Ok(None);
        }
        let metrics = Metrics::default();
        let ttl = Duration::from_secs(config.ttl_s);
        let limits = Limits { max_bytes: config.max_bytes.0, ttl, look: Duration::from_millis(config.look_ms) };
        let store = Store::open(data_dir, limits, metrics.clone());
        let mut tasks = Vec::new();
        let mut task = |task| tasks.push(AbortOnDropHandle::new(tokio::spawn(task)));
        let neighbours = Neighbours::new(routes.clone(), store.clone(), metrics.clone());
        let config::Semantic { model, threshold_permille, wait_ms } = &config.semantic;
        let semantic = model.as_ref().map(|model| Semantic {
            model: model.clone(),
            at_least: f32::from(*threshold_permille) / 1000.0,
            wait: Duration::from_millis(*wait_ms),
            neighbours: neighbours.clone(),
        });
        if semantic.is_some() {
            task(neighbours.clone().tend().boxed());
        }
        let config::Shared { storage, key_file, every_s } = &config.shared;
        if let Some(plugin) = storage {
            let key = GroupKey::load_or_create(key_file.as_deref().unwrap_or(&data_dir.join("cache").join("shared.key")))?;
            let every = Duration::from_secs(*every_s);
            let sharing = Sharing {
                plugin: plugin.clone(),
                key,
                every,
                ttl,
                routes: routes.clone(),
                store: store.clone(),
                neighbours,
                metrics: metrics.clone(),
            };
            task(sharing.run().boxed());
        }
        Ok(Some(Arc::new(Cache { scheduler, routes, store, flights: Arc::default(), metrics, ttl, semantic, _tasks: tasks })))
    }

    /// Shows the cache's metrics in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
    }

    /// Answers a request: as it was answered before, along with others, or by a generation. `None` where only a kept answer was wanted, and
    /// there is none.
    ///
    /// # Errors
    /// Those of [`Scheduler::generate`].
    pub async fn answer(self: &Arc<Self>, cx: Cx, request: Generation, wish: Wish) -> Result<Option<Telling>, Refused> {
        let Some(asked) = self.asked(request, wish) else { return Ok(None) };
        let asked = match asked {
            Ok(asked) => asked,
            Err(request) => return Ok(Some(self.scheduler.generate(cx, request).await?.into())),
        };
        self.metrics.lookups.inc();
        if wish.only_kept {
            let found = match self.exact(&asked).await {
                None => self.alike(&asked).await,
                exact => exact,
            };
            let Some((entry, found)) = found else { return Ok(None) };
            let plugin = entry.plugin.clone();
            let kept = async move { Ok(Begun::Kept { entry, found }) };
            let reader = flight::alone(Box::pin(kept), Box::new(|_, _| {}));
            return Ok(Some(self.told(reader, plugin, found)));
        }
        // What one client wants anew or young is not what others ask for.
        if wish.anew || wish.max_age.is_some() {
            let mut reader = flight::alone(self.beginning(cx, asked.clone(), !wish.anew), self.keep(&asked));
            let (plugin, found) = reader.begun().await?;
            return Ok(Some(self.told(reader, plugin, found)));
        }
        let mut tried = false;
        loop {
            let (mut reader, first) =
                self.flights.join(asked.key, || (self.beginning(cx.clone(), asked.clone(), true), self.keep(&asked)));
            match reader.begun().await {
                Ok((plugin, Found::Miss)) if !first => return Ok(Some(self.told(reader, plugin, Found::Joined))),
                Ok((plugin, found)) => return Ok(Some(self.told(reader, plugin, found))),
                // What went wrong for another need not go wrong for this one, whose time is not up yet.
                Err(_) if !first && !tried => tried = true,
                Err(refused) => return Err(refused),
            }
        }
    }

    /// What is looked up for a request. The request itself where it is none for the cache; `None` where no other answer was wanted.
    fn asked(&self, request: Generation, wish: Wish) -> Option<Result<Asked, Generation>> {
        let reproducible = request.sampling.temperature == 0.0 || request.sampling.seed.is_some() || wish.any_draw;
        let models = self.scheduler.models();
        let model = models.iter().find(|model| model.id == request.model);
        let Some(model) = model.filter(|_| reproducible && !wish.no_store) else {
            return (!wish.only_kept).then_some(Err(request));
        };
        let of =
            |model: &ServedModelInfo| Identity::new(model.digest.as_deref(), &model.plugin, &model.id, &self.routes.borrow());
        let identity = of(model);
        let key = Key::new(&identity, model, &request);
        let embedder = self.semantic.as_ref().and_then(|semantic| models.iter().find(|model| model.id == semantic.model));
        let question = embedder.and_then(|embedder| likeness::question(&identity, model, &of(embedder), &request));
        let oldest = wish.max_age.unwrap_or(self.ttl).min(self.ttl);
        let since_ms = now_ms().saturating_sub(oldest.as_millis() as u64);
        Some(Ok(Asked { key, identity, request: Arc::new(request), since_ms, question, wording: Arc::default() }))
    }

    /// The answer that was given to the same request.
    async fn exact(&self, asked: &Asked) -> Option<(Entry, Found)> {
        let entry = self.store.find(asked.key, asked.since_ms).await?;
        let age = age(&entry);
        Some((entry, Found::Kept { age }))
    }

    /// The answer that was given to a question that means the same. Takes as long as a vector takes to be made.
    async fn alike(&self, asked: &Asked) -> Option<(Entry, Found)> {
        let semantic = self.semantic.as_ref()?;
        let wording = self.wording(asked).await?;
        let near = semantic.neighbours.near(&wording, semantic.at_least).await;
        if near.is_empty() {
            return None;
        }
        let (entry, similarity) = self.store.alike(near, wording, asked.since_ms).await?;
        let age = age(&entry);
        // A hair more than 1 comes of rounding.
        Some((entry, Found::Alike { age, permille: (similarity * 1000.0).clamp(0.0, 1000.0) as u16 }))
    }

    /// The question with its vector, where it has one and a slot is free to make it.
    async fn wording(&self, asked: &Asked) -> Option<Wording> {
        let (semantic, (space, text)) = (self.semantic.as_ref()?, asked.question.clone()?);
        if let Some(made) = asked.wording.made.get() {
            return Some(made.clone());
        }
        if self.scheduler.free(&semantic.model) == 0 {
            return None;
        }
        let embed = Embed { model: semantic.model.clone(), inputs: vec![Input::Text(text.clone())] };
        let (scheduler, worded) = (self.scheduler.clone(), Arc::downgrade(&asked.wording));
        let (made, is_made) = oneshot::channel();
        let making = tokio::spawn(async move {
            let embedded = scheduler.embed(Cx::new().with_timeout(EMBED), embed).await;
            if let (Ok(mut embedded), Some(worded)) = (embedded, worded.upgrade())
                && let Some(vector) = embedded.vectors.pop()
            {
                worded.made.get_or_init(|| Wording { space, text, vector });
            }
            // Who has gone on without is not told.
            let _ = made.send(());
        });
        // A second try for the same request finds the first one's work.
        let _ = asked.wording.making.set(AbortOnDropHandle::new(making));
        let _ = is_made.await;
        asked.wording.made.get().cloned()
    }

    /// A look into the store, where that is wanted, and else a generation.
    fn beginning(self: &Arc<Self>, cx: Cx, asked: Asked, look: bool) -> flight::Beginning {
        let cache = self.clone();
        Box::pin(async move {
            if look && let Some((entry, found)) = cache.exact(&asked).await {
                return Ok(Begun::Kept { entry, found });
            }
            let semantic = cache.semantic.as_ref().filter(|_| asked.question.is_some());
            let request = Generation::clone(&asked.request);
            let Some(semantic) = semantic else {
                return Ok(Begun::Generating(cache.scheduler.generate(cx, request).await?, None));
            };
            let generation = async {
                let mut answer = cache.scheduler.generate(cx, request).await?;
                let first = answer.next().await;
                Ok(Begun::Generating(answer, first))
            };
            let alike = async { if look { cache.alike(&asked).await } else { cache.wording(&asked).await.and(None) } };
            let latest = Instant::now() + semantic.wait;
            let (mut generation, mut alike) = (pin!(generation), pin!(alike));
            tokio::select! {
                biased;
                found = &mut alike => match found {
                    Some((entry, found)) => Ok(Begun::Kept { entry, found }),
                    None => generation.await,
                },
                begun = &mut generation => match timeout_at(latest, alike).await {
                    Ok(Some((entry, found))) => Ok(Begun::Kept { entry, found }),
                    _ => begun,
                },
            }
        })
    }

    fn keep(&self, asked: &Asked) -> Keep {
        let Asked { key, identity, request, wording, .. } = asked.clone();
        let (store, neighbours) = (self.store.clone(), self.semantic.as_ref().map(|semantic| semantic.neighbours.clone()));
        let routes = self.routes.clone();
        Box::new(move |answer, chunks| {
            // Another plugin may have come in, with another model of the same name.
            let same = Identity::new(answer.digest(), answer.plugin(), &request.model, &routes.borrow()) == identity;
            let whole = matches!(chunks.last(), Some(Chunk::Done(done)) if matches!(done.finish, Finish::Stop | Finish::Length));
            if !same || !whole {
                return;
            }
            let entry = Entry { plugin: answer.plugin().to_owned(), stored_ms: now_ms(), chunks: chunks.to_vec() };
            store.keep(Fresh {
                key,
                tenant: request.cache_salt.clone(),
                model: request.model.clone(),
                entry,
                wording: wording.made.get().cloned(),
            });
            if let Some(neighbours) = neighbours {
                neighbours.notice();
            }
        })
    }

    fn told(&self, reader: Reader, plugin: String, found: Found) -> Telling {
        match found {
            Found::Miss => {}
            Found::Joined => self.metrics.hit("flight"),
            Found::Kept { .. } => self.metrics.hit("exact"),
            Found::Alike { .. } => self.metrics.hit("semantic"),
        }
        let saved = (found != Found::Miss).then(|| self.metrics.tokens_saved.clone());
        Telling { found, plugin, source: Source::Shared(reader), saved }
    }
}

fn age(entry: &Entry) -> Duration {
    Duration::from_millis(now_ms().saturating_sub(entry.stored_ms))
}
