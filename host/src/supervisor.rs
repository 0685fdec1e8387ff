//! Keeps plugins running: starts them, watches them, restarts them, replaces them, ends them.
//!
//! Every entry of `plugins.toml` has a keeper, a task of its own, so one plugin's failure never holds up another:
//!
//! ```text
//! Declared -> Starting -> Ready <-> Degraded -> Draining -> Stopped
//!                 ^          |
//!                 +- Restarting -> Quarantined
//! ```
//!
//! A replacement is a new generation: it starts beside the old one, takes over the routes, and the old one drains.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fabstir_plugin_api::context::Cx;
use parking_lot::{Mutex, RwLock};
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::config::{Config, PluginEntry};
use crate::loader::{LoadError, Loader};
use crate::routes::{Routes, Starting};

mod alone;
mod board;
mod budget;
mod connection;
mod keeper;
mod start;
pub mod worker;

pub use alone::{Alone, AloneError, entries};
pub use connection::{Connected, host_session};
pub use start::isolation;

use board::Board;
use keeper::{Command, Keeper};

/// Where a plugin is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum State {
    /// Configured, and not started.
    Declared,
    Starting {
        doing: String,
        percent: Option<u8>,
    },
    Ready,
    /// Works, but not as it should.
    Degraded {
        why: String,
    },
    /// Ended by a fault, and about to be started again.
    Restarting {
        why: String,
        in_ms: u64,
    },
    Draining,
    Stopped,
    /// Given up until the configuration is read again.
    Quarantined {
        why: String,
    },
}

impl State {
    pub fn name(&self) -> &'static str {
        match self {
            State::Declared => "declared",
            State::Starting { .. } => "starting",
            State::Ready => "ready",
            State::Degraded { .. } => "degraded",
            State::Restarting { .. } => "restarting",
            State::Draining => "draining",
            State::Stopped => "stopped",
            State::Quarantined { .. } => "quarantined",
        }
    }
}

/// What is known of one plugin at this moment.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    pub id: String,
    #[serde(rename = "use")]
    pub use_: String,
    #[serde(flatten)]
    pub state: State,
    /// Counts the instances that became ready.
    pub generation: u64,
}

impl Status {
    fn metrics(&self) -> String {
        let (state, generation) = (self.state.name(), self.generation);
        format!(
            "# TYPE fabstir_plugin_state gauge\n# HELP fabstir_plugin_state The state that the plugin is in.\n\
             fabstir_plugin_state{{state=\"{state}\"}} 1\n\
             # TYPE fabstir_plugin_generation gauge\n# HELP fabstir_plugin_generation The instance that serves, counted over the node.\n\
             fabstir_plugin_generation {generation}\n# EOF\n"
        )
    }
}

/// All plugins of a node. Clones are the same.
#[derive(Clone)]
pub struct Supervisor(Arc<Shared>);

struct Shared {
    loader: RwLock<Loader>,
    config: RwLock<Config>,
    board: Arc<Board>,
    keepers: Mutex<BTreeMap<String, Handle>>,
    /// Set under the lock of `keepers`: no more are added.
    closing: AtomicBool,
    generation: AtomicU64,
}

struct Handle {
    commands: mpsc::Sender<Command>,
    task: JoinHandle<()>,
}

/// What came of one entry in a reload.
#[derive(Debug)]
pub struct Reloaded {
    pub id: String,
    pub result: Result<&'static str, LoadError>,
}

impl Supervisor {
    /// Knows the plugins of the configuration, and has started none.
    pub fn new(config: Config) -> Self {
        let board = Board::default();
        for entry in config.plugin.iter().filter(|entry| entry.enabled) {
            board.post(entry, State::Declared);
        }
        Self(Arc::new(Shared {
            loader: RwLock::new(Loader::new(&config)),
            board: Arc::new(board),
            keepers: Mutex::default(),
            closing: AtomicBool::new(false),
            generation: AtomicU64::new(0),
            config: RwLock::new(config),
        }))
    }

    /// Starts every enabled plugin, all at the same time, and returns at once.
    pub fn start(&self) {
        let entries = self.0.config.read().plugin.clone();
        for entry in entries.into_iter().filter(|entry| entry.enabled) {
            self.add(entry);
        }
    }

