//! Who offers a model: found in the network, asked one by one, ranked, and kept as routes for the scheduler.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{PluginError, Result};
use fabstir_plugin_api::stream::Stream;
use fabstir_plugin_api::transport::{Destination, Peer, PeerId, Topic, Transport};
use futures::{StreamExt, stream};
use parking_lot::{Mutex, RwLock};
use serde::Serialize;
use tokio::sync::watch;

use super::link::Link;
use super::remote::{Remote, is_free};
use super::till::Till;
use crate::clock::now_ms;
use crate::market::Buyer;
use crate::network::capability::{self, Offer, Record, Sealed};
use crate::network::topics;
use crate::routes::{InFlight, InferenceRoute, PEER, Routes, ServedModel, Starting};

/// Nodes that are asked at the same time what they offer.
const QUESTIONS: usize = 32;
/// How long a node may take to say it.
const ANSWER: Duration = Duration::from_secs(4);
/// How long the network may take to say who offers something.
const SEARCH: Duration = Duration::from_secs(5);
/// How often it is looked again: soon while nobody has been found, then after pauses that double, as the first look meets few; in the end
/// within the life of what a node says.
const SOON: Duration = Duration::from_millis(200);
const LATER: Duration = Duration::from_secs(15);
/// How long nothing is heard of a node before it is no route any more.
const GONE: Duration = Duration::from_secs(30);
/// Slots that one node is believed to have.
const MOST_SLOTS: u32 = 1024;

/// What is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// A model by its digest, which names its very file.
    Digest(String),
    /// A model by its name, which any node may give to any file.
    Name(String),
}

impl Wanted {
    /// 64 hexadecimal digits are a digest; everything else is a name.
    pub fn parse(text: &str) -> Self {
        match text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            true => Wanted::Digest(text.to_ascii_lowercase()),
            false => Wanted::Name(text.to_owned()),
        }
    }

    fn topic(&self) -> Topic {
        match self {
            Wanted::Digest(digest) => topics::of_model(digest),
            Wanted::Name(name) => topics::of_name(name),
        }
    }

    pub fn is(&self, offer: &Offer) -> bool {
        match self {
            Wanted::Digest(digest) => offer.digest.as_ref() == Some(digest),
            Wanted::Name(name) => offer.name == *name,
        }
    }
}

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Wanted::Digest(text) | Wanted::Name(text) => f.write_str(text),
        }
    }
}

/// A node that offers something, and said so itself.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    pub peer: PeerId,
    pub addresses: Vec<String>,
    pub agent: String,
    /// From the question to the answer, in milliseconds.
    pub latency_ms: f64,
    pub models: Vec<Offer>,
}

impl Found {
    /// The cheapest first, then those with a free slot, then the nearest.
    fn rank(&self, wanted: &Wanted) -> (u128, u128, bool, u64) {
        let offer = self.models.iter().find(|offer| wanted.is(offer));
        let price = |price: fn(&Offer) -> u128| offer.map_or(u128::MAX, price);
        (
            price(|offer| offer.price_output_wei_per_mtok),
            price(|offer| offer.price_input_wei_per_mtok),
            offer.is_none_or(|offer| offer.free == 0),
            self.latency_ms as u64,
        )
    }
}

/// The nodes that can be asked for one model.
pub struct Market {
    transport: Arc<dyn Transport>,
    wanted: Wanted,
    /// Who pays, and what this side is called in the network; without it, nodes that ask for money are asked nothing.
    payer: Option<(Arc<Buyer>, PeerId)>,
    generations: AtomicU64,
    known: Mutex<HashMap<PeerId, Known>>,
    routes: watch::Sender<Arc<Routes>>,
}

struct Known {
    remote: Arc<Remote>,
    generation: u64,
    in_flight: Arc<InFlight>,
    found: Found,
    heard: Instant,
}

impl Market {
    pub fn new(transport: Arc<dyn Transport>, wanted: Wanted, payer: Option<(Arc<Buyer>, PeerId)>) -> Self {
        let doing = format!("looking for nodes that offer {wanted}");
        let starting = vec![Starting { plugin: "network".into(), doing, percent: None }];
        let routes = watch::Sender::new(Arc::new(Routes { starting, ..Routes::default() }));
        Self { transport, wanted, payer, generations: AtomicU64::new(0), known: Mutex::default(), routes }
    }

    /// What the scheduler reads.
    pub fn routes(&self) -> watch::Receiver<Arc<Routes>> {
        self.routes.subscribe()
    }

    /// Looks again and again. To be dropped with what it serves.
    pub async fn run(&self) -> ! {
        let mut pause = SOON;
        loop {
            let found = find(&self.transport, &self.wanted).await;
            self.update(found);
            pause = if self.known.lock().is_empty() { SOON } else { (2 * pause).min(LATER) };
            tokio::time::sleep(pause).await;
        }
    }

