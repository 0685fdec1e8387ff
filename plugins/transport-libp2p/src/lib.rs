//! Finds other nodes and talks to them over libp2p.
//!
//! One task owns the swarm (`network::driver`) and takes commands; nothing in it waits for anything else. `topics` says under which keys
//! of the hash table an advertisement lies, `records` is the store of those that this node keeps for others, `addresses` decides which
//! of the addresses that others name are dialled. `streams` gives libp2p's connections streams for conversations, `arrivals` lets those
//! wait that peers have opened, and `conversation` carries messages in the form that `messages` defines. `plugin` carries all that
//! across to the node's streams.

mod addresses;
mod arrivals;
mod config;
mod conversation;
mod error;
mod messages;
mod network;
mod plugin;
mod records;
mod streams;
mod swarm;
mod topics;

use fabstir_plugin_api::prelude::*;

pub use config::Config;
pub use plugin::Libp2p;

#[plugin(provides = [Transport], needs = ["net"])]
async fn init(host: Host, config: Config) -> Result<Libp2p> {
    Ok(Libp2p::new(host, config.check()?))
}
