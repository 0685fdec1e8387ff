//! Reads the market's contracts on Base, or another chain that speaks Ethereum's JSON-RPC, and carries out orders on them.
//!
//! ```text
//! plugin     the kind's trait: translation
//! reading    what the contracts hold            following   what happens on them, through `log`'s cursor
//! office     one account's orders               outbox      transactions, neither lost nor sent twice
//! acting     the chain and the key-holder, as the outbox sees them
//! act, tell, signed   orders, events and signatures in the contracts' form, by the ABI in `contracts`
//! rpc        several endpoints that serve as one
//! ```
//!
//! ethers stays inside this crate, without its HTTP client: what it needs of TLS is years old.

mod act;
mod acting;
mod config;
mod contracts;
mod error;
mod following;
mod hex;
mod log;
mod office;
mod outbox;
mod plugin;
mod price;
mod reading;
mod rpc;
mod signed;
mod tell;

use fabstir_plugin_api::prelude::*;

pub use config::Config;
pub use plugin::BaseChain;

#[plugin(provides = [Chain], needs = ["net"])]
async fn init(host: Host, config: Config) -> Result<BaseChain> {
    BaseChain::new(host, config.check()?)
}
