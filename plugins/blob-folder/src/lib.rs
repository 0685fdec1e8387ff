//! Blobs in a folder, for storage plugins that keep them so.
//!
//! A blob is one file, named by its BLAKE3 hash; a [`Layout`] says where. It is written under another name, forced to the disk and then
//! renamed, so under its own name a file is whole or absent, also after a power cut. [`Store`] does that in plain blocking Rust; [`kind`]
//! and [`Taking`] carry it across to the node's asynchronous calls and streams.

pub mod disk;
mod error;
mod id;
mod incoming;
pub mod kind;
mod reading;
pub mod space;
mod store;
mod taking;
mod verdicts;

pub use error::{BlobError, Ended, bytes, code_of};
pub use id::{Found, Id, Layout};
pub use incoming::{Incoming, Whole};
pub use reading::{Folders, Opened, PIECE, Reader, is_whole};
pub use store::Store;
pub use taking::{Taking, blocking, finished};
pub use verdicts::Stamp;

/// What an operation on a folder ends with.
pub type Result<T, E = BlobError> = std::result::Result<T, E>;

#[cfg(test)]
mod tests;
