//! Other nodes: what they have, and what they send.
//!
//! A node is trusted with nothing but the order in which it answers. All are asked at once, so that one that does not answer costs no time
//! where another one has the blob; what comes is on the disk, whole and hashed, before its first byte is given away.

mod door;
mod pointing;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use blob_folder::{BlobError, Id, Store, Taking, Whole};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use iroh::{EndpointId, SecretKey};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use crate::config::Settings;
use crate::error::NodeError;
use crate::node::Online;

use door::Offer;

/// Connections to one peer at once, for blobs. One that is slow or gone holds up nobody but itself.
const CONNECTIONS: usize = 32;

/// What a peer sends in a second at least, after the first minute.
const PACE: u64 = 256 << 10;

/// The time that it may be slower.
const START: Duration = Duration::from_secs(60);

/// Other nodes.
#[derive(Debug)]
pub struct Peers {
    list: Vec<Peer>,
    secret: SecretKey,
    timeout: Duration,
    online: Online,
}

#[derive(Debug)]
struct Peer {
    id: EndpointId,
    address: SocketAddr,
    places: Arc<Semaphore>,
    /// What it did wrong the last time, unless it has answered since.
    last: Mutex<Option<String>>,
}

impl Peer {
    /// Tells the log what a peer does wrong, once as long as it stays the same: a node asks again and again.
    fn failed(&self, why: &Fault) {
        let why = why.to_string();
        let mut last = self.last.lock();
        if last.as_ref() != Some(&why) {
            warn!(peer = %self, why, "A peer fails.");
            *last = Some(why);
        }
    }

    fn answered(&self) {
        *self.last.lock() = None;
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.id.fmt_short(), self.address)
    }
}

/// What a peer, or this machine, did wrong.
#[derive(Debug, thiserror::Error)]
enum Fault {
    /// Another time it may answer.
    #[error("{0}")]
    Unreachable(String),
    /// It has no place for this node at the moment.
    #[error("it is busy")]
    Busy,
    /// It does not let this node in.
    #[error("it refuses this node: {0}")]
    Refused(String),
    #[error("{0}")]
    Wrong(String),
    #[error(transparent)]
    Own(#[from] NodeError),
}

impl Peers {
    pub fn new(settings: &Settings, secret: SecretKey, online: Online) -> Self {
        let peer =
            |&(id, address): &_| Peer { id, address, places: Arc::new(Semaphore::new(CONNECTIONS)), last: Mutex::default() };
        Self { list: settings.peers.iter().map(peer).collect(), secret, timeout: settings.timeout, online }
    }

    /// Fetches a blob into the store, which does not keep it yet.
    pub async fn fetch(&self, id: Id, store: &Arc<Store>) -> Result<Whole, NodeError> {
        let mut left: Vec<&Peer> = self.list.iter().collect();
        let mut faults = Vec::new();
        while let Some((peer, offer)) = self.first_offer(id, &mut left, &mut faults).await {
            match self.take(offer, id, store).await {
                Ok(whole) => {
                    peer.answered();
                    return Ok(whole);
                }
                Err(fault) => {
                    peer.failed(&fault);
                    faults.push((peer, fault));
                }
            }
        }
        if faults.is_empty() { Err(NodeError::NotFound(id)) } else { Err(failed("fetching the blob", Some(id), faults)) }
    }

    /// The first peer of those that are left that has a blob. Those that have not, and those that fail, are not left afterwards.
    async fn first_offer<'a>(
        &'a self,
        id: Id,
        left: &mut Vec<&'a Peer>,
        faults: &mut Vec<(&'a Peer, Fault)>,
    ) -> Option<(&'a Peer, Offer)> {
        let mut asked: FuturesUnordered<_> = left.iter().map(|&peer| async move { (peer, self.offer(peer, id).await) }).collect();
        while let Some((peer, answer)) = asked.next().await {
            left.retain(|other| other.id != peer.id);
            match answer {
                Ok(Some(offer)) => return Some((peer, offer)),
                Ok(None) => peer.answered(),
                Err(fault) => {
                    peer.failed(&fault);
                    faults.push((peer, fault));
                }
            }
        }
        None
    }

