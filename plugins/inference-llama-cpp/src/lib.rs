//! Runs GGUF models with llama.cpp.
//!
//! ```text
//! plugin      the inference trait: loads, unloads, hands requests over; translation only
//! sink        an answer on its way to the host, never blocking the engine
//! engine      one model: checks requests, starts threads
//!   batcher   its thread: several generations in one batch, prompts in chunks between their tokens
//!   slot      what each place remembers, so that a prompt that begins alike is not read twice
//!   embed     vectors, on a thread of their own
//!   context   llama.cpp's C interface, behind checks
//! digest      what a model is called everywhere: a hash of its files and its chat template
//! gguf        reads a file's header before llama.cpp does: damaged files end in an error here
//! memory      whether a model fits, before it is loaded
//! sampler, grammar, template, text     how tokens are chosen, what they must look like, what goes in and what comes out
//! ```
//!
//! llama.cpp asserts where other libraries answer, and an assert ends the process. So everything that comes from a request or a
//! file is checked here first; what slips through is the reason why this plugin runs in a worker process unless told otherwise.

pub mod config;
pub mod digest;
pub mod engine;
pub mod error;
pub mod gguf;
mod grammar;
pub mod memory;
pub mod metrics;
mod native_log;
mod plugin;
pub mod sampler;
mod sink;
pub mod template;
pub mod text;

use fabstir_plugin_api::prelude::*;

pub use config::{Config, ModelConfig};
pub use plugin::LlamaCpp;

#[plugin(provides = [Inference(embed, states, tokenize, apply_template)], needs = ["gpu", "fs.read"])]
async fn init(host: Host, config: Config) -> Result<LlamaCpp> {
    config.validate()?;
    let metrics = metrics::Metrics::default();
    host.metrics(|registry| metrics.register(registry));
    Ok(LlamaCpp::new(config, metrics, host.state_dir()))
}
