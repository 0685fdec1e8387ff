//! Nodes: instances of the plugin, linked into this program, each with its own runtime.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fabstir_plugin_api::abi::Port;
use fabstir_plugin_api::interface::Interface;
use fabstir_plugin_api::logging::Record;
use fabstir_plugin_api::plugin::{Configure, Health, Plugin};
use fabstir_plugin_api::prelude::*;
use fabstir_plugin_api::session::{Incoming, Role as End, Serve, ServeFuture, Session};
use serde_json::{Value, json};
use tempfile::TempDir;

pub struct Node {
    pub plugin: Arc<dyn Plugin>,
    pub transport: Arc<dyn Transport>,
    pub id: PeerId,
    pub addresses: Vec<Address>,
    session: Session,
    _state: TempDir,
}

/// The host's end: it serves nothing.
struct HostEnd;

impl Serve for HostEnd {
    fn admit(&self, method: &str) -> Result<Option<Box<dyn std::any::Any + Send>>> {
        Err(PluginError::unimplemented(method))
    }
    fn serve(&self, call: Incoming) -> ServeFuture {
        let refused = PluginError::unimplemented(call.method());
        Box::pin(async move { Err(refused) })
    }
    fn log(&self, record: Record) {
        println!("{record:?}");
    }
    fn fault(&self, error: &PluginError) {
        panic!("the plugin broke the frame protocol: {error}");
    }
    fn closed(&self, _: &str) {}
}

impl Node {
    pub async fn start(config: Value) -> Self {
        Self::join(config, secret(), Role::Node).await
    }

    pub async fn visitor(config: Value) -> Self {
        Self::join(config, secret(), Role::Visitor).await
    }

    pub async fn with_secret(config: Value, secret_key: Vec<u8>) -> Self {
        Self::join(config, secret_key, Role::Node).await
    }

    async fn join(config: Value, secret_key: Vec<u8>, role: Role) -> Self {
        let mut merged = json!({ "listen": ["/ip4/127.0.0.1/tcp/0"], "mdns": false });
        for (key, value) in config.as_object().expect("a table") {
            merged[key] = value.clone();
        }
        let session = Session::new(End::Host, Arc::new(HostEnd), tokio::runtime::Handle::current());
        session.attach(Port::new(transport_libp2p::connect(Port::new(session.inbox())).expect("starts")));
        let plugin = <dyn Plugin as Interface>::client(session.clone());
        let state = tempfile::tempdir().expect("a folder");
        let configure = Configure {
            instance: "node".into(),
            state_dir: state.path().to_owned(),
            config: merged.to_string(),
            log_level: "warn".into(),
        };
        plugin.configure(&Cx::new(), configure).await.expect("configures");
        let transport = <dyn Transport as Interface>::client(session.clone());
        let peer = transport.join(&Cx::new(), Join { secret_key, role }).await.expect("joins");
        Self { plugin, transport, id: peer.id, addresses: peer.addresses, session, _state: state }
    }

    pub fn address(&self) -> Address {
        self.addresses.first().expect("listens").clone()
    }

    pub async fn dial(&self, other: &Node) {
        assert_eq!(self.transport.dial(&Cx::new(), other.address()).await.expect("answers"), other.id);
    }

    pub async fn health(&self) -> Health {
        self.plugin.health(&Cx::new()).await.expect("tells")
    }

    pub async fn peers(&self) -> Vec<PeerId> {
        self.transport.peers(&Cx::new()).await.expect("tells").into_iter().map(|peer| peer.id).collect()
    }

    pub async fn find(&self, topic: &Topic) -> Vec<PeerId> {
        let found = self.transport.find(&Cx::new(), topic.clone()).await.expect("searches").collect().await.expect("ends well");
        found.into_iter().map(|peer| peer.id).collect()
    }

    /// Answers conversations with their own words, until what is returned is dropped.
    pub async fn echo(&self, protocol: &str) -> Echo {
        let mut arrivals = self.transport.listen(&Cx::new(), protocol.into()).await.expect("listens");
        let transport = self.transport.clone();
        Echo(tokio::spawn(async move {
            while let Some(Ok(arrival)) = arrivals.next().await {
                let transport = transport.clone();
                tokio::spawn(async move {
                    let (reply, replies) = Stream::channel(4);
                    let Ok(mut words) = transport.accept(&Cx::new(), arrival.id, replies).await else { return };
                    while let Some(word) = words.next().await {
                        match word {
                            Ok(word) => drop(reply.send(word).await),
                            Err(error) => return reply.fail(error).await,
                        }
                    }
                });
            }
        }))
    }

    /// Says all these words and hears what comes back.
    pub async fn ask(&self, peer: &PeerId, addresses: &[Address], protocol: &str, words: &[Blob]) -> Result<Vec<Blob>> {
        let to = Destination { peer: peer.clone(), addresses: addresses.to_vec(), protocol: protocol.into() };
        let cx = Cx::new().with_timeout(Duration::from_secs(120));
        self.transport.open(&cx, to, Stream::from_items(words.to_vec())).await?.collect().await
    }

    /// Nothing is left of what went on before. Listeners must have been dropped.
    pub async fn instance_is_free(&self) {
        let cx = Cx::new().with_timeout(Duration::from_secs(10));
        self.plugin.drain(&cx).await.expect("no conversation is left");
    }

    pub async fn stop(self) {
        self.plugin.shutdown(&Cx::new()).await.expect("shuts down");
        self.session.close("stopped");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.session.close("the test is over");
    }
}

pub struct Echo(tokio::task::JoinHandle<()>);

impl Drop for Echo {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn secret() -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut secret = vec![0; 32];
    secret[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    secret[8..12].copy_from_slice(&std::process::id().to_le_bytes());
    secret
}

pub fn topic(name: &str) -> Topic {
    let mut topic = vec![0; 32];
    topic[..name.len()].copy_from_slice(name.as_bytes());
    Topic(topic)
}

pub fn blob(bytes: &[u8]) -> Blob {
    Blob::from(bytes)
}

pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < Duration::from_secs(20), "not within 20 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Bytes of this process that are in memory, after what is free was given back.
pub fn resident() -> u64 {
    #[cfg(target_env = "gnu")]
    // SAFETY: may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("is told");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") << 10
}
