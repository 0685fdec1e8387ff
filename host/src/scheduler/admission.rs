//! Who is let in.

use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::error::Code;
use tokio::time::Instant;

use super::promises::Load;
use super::refused::Refused;
use super::waiting::Waiting;
use super::{Job, Scheduler, State};
use crate::routes::Routes;

impl Scheduler {
    /// Lets a request into the queue, or tells it when to come back.
    pub(super) fn admit(self: &Arc<Self>, job: &Job, max_tokens: Option<u32>, fingerprint: u64) -> Result<Waiting, Refused> {
        let now = job.arrived;
        if now >= job.ends {
            return Err(Refused::deadline("before it was let in"));
        }
        let routes = self.routes();
        let mut state = self.state.lock();
        state.find(&routes, &job.model, now)?;

        let load = self.load(&state, &routes, job, max_tokens);
        let promised = !state.promises.is_empty() && state.promises.redeem(now, fingerprint);
        let welcome = match promised {
            true => self.has_room_for_promised(&state, &routes, job),
            false => state.promises.leave_room(now, load),
        };
        if promised {
            self.metrics.promise(if welcome { "kept" } else { "broken" });
        }
        if !welcome {
            self.metrics.promise("made");
            let wait = state.promises.make(now, load, fingerprint);
            let message = format!(
                "{} requests with about {} prompt tokens are waiting, and {} and {} may: ask again in {} s",
                state.queue.waiting(),
                state.queue.waiting_tokens(),
                self.config.queue,
                self.config.queue_tokens,
                wait.as_secs(),
            );
            return Err(Refused { code: Code::Overloaded, message, retry_after: Some(wait) });
        }
        self.metrics.admitted(&job.model);
        // Entered under the same lock: what was decided on is what the queue then holds.
        let waiting = self.enter(&mut state, job);
        drop(state);
        self.turn();
        Ok(waiting)
    }

    /// Takes note of what starts and what has gone.
    pub(super) fn note_routes(&self) {
        let routes = self.routes();
        let mut state = self.state.lock();
        let state = &mut *state;
        state.starts.observe(&routes, Instant::now());
        let (service, starts) = (&mut state.service, &state.starts);
        service.retain(|model| {
            routes.inference.iter().any(|route| route.serves(model).is_some()) || starts.may_bring(&routes, model)
        });
    }

    fn load(&self, state: &State, routes: &Routes, job: &Job, max_tokens: Option<u32>) -> Load {
        let queue = &state.queue;
        let waiting = queue.waiting() as i64;
        // Free slots that nobody ahead will take.
        let free = i64::from(queue.free(routes, &job.model, job.arrived)) - queue.waiting_for(&job.model) as i64;
        let places = waiting + 1 - free.max(0) - self.config.queue as i64;
        let must_wait = free <= 0;

        // An empty queue takes any prompt: otherwise one larger than the bound would be sent away for ever.
        let tokens = (queue.waiting_tokens() + job.tokens) as i64 - self.config.queue_tokens as i64;
        let over = if must_wait && waiting > 0 && tokens > 0 {
            let each = (queue.waiting_tokens() / waiting as u64).max(1) as i64;
            places.max((tokens as u64).div_ceil(each as u64) as i64)
        } else {
            places
        };
        Load { over, spacing: state.spacing(routes, &job.model, max_tokens) }
    }

    /// A promise holds beyond the queue's bound, since the time was an estimate; but not without any bound.
    fn has_room_for_promised(&self, state: &State, routes: &Routes, job: &Job) -> bool {
        let slots: u32 =
            routes.inference.iter().filter_map(|route| route.serves(&job.model)).map(|model| model.parallel.max(1)).sum();
        let most = self.config.queue + self.config.queue.max(slots as usize);
        let tokens = state.queue.waiting_tokens() + job.tokens;
        state.queue.waiting() < most && (state.queue.waiting() == 0 || tokens <= 2 * self.config.queue_tokens as u64)
    }
}

impl State {
    /// Whether the model is there to be asked.
    fn find(&self, routes: &Routes, model: &str, now: Instant) -> Result<(), Refused> {
        if routes.inference.iter().any(|route| route.serves(model).is_some()) {
            return Ok(());
        }
        let loading = !routes.starting.is_empty();
        if loading && (routes.inference.is_empty() || self.starts.may_bring(routes, model)) {
            return Err(Refused::unavailable("Loading model", self.starts.ready_in(routes, now)));
        }
        if routes.inference.is_empty() {
            return Err(Refused::new(Code::Unavailable, "no plugin serves any model"));
        }
        let mut served: Vec<&str> =
            routes.inference.iter().flat_map(|route| &route.models).map(|model| model.id.as_str()).collect();
        served.sort_unstable();
        served.dedup();
        let message = format!("there is no model `{model}`; served here: {}", served.join(", "));
        Err(Refused::new(Code::NotFound, message))
    }

    /// The time between two requests leaving, from what runs now and how long such requests took.
    fn spacing(&self, routes: &Routes, model: &str, max_tokens: Option<u32>) -> Duration {
        let per_second: f64 = self
            .queue
            .running()
            .map(|(lane, running)| f64::from(running) / self.service.estimate(&lane.model, max_tokens).as_secs_f64())
            .sum();
        if per_second > 0.0 {
            return Duration::from_secs_f64(1.0 / per_second);
        }
        // Nothing runs, as when a plugin rests: reckon with all its slots.
        let slots: u32 = routes.inference.iter().filter_map(|route| route.serves(model)).map(|model| model.parallel.max(1)).sum();
        self.service.estimate(model, max_tokens) / slots.max(1)
    }
}
