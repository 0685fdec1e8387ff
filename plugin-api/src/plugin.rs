//! The interface that every plugin answers besides its own kinds.

use std::path::PathBuf;

use async_trait::async_trait;
use fabstir_plugin_macros::interface;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::abi::Blob;
use crate::context::Cx;
use crate::error::Result;

/// Identity, configuration, health and end of an instance. `#[plugin]` answers all of it; an author writes `init` and, where it
/// helps, [`Lifecycle`].
#[interface(kind = "plugin", version = "1.0")]
#[async_trait]
pub trait Plugin: Send + Sync {
    /// What this plugin is and takes. The same answer every time, before and after `configure`.
    async fn describe(&self, cx: &Cx) -> Result<Description>;

    /// Gives the instance its configuration and runs the author's `init`. Called once, before any method of a kind.
    ///
    /// # Errors
    /// `InvalidArgument` when the configuration does not fit the schema: the message names the key. Or whatever `init` returned.
    async fn configure(&self, cx: &Cx, configure: Configure) -> Result<()>;

    /// How the instance is. Called every few seconds, and several times a second while a model loads; answers at once.
    async fn health(&self, cx: &Cx) -> Result<Health>;

    /// Returns its payload. The host's heartbeat, and the null call of the benches.
    async fn ping(&self, cx: &Cx, payload: Blob) -> Result<Blob>;

    /// The metrics that the instance registered, in OpenMetrics text.
    async fn metrics(&self, cx: &Cx) -> Result<String>;

    /// New calls of a kind are refused with `Unavailable` from now on; returns when those running have ended.
    async fn drain(&self, cx: &Cx) -> Result<()>;

    /// Ends the instance: running calls are cancelled, the author's `shutdown` runs. The host then closes the port, and the
    /// instance's threads are gone shortly after.
    async fn shutdown(&self, cx: &Cx) -> Result<()>;
}

/// Optional hooks into an instance's life, for types whose work outlives single calls.
#[async_trait]
pub trait Lifecycle: Send + Sync {
    /// How the work is going. The default is `Ready`.
    async fn health(&self) -> Health {
        Health::Ready
    }

    /// The last thing an instance does: stop its own threads, flush its files. It has 10 seconds.
    async fn shutdown(&self) {}
}

/// What a plugin says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Description {
    /// The crate's name.
    pub name: String,
    pub version: String,
    /// The crate's description: one line.
    pub description: String,
    pub license: String,
    pub provides: Vec<Provided>,
    /// What the plugin asks for: `gpu`, `net`, `fs.read`.
    #[serde(default)]
    pub needs: Vec<String>,
    /// JSON Schema of the `config` table, as text.
    pub config_schema: String,
}

/// A kind that a plugin provides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Provided {
    pub kind: String,
    /// The interface version that it was built against.
    pub version: String,
    /// The methods that work: all required ones, and the optional ones that the plugin declares.
    pub methods: Vec<String>,
}

/// What an instance is started with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Configure {
    /// The operator's name for the instance.
    pub instance: String,
    /// The instance's own folder for state.
    pub state_dir: PathBuf,
    /// The operator's `config` table as JSON text.
    pub config: String,
    /// The least level to log: `error`, `warn`, `info`, `debug` or `trace`.
    pub log_level: String,
}

/// How an instance is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Works as it should.
    Ready,
    /// Busy becoming ready: what it does, and how far it is, 0 to 100, where that is known.
    Starting { doing: String, percent: Option<u8> },
    /// Works, but not as it should.
    Degraded { reason: String },
    /// Cannot work again without a restart.
    Failed { reason: String },
    /// A state of a newer interface.
    #[serde(other)]
    Unknown,
}
