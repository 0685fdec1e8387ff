//! The peer edge: what other nodes see of this one, over any transport plugin.
//!
//! ```text
//! /fabstir/capability/1   capability.rs   what is offered here now, signed
//! /fabstir/session/1      session.rs      requests and their answers
//! /fabstir/result/1       results.rs      what came of posted jobs
//! topics.rs                               under which keys the network is told that a model is here
//! ```
//!
//! The network keeps only *that* a node offers a model. All that changes (free slots, prices) the node says itself, when asked, and
//! signs it. Requests go the same way as those over HTTP: through the scheduler.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::Result;
use fabstir_plugin_api::stream::Stream;
use fabstir_plugin_api::transport::{Arrival, Join, PeerId, Role, Topic, Transport};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::clock::now_ms;
use crate::config;
use crate::identity::NodeKey;
use crate::market::Seller;
use crate::routes::{Route, Routes};
use crate::scheduler::Scheduler;

pub mod capability;
pub mod results;
pub mod session;
pub mod topics;

use capability::{CapabilityError, Offer, Record};
use session::serving::Sessions;

/// What this node's software is called among peers.
pub const AGENT: &str = concat!("fabstir-node/", env!("CARGO_PKG_VERSION"));

/// How long what a node says of itself holds.
const RECORD_LIFETIME: Duration = Duration::from_secs(60);
/// How long a peer may take to say what it wants to know.
const QUESTION: Duration = Duration::from_secs(5);
/// The pause before something is tried again that the network did not take.
const AGAIN: Duration = Duration::from_secs(2);
/// Conversations that are served at a time, of each protocol. The transport bounds them by peer.
const MOST_CONVERSATIONS: usize = 2048;

/// This node among its peers.
pub struct Network {
    config: config::Network,
    key: Arc<NodeKey>,
    scheduler: Arc<Scheduler>,
    sessions: Sessions,
    open_sessions: Gauge,
    seller: Option<Arc<Seller>>,
}

impl Network {
    /// With a seller, prices are charged.
    pub fn new(config: config::Network, key: NodeKey, scheduler: Arc<Scheduler>, seller: Option<Arc<Seller>>) -> Arc<Self> {
        let sessions = Sessions::new(scheduler.clone(), config.sessions_per_peer, seller.clone());
        Arc::new(Self { config, key: Arc::new(key), scheduler, sessions, open_sessions: Gauge::default(), seller })
    }

