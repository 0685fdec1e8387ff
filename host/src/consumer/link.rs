//! The end of a session that asks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::inference::{Chunk, Generation};
use fabstir_plugin_api::stream::{Sender, Stream};
use fabstir_plugin_api::transport::{Destination, Transport};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::network::session::PROTOCOL;
use crate::network::session::wire::{self, Ask, From, LINGER, Tell, Token, VERSION};

/// Pieces of one answer that may be under way.
const WINDOW: u32 = 64;
/// How long a node may take to say that a session has begun, or goes on.
const BEGIN: Duration = Duration::from_secs(10);
/// The pauses between attempts to go on with a session; the last one is repeated until the node's time is over.
const PAUSES: [Duration; 4] = [Duration::ZERO, Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(3)];
/// A session without a request is ended after this time.
const IDLE: Duration = Duration::from_secs(60);

/// A node that can be asked. The session with it begins with the first request, and is kept over drops of its connection.
pub(super) struct Link {
    shared: Arc<Shared>,
    /// Ends with the link.
    task: Mutex<Option<AbortOnDropHandle<()>>>,
}

struct Shared {
    transport: Arc<dyn Transport>,
    peer: Mutex<Destination>,
    ids: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Where messages for the node go, while there is a session.
    asks: Option<mpsc::UnboundedSender<Ask>>,
    /// Whether the session's conversation broke, and it is not known yet whether it goes on.
    broken: bool,
    waiting: BTreeMap<u64, Waiting>,
}

/// A request whose answer is not whole yet.
struct Waiting {
    pieces: Sender<Chunk>,
    /// The next piece that is to come.
    next: u64,
    /// How many have been read.
    read: Arc<AtomicU64>,
}

impl Link {
    pub fn new(transport: Arc<dyn Transport>, destination: Destination) -> Self {
        let destination = Destination { protocol: PROTOCOL.into(), ..destination };
        let state = Mutex::default();
        let shared = Shared { transport, peer: Mutex::new(destination), ids: AtomicU64::new(1), state };
        Self { shared: Arc::new(shared), task: Mutex::default() }
    }

    /// The addresses under which the node was last heard of.
    pub fn update(&self, addresses: Vec<String>) {
        self.shared.peer.lock().addresses = addresses;
    }

    /// Asks for an answer; what goes wrong comes on the stream.
    pub fn ask(&self, request: Generation, timeout: Duration) -> Result<Stream<Chunk>> {
        let id = self.shared.ids.fetch_add(1, Ordering::Relaxed);
        // Told before anything is sent, and in the words that the client will read.
        let timeout_ms = timeout.as_millis() as u64;
        let ask = Ask::Infer { id, request: Box::new(request), window: WINDOW, timeout_ms, paid_by: None };
        wire::encode(&ask)?;
        // Room for a whole window, so that the task that reads the connection never waits for one of its readers.
        let (pieces, answer) = Stream::channel(WINDOW as usize + 2);
        let mut state = self.shared.state.lock();
        if state.broken {
            return Err(PluginError::unavailable("the connection to the node broke"));
        }
        let read = Arc::<AtomicU64>::default();
        state.waiting.insert(id, Waiting { pieces, next: 0, read: read.clone() });
        let sent = match &state.asks {
            Some(asks) => asks.send(ask).map_err(|mpsc::error::SendError(ask)| ask),
            None => Err(ask),
        };
        if let Err(ask) = sent {
            let (asks, outbox) = mpsc::unbounded_channel();
            // The receiver is here.
            let _ = asks.send(ask);
            state.asks = Some(asks);
            let task = tokio::spawn(drive(Arc::downgrade(&self.shared), outbox));
            *self.task.lock() = Some(AbortOnDropHandle::new(task));
        }
        drop(state);
        Ok(Reading { answer, id, read, told: 0, over: false, shared: self.shared.clone() }.into_stream())
    }
}

/// An answer being read. Dropping it tells the node that it is not wanted any more.
struct Reading {
    answer: Stream<Chunk>,
    id: u64,
    read: Arc<AtomicU64>,
    /// How much of that the node knows.
    told: u64,
    /// The last piece has been read.
    over: bool,
    shared: Arc<Shared>,
}

impl Reading {
    fn into_stream(self) -> Stream<Chunk> {
        Stream::new(futures::stream::unfold(self, |mut reading| async move {
            let item = reading.answer.next().await?;
            let read = reading.read.fetch_add(1, Ordering::Relaxed) + 1;
            reading.over = matches!(item, Ok(Chunk::Done(_)));
            if reading.over || read - reading.told >= u64::from(WINDOW) / 2 {
                reading.told = read;
                reading.shared.tell(Ask::Read { id: reading.id, next: read });
            }
            Some((item, reading))
        }))
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.shared.state.lock().waiting.remove(&self.id);
        // Also where the last piece has come and was not read: the node keeps it until it knows.
        if !self.over {
            self.shared.tell(Ask::Cancel { id: self.id });
        }
    }
}

