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
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fabstir_plugin_api::context::Cx;
use parking_lot::{Mutex, RwLock};
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::config::{Config, PluginEntry};
use crate::loader::{LoadError, Loader};
use crate::routes::{Routes, Starting};

mod board;
mod budget;
mod connection;
mod keeper;
mod start;
pub mod worker;

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
    /// Given up until its entry or its file changes.
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

/// All plugins of a node. Clones are the same.
#[derive(Clone)]
pub struct Supervisor(Arc<Shared>);

struct Shared {
    loader: RwLock<Loader>,
    config: RwLock<Config>,
    board: Arc<Board>,
    keepers: Mutex<BTreeMap<String, Handle>>,
    generation: AtomicU64,
}

struct Handle {
    entry: PluginEntry,
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

    fn add(&self, entry: PluginEntry) {
        self.0.board.post(&entry, State::Declared);
        let (commands, receiver) = mpsc::channel(4);
        let keeper = Keeper::new(self.0.clone(), entry.clone(), receiver);
        let task = tokio::spawn(keeper.run());
        self.0.keepers.lock().insert(entry.id.clone(), Handle { entry, commands, task });
    }

    /// Changes whenever a plugin becomes ready, drains, dies or is replaced.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Routes>> {
        self.0.board.subscribe()
    }

    pub fn status(&self) -> Vec<Status> {
        self.0.board.status()
    }

    /// Applies another configuration: new entries start, missing ones end, and every other one is replaced by a new generation if
    /// its entry or its file has changed. A replacement that fails leaves the old one running.
    pub async fn reload(&self, config: Config) -> Vec<Reloaded> {
        *self.0.loader.write() = Loader::new(&config);
        *self.0.config.write() = config.clone();
        let mut results = Vec::new();
        let wanted: Vec<PluginEntry> = config.plugin.into_iter().filter(|entry| entry.enabled).collect();
        let gone: Vec<String> = {
            let keepers = self.0.keepers.lock();
            keepers.keys().filter(|id| !wanted.iter().any(|entry| entry.id == **id)).cloned().collect()
        };
        for id in gone {
            self.remove(&id).await;
            results.push(Reloaded { id, result: Ok("stopped") });
        }
        for entry in wanted {
            let id = entry.id.clone();
            let commands = self.0.keepers.lock().get(&id).map(|handle| handle.commands.clone());
            let result = match commands {
                None => {
                    self.add(entry);
                    Ok("started")
                }
                Some(commands) => {
                    let (answer, result) = oneshot::channel();
                    let sent = commands.send(Command::Replace(Box::new(entry.clone()), answer)).await;
                    match (sent, result.await) {
                        (Ok(()), Ok(result)) => {
                            if result.is_ok()
                                && let Some(handle) = self.0.keepers.lock().get_mut(&id)
                            {
                                handle.entry = entry;
                            }
                            result
                        }
                        _ => Ok("stopping"),
                    }
                }
            };
            results.push(Reloaded { id, result });
        }
        results
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

    /// Drains and ends every plugin, at most for the configured time each, all at the same time.
    pub async fn shutdown(&self) {
        let ids: Vec<String> = self.0.keepers.lock().keys().cloned().collect();
        futures::future::join_all(ids.iter().map(|id| self.remove(id))).await;
    }

    /// The metrics of every running plugin, as id and OpenMetrics text.
    pub async fn metrics(&self) -> Vec<(String, String)> {
        let running = self.0.board.running();
        let texts = running.into_iter().map(|(id, connected)| async move {
            let cx = Cx::new().with_timeout(Duration::from_secs(1));
            connected.plugin.metrics(&cx).await.ok().map(|text| (id, text))
        });
        futures::future::join_all(texts).await.into_iter().flatten().collect()
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
