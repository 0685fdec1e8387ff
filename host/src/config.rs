//! What the operator decided: one file, overridden by the environment, overridden by flags.
//!
//! ```text
//! defaults  <  plugins.toml  <  FABSTIR_SECTION__KEY  <  --listen, --log, --safe-mode, --set key=value
//! ```
//!
//! The doc comment of a field is its whole documentation: the reference page (`docs/configuration.md`) is made from it.
//! No other module reads the file or the environment.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

mod file;
mod levels;
mod merged;
mod problem;
mod schema;
mod size;
mod sources;
#[cfg(test)]
mod tests;

pub use levels::{LogLevels, PLUGIN};
pub use problem::{Place, Problem, Problems};
pub use size::Bytes;
pub use sources::{Flag, Loaded, Setting, Sources};

/// The whole configuration, merged and checked. Paths that the node itself uses are absolute.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The node as a process.
    pub node: Node,
    /// The HTTP edge for clients.
    pub gateway: Gateway,
    /// Which requests wait, and how many.
    pub scheduler: Scheduler,
    /// Which answers are kept, to be given again.
    pub cache: Cache,
    /// What other nodes are offered.
    pub network: Network,
    /// The keys of accounts, which own money on a chain.
    pub keys: Keys,
    /// What this node does in the market's contracts.
    pub market: Market,
    /// Where plugins come from, and which are trusted.
    pub plugins: Plugins,
    /// The plugins that the node starts, one table each.
    pub plugin: Vec<PluginEntry>,
    /// The folder of the configuration file, or the current folder where there is none. Plugins run in it, so that relative
    /// paths in their `config` tables start there.
    #[serde(skip)]
    pub base_dir: PathBuf,
}

/// The node as a process.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Node {
    /// The folder for the state of the node and of its plugins. A path; relative ones start at the file's folder.
    ///
    /// Default: `$XDG_DATA_HOME/fabstir-node`, or `~/.local/share/fabstir-node`.
    /// Example: `data_dir = "/var/lib/fabstir-node"`.
    #[schemars(extend("format" = "path"))]
    pub data_dir: PathBuf,
    /// What is logged: a level, or a list of `target=level`, where a plugin's target is `plugin::ID`.
    ///
    /// Default: `"info"`.
    /// Example: `log = "info,plugin::llama=debug"`.
    #[schemars(extend("format" = "log-filter"))]
    pub log: String,
    /// How long running requests may take to end after SIGTERM, and after a plugin is replaced. Milliseconds.
    ///
    /// Default: `30000`.
    /// Example: `drain_timeout_ms = 120000`.
    pub drain_timeout_ms: u64,
    /// Looks for plugins only beside the node's own binary. For finding out which one breaks a start.
    ///
    /// Default: `false`.
    /// Example: `safe_mode = true`.
    pub safe_mode: bool,
}

impl Default for Node {
    fn default() -> Self {
        Self { data_dir: default_data_dir(), log: "info".into(), drain_timeout_ms: 30_000, safe_mode: false }
    }
}

/// The HTTP edge for clients.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Gateway {
    /// Where HTTP clients connect: address and port. Port 0 takes a free one, which the log names. There are no API keys:
    /// who reaches this address may use the node.
    ///
    /// Default: `"127.0.0.1:8080"`.
    /// Example: `listen = "0.0.0.0:8080"`.
    #[schemars(with = "String", extend("format" = "address"))]
    pub listen: SocketAddr,
    /// The largest request body. Bytes, as a number or with KiB, MiB or GiB; a larger one is refused with 413.
    ///
    /// Default: `"8MiB"`.
    /// Example: `max_body = "32MiB"`.
    #[schemars(range(min = 1))]
    pub max_body: Bytes,
    /// Web pages that may call this node from a browser: origins, or `"*"` for all. Empty switches CORS off.
    ///
    /// Default: `[]`.
    /// Example: `cors_origins = ["https://chat.example.org"]`.
    #[schemars(extend("items" = { "type": "string", "format": "origin" }))]
    pub cors_origins: Vec<String>,
    /// How long a client may take to send a request, headers and body. Milliseconds.
    ///
    /// Default: `10000`.
    /// Example: `header_timeout_ms = 30000`.
    #[schemars(range(min = 1))]
    pub header_timeout_ms: u64,
    /// The pause after which a silent stream sends a comment, so that proxies keep it open. Milliseconds.
    ///
    /// Default: `15000`.
    /// Example: `ping_interval_ms = 5000`.
    #[schemars(range(min = 1))]
    pub ping_interval_ms: u64,
    /// The longest that one request may take, waiting included. Milliseconds.
    ///
    /// Default: `600000`.
    /// Example: `request_timeout_ms = 1800000`.
    #[schemars(range(min = 1))]
    pub request_timeout_ms: u64,
}

