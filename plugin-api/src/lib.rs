//! The contract between fabstir-node and its plugins.
//!
//! A plugin is a shared library that implements one or more **kinds**: [`Inference`](inference::Inference),
//! [`Storage`](storage::Storage). Each kind is a trait in plain async Rust; `#[plugin]` turns an implementation into a library
//! that the node loads, in its own process or in a worker, with no further work. This is a whole one:
//!
//! ```no_run
//! use fabstir_plugin_api::prelude::*;
//!
//! /// Keeps nothing, and says so.
//! struct Nowhere;
//!
//! #[derive(Deserialize, JsonSchema)]
//! #[serde(deny_unknown_fields)]
//! struct Config {}
//!
//! #[async_trait]
//! impl Storage for Nowhere {
//!     async fn put(&self, _: &Cx, _: Expect, _: Stream<Blob>) -> Result<Entry> {
//!         Err(PluginError::new(Code::Full, "this storage has no room at all"))
//!     }
//!     async fn get(&self, _: &Cx, id: String, _: Range) -> Result<Stream<Blob>> {
//!         Err(PluginError::not_found(id))
//!     }
//!     async fn head(&self, _: &Cx, id: String) -> Result<Entry> {
//!         Err(PluginError::not_found(id))
//!     }
//!     async fn delete(&self, _: &Cx, _: String) -> Result<bool> {
//!         Ok(false)
//!     }
//!     async fn list(&self, _: &Cx) -> Result<Stream<Entry>> {
//!         Ok(Stream::from_items([]))
//!     }
//! }
//!
//! impl Lifecycle for Nowhere {}
//!
//! #[plugin(provides = [Storage])]
//! async fn init(_host: Host, _config: Config) -> Result<Nowhere> {
//!     Ok(Nowhere)
//! }
//! ```
//!
//! # How a call travels
//!
//! ```text
//! author's code      impl Inference for Llama { async fn generate(..) }     plain async Rust
//! generated          dispatcher: method -> decode -> call -> encode         #[interface] on the trait
//! session            calls, streams, credit, cancel, logs                   one state machine, both ends
//! carrier            abi: an abi_stable port   |   ipc: a socketpair        nothing else knows which
//! ```
//!
//! What an author can rely on:
//! - Code of a plugin runs only on the plugin's own runtime, never on a thread of the host.
//! - A dropped call or stream on the caller's side drops the method's future, closes its senders and sets `cx.is_cancelled()`.
//! - A panic ends the call that panicked, with [`Code::Panicked`](error::Code::Panicked). An instance that panics again and again is
//!   started anew.
//! - A stream's producer waits while its consumer is behind.
//! - Every method may be called from many tasks at once.

// `sabi_trait` expands to impls that this lint of newer compilers reports.
#![allow(non_local_definitions)]

// The attributes of this crate name it by its public name, also inside it.
extern crate self as fabstir_plugin_api;

pub mod abi;
pub mod chain;
pub mod context;
pub mod error;
pub mod frame;
pub mod inference;
pub mod instance;
pub mod interface;
pub mod ipc;
#[cfg(feature = "host")]
pub mod library;
pub mod logging;
pub mod manifest;
pub mod plugin;
pub mod prover;
pub mod session;
pub mod storage;
pub mod stream;
pub mod transport;

/// Everything a plugin needs, in one `use`.
pub mod prelude {
    pub use async_trait::async_trait;
    pub use fabstir_plugin_macros::plugin;
    pub use schemars::{self, JsonSchema};
    pub use serde::{self, Deserialize, Serialize};

    pub use crate::abi::Blob;
    pub use crate::chain::*;
    pub use crate::context::{Cx, Host};
    pub use crate::error::{Code, PluginError, Result};
    pub use crate::inference::*;
    pub use crate::plugin::{Health, Lifecycle};
    pub use crate::prover::*;
    pub use crate::storage::*;
    pub use crate::stream::{Sender, Stream};
    pub use crate::transport::*;
}
