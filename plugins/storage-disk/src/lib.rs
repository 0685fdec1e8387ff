//! Keeps blobs in a folder, addressed by their BLAKE3 hash, and vectors, found by their direction.
//!
//! A blob is one file, `aa/bb/<id>` for an id that begins with `aabb`. It is written under another name, forced to the disk and then
//! renamed, so under its id a file is whole or absent, also after a power cut. `store` does that, and `vectors` keeps vectors in a
//! database of their own, both in plain blocking Rust; `plugin` carries it across to the node's asynchronous calls and streams.

mod config;
mod error;
mod plugin;
mod store;
mod vectors;

use fabstir_plugin_api::prelude::*;

pub use config::Config;
pub use plugin::Disk;

#[plugin(provides = [Storage(vectors_put, vectors_find, vectors_delete)])]
async fn init(host: Host, config: Config) -> Result<Disk> {
    config.check()?;
    let folder = config.folder(host.state_dir());
    let vectors = vectors::Vectors::new(folder.join("vectors"), config.vectors());
    let store = plugin::blocking(move || store::Store::open(&folder, config.max_bytes)).await?;
    Ok(Disk::new(store, vectors, config.vectors().searches))
}
