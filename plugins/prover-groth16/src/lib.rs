//! Proves receipts and the choice of tokens in Groth16, for contracts and nodes to check.
//!
//! A statement is a circuit with its keys. `commitment` and `head` are the circuits, `statement` says in words what they show and turns
//! tasks into them, `groth16` makes keys and proofs in pieces that can be ended, `store` keeps the keys, `prover` does the work and
//! `plugin` carries it across. `trace` is the tree over an answer that the contract for heads asks about.

mod commitment;
mod config;
mod contract;
mod error;
pub mod gguf;
mod groth16;
pub mod head;
mod plugin;
mod poseidon;
mod prover;
mod statement;
mod store;
mod trace;
mod wire;
mod work;

use fabstir_plugin_api::prelude::*;

pub use config::{Config, ModelConfig};
pub use plugin::Groth16;

#[plugin(provides = [Prover(trace, verifier)], needs = ["fs.read"])]
async fn init(host: Host, config: Config) -> Result<Groth16> {
    Groth16::open(host.state_dir().to_owned(), config).await
}
