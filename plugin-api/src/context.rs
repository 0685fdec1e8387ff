//! What travels with a call, and what the host lends a plugin for its life.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::sync::Notify;

use crate::stream::{Sender, Stream};

/// One call's context: its deadline, its trace and whether the caller still waits.
///
/// Cheap to clone. On the caller's side it says what the call may take; on the other side it is the call's own.
#[derive(Clone, Debug, Default)]
pub struct Cx {
    deadline: Option<Instant>,
    traceparent: Option<Arc<str>>,
    /// On the serving side: set when the caller gives up.
    cancel: Option<Arc<Cancel>>,
}

#[derive(Debug, Default)]
struct Cancel {
    is_set: AtomicBool,
    /// Whether it is the plugin that ends, and the caller waits for an answer.
    by_shutdown: AtomicBool,
    set: Notify,
}

impl Cx {
    /// A context without a deadline or a trace.
    pub fn new() -> Self {
        Self::default()
    }

    /// The call, its stream included, must be over this long from now.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.deadline = Instant::now().checked_add(timeout);
        self
    }

    /// The call must be over at this moment.
    pub fn with_deadline(mut self, deadline: Option<Instant>) -> Self {
        self.deadline = deadline;
        self
    }

    /// Makes the call part of a trace: a `traceparent` value as in W3C Trace Context.
    pub fn with_traceparent(mut self, traceparent: impl Into<Arc<str>>) -> Self {
        self.traceparent = Some(traceparent.into());
        self
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Time left; zero once the deadline has passed, `None` without one.
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    pub fn traceparent(&self) -> Option<&str> {
        self.traceparent.as_deref()
    }

    /// Whether the caller has given up or the deadline has passed.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.as_ref().is_some_and(|cancel| cancel.is_set.load(Ordering::Acquire))
    }

    /// Waits until the caller gives up or the deadline passes. Threads may poll `is_cancelled` instead.
    pub async fn cancelled(&self) {
        let Some(cancel) = &self.cancel else { return std::future::pending().await };
        // Made before the flag is read: a notice between the two is not lost.
        let set = cancel.set.notified();
        if !cancel.is_set.load(Ordering::Acquire) {
            set.await;
        }
    }

    /// The context of a call that can be cancelled.
    pub(crate) fn serving() -> Self {
        Self { cancel: Some(Arc::default()), ..Self::default() }
    }

    /// Cancels the call for the plugin's own end.
    pub(crate) fn shut_down(&self) {
        if let Some(cancel) = &self.cancel {
            cancel.by_shutdown.store(true, Ordering::Release);
        }
        self.cancel();
    }

    pub(crate) fn is_shut_down(&self) -> bool {
        self.cancel.as_ref().is_some_and(|cancel| cancel.by_shutdown.load(Ordering::Acquire))
    }

    pub(crate) fn cancel(&self) {
        if let Some(cancel) = &self.cancel {
            cancel.is_set.store(true, Ordering::Release);
            cancel.set.notify_waiters();
        }
    }

    /// A channel for the call's answer: send into the first, return the second.
    pub fn stream<T: Send + 'static>(&self) -> (Sender<T>, Stream<T>) {
        Stream::channel(64)
    }
}

/// What the host lends a plugin instance for its life.
#[derive(Clone)]
pub struct Host(Arc<Lent>);

struct Lent {
    instance: String,
    state_dir: PathBuf,
    registry: Mutex<Registry>,
}

impl Host {
    pub(crate) fn new(instance: String, state_dir: PathBuf) -> Self {
        Self(Arc::new(Lent { instance, state_dir, registry: Mutex::new(Registry::default()) }))
    }

    /// The id that the operator gave this instance in `plugins.toml`.
    pub fn instance(&self) -> &str {
        &self.0.instance
    }

    /// A folder of this instance's own that survives restarts. It exists.
    pub fn state_dir(&self) -> &Path {
        &self.0.state_dir
    }

    /// Registers metrics that the host shows in its own `/metrics`, labelled with the instance's id.
    pub fn metrics(&self, register: impl FnOnce(&mut Registry)) {
        register(&mut self.0.registry.lock());
    }

    pub(crate) fn encode_metrics(&self) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.0.registry.lock());
        text
    }
}
