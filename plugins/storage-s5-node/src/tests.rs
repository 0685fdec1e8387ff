//! Nodes that talk to each other. Every node here is a whole one, and listens on the loopback interface.

mod fetching;
mod lasting;
mod pointers;
mod strangers;

use std::net::SocketAddr;

use fabstir_plugin_api::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Config, S5Node};

const MIB: usize = 1 << 20;

/// An instance with a state folder of its own.
struct Instance {
    s5: S5Node,
    state: TempDir,
    config: Value,
}

impl Instance {
    async fn new(config: Value) -> Self {
        Self::within(tempfile::tempdir().expect("a folder can be made"), config).await
    }

    async fn within(state: TempDir, mut config: Value) -> Self {
        if config.get("timeout_ms").is_none() {
            config["timeout_ms"] = 20_000.into();
        }
        let parsed: Config = serde_json::from_value(config.clone()).expect("a configuration");
        let s5 = S5Node::open(parsed, state.path()).await.expect("opens");
        Self { s5, state, config }
    }

    /// The same folder after a restart, with another configuration.
    async fn again(self, config: Value) -> Self {
        self.s5.shutdown().await;
        let Self { s5, state, .. } = self;
        drop(s5);
        Self::within(state, config).await
    }

    /// Its node id, and where it listens.
    async fn address(&self) -> (String, SocketAddr) {
        self.s5.node.address()
    }

    async fn id(&self) -> String {
        self.address().await.0
    }

    /// What another node writes into `peers`.
    async fn as_peer(&self) -> Value {
        let (node, address) = self.address().await;
        json!({ "node": node, "address": address.to_string() })
    }

    async fn put(&self, bytes: &[u8]) -> Result<String> {
        let pieces: Vec<Blob> = bytes.chunks(100_000).map(Blob::from).collect();
        Ok(self.s5.put(&Cx::new(), Expect::default(), Stream::from_items(pieces)).await?.id)
    }

    /// What comes, and the error that it ends with.
    async fn read(&self, id: &str, offset: u64, length: Option<u64>) -> (Vec<u8>, Option<PluginError>) {
        let mut bytes = Vec::new();
        let mut stream = match self.s5.get(&Cx::new(), id.to_owned(), Range { offset, length }).await {
            Ok(stream) => stream,
            Err(error) => return (bytes, Some(error)),
        };
        while let Some(piece) = stream.next().await {
            match piece {
                Ok(piece) => bytes.extend_from_slice(&piece),
                Err(error) => return (bytes, Some(error)),
            }
        }
        (bytes, None)
    }

    async fn whole(&self, id: &str) -> Result<Vec<u8>> {
        match self.read(id, 0, None).await {
            (bytes, None) => Ok(bytes),
            (_, Some(error)) => Err(error),
        }
    }

    #[track_caller]
    fn file(&self, id: &str) -> std::path::PathBuf {
        self.s5.node.store.path(blob_folder::Id::parse(id).expect("an id"))
    }

    async fn listed(&self) -> usize {
        self.s5.list(&Cx::new()).await.expect("a list").collect().await.expect("a list").len()
    }
}

/// Waits for the address of an instance to be free, if it is not.
async fn wait_until_ready(s5: &S5Node) {
    for _ in 0..600 {
        if s5.health().await == Health::Ready {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("{:?}", s5.health().await);
}

/// A node that lets another one in, and that other one, which asks it.
async fn pair() -> (Instance, Instance) {
    let guest = Instance::new(json!({})).await;
    let host = Instance::new(json!({ "allow": [guest.id().await] })).await;
    let peers = json!([host.as_peer().await]);
    (host, guest.again(json!({ "peers": peers })).await)
}

/// Bytes that look the same nowhere twice.
fn noise(size: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}
