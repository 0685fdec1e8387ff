//! Streams for conversations on libp2p's connections: many protocols, and no stream that is dropped without a word.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{InboundUpgrade, OutboundUpgrade, UpgradeInfo};
use libp2p::swarm::handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound};
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler,
    StreamUpgradeError, SubstreamProtocol, ToSwarm,
};
use libp2p::{Multiaddr, PeerId, StreamProtocol};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::arrivals::Arrivals;
use crate::conversation::Line;
use crate::error::NetworkError;

/// Conversations that this node may have begun on one connection. The connection itself must carry more than that, and ends if it does
/// not.
pub const OWN_PER_CONNECTION: usize = 256;

/// How long the negotiation of a stream may take.
const NEGOTIATE: Duration = Duration::from_secs(10);

/// Connections that are kept though nothing uses them, so that a small network stays together and a large one is not full of them.
const KEPT: usize = 32;

/// A conversation that this node wants to begin.
#[derive(Debug)]
pub struct Open {
    pub protocol: StreamProtocol,
    pub reply: oneshot::Sender<Result<Line, NetworkError>>,
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Line")
    }
}

/// Gives every connection a handler for conversations, and the handlers the streams to open.
pub struct Behaviour {
    arrivals: Arc<Arrivals>,
    streams_per_peer: usize,
    /// Connected peers: how many connections, and places for the streams that they open.
    peers: HashMap<PeerId, (usize, Arc<Semaphore>)>,
    orders: VecDeque<(PeerId, Open)>,
    kept: Arc<AtomicUsize>,
}

impl Behaviour {
    pub fn new(arrivals: Arc<Arrivals>, streams_per_peer: usize) -> Self {
        Self { arrivals, streams_per_peer, peers: HashMap::new(), orders: VecDeque::new(), kept: Arc::default() }
    }

    /// Opens a stream on a connection with this peer, of which there must be one.
    pub fn open(&mut self, peer: PeerId, open: Open) {
        self.orders.push_back((peer, open));
    }

    fn handler(&mut self, peer: PeerId) -> Handler {
        let places = match self.peers.get(&peer) {
            Some((_, places)) => places.clone(),
            None => Arc::new(Semaphore::new(self.streams_per_peer)),
        };
        // Counted when the connection is reported; noted now, so that a second one shares the places.
        self.peers.entry(peer).or_insert_with(|| (0, places.clone()));
        Handler {
            peer,
            arrivals: self.arrivals.clone(),
            places,
            own: Arc::new(Semaphore::new(OWN_PER_CONNECTION)),
            orders: VecDeque::new(),
            kept: Kept::claim(&self.kept),
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(self.handler(peer))
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(self.handler(peer))
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        match event {
            FromSwarm::ConnectionEstablished(established) => {
                if let Some((connections, _)) = self.peers.get_mut(&established.peer_id) {
                    *connections += 1;
                }
            }
            FromSwarm::ConnectionClosed(closed) => {
                if let Some((connections, _)) = self.peers.get_mut(&closed.peer_id) {
                    *connections = connections.saturating_sub(1);
                }
                self.peers.retain(|_, (connections, _)| *connections > 0);
            }
            // Another behaviour refused a connection that we had made a handler for.
            FromSwarm::DialFailure(_) | FromSwarm::ListenFailure(_) => self.peers.retain(|_, (connections, _)| *connections > 0),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Infallible) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, Open>> {
        // No waker: orders come from the task that polls the swarm, before it polls.
        match self.orders.pop_front() {
            Some((peer_id, event)) => Poll::Ready(ToSwarm::NotifyHandler { peer_id, handler: NotifyHandler::Any, event }),
            None => Poll::Pending,
        }
    }
}

/// A place among the connections that are kept idle.
struct Kept(Arc<AtomicUsize>);

impl Kept {
    fn claim(count: &Arc<AtomicUsize>) -> Option<Self> {
        let claimed = count.fetch_update(Ordering::AcqRel, Ordering::Acquire, |kept| (kept < KEPT).then_some(kept + 1));
        claimed.is_ok().then(|| Self(count.clone()))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The conversations of one connection, as long as they are not under way.
pub struct Handler {
    peer: PeerId,
    arrivals: Arc<Arrivals>,
    /// For the streams that the peer opens, on all its connections.
    places: Arc<Semaphore>,
    /// For the streams that this node opens, on this connection.
    own: Arc<Semaphore>,
    orders: VecDeque<Open>,
    kept: Option<Kept>,
}

/// What was asked for when a stream was requested.
pub struct Requested {
    open: Open,
    place: OwnedSemaphorePermit,
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Open;
    type ToBehaviour = Infallible;
    type InboundProtocol = Protocols;
    type OutboundProtocol = Protocols;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Requested;

    fn listen_protocol(&self) -> SubstreamProtocol<Protocols> {
        SubstreamProtocol::new(Protocols(self.arrivals.protocols()), ()).with_timeout(NEGOTIATE)
    }

    fn connection_keep_alive(&self) -> bool {
        self.kept.is_some()
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ConnectionHandlerEvent<Protocols, Requested, Infallible>> {
        // No waker: orders come by `on_behaviour_event`, after which the connection polls.
        while let Some(open) = self.orders.pop_front() {
            if open.reply.is_closed() {
                continue;
            }
            let Ok(place) = self.own.clone().try_acquire_owned() else {
                // Who asked may have gone.
                let _ = open.reply.send(Err(NetworkError::TooManyConversations(OWN_PER_CONNECTION)));
                continue;
            };
            let protocol = Protocols(vec![open.protocol.clone()]);
            let protocol = SubstreamProtocol::new(protocol, Requested { open, place }).with_timeout(NEGOTIATE);
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, open: Open) {
        self.orders.push_back(open);
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<'_, Protocols, Protocols, (), Requested>) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol: (stream, protocol), .. }) => {
                let place = self.places.clone().try_acquire_owned().ok();
                self.arrivals.arrived(self.peer, protocol, stream, place);
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol: (stream, _), info }) => {
                // Who asked may have gone: then the stream is dropped, which tells the peer.
                let _ = info.open.reply.send(Ok(Line::new(stream, info.place)));
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info: Requested { open, .. }, error }) => {
                let error = match error {
                    StreamUpgradeError::NegotiationFailed => NetworkError::NotSpoken(open.protocol.to_string()),
                    StreamUpgradeError::Timeout => NetworkError::Broken("the peer did not answer in time".into()),
                    StreamUpgradeError::Io(error) => NetworkError::Broken(error.to_string()),
                    StreamUpgradeError::Apply(never) => match never {},
                };
                let _ = open.reply.send(Err(error));
            }
            _ => {}
        }
    }
}

/// Negotiates one of these protocols; the stream is then used as it is.
#[derive(Debug, Clone)]
pub struct Protocols(Vec<StreamProtocol>);

impl UpgradeInfo for Protocols {
    type Info = StreamProtocol;
    type InfoIter = std::vec::IntoIter<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.clone().into_iter()
    }
}

impl InboundUpgrade<libp2p::Stream> for Protocols {
    type Output = (libp2p::Stream, StreamProtocol);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_inbound(self, stream: libp2p::Stream, protocol: StreamProtocol) -> Self::Future {
        ready(Ok((stream, protocol)))
    }
}

impl OutboundUpgrade<libp2p::Stream> for Protocols {
    type Output = (libp2p::Stream, StreamProtocol);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_outbound(self, stream: libp2p::Stream, protocol: StreamProtocol) -> Self::Future {
        ready(Ok((stream, protocol)))
    }
}
