//! Keeps blobs on S5 portals, and checks every byte that comes back.
//!
//! ```text
//! plugin     the kind's trait: translation
//! portals    several portals as one place: where a blob goes, and who is asked when one fails
//! portal     one portal over HTTP
//! spool      blobs on their way, on the disk            ledger    what is known of blobs, in files
//! tree       what lets a part of a blob be checked      cid       names of blobs           pointer   entries of the registry
//! ```
//!
//! A portal is trusted with nothing but the order in which it stops to exist: what it sends is checked against the blob's id, or the
//! pointer's key, before anybody sees it.
//!
//! The crate also has a program, `s5-portal`: a portal for this machine, for trying and testing.

pub mod cid;
mod config;
mod error;
mod ledger;
mod plugin;
pub mod pointer;
mod portal;
mod portals;
mod spool;
mod tree;

use fabstir_plugin_api::prelude::*;

pub use config::Config;
pub use plugin::S5;

#[plugin(provides = [Storage(pointer, pointer_payload, pointer_set)], needs = ["net"])]
async fn init(host: Host, config: Config) -> Result<S5> {
    S5::open(config, host.state_dir()).await
}
