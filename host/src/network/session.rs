//! `/fabstir/session/1`: requests and their answers between two nodes. `docs/protocol.md` is the specification.
//!
//! [`wire`] are the messages. [`serving`] is the end that answers: an adapter between them and the scheduler, as the gateway is one
//! between HTTP and the scheduler. The end that asks is [`crate::consumer`].

pub mod serving;
pub mod wire;

/// The name of the protocol with its version.
pub const PROTOCOL: &str = "/fabstir/session/1";
