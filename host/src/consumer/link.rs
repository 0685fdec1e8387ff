//! The end of a session that asks.
//!
//! Where the node is paid, a request carries a [`Ticket`] of the funded session that pays for it: what arrives is counted there before
//! anybody reads it. Vouchers go out beside the requests.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::chain::SessionId;
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::inference::{Chunk, Generation};
use fabstir_plugin_api::stream::{Sender, Stream};
use fabstir_plugin_api::transport::{Destination, Transport};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::market::buyer::{Purchase, Ticket};
use crate::network::session::PROTOCOL;
use crate::network::session::wire::{self, Ask, From, LINGER, Tell, Token, VERSION};
use crate::scheduler::estimated_tokens;

/// Pieces of one answer that may be under way.
const WINDOW: u32 = 64;
/// How long a node may take to say that a session has begun, or goes on.
const BEGIN: Duration = Duration::from_secs(10);
/// The pauses between attempts to go on with a session; the last one is repeated until the node's time is over.
const PAUSES: [Duration; 4] = [Duration::ZERO, Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(3)];
/// A session without a request is ended after this time.
const IDLE: Duration = Duration::from_secs(60);
/// How long a node may take to answer a question about prices and deposits, for which it may have to ask its chain.
const QUESTION: Duration = Duration::from_secs(30);
/// Requests that were given up and may still have pieces under way.
const MOST_LEFT: usize = 64;

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

/// A message for the node; `infer` is the request that it asks for.
struct Outgoing {
    infer: Option<u64>,
    message: Blob,
}

#[derive(Default)]
struct State {
    /// Where messages for the node go, while there is a session.
    asks: Option<mpsc::UnboundedSender<Outgoing>>,
    /// Whether the session's conversation broke, and it is not known yet whether it goes on.
    broken: bool,
    waiting: BTreeMap<u64, Waiting>,
    /// Questions that are not answered yet.
    calls: BTreeMap<u64, oneshot::Sender<Result<Tell>>>,
    /// Paid requests that nobody waits for any more: what is under way of them still counts.
    left: BTreeMap<u64, Left>,
    purchases: HashMap<SessionId, Weak<Purchase>>,
}

/// A paid request that was given up.
struct Left {
    purchase: Arc<Purchase>,
    next: u64,
    /// Pieces from this one on were never allowed.
    end: u64,
}

/// A request whose answer is not whole yet.
struct Waiting {
    pieces: Sender<Chunk>,
    /// The next piece that is to come.
    next: u64,
    /// How many have been read.
    read: Arc<AtomicU64>,
    /// What pays for it.
    ticket: Option<Ticket>,
}

impl Waiting {
    /// Nothing more will come.
    fn end(self, id: u64, error: PluginError) {
        if let Some(ticket) = &self.ticket {
            ticket.purchase().end(id);
        }
        self.pieces.try_fail(error);
    }
}

