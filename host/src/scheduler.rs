//! The one path into inference: admission, order, retries.
//!
//! ```text
//! generate --> admit --> queue --> slot of a route --> plugin --> Answer
//!                |         ^                              |
//!              refused     +---- failed with no output ---+
//! ```
//!
//! - Admission is bounded in requests and in estimated prompt tokens. A refusal names a time to come back at which a place is
//!   kept.
//! - The queue is ordered by priority, then deadline, then arrival. A dropped call leaves it at once.
//! - Each model of each plugin generation has as many slots as it runs generations in parallel: the plugin itself never queues.
//! - A request that has produced nothing yet is given to the next route or the next generation when its plugin fails. Such requests
//!   go one by one, since one of them may be what made it fail.

use std::cmp::Reverse;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError};
use fabstir_plugin_api::inference::{Chunk, Embed, Embeddings, Generation, Input};
use fabstir_plugin_api::stream::Stream;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use crate::config;
use crate::routes::{InferenceRoute, Routes, Starting};

mod admission;
mod answer;
mod metrics;
mod promises;
mod queue;
mod refused;
mod service;
mod starts;
#[cfg(test)]
pub(crate) mod tests;
mod waiting;

pub use answer::Answer;
pub use refused::Refused;

use answer::Run;
use metrics::Metrics;
use promises::Promises;
use queue::{Avoided, Due, Lane, Place, Queue};
use service::ServiceTimes;
use starts::Starts;
use waiting::{Held, Waiting};

/// The time for a request that came without a deadline.
const LONGEST: Duration = Duration::from_secs(3600);

/// How long a route that failed a request is not tried again for it: time for the supervisor to notice that the plugin died.
const AVOID: Duration = Duration::from_secs(1);

/// How long a plugin that said `Overloaded` is left alone if it did not say for how long, and at most.
const HOLD_BACK: Duration = Duration::from_millis(100);
const HOLD_BACK_MOST: Duration = Duration::from_secs(5);

/// Decides who runs, who waits and who is refused, and carries requests to the plugins.
pub struct Scheduler {
    config: config::Scheduler,
    routes: watch::Receiver<Arc<Routes>>,
    state: Mutex<State>,
    metrics: Metrics,
    arrivals: AtomicU64,
    fingerprints: RandomState,
    /// Tells the clock that the time of its next turn may have changed.
    rescheduled: Arc<Notify>,
    clock: OnceLock<AbortOnDropHandle<()>>,
}

#[derive(Default)]
struct State {
    queue: Queue,
    promises: Promises,
    service: ServiceTimes,
    starts: Starts,
}

/// A model as clients see it: what its routes offer together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedModelInfo {
    pub id: String,
    /// The plugin that is asked first.
    pub plugin: String,
    /// Tokens of prompt and answer together, on the route with the least.
    pub context: u32,
    /// Generations that run at the same time, over all routes.
    pub parallel: u32,
    /// The digest of the model, as the plugin that is asked first gives it.
    pub digest: Option<String>,
    /// Whether it continues text, on every route.
    pub generates: bool,
}

/// Whether requests can be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// Nothing serves yet, and these are on their way.
    Loading(Vec<Starting>),
    /// Nothing serves, and nothing will.
    Nothing,
}

/// One request on its way, whatever it asks for.
struct Job {
    cx: Cx,
    model: String,
    tokens: u64,
    place: Place,
    arrived: Instant,
    ends: Instant,
    retries_left: u32,
    /// Whether a plugin has failed while it ran.
    suspect: bool,
    avoid: Vec<Avoided>,
}

impl Scheduler {
    /// Must be called within a runtime: a task turns the queue when routes change or a pause ends, and ends with the scheduler.
    pub fn new(config: config::Scheduler, routes: watch::Receiver<Arc<Routes>>) -> Arc<Scheduler> {
        let rescheduled = Arc::new(Notify::new());
        let scheduler = Arc::new(Scheduler {
            config,
            routes: routes.clone(),
            state: Mutex::default(),
            metrics: Metrics::new(),
            arrivals: AtomicU64::new(0),
            fingerprints: RandomState::new(),
            rescheduled: rescheduled.clone(),
            clock: OnceLock::new(),
        });
        let clock = tokio::spawn(clock(Arc::downgrade(&scheduler), routes, rescheduled));
        scheduler.clock.get_or_init(|| AbortOnDropHandle::new(clock));
        scheduler
    }

