//! What the node is made of: its identity, its endpoint, and when it is reachable.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blob_folder::disk::write_durably;
use blob_folder::{BlobError, Ended, Store, blocking};
use fabstir_plugin_api::plugin::Health;
use iroh::endpoint::{BindError, NetReportConfig, PortmapperConfig, presets};
use iroh::{Endpoint, RelayMode, SecretKey};
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::config::Settings;
use crate::error::NodeError;
use crate::layout::S5Layout;
use crate::peers::Peers;
use crate::registry::Registry;
use crate::serving::{Serving, transport};

/// How often an address that another instance still has is tried.
const RETRY: Duration = Duration::from_millis(200);

/// How long connections may take to end. All of the end has 10 seconds.
const FAREWELL: Duration = Duration::from_secs(5);

/// An S5 node.
#[derive(Debug)]
pub struct Node {
    pub store: Arc<Store>,
    pub registry: Arc<Registry>,
    pub peers: Peers,
    online: Online,
    /// What other nodes were asked from before the address was free. What runs there may end there.
    aside: Option<Endpoint>,
    /// Waits for the address to be free, where it was not.
    waiting: Mutex<Option<JoinHandle<()>>>,
}

/// Where other nodes are asked from.
#[derive(Debug, Clone)]
pub struct Online(Arc<Mutex<State>>);

#[derive(Debug)]
enum State {
    /// Another port, where nobody is served, and why.
    Aside(String, Endpoint),
    Up(Arc<Serving>),
    Ended,
}

impl Online {
    pub fn endpoint(&self) -> Result<Endpoint, NodeError> {
        match &*self.0.lock() {
            State::Aside(_, endpoint) => Ok(endpoint.clone()),
            State::Up(serving) => Ok(serving.endpoint.clone()),
            State::Ended => Err(Ended.into()),
        }
    }
}

impl Node {
    /// Opens the folder of an instance and begins to listen. Asks nobody.
    pub async fn open(settings: Settings, state_dir: &Path) -> Result<Self, NodeError> {
        let key = state_dir.join("node.key");
        let secret = blocking(move || identity(&key)).await?;
        let (folder, max) = (settings.folder.clone(), settings.max_bytes);
        let store = blocking(move || Store::open(&folder, S5Layout::of(&folder), max)).await?;
        let registry = Arc::new(Registry::new(&state_dir.join("registry")));
        let begin = Begin { settings, secret, store: store.clone(), registry: registry.clone() };
        let listen = begin.settings.listen;
        let (state, aside) = match begin.listen().await {
            Ok(serving) => (State::Up(serving), None),
            Err(error) if is_taken(&error) => {
                warn!(%listen, "The address is in use: nobody is served until it is free, and others are asked from another port.");
                let aside = begin.bind(SocketAddr::new(listen.ip(), 0)).await.map_err(|error| begin.failed(&error))?;
                (State::Aside(format!("the address {listen} is in use"), aside.clone()), Some(aside))
            }
            Err(error) => return Err(begin.failed(&error)),
        };
        let online = Online(Arc::new(Mutex::new(state)));
        let peers = Peers::new(&begin.settings, begin.secret.clone(), online.clone());
        let waiting = aside.is_some().then(|| tokio::spawn(begin.keep_trying(online.clone())));
        Ok(Self { store, registry, peers, online, aside, waiting: Mutex::new(waiting) })
    }

    pub fn health(&self) -> Health {
        match &*self.online.0.lock() {
            State::Aside(why, _) => Health::Degraded { reason: format!("{why}, so other nodes are asked, and not answered") },
            State::Up(serving) if serving.endpoint.is_closed() => Health::Failed { reason: "the endpoint has closed".into() },
            State::Up(_) => Health::Ready,
            State::Ended => Health::Failed { reason: "the node has ended".into() },
        }
    }

    /// Says farewell to other nodes and lets go of the files.
    pub async fn close(&self) {
        let waiting = self.waiting.lock().take();
        if let Some(task) = waiting {
            task.abort();
            // It may be about to begin to serve.
            let _ = task.await;
        }
        let state = std::mem::replace(&mut *self.online.0.lock(), State::Ended);
        let aside = async {
            if let Some(aside) = &self.aside {
                aside.close().await;
            }
        };
        let serving = async {
            if let State::Up(serving) = state {
                serving.end().await;
            }
        };
        if timeout(FAREWELL, async { tokio::join!(aside, serving) }).await.is_err() {
            warn!("Some connections did not end in time.");
        }
        self.registry.close();
    }

    #[cfg(test)]
    pub fn endpoint(&self) -> Endpoint {
        self.online.endpoint().expect("is up")
    }

    /// The node's id, and where it listens.
    #[cfg(test)]
    pub fn address(&self) -> (String, SocketAddr) {
        let endpoint = self.endpoint();
        (endpoint.id().to_string(), endpoint.bound_sockets()[0])
    }
}

/// What it takes to be reachable.
struct Begin {
    settings: Settings,
    secret: SecretKey,
    store: Arc<Store>,
    registry: Arc<Registry>,
}

impl Begin {
    /// Listens on the configured address and no other.
    async fn listen(&self) -> Result<Arc<Serving>, BindError> {
        let endpoint = self.bind(self.settings.listen).await?;
        let address = endpoint.bound_sockets().first().copied();
        info!(node = %endpoint.id(), address = address.map(tracing::field::display), "The S5 node is up.");
        Ok(Arc::new(Serving::begin(endpoint, &self.settings, &self.store, &self.registry)))
    }

    /// An endpoint that tells nobody of itself: no relays, no name servers, no port forwarding.
    async fn bind(&self, address: SocketAddr) -> Result<Endpoint, BindError> {
        Endpoint::builder(presets::Minimal)
            .secret_key(self.secret.clone())
            .relay_mode(RelayMode::Disabled)
            .portmapper_config(PortmapperConfig::Disabled)
            .net_report_config(NetReportConfig::minimal())
            .transport_config(transport())
            .clear_ip_transports()
            .bind_addr(address)
            .expect("a socket address is one")
            .bind()
            .await
    }

    async fn keep_trying(self, online: Online) {
        let mut told = String::new();
        loop {
            tokio::time::sleep(RETRY).await;
            match self.listen().await {
                Ok(serving) => {
                    *online.0.lock() = State::Up(serving);
                    return;
                }
                Err(error) if is_taken(&error) => {}
                Err(error) => {
                    let why = self.failed(&error).to_string();
                    if why != told {
                        warn!(error = why, "Still not reachable.");
                        told = why;
                    }
                }
            }
        }
    }

    fn failed(&self, error: &BindError) -> NodeError {
        NodeError::Listen { listen: self.settings.listen, why: format!("{error:#}") }
    }
}

fn is_taken(error: &BindError) -> bool {
    matches!(error, BindError::Sockets { source, .. } if source.kind() == io::ErrorKind::AddrInUse)
}

/// The key that the node is known by; made where there is none.
fn identity(path: &Path) -> Result<SecretKey, NodeError> {
    match fs::read_to_string(path) {
        Ok(text) => {
            let mut bytes = zeroize::Zeroizing::new([0; 32]);
            let read = hex::decode_to_slice(text.trim(), &mut *bytes);
            read.map(|()| SecretKey::from_bytes(&bytes)).map_err(|_| NodeError::Identity { path: path.to_owned() })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let secret = SecretKey::generate();
            write_durably(path, hex::encode(secret.to_bytes()).as_bytes()).map_err(BlobError::io("write", path))?;
            Ok(secret)
        }
        Err(error) => Err(BlobError::io("read", path)(error).into()),
    }
}