impl State {
    /// Nobody waits for the answer to a request any more, but the node does not know yet.
    fn leave(&mut self, id: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&id)?;
        if let Some(ticket) = &waiting.ticket {
            ticket.purchase().give_up(id);
            let end = waiting.read.load(Ordering::Relaxed) + u64::from(WINDOW) + 2;
            self.left.insert(id, Left { purchase: ticket.purchase().clone(), next: waiting.next, end });
            while self.left.len() > MOST_LEFT
                && let Some((id, left)) = self.left.pop_first()
            {
                left.purchase.end(id);
            }
        }
        Some(waiting)
    }

    /// No piece will come of those that were given up.
    fn forget_left(&mut self) {
        for (id, left) in std::mem::take(&mut self.left) {
            left.purchase.end(id);
        }
    }

    fn purchases(&self) -> Vec<Arc<Purchase>> {
        self.purchases.values().filter_map(Weak::upgrade).collect()
    }
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

    /// Asks for an answer of at most so many tokens, paid by the ticket's session; what goes wrong comes on the stream.
    pub fn ask(&self, request: Generation, timeout: Duration, ticket: Option<Ticket>, most: u64) -> Result<Stream<Chunk>> {
        let id = self.shared.ids.fetch_add(1, Ordering::Relaxed);
        let prompt_tokens = estimated_tokens(&request.input);
        let paid_by = ticket.as_ref().map(|ticket| ticket.purchase().session().clone());
        // Told before anything is sent, and in the words that the client will read.
        let timeout_ms = timeout.as_millis() as u64;
        let message = wire::encode(&Ask::Infer { id, request: Box::new(request), window: WINDOW, timeout_ms, paid_by })?;
        // Room for a whole window, so that the task that reads the connection never waits for one of its readers.
        let (pieces, answer) = Stream::channel(WINDOW as usize + 2);
        let mut state = self.shared.state.lock();
        if state.broken {
            return Err(PluginError::unavailable("the connection to the node broke"));
        }
        let read = Arc::<AtomicU64>::default();
        if let Some(ticket) = &ticket {
            ticket.purchase().asked(id, &message, prompt_tokens, most);
        }
        state.waiting.insert(id, Waiting { pieces, next: 0, read: read.clone(), ticket });
        self.put(&mut state, Outgoing { infer: Some(id), message });
        drop(state);
        Ok(Reading { answer, id, read, told: 0, over: false, shared: self.shared.clone() }.into_stream())
    }

    /// Asks a question about prices and deposits.
    ///
    /// # Errors
    /// The node's own, or `Unavailable` where it gives no answer.
    pub async fn call(&self, ask: impl FnOnce(u64) -> Ask) -> Result<Tell> {
        let id = self.shared.ids.fetch_add(1, Ordering::Relaxed);
        let message = wire::encode(&ask(id))?;
        let (tell, told) = oneshot::channel();
        {
            let mut state = self.shared.state.lock();
            if state.broken {
                return Err(PluginError::unavailable("the connection to the node broke"));
            }
            state.calls.insert(id, tell);
            self.put(&mut state, Outgoing { infer: None, message });
        }
        match tokio::time::timeout(QUESTION, told).await {
            Ok(Ok(told)) => told,
            Ok(Err(_)) => Err(PluginError::unavailable("the session with the node is over")),
            Err(_) => {
                self.shared.state.lock().calls.remove(&id);
                Err(PluginError::unavailable(format!("the node did not answer within {} s", QUESTION.as_secs())))
            }
        }
    }

    /// Says something that is not answered.
    ///
    /// # Errors
    /// Where it is more than a message holds.
    pub fn send(&self, ask: &Ask) -> Result<()> {
        let message = wire::encode(ask)?;
        self.put(&mut self.shared.state.lock(), Outgoing { infer: None, message });
        Ok(())
    }

    /// Sends a message in the session that there is, or begins one with it.
    fn put(&self, state: &mut State, outgoing: Outgoing) {
        let unsent = match &state.asks {
            Some(asks) => asks.send(outgoing).err().map(|mpsc::error::SendError(outgoing)| outgoing),
            None => Some(outgoing),
        };
        let Some(outgoing) = unsent else { return };
        let (asks, outbox) = mpsc::unbounded_channel();
        // The receiver is here.
        let _ = asks.send(outgoing);
        state.asks = Some(asks);
        let task = tokio::spawn(drive(Arc::downgrade(&self.shared), outbox));
        *self.task.lock() = Some(AbortOnDropHandle::new(task));
    }

    /// What the node says about this purchase goes to it from now on.
    pub fn pays(&self, purchase: &Arc<Purchase>) {
        let mut state = self.shared.state.lock();
        state.purchases.retain(|_, known| known.strong_count() > 0);
        state.purchases.insert(purchase.session().clone(), Arc::downgrade(purchase));
    }

    /// Ends the requests that are paid from this session.
    pub fn fail_paid(&self, session: &SessionId, error: &PluginError) {
        self.shared.fail_paid(session, error);
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
        let left = self.shared.state.lock().leave(self.id);
        drop(left);
        // Also where the last piece has come and was not read: the node keeps it until it knows.
        if !self.over {
            self.shared.tell(Ask::Cancel { id: self.id });
        }
    }
}

impl Shared {
    fn tell(&self, ask: Ask) {
        // These are small.
        let Ok(message) = wire::encode(&ask) else { return };
        if let Some(asks) = &self.state.lock().asks {
            // A session that has ended has forgotten the request already.
            let _ = asks.send(Outgoing { infer: None, message });
        }
    }

