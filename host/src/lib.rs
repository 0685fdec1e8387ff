//! The node as a library: what the binary `fabstir-node` runs, and what benches and tools reach into.
//!
//! The host knows no backend. It loads plugins ([`loader`]), keeps them alive ([`supervisor`]), and brings requests to them: of clients
//! ([`gateway`], by way of [`cache`]) and of other nodes ([`network`]). [`consumer`] is the other side, which asks other nodes.
//! [`market`] is the money.

pub mod cache;
pub mod cli;
pub mod clock;
pub mod config;
pub mod consumer;
pub mod gateway;
pub mod identity;
pub mod loader;
pub mod market;
pub mod network;
pub mod node;
pub mod routes;
pub mod scheduler;
pub mod sealed;
pub mod supervisor;