    /// Shows the scheduler's metrics in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
    }

    /// The models that are served now, those of the best rank first.
    pub fn models(&self) -> Vec<ServedModelInfo> {
        let routes = self.routes();
        let mut models: Vec<ServedModelInfo> = Vec::new();
        for route in &routes.inference {
            for model in &route.models {
                match models.iter_mut().find(|known| known.id == model.id) {
                    Some(known) => {
                        known.context = known.context.min(model.context);
                        known.parallel += model.parallel;
                        known.generates &= model.generates;
                    }
                    None => models.push(ServedModelInfo {
                        id: model.id.clone(),
                        plugin: route.plugin.clone(),
                        context: model.context,
                        parallel: model.parallel,
                        digest: model.digest.clone(),
                        generates: model.generates,
                    }),
                }
            }
        }
        models
    }

    /// Those of the models that continue text: what is offered to others, who want nothing else.
    pub fn generating(&self) -> impl Iterator<Item = ServedModelInfo> + use<> {
        self.models().into_iter().filter(|model| model.generates)
    }

    /// How many more generations of a model would begin at once.
    pub fn free(&self, model: &str) -> u32 {
        let state = self.state.lock();
        let free = state.queue.free(&self.routes(), model, Instant::now());
        free.saturating_sub(state.queue.waiting_for(model) as u32)
    }

    pub fn readiness(&self) -> Readiness {
        let routes = self.routes();
        match (routes.inference.is_empty(), routes.starting.is_empty()) {
            (false, _) => Readiness::Ready,
            (true, false) => Readiness::Loading(routes.starting.clone()),
            (true, true) => Readiness::Nothing,
        }
    }

    /// Returns once a plugin has taken the request; dropping the future before leaves the queue at once.
    ///
    /// # Errors
    /// `Overloaded` when the queue is full: the promise of `retry_after` holds. `NotFound` for a model that nobody serves.
    /// `Unavailable` while nothing is ready. `DeadlineExceeded` when the deadline of `cx` passes in the queue. What the plugin
    /// answered, when trying again would not help.
    pub async fn generate(self: &Arc<Self>, cx: Cx, request: Generation) -> Result<Answer, Refused> {
        let tokens = estimated_tokens(&request.input);
        let job = self.job(cx, &request.model, request.priority, tokens);
        let started = async {
            let waiting = self.admit(&job, request.max_tokens, self.fingerprint(&request))?;
            let request = Arc::new(request);
            let (job, stream, held) = self.run(waiting, job, &generating(&request)).await?;
            Ok(Run { stream, held, again: Some(Box::new((job, request))) })
        };
        match started.await {
            Ok(run) => Ok(Answer::new(self.clone(), run)),
            Err(refused) => Err(self.refused(refused)),
        }
    }

    /// Turns texts into vectors; it waits and holds a slot like a generation.
    pub async fn embed(self: &Arc<Self>, cx: Cx, request: Embed) -> Result<Embeddings, Refused> {
        let tokens = request.inputs.iter().map(estimated_tokens).sum();
        let job = self.job(cx, &request.model, 0, tokens);
        let ended = async {
            // An embedding generates nothing: until measured, one token's worth of work is as good a guess as any.
            let waiting = self.admit(&job, Some(1), self.fingerprint(&request))?;
            let request = Arc::new(request);
            let call = move |route: Arc<InferenceRoute>, cx: Cx| -> BoxFuture<'static, _> {
                let request = request.clone();
                Box::pin(async move { route.inference.embed(&cx, (*request).clone()).await })
            };
            let (_, embeddings, held) = self.run(waiting, job, &call).await?;
            held.served();
            Ok(embeddings)
        };
        ended.await.map_err(|refused| self.refused(refused))
    }

    /// Finds a slot and makes the call, as often as the failures allow.
    async fn run<T>(
        self: &Arc<Self>,
        mut waiting: Waiting,
        mut job: Job,
        call: &(impl Fn(Arc<InferenceRoute>, Cx) -> BoxFuture<'static, Result<T, PluginError>> + Sync),
    ) -> Result<(Job, T, Held), Refused> {
        loop {
            let held = waiting.slot(job.ends).await?;
            let error = match tokio::time::timeout_at(job.ends, call(held.route.clone(), job.cx.clone())).await {
                Ok(Ok(value)) => return Ok((job, value, held)),
                Ok(Err(error)) => error,
                Err(_) => return Err(Refused::deadline("before the plugin answered")),
            };
            waiting = self.again(&mut job, held, error)?;
        }
    }

    /// A failed request's way back into the queue, where trying again can help.
    fn again(self: &Arc<Self>, job: &mut Job, held: Held, error: PluginError) -> Result<Waiting, Refused> {
        let now = Instant::now();
        let asked = error.retry_after_ms.map(Duration::from_millis);
        match error.code {
            Code::Overloaded => {
                let rest = asked.unwrap_or(HOLD_BACK).clamp(Duration::from_millis(1), HOLD_BACK_MOST);
                self.state.lock().queue.hold_back(held.lane.clone(), now + rest);
            }
            Code::Unavailable | Code::Protocol | Code::Cancelled if job.retries_left > 0 => {
                job.retries_left -= 1;
                job.suspect = true;
                job.avoid.push(Avoided {
                    plugin: held.lane.plugin.clone(),
                    generation: held.lane.generation,
                    until: now + asked.unwrap_or(AVOID).clamp(AVOID, HOLD_BACK_MOST),
                });
                let Lane { plugin, generation, model } = &held.lane;
                warn!(%plugin, generation, %model, code = %error.code, %error, "Request failed with no output; trying again.");
            }
            _ => return Err(Refused::by_plugin(&held.lane, error)),
        }
        self.metrics.retried(&error.code.to_string());
        job.place.newcomer = false;
        drop(held);
        let waiting = self.wait(job);
        self.rescheduled.notify_one();
        Ok(waiting)
    }

    fn job(&self, cx: Cx, model: &str, priority: i32, tokens: u64) -> Job {
        let arrived = Instant::now();
        let deadline = cx.deadline().map(Instant::from_std);
        let place = Place {
            newcomer: true,
            priority: Reverse(priority),
            deadline: deadline.map_or(Due::Never, Due::At),
            arrival: self.arrivals.fetch_add(1, Ordering::Relaxed),
        };
        Job {
            cx,
            model: model.to_owned(),
            tokens,
            place,
            arrived,
            ends: deadline.unwrap_or(arrived + LONGEST),
            retries_left: self.config.retries,
            suspect: false,
            avoid: Vec::new(),
        }
    }

    /// Gives out free slots, and says when to look again.
    fn turn(&self) -> Option<Instant> {
        let routes = self.routes();
        let mut state = self.state.lock();
        state.queue.turn(&routes, Instant::now());
        self.metrics.waiting.set(state.queue.waiting() as i64);
        self.metrics.waiting_tokens.set(state.queue.waiting_tokens() as i64);
        state.queue.next_turn(&routes)
    }

    fn routes(&self) -> Arc<Routes> {
        self.routes.borrow().clone()
    }

    fn refused(&self, refused: Refused) -> Refused {
        self.metrics.refused(&refused.code.to_string());
        refused
    }

    /// What makes two requests the same one, sent again.
    fn fingerprint(&self, request: &impl Serialize) -> u64 {
        struct Writer<H>(H);
        impl<H: Hasher> io::Write for Writer<H> {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.write(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut writer = Writer(self.fingerprints.build_hasher());
        // A request that cannot be written as JSON shares its fingerprint with others like it, which costs nothing but a
        // stranger's place.
        let _ = serde_json::to_writer(&mut writer, request);
        writer.0.finish()
    }
}

/// Turns the queue when the routes change and when a pause ends.
async fn clock(scheduler: Weak<Scheduler>, mut routes: watch::Receiver<Arc<Routes>>, rescheduled: Arc<Notify>) {
    let mut closed = false;
    loop {
        let Some(next) = scheduler.upgrade().map(|scheduler| {
            scheduler.note_routes();
            scheduler.turn()
        }) else {
            return;
        };
        tokio::select! {
            changed = routes.changed(), if !closed => closed = changed.is_err(),
            () = rescheduled.notified() => {}
            () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
        }
    }
}

fn generating(
    request: &Arc<Generation>,
) -> impl Fn(Arc<InferenceRoute>, Cx) -> BoxFuture<'static, Result<Stream<Chunk>, PluginError>> + Send + Sync + use<> {
    let request = request.clone();
    move |route, cx| {
        let request = request.clone();
        Box::pin(async move { route.inference.generate(&cx, (*request).clone()).await })
    }
}

/// Prompt tokens as far as they can be told without the model: four bytes each, and a few for each message's frame.
pub(crate) fn estimated_tokens(input: &Input) -> u64 {
    match input {
        Input::Text(text) => text.len().div_ceil(4) as u64,
        Input::Messages(messages) => messages.iter().map(|message| message.content.len().div_ceil(4) as u64 + 4).sum(),
        Input::Tokens(tokens) => tokens.len() as u64,
    }
}
