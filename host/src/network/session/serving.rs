//! The end that answers.
//!
//! ```text
//! conversation --> read: Infer, Read, Cancel --> Request: a task that asks the scheduler
//!      ^                                             |
//!      +---- write: the pieces not sent yet <--------+ pieces, kept until they have been read
//! ```
//!
//! Where the node is paid, a request names the funded session that pays for it. What that may be delivered is decided by
//! [`crate::market::seller`]; here pieces wait for it.
//!
//! A session outlives its conversation: when that breaks, requests go on as far as their window lets them, and what they have produced
//! is kept until the asker is back, or the time is over.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fabstir_plugin_api::abi::Blob;
use fabstir_plugin_api::chain::{SessionId, Signature, Voucher};
use fabstir_plugin_api::context::Cx;
use fabstir_plugin_api::error::{Code, PluginError, Result};
use fabstir_plugin_api::inference::{Chunk, Generation};
use fabstir_plugin_api::stream::{Sender, Stream};
use fabstir_plugin_api::transport::PeerId;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::super::until_read;
use super::wire::{self, Ask, LINGER, MAX_WINDOW, Tell, Token, VERSION};
use crate::market::Seller;
use crate::market::seller::sessions::Funding;
use crate::market::seller::tab::{AnswerName, Due, Meter};
use crate::scheduler::{Refused, Scheduler, estimated_tokens};

/// How long a peer may take to say what it wants.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// Requests that a session may have, finished ones that were not read to their end among them.
const MOST_REQUESTS: usize = 64;
/// Questions of a session about prices and deposits that are answered at the same time.
const MOST_QUESTIONS: usize = 4;
/// Sessions in all; more are told to come back.
const MOST_SESSIONS: usize = 1024;
/// How often it is looked whether all requests have ended, and how long peers may take to read their ends.
const LOOK: Duration = Duration::from_millis(20);
const LAST_READ: Duration = Duration::from_secs(2);
/// How long an asker may read nothing of an answer before its slot is given to others.
const STALL: Duration = Duration::from_secs(90);
/// How long a session may have nothing to do.
const IDLE: Duration = Duration::from_secs(180);
/// The longest that a request may take.
const LONGEST: Duration = Duration::from_secs(3600);

/// The sessions of a node. Clones are the same.
#[derive(Clone)]
pub struct Sessions(Arc<Shared>);

struct Shared {
    scheduler: Arc<Scheduler>,
    seller: Option<Arc<Seller>>,
    sessions: Mutex<HashMap<Token, Arc<Session>>>,
    per_peer: usize,
    draining: AtomicBool,
}

struct Session {
    token: Token,
    peer: PeerId,
    state: Mutex<State>,
    /// Tells the writer that there may be something to send, or that another conversation has taken over.
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// Counts the conversations: only the latest one may write.
    conversation: u64,
    requests: BTreeMap<u64, Request>,
    /// The request that was written for last: the next one in turn comes after it.
    turn: u64,
    /// Messages that are about no request.
    notices: VecDeque<Blob>,
    /// Answers to questions about prices and deposits, on their way.
    questions: JoinSet<()>,
    /// Ends the session after a while, where there is no conversation.
    left: Option<AbortOnDropHandle<()>>,
    ended: bool,
}

struct Request {
    window: u64,
    /// The first piece that has not been read.
    read: u64,
    /// The next piece to send.
    sent: u64,
    /// The pieces from `read` on.
    kept: VecDeque<Blob>,
    /// Tells the task that its window has moved.
    moved: Arc<Notify>,
    over: bool,
    /// Drops the generation with the request.
    _task: AbortOnDropHandle<()>,
}

impl Request {
    fn next_to_send(&mut self) -> Option<Blob> {
        let piece = self.kept.get((self.sent - self.read) as usize)?.clone();
        self.sent += 1;
        Some(piece)
    }

    /// Forgets what was read; whether nothing more is to come.
    fn advance(&mut self, next: u64) -> bool {
        let read = (next.saturating_sub(self.read) as usize).min(self.kept.len());
        self.kept.drain(..read);
        self.read += read as u64;
        self.sent = self.sent.max(self.read);
        self.moved.notify_one();
        self.over && self.kept.is_empty()
    }
}

