//! The storage kind on top of the node: translation only.

use std::path::Path;
use std::sync::Arc;

use blob_folder::{BlobError, Id, Reader, blocking, kind};
use fabstir_plugin_api::prelude::*;

use crate::config::Config;
use crate::error::NodeError;
use crate::node::Node;
use crate::record;

/// Blobs and pointers in an S5 node, as a storage plugin.
pub struct S5Node {
    pub(crate) node: Arc<Node>,
}

impl S5Node {
    /// Opens the folder of an instance and begins to listen. Asks nobody.
    pub async fn open(config: Config, state_dir: &Path) -> Result<Self> {
        let node = Node::open(config.check(state_dir)?, state_dir).await?;
        Ok(Self { node: Arc::new(node) })
    }

    /// A blob that is kept here, or the one that a peer sends.
    async fn reader(&self, id: Id, range: Range) -> Result<Reader, NodeError> {
        let store = self.node.store.clone();
        match blocking(move || store.read(id, range.offset, range.length)).await {
            Err(BlobError::NotFound(_)) => {
                let whole = self.node.peers.fetch(id, &self.node.store).await?;
                Ok(blocking(move || whole.read(range.offset, range.length)).await?)
            }
            read => Ok(read?),
        }
    }
}

#[async_trait]
impl Lifecycle for S5Node {
    async fn health(&self) -> Health {
        self.node.health()
    }

    async fn shutdown(&self) {
        self.node.close().await;
    }
}

#[async_trait]
impl Storage for S5Node {
    async fn put(&self, cx: &Cx, expect: Expect, data: Stream<Blob>) -> Result<Entry> {
        kind::put(&self.node.store, cx, expect, data).await
    }

    async fn get(&self, _: &Cx, id: String, range: Range) -> Result<Stream<Blob>> {
        Ok(kind::pieces(self.reader(Id::parse(&id)?, range).await?))
    }

    async fn head(&self, _: &Cx, id: String) -> Result<Entry> {
        kind::head(&self.node.store, &id).await
    }

    async fn delete(&self, _: &Cx, id: String) -> Result<bool> {
        kind::delete(&self.node.store, &id).await
    }

    async fn list(&self, cx: &Cx) -> Result<Stream<Entry>> {
        Ok(kind::list(&self.node.store, cx))
    }

    async fn pointer(&self, _: &Cx, key: String) -> Result<Pointer> {
        Ok(self.node.peers.pointer(&self.node.registry, &key).await?)
    }

    async fn pointer_payload(&self, _: &Cx, pointer: Pointer) -> Result<Vec<u8>> {
        Ok(record::payload(&pointer).map_err(NodeError::from)?)
    }

    async fn pointer_set(&self, _: &Cx, pointer: Pointer) -> Result<()> {
        Ok(self.node.peers.set_pointer(&self.node.registry, &pointer).await?)
    }
}