impl Default for Gateway {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            max_body: Bytes(8 << 20),
            cors_origins: Vec::new(),
            header_timeout_ms: 10_000,
            ping_interval_ms: 15_000,
            request_timeout_ms: 600_000,
        }
    }
}

/// What other nodes are offered. They are met through a plugin of the kind transport; without one the node is known to nobody.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// What a million tokens of a prompt cost, in wei. Others choose by it. Charged where `market.key` is set.
    ///
    /// Default: `0`.
    /// Example: `price_input_wei_per_mtok = 40000000000000`.
    pub price_input_wei_per_mtok: u64,
    /// What a million tokens of an answer cost, in wei. Others choose by it. Charged where `market.key` is set.
    ///
    /// Default: `0`.
    /// Example: `price_output_wei_per_mtok = 120000000000000`.
    pub price_output_wei_per_mtok: u64,
    /// How many sessions one peer may have at a time, each with up to 64 requests.
    ///
    /// Default: `16`.
    /// Example: `sessions_per_peer = 4`.
    #[schemars(range(min = 1))]
    pub sessions_per_peer: usize,
}

impl Default for Network {
    fn default() -> Self {
        Self { price_input_wei_per_mtok: 0, price_output_wei_per_mtok: 0, sessions_per_peer: 16 }
    }
}

/// The keys of accounts, which own money on a chain; `fabstir-node keys` makes and lists them.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Keys {
    /// The file with the password of the keys in its only line; nobody but its owner may read it. Left out, the terminal is asked. A
    /// path; relative ones start at the file's folder.
    ///
    /// Example: `password_file = "/run/credentials/fabstir-node/password"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub password_file: Option<PathBuf>,
}

/// What this node does in the market's contracts, through a plugin of the kind chain; `fabstir-node market` shows it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Market {
    /// The name of the account key to act with, as `fabstir-node keys list` shows it.
    ///
    /// Example: `key = "hot"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The most that the fees of one transaction can come to, in wei. What costs more is not signed. The default is 0.005 ETH.
    ///
    /// Default: `5000000000000000`.
    /// Example: `max_fee_wei = 1000000000000000`.
    pub max_fee_wei: u64,
    /// The most that the fees of one day can come to, in wei, counted from the last start. The default is 0.05 ETH.
    ///
    /// Default: `50000000000000000`.
    /// Example: `daily_fee_wei = 10000000000000000`.
    pub daily_fee_wei: u64,
    /// How many tokens of an answer a client is given ahead of its vouchers: the most that one who does not pay takes along.
    ///
    /// Default: `256`.
    /// Example: `credit_tokens = 64`.
    #[schemars(range(min = 1))]
    pub credit_tokens: u32,
    /// How long delivery waits for a voucher once the credit is used up; then the answer is cut off. Seconds.
    ///
    /// Default: `30`.
    /// Example: `voucher_timeout_s = 10`.
    #[schemars(range(min = 1))]
    pub voucher_timeout_s: u64,
    /// How long a paid session lasts at most. Seconds, from 60 to 30 days.
    ///
    /// Default: `86400`.
    /// Example: `session_s = 3600`.
    #[schemars(range(min = 60, max = 2592000))]
    pub session_s: u64,
    /// How long after the end of a paid session vouchers can still be handed in. Seconds, from 10 to 30 days. What a node that is down for
    /// longer has not handed in is lost.
    ///
    /// Default: `3600`.
    /// Example: `settle_window_s = 86400`.
    #[schemars(range(min = 10, max = 2592000))]
    pub settle_window_s: u64,
    /// How long a paid session may be unused before it is settled. Seconds.
    ///
    /// Default: `600`.
    /// Example: `idle_settle_s = 60`.
    pub idle_settle_s: u64,
    /// From this amount on, in wei, a deposit or a posted job counts only once its block is safe; below it, the newest block is enough. The
    /// default is 0.01 ETH.
    ///
    /// Default: `10000000000000000`.
    /// Example: `sure_above_wei = 1000000000000000`.
    pub sure_above_wei: u64,
    /// How many posted jobs are worked on at a time; 0 takes none. They wait for the same slots as other requests.
    ///
    /// Default: `1`.
    /// Example: `jobs = 4`.
    pub jobs: u32,
    /// The largest bond that is put up for a posted job, in wei: what being late costs. The default is 0.01 ETH.
    ///
    /// Default: `10000000000000000`.
    /// Example: `max_bond_wei = 1000000000000000`.
    pub max_bond_wei: u64,
    /// The contracts that may rule on a result which its client objects to: whoever they rule for has the amount, and of the bond of the
    /// other as much as they say. A posted job that names another arbiter is declined; one that names none cannot be objected to.
    ///
    /// Default: `[]`.
    /// Example: `arbiters = ["0x5FbDB2315678afecb367f032d93F642f64180aa3"]`.
    #[schemars(extend("items" = { "type": "string", "format": "account" }))]
    pub arbiters: Vec<String>,
    /// How long a posted job must give its arbiter to rule, in seconds. One that does not rule in time gives the client its money back where no
    /// proof was asked for.
    ///
    /// Default: `3600`.
    /// Example: `least_resolve_s = 86400`.
    pub least_resolve_s: u64,
    /// How long the pay and the bond of a posted job may be out after its result, in seconds: what its client has to object, and its arbiter
    /// to rule. The default is a week.
    ///
    /// Default: `604800`.
    /// Example: `max_wait_s = 86400`.
    pub max_wait_s: u64,
}

