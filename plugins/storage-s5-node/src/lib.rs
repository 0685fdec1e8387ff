//! Keeps blobs in an S5 node of its own, which serves them to other nodes and fetches theirs.
//!
//! ```text
//! plugin     the kind's trait: translation
//! node       what the node is made of: its identity, its endpoint, and when it is reachable
//! layout     where blobs lie in their folder               record     pointers as entries of S5's registry
//! serving    what other nodes may see and write            registry   the entries that are kept here
//! peers      other nodes: what they have, and what they send
//! ```
//!
//! The protocols and the forms on the disk are those of s5-rs, over iroh. This crate adds what a store must promise that others rely on:
//! that a blob is on the disk when a put returns, that what a node sends is checked before anybody sees it, that nobody is asked or let in
//! whom the operator has not named, and that whoever is let in can take so much and no more.

mod config;
mod error;
mod layout;
mod node;
mod peers;
mod plugin;
pub mod record;
mod registry;
mod serving;
#[cfg(test)]
mod tests;

use fabstir_plugin_api::prelude::*;

pub use config::Config;
pub use plugin::S5Node;

#[plugin(provides = [Storage(pointer, pointer_payload, pointer_set)], needs = ["net"])]
async fn init(host: Host, config: Config) -> Result<S5Node> {
    S5Node::open(config, host.state_dir()).await
}
