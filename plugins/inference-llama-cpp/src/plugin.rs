//! The inference trait over engines: one per model, loaded and unloaded on demand.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fabstir_plugin_api::prelude::*;
use tokio::sync::watch;

use crate::config::{Config, ModelConfig};
use crate::digest::{Digests, Files};
use crate::engine::Engine;
use crate::error::Error;
use crate::metrics::{Counters, Metrics};
use crate::sink::StreamSink;

/// An instance: the configured models and those of them that are loaded.
pub struct LlamaCpp {
    models: Vec<Arc<Entry>>,
    metrics: Metrics,
    digests: Arc<Digests>,
}

/// A configured model.
struct Entry {
    config: ModelConfig,
    /// The file's size when the instance started.
    bytes: Option<u64>,
    state: Mutex<State>,
}

enum State {
    Unloaded,
    Loading(Arc<Loading>),
    Loaded(Ready),
}

/// A model that can be used.
#[derive(Clone)]
struct Ready {
    engine: Arc<Engine>,
    digest: Arc<str>,
}

/// A load that one or several calls wait for.
struct Loading {
    percent: AtomicU8,
    /// The model is in memory, and its files are read for their digest.
    hashing: AtomicBool,
    waiting: AtomicUsize,
    /// Nobody waits any more, or the model is to be unloaded.
    abandoned: AtomicBool,
    /// The model is to be unloaded: those who wait do not start over.
    unloaded: AtomicBool,
    outcome: watch::Sender<Option<Result<Ready, Error>>>,
}

impl Loading {
    /// Notes how far the load is. `false` when nobody waits for it any more.
    fn tell(&self, share: f32) -> bool {
        self.percent.store((share * 100.0) as u8, Ordering::Relaxed);
        !self.abandoned.load(Ordering::Acquire)
    }

    /// Stops the load at its next step and sends those away who wait for it.
    fn unload(&self) {
        self.unloaded.store(true, Ordering::Release);
        self.abandoned.store(true, Ordering::Release);
    }
}

/// One call that waits for a load. The last one to go takes the load with it.
struct Waiter(Arc<Loading>);

impl Waiter {
    fn new(loading: &Arc<Loading>) -> Self {
        loading.waiting.fetch_add(1, Ordering::AcqRel);
        Self(loading.clone())
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if self.0.waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.abandoned.store(true, Ordering::Release);
        }
    }
}

impl Entry {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine, if it is loaded and works.
    fn engine(&self) -> Option<Arc<Engine>> {
        match &*self.state() {
            State::Loaded(ready) if ready.engine.is_open() => Some(ready.engine.clone()),
            _ => None,
        }
    }

    /// Loads the model. Blocks for as long as that takes.
    fn load(&self, loading: &Arc<Loading>, counters: Counters, digests: &Digests) -> Result<Ready, Error> {
        let files = Files::of(&self.config.path)?;
        let told = loading.clone();
        let engine = Engine::load_counted(&self.config, counters, move |share| told.tell(share))?;
        // Only now: the files of a model that does not fit are not worth reading, and those of one that does are in the page cache.
        loading.percent.store(0, Ordering::Relaxed);
        loading.hashing.store(true, Ordering::Relaxed);
        let digest = digests.digest(&files, |share| loading.tell(share))?;
        Ok(Ready { engine: Arc::new(engine), digest: digest.into() })
    }

    fn loaded(&self, ready: &Ready) -> Loaded {
        let info = ready.engine.info();
        Loaded {
            model: self.config.id.clone(),
            context: info.context,
            parallel: info.parallel,
            memory: info.memory,
            load_ms: info.load_time.as_millis() as u64,
            digest: Some(ready.digest.to_string()),
            generates: ready.engine.generates(),
        }
    }
}