impl Sessions {
    /// `per_peer` sessions at most may one peer have. With a seller, prices are charged.
    pub fn new(scheduler: Arc<Scheduler>, per_peer: usize, seller: Option<Arc<Seller>>) -> Self {
        Self(Arc::new(Shared { scheduler, seller, sessions: Mutex::default(), per_peer, draining: AtomicBool::new(false) }))
    }

    /// Sessions that are kept now, those without a conversation among them.
    pub fn count(&self) -> usize {
        self.0.sessions.lock().len()
    }

    /// Refuses new requests from now on, and returns when those that run have ended.
    pub async fn drain(&self) {
        self.0.draining.store(true, Ordering::Release);
        while self.any(|request| !request.over) {
            tokio::time::sleep(LOOK).await;
        }
        // What was produced last is still on its way.
        let read = async {
            while self.any(|_| true) {
                tokio::time::sleep(LOOK).await;
            }
        };
        let _ = tokio::time::timeout(LAST_READ, read).await;
    }

    pub fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Acquire)
    }

    fn any(&self, is: impl Fn(&Request) -> bool) -> bool {
        self.0.sessions.lock().values().any(|session| session.state.lock().requests.values().any(&is))
    }

    /// Serves one conversation to its end.
    pub async fn serve(&self, peer: PeerId, mut incoming: Stream<Blob>, outgoing: Sender<Blob>) {
        let (session, conversation) = match self.begin(&peer, &mut incoming).await {
            Ok(begun) => begun,
            Err(error) => {
                tracing::debug!(%peer, code = %error.code, %error, "Session refused.");
                if let Ok(message) = wire::encode(&Tell::Refused(error)) {
                    // A peer that has left needs no reason.
                    let _ = outgoing.send(message).await;
                }
                drop(outgoing);
                return until_read(incoming).await;
            }
        };
        let mut parting = Parting { sessions: self, session: &session, conversation, bye: false };
        let ended = tokio::select! {
            ended = self.read(&session, &mut incoming) => ended,
            // Nothing more would come from here: the asker is not to wait for it.
            () = write(session.clone(), conversation, outgoing) => Err(PluginError::unavailable("it cannot be written to any more")),
        };
        match ended {
            Ok(()) => parting.bye = true,
            Err(error) => tracing::debug!(%peer, session = ?session.token, %error, "A session's conversation broke off."),
        }
    }

    async fn begin(&self, peer: &PeerId, incoming: &mut Stream<Blob>) -> Result<(Arc<Session>, u64)> {
        let first = tokio::time::timeout(FIRST_MESSAGE, incoming.next()).await;
        let first = match first {
            Ok(Some(first)) => wire::decode(&first?)?,
            Ok(None) => return Err(PluginError::new(Code::Protocol, "the conversation ended before its first message")),
            Err(_) => return Err(PluginError::new(Code::DeadlineExceeded, "no first message came within 10 s")),
        };
        match first {
            Ask::Hello { version: VERSION } => self.open(peer),
            Ask::Hello { version } => Err(PluginError::new(
                Code::Unimplemented,
                format!("this node speaks version {VERSION} of sessions, not {version}"),
            )),
            Ask::Resume { session, requests } => {
                // A session of another peer is as unknown as one that never was.
                let found = self.0.sessions.lock().get(&session).filter(|found| found.peer == *peer).cloned();
                let session = found.ok_or_else(|| PluginError::not_found("there is no such session, or its time was over"))?;
                let conversation = session.resume(&requests)?;
                Ok((session, conversation))
            }
            _ => Err(PluginError::new(Code::Protocol, "a conversation begins with hello or resume")),
        }
    }

    fn open(&self, peer: &PeerId) -> Result<(Arc<Session>, u64)> {
        let token = Token::random();
        let welcome = Tell::Welcome {
            version: VERSION,
            session: token.clone(),
            linger_ms: LINGER.as_millis() as u64,
            requests: MOST_REQUESTS as u32,
        };
        let state = State { conversation: 1, notices: [wire::encode(&welcome)?].into(), ..State::default() };
        let session = Session { token: token.clone(), peer: peer.clone(), state: Mutex::new(state), changed: Notify::new() };
        let session = Arc::new(session);
        let mut sessions = self.0.sessions.lock();
        let busy = |why: String| PluginError::new(Code::Overloaded, why).retry_after(Duration::from_secs(5));
        if sessions.len() >= MOST_SESSIONS {
            return Err(busy(format!("{MOST_SESSIONS} sessions are open")));
        }
        let most = self.0.per_peer;
        if sessions.values().filter(|other| other.peer == *peer).count() >= most {
            return Err(busy(format!("{most} sessions with this peer are open: use one for several requests")));
        }
        sessions.insert(token, session.clone());
        Ok((session, 1))
    }

    /// Reads until the session is over; an error where only the conversation is.
    async fn read(&self, session: &Arc<Session>, incoming: &mut Stream<Blob>) -> Result<()> {
        loop {
            let message = match tokio::time::timeout(IDLE, incoming.next()).await {
                Ok(Some(message)) => message?,
                Ok(None) => return Err(PluginError::unavailable("the peer left without a word")),
                Err(_) if session.state.lock().requests.is_empty() => return Ok(()),
                Err(_) => continue,
            };
            match wire::decode(&message)? {
                Ask::Infer { id, request, window, timeout_ms, paid_by } => {
                    let meter = self.meter(session, id, &request, paid_by.as_ref(), &message).await;
                    self.infer(session, id, *request, window, timeout_ms, meter)?;
                }
                Ask::Price { id, model, client } => {
                    self.question(session, id, async move |seller| {
                        let offered = seller.offer(&model, client).await?;
                        let (terms, credit, sure_above) = (Box::new(offered.terms), offered.credit, offered.sure_above);
                        Ok(Tell::Offer { id, terms, signature: offered.signature, credit, sure_above })
                    })?;
                }
                Ask::Fund { id, terms, offer, before, voucher, signature } => {
                    let peer = session.peer.clone();
                    let funding = Funding { terms: *terms, offer, before, voucher: *voucher, signature };
                    self.question(session, id, async move |seller| {
                        let tab = seller.fund(&peer, funding).await?;
                        Ok(Tell::Funded { id, deposit: tab.deposit() })
                    })?;
                }
                Ask::Settle { id, paid_by } => {
                    let peer = session.peer.clone();
                    self.question(session, id, async move |seller| {
                        let amount = seller.end(&peer, &paid_by)?;
                        Ok(Tell::Settling { id, amount })
                    })?;
                }
                // In order, and each on disk before the next is looked at.
                Ask::Pay { voucher, signature, answers } => {
                    let paid_by = voucher.session.clone();
                    if let Err(why) = self.pay(session, *voucher, signature, answers).await {
                        tracing::warn!(session = %paid_by, peer = %session.peer, code = %why.code, %why, "A voucher was not taken.");
                        session.note(&Tell::Unpaid { paid_by, why })?;
                    }
                }
                Ask::Read { id, next } => {
                    let mut state = session.state.lock();
                    if state.requests.get_mut(&id).is_some_and(|request| request.advance(next)) {
                        state.requests.remove(&id);
                    }
                }
                Ask::Cancel { id } => drop(session.state.lock().requests.remove(&id)),
                Ask::Bye => return Ok(()),
                Ask::Hello { .. } | Ask::Resume { .. } => {
                    return Err(PluginError::new(Code::Protocol, "a conversation has one beginning"));
                }
                Ask::Unknown => {}
            }
        }
    }

    fn seller(&self) -> Result<Arc<Seller>> {
        self.0.seller.clone().ok_or_else(|| PluginError::invalid("nothing is charged here: ask without a session"))
    }

    /// Answers a question about prices or deposits, beside what else is said.
    fn question<F>(&self, session: &Arc<Session>, id: u64, answer: impl FnOnce(Arc<Seller>) -> F) -> Result<()>
    where
        F: Future<Output = Result<Tell>> + Send + 'static,
    {
        let failed = move |refusal: PluginError| Tell::Failed { id, seq: 0, refusal };
        let seller = match self.seller() {
            Ok(seller) => seller,
            Err(refusal) => return session.note(&failed(refusal)),
        };
        let answer = answer(seller);
        let (asked, state) = (session.clone(), &mut *session.state.lock());
        while state.questions.try_join_next().is_some() {}
        if state.questions.len() >= MOST_QUESTIONS {
            let why = format!("{MOST_QUESTIONS} questions of this session are being answered");
            let refusal = PluginError::new(Code::Overloaded, why).retry_after(Duration::from_secs(1));
            return state.note(&failed(refusal)).map(|()| session.changed.notify_one());
        }
        state.questions.spawn(async move {
            let told = answer.await.unwrap_or_else(failed);
            // A peer that reads nothing has lost its session: the reader of its messages finds out.
            let _ = asked.note(&told);
        });
        Ok(())
    }

    /// What counts for a request; `None` where nothing is charged.
    async fn meter(
        &self,
        session: &Session,
        id: u64,
        request: &Generation,
        paid_by: Option<&SessionId>,
        infer: &[u8],
    ) -> Result<Option<Meter>> {
        let Some(seller) = &self.0.seller else {
            return match paid_by {
                None => Ok(None),
                Some(_) => self.seller().map(|_| None),
            };
        };
        let tab = seller.tab_for(&session.peer, &request.model, paid_by).await?;
        Ok(tab.map(|tab| tab.meter(session.answer_name(id), infer, estimated_tokens(&request.input))))
    }

    async fn pay(&self, session: &Session, voucher: Voucher, signature: Signature, answers: Vec<u64>) -> Result<()> {
        let answers: Vec<AnswerName> = answers.into_iter().map(|id| session.answer_name(id)).collect();
        self.seller()?.pay(&session.peer, voucher, signature, &answers).await
    }

    /// `meter` counts what it costs, or says why it is not answered.
    fn infer(
        &self,
        session: &Arc<Session>,
        id: u64,
        request: Generation,
        window: u32,
        timeout_ms: u64,
        meter: Result<Option<Meter>>,
    ) -> Result<()> {
        let mut state = session.state.lock();
        if state.requests.contains_key(&id) {
            return Err(PluginError::new(Code::Protocol, "a request has the id of one that runs"));
        }
        let meter = if state.requests.len() >= MOST_REQUESTS {
            let why = format!("{MOST_REQUESTS} requests of this session are not read to their end");
            Err(PluginError::new(Code::Overloaded, why).retry_after(Duration::from_secs(1)))
        } else if self.is_draining() {
            Err(PluginError::unavailable("the node is about to leave"))
        } else {
            meter
        };
        let meter = match meter {
            Ok(meter) => meter,
            Err(refusal) => {
                state.note(&Tell::Failed { id, seq: 0, refusal })?;
                drop(state);
                session.changed.notify_one();
                return Ok(());
            }
        };
        // Two clients must not share what the model has cached, nor overtake others.
        let request = Generation { cache_salt: session.peer.to_string(), priority: 0, ..request };
        let moved = Arc::<Notify>::default();
        let timeout = Duration::from_millis(timeout_ms).min(LONGEST);
        let task = answer(self.0.scheduler.clone(), session.clone(), id, request, timeout, meter);
        let request = Request {
            window: window.clamp(1, MAX_WINDOW).into(),
            read: 0,
            sent: 0,
            kept: VecDeque::new(),
            moved,
            over: false,
            _task: AbortOnDropHandle::new(tokio::spawn(task)),
        };
        state.requests.insert(id, request);
        Ok(())
    }

    /// Forgets a session. `state` is its own, so that nobody goes on with it meanwhile.
    fn end(&self, session: &Session, mut state: MutexGuard<'_, State>) {
        state.ended = true;
        let requests = std::mem::take(&mut state.requests);
        drop(state);
        self.0.sessions.lock().remove(&session.token);
        // Outside the locks: each ends its generation.
        drop(requests);
    }
}