    /// Shows its metrics in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("fabstir_peer_sessions", "Sessions with peers that are open or kept", self.open_sessions.clone());
    }

    /// Takes part through every transport plugin that is there or comes, until `stop`; then tells the network nothing more, lets the
    /// requests of peers end, and returns.
    pub async fn run(self: Arc<Self>, mut routes: watch::Receiver<Arc<Routes>>, stop: CancellationToken) {
        let mut members: JoinSet<()> = JoinSet::new();
        let mut known: BTreeSet<u64> = BTreeSet::new();
        loop {
            self.open_sessions.set(self.sessions.count() as i64);
            let transports = routes.borrow_and_update().transport.clone();
            for route in transports {
                if known.insert(route.generation) {
                    members.spawn(self.clone().take_part(route, routes.clone(), stop.clone()));
                }
            }
            tokio::select! {
                changed = routes.changed() => if changed.is_err() { break },
                Some(_) = members.join_next() => {}
                () = tokio::time::sleep(AGAIN) => {}
                () = stop.cancelled() => break,
            }
        }
        // What is announced is withdrawn meanwhile, by each member.
        self.sessions.drain().await;
        members.shutdown().await;
    }

    /// One generation of one transport, until it goes or the node stops.
    async fn take_part(
        self: Arc<Self>,
        route: Arc<Route<dyn Transport>>,
        routes: watch::Receiver<Arc<Routes>>,
        stop: CancellationToken,
    ) {
        let gone = gone(routes.clone(), route.generation);
        let work = async {
            let peer = self.join(&route).await;
            let sessions = self.clone().listen(&route.client, session::PROTOCOL, {
                let network = self.clone();
                move |transport, arrival| network.clone().converse(transport, arrival)
            });
            let questions = self.clone().listen(&route.client, capability::PROTOCOL, {
                let (network, peer) = (self.clone(), peer.clone());
                move |transport, arrival| network.clone().answer(transport, arrival, peer.clone())
            });
            let results = async {
                // Who takes no jobs has no results.
                if let Some(seller) = &self.seller {
                    let give = move |transport, arrival| results::give(seller.clone(), transport, arrival);
                    self.clone().listen(&route.client, results::PROTOCOL, give).await;
                }
            };
            let announced = self.announce(&route, routes, &stop);
            tokio::join!(sessions, questions, results, announced);
        };
        tokio::select! {
            () = work => {}
            () = gone => {}
        }
    }

    /// Joins under the node's key, as often as it takes: the generation before may still hold the address.
    async fn join(&self, route: &Route<dyn Transport>) -> PeerId {
        loop {
            let join = Join { secret_key: self.key.secret().to_vec(), role: Role::Node };
            match route.client.join(&Cx::new().with_timeout(Duration::from_secs(30)), join).await {
                Ok(peer) => {
                    let addresses = peer.addresses.join(" ");
                    tracing::info!(plugin = %route.plugin, peer = %peer.id, addresses, "Joined the network.");
                    if let Some(seller) = &self.seller {
                        // The same every time: it is made from the node's key.
                        let _ = seller.peer.set(peer.id.clone());
                    }
                    return peer.id;
                }
                Err(error) => {
                    tracing::error!(plugin = %route.plugin, code = %error.code, %error, "The network cannot be joined; trying again.");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }

    /// Takes conversations of one protocol, each in a task of its own, until the transport ends.
    async fn listen<F>(
        self: Arc<Self>,
        transport: &Arc<dyn Transport>,
        protocol: &str,
        serve: impl Fn(Arc<dyn Transport>, Arrival) -> F,
    ) where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let mut conversations = JoinSet::new();
        loop {
            let mut arrivals = match transport.listen(&Cx::new(), protocol.to_owned()).await {
                Ok(arrivals) => arrivals,
                Err(error) => {
                    tracing::warn!(protocol, code = %error.code, %error, "Nobody can be listened to; trying again.");
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
            };
            loop {
                tokio::select! {
                    arrival = arrivals.next(), if conversations.len() < MOST_CONVERSATIONS => match arrival {
                        Some(Ok(arrival)) => drop(conversations.spawn(serve(transport.clone(), arrival))),
                        _ => break,
                    },
                    Some(ended) = conversations.join_next() => if let Ok(Err(error)) = ended {
                        tracing::debug!(protocol, %error, "A conversation ended early.");
                    },
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn converse(self: Arc<Self>, transport: Arc<dyn Transport>, arrival: Arrival) -> Result<()> {
        let (outgoing, stream) = Stream::channel(64);
        let incoming = transport.accept(&Cx::new(), arrival.id, stream).await?;
        self.sessions.serve(arrival.peer, incoming, outgoing).await;
        Ok(())
    }

    /// Answers what is offered here now, to the question's nonce.
    async fn answer(self: Arc<Self>, transport: Arc<dyn Transport>, arrival: Arrival, peer: PeerId) -> Result<()> {
        let (outgoing, stream) = Stream::channel(1);
        let cx = Cx::new().with_timeout(2 * QUESTION);
        let mut incoming = transport.accept(&cx, arrival.id, stream).await?;
        let question = tokio::time::timeout(QUESTION, incoming.next()).await.ok().flatten().transpose()?;
        // A question that is none gets no answer.
        let Some(nonce) = question.and_then(|question| <[u8; 16]>::try_from(&*question).ok()) else { return Ok(()) };
        let mut record = self.record(peer, nonce);
        let mut sealed = record.seal(&self.key);
        if let Err(CapabilityError::TooManyModels { models, fit, .. }) = sealed {
            tracing::warn!(models, fit, "More models are served than a record has room for: the first ones are told.");
            record.models.truncate(fit);
            sealed = record.seal(&self.key);
        }
        match sealed {
            Ok(sealed) => outgoing.send(sealed.into()).await?,
            Err(error) => tracing::error!(%error, "What this node offers cannot be told."),
        }
        drop(outgoing);
        until_read(incoming).await;
        Ok(())
    }

    fn record(&self, peer: PeerId, nonce: [u8; 16]) -> Record {
        let offer = |model: crate::scheduler::ServedModelInfo| Offer {
            free: self.scheduler.free(&model.id).min(model.parallel),
            name: model.id,
            digest: model.digest,
            context: model.context,
            slots: model.parallel,
            price_input_wei_per_mtok: self.config.price_input_wei_per_mtok.into(),
            price_output_wei_per_mtok: self.config.price_output_wei_per_mtok.into(),
        };
        let issued_ms = now_ms();
        Record {
            peer,
            agent: AGENT.into(),
            issued_ms,
            expires_ms: issued_ms + RECORD_LIFETIME.as_millis() as u64,
            nonce,
            models: if self.sessions.is_draining() { Vec::new() } else { self.scheduler.generating().map(offer).collect() },
        }
    }

    /// Tells the network which models are here, whenever that changes; nothing more after `stop`.
    async fn announce(&self, route: &Route<dyn Transport>, mut routes: watch::Receiver<Arc<Routes>>, stop: &CancellationToken) {
        let cx = || Cx::new().with_timeout(Duration::from_secs(60));
        let mut announced: BTreeSet<Vec<u8>> = BTreeSet::new();
        loop {
            routes.borrow_and_update();
            let wanted = if stop.is_cancelled() { BTreeSet::new() } else { self.topics() };
            for topic in announced.clone().difference(&wanted) {
                if route.client.withdraw(&cx(), Topic(topic.clone())).await.is_ok() {
                    announced.remove(topic);
                }
            }
            for topic in &wanted {
                if announced.contains(topic) {
                    continue;
                }
                match route.client.advertise(&cx(), Topic(topic.clone())).await {
                    Ok(()) => drop(announced.insert(topic.clone())),
                    Err(error) => {
                        tracing::warn!(plugin = %route.plugin, code = %error.code, %error, "A model was not announced.")
                    }
                }
            }
            if stop.is_cancelled() {
                return;
            }
            tokio::select! {
                changed = routes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(AGAIN), if announced != wanted => {}
                () = stop.cancelled() => {}
            }
        }
    }

    fn topics(&self) -> BTreeSet<Vec<u8>> {
        let models: Vec<_> = self.scheduler.generating().collect();
        let names = models.iter().map(|model| topics::of_name(&model.id).0);
        let digests = models.iter().filter_map(|model| Some(topics::of_model(model.digest.as_ref()?).0));
        names.chain(digests).collect()
    }
}

/// Waits for the peer's end, for a while: to drop what it says sooner would take back what it was told last.
async fn until_read(mut incoming: Stream<Blob>) {
    let end = async { while let Some(Ok(_)) = incoming.next().await {} };
    let _ = tokio::time::timeout(QUESTION, end).await;
}

/// Ends when a generation is no longer among the routes.
async fn gone(mut routes: watch::Receiver<Arc<Routes>>, generation: u64) {
    let is_gone = |routes: &Arc<Routes>| !routes.transport.iter().any(|route| route.generation == generation);
    // The sender's end is the node's.
    let _ = routes.wait_for(is_gone).await;
}
