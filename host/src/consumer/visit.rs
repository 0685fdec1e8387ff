//! Taking part in the network for a while, to find and to ask: with the transport plugin of the configuration and a key of the moment.

use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::PluginError;
use fabstir_plugin_api::interface::Interface;
use fabstir_plugin_api::transport::{Join, Role, Transport};
use tempfile::TempDir;

use crate::config::{Config, PluginEntry};
use crate::identity::{IdentityError, NodeKey};
use crate::loader::{Loader, inspect};
use crate::supervisor::{State, Supervisor};

/// How long the plugin may take to be ready.
const START: Duration = Duration::from_secs(60);
/// How long a node may take to answer a dial.
const DIAL: Duration = Duration::from_secs(10);

/// Why the network cannot be visited.
#[derive(Debug, thiserror::Error)]
pub enum VisitError {
    #[error(
        "no plugin of the configuration leads into a network: add an entry to plugins.toml, such as\n\n  [[plugin]]\n  id = \"net\"\n  \
         use = \"transport-libp2p\"\n  enabled = false\n"
    )]
    NoTransport,
    #[error("the plugin `{id}` did not start: {why}")]
    Start { id: String, why: String },
    #[error(transparent)]
    Key(IdentityError),
    #[error("the network cannot be joined: {0}")]
    Join(PluginError),
    #[error("nobody answers at {0}")]
    Unreachable(String),
    #[error("no folder for temporary files: {0}")]
    Folder(std::io::Error),
}

/// A visit to the network.
pub struct Visit {
    supervisor: Supervisor,
    pub transport: Arc<dyn Transport>,
    /// The plugin's state goes with the visit: that of a node that runs beside it stays its own.
    _folder: TempDir,
}

impl Visit {
    /// Starts the transport plugin of the configuration, enabled or not, and joins as a visitor. `bootstrap` are dialled besides the nodes
    /// that the plugin knows.
    ///
    /// # Errors
    /// When there is no such plugin, when it does not start, and when nodes to dial were named and none of them answers.
    pub async fn begin(config: &Config, bootstrap: &[String]) -> Result<Self, VisitError> {
        let folder = tempfile::Builder::new().prefix("fabstir-visit-").tempdir().map_err(VisitError::Folder)?;
        let mut config = config.clone();
        config.node.data_dir = folder.path().to_owned();
        // Whoever visits is not waited for.
        config.node.drain_timeout_ms = 1000;
        let entry = transport_entry(&config).ok_or(VisitError::NoTransport)?;
        let id = entry.id.clone();
        config.plugin = vec![PluginEntry { enabled: true, ..entry }];
        let supervisor = Supervisor::new(config);
        supervisor.start();
        let transport = ready(&supervisor, &id).await?;
        let visit = Self { supervisor, transport, _folder: folder };
        let key = NodeKey::ephemeral().map_err(VisitError::Key)?;
        let join = Join { secret_key: key.secret().to_vec(), role: Role::Visitor };
        visit.transport.join(&Cx::new().with_timeout(START), join).await.map_err(VisitError::Join)?;
        visit.dial(bootstrap).await?;
        Ok(visit)
    }

    async fn dial(&self, addresses: &[String]) -> Result<(), VisitError> {
        let dial = |address: &String| {
            let (transport, address) = (self.transport.clone(), address.clone());
            async move {
                let dialled = transport.dial(&Cx::new().with_timeout(DIAL), address.clone()).await;
                dialled.map_err(|error| format!("{address} ({error})"))
            }
        };
        let dialled = futures::future::join_all(addresses.iter().map(dial)).await;
        let failed: Vec<String> = dialled.into_iter().filter_map(Result::err).collect();
        match !failed.is_empty() && failed.len() == addresses.len() {
            true => Err(VisitError::Unreachable(failed.join(", "))),
            false => Ok(()),
        }
    }

    pub async fn end(self) {
        self.supervisor.shutdown().await;
    }
}

/// The entry of the best rank whose plugin is a transport.
fn transport_entry(config: &Config) -> Option<PluginEntry> {
    let loader = Loader::new(config);
    let is_transport = |entry: &&PluginEntry| {
        let manifest = loader.find(&entry.use_).and_then(|file| inspect(&file));
        manifest
            .is_ok_and(|manifest| manifest.provides.iter().any(|provided| provided.kind == <dyn Transport as Interface>::KIND))
    };
    config.plugin.iter().filter(is_transport).max_by_key(|entry| (entry.enabled, entry.rank)).cloned()
}

async fn ready(supervisor: &Supervisor, id: &str) -> Result<Arc<dyn Transport>, VisitError> {
    let mut routes = supervisor.subscribe();
    let wait = async {
        loop {
            if let Some(route) = routes.borrow_and_update().transport.first() {
                return Ok(route.transport.clone());
            }
            for status in supervisor.status() {
                if let State::Quarantined { why } | State::Restarting { why, .. } = status.state {
                    return Err(VisitError::Start { id: id.to_owned(), why });
                }
            }
            // The supervisor lives as long as the visit.
            let _ = routes.changed().await;
        }
    };
    match tokio::time::timeout(START, wait).await {
        Ok(ready) => ready,
        Err(_) => Err(VisitError::Start { id: id.to_owned(), why: format!("it was not ready within {} s", START.as_secs()) }),
    }
}
