//! Proves commitments and small ONNX models with EZKL.
//!
//! EZKL is a Python wheel: `worker` runs it in a process of its own, which is ended and started anew when it hangs, dies or is not
//! wanted any more. `circuit` says what is proven, `public` what of that is told, `keys` keeps what a set-up has made, `engine` puts
//! them together, and `contract` makes the verifier for an Ethereum chain. `plugin` carries all that across to the node.

mod circuit;
mod config;
mod contract;
mod engine;
mod error;
mod field;
mod keys;
mod onnx;
mod pace;
mod plugin;
mod public;
#[cfg(test)]
mod tests;
mod worker;

use fabstir_plugin_api::prelude::*;

pub use config::{Config, ModelConfig};
use error::EzklError;
pub use plugin::Ezkl;

/// The version of the wheel. Another one makes other circuits of the same model, and other keys.
pub const EZKL: &str = "23.0.5";

/// What proofs of this plugin are called.
pub const SYSTEM: &str = "ezkl-23.0.5-kzg-bn254";

#[plugin(provides = [Prover(verifier)])]
async fn init(host: Host, config: Config) -> Result<Ezkl> {
    config.check()?;
    Ezkl::start(host.state_dir(), config).await.map_err(EzklError::at_start)
}