/// What becomes of a session when its conversation is over, however that happens.
struct Parting<'a> {
    sessions: &'a Sessions,
    session: &'a Arc<Session>,
    conversation: u64,
    /// The asker has ended it.
    bye: bool,
}

impl Drop for Parting<'_> {
    fn drop(&mut self) {
        let mut state = self.session.state.lock();
        // Another conversation has taken over.
        if state.conversation != self.conversation {
            return;
        }
        // Without requests there is nothing to keep; without a runtime the node has ended.
        let runtime = tokio::runtime::Handle::try_current().ok().filter(|_| !self.bye && !state.requests.is_empty());
        let Some(runtime) = runtime else { return self.sessions.end(self.session, state) };
        let (sessions, session) = (self.sessions.clone(), self.session.clone());
        let forget = runtime.spawn(async move {
            tokio::time::sleep(LINGER).await;
            let state = session.state.lock();
            if state.left.is_some() {
                sessions.end(&session, state);
            }
        });
        state.left = Some(AbortOnDropHandle::new(forget));
    }
}

impl State {
    /// Says something that is about no piece of an answer.
    fn note(&mut self, tell: &Tell) -> Result<()> {
        self.notices.push_back(wire::encode(tell)?);
        // A peer that asks on and on without reading what it is told has lost its session.
        match self.notices.len() > 2 * MOST_REQUESTS {
            true => Err(PluginError::new(Code::Protocol, "the peer does not read what it is told")),
            false => Ok(()),
        }
    }
}

