//! A node under test: the shipped binary with real plugins, in a folder and on a port of its own.
//!
//! ```no_run
//! # async fn test() {
//! use fabstir_tests::{Node, chat};
//!
//! let node = Node::start("[[plugin]]\nid = 'echo'\nuse = 'inference-echo'").await;
//! let answer = node.post("/v1/chat/completions", &chat("echo", "one two")).await;
//! assert_eq!(answer.status, 200);
//! # }
//! ```
//!
//! - [`Place`] is a folder with a configuration, in which commands run; [`Node`] is a running node in one.
//! - [`peers`] are nodes in a network. [`http`] talks to a node, [`process`] looks at its processes, [`terminal`] is a terminal for its chat.
//! - [`dev_chain`] is a chain with the market's contracts on it, [`market`] are those who meet there, [`posting`] is a client's side of posted jobs.
//! - [`portal`] is an S5 portal on this machine.
//! - [`payer`] is a client of the market that does what a test wants.
//! - [`rogue`] makes libraries that no toolchain of ours would make, [`gguf`] model files that nobody should load.
//!
//! Nothing here sleeps for a fixed time: [`eventually`] looks again and again, and fails at its limit with the node's log.

use std::path::PathBuf;
use std::time::{Duration, Instant};

pub mod dev_chain;
pub mod gguf;
pub mod http;
pub mod market;
pub mod node;
pub mod payer;
pub mod peers;
pub mod place;
pub mod portal;
pub mod posting;
pub mod process;
pub mod rogue;
pub mod terminal;

pub use http::{Reply, Told, chat};
pub use node::Node;
pub use place::{Place, Ran};

/// How long a thing may take that takes milliseconds on an idle machine.
pub const LIMIT: Duration = Duration::from_secs(30);

/// The folder of built files: the test programs lie in its `deps`.
pub fn built() -> PathBuf {
    let program = std::env::current_exe().expect("a test knows its own program");
    let folder = program.parent().and_then(|deps| deps.parent());
    folder.expect("a test program lies in target/PROFILE/deps").to_owned()
}

/// A built file; fails with the command that builds it.
pub fn artifact(name: &str) -> PathBuf {
    let path = built().join(name);
    assert!(path.is_file(), "{} is missing: run `cargo build --release --workspace`, or `make test`", path.display());
    path
}

/// A plugin's library by the plugin's name.
pub fn library(plugin: &str) -> PathBuf {
    let name = plugin.replace('-', "_");
    artifact(&format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX))
}

/// The repository's root.
pub fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests lie in the repository").to_owned()
}

/// The entry for llama.cpp with the model that is part of the project.
pub fn tiny_chat() -> String {
    let model = repository().join("models/tiny-chat/tiny-chat-q8_0.gguf");
    format!(
        "[[plugin]]\nid = 'llama'\nuse = 'inference-llama-cpp'\n\
         [[plugin.config.models]]\nid = 'tiny-chat'\npath = '{}'\nthreads = 1\n",
        model.display()
    )
}

/// Looks until there is something to see.
///
/// # Panics
/// At the limit, with `what` in the message.
pub async fn eventually<T>(what: &str, limit: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(began.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
