//! Which plugins serve what at this moment: the supervisor publishes it, the scheduler reads it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fabstir_plugin_api::chain::Chain;
use fabstir_plugin_api::inference::Inference;
use fabstir_plugin_api::prover::Prover;
use fabstir_plugin_api::storage::Storage;
use fabstir_plugin_api::transport::Transport;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// One moment's picture. A new one is published whenever a plugin becomes ready, drains, dies or is replaced.
#[derive(Default)]
pub struct Routes {
    /// The plugins that take requests, best rank first.
    pub inference: Vec<Arc<InferenceRoute>>,
    /// The ways into a network, best rank first.
    pub transport: Vec<Arc<Route<dyn Transport>>>,
    /// The ways to the market's contracts, best rank first.
    pub chain: Vec<Arc<Route<dyn Chain>>>,
    /// The places where results are kept, best rank first.
    pub storage: Vec<Arc<Route<dyn Storage>>>,
    /// The plugins that prove work, best rank first.
    pub prover: Vec<Arc<Route<dyn Prover>>>,
    /// The plugins that will, among them those that wait for their restart.
    pub starting: Vec<Starting>,
}

/// A plugin on its way to being ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Starting {
    pub plugin: String,
    /// What it is busy with, in words: "loading tiny-chat".
    pub doing: String,
    /// How far that is, where the plugin can tell.
    pub percent: Option<u8>,
}

/// What the name of a route begins with that is no plugin but another node.
pub const PEER: &str = "peer:";

/// One generation of a plugin that serves models.
pub struct InferenceRoute {
    pub plugin: String,
    /// Counts the plugin's instances: a restart or a swap makes a new one.
    pub generation: u64,
    pub models: Vec<ServedModel>,
    /// A hash of the plugin's file and its settings: what a model without a digest is told by.
    pub setup: String,
    pub inference: Arc<dyn Inference>,
    /// To be held for as long as a call or its stream lives: draining waits for it.
    pub in_flight: Arc<InFlight>,
}

impl InferenceRoute {
    pub fn serves(&self, model: &str) -> Option<&ServedModel> {
        self.models.iter().find(|served| served.id == model)
    }
}

/// One generation of a plugin of a kind whose calls nobody balances.
pub struct Route<K: ?Sized> {
    pub plugin: String,
    /// Counts the plugin's instances: each has to be spoken to from the beginning.
    pub generation: u64,
    pub client: Arc<K>,
}

/// A model that a route answers for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedModel {
    pub id: String,
    /// Tokens that one generation may span, prompt and answer together.
    pub context: u32,
    /// Generations that run at the same time.
    pub parallel: u32,
    /// What the plugin says that the model is: its [`Loaded::digest`](fabstir_plugin_api::inference::Loaded::digest).
    pub digest: Option<String>,
    /// Whether it continues text: one that only embeds is offered to nobody who wants some.
    pub generates: bool,
}

/// Counts the calls inside one generation of a plugin, and closes the door behind them when it drains.
pub struct InFlight {
    /// The number of guards, with [`DRAINING`] in the highest bit: one word, so that no call slips in beside the closing door.
    word: AtomicU64,
    limit: u64,
    ended: Notify,
    /// When the last guard left that left nobody behind.
    left: Mutex<Option<Instant>>,
}

const DRAINING: u64 = 1 << 63;

impl InFlight {
    /// At most `limit` guards at a time; `None` sets no limit.
    pub fn new(limit: Option<u32>) -> Arc<InFlight> {
        let limit = limit.map_or(DRAINING - 1, u64::from);
        Arc::new(InFlight { word: AtomicU64::new(0), limit, ended: Notify::new(), left: Mutex::default() })
    }

    /// `None` when the generation drains, or is as full as the operator allows.
    pub fn enter(self: &Arc<Self>) -> Option<InFlightGuard> {
        self.word
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| (word < self.limit).then_some(word + 1))
            .ok()
            .map(|_| InFlightGuard(self.clone()))
    }

    /// Lets nobody in from now on.
    pub fn drain(&self) {
        self.word.fetch_or(DRAINING, Ordering::AcqRel);
        self.ended.notify_waiters();
    }

    /// How many are inside.
    pub fn count(&self) -> u64 {
        self.word.load(Ordering::Acquire) & !DRAINING
    }

    /// Whether somebody is inside, or was until a moment ago: those inside leave as soon as the plugin fails, and the supervisor may hear
    /// of it after them.
    pub fn is_or_was_busy(&self) -> bool {
        self.count() > 0 || self.left.lock().is_some_and(|left| left.elapsed() < Duration::from_secs(1))
    }

    /// Returns once nobody is inside. Call [`drain`](Self::drain) first, or others may enter in the meantime.
    pub async fn drained(&self) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            // Registered before the count is read, so that the last guard's notice cannot fall between the two.
            ended.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            ended.await;
        }
    }
}

/// One call's presence in a plugin; ends when dropped.
pub struct InFlightGuard(Arc<InFlight>);

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        let before = self.0.word.fetch_sub(1, Ordering::AcqRel);
        if before & !DRAINING == 1 {
            *self.0.left.lock() = Some(Instant::now());
            self.0.ended.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drain_waits_for_those_inside_and_lets_no_one_in() {
        let in_flight = InFlight::new(None);
        let first = in_flight.enter().expect("the door is open");
        let second = in_flight.enter().expect("the door is open");
        in_flight.drain();
        assert!(in_flight.enter().is_none());
        assert_eq!(in_flight.count(), 2);

        let waiting = tokio::spawn({
            let in_flight = in_flight.clone();
            async move { in_flight.drained().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(first);
        drop(second);
        waiting.await.expect("the wait ends");
    }

    #[test]
    fn a_limit_counts_those_inside() {
        let in_flight = InFlight::new(Some(1));
        let first = in_flight.enter();
        assert!(first.is_some());
        assert!(in_flight.enter().is_none());
        drop(first);
        assert!(in_flight.enter().is_some());
    }
}
