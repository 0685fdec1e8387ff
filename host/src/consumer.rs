//! The other side: models of other nodes, behind a local port.
//!
//! ```text
//! market.rs   finds who offers a model, asks each what it has, and ranks them
//! remote.rs   one node's models, as an implementation of the kind inference
//! link.rs     the session with that node: many requests, kept over a drop
//! result.rs   what came of a posted job, from the node that has it
//! till.rs     what pays that node, where it asks for money
//! visit.rs    the transport plugin, for as long as it takes
//! ```
//!
//! A remote node is a route like a plugin is one. So the local scheduler and gateway serve the network with the code that serves
//! plugins: queues, retries of what has produced nothing yet, and every rule of the HTTP edge are the same.

mod link;
mod market;
mod remote;
mod result;
mod till;
mod visit;

pub use market::{Found, Market, Wanted, ask_all, find, one_model};
pub use result::fetch;
pub use visit::{Visit, VisitError};
