//! The network, as the rest of the plugin sees it: commands to the task that owns the swarm.

mod driver;
mod lookups;
mod opens;
mod sought;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fabstir_plugin_api::prelude::{Event, Host, Join, Peer, PluginError, Role, Stream};
use libp2p::identity::Keypair;
use libp2p::{Multiaddr, PeerId, StreamProtocol};
use parking_lot::Mutex;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::arrivals::Arrivals;
use crate::config::Settings;
use crate::conversation::Line;
use crate::error::NetworkError;
use crate::streams::Open;
use crate::swarm;
use crate::topics::Topic;

use driver::Driver;

type Reply<T> = oneshot::Sender<Result<T, NetworkError>>;

/// Commands under way to the task.
const COMMANDS: usize = 256;

/// Events that a reader may be behind.
const EVENTS: usize = 256;

/// How long the task may take to end.
const END: Duration = Duration::from_secs(5);

/// What the task is asked to do.
enum Command {
    Addresses(oneshot::Sender<Vec<String>>),
    Peers(oneshot::Sender<Vec<Peer>>),
    Dial(Multiaddr, Reply<PeerId>),
    Advertise(Topic, Reply<()>),
    Withdraw(Topic, oneshot::Sender<()>),
    Find(Topic, fabstir_plugin_api::prelude::Sender<Peer>),
    Open { peer: PeerId, addresses: Vec<Multiaddr>, open: Open },
}

/// A network that this node takes part in.
pub struct Network {
    pub peer: PeerId,
    role: Role,
    commands: mpsc::Sender<Command>,
    events: broadcast::Sender<Event>,
    pub arrivals: Arc<Arrivals>,
    settings: Settings,
    connected: Arc<AtomicUsize>,
    task: Mutex<Option<(oneshot::Sender<()>, JoinHandle<()>)>>,
}

impl Network {
    /// Takes part in the network; returns when the node listens.
    pub async fn join(join: Join, settings: Settings, host: &Host) -> Result<Self, NetworkError> {
        let length = join.secret_key.len();
        let keypair = Keypair::ed25519_from_bytes(join.secret_key).map_err(|_| NetworkError::SecretKey(length))?;
        let peer = keypair.public().to_peer_id();
        let arrivals = Arrivals::new(settings.waiting);
        let (events, _) = broadcast::channel(EVENTS);
        let connected = Arc::<AtomicUsize>::default();
        let mut built = None;
        host.metrics(|registry| {
            let metrics = libp2p::metrics::Metrics::new(registry);
            let swarm = swarm::build(keypair, &settings, join.role == Role::Node, arrivals.clone(), registry);
            built = Some((swarm, metrics));
        });
        let (swarm, metrics) = built.ok_or_else(|| NetworkError::Start("the metrics were not registered".into()))?;
        let mut driver = Driver::new(swarm?, metrics, settings.clone(), events.clone(), connected.clone());
        if join.role == Role::Node {
            driver.listen()?;
        }
        let (sender, commands) = mpsc::channel(COMMANDS);
        let (stop, stopped) = oneshot::channel();
        let (ready, listening) = oneshot::channel();
        let task = tokio::spawn(driver.run(commands, ready, stopped));
        let task = Mutex::new(Some((stop, task)));
        let network = Self { peer, role: join.role, commands: sender, events, arrivals, settings, connected, task };
        listening.await.map_err(|_| NetworkError::Gone)??;
        Ok(network)
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, NetworkError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| NetworkError::Gone)?;
        answer.await.map_err(|_| NetworkError::Gone)
    }

    pub async fn addresses(&self) -> Result<Vec<String>, NetworkError> {
        self.ask(Command::Addresses).await
    }

    pub async fn peers(&self) -> Result<Vec<Peer>, NetworkError> {
        self.ask(Command::Peers).await
    }

    /// What happens from now on.
    pub fn events(&self) -> Stream<Event> {
        Stream::new(futures::stream::unfold(self.events.subscribe(), |mut events| async move {
            let event = match events.recv().await {
                Ok(event) => event,
                Err(broadcast::error::RecvError::Lagged(count)) => Event::Missed { count },
                Err(broadcast::error::RecvError::Closed) => return None,
            };
            Some((Ok::<_, PluginError>(event), events))
        }))
    }

    pub async fn dial(&self, address: Multiaddr) -> Result<PeerId, NetworkError> {
        self.ask(|reply| Command::Dial(address, reply)).await?
    }

    pub async fn advertise(&self, topic: Topic) -> Result<(), NetworkError> {
        if self.role == Role::Visitor {
            return Err(NetworkError::Visitor);
        }
        self.ask(|reply| Command::Advertise(topic, reply)).await?
    }

    pub async fn withdraw(&self, topic: Topic) -> Result<(), NetworkError> {
        self.ask(|reply| Command::Withdraw(topic, reply)).await
    }

    pub async fn find(&self, topic: Topic) -> Result<Stream<Peer>, NetworkError> {
        // As many as one find may find, so that the task never waits for a reader.
        let (sender, stream) = Stream::channel(lookups::FOUND);
        self.commands.send(Command::Find(topic, sender)).await.map_err(|_| NetworkError::Gone)?;
        Ok(stream)
    }

    /// Opens a line to a peer, on which it has said that it accepts.
    pub async fn open(&self, peer: PeerId, addresses: Vec<Multiaddr>, protocol: StreamProtocol) -> Result<Line, NetworkError> {
        let open = |reply| Command::Open { peer, addresses, open: Open { protocol, reply } };
        let mut line = self.ask(open).await??;
        line.accepted().await?;
        Ok(line)
    }

    /// How long a peer may take nothing before its conversation is given up.
    pub fn stall(&self) -> Duration {
        self.settings.stall
    }

    /// Why this node is alone, where it should not be.
    pub fn lonely(&self) -> Option<String> {
        let configured = self.settings.bootstrap.len();
        let alone = configured > 0 && self.connected.load(Ordering::Acquire) == 0;
        alone.then(|| format!("no peer is connected: none of the {configured} addresses in `bootstrap` answers"))
    }

    /// Leaves the network: connections are closed, the task ends.
    pub async fn leave(&self) {
        let Some((stop, task)) = self.task.lock().take() else { return };
        // The task may have ended by itself.
        let _ = stop.send(());
        let abort = task.abort_handle();
        if tokio::time::timeout(END, task).await.is_err() {
            abort.abort();
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some((_, task)) = self.task.lock().take() {
            task.abort();
        }
    }
}