impl Shared {
    fn tell(&self, ask: Ask) {
        if let Some(asks) = &self.state.lock().asks {
            // A session that has ended has forgotten the request already.
            let _ = asks.send(ask);
        }
    }

    /// Ends the session for everybody who waits.
    fn fail(&self, error: &PluginError) {
        let waiting = {
            let mut state = self.state.lock();
            state.asks = None;
            state.broken = false;
            std::mem::take(&mut state.waiting)
        };
        for waiting in waiting.into_values() {
            waiting.pieces.try_fail(error.clone());
        }
    }

    /// Ends the requests that have produced nothing yet: another node can have them at once.
    fn give_back(&self, error: &PluginError) {
        let mut state = self.state.lock();
        state.broken = true;
        let silent: Vec<u64> = state.waiting.iter().filter(|(_, waiting)| waiting.next == 0).map(|(id, _)| *id).collect();
        for waiting in silent.into_iter().filter_map(|id| state.waiting.remove(&id)) {
            waiting.pieces.try_fail(error.clone());
        }
    }

    /// Takes a message about a request.
    fn take(&self, tell: Tell) -> Result<()> {
        let (id, seq, piece) = match tell {
            Tell::Chunk { id, seq, chunk: Chunk::Text(mut text) } => {
                // A number of the node's own choice: a piece has no more tokens than bytes.
                text.tokens = text.tokens.min(text.text.len().max(text.logprobs.len()).max(1) as u32);
                (id, seq, Ok(Chunk::Text(text)))
            }
            Tell::Chunk { id, seq, chunk } => (id, seq, Ok(chunk)),
            Tell::Failed { id, seq, refusal } => (id, seq, Err(refusal)),
            Tell::Refused(refusal) => return Err(refusal),
            _ => return Ok(()),
        };
        let mut state = self.state.lock();
        // One that was given up in this moment, or a piece that came before the drop.
        let Some(waiting) = state.waiting.get_mut(&id).filter(|waiting| waiting.next <= seq) else { return Ok(()) };
        if waiting.next < seq {
            return Err(PluginError::new(Code::Protocol, "the node left a piece of an answer out"));
        }
        waiting.next += 1;
        let over = !matches!(piece, Ok(Chunk::Text(_)));
        let taken = match piece {
            Ok(chunk) => matches!(waiting.pieces.try_send(chunk), Ok(None) | Err(_)),
            Err(error) => {
                waiting.pieces.try_fail(error);
                true
            }
        };
        if over {
            state.waiting.remove(&id);
        }
        if taken { Ok(()) } else { Err(PluginError::new(Code::Protocol, "the node sent more than it was allowed to")) }
    }
}

/// A conversation that carries a session.
struct Conversation {
    outgoing: Sender<Blob>,
    incoming: Stream<Blob>,
}

impl Conversation {
    async fn open(transport: &dyn Transport, destination: Destination, first: &Ask) -> Result<(Self, Tell)> {
        let begin = async {
            let (outgoing, stream) = Stream::channel(64);
            outgoing.send(wire::encode(first)?).await?;
            let mut incoming = transport.open(&Cx::new(), destination, stream).await?;
            match incoming.next().await {
                Some(message) => Ok((Self { outgoing, incoming }, wire::decode(&message?)?)),
                None => Err(PluginError::unavailable("the node ended the conversation at once")),
            }
        };
        match tokio::time::timeout(BEGIN, begin).await {
            Ok(begun) => begun,
            Err(_) => Err(PluginError::unavailable("the node did not answer within 10 s")),
        }
    }
}

/// Why a conversation is over.
enum Over {
    /// There is nothing to ask any more.
    Idle,
    Broken(PluginError),
}

/// Keeps a session for as long as there is something to ask.
async fn drive(weak: Weak<Shared>, mut outbox: mpsc::UnboundedReceiver<Ask>) {
    let Some(shared) = weak.upgrade() else { return };
    let (transport, destination) = (shared.transport.clone(), shared.peer.lock().clone());
    let begun = Conversation::open(&*transport, destination, &Ask::Hello { version: VERSION }).await;
    let (mut conversation, session, linger) = match begun {
        Ok((conversation, Tell::Welcome { session, linger_ms, .. })) => {
            (conversation, session, Duration::from_millis(linger_ms).min(LINGER))
        }
        Ok((_, Tell::Refused(refusal))) => return shared.fail(&refusal),
        Ok(_) => return shared.fail(&PluginError::new(Code::Protocol, "the node began with another word than welcome")),
        Err(error) => return shared.fail(&unreachable(error)),
    };
    drop(shared);
    loop {
        let over = talk(&weak, &mut conversation, &mut outbox).await;
        let Some(shared) = weak.upgrade() else { return };
        match over {
            Over::Idle => return shared.fail(&PluginError::unavailable("the session was idle")),
            // A node that breaks the protocol would break it again.
            Over::Broken(error) if error.code != Code::Unavailable => return shared.fail(&error),
            Over::Broken(error) => {
                shared.give_back(&error);
                match resume(&shared, &transport, &session, linger, &error).await {
                    Ok(resumed) => conversation = resumed,
                    Err(error) => return shared.fail(&unreachable(error)),
                }
            }
        }
    }
}