impl LlamaCpp {
    pub(crate) fn new(config: Config, metrics: Metrics, state_dir: &Path) -> Self {
        let entry = |config: ModelConfig| {
            let bytes = fs::metadata(&config.path).ok().map(|metadata| metadata.len());
            Arc::new(Entry { config, bytes, state: Mutex::new(State::Unloaded) })
        };
        Self { models: config.models.into_iter().map(entry).collect(), metrics, digests: Arc::new(Digests::new(state_dir)) }
    }

    fn entry(&self, model: &str) -> Result<&Arc<Entry>, Error> {
        self.models.iter().find(|entry| entry.config.id == model).ok_or_else(|| Error::Unknown(model.to_owned()))
    }

    fn engine(&self, model: &str) -> Result<Arc<Engine>, Error> {
        self.entry(model)?.engine().ok_or_else(|| Error::NotLoaded(model.to_owned()))
    }

    /// Joins the load that runs, or starts one; or hands over what is there.
    fn join_load(&self, entry: &Arc<Entry>) -> Result<Ready, Waiter> {
        let mut state = entry.state();
        match &*state {
            State::Loaded(ready) if ready.engine.is_open() => return Ok(ready.clone()),
            State::Loading(loading) => return Err(Waiter::new(loading)),
            State::Loaded(_) | State::Unloaded => {}
        }
        let loading = Arc::new(Loading {
            percent: AtomicU8::new(0),
            hashing: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            abandoned: AtomicBool::new(false),
            unloaded: AtomicBool::new(false),
            outcome: watch::Sender::new(None),
        });
        *state = State::Loading(loading.clone());
        let waiter = Waiter::new(&loading);
        let (entry, counters, digests) = (entry.clone(), self.metrics.of(&entry.config.id), self.digests.clone());
        tokio::task::spawn_blocking(move || {
            let loaded = entry.load(&loading, counters, &digests);
            let outcome = {
                // `unload` looks for a load and stops it under the same lock, so none slips through between.
                let mut state = entry.state();
                let wanted = !loading.abandoned.load(Ordering::Acquire);
                let outcome = if wanted { loaded } else { Err(Error::Abandoned) };
                *state = match &outcome {
                    Ok(ready) => State::Loaded(ready.clone()),
                    Err(_) => State::Unloaded,
                };
                outcome
            };
            match &outcome {
                Ok(ready) => {
                    let info = ready.engine.info();
                    tracing::info!(
                        model = %entry.config.id, digest = %ready.digest, context = info.context, parallel = info.parallel, threads = info.threads,
                        ms = info.load_time.as_millis() as u64, "Loaded a model."
                    );
                }
                Err(Error::Abandoned) => {
                    tracing::info!(model = %entry.config.id, "Gave up loading a model: nobody waits for it.")
                }
                Err(error) => tracing::warn!(model = %entry.config.id, %error, "Could not load a model."),
            }
            loading.outcome.send_replace(Some(outcome));
        });
        Err(waiter)
    }
}

#[async_trait]
impl Inference for LlamaCpp {
    async fn models(&self, _: &Cx) -> Result<Vec<Model>> {
        let model = |entry: &Arc<Entry>| {
            let engine = entry.engine();
            Model {
                id: entry.config.id.clone(),
                loaded: engine.is_some(),
                context: engine.map(|engine| engine.info().context).or(entry.config.context),
                bytes: entry.bytes,
            }
        };
        Ok(self.models.iter().map(model).collect())
    }

    async fn load(&self, cx: &Cx, model: String) -> Result<Loaded> {
        let entry = self.entry(&model)?;
        loop {
            let waiter = match self.join_load(entry) {
                Ok(ready) => return Ok(entry.loaded(&ready)),
                Err(waiter) => waiter,
            };
            let mut outcome = waiter.0.outcome.subscribe();
            let outcome = tokio::select! {
                outcome = outcome.wait_for(Option::is_some) => outcome.ok().and_then(|outcome| outcome.clone()),
                () = cx.cancelled() => return Err(PluginError::cancelled()),
            };
            match outcome {
                Some(Ok(ready)) => return Ok(entry.loaded(&ready)),
                Some(Err(Error::Abandoned)) if waiter.0.unloaded.load(Ordering::Acquire) => {
                    return Err(Error::Unloaded(model).into());
                }
                // Given up by those who waited before us: it is our turn.
                Some(Err(Error::Abandoned)) => {}
                Some(Err(error)) => return Err(error.into()),
                None => return Err(PluginError::internal("the load ended without a result")),
            }
        }
    }

