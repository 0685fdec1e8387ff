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
//! ```
//!
//! - A [`Key`](key::Key) covers the tenant, the model by its digest, and every setting. Tenants never meet.
//! - Only what would come out the same is looked up: at temperature 0, or with a seed. Another client has to ask for it by name.
//! - Only whole answers are kept, and only of the model that the key names.
//! - Another question's answer is given only where the operator has named a model that embeds, and only where the words agree in all that an
//!   answer hangs on: see [`veto`].
//! - Whatever fails here fails to a miss.
//!
//! It serves the node's own HTTP edge alone. Sessions with other nodes are paid by the token that is generated, and posted jobs promise work
//! that can be proved: both go to the scheduler without a look.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::inference::{Chunk, Embed, Generation, Input};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use crate::clock::now_ms;
use crate::config;
use crate::scheduler::{Answer, Refused, Scheduler, ServedModelInfo};

mod flight;
mod key;
mod likeness;
mod metrics;
pub mod store;
#[cfg(test)]
mod tests;
pub mod veto;

use flight::{Begun, Flights, Keep, Reader};
use key::{Identity, Key};
use likeness::Wording;
use metrics::Metrics;
use store::{Fresh, Store};

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
#[derive(Debug, Clone, PartialEq)]
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
    store: Store,
    flights: Arc<Flights>,
    metrics: Metrics,
    ttl: Duration,
    semantic: Option<Semantic>,
}

/// How questions are compared.
#[derive(Clone)]
struct Semantic {
    /// The model that embeds.
    model: String,
    /// The least cosine.
    at_least: f32,
    /// How long a request waits for the vector of its question; past that it goes on without.
    wait: Duration,
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
    pub fn open(config: &config::Cache, data_dir: &std::path::Path, scheduler: Arc<Scheduler>) -> Option<Arc<Cache>> {
        if !config.enabled {
            return None;
        }
        let metrics = Metrics::default();
        let ttl = Duration::from_secs(config.ttl_s);
        let store = Store::open(data_dir, config.max_bytes.0, ttl, metrics.clone());
        let config::Semantic { model, threshold_permille, wait_ms } = &config.semantic;
        let at_least = f32::from(*threshold_permille) / 1000.0;
        let semantic =
            model.as_ref().map(|model| Semantic { model: model.clone(), at_least, wait: Duration::from_millis(*wait_ms) });
        Some(Arc::new(Cache { scheduler, store, flights: Arc::default(), metrics, ttl, semantic }))
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
            let Some((entry, found)) = self.kept(&asked).await else { return Ok(None) };
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
        let identity = of(model);
        let key = Key::new(&identity, model, &request);
        let embedder = self.semantic.as_ref().and_then(|semantic| models.iter().find(|model| model.id == semantic.model));
        let question = embedder.and_then(|embedder| likeness::question(&identity, model, &of(embedder), &request));
        let oldest = wish.max_age.unwrap_or(self.ttl).min(self.ttl);
        let since_ms = now_ms().saturating_sub(oldest.as_millis() as u64);
        Some(Ok(Asked { key, identity, request: Arc::new(request), since_ms, question, wording: Arc::default() }))
    }

    async fn kept(&self, asked: &Asked) -> Option<(Entry, Found)> {
        let age = |entry: &Entry| Duration::from_millis(now_ms().saturating_sub(entry.stored_ms));
        if let Some(entry) = self.store.find(asked.key, asked.since_ms).await {
            let age = age(&entry);
            return Some((entry, Found::Kept { age }));
        }
        let (semantic, wording) = (self.semantic.as_ref()?, self.wording(asked).await?);
        let (entry, similarity) = self.store.alike(wording, semantic.at_least, asked.since_ms).await?;
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
        let _ = tokio::time::timeout(semantic.wait, is_made).await;
        asked.wording.made.get().cloned()
    }

    /// A look into the store, where that is wanted, and else a generation.
    fn beginning(self: &Arc<Self>, cx: Cx, asked: Asked, look: bool) -> flight::Beginning {
        let cache = self.clone();
        Box::pin(async move {
            if !look {
                cache.wording(&asked).await;
            } else if let Some((entry, found)) = cache.kept(&asked).await {
                return Ok(Begun::Kept { entry, found });
            }
            let request = Generation::clone(&asked.request);
            Ok(Begun::Generating(cache.scheduler.generate(cx, request).await?))
        })
    }

    fn keep(&self, asked: &Asked) -> Keep {
        let Asked { key, identity, request, wording, .. } = asked.clone();
        let store = self.store.clone();
        Box::new(move |answer, chunks| {
            // Another plugin may have come in, with another model of the same name.
            if Identity::new(answer.digest(), answer.plugin(), &request.model) != identity {
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

fn of(model: &ServedModelInfo) -> Identity {
    Identity::new(model.digest.as_deref(), &model.plugin, &model.id)
}
