//! What portals do wrong, and what comes of it. Every portal here is a real one, in a process of its own; some have a troublemaker before
//! them.

mod oracle;
mod pointers;
mod reads;
mod troublemaker;
mod uploads;

use fabstir_plugin_api::prelude::*;
use serde_json::json;
use storage_s5::{Config, S5};

/// An instance with a state folder of its own, which gives a portal up as soon as a busy machine allows.
struct Instance {
    s5: S5,
    state: tempfile::TempDir,
    config: serde_json::Value,
}

impl Instance {
    async fn new(portals: &[&str], more: serde_json::Value) -> Self {
        Self::within(tempfile::tempdir().expect("a folder can be made"), portals, more).await
    }

    async fn within(state: tempfile::TempDir, portals: &[&str], more: serde_json::Value) -> Self {
        let portals: Vec<_> = portals.iter().map(|url| json!({ "url": url })).collect();
        let mut config = json!({ "portals": portals, "timeout_ms": 4000, "single_max_bytes": 1 << 20, "chunk_bytes": 1 << 20 });
        for (key, value) in more.as_object().expect("a table") {
            config[key] = value.clone();
        }
        Self { s5: open(&config, &state).await, state, config }
    }

    /// The same folder after a restart.
    async fn again(self) -> Self {
        let Self { s5, state, config } = self;
        drop(s5);
        Self { s5: open(&config, &state).await, state, config }
    }

    async fn put(&self, bytes: &[u8]) -> Result<Entry> {
        let pieces: Vec<Blob> = bytes.chunks(100_000).map(Blob::from).collect();
        self.s5.put(&Cx::new(), Expect::default(), Stream::from_items(pieces)).await
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

    async fn listed(&self) -> usize {
        self.s5.list(&Cx::new()).await.expect("a list").collect().await.expect("a list").len()
    }
}

async fn open(config: &serde_json::Value, state: &tempfile::TempDir) -> S5 {
    let config: Config = serde_json::from_value(config.clone()).expect("a configuration");
    S5::open(config, state.path()).await.expect("opens")
}

/// Bytes that look the same nowhere twice.
fn noise(size: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

const MIB: usize = 1 << 20;