impl Default for Market {
    fn default() -> Self {
        Self {
            key: None,
            max_fee_wei: 5_000_000_000_000_000,
            daily_fee_wei: 50_000_000_000_000_000,
            credit_tokens: 256,
            voucher_timeout_s: 30,
            session_s: 86_400,
            settle_window_s: 3600,
            idle_settle_s: 600,
            sure_above_wei: 10_000_000_000_000_000,
            jobs: 1,
            max_bond_wei: 10_000_000_000_000_000,
            arbiters: Vec::new(),
            least_resolve_s: 3600,
            max_wait_s: 604_800,
        }
    }
}

/// Which requests wait, and how many.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Scheduler {
    /// How many requests may wait for a free slot. One more is refused with 429 and a `Retry-After`.
    ///
    /// Default: `64`.
    /// Example: `queue = 16`.
    pub queue: usize,
    /// How many prompt tokens, estimated, may wait in all. Tokens.
    ///
    /// Default: `131072`.
    /// Example: `queue_tokens = 32768`.
    pub queue_tokens: usize,
    /// How often a request that has produced nothing yet is tried again after its plugin failed. It may be what made the plugin fail, so
    /// each such request runs without another of them beside it.
    ///
    /// Default: `1`.
    /// Example: `retries = 0`.
    pub retries: u32,
}

impl Default for Scheduler {
    fn default() -> Self {
        Self { queue: 64, queue_tokens: 131_072, retries: 1 }
    }
}

/// Which answers are kept, to be given again to clients of the HTTP edge.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Cache {
    /// Whether answers are kept, on disk, and given again to the same request of the same client: those that would come out the same, at
    /// temperature 0 or with a seed. Off, because it writes what clients were told to the disk, and because whoever measures a model by
    /// asking it the same thing twice would measure the cache.
    ///
    /// Default: `false`.
    /// Example: `enabled = true`.
    pub enabled: bool,
    /// How much room they may take. Bytes, as a number or with KiB, MiB or GiB. What saved the fewest tokens for its size goes first.
    ///
    /// Default: `"256MiB"`.
    /// Example: `max_bytes = "4GiB"`.
    #[schemars(range(min = 65536))]
    pub max_bytes: Bytes,
    /// How long an answer is kept. Seconds.
    ///
    /// Default: `86400`.
    /// Example: `ttl_s = 3600`.
    #[schemars(range(min = 1))]
    pub ttl_s: u64,
    /// How long a request may wait for the disk to say whether its answer is kept, and for the plugin whose vectors are compared, in
    /// milliseconds. Past that it is answered anew.
    ///
    /// Default: `100`.
    /// Example: `look_ms = 20`.
    #[schemars(range(min = 1, max = 60_000))]
    pub look_ms: u64,
    /// Whether a question may be answered with the answer to another that means the same.
    pub semantic: Semantic,
    /// Whether answers are shared with other nodes of the same operator.
    pub shared: Shared,
}