    /// Starts a keeper, unless the node is ending.
    fn add(&self, entry: PluginEntry) {
        let mut keepers = self.0.keepers.lock();
        if self.0.closing.load(Ordering::Acquire) {
            return;
        }
        self.0.board.post(&entry, State::Declared);
        let (commands, receiver) = mpsc::channel(4);
        let id = entry.id.clone();
        let task = tokio::spawn(Keeper::new(self.0.clone(), entry, receiver).run());
        keepers.insert(id, Handle { commands, task });
    }

    /// Changes whenever a plugin becomes ready, drains, dies or is replaced.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Routes>> {
        self.0.board.subscribe()
    }

    pub fn status(&self) -> Vec<Status> {
        self.0.board.status()
    }

    /// Applies what another configuration says of plugins: new entries start, missing ones end, and every other one is replaced by a
    /// new generation if its entry or its file has changed. A replacement that fails leaves the old one running. To be called once
    /// at a time.
    pub async fn reload(&self, config: Config) -> Vec<Reloaded> {
        let config = {
            let mut present = self.0.config.write();
            present.plugins = config.plugins;
            present.plugin = config.plugin;
            present.node.drain_timeout_ms = config.node.drain_timeout_ms;
            present.clone()
        };
        *self.0.loader.write() = Loader::new(&config);
        let wanted: Vec<PluginEntry> = config.plugin.into_iter().filter(|entry| entry.enabled).collect();
        let gone: Vec<String> = {
            let keepers = self.0.keepers.lock();
            keepers.keys().filter(|id| !wanted.iter().any(|entry| entry.id == **id)).cloned().collect()
        };
        let removals = gone.into_iter().map(|id| async move {
            self.remove(&id).await;
            Reloaded { id, result: Ok("stopped") }
        });
        let changes = wanted.into_iter().map(|entry| self.apply(entry));
        let (mut results, changed) = tokio::join!(futures::future::join_all(removals), futures::future::join_all(changes));
        results.extend(changed);
        results
    }

    async fn apply(&self, entry: PluginEntry) -> Reloaded {
        let id = entry.id.clone();
        let commands = self.0.keepers.lock().get(&id).map(|handle| handle.commands.clone());
        let Some(commands) = commands else {
            self.add(entry);
            return Reloaded { id, result: Ok("started") };
        };
        let (answer, result) = oneshot::channel();
        let sent = commands.send(Command::Replace(Box::new(entry), answer)).await;
        let result = match (sent, result.await) {
            (Ok(()), Ok(result)) => result,
            _ => Ok("stopping"),
        };
        Reloaded { id, result }
    }

    async fn remove(&self, id: &str) {
        let handle = self.0.keepers.lock().remove(id);
        if let Some(handle) = handle {
            // A keeper that has ended needs no command.
            let _ = handle.commands.send(Command::Stop).await;
            let _ = handle.task.await;
            self.0.board.remove(id);
        }
    }

    /// Drains and ends every plugin, at most for the configured time each, all at the same time. Nothing starts afterwards.
    pub async fn shutdown(&self) {
        let ids: Vec<String> = {
            let keepers = self.0.keepers.lock();
            self.0.closing.store(true, Ordering::Release);
            keepers.keys().cloned().collect()
        };
        futures::future::join_all(ids.iter().map(|id| self.remove(id))).await;
    }

    /// The metrics of every plugin, as id and OpenMetrics text: its state, and what it tells itself while it runs.
    pub async fn metrics(&self) -> Vec<(String, String)> {
        let running = self.0.board.running();
        let states = self.status().into_iter().map(|status| (status.id.clone(), status.metrics()));
        let texts = running.into_iter().map(|(id, connected)| async move {
            let cx = Cx::new().with_timeout(Duration::from_secs(1));
            connected.plugin.metrics(&cx).await.ok().map(|text| (id, text))
        });
        states.chain(futures::future::join_all(texts).await.into_iter().flatten()).collect()
    }
}

impl Shared {
    fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn drain_timeout(&self) -> Duration {
        Duration::from_millis(self.config.read().node.drain_timeout_ms)
    }
}

impl From<&Status> for Option<Starting> {
    fn from(status: &Status) -> Self {
        let (doing, percent) = match &status.state {
            State::Declared => ("waiting to start".to_owned(), None),
            State::Starting { doing, percent } => (doing.clone(), *percent),
            State::Restarting { why, .. } => (format!("restarting: {why}"), None),
            _ => return None,
        };
        Some(Starting { plugin: status.id.clone(), doing, percent })
    }
}