    /// Ends the session for everybody who waits.
    fn fail(&self, error: &PluginError) {
        let (waiting, calls) = {
            let mut state = self.state.lock();
            state.asks = None;
            state.broken = false;
            state.forget_left();
            state.purchases().iter().for_each(|purchase| purchase.lost());
            (std::mem::take(&mut state.waiting), std::mem::take(&mut state.calls))
        };
        for (id, waiting) in waiting {
            waiting.end(id, error.clone());
        }
        for call in calls.into_values() {
            // Whoever has given up waiting does not want to know.
            let _ = call.send(Err(error.clone()));
        }
    }

    /// Ends the requests that are paid from this session.
    fn fail_paid(&self, session: &SessionId, error: &PluginError) {
        let mut state = self.state.lock();
        let is_paid = |waiting: &Waiting| waiting.ticket.as_ref().is_some_and(|ticket| ticket.purchase().session() == session);
        let paid: Vec<u64> = state.waiting.iter().filter(|(_, waiting)| is_paid(waiting)).map(|(id, _)| *id).collect();
        let failed: Vec<Waiting> = paid.iter().filter_map(|id| state.leave(*id)).collect();
        drop(state);
        for waiting in failed {
            waiting.pieces.try_fail(error.clone());
        }
        paid.into_iter().for_each(|id| self.tell(Ask::Cancel { id }));
    }

    /// Ends the requests that have produced nothing yet: another node can have them at once.
    fn give_back(&self, error: &PluginError) {
        let mut state = self.state.lock();
        state.broken = true;
        let silent: Vec<u64> = state.waiting.iter().filter(|(_, waiting)| waiting.next == 0).map(|(id, _)| *id).collect();
        for id in silent {
            if let Some(waiting) = state.waiting.remove(&id) {
                waiting.end(id, error.clone());
            }
        }
        for call in std::mem::take(&mut state.calls).into_values() {
            let _ = call.send(Err(error.clone()));
        }
    }

    /// Takes a message, of which these are the bytes.
    fn take(&self, tell: Tell, message: &[u8]) -> Result<()> {
        match tell {
            Tell::Chunk { id, seq, chunk: Chunk::Text(mut text) } => {
                // A number of the node's own choice.
                text.tokens = wire::tokens_of(&text);
                self.take_piece(id, seq, Ok(Chunk::Text(text)), message)
            }
            Tell::Chunk { id, seq, chunk } => self.take_piece(id, seq, Ok(chunk), message),
            Tell::Failed { id, seq, refusal } => match self.called(id) {
                Some(call) => {
                    // Whoever has given up waiting does not want to know.
                    let _ = call.send(Err(refusal));
                    Ok(())
                }
                None => self.take_piece(id, seq, Err(refusal), message),
            },
            Tell::Offer { id, .. } | Tell::Funded { id, .. } | Tell::Settling { id, .. } => {
                if let Some(call) = self.called(id) {
                    let _ = call.send(Ok(tell));
                }
                Ok(())
            }
            Tell::Due { paid_by, amount, .. } => self.about(&paid_by, |purchase| purchase.reminded(amount)),
            Tell::Unpaid { paid_by, why } => self.about(&paid_by, |purchase| purchase.complained(&why)),
            Tell::Refused(refusal) => Err(refusal),
            Tell::Welcome { .. } | Tell::Resumed { .. } | Tell::Unknown => Ok(()),
        }
    }

    fn called(&self, id: u64) -> Option<oneshot::Sender<Result<Tell>>> {
        self.state.lock().calls.remove(&id)
    }

    /// What the node says about a funded session; where nothing can be done about it, the requests that it pays for end.
    fn about(&self, session: &SessionId, take: impl FnOnce(&Purchase) -> Result<()>) -> Result<()> {
        let purchase = self.state.lock().purchases.get(session).and_then(Weak::upgrade);
        if let Some(purchase) = purchase
            && let Err(error) = take(&purchase)
        {
            self.fail_paid(session, &error);
        }
        Ok(())
    }