    /// The bytes of an offer.
    async fn take(&self, offer: Offer, id: Id, store: &Arc<Store>) -> Result<Whole, Fault> {
        let mut taking = Taking::<Bytes>::begin(store, Some(id), Some(offer.size)).await.map_err(NodeError::from)?;
        let mut pieces = offer.download(id, self.timeout).await?;
        let mut pace = Pace::begin(self.timeout);
        loop {
            let piece = match timeout_at(pace.due(), pieces.recv()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) => break,
                Ok(Err(error)) => return Err(offer.broken(&error)),
                Err(_) => return Err(Fault::Unreachable(pace.slow())),
            };
            pace.came(piece.len() as u64);
            taking = taking.write(piece).await.map_err(blame)?;
        }
        taking.finish().await.map_err(blame)
    }
}

/// How fast bytes come: each MiB in its time, and all of them at a pace.
struct Pace {
    limit: Duration,
    begun: Instant,
    came: u64,
    /// When the MiB that is coming began.
    since: Instant,
}

impl Pace {
    fn begin(limit: Duration) -> Self {
        let now = Instant::now();
        Self { limit, begun: now, came: 0, since: now }
    }

    fn came(&mut self, bytes: u64) {
        let before = self.came >> 20;
        self.came += bytes;
        if self.came >> 20 != before {
            self.since = Instant::now();
        }
    }

    /// When the next bytes must have come.
    fn due(&self) -> Instant {
        let all = self.begun + START.max(self.limit) + Duration::from_secs(self.came / PACE);
        all.min(self.since + self.limit)
    }

    fn slow(&self) -> String {
        match self.since + self.limit <= self.due() {
            true => format!("a MiB took longer than {:?}", self.limit),
            false => format!("it sends less than {} KiB in a second", PACE >> 10),
        }
    }
}

/// Tells what a peer sent wrongly from what went wrong here.
fn blame(error: BlobError) -> Fault {
    match error {
        BlobError::TooMany { .. } | BlobError::WrongId { .. } => Fault::Wrong(error.to_string()),
        // One that is stopped ends what it sends as if that were all.
        BlobError::TooFew { .. } => Fault::Unreachable(format!("it broke off: {error}")),
        own => Fault::Own(own.into()),
    }
}

/// One error for what all peers did.
fn failed(doing: &'static str, blob: Option<Id>, faults: Vec<(&Peer, Fault)>) -> NodeError {
    let why: Vec<String> = faults.iter().map(|(peer, fault)| format!("{peer}: {fault}")).collect();
    let why = why.join("; ");
    let (mut unreachable, mut wrong) = (false, false);
    for (_, fault) in faults {
        match fault {
            Fault::Own(error) => return error,
            Fault::Unreachable(_) | Fault::Busy => unreachable = true,
            Fault::Wrong(_) => wrong = true,
            Fault::Refused(_) => {}
        }
    }
    match (unreachable, wrong, blob) {
        (true, ..) => NodeError::Peers { doing, why },
        (_, true, Some(id)) => NodeError::Wrong { id, why },
        (_, true, None) => NodeError::WrongEntry { doing, why },
        _ => NodeError::Refused { doing, why },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn peer_must_keep_a_pace() {
        let start = Instant::now();
        let mut pace = Pace::begin(Duration::from_secs(10));
        assert_eq!(pace.due(), start + Duration::from_secs(10));
        pace.came(1 << 19);
        assert_eq!(pace.due(), start + Duration::from_secs(10), "half a MiB is none");
        let mut slowest = None;
        // A MiB in nine seconds is in time for each, and too slow for all.
        for _ in 0..100 {
            tokio::time::advance(Duration::from_secs(9)).await;
            if Instant::now() > pace.due() {
                slowest = Some((start.elapsed(), pace.slow()));
                break;
            }
            pace.came(1 << 20);
        }
        let (after, why) = slowest.expect("is given up");
        assert!(after >= START && after < 3 * START, "{after:?}");
        assert_eq!(why, "it sends less than 256 KiB in a second");
    }
}