impl Session {
    fn note(&self, tell: &Tell) -> Result<()> {
        let noted = self.state.lock().note(tell);
        self.changed.notify_one();
        noted
    }

    /// Reminds the peer of what is due, unless it has so much unread already that it would not help.
    fn remind(&self, paid_by: &SessionId, due: Due) {
        let Due { amount, input_tokens, output_tokens } = due;
        if self.state.lock().notices.len() < MOST_REQUESTS {
            let _ = self.note(&Tell::Due { paid_by: paid_by.clone(), amount, input_tokens, output_tokens });
        }
    }

    fn answer_name(&self, id: u64) -> AnswerName {
        (self.token.secret().to_owned(), id)
    }

    /// Makes another conversation the one that is written to.
    fn resume(&self, requests: &[wire::From]) -> Result<u64> {
        let mut state = self.state.lock();
        if state.ended {
            return Err(PluginError::not_found("the session's time was over"));
        }
        state.left = None;
        state.conversation += 1;
        state.notices.clear();
        let mut known = Vec::new();
        for from in requests {
            if let Some(request) = state.requests.get_mut(&from.id)
                && (request.read..=request.read + request.kept.len() as u64).contains(&from.next)
                && from.read <= from.next
            {
                if request.advance(from.read) {
                    state.requests.remove(&from.id);
                    continue;
                }
                request.sent = from.next;
                known.push(from.id);
            }
        }
        // What the asker does not name, it does not want.
        state.requests.retain(|id, _| known.contains(id));
        state.notices.push_back(wire::encode(&Tell::Resumed { requests: known })?);
        let conversation = state.conversation;
        drop(state);
        self.changed.notify_one();
        Ok(conversation)
    }