    /// Gives back every session that is paid for. To be called once nothing more is asked, and looking has ended.
    pub async fn close(&self) {
        let tills: Vec<Arc<Till>> = self.known.lock().values().filter_map(|known| known.remote.till.clone()).collect();
        futures::future::join_all(tills.iter().map(|till| till.close())).await;
    }

    fn update(&self, found: Vec<Found>) {
        let (now, found) = (Instant::now(), one_model(&self.wanted, found));
        let mut known = self.known.lock();
        for (found, offer) in found {
            let known = known.entry(found.peer.clone()).or_insert_with(|| {
                let destination =
                    Destination { peer: found.peer.clone(), addresses: found.addresses.clone(), protocol: String::new() };
                tracing::info!(peer = %found.peer, agent = %found.agent, latency_ms = found.latency_ms, "Found a node.");
                if self.payer.is_none() && !is_free(&offer) {
                    let (input, output) = (offer.price_input_wei_per_mtok, offer.price_output_wei_per_mtok);
                    tracing::info!(peer = %found.peer, input, output, "It asks for money (wei/Mtok): without --max-spend it is not asked.");
                }
                let link = Arc::new(Link::new(self.transport.clone(), destination));
                let payer = self.payer.clone();
                let till = payer.map(|(buyer, own)| Till::new(buyer, link.clone(), found.peer.clone(), own));
                Known {
                    remote: Arc::new(Remote { link, till, name: self.wanted.to_string(), offer: RwLock::new(offer.clone()) }),
                    generation: self.generations.fetch_add(1, Ordering::Relaxed) + 1,
                    in_flight: InFlight::new(None),
                    found: found.clone(),
                    heard: now,
                }
            });
            known.heard = now;
            known.remote.link.update(found.addresses.clone());
            *known.remote.offer.write() = offer;
            known.found = found;
        }
        known.retain(|peer, known| {
            let stays = now - known.heard < GONE;
            if !stays {
                tracing::info!(%peer, "A node has gone.");
                known.in_flight.drain();
            }
            stays
        });
        let mut ranked: Vec<&Known> = known.values().collect();
        let is_free = |known: &&Known| is_free(&known.remote.offer.read());
        // Where nobody is free, the best of the others says what it costs.
        if self.payer.is_none() && ranked.iter().any(is_free) {
            ranked.retain(is_free);
        }
        ranked.sort_by_key(|known| known.found.rank(&self.wanted));
        let inference: Vec<Arc<InferenceRoute>> = ranked.into_iter().map(|known| Arc::new(self.route(known))).collect();
        let starting = if inference.is_empty() { self.routes.borrow().starting.clone() } else { Vec::new() };
        self.routes.send_replace(Arc::new(Routes { inference, starting, ..Routes::default() }));
    }

    fn route(&self, known: &Known) -> InferenceRoute {
        let Offer { context, slots, digest, .. } = known.remote.offer.read().clone();
        let parallel = slots.clamp(1, MOST_SLOTS);
        let served = ServedModel { id: self.wanted.to_string(), context, parallel, digest, generates: true };
        InferenceRoute {
            plugin: format!("{PEER}{}", known.found.peer),
            generation: known.generation,
            setup: String::new(),
            models: vec![served],
            inference: known.remote.clone(),
            in_flight: known.in_flight.clone(),
        }
    }
}

/// The nodes that offer what is wanted, each with its offer. Of nodes that give one name to different models, those with the model that
/// most of them mean.
pub fn one_model(wanted: &Wanted, found: Vec<Found>) -> Vec<(Found, Offer)> {
    let offer = |found: Found| found.models.iter().find(|offer| wanted.is(offer)).cloned().map(|offer| (found, offer));
    let found: Vec<(Found, Offer)> = found.into_iter().filter_map(offer).collect();
    let mut votes: HashMap<Option<String>, usize> = HashMap::new();
    for (_, offer) in &found {
        *votes.entry(offer.digest.clone()).or_default() += 1;
    }
    // Equal votes are decided by the digest, so that the choice is the same every time.
    let Some(meant) = votes.iter().max_by_key(|(digest, votes)| (**votes, (*digest).clone())).map(|(digest, _)| digest.clone())
    else {
        return Vec::new();
    };
    if votes.len() > 1 {
        let (others, meant) = (votes.len() - 1, meant.as_deref().unwrap_or("one without a digest"));
        tracing::warn!(%wanted, meant, others, "Nodes give this name to different models; name the digest to choose.");
    }
    found.into_iter().filter(|(_, offer)| offer.digest == meant).collect()
}

