//! What the node is made of: its identity, its endpoint, and when it is reachable.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::plugin::Health;
use iroh::endpoint::{BindError, NetReportConfig, PortmapperConfig, presets};
use iroh::protocol::Router;
use iroh::{Endpoint, RelayMode, SecretKey};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::config::Settings;
use crate::error::NodeError;
use crate::peers::Peers;
use crate::registry::Registry;
use crate::serving::serve;
use crate::store::{Store, blocking};

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
    /// Waits for the address to be free, where it was not.
    waiting: Mutex<Option<JoinHandle<()>>>,
}

/// Whether there is an endpoint.
#[derive(Debug, Clone)]
pub struct Online(watch::Receiver<State>);

#[derive(Debug, Clone)]
enum State {
    /// Why it is not, and will be.
    Waiting(String),
    Up(Router),
}

impl Online {
    /// The endpoint, as soon as there is one.
    pub async fn endpoint(&self, limit: Duration) -> Result<Endpoint, NodeError> {
        let mut state = self.0.clone();
        let known = timeout(limit, state.wait_for(|state| !matches!(state, State::Waiting(_)))).await;
        match known.map(|state| state.map(|state| state.clone())) {
            Ok(Ok(State::Up(router))) => Ok(router.endpoint().clone()),
            Err(_) => match &*self.0.borrow() {
                State::Waiting(why) => Err(NodeError::Peers { doing: "asking other nodes", why: why.clone() }),
                State::Up(router) => Ok(router.endpoint().clone()),
            },
            // Whoever waited for the address was told to stop.
            Ok(_) => Err(NodeError::Ended),
        }
    }
}

impl Node {
    /// Opens the folder of an instance and begins to listen. Asks nobody.
    pub async fn open(settings: Settings, state_dir: &Path) -> Result<Self, NodeError> {
        let key = state_dir.join("node.key");
        let secret = blocking(move || identity(&key)).await?;
        let (folder, max) = (settings.folder.clone(), settings.max_bytes);
        let store = blocking(move || Store::open(&folder, max)).await?;
        let registry = Arc::new(Registry::new(&state_dir.join("registry")));
        let (state, online) = watch::channel(State::Waiting(String::new()));
        let online = Online(online);
        let peers = Peers::new(&settings, secret.clone(), online.clone());
        let begin = Begin { settings, secret, store: store.clone(), registry: registry.clone(), state };
        let waiting = match begin.listen().await {
            Ok(()) => None,
            Err(error) if is_taken(&error) => {
                warn!(listen = %begin.settings.listen, "The address is in use: the node is not reachable until it is free.");
                begin.state.send_replace(State::Waiting(format!("the address {} is in use", begin.settings.listen)));
                Some(tokio::spawn(begin.keep_trying()))
            }
            Err(error) => return Err(begin.failed(&error)),
        };
        Ok(Self { store, registry, peers, online, waiting: Mutex::new(waiting) })
    }

    pub fn health(&self) -> Health {
        match &*self.online.0.borrow() {
            State::Waiting(why) => Health::Degraded { reason: format!("{why}, so no other node can be asked or answered") },
            State::Up(router) if router.endpoint().is_closed() => Health::Failed { reason: "the endpoint has closed".into() },
            State::Up(_) => Health::Ready,
        }
    }

    /// Says farewell to other nodes and lets go of the files.
    pub async fn close(&self) {
        let waiting = self.waiting.lock().take();
        if let Some(task) = waiting {
            task.abort();
        }
        let state = self.online.0.borrow().clone();
        if let State::Up(router) = state
            && !matches!(timeout(FAREWELL, router.shutdown()).await, Ok(Ok(())))
        {
            warn!("Some connections did not end in time.");
        }
        self.registry.close().await;
    }

    #[cfg(test)]
    pub async fn endpoint(&self) -> Endpoint {
        self.online.endpoint(Duration::from_secs(10)).await.expect("is up")
    }

    /// The node's id, and where it listens.
    #[cfg(test)]
    pub async fn address(&self) -> (String, std::net::SocketAddr) {
        let endpoint = self.endpoint().await;
        (endpoint.id().to_string(), endpoint.bound_sockets()[0])
    }
}

/// What it takes to be reachable.
struct Begin {
    settings: Settings,
    secret: SecretKey,
    store: Arc<Store>,
    registry: Arc<Registry>,
    state: watch::Sender<State>,
}

impl Begin {
    /// Listens on the configured address and no other, and tells nobody of it: no relays, no name servers, no port forwarding.
    async fn listen(&self) -> Result<(), BindError> {
        let endpoint = Endpoint::builder(presets::Minimal)
            .secret_key(self.secret.clone())
            .relay_mode(RelayMode::Disabled)
            .portmapper_config(PortmapperConfig::Disabled)
            .net_report_config(NetReportConfig::minimal())
            .clear_ip_transports()
            .bind_addr(self.settings.listen)
            .expect("a socket address is one")
            .bind()
            .await?;
        let address = endpoint.bound_sockets().first().copied();
        info!(node = %endpoint.id(), address = address.map(tracing::field::display), "The S5 node is up.");
        let router = serve(Router::builder(endpoint), &self.settings, &self.store, &self.registry);
        self.state.send_replace(State::Up(router));
        Ok(())
    }

    async fn keep_trying(self) {
        loop {
            tokio::time::sleep(RETRY).await;
            match self.listen().await {
                Ok(()) => return,
                Err(error) if is_taken(&error) => {}
                Err(error) => warn!(error = %self.failed(&error), "Still not reachable."),
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
            write_durably(path, hex::encode(secret.to_bytes()).as_bytes()).map_err(NodeError::io("write", path))?;
            Ok(secret)
        }
        Err(error) => Err(NodeError::io("read", path)(error)),
    }
}

/// Gives a file that only its owner may read its content, such that it is whole or absent, also after a power cut.
fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|refused| refused.error)?;
    File::open(folder)?.sync_all()
}
