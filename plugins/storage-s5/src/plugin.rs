//! The storage kind on top of the portals: translation only.

use std::path::Path;
use std::sync::Arc;

use blob_folder::{blocking, finished};
use fabstir_plugin_api::prelude::*;
use tracing::warn;

use crate::cid::Id;
use crate::config::Config;
use crate::error::S5Error;
use crate::pointer::{self, Key, MOST_DATA};
use crate::portals::Portals;

/// Pieces that a get reads ahead of its consumer.
const READ_AHEAD: usize = 2;

/// Blobs on S5 portals, as a storage plugin.
pub struct S5 {
    portals: Arc<Portals>,
}

impl S5 {
    /// Opens the folder of an instance, and asks no portal.
    pub async fn open(config: Config, state_dir: &Path) -> Result<Self> {
        let state_dir = state_dir.to_owned();
        let settings = config.check(&state_dir)?;
        let portals = blocking(move || Portals::open(&settings, &state_dir)).await?;
        Ok(Self { portals: Arc::new(portals) })
    }
}

impl Lifecycle for S5 {}

fn parse(id: &str) -> Result<Id> {
    Ok(Id::parse(id).map_err(S5Error::from)?)
}

fn signed(pointer: &Pointer) -> Result<pointer::Entry> {
    let entry = Key::parse(&pointer.key)
        .and_then(|key| pointer::Entry::new(key, pointer.revision, pointer.data.clone(), &pointer.signature, MOST_DATA));
    Ok(entry.map_err(S5Error::from)?)
}

#[async_trait]
impl Storage for S5 {
    async fn put(&self, _: &Cx, expect: Expect, mut data: Stream<Blob>) -> Result<Entry> {
        let expected = expect.id.as_deref().map(parse).transpose()?;
        let (sender, task) = self.portals.spool().receive::<Blob>(expect.size);
        while let Some(piece) = data.next().await {
            // A spool that takes no more says why below. Where the bytes end with an error, nobody waits for it, and it is gone.
            if sender.send(piece?).await.is_err() {
                break;
            }
        }
        drop(sender);
        let blob = finished(task).await?;
        let (id, size) = (blob.tree.id(), blob.tree.size());
        if let Some(expected) = expected.filter(|expected| *expected != id) {
            return Err(S5Error::WrongId { expected, actual: id }.into());
        }
        self.portals.keep(blob).await?;
        Ok(Entry { id: id.to_string(), size })
    }

    async fn get(&self, _: &Cx, id: String, range: Range) -> Result<Stream<Blob>> {
        let mut reading = self.portals.read(parse(&id)?, range.offset, range.length).await?;
        // Whoever asks for what is nowhere learns it at once, and not from a stream.
        let mut next = reading.next().await?;
        let (sender, stream) = Stream::channel(READ_AHEAD);
        tokio::spawn(async move {
            while let Some(piece) = next {
                if sender.send(Blob::from(piece)).await.is_err() {
                    return;
                }
                next = match reading.next().await {
                    Ok(piece) => piece,
                    Err(error) => {
                        warn!(%error, "Read failed.");
                        return sender.fail(error.into()).await;
                    }
                };
            }
        });
        Ok(stream)
    }

    async fn head(&self, _: &Cx, id: String) -> Result<Entry> {
        let (id, ledger) = (parse(&id)?, self.portals.ledger().clone());
        let known = blocking(move || ledger.known(id)?.ok_or(S5Error::NotKnown(id))).await?;
        Ok(Entry { id: id.to_string(), size: known.tree.size() })
    }

    async fn delete(&self, _: &Cx, id: String) -> Result<bool> {
        Ok(self.portals.delete(parse(&id)?).await?)
    }

    async fn list(&self, cx: &Cx) -> Result<Stream<Entry>> {
        let ledger = self.portals.ledger().clone();
        let mut shards = blocking(move || ledger.shards()).await?;
        let (sender, stream) = cx.stream();
        let ledger = self.portals.ledger().clone();
        tokio::spawn(async move {
            while let Some(shard) = shards.pop() {
                let ledger = ledger.clone();
                match blocking(move || ledger.blobs(&shard)).await {
                    Ok(blobs) => {
                        for (id, size) in blobs {
                            if sender.send(Entry { id: id.to_string(), size }).await.is_err() {
                                return;
                            }
                        }
                    }
                    Err(error) => return sender.fail(error.into()).await,
                }
            }
        });
        Ok(stream)
    }

    async fn pointer(&self, _: &Cx, key: String) -> Result<Pointer> {
        let entry = self.portals.entry(Key::parse(&key).map_err(S5Error::from)?).await?;
        Ok(Pointer { key, revision: entry.revision(), data: entry.data().to_vec(), signature: entry.signature().to_vec() })
    }

    async fn pointer_payload(&self, _: &Cx, pointer: Pointer) -> Result<Vec<u8>> {
        Key::parse(&pointer.key)
            .and_then(|_| pointer::check(pointer.revision, &pointer.data, MOST_DATA))
            .map_err(S5Error::from)?;
        Ok(pointer::payload(pointer.revision, &pointer.data))
    }

    async fn pointer_set(&self, _: &Cx, pointer: Pointer) -> Result<()> {
        Ok(self.portals.set_entry(&signed(&pointer)?).await?)
    }
}
