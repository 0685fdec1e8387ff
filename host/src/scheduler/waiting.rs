//! A request's time in the queue, and then in a slot. Both end by being dropped.

use std::sync::Arc;

use fabstir_plugin_api::error::Code;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::metrics::ModelMetrics;
use super::queue::{Lane, Place, Ticket, Waiter};
use super::refused::Refused;
use super::{Job, Scheduler, State};
use crate::routes::{InFlightGuard, InferenceRoute};

/// A place in the queue. Dropping it gives the place up, and with it a slot that was given out in the same moment.
pub(super) struct Waiting {
    scheduler: Arc<Scheduler>,
    place: Place,
    answer: oneshot::Receiver<Result<Ticket, Refused>>,
}

impl Waiting {
    /// Waits for a slot, at the longest until `ends`.
    pub async fn slot(mut self, ends: Instant) -> Result<Held, Refused> {
        match tokio::time::timeout_at(ends, &mut self.answer).await {
            Ok(Ok(Ok(ticket))) => Ok(Held::new(self.scheduler.clone(), ticket)),
            Ok(Ok(Err(refused))) => Err(refused),
            Ok(Err(_)) => Err(Refused::new(Code::Internal, "the queue lost a request")),
            Err(_) => Err(Refused::deadline("in the queue")),
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let left = self.scheduler.state.lock().queue.leave(&self.place);
        if left {
            self.scheduler.turn();
        } else if let Ok(Ok(ticket)) = self.answer.try_recv() {
            drop(Held::new(self.scheduler.clone(), ticket));
        }
    }
}

/// A slot of a route, taken until it is dropped.
pub(super) struct Held {
    scheduler: Arc<Scheduler>,
    pub route: Arc<InferenceRoute>,
    pub lane: Lane,
    pub metrics: ModelMetrics,
    inside: Option<InFlightGuard>,
    since: Instant,
    suspect: bool,
}

impl Held {
    fn new(scheduler: Arc<Scheduler>, ticket: Ticket) -> Held {
        let Ticket { route, lane, inside, suspect } = ticket;
        let metrics = scheduler.metrics.of_model(&lane.model);
        metrics.running.inc();
        Held { scheduler, route, lane, metrics, inside: Some(inside), since: Instant::now(), suspect }
    }

    /// The digest of the model, as the plugin gives it.
    pub fn digest(&self) -> Option<String> {
        self.route.serves(&self.lane.model)?.digest.clone()
    }

    /// Takes the suspicion off a request that has produced output: whatever happens to it now, it is not tried again.
    pub fn acquit(&mut self) {
        if std::mem::take(&mut self.suspect) {
            self.scheduler.state.lock().queue.clear_suspect(&self.lane);
            self.scheduler.turn();
        }
    }

    /// Ends the stay and lets its length count for estimates. Stays that failed do not: they would make the slots look faster.
    pub fn served(self) {
        self.scheduler.state.lock().service.record(&self.lane.model, self.since.elapsed());
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.metrics.running.dec();
        // The route's door first: whoever is next may need that very place.
        self.inside.take();
        {
            let queue = &mut self.scheduler.state.lock().queue;
            queue.release(&self.lane);
            if self.suspect {
                queue.clear_suspect(&self.lane);
            }
        }
        self.scheduler.turn();
    }
}

impl Scheduler {
    pub(super) fn enter(self: &Arc<Self>, state: &mut State, job: &Job) -> Waiting {
        let (answer, receiver) = oneshot::channel();
        let waiter = Waiter {
            model: job.model.clone(),
            tokens: job.tokens,
            avoid: job.avoid.clone(),
            suspect: job.suspect,
            orphaned: None,
            answer,
        };
        state.queue.enter(job.place, waiter);
        Waiting { scheduler: self.clone(), place: job.place, answer: receiver }
    }

    /// Puts a request into the queue that was let in before.
    pub(super) fn wait(self: &Arc<Self>, job: &Job) -> Waiting {
        let waiting = self.enter(&mut self.state.lock(), job);
        self.turn();
        waiting
    }
}