    fn take_piece(&self, id: u64, seq: u64, piece: Result<Chunk>, message: &[u8]) -> Result<()> {
        let mut state = self.state.lock();
        // A piece that came before the drop, too.
        let Some(waiting) = state.waiting.get_mut(&id).filter(|waiting| waiting.next <= seq) else {
            return count_left(&mut state, id, seq, &piece, message);
        };
        if waiting.next < seq {
            return Err(PluginError::new(Code::Protocol, "the node left a piece of an answer out"));
        }
        let is_first = waiting.next == 0;
        waiting.next += 1;
        // Before anybody reads it: what was read is owed.
        if let Some(ticket) = &waiting.ticket {
            count(ticket.purchase(), id, &piece, message)?;
        }
        let over = !matches!(piece, Ok(Chunk::Text(_)));
        let taken = match piece {
            Ok(chunk) => matches!(waiting.pieces.try_send(chunk), Ok(None) | Err(_)),
            Err(error) => {
                let error = match &waiting.ticket {
                    Some(ticket) => refused(ticket.purchase(), error, is_first),
                    None => error,
                };
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

/// Counts a piece for the session that pays for it.
fn count(purchase: &Purchase, id: u64, piece: &Result<Chunk>, message: &[u8]) -> Result<()> {
    match piece {
        Ok(Chunk::Text(text)) => purchase.text(id, message, text.tokens),
        Ok(Chunk::Done(done)) => purchase.done(id, message, &done.usage),
        _ => {
            purchase.end(id);
            Ok(())
        }
    }
}

/// Counts a piece of an answer that was given up.
fn count_left(state: &mut State, id: u64, seq: u64, piece: &Result<Chunk>, message: &[u8]) -> Result<()> {
    let Some(left) = state.left.get_mut(&id).filter(|left| left.next == seq && seq < left.end) else { return Ok(()) };
    left.next += 1;
    let counted = count(&left.purchase, id, piece, message);
    if !matches!(piece, Ok(Chunk::Text(_))) {
        state.left.remove(&id);
    }
    counted
}

/// Why a paid request was refused, as the scheduler is to see it: another session, or another node, may answer what has not begun.
fn refused(purchase: &Purchase, error: PluginError, is_first: bool) -> PluginError {
    let error = match error.code {
        Code::Denied => purchase.denied(error),
        Code::NotFound if is_first => {
            purchase.lost();
            error
        }
        _ => return error,
    };
    if is_first { PluginError::unavailable(error.message) } else { error }
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
async fn drive(weak: Weak<Shared>, mut outbox: mpsc::UnboundedReceiver<Outgoing>) {
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
async fn talk(weak: &Weak<Shared>, conversation: &mut Conversation, outbox: &mut mpsc::UnboundedReceiver<Outgoing>) -> Over {
    let mut quiet = Instant::now();
    loop {
        tokio::select! {
            message = conversation.incoming.next() => {
                let Some(shared) = weak.upgrade() else { return Over::Idle };
                let taken = match message {
                    Some(Ok(message)) => wire::decode(&message).and_then(|tell| shared.take(tell, &message)),
                    Some(Err(error)) => Err(PluginError { code: Code::Unavailable, ..error }),
                    None => Err(PluginError::unavailable("the node left without a word")),
                };
                if let Err(error) = taken {
                    return Over::Broken(error);
                }
                quiet = Instant::now();
            }
            outgoing = outbox.recv() => {
                // The last sender goes with the link.
                let Some(Outgoing { infer, message }) = outgoing else { return Over::Idle };
                // Given up, or given back, before it was sent.
                if let Some(id) = infer
                    && !weak.upgrade().is_some_and(|shared| shared.state.lock().waiting.contains_key(&id))
                {
                    continue;
                }
                if conversation.outgoing.send(message).await.is_err() {
                    return Over::Broken(PluginError::unavailable("the connection to the node broke"));
                }
                quiet = Instant::now();
            }
            () = tokio::time::sleep_until(quiet + IDLE) => {
                let Some(shared) = weak.upgrade() else { return Over::Idle };
                let is_idle = {
                    let state = shared.state.lock();
                    state.waiting.is_empty() && state.calls.is_empty()
                };
                if is_idle {
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
                let lost: Vec<(u64, Waiting)> = {
                    let mut state = shared.state.lock();
                    state.broken = false;
                    state.forget_left();
                    // The last vouchers may not have arrived.
                    state.purchases().iter().for_each(|purchase| purchase.repeat());
                    let lost = named.iter().filter(|id| !requests.contains(id));
                    lost.filter_map(|id| Some((*id, state.waiting.remove(id)?))).collect()
                };
                for (id, waiting) in lost {
                    waiting.end(id, PluginError::unavailable("the node has lost this request"));
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
