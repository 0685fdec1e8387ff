//! What the hash table is asked and told: advertisements, searches, and where a peer is.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use fabstir_plugin_api::prelude::{Peer, Sender};
use libp2p::core::Endpoint;
use libp2p::kad::{GetClosestPeersError, GetProvidersOk, QueryId, QueryResult};
use libp2p::swarm::{ConnectionId, NetworkBehaviour};
use libp2p::{Multiaddr, PeerId};
use tracing::{debug, warn};

use super::Reply;
use super::driver::Driver;
use crate::addresses::{PER_PEER, is_readable, reach, without_peer};
use crate::error::NetworkError;
use crate::topics::{SHARDS, Topic};

/// Peers that one search finds at most.
pub const FOUND: usize = 4096;

/// Searches under way at a time; others wait for their turn.
const SEARCHES: usize = 16;

/// How long a search waits for a first node to ask.
const FIRST_NODE: Duration = Duration::from_secs(3);

/// How long new nodes are waited for before advertisements are said to them, and before the network is walked: the first few are
/// answered at once, and where many come at the same time each further pause is twice as long.
const SETTLE: Duration = Duration::from_millis(50);
const SETTLE_LAST: Duration = Duration::from_secs(30);

/// How often the network is walked for nodes while no new ones appear.
const WALK: Duration = Duration::from_secs(5 * 60);

/// Below this many nodes in the table, each new one may be among the nearest to any topic.
const FEW: usize = 20;

/// What is under way.
pub struct Lookups {
    republish: Duration,
    /// What this node offers.
    topics: HashSet<Topic>,
    /// When all of it is said again.
    next_republish: Instant,
    /// When new nodes are told of it, and asked for others.
    settled: Option<Instant>,
    last_settled: Instant,
    settle: Duration,
    /// When the network is walked for other nodes in any case.
    next_walk: Instant,
    queries: HashMap<QueryId, Purpose>,
    searches: HashMap<u64, Search>,
    /// Searches that have not begun, with the time at which they begin in any case.
    parked: Vec<(Instant, Topic, Sender<Peer>)>,
    next_search: u64,
}

enum Purpose {
    Advertise(Option<Reply<()>>),
    Search(u64),
    Locate(PeerId),
}

struct Search {
    sender: Sender<Peer>,
    seen: HashSet<PeerId>,
    /// Shards that have not been asked to the end.
    left: u8,
}

impl Lookups {
    pub fn new(republish: Duration) -> Self {
        let now = Instant::now();
        Self {
            republish,
            topics: HashSet::new(),
            next_republish: now + republish,
            settled: None,
            last_settled: now,
            settle: SETTLE / 2,
            next_walk: now + WALK,
            queries: HashMap::new(),
            searches: HashMap::new(),
            parked: Vec::new(),
            next_search: 0,
        }
    }

    pub fn next_alarm(&self) -> Option<Instant> {
        let parked = if self.searches.len() < SEARCHES { self.parked.iter().map(|(begin, ..)| *begin).min() } else { None };
        let republish = (!self.topics.is_empty()).then_some(self.next_republish);
        [parked, republish, self.settled, Some(self.next_walk)].into_iter().flatten().min()
    }
}

impl Driver {
    pub(super) fn advertise(&mut self, topic: Topic, reply: Reply<()>) {
        let limit = self.settings.topics;
        if !self.lookups.topics.contains(&topic) && self.lookups.topics.len() >= limit {
            let _ = reply.send(Err(NetworkError::TooManyTopics(limit)));
            return;
        }
        if self.lookups.topics.is_empty() {
            self.lookups.next_republish = Instant::now() + self.lookups.republish;
        }
        self.lookups.topics.insert(topic);
        self.say(topic, Some(reply));
    }

    fn say(&mut self, topic: Topic, reply: Option<Reply<()>>) {
        let key = topic.key_of(self.swarm.local_peer_id());
        match self.swarm.behaviour_mut().kad.start_providing(key) {
            Ok(query) => drop(self.lookups.queries.insert(query, Purpose::Advertise(reply))),
            Err(error) => {
                warn!(%error, "An advertisement could not be kept.");
                if let Some(reply) = reply {
                    let _ = reply.send(Err(NetworkError::Start(error.to_string())));
                }
            }
        }
    }

    pub(super) fn withdraw(&mut self, topic: Topic) {
        if self.lookups.topics.remove(&topic) {
            let key = topic.key_of(self.swarm.local_peer_id());
            self.swarm.behaviour_mut().kad.stop_providing(&key);
        }
    }

    pub(super) fn find(&mut self, topic: Topic, sender: Sender<Peer>) {
        let now = Instant::now();
        self.lookups.parked.push((now + FIRST_NODE, topic, sender));
        self.begin_searches(now);
    }

    /// Whether a node that could be asked may be there in a moment, though none is now.
    fn expects_nodes(&mut self) -> bool {
        self.nodes() == 0 && self.is_meeting_peers()
    }

    /// Nodes in the routing table.
    fn nodes(&mut self) -> usize {
        self.swarm.behaviour_mut().kad.kbuckets().map(|bucket| bucket.num_entries()).sum()
    }

