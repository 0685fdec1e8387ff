//! Keeps blobs in a folder, addressed by their BLAKE3 hash, and vectors, found by their direction.
//!
//! A blob is one file; `layout` says where, and `blob_folder` does the rest. `vectors` keeps vectors in a database of their own, in plain
//! blocking Rust; `plugin` carries both across to the node's asynchronous calls.

mod config;
mod layout;
mod plugin;
#[cfg(test)]
mod small_disk;
mod vectors;

use blob_folder::Store;
use fabstir_plugin_api::prelude::*;

pub use config::Config;
pub use plugin::Disk;

#[plugin(provides = [Storage(vectors_put, vectors_find, vectors_delete)])]
async fn init(host: Host, config: Config) -> Result<Disk> {
    config.check()?;
    let folder = config.folder(host.state_dir());
    let vectors = vectors::Vectors::new(folder.join("vectors"), config.vectors());
    let store = blob_folder::blocking(move || Store::open(&folder, layout::Shards, config.max_bytes)).await?;
    Ok(Disk::new(store, vectors, config.vectors().searches))
}
