//! One plugin of the configuration, started for a command and ended with it.

use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::interface::Interface;

use super::{State, Supervisor};
use crate::config::{Config, PluginEntry};
use crate::loader::{Loader, inspect};
use crate::routes::{Route, Routes};

/// How long the plugin may take to be ready.
const START: Duration = Duration::from_secs(60);

/// Why there is no such plugin.
#[derive(Debug, thiserror::Error)]
pub enum AloneError {
    /// The configuration has no entry whose plugin is of this kind.
    #[error("no plugin of the configuration is of the kind {kind}")]
    None { kind: &'static str },
    #[error("the plugin `{id}` did not start: {why}")]
    Start { id: String, why: String },
}

/// A plugin that runs by itself.
pub struct Alone<K: ?Sized> {
    supervisor: Supervisor,
    pub client: Arc<K>,
}

impl<K: Interface + ?Sized> Alone<K> {
    /// Starts the plugin of this kind that the configuration names, enabled or not: among several an enabled one, then that of the best
    /// rank. `of` are its routes.
    pub async fn start(config: Config, of: impl Fn(&Routes) -> &[Arc<Route<K>>]) -> Result<Self, AloneError> {
        let best = entries::<K>(&config).into_iter().max_by_key(|entry| (entry.enabled, entry.rank));
        let entry = best.ok_or(AloneError::None { kind: K::KIND })?;
        Self::start_entry(config, entry, of).await
    }

    /// Starts this plugin, enabled or not.
    pub async fn start_entry(
        mut config: Config,
        entry: PluginEntry,
        of: impl Fn(&Routes) -> &[Arc<Route<K>>],
    ) -> Result<Self, AloneError> {
        // Whoever runs a command is not made to wait.
        config.node.drain_timeout_ms = 1000;
        let id = entry.id.clone();
        config.plugin = vec![PluginEntry { enabled: true, ..entry }];
        let supervisor = Supervisor::new(config);
        supervisor.start();
        let client = ready(&supervisor, &id, of).await?;
        Ok(Self { supervisor, client })
    }

    pub async fn end(self) {
        self.supervisor.shutdown().await;
    }
}

/// The entries of the configuration whose plugins are of this kind, as far as their files can be found.
pub fn entries<K: Interface + ?Sized>(config: &Config) -> Vec<PluginEntry> {
    let loader = Loader::new(config);
    let is_meant = |entry: &&PluginEntry| {
        let manifest = loader.find(&entry.use_).and_then(|file| inspect(&file));
        manifest.is_ok_and(|manifest| manifest.provides.iter().any(|provided| provided.kind == K::KIND))
    };
    config.plugin.iter().filter(is_meant).cloned().collect()
}

async fn ready<K: ?Sized>(
    supervisor: &Supervisor,
    id: &str,
    of: impl Fn(&Routes) -> &[Arc<Route<K>>],
) -> Result<Arc<K>, AloneError> {
    let failed = |why: String| AloneError::Start { id: id.to_owned(), why };
    let mut routes = supervisor.subscribe();
    let wait = async {
        loop {
            if let Some(route) = of(&routes.borrow_and_update()).first() {
                return Ok(route.client.clone());
            }
            for status in supervisor.status() {
                if let State::Quarantined { why } | State::Restarting { why, .. } = status.state {
                    return Err(failed(why));
                }
            }
            // The supervisor lives as long as this wait.
            let _ = routes.changed().await;
        }
    };
    match tokio::time::timeout(START, wait).await {
        Ok(ready) => ready,
        Err(_) => Err(failed(format!("it was not ready within {} s", START.as_secs()))),
    }
}
