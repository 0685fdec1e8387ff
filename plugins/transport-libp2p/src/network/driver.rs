//! The task that owns the swarm. Nothing in it waits but for the swarm, commands and the clock.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fabstir_plugin_api::prelude::{Event, Peer, PeerId as PeerName};
use futures::StreamExt;
use libp2p::core::transport::ListenerId;
use libp2p::kad::{self, InboundRequest};
use libp2p::metrics::{Metrics, Recorder};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm, TransportError, identify, mdns, ping};
use tokio::sync::{broadcast, mpsc, oneshot};
use tracing::{debug, info, warn};

use super::lookups::Lookups;
use super::opens::Opens;
use super::sought::{Attempt, Sought};
use super::{Command, Reply};
use crate::addresses::{Book, peer_in, usable, with_peer, without_peer};
use crate::config::Settings;
use crate::error::NetworkError;
use crate::swarm::{Behaviour, BehaviourEvent, KAD};

/// How long `join` waits for the first address of each listener.
const LISTEN: Duration = Duration::from_secs(3);

/// How long after it has joined a node has good reason to expect that it meets others.
const MEET: Duration = Duration::from_secs(3);

/// How often advertisements whose time is over are looked for.
const SWEEP: Duration = Duration::from_secs(60);

/// Peers found on the local network that are dialled at a time.
const LOCAL_DIALS: usize = 16;

/// What a peer may call its software, in characters.
const AGENT: usize = 64;

pub struct Driver {
    pub(super) swarm: Swarm<Behaviour>,
    metrics: Metrics,
    pub(super) settings: Settings,
    events: broadcast::Sender<Event>,
    connected: Arc<AtomicUsize>,
    pub(super) peers: HashMap<PeerId, Connected>,
    pub(super) book: Book,
    /// Listeners that have reported no address yet.
    silent: HashSet<ListenerId>,
    ready: Option<oneshot::Sender<Result<(), NetworkError>>>,
    ready_by: Instant,
    dials: HashMap<ConnectionId, Reply<PeerId>>,
    /// Peers of the local network that are being dialled, and whether for the first time.
    local_dials: HashMap<ConnectionId, bool>,
    sought: Sought,
    sweep: Instant,
    joined: Instant,
    pub(super) lookups: Lookups,
    pub(super) opens: Opens,
}

/// A peer that is connected.
pub(super) struct Connected {
    /// Its connections, and the address at the other end of each.
    connections: HashMap<ConnectionId, Multiaddr>,
    agent: Option<String>,
    rtt: Option<Duration>,
}

impl Driver {
    pub fn new(
        swarm: Swarm<Behaviour>,
        metrics: Metrics,
        settings: Settings,
        events: broadcast::Sender<Event>,
        connected: Arc<AtomicUsize>,
    ) -> Self {
        let now = Instant::now();
        let own = *swarm.local_peer_id();
        let mut sought = Sought::default();
        for (peer, address) in settings.bootstrap.iter().filter(|(peer, _)| *peer != own) {
            sought.begin_with(*peer, address.clone(), now);
        }
        Self {
            swarm,
            metrics,
            events,
            connected,
            peers: HashMap::new(),
            book: Book::default(),
            silent: HashSet::new(),
            ready: None,
            ready_by: now + LISTEN,
            dials: HashMap::new(),
            local_dials: HashMap::new(),
            sought,
            sweep: now + SWEEP,
            joined: now,
            lookups: Lookups::new(settings.republish),
            opens: Opens::default(),
            settings,
        }
    }

    /// Listens on the configured addresses.
    pub fn listen(&mut self) -> Result<(), NetworkError> {
        for address in self.settings.listen.clone() {
            let listener = self.swarm.listen_on(address.clone()).map_err(|error| match error {
                TransportError::MultiaddrNotSupported(address) => NetworkError::Listen {
                    address: address.to_string(),
                    cause: "neither /ip4/…/tcp/… nor /ip4/…/udp/…/quic-v1".into(),
                    denied: false,
                },
                TransportError::Other(error) => cannot_listen(&address, &error),
            })?;
            self.silent.insert(listener);
        }
        for address in self.settings.external.clone() {
            self.swarm.add_external_address(without_peer(address));
        }
        Ok(())
    }