    fn begin_searches(&mut self, now: Instant) {
        if self.lookups.parked.is_empty() {
            return;
        }
        self.lookups.searches.retain(|_, search| !search.sender.is_closed());
        let waits = self.expects_nodes();
        while self.lookups.searches.len() < SEARCHES
            && let Some(due) = self.lookups.parked.iter().position(|(begin, ..)| !waits || now >= *begin)
        {
            let (_, topic, sender) = self.lookups.parked.remove(due);
            if sender.is_closed() {
                continue;
            }
            let id = self.lookups.next_search;
            self.lookups.next_search += 1;
            self.lookups.searches.insert(id, Search { sender, seen: HashSet::new(), left: SHARDS });
            for key in topic.keys() {
                let query = self.swarm.behaviour_mut().kad.get_providers(key);
                self.lookups.queries.insert(query, Purpose::Search(id));
            }
        }
    }

    /// Asks the network where a peer is.
    pub(super) fn locate(&mut self, peer: PeerId) {
        let query = self.swarm.behaviour_mut().kad.get_closest_peers(peer);
        self.lookups.queries.insert(query, Purpose::Locate(peer));
    }

    /// A node has come into the routing table.
    pub(super) fn on_new_node(&mut self) {
        if self.nodes() > FEW || self.lookups.settled.is_some() {
            return;
        }
        let now = Instant::now();
        let quiet = now.duration_since(self.lookups.last_settled) > 2 * SETTLE_LAST;
        self.lookups.settle = if quiet { SETTLE } else { (2 * self.lookups.settle).min(SETTLE_LAST) };
        self.lookups.settled = Some(now + self.lookups.settle);
    }

    pub(super) fn look_up_on_time(&mut self, now: Instant) {
        let due = !self.lookups.topics.is_empty() && now >= self.lookups.next_republish;
        if due {
            self.lookups.next_republish = now + self.lookups.republish;
        }
        let settled = self.lookups.settled.is_some_and(|settled| now >= settled);
        if settled {
            self.lookups.settled = None;
            self.lookups.last_settled = now;
        }
        if due || settled {
            for topic in self.lookups.topics.clone() {
                self.say(topic, None);
            }
        }
        if settled || now >= self.lookups.next_walk {
            self.lookups.next_walk = now + WALK;
            self.walk();
        }
        self.begin_searches(now);
    }

    /// Looks for the nodes around this one, and for some further away. With nobody to ask it calls off the walk that libp2p has planned,
    /// which would warn of it.
    pub(super) fn walk(&mut self) {
        if let Err(error) = self.swarm.behaviour_mut().kad.bootstrap() {
            debug!(%error, "There is nobody to ask for other nodes.");
        }
    }

    /// A query has brought something, or is over.
    pub(super) fn on_answer(&mut self, id: QueryId, result: QueryResult, last: bool) {
        match result {
            QueryResult::GetProviders(Ok(GetProvidersOk::FoundProviders { key, providers })) => {
                let Some(Purpose::Search(search)) = self.lookups.queries.get(&id) else { return };
                let search = *search;
                for peer in providers {
                    self.on_found(search, &key, peer);
                }
            }
            QueryResult::GetClosestPeers(result) => {
                let found = match result {
                    Ok(found) => found.peers,
                    Err(GetClosestPeersError::Timeout { peers, .. }) => peers,
                };
                if let Some(Purpose::Locate(peer)) = self.lookups.queries.get(&id) {
                    let peer = *peer;
                    let addresses = found.into_iter().find(|found| found.peer_id == peer).map(|found| found.addrs);
                    let addresses = dialable(addresses.unwrap_or_default());
                    self.book.note(peer, addresses.iter().cloned());
                    self.on_located(peer, addresses);
                }
            }
            _ => {}
        }
        if last {
            self.on_query_over(id);
        }
    }

    fn on_query_over(&mut self, id: QueryId) {
        match self.lookups.queries.remove(&id) {
            Some(Purpose::Advertise(Some(reply))) => drop(reply.send(Ok(()))),
            Some(Purpose::Search(id)) => {
                if let Some(search) = self.lookups.searches.get_mut(&id) {
                    search.left -= 1;
                    if search.left == 0 {
                        debug!(found = search.seen.len(), "A search is over.");
                        self.lookups.searches.remove(&id);
                    }
                }
            }
            _ => {}
        }
    }

    fn on_found(&mut self, search: u64, key: &libp2p::kad::RecordKey, peer: PeerId) {
        if peer == *self.swarm.local_peer_id() {
            return;
        }
        // Where it is was part of the answer, and libp2p tells it as long as the query runs, which it does now.
        let kad = &mut self.swarm.behaviour_mut().kad;
        let told = kad.handle_pending_outbound_connection(ConnectionId::new_unchecked(0), Some(peer), &[], Endpoint::Dialer);
        let mut addresses = told.unwrap_or_default();
        addresses.extend(kad.store_mut().addresses(key, &peer));
        self.book.note(peer, dialable(addresses));
        let Some(found) = self.lookups.searches.get_mut(&search) else { return };
        if found.seen.len() >= FOUND || !found.seen.insert(peer) {
            return;
        }
        let peer = self.describe(&peer);
        // There is room for all that one search may find; a reader that has gone ends the search.
        if let Some(found) = self.lookups.searches.get(&search)
            && found.sender.try_send(peer).is_err()
        {
            self.lookups.searches.remove(&search);
        }
    }
}

/// Of addresses that others tell of a peer, those that can be dialled at all.
fn dialable(addresses: Vec<Multiaddr>) -> Vec<Multiaddr> {
    addresses
        .into_iter()
        .filter(|address| is_readable(address) && reach(address).is_some())
        .map(without_peer)
        .take(PER_PEER)
        .collect()
}