/// Everybody who offers something, as far as the network tells within its time; each has said so itself.
pub async fn find(transport: &Arc<dyn Transport>, wanted: &Wanted) -> Vec<Found> {
    let cx = Cx::new().with_timeout(SEARCH);
    let peers = match transport.find(&cx, wanted.topic()).await {
        Ok(peers) => peers,
        Err(error) => {
            tracing::debug!(code = %error.code, %error, "The network cannot be searched.");
            return Vec::new();
        }
    };
    // A search that is cut short has found what it has found.
    let peers = stream::unfold(peers, |mut peers| async { peers.next().await.and_then(Result::ok).map(|peer| (peer, peers)) });
    let mut found = ask_all(transport, peers).await;
    found.retain(|found| found.models.iter().any(|offer| wanted.is(offer)));
    found.sort_by_key(|found| found.rank(wanted));
    found
}

/// What each of these nodes says that it offers; those that do not answer, or not truly, are left out.
pub async fn ask_all(transport: &Arc<dyn Transport>, peers: impl futures::Stream<Item = Peer>) -> Vec<Found> {
    let answers = peers.map(|peer| async {
        let id = peer.id.clone();
        match ask(transport, peer).await {
            Ok(found) => Some(found),
            Err(error) => {
                tracing::debug!(peer = %id, code = %error.code, %error, "A node did not say what it offers.");
                None
            }
        }
    });
    answers.buffer_unordered(QUESTIONS).filter_map(std::future::ready).collect().await
}

async fn ask(transport: &Arc<dyn Transport>, peer: Peer) -> Result<Found> {
    let cx = Cx::new().with_timeout(ANSWER);
    let nonce = *uuid::Uuid::new_v4().as_bytes();
    let (outgoing, stream) = Stream::channel(1);
    outgoing.send(Blob::from(&nonce[..])).await?;
    let destination =
        Destination { peer: peer.id.clone(), addresses: peer.addresses.clone(), protocol: capability::PROTOCOL.into() };
    // Nothing follows the question.
    drop(outgoing);
    let mut incoming = transport.open(&cx, destination, stream).await?;
    // Counted from here: a connection that had to be made first says nothing of the next request.
    let began = Instant::now();
    let answer = incoming.next().await;
    let latency_ms = began.elapsed().as_secs_f64() * 1e3;
    let answer = answer.ok_or_else(|| PluginError::unavailable("the node did not answer"))??;
    let record = check(transport, &cx, &peer.id, &nonce, &answer).await?;
    let Record { agent, models, .. } = record;
    Ok(Found { peer: peer.id, addresses: peer.addresses, agent, latency_ms, models })
}

/// Opens a record only if it is this peer's own answer to this question.
async fn check(transport: &Arc<dyn Transport>, cx: &Cx, peer: &PeerId, nonce: &[u8; 16], answer: &[u8]) -> Result<Record> {
    let sealed = Sealed::read(answer).map_err(untrue)?;
    let signer = transport.peer_id(cx, sealed.key().to_vec()).await?;
    sealed.open(&signer, peer, nonce, now_ms()).map_err(untrue)
}

fn untrue(error: capability::CapabilityError) -> PluginError {
    PluginError::new(fabstir_plugin_api::error::Code::Corrupt, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(name: &str, digest: Option<&str>, price: u128, free: u32) -> Offer {
        Offer {
            name: name.into(),
            digest: digest.map(str::to_owned),
            context: 4096,
            slots: 4,
            free,
            price_input_wei_per_mtok: 0,
            price_output_wei_per_mtok: price,
        }
    }

    fn found(peer: &str, latency_ms: f64, offer: Offer) -> Found {
        Found { peer: PeerId(peer.into()), addresses: vec![], agent: String::new(), latency_ms, models: vec![offer] }
    }

    #[test]
    fn the_price_comes_before_a_free_slot_and_that_before_nearness() {
        let wanted = Wanted::parse("m");
        let mut nodes = [
            found("dear", 1.0, offer("m", None, 9, 4)),
            found("full", 1.0, offer("m", None, 1, 0)),
            found("far", 80.0, offer("m", None, 1, 1)),
            found("near", 2.0, offer("m", None, 1, 1)),
        ];
        nodes.sort_by_key(|node| node.rank(&wanted));
        assert_eq!(nodes.map(|node| node.peer.0), ["near", "far", "full", "dear"]);
    }

    #[test]
    fn a_name_means_the_model_that_most_nodes_give_it_to() {
        let wanted = Wanted::parse("m");
        let (good, bad) = ("a".repeat(64), "b".repeat(64));
        let nodes = vec![
            found("one", 1.0, offer("m", Some(&good), 0, 1)),
            found("liar", 1.0, offer("m", Some(&bad), 0, 1)),
            found("two", 1.0, offer("m", Some(&good), 0, 1)),
        ];
        let left: Vec<String> = one_model(&wanted, nodes.clone()).into_iter().map(|(node, _)| node.peer.0).collect();
        assert_eq!(left, ["one", "two"]);
        let left: Vec<String> = one_model(&Wanted::parse(&bad), nodes).into_iter().map(|(node, _)| node.peer.0).collect();
        assert_eq!(left, ["liar"]);
        assert!(one_model(&wanted, vec![]).is_empty());
    }
}