    /// Adds the next piece of an answer, once the window allows it; `false` where nobody wants it any more.
    async fn add(&self, id: u64, seq: u64, piece: Blob, over: bool) -> bool {
        loop {
            let moved = {
                let mut state = self.state.lock();
                let Some(request) = state.requests.get_mut(&id) else { return false };
                // The end needs no place of its own: it is one message, and nothing follows it.
                if over || seq < request.read + request.window {
                    request.kept.push_back(piece);
                    request.over = over;
                    drop(state);
                    self.changed.notify_one();
                    return true;
                }
                request.moved.clone()
            };
            moved.notified().await;
        }
    }

    /// What is to be written next on a conversation; `None` where there is nothing, an error where another has taken over.
    fn next(&self, conversation: u64) -> std::result::Result<Option<Blob>, ()> {
        let mut state = self.state.lock();
        if state.conversation != conversation {
            return Err(());
        }
        let state = &mut *state;
        if let Some(notice) = state.notices.pop_front() {
            return Ok(Some(notice));
        }
        let after = (Bound::Excluded(state.turn), Bound::Unbounded);
        let next = |(id, request): (&u64, &mut Request)| request.next_to_send().map(|piece| (*id, piece));
        let found =
            state.requests.range_mut(after).find_map(next).or_else(|| state.requests.range_mut(..=state.turn).find_map(next));
        Ok(found.map(|(id, piece)| {
            state.turn = id;
            piece
        }))
    }
}