    /// Runs until it is stopped, or until nobody can give commands any more.
    pub async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        ready: oneshot::Sender<Result<(), NetworkError>>,
        mut stopped: oneshot::Receiver<()>,
    ) {
        self.ready = Some(ready);
        self.report_ready();
        loop {
            let alarm = tokio::time::sleep_until(self.next_alarm().into());
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_event(event),
                command = commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => return,
                },
                () = alarm => {}
                _ = &mut stopped => return,
            }
            self.on_time();
        }
    }

    fn next_alarm(&self) -> Instant {
        let sought = self.sought.next_alarm(self.local_dials.len() < LOCAL_DIALS);
        let ready = self.ready.as_ref().map(|_| self.ready_by);
        [self.lookups.next_alarm(), sought, ready].into_iter().flatten().fold(self.sweep, Instant::min)
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        if self.ready.is_some() && now >= self.ready_by {
            warn!("Some of the addresses in `listen` belong to no interface yet.");
            self.silent.clear();
            self.report_ready();
        }
        if now >= self.sweep {
            self.sweep = now + SWEEP;
            let store = self.swarm.behaviour_mut().kad.store_mut();
            store.forget();
            debug!(advertisements = store.len(), "Advertisements whose time is over are forgotten.");
        }
        self.dial_sought(now);
        self.look_up_on_time(now);
    }

    /// Whether somebody may be met in a moment: a peer that has not said who it is, one that is being dialled, or the first of all.
    pub(super) fn is_meeting_peers(&self) -> bool {
        let bootstraps = self.sought.begins();
        let begins = self.joined.elapsed() < MEET && (bootstraps || self.settings.mdns);
        let unnamed = self.peers.values().any(|connected| connected.agent.is_none());
        begins || unnamed || self.local_dials.values().any(|is_first| *is_first) || (bootstraps && self.peers.is_empty())
    }

    fn report_ready(&mut self) {
        if self.silent.is_empty()
            && let Some(ready) = self.ready.take()
        {
            // Who joins may have given up.
            let _ = ready.send(Ok(()));
        }
    }

    fn dial_sought(&mut self, now: Instant) {
        while let Some(Attempt { peer, addresses, local, is_first }) =
            self.sought.take_due(now, self.local_dials.len() < LOCAL_DIALS)
        {
            let dial = DialOpts::peer_id(peer)
                .condition(PeerCondition::DisconnectedAndNotDialing)
                .addresses(addresses)
                .extend_addresses_through_behaviour()
                // Peers that hear of each other dial each other at once. From and to the ports that they listen on, those would be
                // one TCP connection, which both have begun and none takes.
                .allocate_new_port()
                .build();
            let connection = dial.connection_id();
            match self.swarm.dial(dial) {
                Ok(()) if local => drop(self.local_dials.insert(connection, is_first)),
                Ok(()) => {}
                Err(error) => debug!(%peer, %error, "A peer is not dialled now."),
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        // Whoever asked may have given up; then nobody reads the reply.
        match command {
            Command::Addresses(reply) => drop(reply.send(self.addresses())),
            Command::Peers(reply) => drop(reply.send(self.peers.keys().map(|peer| self.describe(peer)).collect())),
            Command::Dial(address, reply) => self.dial(address, reply),
            Command::Advertise(topic, reply) => self.advertise(topic, reply),
            Command::Withdraw(topic, reply) => {
                self.withdraw(topic);
                let _ = reply.send(());
            }
            Command::Find(topic, sender) => self.find(topic, sender),
            Command::Open { peer, addresses, open } => self.open(peer, addresses, open),
        }
    }

    /// Where this node can be dialled, the configured addresses first.
    fn addresses(&self) -> Vec<String> {
        let own = *self.swarm.local_peer_id();
        let mut addresses: Vec<String> = Vec::new();
        for address in self.swarm.external_addresses().chain(self.swarm.listeners()) {
            let address = with_peer(address.clone(), own);
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }

    /// What is known of a peer.
    pub(super) fn describe(&self, peer: &PeerId) -> Peer {
        let connected = self.peers.get(peer);
        Peer {
            id: PeerName(peer.to_string()),
            addresses: self.book.addresses(peer).into_iter().map(|address| with_peer(address, *peer)).collect(),
            agent: connected.and_then(|connected| connected.agent.clone()),
            rtt_ms: connected.and_then(|connected| connected.rtt).map(|rtt| rtt.as_secs_f64() * 1000.0),
        }
    }

    fn dial(&mut self, address: Multiaddr, reply: Reply<PeerId>) {
        let named = peer_in(&address);
        let bare = without_peer(address.clone());
        let reached = self.peers.iter().find(|(peer, connected)| {
            named.is_none_or(|named| named == **peer) && connected.connections.values().any(|at| *at == bare)
        });
        if let Some((peer, _)) = reached {
            let _ = reply.send(Ok(*peer));
            return;
        }
        let dial = match named {
            Some(peer) => DialOpts::peer_id(peer).condition(PeerCondition::Always).addresses(vec![bare]).build(),
            None => DialOpts::unknown_peer_id().address(bare).build(),
        };
        let connection = dial.connection_id();
        match self.swarm.dial(dial) {
            Ok(()) => drop(self.dials.insert(connection, reply)),
            Err(error) => drop(reply.send(Err(unreachable(&address, &error)))),
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        self.metrics.record(&event);
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour_event(event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                let address = without_peer(endpoint.get_remote_address().clone());
                self.on_connected(peer_id, connection_id, address, endpoint.is_dialer());
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, .. } => self.on_closed(peer_id, connection_id),
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                self.local_dials.remove(&connection_id);
                if let Some(reply) = self.dials.remove(&connection_id) {
                    let _ = reply.send(Err(unreachable(&"the address", &error)));
                }
                if let Some(peer) = peer_id {
                    self.on_unreachable(peer, &error);
                }
            }
            SwarmEvent::NewListenAddr { listener_id, address } => {
                info!(%address, "Listening.");
                if self.settings.external.is_empty() {
                    self.swarm.add_external_address(address.clone());
                }
                let address = with_peer(address, *self.swarm.local_peer_id());
                self.tell(Event::Listening { address });
                self.walk();
                self.silent.remove(&listener_id);
                self.report_ready();
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => self.on_expired(address),
            SwarmEvent::ListenerClosed { listener_id, addresses, reason } => {
                for address in addresses {
                    self.on_expired(address);
                }
                self.silent.remove(&listener_id);
                if let Err(error) = reason {
                    warn!(%error, "A listener has ended.");
                }
                self.report_ready();
            }
            SwarmEvent::ListenerError { error, .. } => debug!(%error, "A listener reports an error."),
            _ => {}
        }
    }

    fn on_expired(&mut self, address: Multiaddr) {
        if self.settings.external.is_empty() {
            self.swarm.remove_external_address(&address);
        }
        let address = with_peer(address, *self.swarm.local_peer_id());
        self.tell(Event::Expired { address });
    }

    fn on_connected(&mut self, peer: PeerId, connection: ConnectionId, address: Multiaddr, dialled: bool) {
        self.local_dials.remove(&connection);
        self.sought.reached(&peer);
        if dialled {
            self.book.note(peer, [address.clone()]);
        }
        let first = !self.peers.contains_key(&peer);
        let connected =
            self.peers.entry(peer).or_insert_with(|| Connected { connections: HashMap::new(), agent: None, rtt: None });
        connected.connections.insert(connection, address);
        if first {
            self.connected.store(self.peers.len(), Ordering::Release);
            self.tell(Event::Connected { peer: PeerName(peer.to_string()) });
        }
        if let Some(reply) = self.dials.remove(&connection) {
            let _ = reply.send(Ok(peer));
        }
        self.on_reached(peer);
    }

    fn on_closed(&mut self, peer: PeerId, connection: ConnectionId) {
        let Some(connected) = self.peers.get_mut(&peer) else { return };
        connected.connections.remove(&connection);
        if connected.connections.is_empty() {
            self.peers.remove(&peer);
            self.connected.store(self.peers.len(), Ordering::Release);
            self.tell(Event::Disconnected { peer: PeerName(peer.to_string()) });
            self.sought.lost(&peer, Instant::now());
        }
    }

    fn on_behaviour_event(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Kad(event) => {
                self.metrics.record(&event);
                self.on_kad(event);
            }
            BehaviourEvent::Identify(event) => {
                self.metrics.record(&event);
                if let identify::Event::Received { peer_id, connection_id, info } = event {
                    self.on_identified(peer_id, connection_id, info);
                }
            }
            BehaviourEvent::Ping(event) => {
                self.metrics.record(&event);
                self.on_ping(event);
            }
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => {
                for (peer, address) in found {
                    self.on_discovered(peer, address);
                }
            }
            BehaviourEvent::Mdns(mdns::Event::Expired(gone)) => {
                gone.iter().for_each(|(peer, address)| self.sought.gone(peer, &without_peer(address.clone())));
            }
            BehaviourEvent::Limits(never) | BehaviourEvent::Memory(never) | BehaviourEvent::Streams(never) => match never {},
        }
    }

    /// A peer has said who it is and where it can be dialled.
    fn on_identified(&mut self, peer: PeerId, connection: ConnectionId, info: identify::Info) {
        let Some(connected) = self.peers.get_mut(&peer) else { return };
        self.sought.met(&peer);
        connected.agent = Some(info.agent_version.chars().filter(|letter| !letter.is_control()).take(AGENT).collect());
        let met = connected.connections.get(&connection).or_else(|| connected.connections.values().next()).cloned();
        let named = usable(info.listen_addrs, met.as_ref());
        self.book.note(peer, named.iter().cloned());
        if !info.protocols.contains(&KAD) {
            return;
        }
        let kad = &mut self.swarm.behaviour_mut().kad;
        let known: Vec<Multiaddr> = kad
            .kbucket(peer)
            .and_then(|bucket| {
                let entry = bucket.iter().find(|entry| *entry.node.key.preimage() == peer)?;
                Some(entry.node.value.iter().cloned().collect())
            })
            .unwrap_or_default();
        for address in &named {
            kad.add_address(&peer, address.clone());
        }
        // A peer that names others each time would grow without bound.
        if !named.is_empty() {
            for gone in known.iter().filter(|address| {
                let address = without_peer((*address).clone());
                !named.contains(&address) && met.as_ref() != Some(&address)
            }) {
                kad.remove_address(&peer, gone);
            }
        }
    }

    fn on_ping(&mut self, event: ping::Event) {
        match event.result {
            Ok(rtt) => {
                if let Some(connected) = self.peers.get_mut(&event.peer) {
                    connected.rtt = Some(rtt);
                }
            }
            Err(ping::Failure::Unsupported) => {}
            Err(error) => {
                debug!(peer = %event.peer, %error, "A connection that does not answer is closed.");
                self.swarm.close_connection(event.connection);
            }
        }
    }

    fn on_discovered(&mut self, peer: PeerId, address: Multiaddr) {
        debug!(%peer, %address, "Found on the local network.");
        self.book.note(peer, [address.clone()]);
        self.tell(Event::Discovered { peer: PeerName(peer.to_string()), address: with_peer(address.clone(), peer) });
        if !self.peers.contains_key(&peer) {
            self.sought.seen(peer, without_peer(address), Instant::now());
        }
    }

    fn on_kad(&mut self, event: kad::Event) {
        match event {
            kad::Event::InboundRequest { request: InboundRequest::AddProvider { record: Some(record) } } => {
                // libp2p lets through only what the provider itself has sent.
                let met = self.peers.get(&record.provider).and_then(|connected| connected.connections.values().next());
                let addresses = usable(record.addresses, met);
                let store = self.swarm.behaviour_mut().kad.store_mut();
                if let Err(refused) = store.keep(&record.key, record.provider, addresses) {
                    debug!(provider = %record.provider, %refused, "An advertisement is not kept.");
                }
            }
            kad::Event::RoutingUpdated { is_new_peer: true, .. } => self.on_new_node(),
            kad::Event::OutboundQueryProgressed { id, result, step, .. } => self.on_answer(id, result, step.last),
            _ => {}
        }
    }

    fn tell(&self, event: Event) {
        // There need not be a reader.
        let _ = self.events.send(event);
    }
}

fn cannot_listen(address: &Multiaddr, error: &std::io::Error) -> NetworkError {
    let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
    NetworkError::Listen { address: address.to_string(), cause: error.to_string(), denied }
}

/// Why a peer could not be dialled, in a sentence.
pub(super) fn unreachable(whom: &dyn std::fmt::Display, error: &DialError) -> NetworkError {
    let cause = match error {
        DialError::WrongPeerId { obtained, .. } => format!("another peer answers there: {obtained}"),
        DialError::LocalPeerId { .. } => "it is this node itself".into(),
        DialError::NoAddresses => "no address is known".into(),
        DialError::DialPeerConditionFalse(_) => "it is being dialled already".into(),
        DialError::Aborted => "the attempt was given up".into(),
        DialError::Denied { cause } => format!("a limit was reached: {cause}"),
        DialError::Transport(attempts) => {
            let causes: Vec<String> = attempts.iter().map(|(address, error)| format!("{address}: {}", deepest(error))).collect();
            causes.join("; ")
        }
    };
    NetworkError::Unreachable { whom: whom.to_string(), cause }
}

/// The last cause of an error, which is what a person can use.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}