    async fn unload(&self, _: &Cx, model: String) -> Result<()> {
        let entry = self.entry(&model)?.clone();
        let before = {
            let mut state = entry.state();
            match &*state {
                State::Loading(loading) => {
                    loading.unload();
                    return Ok(());
                }
                _ => std::mem::replace(&mut *state, State::Unloaded),
            }
        };
        if let State::Loaded(ready) = before {
            tracing::info!(model = %entry.config.id, "Unloading a model.");
            blocking(move || ready.engine.close()).await?;
        }
        Ok(())
    }

    async fn generate(&self, cx: &Cx, request: Generation) -> Result<Stream<Chunk>> {
        let engine = self.engine(&request.model)?;
        let place = engine.reserve()?;
        let (sender, stream) = cx.stream();
        let sink = Box::new(StreamSink::new(cx, sender));
        blocking(move || engine.start(place, &request, sink)).await??;
        Ok(stream)
    }

    async fn embed(&self, cx: &Cx, request: Embed) -> Result<Embeddings> {
        let engine = self.engine(&request.model)?;
        let waiting = cx.clone();
        let (vectors, prompt_tokens) = blocking(move || engine.embed(&request.inputs, move || waiting.is_cancelled())).await??;
        Ok(Embeddings { vectors, prompt_tokens })
    }

    async fn states(&self, cx: &Cx, request: States) -> Result<Vec<Vec<f32>>> {
        let engine = self.engine(&request.model)?;
        let waiting = cx.clone();
        blocking(move || engine.states(&request.tokens, request.last, move || waiting.is_cancelled())).await?.map_err(Into::into)
    }

    async fn tokenize(&self, _: &Cx, request: Tokenize) -> Result<Vec<u32>> {
        let engine = self.engine(&request.model)?;
        let tokens = blocking(move || engine.tokenize(&request.text, request.special)).await??;
        Ok(tokens.into_iter().map(|token| token as u32).collect())
    }

    async fn apply_template(&self, _: &Cx, request: Template) -> Result<String> {
        let engine = self.engine(&request.model)?;
        Ok(blocking(move || engine.render(&request.messages)).await??)
    }
}

#[async_trait]
impl Lifecycle for LlamaCpp {
    async fn health(&self) -> Health {
        let (mut serves, mut starting) = (false, None);
        for entry in &self.models {
            match &*entry.state() {
                State::Loading(loading) => {
                    let percent = Some(loading.percent.load(Ordering::Relaxed));
                    let doing = if loading.hashing.load(Ordering::Relaxed) { "hashing" } else { "loading" };
                    starting = Some(Health::Starting { doing: format!("{doing} {}", entry.config.id), percent });
                }
                State::Loaded(ready) if !ready.engine.is_open() => {
                    let reason = format!("the engine of model `{}` ended by a fault: load it again", entry.config.id);
                    return Health::Degraded { reason };
                }
                State::Loaded(_) => serves = true,
                State::Unloaded => {}
            }
        }
        // An instance that serves one model is ready, also while it loads another.
        starting.filter(|_| !serves).unwrap_or(Health::Ready)
    }

    async fn shutdown(&self) {
        for entry in &self.models {
            let before = std::mem::replace(&mut *entry.state(), State::Unloaded);
            match before {
                State::Loaded(ready) => _ = blocking(move || ready.engine.close()).await,
                State::Loading(loading) => {
                    loading.unload();
                    let mut outcome = loading.outcome.subscribe();
                    // The load notices at its next step; its own task puts the entry in order.
                    let _ = outcome.wait_for(Option::is_some).await;
                }
                State::Unloaded => {}
            }
        }
    }
}