/// Writes what is to be written, until the conversation is over.
async fn write(session: Arc<Session>, conversation: u64, outgoing: Sender<Blob>) {
    loop {
        match session.next(conversation) {
            Ok(Some(message)) => {
                if outgoing.send(message).await.is_err() {
                    return;
                }
            }
            Ok(None) => session.changed.notified().await,
            Err(()) => {
                // The one that took over may have been told in this one's place.
                session.changed.notify_one();
                return;
            }
        }
    }
}

/// Asks the scheduler, and adds the pieces of the answer as they come, and as they are paid.
async fn answer(
    scheduler: Arc<Scheduler>,
    session: Arc<Session>,
    id: u64,
    request: Generation,
    timeout: Duration,
    mut meter: Option<Meter>,
) {
    let cx = Cx::new().with_timeout(timeout);
    let failed = |seq, refusal| Tell::Failed { id, seq, refusal };
    let paid_by = meter.as_ref().map(|meter| meter.session().clone()).unwrap_or_default();
    let remind = |due| session.remind(&paid_by, due);
    if let Some(meter) = &mut meter
        && let Err(refusal) = meter.admit(&remind).await
    {
        return add(&session, id, 0, &failed(0, refusal)).await;
    }
    let mut answer = match scheduler.generate(cx, request).await {
        Ok(answer) => answer,
        Err(refused) => return add(&session, id, 0, &failed(0, told(refused))).await,
    };
    let mut seq = 0;
    while let Some(chunk) = answer.next().await {
        let chunk = match chunk {
            Ok(Chunk::Text(text)) => text,
            ended => {
                // The slot is free before the asker has read the end.
                drop(answer);
                let last = match ended {
                    Ok(chunk) => Tell::Chunk { id, seq, chunk },
                    Err(refused) => failed(seq, told(refused)),
                };
                return end(&session, id, seq, &last, meter).await;
            }
        };
        let tell = Tell::Chunk { id, seq, chunk: Chunk::Text(chunk) };
        let Ok(piece) = wire::encode(&tell) else {
            let refusal = PluginError::internal("a piece of the answer is larger than a message may be");
            return add(&session, id, seq, &failed(seq, refusal)).await;
        };
        if let (Some(meter), Tell::Chunk { chunk: Chunk::Text(text), .. }) = (&mut meter, &tell)
            && let Err(refusal) = meter.release(text, &piece, &remind).await
        {
            drop(answer);
            return add(&session, id, seq, &failed(seq, refusal)).await;
        }
        match tokio::time::timeout(STALL, session.add(id, seq, piece, false)).await {
            Ok(true) => seq += 1,
            Ok(false) => return,
            Err(_) => {
                drop(answer);
                let refusal = PluginError::new(Code::DeadlineExceeded, "the answer was not read in time");
                return add(&session, id, seq, &failed(seq, refusal)).await;
            }
        }
    }
}

fn told(refused: Refused) -> PluginError {
    let retry_after_ms = refused.retry_after.map(|wait| wait.as_millis() as u64);
    PluginError { retry_after_ms, ..PluginError::new(refused.code, refused.message) }
}

/// Adds an answer's last piece, and counts what the whole has come to.
async fn end(session: &Session, id: u64, seq: u64, last: &Tell, meter: Option<Meter>) {
    match wire::encode(last) {
        Ok(piece) => {
            if let (Some(meter), Tell::Chunk { chunk: Chunk::Done(done), .. }) = (meter, last) {
                meter.done(&done.usage, &piece);
            }
            // Where nobody wants it any more, it was still counted.
            let _ = session.add(id, seq, piece, true).await;
        }
        Err(error) => tracing::error!(%error, "The end of an answer cannot be sent."),
    }
}

/// Adds an answer's last piece, which costs nothing.
async fn add(session: &Session, id: u64, seq: u64, last: &Tell) {
    end(session, id, seq, last, None).await;
}
