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

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use iroh::{EndpointId, SecretKey};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use crate::config::Settings;
use crate::error::NodeError;
use crate::node::Online;
use crate::store::{Id, Store, Taking, Whole};

use door::Offer;

/// Blobs that are fetched at once. Others wait.
const FETCHES: usize = 16;

/// Other nodes.
#[derive(Debug)]
pub struct Peers {
    list: Vec<Peer>,
    secret: SecretKey,
    timeout: Duration,
    online: Online,
    fetches: Semaphore,
}

#[derive(Debug)]
struct Peer {
    id: EndpointId,
    address: SocketAddr,
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
        let list = settings.peers.iter().map(|&(id, address)| Peer { id, address }).collect();
        Self { list, secret, timeout: settings.timeout, online, fetches: Semaphore::new(FETCHES) }
    }

    /// Fetches a blob into the store, which does not keep it yet.
    pub async fn fetch(&self, id: Id, store: &Arc<Store>) -> Result<Whole, NodeError> {
        if self.list.is_empty() {
            return Err(NodeError::NotFound(id));
        }
        let _turn = self.fetches.acquire().await.map_err(|_| NodeError::Ended)?;
        let mut asked: FuturesUnordered<_> =
            self.list.iter().map(|peer| async move { (peer, self.offer(peer, id).await) }).collect();
        let mut faults = Vec::new();
        while let Some((peer, answer)) = asked.next().await {
            let fetched = match answer {
                Ok(None) => continue,
                Ok(Some(offer)) => self.take(offer, id, store).await,
                Err(fault) => Err(fault),
            };
            match fetched {
                Ok(whole) => return Ok(whole),
                Err(fault) => {
                    warn!(%peer, blob = %id, why = %fault, "A peer failed at a blob.");
                    faults.push((peer, fault));
                }
            }
        }
        if faults.is_empty() { Err(NodeError::NotFound(id)) } else { Err(failed("fetching the blob", Some(id), faults)) }
    }

    /// The bytes of an offer.
    async fn take(&self, offer: Offer, id: Id, store: &Arc<Store>) -> Result<Whole, Fault> {
        let mut pieces = offer.download(id, self.timeout).await?;
        let mut taking = Taking::<Bytes>::begin(store, Some(id), Some(offer.size)).await?;
        let (mut deadline, mut since) = (Instant::now() + self.timeout, 0);
        loop {
            let piece = match timeout_at(deadline, pieces.recv()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) => break,
                Ok(Err(error)) => return Err(Fault::Unreachable(format!("it broke off: {error}"))),
                Err(_) => return Err(Fault::Unreachable(format!("a MiB took longer than {:?}", self.timeout))),
            };
            since += piece.len();
            taking = taking.write(piece).await.map_err(blame)?;
            if since >= 1 << 20 {
                (deadline, since) = (Instant::now() + self.timeout, 0);
            }
        }
        taking.finish().await.map_err(blame)
    }
}

/// Tells what a peer sent wrongly from what went wrong here.
fn blame(error: NodeError) -> Fault {
    match error {
        NodeError::TooMany { .. } | NodeError::TooFew { .. } | NodeError::WrongId { .. } => Fault::Wrong(error.to_string()),
        own => Fault::Own(own),
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
            Fault::Unreachable(_) => unreachable = true,
            Fault::Wrong(_) => wrong = true,
            Fault::Refused(_) => {}
        }
    }
    match (unreachable, wrong, blob) {
        (true, ..) => NodeError::Peers { doing, why },
        (_, true, Some(id)) => NodeError::Wrong { id, why },
        _ => NodeError::Refused { doing, why },
    }
}
