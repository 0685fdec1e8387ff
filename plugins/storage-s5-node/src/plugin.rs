//! The storage kind on top of the node: translation only.

use std::path::Path;
use std::sync::Arc;

use fabstir_plugin_api::prelude::*;
use tracing::warn;

use crate::config::Config;
use crate::error::NodeError;
use crate::node::Node;
use crate::record;
use crate::store::{Found, Id, Reader, Taking, blocking};

/// Pieces that a get reads ahead of its consumer.
const READ_AHEAD: usize = 2;

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
            Err(NodeError::NotKept(_)) => {
                let whole = self.node.peers.fetch(id, &self.node.store).await?;
                blocking(move || whole.read(range.offset, range.length)).await
            }
            read => read,
        }
    }
}

fn entry(found: Found) -> Entry {
    Entry { id: found.id.to_string(), size: found.size }
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
    async fn put(&self, cx: &Cx, expect: Expect, mut data: Stream<Blob>) -> Result<Entry> {
        let expected = expect.id.as_deref().map(Id::parse).transpose()?;
        let mut taking = Taking::begin(&self.node.store, expected, expect.size).await?;
        while let Some(piece) = data.next().await {
            taking = taking.write(piece?).await?;
        }
        let whole = taking.finish().await?;
        let (store, cx) = (self.node.store.clone(), cx.clone());
        Ok(entry(blocking(move || store.keep(whole, || !cx.is_cancelled())).await?))
    }

    async fn get(&self, _: &Cx, id: String, range: Range) -> Result<Stream<Blob>> {
        let mut reader = self.reader(Id::parse(&id)?, range).await?;
        // Pieces are large, so fewer of them wait for a slow consumer than in a stream of tokens.
        let (sender, stream) = Stream::channel(READ_AHEAD);
        tokio::spawn(async move {
            loop {
                match blocking(move || reader.next_piece().map(|piece| (piece, reader))).await {
                    Ok((Some(piece), rest)) => {
                        reader = rest;
                        if sender.send(Blob::from(piece)).await.is_err() {
                            return;
                        }
                    }
                    Ok((None, _)) => return,
                    Err(error) => {
                        warn!(%error, "Read failed.");
                        return sender.fail(error.into()).await;
                    }
                }
            }
        });
        Ok(stream)
    }

    async fn head(&self, _: &Cx, id: String) -> Result<Entry> {
        let (id, store) = (Id::parse(&id)?, self.node.store.clone());
        let size = blocking(move || store.size(id)).await?;
        Ok(entry(Found { id, size }))
    }

    async fn delete(&self, _: &Cx, id: String) -> Result<bool> {
        let (id, store) = (Id::parse(&id)?, self.node.store.clone());
        Ok(blocking(move || store.delete(id)).await?)
    }

    async fn list(&self, cx: &Cx) -> Result<Stream<Entry>> {
        let store = self.node.store.clone();
        let mut folders = blocking(move || store.folders()).await?;
        let (sender, stream) = cx.stream();
        tokio::spawn(async move {
            loop {
                match blocking(move || folders.next_blobs().map(|blobs| (blobs, folders))).await {
                    Ok((Some(blobs), rest)) => {
                        folders = rest;
                        for blob in blobs {
                            if sender.send(entry(blob)).await.is_err() {
                                return;
                            }
                        }
                    }
                    Ok((None, _)) => return,
                    Err(error) => return sender.fail(error.into()).await,
                }
            }
        });
        Ok(stream)
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
