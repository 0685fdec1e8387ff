//! From a name in `plugins.toml` to a file that may be started.
//!
//! Each step has its own error and nothing of the plugin runs before the probe, which is a process of its own:
//!
//! ```text
//! find -> read the manifest -> resolve versions -> trust -> private copy -> probe in a child -> check the configuration
//! ```
//!
//! What is started later is the private copy: no swap of the file between the check and the use can matter.

use std::path::{Path, PathBuf};
use std::time::Duration;

use fabstir_plugin_api::manifest::Manifest;
use fabstir_plugin_api::plugin::Description;

use crate::config::{PluginEntry, Plugins};

mod error;
mod find;
mod inspect;
mod probe;
mod schema;
mod trust;

pub use error::{LoadError, Step};
pub use inspect::{inspect, supported_interfaces};
pub use probe::probe_child;
pub use trust::{Lock, Locked, sha256};

/// How long a probe may take: opening the file and one answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(20);

/// What the pipeline needs to know of the node.
#[derive(Debug, Clone)]
pub struct Loader {
    pub plugins: Plugins,
    /// Where relative paths of `use` start.
    pub base_dir: PathBuf,
    /// The folder for private copies.
    pub copies: PathBuf,
    /// Looks only beside the node's own binary, for `--safe-mode`.
    pub bundled_only: bool,
}

/// A plugin file that has passed every step.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// The file that the operator named.
    pub source: PathBuf,
    /// The checked copy: the file to open.
    pub copy: PathBuf,
    pub sha256: String,
    pub manifest: Manifest,
    pub description: Description,
}

/// A plugin file that was checked without running anything of it.
#[derive(Debug, Clone)]
pub struct Checked {
    pub source: PathBuf,
    pub copy: PathBuf,
    pub sha256: String,
    pub manifest: Manifest,
}

impl Loader {
    pub fn new(config: &crate::config::Config) -> Self {
        Self {
            plugins: config.plugins.clone(),
            base_dir: config.base_dir.clone(),
            copies: config.node.data_dir.join("plugins"),
            bundled_only: config.node.safe_mode,
        }
    }

    /// The file that `use` means.
    pub fn find(&self, use_: &str) -> Result<PathBuf, LoadError> {
        find::find(use_, &self.plugins.dirs, &self.base_dir, self.bundled_only)
    }

    /// Every step that runs nothing of the plugin. Reads the whole file: not for an async task.
    pub fn check(&self, use_: &str) -> Result<Checked, LoadError> {
        let source = self.find(use_)?;
        let bytes = inspect::read(&source)?;
        let manifest = inspect::manifest(&source, &bytes)?;
        inspect::resolve(&source, &manifest)?;
        let sha256 = trust::check(&self.plugins.trust, &source, &bytes, &manifest)?;
        let copy = trust::copy(&self.copies, &source, &bytes, &sha256)?;
        Ok(Checked { source, copy, sha256, manifest })
    }

    /// Whether an artifact's copy is what it was, and still trusted. Reads the whole file: not for an async task.
    pub fn check_again(&self, artifact: &Artifact) -> Result<(), LoadError> {
        let bytes = inspect::read(&artifact.copy)?;
        let hash = trust::check(&self.plugins.trust, &artifact.source, &bytes, &artifact.manifest)?;
        match hash == artifact.sha256 {
            true => Ok(()),
            false => {
                Err(LoadError::new(Step::Trust, "P308", format!("the private copy {} was changed", display(&artifact.copy)))
                    .note("expected", &artifact.sha256)
                    .note("found", hash)
                    .fix("find out who writes to the node's data folder, then start the plugin again"))
            }
        }
    }

    /// The whole pipeline for one entry.
    pub async fn prepare(&self, entry: &PluginEntry) -> Result<Artifact, LoadError> {
        let (loader, use_) = (self.clone(), entry.use_.clone());
        let checked = tokio::task::spawn_blocking(move || loader.check(&use_))
            .await
            .map_err(|error| LoadError::new(Step::Read, "P100", format!("the check of the file failed: {error}")))??;
        let description = self.probe(&checked).await?;
        schema::check(&description, entry)?;
        let Checked { source, copy, sha256, manifest } = checked;
        Ok(Artifact { source, copy, sha256, manifest, description })
    }

    /// What the plugin says of itself, asked in a child process; remembered by the file's hash.
    pub async fn probe(&self, checked: &Checked) -> Result<Description, LoadError> {
        probe::probe(&checked.source, &checked.copy, PROBE_TIMEOUT).await
    }

    /// Adds files to the lock, or replaces their entries.
    pub fn lock(&self, files: &[PathBuf]) -> Result<Vec<Locked>, LoadError> {
        let mut lock = Lock::read(&self.plugins.trust.lock)?.unwrap_or_default();
        let mut added = Vec::new();
        for file in files {
            let bytes = inspect::read(file)?;
            let manifest = inspect::manifest(file, &bytes)?;
            let locked = Locked { name: manifest.name, version: manifest.version, sha256: sha256(&bytes) };
            lock.set(locked.clone());
            added.push(locked);
        }
        lock.write(&self.plugins.trust.lock)?;
        Ok(added)
    }

    /// Every plugin file in the folders that are searched, in their order.
    pub fn installed(&self) -> Vec<PathBuf> {
        find::installed(&self.plugins.dirs, self.bundled_only)
    }
}

fn display(path: &Path) -> String {
    path.display().to_string()
}