/// Whether a question may be answered with the answer to another that means the same: only the single question of a conversation, asked by
/// the same client of the same model with the same settings, and only where no word differs that an answer hangs on. English.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Semantic {
    /// The model that makes vectors of questions, one that this node serves. Left out, questions are not compared. The vectors lie in a storage
    /// plugin that keeps such: storage-disk.
    ///
    /// Example: `model = "all-minilm"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// How alike two questions have to be: the cosine of their vectors, in thousandths. What is right depends on the model.
    ///
    /// Default: `900`.
    /// Example: `threshold_permille = 950`.
    #[schemars(range(min = 1, max = 1000))]
    pub threshold_permille: u16,
    /// How long an answer that could begin is held back while its question is compared, in milliseconds. Comparing and answering begin at
    /// the same time; what is compared first wins.
    ///
    /// Default: `6`.
    /// Example: `wait_ms = 50`.
    #[schemars(range(min = 0, max = 10_000))]
    pub wait_ms: u64,
}

/// Whether answers are shared with other nodes of the same operator: sealed with a key that those nodes have, in a storage plugin that they
/// all reach. Each fetches what the others put there in the background, and answers from its own disk.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Shared {
    /// The id of the storage plugin, which has to keep pointers: storage-s5 or storage-s5-node. Left out, nothing is shared.
    ///
    /// Example: `storage = "s5"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<String>,
    /// The file with the key, 64 hexadecimal digits, for nobody but its owner to read. It is made where there is none: copy it to the other
    /// nodes. Whoever has it reads and writes the shared answers. Default: `cache/shared.key` in the data folder.
    ///
    /// Example: `key_file = "/etc/fabstir-node/shared.key"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "path"))]
    pub key_file: Option<PathBuf>,
    /// How often it is looked for what others have put there, and new answers are added, in seconds.
    ///
    /// Default: `60`.
    /// Example: `every_s = 10`.
    #[schemars(range(min = 1))]
    pub every_s: u64,
}

impl Default for Shared {
    fn default() -> Self {
        Self { storage: None, key_file: None, every_s: 60 }
    }
}

impl Default for Semantic {
    fn default() -> Self {
        Self { model: None, threshold_permille: 900, wait_ms: 6 }
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            enabled: false,
            max_bytes: Bytes(256 << 20),
            ttl_s: 86_400,
            look_ms: 100,
            semantic: Semantic::default(),
            shared: Shared::default(),
        }
    }
}

/// Where plugins come from, and which are trusted.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Plugins {
    /// The folders in which a plugin is looked for by name, first match wins; the folder of the node's own binary comes last.
    /// Relative ones start at the configuration file's folder.
    ///
    /// Default: `["plugins"]`.
    /// Example: `dirs = ["plugins", "/usr/lib/fabstir-node"]`.
    #[schemars(extend("items" = { "type": "string", "format": "path" }))]
    pub dirs: Vec<PathBuf>,
    /// Which plugin files may be loaded.
    pub trust: Trust,
}

impl Default for Plugins {
    fn default() -> Self {
        Self { dirs: vec!["plugins".into()], trust: Trust::default() }
    }
}

/// Which plugin files may be loaded.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Trust {
    /// `"known"`: files whose SHA-256 is in the lock file. `"signed"`: files with a signature by one of `keys`.
    /// `"any"`: every file, for developing a plugin.
    ///
    /// Default: `"known"`.
    /// Example: `policy = "signed"`.
    pub policy: Policy,
    /// The public keys whose signatures count: `ed25519:` and 64 hexadecimal digits.
    ///
    /// Default: `[]`.
    /// Example: `keys = ["ed25519:d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"]`.
    #[schemars(extend("items" = { "type": "string", "format": "public-key" }))]
    pub keys: Vec<String>,
    /// The file with the SHA-256 of each known plugin, as `fabstir-node plugin lock` writes it. Relative ones start at the
    /// configuration file's folder.
    ///
    /// Default: `"plugins.lock"`.
    /// Example: `lock = "/etc/fabstir-node/plugins.lock"`.
    #[schemars(extend("format" = "path"))]
    pub lock: PathBuf,
}