fn unreachable(error: PluginError) -> PluginError {
    match error.code {
        Code::Overloaded | Code::Unavailable => error,
        _ => PluginError::unavailable(format!("the node cannot be asked: {error}")),
    }
}

/// Carries messages both ways until the conversation is over.
async fn talk(weak: &Weak<Shared>, conversation: &mut Conversation, outbox: &mut mpsc::UnboundedReceiver<Ask>) -> Over {
    let mut quiet = Instant::now();
    loop {
        tokio::select! {
            message = conversation.incoming.next() => {
                let Some(shared) = weak.upgrade() else { return Over::Idle };
                let taken = match message {
                    Some(Ok(message)) => wire::decode(&message).and_then(|tell| shared.take(tell)),
                    Some(Err(error)) => Err(PluginError { code: Code::Unavailable, ..error }),
                    None => Err(PluginError::unavailable("the node left without a word")),
                };
                if let Err(error) = taken {
                    return Over::Broken(error);
                }
                quiet = Instant::now();
            }
            ask = outbox.recv() => {
                // The last sender goes with the link.
                let Some(ask) = ask else { return Over::Idle };
                // Given up, or given back, before it was sent.
                if let Ask::Infer { id, .. } = &ask
                    && !weak.upgrade().is_some_and(|shared| shared.state.lock().waiting.contains_key(id))
                {
                    continue;
                }
                let message = match wire::encode(&ask) {
                    Ok(message) => message,
                    Err(error) => return Over::Broken(error),
                };
                if conversation.outgoing.send(message).await.is_err() {
                    return Over::Broken(PluginError::unavailable("the connection to the node broke"));
                }
                quiet = Instant::now();
            }
            () = tokio::time::sleep_until(quiet + IDLE) => {
                let Some(shared) = weak.upgrade() else { return Over::Idle };
                if shared.state.lock().waiting.is_empty() {
                    // A node that is gone needs no farewell.
                    if let Ok(bye) = wire::encode(&Ask::Bye) {
                        let _ = conversation.outgoing.send(bye).await;
                    }
                    return Over::Idle;
                }
                quiet = Instant::now();
            }
        }
    }
}

/// Goes on with a session on another conversation, as long as the node keeps it.
async fn resume(
    shared: &Shared,
    transport: &Arc<dyn Transport>,
    session: &Token,
    linger: Duration,
    broke: &PluginError,
) -> Result<Conversation> {
    let until = Instant::now() + linger;
    tracing::debug!(session = ?session, error = %broke, "The connection to a node broke; going on with its session.");
    for pause in PAUSES.into_iter().chain(std::iter::repeat(PAUSES[PAUSES.len() - 1])) {
        if Instant::now() + pause >= until {
            break;
        }
        tokio::time::sleep(pause).await;
        let from =
            |(id, waiting): (&u64, &Waiting)| From { id: *id, next: waiting.next, read: waiting.read.load(Ordering::Relaxed) };
        // Those that have produced nothing were given back, or have been asked since and go out when the conversation stands.
        let begun = |(_, waiting): &(&u64, &Waiting)| waiting.next > 0;
        let requests: Vec<From> = shared.state.lock().waiting.iter().filter(begun).map(from).collect();
        if requests.is_empty() {
            break;
        }
        let destination = shared.peer.lock().clone();
        let named: Vec<u64> = requests.iter().map(|from| from.id).collect();
        let first = Ask::Resume { session: session.clone(), requests };
        match Conversation::open(&**transport, destination, &first).await {
            Ok((conversation, Tell::Resumed { requests })) => {
                let lost: Vec<Waiting> = {
                    let mut state = shared.state.lock();
                    state.broken = false;
                    named.iter().filter(|id| !requests.contains(id)).filter_map(|id| state.waiting.remove(id)).collect()
                };
                for waiting in lost {
                    waiting.pieces.try_fail(PluginError::unavailable("the node has lost this request"));
                }
                return Ok(conversation);
            }
            // It has forgotten the session, as after a restart.
            Ok((_, Tell::Refused(refusal))) => return Err(refusal),
            Ok(_) => return Err(PluginError::new(Code::Protocol, "the node went on with another word than resumed")),
            Err(error) => tracing::debug!(session = ?session, %error, "The node is not back yet."),
        }
    }
    Err(PluginError::unavailable(format!("the connection to the node broke: {broke}")))
}
