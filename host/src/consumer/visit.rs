//! Taking part in the network for a while, to find and to ask: with the transport plugin of the configuration and a key of the moment.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::PluginError;
use fabstir_plugin_api::transport::{Join, PeerId, Role, Transport};
use tempfile::TempDir;

use crate::config::Config;
use crate::identity::{IdentityError, NodeKey};
use crate::supervisor::{Alone, AloneError};

/// How long joining may take.
const START: Duration = Duration::from_secs(60);
/// What the folder of a visit is called, before a part that no other has.
const FOLDER: &str = "fabstir-visit-";
/// How old a folder is before it can be one that a killed visit has left: a visit has its lock by then.
const LEFT: Duration = Duration::from_secs(60);
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
    #[error(transparent)]
    Start(AloneError),
    #[error(transparent)]
    Key(IdentityError),
    #[error("the network cannot be joined: {0}")]
    Join(PluginError),
    #[error("nobody answers at {0}")]
    Unreachable(String),
    #[error("no folder for temporary files: {0}")]
    Folder(io::Error),
}

/// A visit to the network.
pub struct Visit {
    plugin: Alone<dyn Transport>,
    pub transport: Arc<dyn Transport>,
    /// What this visitor is called in the network.
    pub peer: PeerId,
    /// The plugin's state goes with the visit: that of a node that runs beside it stays its own.
    _folder: TempDir,
    /// Held as long as the folder is in use.
    _lock: File,
}

impl Visit {
    /// Starts the transport plugin of the configuration, enabled or not, and joins as a visitor. `bootstrap` are dialled besides the nodes
    /// that the plugin knows.
    ///
    /// # Errors
    /// When there is no such plugin, when it does not start, and when nodes to dial were named and none of them answers.
    pub async fn begin(config: &Config, bootstrap: &[String]) -> Result<Self, VisitError> {
        // What fails there is no reason not to begin.
        let _ = tokio::task::spawn_blocking(|| remove_left(&std::env::temp_dir())).await;
        let (folder, lock) = make_folder().map_err(VisitError::Folder)?;
        let mut config = config.clone();
        config.node.data_dir = folder.path().to_owned();
        let plugin = Alone::start(config, |routes| &routes.transport).await.map_err(|error| match error {
            AloneError::None { .. } => VisitError::NoTransport,
            AloneError::Start { .. } => VisitError::Start(error),
        })?;
        let transport = plugin.client.clone();
        let key = NodeKey::ephemeral().map_err(VisitError::Key)?;
        let join = Join { secret_key: key.secret().to_vec(), role: Role::Visitor };
        let peer = transport.join(&Cx::new().with_timeout(START), join).await.map_err(VisitError::Join)?.id;
        let visit = Self { transport, peer, plugin, _folder: folder, _lock: lock };
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
        self.plugin.end().await;
    }
}

fn make_folder() -> io::Result<(TempDir, File)> {
    let folder = tempfile::Builder::new().prefix(FOLDER).tempdir()?;
    let lock = File::open(folder.path())?;
    // Where a file system has no locks, nobody gets one to remove the folder either.
    let _ = lock.try_lock();
    Ok((folder, lock))
}

/// Removes what visits have left that were killed: plugins, some of them large.
fn remove_left(folder: &Path) {
    let is_left = |entry: &fs::DirEntry| -> io::Result<bool> {
        if !entry.file_name().to_string_lossy().starts_with(FOLDER) || !entry.file_type()?.is_dir() {
            return Ok(false);
        }
        let age = SystemTime::now().duration_since(entry.metadata()?.modified()?).unwrap_or_default();
        Ok(age > LEFT && File::open(entry.path())?.try_lock().is_ok())
    };
    // Others may remove them at the same time, and may have folders that are not ours to remove.
    for entry in fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| is_left(entry).unwrap_or(false)) {
        let removed = fs::remove_dir_all(entry.path());
        tracing::debug!(folder = %entry.path().display(), ?removed, "A visit that was killed had left a folder.");
    }
}