/// Runs work that computes or waits beside the runtime's few threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| PluginError::internal(format!("a task of the plugin ended: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn plugin() -> Arc<LlamaCpp> {
        plugin_in(tempfile::tempdir().unwrap().path())
    }

    fn plugin_in(state_dir: &Path) -> Arc<LlamaCpp> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-chat/tiny-chat-q8_0.gguf");
        let config = Config { models: vec![ModelConfig::new("tiny-chat", path), ModelConfig::new("none", "/nowhere.gguf")] };
        Arc::new(LlamaCpp::new(config, Metrics::default(), state_dir))
    }

    fn code<T>(result: Result<T>) -> Code {
        result.map(|_| ()).expect_err("is refused").code
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn loads_at_the_same_time_are_one_load() {
        let plugin = plugin();
        let load = || {
            let plugin = plugin.clone();
            tokio::spawn(async move { plugin.load(&Cx::new(), "tiny-chat".into()).await.unwrap() })
        };
        let (one, two) = tokio::join!(load(), load());
        assert_eq!(one.unwrap(), two.unwrap());
        assert_eq!(plugin.health().await, Health::Ready);
        let models = plugin.models(&Cx::new()).await.unwrap();
        assert_eq!((models[0].loaded, models[0].context, models[0].bytes), (true, Some(2048), Some(3_710_080)));
        assert_eq!((models[1].loaded, models[1].bytes), (false, None));
        plugin.shutdown().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_abandoned_load_ends_and_the_next_one_succeeds() {
        let plugin = plugin();
        let _ = tokio::time::timeout(Duration::from_micros(50), plugin.load(&Cx::new(), "tiny-chat".into())).await;
        assert!(plugin.load(&Cx::new(), "tiny-chat".into()).await.is_ok());
        plugin.unload(&Cx::new(), "tiny-chat".into()).await.unwrap();
        assert!(!plugin.models(&Cx::new()).await.unwrap()[0].loaded);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_restart_takes_the_digest_from_the_state_folder() {
        let folder = tempfile::tempdir().unwrap();
        let first = plugin_in(folder.path()).load(&Cx::new(), "tiny-chat".into()).await.unwrap().digest.unwrap();
        assert_eq!(first, "8c1c3ef2b2832eef37cbaccb7d24bb9d2813205daf23244490ff934d6ddf1c32");
        // A digest that hashing would not give: it can only come from the file.
        let path = folder.path().join("digests.json");
        let noted = fs::read_to_string(&path).unwrap();
        fs::write(&path, noted.replace(&first, &"0".repeat(64))).unwrap();
        let second = plugin_in(folder.path()).load(&Cx::new(), "tiny-chat".into()).await.unwrap().digest.unwrap();
        assert_eq!(second, "0".repeat(64));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_unload_sends_those_away_who_wait() {
        let plugin = plugin();
        let waiting = {
            let plugin = plugin.clone();
            tokio::spawn(async move { plugin.load(&Cx::new(), "tiny-chat".into()).await })
        };
        while !matches!(plugin.health().await, Health::Starting { .. }) && !waiting.is_finished() {
            tokio::task::yield_now().await;
        }
        plugin.unload(&Cx::new(), "tiny-chat".into()).await.unwrap();
        // The load may have been through before the unload; then there is an answer, and nothing stays loaded either.
        if let Err(error) = waiting.await.unwrap() {
            assert_eq!(error.code, Code::Unavailable);
        }
        assert!(!plugin.models(&Cx::new()).await.unwrap()[0].loaded);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_not_there_is_not_found() {
        let plugin = plugin();
        assert_eq!(code(plugin.load(&Cx::new(), "other".into()).await), Code::NotFound);
        assert_eq!(code(plugin.load(&Cx::new(), "none".into()).await), Code::NotFound);
        let tokenize = Tokenize { model: "tiny-chat".into(), text: "x".into(), special: false };
        assert_eq!(code(plugin.tokenize(&Cx::new(), tokenize).await), Code::NotFound);
    }
}
