//! A peer that keeps no rules: raw streams of any protocol, as many as the connection gives.
//!
//! It knows the protocol only from its description, so it is a second implementation of the part that it speaks.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt;
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{InboundUpgrade, OutboundUpgrade, UpgradeInfo};
use libp2p::core::{Endpoint, upgrade::DeniedUpgrade};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::handler::ConnectionEvent;
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler,
    SubstreamProtocol, SwarmEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId, StreamProtocol, SwarmBuilder, noise, tcp, yamux};
use tokio::sync::{mpsc, oneshot};

type Answer = oneshot::Sender<Option<libp2p::Stream>>;

pub struct Hostile {
    orders: mpsc::UnboundedSender<(Multiaddr, StreamProtocol, Answer)>,
    task: tokio::task::JoinHandle<()>,
}

impl Hostile {
    pub fn start() -> Self {
        let (orders, mut received) = mpsc::unbounded_channel::<(Multiaddr, StreamProtocol, Answer)>();
        let many = || {
            let mut config = yamux::Config::default();
            config.set_max_num_streams(4096);
            config
        };
        let mut swarm = SwarmBuilder::with_new_identity()
            .with_tokio()
            .with_tcp(tcp::Config::default(), noise::Config::new, many)
            .expect("builds")
            .with_behaviour(|_| Behaviour::default())
            .expect("builds")
            .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(600)))
            .build();
        let task = tokio::spawn(async move {
            let mut waiting: Vec<(PeerId, StreamProtocol, Answer)> = vec![];
            loop {
                tokio::select! {
                    event = swarm.select_next_some() => match event {
                        SwarmEvent::ConnectionEstablished { peer_id, .. } => {
                            for (_, protocol, answer) in waiting.drain(..) {
                                swarm.behaviour_mut().orders.push_back((peer_id, Order { protocol, answer }));
                            }
                        }
                        SwarmEvent::OutgoingConnectionError { .. } => waiting.clear(),
                        _ => {}
                    },
                    order = received.recv() => {
                        let Some((address, protocol, answer)) = order else { return };
                        let Some(Protocol::P2p(peer)) = address.iter().last() else { panic!("{address} has no id") };
                        if swarm.is_connected(&peer) {
                            swarm.behaviour_mut().orders.push_back((peer, Order { protocol, answer }));
                        } else {
                            // Where it is being dialled already, that is enough.
                            let _ = swarm.dial(address);
                            waiting.push((peer, protocol, answer));
                        }
                    }
                }
            }
        });
        Self { orders, task }
    }

    /// Opens streams; `None` for each that the other side or the connection did not give.
    pub async fn open(&mut self, address: &str, protocol: &'static str, count: usize) -> Vec<Option<libp2p::Stream>> {
        let answers = (0..count).map(|_| {
            let (answer, answered) = oneshot::channel();
            let order = (address.parse().expect("an address"), StreamProtocol::new(protocol), answer);
            self.orders.send(order).expect("runs");
            async move { answered.await.ok().flatten() }
        });
        futures::future::join_all(answers).await
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug)]
pub struct Order {
    protocol: StreamProtocol,
    answer: Answer,
}

#[derive(Default)]
struct Behaviour {
    orders: VecDeque<(PeerId, Order)>,
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(Handler::default())
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(Handler::default())
    }

    fn on_swarm_event(&mut self, _: FromSwarm) {}

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Infallible) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, Order>> {
        match self.orders.pop_front() {
            Some((peer_id, event)) => Poll::Ready(ToSwarm::NotifyHandler { peer_id, handler: NotifyHandler::Any, event }),
            None => Poll::Pending,
        }
    }
}

#[derive(Default)]
struct Handler {
    orders: VecDeque<Order>,
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Order;
    type ToBehaviour = Infallible;
    type InboundProtocol = DeniedUpgrade;
    type OutboundProtocol = Raw;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Answer;

    fn listen_protocol(&self) -> SubstreamProtocol<DeniedUpgrade> {
        SubstreamProtocol::new(DeniedUpgrade, ())
    }

    fn connection_keep_alive(&self) -> bool {
        true
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ConnectionHandlerEvent<Raw, Answer, Infallible>> {
        match self.orders.pop_front() {
            Some(Order { protocol, answer }) => Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                protocol: SubstreamProtocol::new(Raw(protocol), answer),
            }),
            None => Poll::Pending,
        }
    }

    fn on_behaviour_event(&mut self, order: Order) {
        self.orders.push_back(order);
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<'_, DeniedUpgrade, Raw, (), Answer>) {
        match event {
            ConnectionEvent::FullyNegotiatedOutbound(negotiated) => drop(negotiated.info.send(Some(negotiated.protocol))),
            ConnectionEvent::DialUpgradeError(failed) => drop(failed.info.send(None)),
            _ => {}
        }
    }
}

struct Raw(StreamProtocol);

impl UpgradeInfo for Raw {
    type Info = StreamProtocol;
    type InfoIter = std::iter::Once<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once(self.0.clone())
    }
}

impl InboundUpgrade<libp2p::Stream> for Raw {
    type Output = libp2p::Stream;
    type Error = Infallible;
    type Future = Ready<Result<libp2p::Stream, Infallible>>;

    fn upgrade_inbound(self, stream: libp2p::Stream, _: StreamProtocol) -> Self::Future {
        ready(Ok(stream))
    }
}

impl OutboundUpgrade<libp2p::Stream> for Raw {
    type Output = libp2p::Stream;
    type Error = Infallible;
    type Future = Ready<Result<libp2p::Stream, Infallible>>;

    fn upgrade_outbound(self, stream: libp2p::Stream, _: StreamProtocol) -> Self::Future {
        ready(Ok(stream))
    }
}
