//! Conversations that peers want to begin: who listens for which protocol, and what waits to be accepted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use fabstir_plugin_api::prelude::{Arrival, Sender, Stream};
use libp2p::{PeerId, StreamProtocol};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::conversation::Line;
use crate::error::NetworkError;

/// How long a conversation waits to be accepted.
const WAIT: Duration = Duration::from_secs(10);

/// How long a peer may take to read the one byte that says whether it is accepted.
const TELL: Duration = Duration::from_secs(5);

/// Refusals under way at a time, for all peers. Past that, a stream is reset without a word.
const REFUSALS: usize = 1024;

/// The longest name of a protocol.
const NAME: usize = 128;

/// Protocols that others in this plugin speak.
const RESERVED: [&str; 3] = ["/fabstir/kad/", "/fabstir/id/", "/ipfs/"];

/// Listeners and what waits for them.
pub struct Arrivals {
    waiting_limit: usize,
    inner: Mutex<Inner>,
    refusals: Arc<Semaphore>,
}

#[derive(Default)]
struct Inner {
    listeners: HashMap<StreamProtocol, Listener>,
    waiting: HashMap<u64, Waiting>,
    next: u64,
}

struct Listener {
    sender: Sender<Arrival>,
    /// How many of `waiting` are of this protocol.
    waiting: usize,
}

struct Waiting {
    protocol: StreamProtocol,
    /// Where to ask for the line.
    ask: oneshot::Sender<oneshot::Sender<Line>>,
}

impl Arrivals {
    pub fn new(waiting_limit: usize) -> Arc<Self> {
        Arc::new(Self { waiting_limit, inner: Mutex::default(), refusals: Arc::new(Semaphore::new(REFUSALS)) })
    }

    /// Takes conversations of a protocol, until the stream is dropped.
    pub fn listen(&self, protocol: &str) -> Result<Stream<Arrival>, NetworkError> {
        let name = named(protocol)?;
        if RESERVED.iter().any(|reserved| protocol.starts_with(reserved)) {
            return Err(NetworkError::ReservedProtocol(protocol.to_owned()));
        }
        let mut inner = self.inner.lock();
        let known = inner.listeners.get(&name);
        if known.is_some_and(|listener| !listener.sender.is_closed()) {
            return Err(NetworkError::ListenedFor(protocol.to_owned()));
        }
        // What waits for a listener that has gone still counts.
        let waiting = known.map_or(0, |listener| listener.waiting);
        inner.listeners.retain(|_, listener| listener.waiting > 0 || !listener.sender.is_closed());
        let (sender, stream) = Stream::channel(self.waiting_limit);
        inner.listeners.insert(name, Listener { sender, waiting });
        Ok(stream)
    }

    /// The protocols that somebody listens for now.
    pub fn protocols(&self) -> Vec<StreamProtocol> {
        let inner = self.inner.lock();
        inner.listeners.iter().filter(|(_, listener)| !listener.sender.is_closed()).map(|(name, _)| name.clone()).collect()
    }

    /// Lets a stream wait that a peer has opened, or tells the peer that there is no room. `permit` is its place among the peer's
    /// streams; without one, it has too many.
    pub fn arrived(
        self: &Arc<Self>,
        peer: PeerId,
        protocol: StreamProtocol,
        stream: libp2p::Stream,
        permit: Option<OwnedSemaphorePermit>,
    ) {
        let Some(permit) = permit else { return self.refuse(stream) };
        let (ask, asked) = oneshot::channel();
        let mut inner = self.inner.lock();
        let id = inner.next;
        let Some(listener) = inner.listeners.get_mut(&protocol) else { return self.refuse(stream) };
        let arrival = Arrival { id, peer: fabstir_plugin_api::prelude::PeerId(peer.to_string()) };
        if listener.waiting >= self.waiting_limit || !matches!(listener.sender.try_send(arrival), Ok(None)) {
            return self.refuse(stream);
        }
        listener.waiting += 1;
        inner.next += 1;
        inner.waiting.insert(id, Waiting { protocol, ask });
        drop(inner);
        tokio::spawn(wait(self.clone(), id, Line::new(stream, permit), asked));
    }

    /// The line of a conversation that waits, told that it is accepted.
    pub async fn accept(&self, id: u64) -> Result<Line, NetworkError> {
        let waiting = self.remove(id).ok_or(NetworkError::NoArrival(id))?;
        let (give, given) = oneshot::channel();
        waiting.ask.send(give).map_err(|_| NetworkError::NoArrival(id))?;
        let mut line = given.await.map_err(|_| NetworkError::NoArrival(id))?;
        line.accept(TELL).await.map_err(|_| NetworkError::NoArrival(id))?;
        Ok(line)
    }

    fn remove(&self, id: u64) -> Option<Waiting> {
        let mut inner = self.inner.lock();
        let waiting = inner.waiting.remove(&id)?;
        if let Some(listener) = inner.listeners.get_mut(&waiting.protocol) {
            listener.waiting -= 1;
        }
        Some(waiting)
    }

    fn refuse(&self, stream: libp2p::Stream) {
        if let Ok(permit) = self.refusals.clone().try_acquire_owned() {
            tokio::spawn(Line::new(stream, permit).refuse(TELL));
        }
    }
}

/// Holds the line of a conversation until it is accepted, given up by its peer, or has waited too long.
async fn wait(arrivals: Arc<Arrivals>, id: u64, mut line: Line, asked: oneshot::Receiver<oneshot::Sender<Line>>) {
    tokio::select! {
        give = asked => {
            if let Ok(give) = give {
                // Who asked may have given up meanwhile: then the line is dropped, which tells the peer.
                let _ = give.send(line);
            }
        }
        () = line.given_up() => drop(arrivals.remove(id)),
        () = tokio::time::sleep(WAIT) => {
            // An `accept` that comes at this moment finds nobody to ask.
            drop(arrivals.remove(id));
            line.refuse(TELL).await;
        }
    }
}

/// The name of a protocol, as libp2p takes it.
pub fn named(protocol: &str) -> Result<StreamProtocol, NetworkError> {
    let wrong = || NetworkError::Protocol(protocol.chars().take(NAME).collect());
    if protocol.len() < 2 || protocol.len() > NAME || protocol.contains('\n') {
        return Err(wrong());
    }
    StreamProtocol::try_from_owned(protocol.to_owned()).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_has_one_listener_until_its_stream_is_dropped() {
        let arrivals = Arrivals::new(4);
        let first = arrivals.listen("/a/1").unwrap();
        assert!(matches!(arrivals.listen("/a/1"), Err(NetworkError::ListenedFor(_))));
        let _other = arrivals.listen("/b/1").unwrap();
        assert_eq!(arrivals.protocols().len(), 2);
        drop(first);
        assert_eq!(arrivals.protocols(), [StreamProtocol::new("/b/1")]);
        let _again = arrivals.listen("/a/1").unwrap();
    }

    #[test]
    fn names_begin_with_a_slash_and_are_not_our_own() {
        let arrivals = Arrivals::new(4);
        for bad in ["", "/", "a/1", "/a\n/1", &format!("/{}", "a".repeat(128))] {
            assert!(matches!(arrivals.listen(bad), Err(NetworkError::Protocol(_))), "{bad:?}");
        }
        for reserved in ["/fabstir/kad/1", "/ipfs/ping/1.0.0"] {
            assert!(matches!(arrivals.listen(reserved), Err(NetworkError::ReservedProtocol(_))));
        }
    }
}