impl Default for Trust {
    fn default() -> Self {
        Self { policy: Policy::Known, keys: Vec::new(), lock: "plugins.lock".into() }
    }
}

/// Which plugin files may be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(inline)]
pub enum Policy {
    Signed,
    Known,
    Any,
}

/// One plugin to start.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PluginEntry {
    /// The operator's name for this instance, in logs, metrics and commands: lower-case letters, digits and `-`. Required.
    ///
    /// Example: `id = "llama"`.
    #[schemars(extend("format" = "plugin-id"))]
    pub id: String,
    /// Which plugin: its name, looked up in `plugins.dirs` and beside the node's own binary, or a path to its file, which starts
    /// at the configuration file's folder. Required.
    ///
    /// Example: `use = "inference-llama-cpp"`.
    #[serde(rename = "use")]
    #[schemars(length(min = 1))]
    pub use_: String,
    /// Whether it is started.
    ///
    /// Default: `true`.
    /// Example: `enabled = false`.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// Where it runs. `"process"`: in a process of its own, so that its crash ends nothing else. `"in-process"`: in the node.
    /// Left out, inference and provers run in a process, the other kinds in the node.
    ///
    /// Example: `isolation = "in-process"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub isolation: Option<Isolation>,
    /// Among plugins that serve the same model the highest with a free slot is used.
    ///
    /// Default: `0`.
    /// Example: `rank = 100`.
    #[serde(default)]
    pub rank: i32,
    /// What it may use.
    #[serde(default)]
    pub limits: Limits,
    /// The plugin's own settings, checked against its schema; `fabstir-node plugin inspect FILE` prints them. Plugins run in the
    /// configuration file's folder, so that relative paths start there unless the plugin says otherwise.
    ///
    /// Default: `{}`.
    /// Example: `config = { models = [{ id = "tiny-chat", path = "models/tiny-chat/tiny-chat-q8_0.gguf" }] }`.
    #[serde(default)]
    pub config: Map<String, Value>,
    /// Where the table stands.
    #[serde(skip)]
    pub origin: Origin,
}

/// Where a plugin's code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(inline)]
pub enum Isolation {
    InProcess,
    Process,
}

/// What a plugin may use.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The most memory that a plugin in a process of its own may take. Bytes, as a number or with KiB, MiB or GiB. Left out,
    /// there is no limit.
    ///
    /// Example: `memory = "20GiB"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1048576))]
    pub memory: Option<Bytes>,
    /// The most calls that run in it at once; more wait in the scheduler. Left out, the plugin's own number of slots decides.
    ///
    /// Example: `in_flight = 32`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub in_flight: Option<u32>,
    /// The longest that a start may take, loading of models included. Milliseconds.
    ///
    /// Default: `600000`.
    /// Example: `start_timeout_ms = 60000`.
    #[schemars(range(min = 1))]
    pub start_timeout_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory: None, in_flight: None, start_timeout_ms: 600_000 }
    }
}

/// Where a `[[plugin]]` table stands: `plugins.toml:14`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    pub file: PathBuf,
    /// From 1; 0 where the entry comes from the environment or a flag.
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str("environment or flags"),
            line => write!(f, "{}:{line}", self.file.display()),
        }
    }
}

fn yes() -> bool {
    true
}

fn default_data_dir() -> PathBuf {
    data_home(std::env::var_os("XDG_DATA_HOME"), std::env::var_os("HOME"))
}

fn data_home(xdg: Option<std::ffi::OsString>, home: Option<std::ffi::OsString>) -> PathBuf {
    // A relative XDG_DATA_HOME is to be ignored: https://specifications.freedesktop.org/basedir-spec/latest/
    xdg.map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| home.map(|home| Path::new(&home).join(".local/share")))
        .unwrap_or_else(|| PathBuf::from("."))
        .join("fabstir-node")
}
